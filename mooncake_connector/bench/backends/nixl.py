"""NIXL with its UCX backend, from the wheel `nixl-cu12`.

Over TCP, and on the same host with what UCX takes by itself (`cma`: process_vm_readv). Over TCP a
target needs its progress thread, since UCX emulates read and write there; an initiator that polls
does not, and is faster without. With `cma` neither does: the target then polls for news once a
millisecond, as a server's own loop would. Requests are made in three ways: anew from addresses in
each run, anew from prepped lists as vLLM does, or once and posted again. NIXL joins runs
itself where it is given prepped lists.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from mooncake_connector.bench import base
from mooncake_connector.bench.base import BackendFailed, Route, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

_ENVIRONMENT = {Route.TCP: {"UCX_TLS": "tcp"}, Route.SAME_HOST: {}}
_LABEL = {Route.TCP: "tcp", Route.SAME_HOST: "cma"}
_WITHOUT = {Route.TCP: ", no progress thread", Route.SAME_HOST: ", no progress threads"}
_OFF = {
    Route.TCP: {"initiator_progress": "no"},
    Route.SAME_HOST: {"initiator_progress": "no", "target_progress": "no"},
}
_QUIET = {"NIXL_LOG_LEVEL": "WARN", "UCX_LOG_LEVEL": "error"}
POLL_S = 0.001
_PACKAGES = ("nixl_cu12", "nixl_cu13", "nixl_rocm")  # `nixl` itself only picks one of them
_WAYS = {"plain": "", "prepped": ", prepped", "reposted": ", prepped and posted again"}


def missing() -> str:
    """Why NIXL cannot run here; empty when it can."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package):
            return ""
    return "NIXL is not installed: pip install --no-deps nixl-cu12 (pip's torch for it is CUDA's)"


def variants(route: Route) -> tuple[Variant, ...]:
    """With and without the initiator's progress thread, in each way to make requests."""
    if route not in _ENVIRONMENT:
        return ()
    return tuple(
        Variant(
            backend="nixl",
            name=f"NIXL {_LABEL[route]}{without}{words}",
            route=route,
            options={"way": way} | (_OFF[route] if without else {}),
            environment=_QUIET | _ENVIRONMENT[route],
        )
        for without in ("", _WITHOUT[route])
        for way, words in _WAYS.items()
    )


def _agent_classes() -> tuple[Any, Any, Any]:
    for package in _PACKAGES:
        if importlib.util.find_spec(package):
            try:
                module = importlib.import_module(f"{package}._api")
            except ImportError as error:
                raise BackendFailed(f"NIXL's {package} cannot be imported: {error}") from error
            return module.nixl_agent, module.nixl_agent_config, module.nixl_thread_sync_t
    raise BackendFailed(missing())


class _Side:
    """One agent and its memory."""

    def __init__(
        self, memory: NDArray[np.uint8], options: Mapping[str, str], progress: bool
    ) -> None:
        agent, config, sync = _agent_classes()
        self._way = options.get("way", "plain")
        self._base = memory.ctypes.data
        try:
            # Several threads may measure; an uncontended lock costs a few tens of nanoseconds.
            mode = sync.NIXL_THREAD_SYNC_STRICT
            self._agent = agent(
                f"bench-{os.getpid()}",
                config(enable_prog_thread=progress, backends=["UCX"], sync_mode=mode),
            )
            self._registered = self._agent.register_memory(
                [(self._base, memory.nbytes, 0, "")], "DRAM"
            )
        except Exception as error:  # its exceptions are its compiled module's own
            raise BackendFailed(f"NIXL did not start on {memory.nbytes} bytes: {error}") from error

    def close(self) -> None:
        """Take the memory back and let go of the agent.

        NIXL 1.5.1 ends its process with SIGSEGV whatever one does before (two lines that make an
        agent and end will do); nothing is measured by then.
        """
        if self._agent is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = self._agent = None


class Target(_Side, base.Target):
    """The agent's progress thread serves, or a thread that polls."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options, progress="target_progress" not in options)
        self._ending = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        if "target_progress" in options:
            self._poller.start()

    def _poll(self) -> None:
        while not self._ending.wait(POLL_S):
            self._agent.get_new_notifs()

    @override
    def address(self) -> dict[str, str]:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "memory": str(self._base)}

    @override
    def close(self) -> None:
        self._ending.set()
        if self._poller.is_alive():
            self._poller.join()
        super().close()


class Initiator(_Side, base.Initiator):
    """Posts a request and polls it, as NIXL's examples do."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options, progress="initiator_progress" not in options)
        self._made: list[Any] = []

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        try:
            name = self._agent.add_remote_agent(base64.b64decode(address["metadata"]))
            self._peer = name.decode() if isinstance(name, bytes) else name
            self._agent.make_connection(self._peer)
        except Exception as error:  # as above
            raise BackendFailed(f"NIXL did not connect: {error}") from error
        self._remote = int(address["memory"])

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], None]:
        local = _table(transfer.local + self._base, transfer.lengths)
        remote = _table(transfer.remote + self._remote, transfer.lengths)
        agent, peer, op = self._agent, self._peer, transfer.op.upper()
        if self._way == "plain":

            def run() -> None:
                handle = agent.initialize_xfer(
                    op,
                    agent.get_xfer_descs(local, "DRAM"),
                    agent.get_xfer_descs(remote, "DRAM"),
                    peer,
                )
                self._move(handle)
                agent.release_xfer_handle(handle)

            return run

        indices = np.arange(transfer.lengths.size, dtype=np.int32)
        ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM")
        theirs = agent.prep_xfer_dlist(peer, remote, "DRAM")
        self._made += [ours, theirs]
        if self._way == "reposted":
            made = agent.make_prepped_xfer(op, ours, indices, theirs, indices)
            self._made.insert(0, made)
            return lambda: self._move(made)

        def run_prepped() -> None:
            handle = agent.make_prepped_xfer(op, ours, indices, theirs, indices)
            self._move(handle)
            agent.release_xfer_handle(handle)

        return run_prepped

    def _move(self, handle: Any) -> None:  # noqa: ANN401  # its module has no types
        agent = self._agent
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise BackendFailed(f"NIXL's transfer with {self._peer} ended as {state}")

    @override
    def close(self) -> None:
        for made in self._made:
            made.release()
        self._made.clear()
        super().close()


def _table(addresses: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Its N x 3 form: address, length, device."""
    return np.stack([addresses, lengths, np.zeros_like(lengths)], axis=1)
