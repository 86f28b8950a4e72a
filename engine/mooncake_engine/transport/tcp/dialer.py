"""Opens lanes to one peer: connect, then a handshake that proves who is there."""

from __future__ import annotations

import time

from mooncake_engine.errors import LaneError
from mooncake_engine.transport import sockets
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.failures import explain
from mooncake_engine.transport.tcp.stream import DeadlinePassed, Stream
from mooncake_engine.types import Status


class Dialer:
    """Knows how to reach one incarnation of one engine. Safe to call from any thread."""

    def __init__(
        self, host: str, port: int, *, name: str, incarnation: str, timeout_s: float
    ) -> None:
        """`timeout_s` bounds connecting, and then the handshake."""
        self.peer = f"{name} at {sockets.host_port(host, port)}"
        self._host = host
        self._port = port
        self._incarnation = incarnation
        self._timeout_s = timeout_s

    def connect(self) -> Stream:
        """Reach the peer's kernel. Raises `LaneError`, PEER_GONE."""
        try:
            return Stream(sockets.dial(self._host, self._port, self._timeout_s))
        except (OSError, ValueError) as failure:  # ValueError: a host that no name can be
            raise LaneError(
                Status.PEER_GONE,
                f"cannot connect to {self.peer}: {failure}; is the engine running, and is the "
                "port reachable from here?",
            ) from failure

    def greet(self, stream: Stream) -> None:
        """Prove that the incarnation we look for answers and serves us. Raises `LaneError`."""
        deadline = time.monotonic() + self._timeout_s
        try:
            stream.send_bytes(wire.pack_hello(self._incarnation), deadline)
            welcome = wire.unpack_welcome(stream.receive_bytes(wire.WELCOME.size, deadline))
        except DeadlinePassed as silence:
            raise LaneError(
                Status.PEER_GONE,
                f"{self.peer} took the connection and said nothing for {self._timeout_s:g} s; "
                "it is stopped, or another program has that port",
            ) from silence
        except (OSError, EOFError, wire.Malformed) as failure:
            raise LaneError(
                Status.PEER_GONE, f"no greeting from {self.peer}: {explain(failure)[1]}"
            ) from failure
        self._judge(welcome)

    def _judge(self, welcome: wire.Welcome) -> None:
        match welcome.verdict:
            case wire.Verdict.OTHER_INCARNATION:
                raise LaneError(
                    Status.PEER_GONE,
                    f"{self.peer} is incarnation {welcome.incarnation} now, not "
                    f"{self._incarnation}: the engine restarted and its old addresses are void; "
                    "look its segment up again",
                )
            case wire.Verdict.LANES_FULL:
                raise LaneError(
                    Status.FAILED,
                    f"{self.peer} serves as many lanes as it may; raise tcp.max_served_lanes "
                    "there or lower tcp.lanes_per_peer here",
                )
            case wire.Verdict.OTHER_VERSION:
                raise LaneError(
                    Status.FAILED,
                    f"{self.peer} speaks version {welcome.version} of the tcp protocol, we speak "
                    f"{wire.VERSION}; run the same release on both",
                )
            case wire.Verdict.WELCOME:
                pass
