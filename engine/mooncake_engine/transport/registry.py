"""The transports there are. A module is imported when its transport is first started."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mooncake_engine.errors import ConfigError
from mooncake_engine.transport.base import Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

#: scheme -> "module:class", or the class of a transport from elsewhere.
_known: dict[str, str | type[Transport]] = {
    "shm": "mooncake_engine.transport.shm:ShmTransport",
    "rdma": "mooncake_engine.transport.rdma:RdmaTransport",
    "tcp": "mooncake_engine.transport.tcp:TcpTransport",
    "loopback": "mooncake_engine.transport.loopback:LoopbackTransport",
}

#: What `protocol: auto` tries, in order. loopback is for tests and serves only when asked for.
_auto: list[str] = ["shm", "rdma", "tcp"]


def register_transport(transport: type[Transport]) -> None:
    """Make a transport of your own known to engines created from now on, under its scheme.

    `auto` tries it after the built-in ones; `open_segment(..., protocol=scheme)` asks for it.
    """
    scheme = transport.scheme
    if _known.get(scheme, transport) is not transport:
        raise ConfigError(f"a transport with the scheme {scheme!r} exists already; rename yours")
    _known[scheme] = transport
    if scheme not in _auto:
        _auto.append(scheme)


def preference(protocol: str, *, strict: bool) -> Sequence[str]:
    """Schemes in the order to try them.

    Raises:
        ConfigError: No such transport.
    """
    if protocol == "auto":
        return tuple(_auto)
    if protocol not in _known:
        raise ConfigError(
            f"protocol {protocol!r}: this version has no such transport; "
            f"use auto or one of {', '.join(sorted(_known))}"
        )
    others = () if strict else tuple(scheme for scheme in _auto if scheme != protocol)
    return (protocol, *others)


def load(scheme: str) -> type[Transport]:
    """The class of a scheme that `preference` named."""
    target = _known[scheme]
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    transport = getattr(importlib.import_module(module), name)
    if not (isinstance(transport, type) and issubclass(transport, Transport)):
        raise TypeError(f"{target} is not a Transport")
    return transport
