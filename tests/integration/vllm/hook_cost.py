"""What one engine step costs in the connector's hooks when there is nothing to do.

`python tests/integration/vllm/hook_cost.py MODEL` starts vLLM in this one process, so that both
halves of the real connector, with a real node, can be called directly. It prints one JSON object:
microseconds for one set of hooks without a request, and with pages held, and how many were held.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS, SETS = 40, 100

# Before vLLM is imported: the engine core in this process, and its worker too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(model: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    llm = LLM(
        model,
        enforce_eager=True,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        block_size=64,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="MooncakeDisaggConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"engine.host": "127.0.0.1"},
        ),
    )
    one_set = hooks(llm)
    costs = {"idle": microseconds(one_set)}
    # One finished request whose pages wait for a decode server that does not come.
    keep = {"kv_transfer_params": {"do_remote_decode": True}}
    llm.generate("pages of keys and values", SamplingParams(max_tokens=1, extra_args=keep))
    costs["holding"] = microseconds(one_set)
    costs["held_pages"] = get_kv_transfer_group()._worker.node.prefill.held_pages()
    print(json.dumps(costs), flush=True)


def hooks(llm: object) -> Callable[[], None]:
    """What vLLM calls in one step without requests, in its order."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector  # type: ignore[attr-defined]  # vLLM is not typed here
    worker = get_kv_transfer_group()
    empty = SchedulerOutput.make_empty()

    def one_set() -> None:
        scheduler.has_pending_push_work()
        step = scheduler.build_connector_meta(empty)
        worker.handle_preemptions(step)
        worker.bind_connector_metadata(step)
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(set())
        worker.get_block_ids_with_load_errors()
        worker.get_kv_connector_stats()
        worker.get_kv_connector_kv_cache_events()
        worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        scheduler.update_connector_output(
            KVConnectorOutput(
                finished_sending=results.finished_sending,
                finished_recving=results.finished_recving,
            )
        )
        scheduler.get_kv_connector_stats()
        list(scheduler.take_events())

    return one_set


def microseconds(one_set: Callable[[], None]) -> float:
    """Median over `ROUNDS` of the mean over `SETS`."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(SETS):
            one_set()
        rounds.append((time.perf_counter() - begin) / SETS * 1e6)
    return round(statistics.median(rounds), 2)


if __name__ == "__main__":
    main(sys.argv[1])
