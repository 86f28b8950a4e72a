"""One framed connection: heartbeats, silence, resets and senseless bytes, over real sockets."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from mooncake_connector import wire
from mooncake_connector.control import Channel, join_address, split_address

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SOON = 20.0
BEAT_S = 0.05
BEATS = 5  # of silence until the peer counts as dead


async def channel(sock: socket.socket, *, heartbeat_s: float = BEAT_S) -> Channel:
    reader, writer = await asyncio.open_connection(sock=sock)
    return Channel(
        reader,
        writer,
        heartbeat_s=heartbeat_s,
        dead_after_s=BEATS * heartbeat_s,
        max_message_bytes=4096,
    )


def with_peer(test: Callable[[Channel, socket.socket], Coroutine[None, None, None]]) -> None:
    """Run `test` with a channel and the bare socket at its other end."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            own = socket.create_connection(server.getsockname())
            peer = server.accept()[0]
        peer.settimeout(SOON)
        with peer:
            tested = await channel(own)
            try:
                async with asyncio.timeout(SOON):
                    await test(tested, peer)
            finally:
                tested.close("the test is over")
                await asyncio.sleep(0)  # asyncio closes the socket in its next round

    asyncio.run(run())


def nothing(message: wire.AnyMessage) -> None:
    assert isinstance(message, wire.Ping)


def test_a_silent_peer_is_dead_after_its_beats_and_not_before() -> None:
    async def test(tested: Channel, _peer: socket.socket) -> None:
        start = time.monotonic()
        assert await tested.run(nothing) == "it was silent for 0.25 s"
        assert time.monotonic() - start >= BEATS * BEAT_S * 0.9

    with_peer(test)


def test_a_peer_that_says_something_now_and_then_is_not_dead() -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        running = asyncio.create_task(tested.run(nothing))
        for _ in range(2 * BEATS):
            await asyncio.to_thread(peer.recv, 4096)  # one of our pings: a beat has passed
            peer.sendall(wire.encode(wire.Ping()))
        assert not running.done()
        tested.close("enough")
        assert await running == "enough"

    with_peer(test)


def test_a_stall_of_this_process_is_one_beat_of_silence() -> None:
    """An engine step that holds the interpreter for longer than peers may be silent."""

    async def test(tested: Channel, peer: socket.socket) -> None:
        running = asyncio.create_task(tested.run(nothing))
        await asyncio.to_thread(peer.recv, 4096)  # the beat has begun
        time.sleep(3 * BEATS * BEAT_S)  # noqa: ASYNC251  # this is the stall
        stalled_at = time.monotonic()
        await asyncio.to_thread(peer.recv, 4096)  # the next beat came
        assert not running.done()
        assert await running == "it was silent for 0.25 s"
        assert time.monotonic() - stalled_at >= (BEATS - 3) * BEAT_S

    with_peer(test)


def test_a_reset_ends_the_channel_at_once() -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        assert (await tested.run(nothing)).startswith("the connection broke: ")

    with_peer(test)


def test_a_peer_that_is_gone_before_the_first_word_ends_the_channel() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            own = socket.create_connection(server.getsockname())
            peer = server.accept()[0]
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        select.select([own], [], [], SOON)  # the reset is here: the socket has no peer any more
        tested = await channel(own)
        assert tested.peer == "somebody who is gone already"
        assert (await tested.run(nothing)).startswith("the connection broke: ")
        await asyncio.sleep(0)  # asyncio closes the socket in its next round

    asyncio.run(run())


def test_an_orderly_close_ends_the_channel_at_once() -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        peer.close()
        assert await tested.run(nothing) == "it closed the connection"

    with_peer(test)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (b"\0\0\0\0", "a message of 0 bytes; 1 to 4096 are accepted"),
        (b"\0\0\x10\x01", "a message of 4097 bytes; 1 to 4096 are accepted"),
        (b"\0\0\0\x01\xc1", "not a message of wire version 2"),
    ],
)
def test_senseless_bytes_end_the_channel_and_are_named(what: bytes, says: str) -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        peer.sendall(what)
        assert says in await tested.run(nothing)
        assert not await asyncio.to_thread(peer.recv, 4096)

    with_peer(test)


def test_a_message_in_pieces_arrives_whole_and_two_in_one_piece_arrive_as_two() -> None:
    claims = [wire.Claim(transfer_id="a" * 100), wire.Claim(transfer_id="b")]
    frames = b"".join(map(wire.encode, claims))

    async def test(tested: Channel, peer: socket.socket) -> None:
        for piece in (frames[:2], frames[2:50], frames[50:]):
            peer.sendall(piece)
            await asyncio.sleep(0)
        assert [await tested.receive(), await tested.receive()] == claims

    with_peer(test)


def test_the_first_reason_for_closing_is_kept_and_nothing_is_sent_after_it() -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        tested.close("first")
        tested.close("second")
        tested.send(wire.Ping())
        assert await tested.run(nothing) == "first"
        try:
            assert not await asyncio.to_thread(peer.recv, 4096)
        except ConnectionResetError:  # as good: nothing came
            return

    with_peer(test)


def test_many_messages_to_a_peer_that_reads_late_all_arrive_in_order() -> None:
    async def test(tested: Channel, peer: socket.socket) -> None:
        for n in range(5000):
            tested.send(wire.Claim(transfer_id=f"{n:04}"))
        whole = len(wire.encode(wire.Claim(transfer_id="0000"))) * 5000
        got = b""
        while len(got) < whole:
            got += await asyncio.to_thread(peer.recv, 1 << 20)
        size = whole // 5000
        names = [
            wire.decode(got[at + wire.PREFIX_BYTES : at + size]) for at in range(0, whole, size)
        ]
        assert names == [wire.Claim(transfer_id=f"{n:04}") for n in range(5000)]

    with_peer(test)


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("10.0.0.1", 1, "10.0.0.1:1"), ("::1", 65535, "[::1]:65535"), ("node7", 80, "node7:80")],
)
def test_an_address_is_joined_and_split(host: str, port: int, address: str) -> None:
    assert join_address(host, port) == address
    assert split_address(address) == (host, port)


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:0", "host:65536", "h:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)
