"""What many timings come to: their mean and percentiles. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that single runs took."""

    count: int
    mean: float
    least: float
    p50: float
    p99: float
    p999: float


def latencies(seconds: NDArray[np.float64]) -> Latencies:
    """Sum up at least one timing.

    A percentile lies linearly between the two timings around rank q * (n - 1), as tebench has it:
    with fewer than 1000 runs the P999 is close to the longest of them.
    """
    if not len(seconds):
        raise ValueError("no run was timed, so there are no percentiles")
    p50, p99, p999 = np.quantile(seconds, (0.5, 0.99, 0.999), method="linear")
    return Latencies(
        count=len(seconds),
        mean=float(seconds.mean()),
        least=float(seconds.min()),
        p50=float(p50),
        p99=float(p99),
        p999=float(p999),
    )
