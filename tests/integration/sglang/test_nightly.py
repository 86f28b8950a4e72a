"""What needs servers of its own, or longer than every change can afford."""

from __future__ import annotations

import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sglang_stage
from harness.completions import CompletionFailed, post
from harness.process import ServerFailed
from harness.servers import HOST
from harness.sglang import SGLangServers
from harness.transfers import Transfers
from server_stage import IDLE_S, REPLY_S, made, until
from sglang_requests import Client, ask, both, meeting, moved, send
from sglang_stage import PAGE, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness.sglang import Role
    from sglang_stage import Stage

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

PROMPTS, AT_ONCE = 200, 8


def test_a_bootstrap_port_that_is_taken_ends_the_server_and_is_named(
    logs: Path, model: Path
) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        said = refused(logs / "taken", model, "prefill", bootstrap_port=port)
    assert f"cannot listen on {HOST}:{port}: the port is taken" in said


def test_two_tokenizer_workers_are_refused_with_the_reason(logs: Path, model: Path) -> None:
    said = refused(logs / "workers", model, "decode", flags=("--tokenizer-worker-num", "2"))
    assert "--tokenizer-worker-num is above 1" in said


def refused(logs: Path, model: Path, role: Role, **how: Any) -> str:  # noqa: ANN401 - as `sglang` takes them
    """What a server says that ends by itself because it cannot be started like this."""
    with SGLangServers(logs, made(model)) as servers:
        server = servers.sglang(role, **how)
        with pytest.raises(ServerFailed, match="ended with exit status"):
            server.wait_ready()
        return server.log.read_text()


def test_a_prefix_that_decode_has_is_not_moved_again(logs: Path, model: Path) -> None:
    """Here ranks register over HTTP: the other servers have an etcd."""
    flags = {"decode": ("--disaggregation-decode-enable-radix-cache",)}
    with sglang_stage.opened(logs / "radix", model, with_etcd=False, **flags) as stage:
        shared = stage.prompt(8 * PAGE)
        for own, fresh in ((200, 12), (100, 2), (64, 1), (300, 5)):
            ids = shared + stage.prompt(own)
            before = Transfers.of(stage.decode.url)
            assert both(stage, ids) == ask(stage.aggregated, ids)
            until(
                lambda before=before: Transfers.of(stage.decode.url).since(before).requests == 1,
                IDLE_S,
                "it is counted",
            )
            pages, row = divmod(Transfers.of(stage.decode.url).since(before).nbytes, PAGE_BYTES)
            assert pages == fresh
            assert row > 0  # of metadata, with the first token
        again = shared + stage.prompt(64)
        assert both(stage, again) == both(stage, again) == ask(stage.aggregated, again)


def test_memory_that_was_released_and_resumed_is_moved_again(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(300)
    assert both(stage, ids) == ask(stage.aggregated, ids)
    stage.idle()
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        for server in (stage.prefill, stage.decode):
            post(server.url, path, {}, REPLY_S)
    ids = prompt(300)
    assert both(stage, ids) == ask(stage.aggregated, ids)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", ["tcp", "shm"])
def test_every_answer_is_right_while_clients_leave_at_random(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    choose = random.Random(path)
    jobs = [
        (prompt(choose.choice((1, 64, 65, choose.randint(2, 2000)))), choose.random())
        for _ in range(PROMPTS)
    ]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        running = [threads.submit(one, stage, ids, path, luck) for ids, luck in jobs]
        answers = [job.result() for job in running]
    for (ids, _), tokens in zip(jobs, answers, strict=True):
        assert tokens is None or tokens == ask(stage.aggregated, ids)
    assert sum(tokens is not None for tokens in answers) > PROMPTS / 2


def one(stage: Stage, ids: list[int], path: str, luck: float) -> list[int] | None:
    """Decode's tokens, or None: of one in three, its own client leaves or prefill's does."""
    where, how = meeting(stage), moved(path, delay_s=0.002)
    with ThreadPoolExecutor(1) as threads:
        if luck > 1 / 3:
            first = threads.submit(send, stage.prefill, ids, **where)
            tokens = ask(stage.decode, ids, **where, **how)
            first.result(REPLY_S)
            return tokens
        leaving, staying = stage.prefill, stage.decode
        if luck > 1 / 6:
            leaving, staying = staying, leaving
        other = threads.submit(ask, staying, ids, **where, **how)
        with Client(leaving, ids, stream=True, **where, **how):
            threading.Event().wait(luck)  # a random moment, within a third of a second
        try:
            tokens = other.result(REPLY_S)
        except CompletionFailed:
            return None
        return tokens if staying is stage.decode else None
