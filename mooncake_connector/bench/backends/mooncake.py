"""Mooncake's TransferEngine over TCP, from the wheel `mooncake-transfer-engine-non-cuda`.

Its defaults open a connection for each slice of 64 KiB; a pool of connections and slices of 1 MiB
are the best settings found. It does not join runs, so a careful caller does: both are measured.
Its wheel has no same-host path for CPU memory.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from mooncake_connector.bench import base
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.bench.runs import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

# The log of a side is read by people: connection pools tell of each connection at INFO.
# Its default patience ends a run on a machine that is very busy, and with it the variant's turns.
_PATIENCE = {"MC_TCP_STATUS_TIMEOUT_SEC": "60", "MC_TCP_PROGRESS_TIMEOUT_SEC": "60"}
_TCP = {"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "WARNING"} | _PATIENCE
_POOL = {"MC_TCP_ENABLE_CONNECTION_POOL": "1"}
# The engine reads the first for RDMA and, in 0.3.13, the second for TCP; older wheels know one.
_SLICES = {"MC_SLICE_SIZE": str(1 << 20), "MC_TCP_SLICE_SIZE": str(1 << 20)}
_SETTINGS = {"": {}, ", pool": _POOL, ", pool, 1 MiB slices": _POOL | _SLICES}


def missing() -> str:
    """Why Mooncake cannot run here; empty when it can."""
    if importlib.util.find_spec("mooncake"):
        return ""
    return "Mooncake is not installed: pip install mooncake-transfer-engine-non-cuda"


def variants(route: Route) -> tuple[Variant, ...]:
    """Its defaults, the pool, and the pool with large slices; each as given and merged."""
    if route is not Route.TCP:
        return ()
    return tuple(
        Variant(
            backend="mooncake",
            name=f"Mooncake tcp{settings}{', runs merged' if merge else ''}",
            route=route,
            options={"merge": "yes"} if merge else {},
            environment=_TCP | environment,
        )
        for settings, environment in _SETTINGS.items()
        for merge in (False, True)
    )


def _engine(memory: NDArray[np.uint8], host: str) -> Any:  # noqa: ANN401  # a compiled module without types
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise BackendFailed(
            f"Mooncake's engine cannot be imported: {error}. Its CUDA wheel needs CUDA; "
            f"mooncake-transfer-engine-non-cuda does not"
        ) from error
    engine = TransferEngine()
    if status := engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
        raise BackendFailed(f"Mooncake's engine did not start: initialize returned {status}")
    if status := engine.register_memory(memory.ctypes.data, memory.nbytes):
        raise BackendFailed(
            f"Mooncake did not register {memory.nbytes} bytes: register_memory returned {status}"
        )
    return engine


class _Side:
    """One engine and its memory."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        self._memory = memory
        self._merge = "merge" in options
        self._host = options.get("host", "127.0.0.1")
        self._engine = _engine(memory, self._host)

    def close(self) -> None:
        """Take the memory back; the engine ends with its process, it has no call for it."""
        if self._engine is not None:
            self._engine.unregister_memory(self._memory.ctypes.data)
            self._engine = None


class Target(_Side, base.Target):
    """The engine serves by itself."""

    @override
    def address(self) -> dict[str, str]:
        return {
            "session": f"{self._host}:{self._engine.get_rpc_port()}",
            "memory": str(self._memory.ctypes.data),
        }


class Initiator(_Side, base.Initiator):
    """Blocking calls, one for a batch; one descriptor alone has a call of its own."""

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        # It has no call that connects: the first transfer does.
        self._session = address["session"]
        self._remote = int(address["memory"])

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], None]:
        if self._merge:
            transfer = merged(transfer)
        local = (transfer.local + self._memory.ctypes.data).tolist()
        remote = (transfer.remote + self._remote).tolist()
        lengths = transfer.lengths.tolist()
        session, op = self._session, transfer.op
        arguments: tuple[Any, ...]
        if len(lengths) == 1:
            call = getattr(self._engine, f"transfer_sync_{op}")
            arguments = (session, local[0], remote[0], lengths[0])
        else:
            call = getattr(self._engine, f"batch_transfer_sync_{op}")
            arguments = (session, local, remote, lengths)

        def run() -> None:
            if status := call(*arguments):
                raise BackendFailed(
                    f"Mooncake's {op} of {len(lengths)} descriptors with {session} returned "
                    f"{status}; its own lines are in this side's log"
                )

        return run
