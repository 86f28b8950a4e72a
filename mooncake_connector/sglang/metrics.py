"""Counts of a rank's node -> SGLang's /metrics, when it runs with --enable-metrics."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_disagg, get_parallel

from mooncake_connector.metrics import Instruments

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

    from mooncake_connector.stats import Counts


def observer(server_args: ServerArgs, args: KVArgs) -> Callable[[Counts], None] | None:
    """What records counts in this scheduler process; None when metrics are off."""
    if not server_args.enable_metrics:
        return None
    # Not before: it looks once for the folder through which SGLang's processes share metrics.
    from prometheus_client import Counter, Gauge, Histogram

    parallel = get_parallel()
    labels = {
        "model_name": server_args.served_model_name,
        "engine_type": DisaggregationMode.to_engine_type(get_disagg().disaggregation_mode),
        "tp_rank": parallel.attn_tp_rank,
        "pp_rank": args.pp_rank,
        "dp_rank": args.system_dp_rank or parallel.attn_dp_rank or 0,
    }
    values = list(labels.values())
    # Pages held by processes that live: those of one that died are free.
    gauge = functools.partial(Gauge, multiprocess_mode="livesum")
    instruments = Instruments(Counter, gauge, Histogram, list(labels))
    instruments.begin(values)
    return lambda counts: instruments.observe(values, msgspec.to_builtins(counts))
