"""Opens sides and lanes for a test, and closes them."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.transport.tcp.lane import TcpLane
from mooncake_engine.transport.tcp.wide import WideExchange
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


@pytest.fixture(params=["C", "C, several connections", "Python"])
def loops(request: pytest.FixtureRequest) -> str:
    """Which of them move and serve; they are told apart by nothing but speed."""
    if request.param != "Python":
        needs_native()
    return str(request.param)


@pytest.fixture
def start(closing: contextlib.ExitStack, loops: str) -> Callable[..., Side]:
    def one(**options: object) -> Side:
        side = Side(**{"native": loops != "Python", **options})  # type: ignore[arg-type] - checked by Side and msgspec
        closing.callback(side.transport.close)
        return side

    return one


@pytest.fixture
def open_lane(closing: contextlib.ExitStack, loops: str) -> Callable[[Side, SegmentRecord], Lane]:
    def one(initiator: Side, record: SegmentRecord) -> Lane:
        transport = initiator.transport
        if loops == "C, several connections" and transport._library:
            over = functools.partial(WideExchange, transport._library, 1 << 20)
            lane: Lane = TcpLane(transport._dialer(record), over, width=2)
        else:
            link = transport.connect(record)
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
