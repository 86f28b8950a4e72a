"""The limit of RDMA: what ib_read_bw and ib_write_bw say of pieces of the same size.

They are programs that run once with memory of their own, so a prepared run starts one at each end
and hands on the rate that it printed: the same bytes a piece, queue pairs and pieces under way as
our engine has, but the same piece again and again instead of a list. Each device here is paired
with the target's of the same place in the list; all pairs run at the same time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from mooncake_engine import topology
from typing_extensions import override

from mooncake_connector.bench import base, perftest
from mooncake_connector.bench.base import BackendFailed, Route, Transfer, Variant
from mooncake_connector.bench.perftest import Link, PerftestFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import BufferedRWPair

    from numpy.typing import NDArray

QUEUE_PAIRS = 2  # rdma.num_qp's default
DEPTH = 128  # on each; more than both programs' own default never helped
READS = 16  # rdma.max_rd_atomic's default
POLL_S = 0.1  # between two looks at a program; its own result is not touched by it
LEAST = 5  # iterations; perftest refuses fewer
MIB = 1 << 20


def missing() -> str:
    """No RDMA device, or no perftest."""
    if not topology.discover().nics:
        return "this machine has no RDMA device"
    return perftest.missing()


def variants(route: Route) -> tuple[Variant, ...]:
    """One: the program knows whether it reads or writes by the transfer."""
    if route is not Route.RDMA:
        return ()
    perftest_itself = Variant(
        backend="perftest", name="perftest", route=route, is_limit=True, moves_bytes=False
    )
    return (perftest_itself,)


class Ask(msgspec.Struct, frozen=True):
    """What the target's program is to be started with; see `Link.command`."""

    link: Link
    op: str
    nbytes: int
    iterations: int
    port: int

    def command(self) -> list[str]:
        """The same for both ends."""
        return self.link.command(self.op, self.nbytes, self.iterations, self.port)


def devices(options: Mapping[str, str]) -> list[str]:
    """Those in `device_name`, or all that are up."""
    if named := [name for name in options.get("device_name", "").split(",") if name]:
        return named
    nics = topology.discover().nics
    active = [nic.name for nic in nics if any(port.state == "ACTIVE" for port in nic.ports)]
    return active or [nic.name for nic in nics]  # a Soft-RoCE device moves bytes while DOWN


class Target(base.Target):
    """Starts the end that is asked, once for each run."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """`memory` is not used: perftest has its own."""
        del memory
        self._devices = devices(options)
        host = options.get("host", "127.0.0.1")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @override
    def address(self) -> dict[str, str]:
        host, port = self._listener.getsockname()[:2]
        return {"host": host, "port": str(port), "devices": ",".join(self._devices)}

    @override
    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with ThreadPoolExecutor() as pool:
            while True:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                pool.submit(_serve, sock, self._closing)


def _serve(sock: socket.socket, closing: threading.Event) -> None:
    """Answers one question when the program listens and when it has ended: "", or what is wrong."""
    with sock, sock.makefile("rwb") as channel:
        ask = msgspec.json.decode(channel.readline(), type=Ask)
        try:
            server = perftest.start_server(ask.command(), ask.link.theirs, ask.port)
        except PerftestFailed as failed:
            _answer(channel, str(failed))
            return
        _answer(channel, "")
        with server:
            while server.poll() is None:
                # It waits for its client for ever; that end leaves when its own program failed.
                if closing.is_set() or select.select([sock], (), (), POLL_S)[0]:
                    server.terminate()
                    break
            said, _ = server.communicate()
        _answer(channel, said if server.returncode else "")


def _answer(channel: BufferedRWPair, text: str) -> None:
    channel.write(msgspec.json.encode(text) + b"\n")
    channel.flush()


class Initiator(base.Initiator):
    """Starts the end that asks."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """`memory` is not used. Args: options: "device_name", "gid_index"."""
        del memory
        self._devices = devices(options)
        self._gid_index = int(options.get("gid_index", "-1"))
        self._address = ("", 0)
        self._theirs: list[str] = []

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._address = (address["host"], int(address["port"]))
        self._theirs = address["devices"].split(",")

    @override
    def prepare(self, transfer: Transfer) -> Programs:
        sizes = np.unique(transfer.lengths)
        if sizes.size != 1:
            raise BackendFailed(
                f"perftest moves pieces of one size, not of {int(sizes[0])} to {int(sizes[-1])} "
                "bytes; ask for no limit with this workload"
            )
        pairs = list(zip(self._devices, self._theirs, strict=False))
        pieces = -(-transfer.lengths.size // len(pairs))  # of one run, on each pair of devices
        queue_pairs = min(QUEUE_PAIRS, pieces)
        links = [
            Link(
                ours=ours,
                theirs=theirs,
                address=self._address[0],
                gid_index=self._gid_index,
                queue_pairs=queue_pairs,
                depth=min(DEPTH, -(-pieces // queue_pairs)),
                reads=READS,
                mtu=0,
            )
            for ours, theirs in pairs
        ]
        return Programs(transfer, links, pieces, self._address)

    @override
    def close(self) -> None:
        pass  # nothing runs between two runs


class Programs:
    """A prepared run."""

    def __init__(
        self, transfer: Transfer, links: list[Link], pieces: int, address: tuple[str, int]
    ) -> None:
        self._op, self._piece = transfer.op, int(transfer.lengths[0])
        self._nbytes = transfer.nbytes
        self._links, self._pieces, self._address = links, pieces, address

    def __call__(self) -> None:
        """Start the programs for one run."""
        self.many(1)

    def many(self, runs: int) -> NDArray[np.float64]:
        """`runs` times what one run takes at the rate of at least so many: perftest's average."""
        with ThreadPoolExecutor(len(self._links)) as pool:
            rates = list(pool.map(lambda link: self._rate(link, runs), self._links))
        return np.full(runs, self._nbytes / (sum(rates) * MIB))

    def _rate(self, link: Link, runs: int) -> float:
        iterations = max(link.depth, LEAST, -(-self._pieces * runs // link.queue_pairs))
        try:
            with (
                socket.create_connection(self._address, perftest.WAIT_S) as sock,
                sock.makefile("rwb") as channel,
            ):
                sock.settimeout(perftest.LIMIT_S)
                port = _free_port(self._address[0])
                ask = Ask(link, self._op, self._piece, iterations, port)
                channel.write(msgspec.json.encode(ask) + b"\n")
                channel.flush()
                _expect(channel)
                rate = perftest.run_client(ask.command(), link.ours, link.address)
                _expect(channel)
        except (OSError, PerftestFailed, msgspec.DecodeError) as failure:
            raise BackendFailed(
                f"perftest from {link.ours} to {link.theirs} at {self._address[0]}: {failure}; "
                "do the same two programs work by hand?"
            ) from failure
        return rate


def _expect(channel: BufferedRWPair) -> None:
    if said := msgspec.json.decode(channel.readline(), type=str):
        raise PerftestFailed(f"its server said: {said}")


def _free_port(host: str) -> int:
    """A port that nobody listens on here; the target is very likely to have it free, too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
