from __future__ import annotations

import numpy as np
import pytest

from mooncake_connector.bench.percentiles import latencies


def test_a_percentile_lies_linearly_between_the_two_timings_around_its_rank() -> None:
    found = latencies(np.array([4.0, 1.0, 3.0, 2.0, 5.0]))
    assert (found.count, found.least, found.mean, found.p50) == (5, 1.0, 3.0, 3.0)
    assert found.p99 == pytest.approx(4 + 0.96)  # rank 0.99 * 4 = 3.96
    assert found.p999 == pytest.approx(4 + 0.996)


def test_one_timing_is_all_of_its_percentiles() -> None:
    found = latencies(np.array([0.25]))
    assert {found.mean, found.least, found.p50, found.p99, found.p999} == {0.25}


def test_no_timing_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no run was timed"):
        latencies(np.zeros(0))
