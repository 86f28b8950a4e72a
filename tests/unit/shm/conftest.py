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
from mooncake_engine.transport.shm.lane import ByMapping
from mooncake_engine.transport.shm.transport import ShmLink
from shm_peers import Child, Reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


@pytest.fixture
def reach(
    closing: contextlib.ExitStack, transport: Callable[..., ShmTransport]
) -> Callable[..., Reached]:
    """A lane to a target, by pid or arena; we may ptrace, so the arena is asked for by hand."""

    def connect(target: Child, how: str = "plain") -> Reached:
        if how == "arena":
            endpoint = target.endpoint
            reader = ArenaReader("the target", endpoint.arena, endpoint.nonce, 5)
            link = ShmLink("the target", 1, lambda: ByMapping("the target", reader), reader)
        else:
            link = transport().connect(target.record)
        closing.callback(link.close)
        return Reached(link)

    return connect
