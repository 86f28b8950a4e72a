"""Our engine: what the connector does with a request's pages, and nothing else of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from mooncake_engine import EngineConfig, TransferEngine, topology
from mooncake_engine.errors import EngineError
from typing_extensions import override

from mooncake_connector.bench import base
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.config_legacy import BACKEND, ENDPOINTS, metadata_server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from mooncake_engine import Segment
    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

_PROTOCOLS = {Route.TCP: "tcp", Route.SAME_HOST: "shm", Route.RDMA: "rdma"}
_ANY_PORT = {"min_port": 0, "max_port": 0}


def missing() -> str:
    """Nothing: it is in this package."""
    return ""


def variants(route: Route) -> tuple[Variant, ...]:
    """Each transfer anew, as the connector moves pages; prepared once; and the route's own."""
    protocol = _PROTOCOLS[route]
    if route is Route.RDMA and not topology.discover().nics:
        return ()
    named = Variant(
        backend="ours", name=f"ours {protocol}", route=route, options={"protocol": protocol}
    )
    prepared = Variant(
        backend="ours",
        name=f"ours {protocol}, prepared",
        route=route,
        options={"protocol": protocol, "prepared": "true"},
    )
    if route is Route.TCP:
        name, own = "ours tcp, pure Python", {"native": "false"}
    elif route is Route.SAME_HOST:
        name, own = "ours shm, shared pages", {"prepared": "true", "share": "true"}
    else:
        return named, prepared
    special = Variant(backend="ours", name=name, route=route, options={"protocol": protocol, **own})
    return named, prepared, special


def configuration(options: Mapping[str, str]) -> EngineConfig:
    """Settings of one side.

    Args:
        options: `protocol` (auto: whatever the engine chooses), `host`, `metadata_server` (as in
            mooncake.json; p2p without), `device_name` (rdma, comma list), `lanes` (tcp, threads of
            shm), `native` (tcp), `share` (shm). `prepared` is for the initiator.
    """
    protocol = options.get("protocol", "auto")
    lanes = {"lanes_per_peer": int(options["lanes"])} if "lanes" in options else {}
    native = {"native": options["native"] == "true"} if "native" in options else {}
    threads = {"threads": int(options["lanes"])} if "lanes" in options else {}
    devices = [name for name in options.get("device_name", "").split(",") if name]
    metadata: dict[str, Any] = {"p2p_min_port": 0, "p2p_max_port": 0}
    if server := options.get("metadata_server", ""):
        found = metadata_server(server, "metadata_server")
        metadata |= {"backend": found[BACKEND], "endpoints": found[ENDPOINTS]}
    return msgspec.convert(
        {
            "protocol": protocol,
            "strict_transport": protocol != "auto",
            "host": options.get("host", "127.0.0.1"),
            "metadata": metadata,
            "tcp": _ANY_PORT | lanes | native,
            "shm": threads | {"share_registered": options.get("share") == "true"},
            "rdma": _ANY_PORT | {"devices": devices},
        },
        EngineConfig,
    )


class Target(base.Target):
    """Serves; the initiator finds it by its name in the metadata store."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._engine, self._base = _engine(memory, options)

    @override
    def address(self) -> dict[str, str]:
        return {"name": self._engine.name, "memory": str(self._base)}

    @override
    def close(self) -> None:
        self._engine.close()


class Initiator(base.Initiator):
    """Calls `transfer` as the connector does, or prepares it once as peers' lists are."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._engine, self._base = _engine(memory, options)
        self._prepares = options.get("prepared") == "true"
        self._segment: Segment | None = None
        self._far = 0

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        try:
            self._segment = self._engine.open_segment(address["name"])
        except EngineError as error:
            raise BackendFailed(f"cannot open segment {address['name']}: {error}") from error
        self._far = int(address["memory"])

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], float]:
        assert self._segment is not None, "connect comes first"
        segment, op, lengths = self._segment, transfer.op, transfer.lengths
        local, remote = transfer.local + self._base, transfer.remote + self._far
        engine = self._engine
        once = engine.prepare(op, segment, local, remote, lengths) if self._prepares else None

        def run() -> float:
            began = time.monotonic()
            prepared = once or engine.prepare(op, segment, local, remote, lengths)
            planned = time.monotonic() - began
            end = prepared.transfer()
            if not end.ok:
                raise BackendFailed(f"{op} of {end.nbytes} bytes: {end.status}: {end.error}")
            return planned + end.total_s

        return run

    @override
    def close(self) -> None:
        self._engine.close()


def _engine(memory: NDArray[np.uint8], options: Mapping[str, str]) -> tuple[TransferEngine, int]:
    """A running engine with that memory, and the address of its first byte."""
    try:
        engine = TransferEngine(configuration(options))
        try:
            return engine, engine.register_memory(memory).address
        except BaseException:
            engine.close()
            raise
    except EngineError as error:
        raise BackendFailed(f"our engine does not start with {dict(options)}: {error}") from error
