"""Ranks of SGLang servers without models: each in a process of its own, forked from one.

`python sglang_child.py` imports SGLang once (10 to 50 s), then forks a rank for each line it reads
(JSON: where the rank shall connect to, and its options). `sglang_ranks.py` is the other end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from sglang.srt.disaggregation import decode, prefill  # noqa: F401 - a rank needs them, and at once
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
from sglang.srt.server_args import ServerArgs
from sglang_cache import PAGE_BYTES, Cache
from sglang_drivers import Offer, Want
from sglang_ranks import Options

from mooncake_connector.sglang.bootstrap import MooncakeKVBootstrapServer
from mooncake_connector.sglang.manager import MooncakeKVManager

if TYPE_CHECKING:
    from collections.abc import Callable

TURN_S = 0.001  # between two looks at the requests when no command comes


def server_args(options: Options) -> ServerArgs:
    return ServerArgs(
        model_path=options.model,
        device="cpu",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        host="127.0.0.1",
        tp_size=options.tp * options.dp,
        dp_size=options.dp,
        enable_dp_attention=options.dp > 1,
        pp_size=options.pp,
        load_balance_method=options.balance,
        page_size=options.page_size,
        disaggregation_mode="decode" if options.role == "decode" else "prefill",
        disaggregation_bootstrap_port=options.port,
        # Any known name: this one is made known by a plugin, and here are no command line's.
        disaggregation_transfer_backend="nixl",
    )


class Rank:
    """One scheduler process."""

    def __init__(self, options: Options) -> None:
        os.environ["MOONCAKE_CONFIG_PATH"] = options.config
        args = server_args(options)
        publish(
            args,
            role="scheduler",
            ranks=SpawnRanks(world_rank=options.rank, dp_rank=None, gpu_id=0),
        )
        if options.group_port:
            torch.set_num_threads(1)
            init_distributed_environment(
                world_size=options.tp * options.dp * options.pp,
                rank=options.rank,
                distributed_init_method=f"tcp://127.0.0.1:{options.group_port}",
                backend="gloo",
                local_rank=options.rank,
            )
            initialize_model_parallel(backend="gloo")
        else:  # of one stage: nobody asks the group for anything
            get_parallel().override_permanently(pp_group=None)
        self.cache = Cache(options)
        mode = DisaggregationMode(options.role)
        self.manager = MooncakeKVManager(self.cache.args, mode, args, options.mla)
        assert self.manager.faults is not None
        self.faults = self.manager.faults
        self.faults.slice_bytes = PAGE_BYTES  # so that a read is as many moves as it has pages
        self.requests: dict[str, Offer | Want] = {}
        self.paused = False
        self.address = f"127.0.0.1:{options.port}"

    def turn(self) -> None:
        if not self.paused:
            for request in list(self.requests.values()):
                request.turn()

    # ---- commands, their arguments as JSON gave them

    def offer(self, name: str, room: int, **how: Any) -> None:  # noqa: ANN401 - JSON
        address = how.pop("address", self.address)
        self.requests[name] = Offer(self.manager, address, room, **how)

    def want(self, name: str, room: int, address: str, **how: Any) -> None:  # noqa: ANN401 - JSON
        self.requests[name] = Want(self.manager, address, room, **how)

    def allocate(self, name: str, **what: Any) -> None:  # noqa: ANN401 - JSON
        self.requests[name].allocate(**what)  # type: ignore[union-attr]  # a test's mistake shows

    def send(self, name: str, count: int, **how: Any) -> None:  # noqa: ANN401 - JSON
        self.requests[name].send(count, **how)  # type: ignore[union-attr]  # ditto

    def fire(self, name: str, error: str = "") -> None:
        event = self.requests[name].event  # type: ignore[union-attr]  # ditto
        assert event is not None
        event.error = error
        event.fired.set()

    def waited_for(self, name: str) -> bool:
        """Does a thread wait for the event behind which pages were sent?"""
        event = self.requests[name].event  # type: ignore[union-attr]  # ditto
        return event is not None and event.waited_for.is_set()

    def pause(self, *, paused: bool) -> None:
        """Like a scheduler that is busy with something else."""
        self.paused = paused

    def unseen_ends(self) -> int:
        """Reads that ended and that the scheduler was not told of yet."""
        return len(self.manager.node._decode._results.received)

    def statuses(self, name: str) -> list[str]:
        return self.requests[name].statuses

    def fail(self, name: str) -> dict[str, object]:
        return self.requests[name].fail()

    def abort(self, name: str) -> None:
        self.requests[name].peer.abort()

    def notify_abort(self, name: str) -> None:
        self.requests[name].peer.ensure_abort_notified(force_arm=True)

    def clear(self, name: str) -> None:
        self.requests[name].peer.clear()

    def metric(self, name: str) -> int:
        nbytes = self.requests[name].peer.get_transfer_metric().transfer_total_bytes
        return int(nbytes)

    def safe(self, room: int) -> bool:
        return bool(self.manager.is_abort_release_safe(room, 1))

    def digests(self, pages: list[int], states: list[list[int]]) -> dict[str, str]:
        return self.cache.digests(pages, states)

    def metadata(self, row: int) -> list[str]:
        return self.cache.metadata(row)

    def fill(self, value: int, rows: list[int] | None = None) -> None:
        self.cache.fill(value, rows)

    def tables(self) -> dict[str, int]:
        """How many entries each table has that a request may leave something in."""
        manager, node = self.manager, self.manager.node
        tables: dict[str, Any] = {
            "request_status": getattr(manager.request_status, "_local_map", manager.request_status),
            "failure_records": manager.failure_records,
            "live": node.prefill._live,
            "fetching": manager._fetching,
            "draining": manager._draining,
            "receivers": manager._receivers,
            "fetches": node._decode._fetches,
        }
        for name in (
            *("transfer_infos", "req_to_decode_prefix_len", "prefill_response_tracker"),
            *("required_prefill_response_num_table", "_deferred_abort_ack_tracker"),
        ):
            tables[name] = getattr(manager, name, {})
        rooms = getattr(manager, "addr_to_rooms_tracker", {}).values()
        return {name: len(table) for name, table in tables.items()} | {
            "addr_to_rooms": sum(len(each) for each in rooms)
        }

    def hold_of(self, room: int) -> dict[str, int]:
        """What prefill's node knows of a request that is not over."""
        hold = self.manager.node.prefill._live.get(str(room))
        if hold is None:
            return {"claims": 0, "readers": 0, "pages": 0}
        pages = sum(len(run.ids) for run in hold.pages)
        return {"claims": len(hold.claims), "readers": len(hold.readers), "pages": pages}

    def hold_reads(self, after: int = 0, *, stubborn: bool = False) -> None:
        """Let some pages of one layer through and stop the others."""
        self.faults.hold(after, stubborn=stubborn)

    def held(self) -> int:
        """Moves that are stopped."""
        return self.faults._held

    def release_reads(self) -> None:
        self.faults.release()

    def slow_reads(self, seconds: float) -> None:
        self.faults.delay_per_slice_s = seconds

    def moves(self) -> int:
        return self.faults.moves

    def address_of_node(self) -> str:
        return self.manager.node.address

    def deregister(self) -> None:
        self.manager.deregister_buffer_to_engine()

    def register(self) -> None:
        self.manager.register_buffer_to_engine()

    def close(self) -> None:
        self.manager.close()


class Bootstrap:
    """A prefill server's main process: only its bootstrap server."""

    def __init__(self, options: Options) -> None:
        os.environ["MOONCAKE_CONFIG_PATH"] = options.config
        publish(server_args(options), role="tokenizer")
        self._server = MooncakeKVBootstrapServer("127.0.0.1", options.port)

    def turn(self) -> None:
        """Nothing to do: it has a thread."""

    def close(self) -> None:
        self._server.close()


def live(channel: socket.socket, make: Callable[[], Rank | Bootstrap]) -> None:
    """Obey until the other end is gone; the first answer says whether it was made."""
    made: list[Rank | Bootstrap] = []
    channel.sendall(reply_of(lambda: made.append(make())))
    if not made:
        return
    [one], text = made, b""
    while True:
        while b"\n" not in text:
            while not select.select([channel], [], [], TURN_S)[0]:
                one.turn()
            more = channel.recv(65536)
            if not more:
                one.close()
                return
            text += more
        line, _, text = text.partition(b"\n")
        name, args, named = json.loads(line)
        channel.sendall(reply_of(functools.partial(getattr(one, name), *args, **named)))


def reply_of(call: Callable[[], object]) -> bytes:
    """A line with what it returned, or why it could not."""
    try:
        reply = {"answer": call()}
    except Exception as exc:  # noqa: BLE001 - the test shall see whatever it is
        reply = {"error": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()}
    return json.dumps(reply).encode() + b"\n"


def child(where: str, options: Options) -> None:
    """In the forked process; never returns."""
    code = 1
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as channel:
            channel.connect(where)
            channel.sendall(b"%d\n" % os.getpid())
            kind = Bootstrap if options.role == "bootstrap" else Rank
            live(channel, lambda: kind(options))
        code = 0
    except BaseException:  # noqa: BLE001 - this fork must not go on as the process it came from
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead ranks leave no zombies
    print("ready", flush=True)
    while line := sys.stdin.readline():
        where, options = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child(where, msgspec.convert(options, Options))


if __name__ == "__main__":
    main()
