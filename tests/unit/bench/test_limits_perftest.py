"""The programs are stand-ins here: a real one needs a device, and is tried in the RDMA tier."""

from __future__ import annotations

import stat
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mooncake_connector.bench.backends import perftest
from mooncake_connector.bench.base import BackendFailed, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Speaks as perftest does: the server takes one client on -p, the client prints the table.
PROGRAM = f"""#!{sys.executable}
import socket, sys
words = sys.argv[1:]
told = dict(zip(words, words[1:]))
client = not words[-2].startswith("-")
if told["-d"] == "broken":
    sys.exit("Unable to find the Infiniband/RoCE device")
port = int(told["-p"])
if client:
    socket.create_connection((words[-1], port)).recv(1)
else:
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.accept()[0].close()
print(" #bytes #iterations BW peak[MiB/sec] BW average[MiB/sec] MsgRate[Mpps]")
print(told["-s"], told["-n"], "900.00", "100.00", "0.0001")
"""
MEMORY = np.empty(0, np.uint8)


@pytest.fixture(autouse=True)
def _programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ib_read_bw", "ib_write_bw"):
        path = tmp_path / name
        path.write_text(PROGRAM)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.fixture(name="target")
def _target() -> Iterator[perftest.Target]:
    target = perftest.Target(MEMORY, {"device_name": "a,b"})
    yield target
    target.close()


def pieces(op: str, *lengths: int) -> Transfer:
    sizes = np.array(lengths, np.uint64)
    return Transfer(op, np.cumsum(sizes) - sizes, np.cumsum(sizes) - sizes, sizes)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_run_takes_its_bytes_at_the_rate_that_the_program_prints(
    target: perftest.Target, op: str
) -> None:
    initiator = perftest.Initiator(MEMORY, {"device_name": "a"})
    initiator.connect(target.address())
    seconds = initiator.prepare(pieces(op, *[1 << 20] * 50)).many(3)
    assert seconds.tolist() == pytest.approx([0.5] * 3)


def test_rails_run_at_the_same_time_and_their_rates_add_up(target: perftest.Target) -> None:
    initiator = perftest.Initiator(MEMORY, {"device_name": "c,d"})
    initiator.connect(target.address())
    seconds = initiator.prepare(pieces("read", *[1 << 20] * 50)).many(1)
    assert seconds.tolist() == pytest.approx([0.25])


@pytest.mark.parametrize(("ours", "theirs"), [("broken", "a"), ("a", "broken")])
def test_what_either_program_complains_of_is_passed_on(ours: str, theirs: str) -> None:
    target = perftest.Target(MEMORY, {"device_name": theirs})
    initiator = perftest.Initiator(MEMORY, {"device_name": ours})
    initiator.connect(target.address())
    run = initiator.prepare(pieces("read", 4096))
    with pytest.raises(BackendFailed, match=f"from {ours} to {theirs} .*Unable to find"):
        run()
    target.close()


def test_pieces_of_several_sizes_are_refused(target: perftest.Target) -> None:
    initiator = perftest.Initiator(MEMORY, {"device_name": "a"})
    initiator.connect(target.address())
    with pytest.raises(BackendFailed, match="one size, not of 512 to 4096 bytes"):
        initiator.prepare(pieces("read", 4096, 512))
