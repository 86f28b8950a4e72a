"""The benchmark's limit runs perftest as this machine's distribution has it."""

from __future__ import annotations

import numpy as np
import pytest
from rdma_stage import OURS, THEIRS

from mooncake_connector.bench.backends import perftest
from mooncake_connector.bench.base import Transfer

MEMORY = np.empty(0, np.uint8)  # perftest has its own


@pytest.mark.parametrize("op", ["read", "write"])
def test_perftests_rate_becomes_the_time_of_a_run(devices: list[str], op: str) -> None:
    assert perftest.missing() == "", "the tier installs perftest"
    assert {OURS[0], THEIRS[0]} <= set(devices)
    target = perftest.Target(MEMORY, {"device_name": THEIRS[0]})
    initiator = perftest.Initiator(MEMORY, {"device_name": OURS[0]})
    initiator.connect(target.address())
    starts = np.arange(16, dtype=np.uint64) * np.uint64(16384)
    run = initiator.prepare(Transfer(op, starts, starts, np.full(16, 16384, np.uint64)))
    seconds = run.many(2)
    assert seconds.shape == (2,)
    assert 1e-6 < seconds[0] < 10  # 256 KiB: 250 GB/s and 26 kB/s
    initiator.close()
    target.close()
