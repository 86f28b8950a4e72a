"""Engines over RDMA devices for tests: an initiator here, a target here or in a child process."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from mooncake_engine import EngineConfig, MetadataConfig, RdmaConfig, TcpConfig, TransferEngine
from mooncake_engine.testing import conformance
from mooncake_engine.testing.target import ChildTarget, LocalTarget

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The guest's rails: one end of each veth pair for the initiator, the other for the target.
OURS = ("rxe0", "rxe2")
THEIRS = ("rxe1", "rxe3")
DEFAULTS: dict[str, Any] = {
    "binding": os.environ.get("MC_VERBS_BINDING", "native"),
    "min_port": 0,
    "max_port": 0,
    # An emulated processor acknowledges late on a busy machine: 4.096 us * 2**18 = 1.1 s, seven
    # times. Tests of a dead path set less.
    "send_timeout": 18,
}


def config(
    *devices: str, strict: bool = True, engine: dict[str, object] | None = None, **rdma: object
) -> EngineConfig:
    """An engine's settings with these devices; `rdma` are fields of `RdmaConfig`."""
    return EngineConfig(
        protocol="rdma",
        strict_transport=strict,
        host="127.0.0.1",
        tcp=TcpConfig(min_port=0, max_port=0),
        metadata=MetadataConfig(p2p_min_port=0, p2p_max_port=0),
        rdma=RdmaConfig(devices=devices, **(DEFAULTS | rdma)),
        **(engine or {}),
    )


@contextlib.contextmanager
def pair_of(
    length: int,
    ours: tuple[str, ...] = OURS[:1],
    theirs: tuple[str, ...] = THEIRS[:1],
    *,
    child: bool = True,
    strict: bool = True,
    **rdma: object,
) -> Iterator[conformance.Pair]:
    """Two engines; `rdma` are settings of both."""
    kind = ChildTarget if child else LocalTarget
    with (
        kind(config(*theirs, strict=strict, **rdma), length) as target,
        TransferEngine(config(*ours, strict=strict, **rdma)) as initiator,
    ):
        yield conformance.Pair(initiator, target, target_has_a_say=False)
