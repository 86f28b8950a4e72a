"""RoCE v2 packets as they come in by a network interface; root only, as `tcpdump` is."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

import rails

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

READ = 0x0C
#: The first packet of a WRITE, or its only one, without and with an immediate: these have a RETH.
WRITES = (0x06, 0x0A, 0x0B)
_READ_RESPONSES = (0x0D, 0x0E, 0x0F, 0x10)

_PORT = 4791
_ALL = 3  # ETH_P_ALL: taken before the stack sees a packet, so never too late for its answer
_IPV4 = 0x0800
_SOL_PACKET, _IGNORE_OUTGOING, _RCVBUFFORCE = 263, 23, 33
_BUFFER = 32 << 20


class Packet(NamedTuple):
    """What its headers say; `remote` and `length` of a RETH, 0 where there is none."""

    source: str
    traffic_class: int
    hop_limit: int
    source_port: int
    payload: int  # bytes, without headers that every packet has: BTH and the check sum
    opcode: int
    queue: int
    psn: int
    remote: int
    length: int


class Capture:
    """Packets that came in by a device's interface since this was made."""

    def __init__(self, device: str) -> None:
        self._seen: list[Packet] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER)
            self._socket.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
            self._socket.bind((rails.interface(device), _ALL))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def packets(self, *opcodes: int) -> list[Packet]:
        """All so far; with opcodes, those alone and each once: a NIC may send one again."""
        self._seen += _parsed(self._arrived())
        if not opcodes:
            return self._seen
        once = {(p.queue, p.psn): p for p in reversed(self._seen) if p.opcode in opcodes}
        return list(reversed(once.values()))

    def requests(self, *opcodes: int) -> list[tuple[int, int]]:
        """(remote address, bytes) of requests that say them, by address."""
        found = {(p.remote, p.length) for p in self.packets(*opcodes) if p.length}
        return sorted(found)

    def responses(self) -> list[Packet]:
        """Of READs."""
        return self.packets(*_READ_RESPONSES)

    def _arrived(self) -> Iterator[bytes]:
        while True:
            try:
                packet, sender = self._socket.recvfrom(1 << 16)
            except BlockingIOError:
                return
            if sender[1] == _IPV4:
                yield packet


def _parsed(packets: Iterable[bytes]) -> Iterator[Packet]:
    for packet in packets:
        words, traffic_class, total = struct.unpack_from("!BBH", packet)
        udp = (words & 15) * 4
        hops, protocol = packet[8], packet[9]
        if protocol != socket.IPPROTO_UDP:
            continue
        source_port, port = struct.unpack_from("!HH", packet, udp)
        if port != _PORT:
            continue
        bth = udp + 8
        opcode, _, _, queue, psn = struct.unpack_from("!BBHII", packet, bth)
        remote = length = 0
        if opcode in {READ, *WRITES}:
            remote, _, length = struct.unpack_from("!QII", packet, bth + 12)
        yield Packet(
            source=str(ipaddress.IPv4Address(packet[12:16])),
            traffic_class=traffic_class,
            hop_limit=hops,
            source_port=source_port,
            payload=total - bth - 12 - 4,
            opcode=opcode,
            queue=queue & 0xFFFFFF,
            psn=psn & 0xFFFFFF,
            remote=remote,
            length=length,
        )
