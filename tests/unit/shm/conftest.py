"""Starts children and opens transports and lanes for a test, and closes them after it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec
import pytest
from mooncake_engine.config import EngineConfig, ShmConfig
from mooncake_engine.grants import GrantTable
from mooncake_engine.memory import RegionTable
from mooncake_engine.transport.shm import ShmTransport
from mooncake_engine.transport.shm.arena_reader import ArenaReader
from mooncake_engine.transport.shm.nonce import NonceReader
from mooncake_engine.transport.shm.transport import ByMappingLink, ByPidLink
from native_loops import needs_native
from shm_peers import Child, Reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.transport.shm.transport import ShmLink


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def child(closing: contextlib.ExitStack) -> Callable[..., Child]:
    """Starts a shm_child.py process: `child("target", plain=bytes, arena=bytes)`."""

    def start(role: str, **options: object) -> Child:
        started = Child(role, **options)
        closing.callback(started.end)
        return started

    return start


@pytest.fixture
def transport(closing: contextlib.ExitStack) -> Callable[..., ShmTransport]:
    """Makes a transport in this process."""

    def make(connect_timeout_s: float = 5.0, **shm: object) -> ShmTransport:
        config = EngineConfig(
            connect_timeout_s=connect_timeout_s, shm=msgspec.convert(shm, ShmConfig)
        )
        made = ShmTransport(config, RegionTable(), GrantTable(), "here")
        closing.callback(made.close)
        return made

    return make


@pytest.fixture(params=["C", "C, several threads", "Python"])
def loops(request: pytest.FixtureRequest) -> str:
    """Who copies; they are told apart by nothing but speed."""
    if request.param != "Python":
        needs_native()
    return str(request.param)


@pytest.fixture
def reach(
    closing: contextlib.ExitStack, transport: Callable[..., ShmTransport], loops: str
) -> Callable[..., Reached]:
    """A lane to a target, by pid (another one's, if given) or arena."""

    def connect(target: Child, how: str = "plain", pid: int = 0) -> Reached:
        made = transport(native=loops != "Python")
        threads = 2 if loops == "C, several threads" else 1
        endpoint = target.endpoint
        if how == "arena":
            reader = ArenaReader("the target", endpoint.arena, endpoint.nonce, 5)
            link: ShmLink = ByMappingLink("the target", threads, reader, made._library)
        else:
            pid = pid or endpoint.pid
            nonce = NonceReader(pid, endpoint.nonce_address, endpoint.nonce, "the target")
            link = ByPidLink("the target", threads, nonce, made._library)
        closing.callback(link.close)
        reached = Reached(link._lane(threads))
        closing.callback(reached.lane.close)
        return reached

    return connect
