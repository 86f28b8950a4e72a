"""Opens sides and lanes for a test, and closes them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from native_loops import needs_native
from tcp_sides import OtherProcess, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.transport.base import Lane
    from mooncake_engine.types import SegmentRecord


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(params=["C", "Python"])
def loops(request: pytest.FixtureRequest) -> str:
    """Which of both moves and serves; they are told apart by nothing but speed."""
    if request.param == "C":
        needs_native()
    return str(request.param)


@pytest.fixture
def start(closing: contextlib.ExitStack, loops: str) -> Callable[..., Side]:
    def one(**options: object) -> Side:
        side = Side(**{"native": loops == "C", **options})  # type: ignore[arg-type] - checked by Side and msgspec
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
