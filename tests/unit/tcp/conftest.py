"""Opens sides and lanes for a test, closes them, and then looks for leaks."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tcp_sides import OtherProcess, Side, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.transport.base import Lane
    from mooncake_engine.types import SegmentRecord


def _open_files() -> set[str]:
    names = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the scan's own
            names.add(f"{entry.name} {entry.readlink()}")
    return names


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    files, threads = _open_files(), set(threading.enumerate())
    yield
    until(lambda: set(threading.enumerate()) <= threads, "the end of every thread", 5)
    left = {name for name in _open_files() - files if "socket:" in name or "pipe:" in name}
    assert not left


@pytest.fixture
def closing(no_leaks: None) -> Iterator[contextlib.ExitStack]:  # noqa: ARG001 - closed before it looks
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def start(closing: contextlib.ExitStack) -> Callable[..., Side]:
    def one(**options: object) -> Side:
        side = Side(**options)  # type: ignore[arg-type] - checked by Side and msgspec
        closing.callback(side.transport.close)
        return side

    return one


@pytest.fixture
def open_lane(closing: contextlib.ExitStack) -> Callable[[Side, SegmentRecord], Lane]:
    def one(initiator: Side, record: SegmentRecord) -> Lane:
        link = initiator.transport.connect(record)
        closing.callback(link.close)
        lane = link.open_lane()
        closing.callback(lane.close)
        return lane

    return one


@pytest.fixture
def other_process(closing: contextlib.ExitStack) -> OtherProcess:
    process = OtherProcess()
    closing.callback(process.close)
    return process
