"""Which variants a run compares: ours, the machine's limit, and the peers that were asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec
from mooncake_engine.errors import ConfigError

from mooncake_connector.bench.backends import ours
from mooncake_connector.bench.base import Route

if TYPE_CHECKING:
    from mooncake_connector.bench.base import Backend, Variant
    from mooncake_connector.bench.options import Options

#: The backend whose variants say what the machine can do.
LIMITS = {Route.TCP: "sockets", Route.SAME_HOST: "memcpy", Route.RDMA: "perftest"}


class Lineup(NamedTuple):
    """Who takes part, in the table's order; `no_limit` says why there is none, if so."""

    ours: Variant
    limits: tuple[Variant, ...]
    others: tuple[Variant, ...]
    no_limit: str

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All of them."""
        return (self.ours, *self.others, *self.limits)


def lineup(options: Options) -> Lineup:
    """Find them.

    Raises:
        ConfigError: What was asked for cannot run here: why, and what to install.
    """
    found = ours.variants(options.route)
    if not found:
        raise ConfigError(
            f"--protocol={options.protocol}: this machine has no RDMA device that can be used; "
            "`mooncake-connector topology` lists what there is"
        )
    default, *rest = (_with_settings(variant, options) for variant in found)
    limits, no_limit = _limits(options)
    others = tuple(variant for peer in options.peers for variant in _peer(peer, options.route))
    # What our engine can be set to is of interest beside the peers' settings only.
    return Lineup(default, limits, (*rest, *others) if others else (), no_limit)


def backend(name: str) -> Backend:
    """The module, which imports its engine only when a side is made."""
    return cast("Backend", importlib.import_module(f"mooncake_connector.bench.backends.{name}"))


def _with_settings(variant: Variant, options: Options) -> Variant:
    given = {"metadata_server": options.metadata_server, "device_name": ",".join(options.devices)}
    told = {name: value for name, value in given.items() if value}
    return msgspec.structs.replace(variant, options={**variant.options, **told})


def _limits(options: Options) -> tuple[tuple[Variant, ...], str]:
    if not options.limits:
        return (), ""
    if options.target_seg_name and options.route is Route.SAME_HOST:
        return (), "no limit: memcpy is measured with both sides in one command"
    limit = backend(LIMITS[options.route])
    if reason := limit.missing():
        return (), f"no limit: {reason}"
    found = (one for one in limit.variants(options.route) if one.is_limit)
    return tuple(_with_settings(one, options) for one in found), ""


def _peer(name: str, route: Route) -> tuple[Variant, ...]:
    peer = backend(name)
    if reason := peer.missing():
        raise ConfigError(f"--peers={name}: {reason}")
    variants = peer.variants(route)
    if not variants:
        raise ConfigError(f"--peers={name}: it has no way to run over {route}")
    return variants
