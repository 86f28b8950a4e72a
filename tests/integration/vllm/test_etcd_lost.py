"""etcd goes away and comes back empty while requests run: no established pair may notice."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from etcd_stage import wait_until
from harness.transfers import Transfers
from mooncake_engine.config import MetadataConfig
from mooncake_engine.metadata import open_store
from server_stage import REPLY_S
from vllm_requests import ask, prefill_first

from mooncake_connector.cluster import NODES, decode_node

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.servers import Server
    from vllm_stage import Stage

pytestmark = pytest.mark.integration


class Traffic:
    """Sends requests one after the other, in every way in turn, until told to stop."""

    def __init__(
        self, stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
    ) -> None:
        self._stage = stage
        self._ways = [
            lambda ids: prefill_first(stage, ids),
            *(lambda ids, p=p: ask(p, ids) for p in proxies.values()),
        ]
        self._prompt = prompt
        self._stop = threading.Event()
        self.done = 0

    def run(self) -> None:
        """Raises at the first wrong or missing answer."""
        while not self._stop.is_set():
            ids = self._prompt(150)
            assert self._ways[self.done % len(self._ways)](ids) == ask(self._stage.aggregated, ids)
            self.done += 1

    def stop(self) -> None:
        self._stop.set()


def test_an_etcd_that_comes_back_empty_harms_no_request(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    before = Transfers.of(stage.decode.url)
    both = {stage.prefill.url, stage.decode.url}
    traffic = Traffic(stage, proxies, prompt)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(traffic.run)
        try:
            for interrupt in (lambda: None, stage.etcd.kill, stage.etcd.restart_empty):
                interrupt()
                enough = traffic.done + 6
                wait_until(
                    lambda enough=enough: running.done() or traffic.done >= enough,
                    REPLY_S,
                    f"{enough} requests were served",
                )
            wait_until(
                lambda: known(stage) == both or running.done(),
                60,
                "both nodes are listed again",
            )
        finally:
            traffic.stop()
        running.result(REPLY_S)
    assert Transfers.of(stage.decode.url).since(before).requests == traffic.done
    assert all(proxy.healthy() for proxy in proxies.values())


def known(stage: Stage) -> set[str]:
    """The servers whose nodes etcd lists."""
    config = MetadataConfig(backend="etcd", endpoints=(stage.etcd.address,))
    with contextlib.closing(open_store(config, "127.0.0.1")) as store:
        return {decode_node(key, value).http_url for key, value in store.list(NODES).items()}
