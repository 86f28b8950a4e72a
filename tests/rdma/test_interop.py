"""Our end against one that shares no code with it: pyverbs_peer.py in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import select
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec
import numpy as np
import pytest
from harness.verbs_sides import WAIT_S, Remote, Side, binding, chosen_gid
from mooncake_engine import TransferEngine
from mooncake_engine.transport.rdma.messages import (
    Accepted,
    Connect,
    Hello,
    Keys,
    Message,
    MessageStream,
    QueueAddress,
    WantKeys,
    Welcome,
)
from mooncake_engine.transport.rdma.records import DeviceRecord, RdmaEndpoint
from mooncake_engine.transport.rdma.verbs.base import Opcode
from rdma_stage import config

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).with_name("pyverbs_peer.py")
HALF = 100_003  # odd: a last packet that is not full


class Foreign:
    """The other program, and what it said of itself."""

    def __init__(self, device: str, gid_index: int) -> None:
        self.process = subprocess.Popen(
            ["/usr/bin/python3", str(PROGRAM), device, str(gid_index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = self.hear()
        self.number, self.psn, self.gid = told["number"], told["psn"], packed(told["gid"])
        self.address, self.rkey, self.length = told["address"], told["rkey"], told["length"]

    def say(self, **what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WAIT_S)[0], "it says nothing"
        line = self.process.stdout.readline()
        assert line, f"it ended with status {self.process.wait(WAIT_S)}"
        said: dict[str, Any] = json.loads(line)
        return said

    def connect(self, number: int, psn: int, gid: bytes) -> None:
        self.say(number=number, psn=psn, gid=spelt(gid))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.wait()


def spelt(gid: bytes) -> str:
    return ipaddress.IPv6Address(gid).exploded


def packed(gid: str) -> bytes:
    return bytes.fromhex(gid.replace(":", ""))


class Ends(NamedTuple):
    ours: str
    theirs: str
    their_gid_index: int


@pytest.fixture
def ends(devices: list[str]) -> Ends:
    ours, theirs = devices[0], devices[1]
    device = binding().open(theirs)
    index = chosen_gid(device.gids(1)).gid_index
    device.close()
    return Ends(ours, theirs, index)


@contextlib.contextmanager
def control_connection(engine: TransferEngine) -> Iterator[tuple[MessageStream, RdmaEndpoint]]:
    """As an initiator opens it: greeted."""
    record = engine.record()
    endpoint = msgspec.msgpack.decode(record.endpoints["rdma"], type=RdmaEndpoint)
    sock = socket.create_connection((endpoint.host, endpoint.port), WAIT_S)
    stream = MessageStream(sock)
    stream.set_patience(WAIT_S)
    try:
        welcome = asked(stream, Hello(record.incarnation))
        assert isinstance(welcome, Welcome)
        assert not welcome.refusal
        yield stream, endpoint
    finally:
        stream.close()


def asked(stream: MessageStream, question: Message) -> Message:
    stream.send(question)
    return stream.receive()


def test_a_foreign_program_reads_and_writes_an_engines_memory(ends: Ends) -> None:
    with (
        TransferEngine(config(ends.ours)) as engine,
        Foreign(ends.theirs, ends.their_gid_index) as they,
    ):
        memory = engine.allocate(4 << 20)
        memory[:] = np.random.default_rng(4).integers(0, 256, memory.size, np.uint8)
        start = 1_000_001
        expected = memory.copy()
        expected[start + HALF : start + 2 * HALF] = 255 - expected[start : start + HALF]
        with control_connection(engine) as (stream, endpoint):
            keys = asked(stream, WantKeys())
            assert isinstance(keys, Keys)
            address = int(memory.ctypes.data) + start
            (row,) = [row for row in keys.rows if 0 <= address - row.address < row.length]
            nic = endpoint.devices[0]
            theirs = DeviceRecord(
                *(ends.theirs, 1, nic.lid, they.gid, nic.gid_kind, nic.link_layer, 1024),
                *(-1, True, 4),
            )
            queues = (QueueAddress(they.number, they.psn),)
            accepted = asked(stream, Connect(1, theirs, nic.name, queues, 1024, 4))
            assert isinstance(accepted, Accepted), accepted
            they.connect(accepted.queues[0].number, accepted.queues[0].psn, nic.gid)
            they.say(do="read then write back", address=address, rkey=row.keys[0], length=HALF)
            said = they.hear()
        seen = hashlib.sha256(expected[start : start + HALF].tobytes()).hexdigest()
        assert said == {"read": seen}
        assert (memory == expected).all()


def test_we_read_and_write_a_foreign_programs_memory(ends: Ends) -> None:
    with (
        Foreign(ends.theirs, ends.their_gid_index) as they,
        Side(binding(), ends.ours) as ours,
    ):
        ours.reach(they.number, they.gid, they.psn)
        they.connect(ours.pair.number, ours.psn, ours.gid.raw)
        expected = (np.arange(they.length) % 251).astype(np.uint8)
        there = Remote(they.address, they.rkey)
        ours.data[:] = 0
        ours.post(Opcode.READ, there, [(0, [(7, 1), (100, HALF)])], signal_every=1)
        assert ours.completions(1)["status"] == 0
        assert ours.data[7] == expected[0]
        assert (ours.data[100 : 100 + HALF] == expected[1 : 1 + HALF]).all()

        ours.data[:] = np.random.default_rng(5).integers(0, 256, ours.data.size, np.uint8)
        rows = [(11, [(0, 13), (50, HALF)]), (they.length - 1, [(3, 1)])]
        ours.post(Opcode.WRITE, there, rows)
        assert ours.completions(1)["status"] == 0
        expected[11:24] = ours.data[:13]
        expected[24 : 24 + HALF] = ours.data[50 : 50 + HALF]
        expected[-1] = ours.data[3]
        they.say(do="show")
        assert they.hear() == {"memory": hashlib.sha256(expected.tobytes()).hexdigest()}
