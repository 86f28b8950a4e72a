"""Who is believed, who is refused, and what the refusal says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest
from mooncake_engine.errors import PathUnavailable
from mooncake_engine.types import SegmentRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.shm import ShmTransport
    from shm_peers import Child

MIB = 1 << 20


def test_the_pid_of_another_process_is_not_believed(
    child: Callable[..., Child], transport: Callable[..., ShmTransport]
) -> None:
    target, other = child("target", plain=MIB), child("target", plain=MIB)
    with pytest.raises(PathUnavailable, match="is not the one"):
        transport().connect(target.record_with(pid=other.about["pid"]))


def test_an_earlier_start_of_the_same_process_is_not_believed(
    child: Callable[..., Child], transport: Callable[..., ShmTransport]
) -> None:
    target = child("target", plain=MIB)
    with pytest.raises(PathUnavailable, match="is not the one"):
        transport().connect(target.record_with(nonce=os.urandom(32)))


def test_the_pid_of_no_process_is_unavailable(
    child: Callable[..., Child], transport: Callable[..., ShmTransport]
) -> None:
    target = child("target", plain=MIB)
    target.kill()
    with pytest.raises(PathUnavailable, match="no such process"):
        transport().connect(target.record)


def test_an_engine_reaches_itself_and_its_twin_in_the_same_process(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    record = SegmentRecord(
        name="twin", incarnation="i", machine_id="", endpoints={"shm": target.endpoint()}
    )
    for source in (target, transport()):
        source.connect(record).close()


@pytest.mark.parametrize(
    ("endpoints", "said"),
    [
        ({}, "publishes no shm endpoint"),
        ({"shm": msgspec.Raw(b"\xc1")}, "cannot be read"),
        ({"shm": msgspec.Raw(msgspec.msgpack.encode({"pid": -1}))}, "cannot be read"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_unavailable_with_a_reason(
    transport: Callable[..., ShmTransport], endpoints: dict[str, msgspec.Raw], said: str
) -> None:
    peer = SegmentRecord(name="p", incarnation="i", machine_id="", endpoints=endpoints)
    with pytest.raises(PathUnavailable, match=said):
        transport().connect(peer)


def test_another_version_is_unavailable(
    child: Callable[..., Child], transport: Callable[..., ShmTransport]
) -> None:
    target = child("target", plain=MIB)
    with pytest.raises(PathUnavailable, match="version 99"):
        transport().connect(target.record_with(version=99))


@pytest.mark.parametrize("rights", [{"step_down": True}, {"seccomp": True}])
def test_a_reader_without_the_right_to_ptrace_is_told_what_to_do(
    child: Callable[..., Child], rights: dict[str, bool]
) -> None:
    target = child("target", plain=MIB, hidden=True)
    said = child("reader", **rights).do("connect", record=target.about["record"])
    assert said.startswith("PathUnavailable")
    for remedy in ("ptrace_scope", "allow_any_reader", "CAP_SYS_PTRACE", "seccomp"):
        assert remedy in said


def test_memory_outside_the_arena_is_no_path_where_ptrace_is_refused(
    child: Callable[..., Child],
) -> None:
    target = child("target", plain=MIB, arena=MIB)
    said = child("reader", seccomp=True).do("connect", record=target.about["record"])
    assert said.startswith("PathUnavailable")
    assert "did not allocate" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a reader of another user")
def test_another_user_does_not_get_the_arena_when_any_reader_is_off(
    child: Callable[..., Child],
) -> None:
    target = child("target", arena=MIB, allow_any_reader=False)
    said = child("reader", step_down=True).do("connect", record=target.about["record"])
    assert said.startswith("PathUnavailable")
    assert "closed the connection" in said
