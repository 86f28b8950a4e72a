"""One framed connection between two nodes, with heartbeats. Lives on the node's event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Self

from mooncake_connector import wire
from mooncake_connector.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_connector.config import ConnectorConfig

log = logging.getLogger(__name__)


class Channel:
    """Sends and receives messages until either side closes or falls silent.

    A peer is silent when `dead_after_s` passed without a byte of it, counted in own heartbeats:
    a stall of this process (an engine that holds the interpreter lock) counts as one beat, so it
    never looks like the peer's death.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        heartbeat_s: float,
        dead_after_s: float,
        max_message_bytes: int,
    ) -> None:
        self.peer = _name(writer)
        self.closed_because = ""
        self._reader = reader
        self._writer = writer
        self._heartbeat_s = heartbeat_s
        self._beats_allowed = max(1, int(dead_after_s / heartbeat_s))
        self._silent_beats = 0
        self._max_message_bytes = max_message_bytes

    @classmethod
    def of(
        cls, config: ConnectorConfig, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Self:
        """A channel with the times and sizes of the configuration."""
        return cls(
            reader,
            writer,
            heartbeat_s=config.heartbeat_interval_s,
            dead_after_s=config.peer_dead_after_s,
            max_message_bytes=config.max_message_bytes,
        )

    def send(self, message: wire.Message) -> None:
        """Queue a message; never waits; nothing when the channel is closed. Loop thread only."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def receive(self) -> wire.AnyMessage:
        """The next message.

        Raises:
            WireError: It is too long or not ours.
            EOFError, OSError: The peer is gone.
        """
        prefix = await self._reader.readexactly(wire.PREFIX_BYTES)
        length = int.from_bytes(prefix, "big")
        if not 0 < length <= self._max_message_bytes:
            raise WireError(
                f"a message of {length} bytes; 1 to {self._max_message_bytes} are accepted "
                "(max_message_bytes)"
            )
        body = await self._reader.readexactly(length)
        self._silent_beats = 0
        return wire.decode(body)

    async def run(self, on_message: Callable[[wire.AnyMessage], None]) -> str:
        """Hand every message to `on_message` until the end; returns why it ended.

        A message that `on_message` refuses with WireError ends this channel and nothing else.
        """
        beat = asyncio.create_task(self._beat())
        try:
            while True:
                on_message(await self.receive())
        except WireError as exc:
            log.warning("closing the connection with %s: %s", self.peer, exc)
            self.close(f"it sent {exc}")
        except EOFError:
            self.close("it closed the connection")
        except OSError as exc:
            self.close(f"the connection broke: {exc.strerror or exc}")
        finally:
            beat.cancel()
            self.close("this node shuts down")
        return self.closed_because

    async def flush(self) -> None:
        """Wait until what was sent has left this process; gives up when the peer is gone."""
        try:
            self._writer.write_eof()
            await asyncio.wait_for(self._reader.read(), 1.0)
        except (OSError, TimeoutError):
            return

    def close(self, because: str) -> None:
        """Close at once; the first reason is kept. Idempotent."""
        self.closed_because = self.closed_because or because
        if self._writer.transport is not None:
            self._writer.transport.abort()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self._silent_beats += 1
            if self._silent_beats >= self._beats_allowed:
                self.close(f"it was silent for {self._beats_allowed * self._heartbeat_s:g} s")
                return
            self.send(wire.Ping())


def _name(writer: asyncio.StreamWriter) -> str:
    peername = writer.get_extra_info("peername")
    return join_address(*peername[:2]) if peername else "somebody who is gone already"


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The two parts of `host:port`.

    Raises:
        ValueError: When there is no host or no port from 1 to 65535.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)
