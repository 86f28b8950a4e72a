"""Counts of a rank's node -> SGLang's /metrics, when it runs with --enable-metrics.

SGLang's processes share metrics through files: its launcher names their folder in
PROMETHEUS_MULTIPROC_DIR before it starts the schedulers, and its HTTP server adds the files up when
it is asked. prometheus_client looks for the folder once, when it is first imported. The launcher
loads our plugin before it names one, so nothing but `Metrics`, which lives in a scheduler, imports
prometheus_client, SGLang's own metrics being lost otherwise.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.metrics import Instruments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

    from mooncake_connector.stats import Counts


class Metrics:
    """`mooncake_connector:*` of one scheduler process.

    Args:
        labels: What every sample carries, name -> value. No other process of the server has all
            of them the same.
    """

    def __init__(self, labels: Mapping[str, object]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        # Not a sum: in a folder that outlives the server (the user named it) it would count what
        # a rank held that died. Its successor has the same labels, and its value is the later one.
        gauge = functools.partial(Gauge, multiprocess_mode="mostrecent")
        self._values = list(labels.values())
        self._instruments = Instruments(Counter, gauge, Histogram, list(labels))
        self._instruments.begin(self._values)

    def observe(self, counts: Counts) -> None:
        """Record what was counted since the last call. Writes to mapped files, never waits."""
        self._instruments.observe(self._values, msgspec.to_builtins(counts))


def observer(server_args: ServerArgs, args: KVArgs) -> Callable[[Counts], None]:
    """What a node of this scheduler process tells its counts; with metrics off, it drops them.

    None would not do: nobody else takes them from the node here, and it would keep them for ever.
    """
    if not server_args.enable_metrics:
        return _drop
    return Metrics(_labels(args)).observe


def _drop(_counts: Counts) -> None:
    """They are not wanted."""


def _labels(args: KVArgs) -> dict[str, object]:
    """Those of SGLang's own metrics of this scheduler, so that one query can use both."""
    # Here, so that `Metrics` does not need SGLang.
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import (
        get_disagg,
        get_observability,
        get_parallel,
        get_serving,
    )

    parallel = get_parallel()
    labels: dict[str, object] = {
        "model_name": get_serving().served_model_name,
        "engine_type": DisaggregationMode.to_engine_type(get_disagg().disaggregation_mode),
        "tp_rank": parallel.tp_rank,
        "pp_rank": args.pp_rank,
        "moe_ep_rank": parallel.moe_ep_rank,
    }
    if args.system_dp_rank is not None:
        labels["dp_rank"] = args.system_dp_rank
    return labels | (get_observability().extra_metric_labels or {})
