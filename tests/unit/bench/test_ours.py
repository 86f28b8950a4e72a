"""Our engine as the benchmark runs it: every variant moves the bytes, each time it is asked to."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from mooncake_engine.device import pages

from mooncake_connector.bench.backends import ours
from mooncake_connector.bench.base import Route, Transfer, Variant

VARIANTS = [v for route in (Route.TCP, Route.SAME_HOST) for v in ours.variants(route)]
SIZE = 64 << 10


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("op", ["read", "write"])
def test_every_variant_moves_what_is_there_at_each_run(variant: Variant, op: str) -> None:
    here, there = pages(SIZE), pages(SIZE)
    at = np.arange(0, SIZE, 8192, dtype=np.uint64)
    transfer = Transfer(op=op, local=at, remote=at[::-1].copy(), lengths=np.full(8, 100, np.uint64))
    with (
        contextlib.closing(ours.Target(there, variant.options)) as target,
        contextlib.closing(ours.Initiator(here, variant.options)) as initiator,
    ):
        initiator.connect(target.address())
        run = initiator.prepare(transfer)
        source, sink = (there, here) if op == "read" else (here, there)
        for value in (3, 4):
            source[:] = value
            run()
            assert (sink == value).sum() == transfer.nbytes
            assert (sink.reshape(8, 8192)[:, :100] == value).all()


def test_the_first_variant_is_the_engine_as_it_comes() -> None:
    assert [v.name for v in VARIANTS if set(v.options) == {"protocol"}] == ["ours tcp", "ours shm"]
