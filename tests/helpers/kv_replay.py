"""A recorded request, moved again: two nodes in processes of their own, memory as vLLM had it.

`python kv_replay.py NAME OPTIONS` (JSON) is one of the nodes; `replay` is their parent.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from kv_recording import Recording, read
from mooncake_engine import EngineConfig, TransferEngine
from node_stage import run, until
from rank_child import RankProcess, serve

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.decode import FetchRequest
from mooncake_connector.node import Node
from mooncake_connector.peers import PeerRef

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSFER = "t"
#: What prefill's memory holds outside of the recorded pages: what is read from there is seen.
NOISE = 0xA5
#: For one answer. Python starts in half a second, and in half a minute on an emulated machine.
PATIENCE_S = 200.0


class Replayed(NamedTuple):
    """What decode says when its fetch ended.

    Attributes:
        error: Why it failed, "" when it did not.
        wrong: A sentence for each page that is not what vLLM's decode held.
        stray: Bytes that changed outside of the request's pages.
        paths: Transport -> batches of reads.
        nbytes: Bytes read.
    """

    error: str
    wrong: list[str]
    stray: int
    paths: dict[str, int]
    nbytes: int


def replay(recording: Path, prefill: EngineConfig, decode: EngineConfig) -> Replayed:
    """Fetch the recorded pages once; each side's engine has its own settings."""
    with contextlib.ExitStack() as opened:
        here = opened.enter_context(ReplayProcess("prefill", recording, prefill))
        there = opened.enter_context(ReplayProcess("decode", recording, decode))
        here.ask("offer")
        there.ask("fetch", msgspec.to_builtins(here.ref))
        replayed = Replayed(*there.ask("await_end"))
        if not replayed.error:
            here.ask("await_sent")
    return replayed


class ReplayProcess(RankProcess):
    """One side's process."""

    script = Path(__file__)
    patience_s = PATIENCE_S

    def __init__(self, name: str, recording: Path, engine: EngineConfig) -> None:
        super().__init__(name, recording=str(recording), engine=msgspec.to_builtins(engine))


class RecordedRank:
    """One side's memory, engine and node."""

    def __init__(self, name: str, recording: str, engine: dict[str, Any]) -> None:
        """Prefill's memory holds the recorded pages in noise, decode's is zero."""
        whole = read(Path(recording), Recording)
        self.tokens = whole.tokens
        self.side = whole.prefill if name == "prefill" else whole.decode
        self.runs = [
            run(first, *ids) for first, ids in zip(self.side.first, self.side.ids, strict=True)
        ]
        fill = NOISE if name == "prefill" else 0
        self.storages = [np.full(nbytes, fill, np.uint8) for nbytes in self.side.storages]
        if name == "prefill":
            for _, tensor, ids, recorded in self.layers():
                tensor[ids] = recorded
        config = ConnectorConfig(engine=msgspec.convert(engine, EngineConfig))
        with contextlib.ExitStack() as opening:
            self.engine = opening.enter_context(TransferEngine(config.engine))
            for storage in self.storages:
                self.engine.register_memory(storage)
            layout = self.side.layout(self.storages)
            self.node = Node(
                config, self.engine, engine_id=name, spec=self.side.spec, layout=layout
            )
            opening.callback(self.node.close)
            self._open = opening.pop_all()

    @property
    def ref(self) -> PeerRef:
        """How decode names this rank."""
        return PeerRef(address=self.node.address, incarnation=self.node.incarnation)

    def close(self) -> None:
        """Close node and engine."""
        self._open.close()

    def layers(self) -> Iterator[tuple[str, np.ndarray, list[int], np.ndarray]]:
        """Each layer's name, its tensor here, and the request's page ids and recorded pages."""
        for group, ids in zip(self.side.spec.groups, self.side.ids, strict=True):
            for layer in group.layers:
                tensor = self.side.tensors[layer].over(self.storages)
                yield layer, tensor, list(ids), self.side.pages(layer)

    def offer(self) -> None:
        """Hold the recorded pages for decode."""
        self.node.prefill.open(TRANSFER, TRANSFER, self.side.prompt_key)
        self.node.prefill.pages_ready(TRANSFER, self.runs, last=True)
        self.node.prefill.hold(TRANSFER, TRANSFER)

    def fetch(self, prefill: PeerRef) -> None:
        """Ask for the recorded pages."""
        self.node.fetch(
            FetchRequest(
                request_id=TRANSFER,
                transfer_id=TRANSFER,
                peer=prefill,
                wanted=tuple(self.runs),
                tokens=self.tokens,
                prompt_key=self.side.prompt_key,
            )
        )

    def await_end(self) -> Replayed:
        """Wait until the fetch is reported, then compare and clear its pages."""
        failed: dict[str, str] = {}

        def ended() -> bool:
            results = self.node.take_results()
            failed.update(results.failed)
            return TRANSFER in results.received

        until(ended, "decode to report the request", PATIENCE_S / 2)
        counts = self.node.stats.take(0)
        assert counts is not None
        wrong = self.differences()
        for _, tensor, ids, _ in self.layers():
            tensor[ids] = 0
        return Replayed(
            error=failed.get(TRANSFER, ""),
            wrong=wrong,
            stray=sum(int(np.count_nonzero(storage)) for storage in self.storages),
            paths=counts.paths,
            nbytes=sum(counts.nbytes),
        )

    def differences(self) -> list[str]:
        """A sentence for each page that is not, bit by bit, what was recorded."""
        return [
            f"{layer}, page {ids[page]}: {np.count_nonzero(differ[page])} of "
            f"{differ[page].size} elements differ"
            for layer, tensor, ids, recorded in self.layers()
            for differ in [tensor[ids] != recorded]
            for page in range(len(ids))
            if differ[page].any()
        ]

    def await_sent(self) -> None:
        """Wait until prefill may free the pages."""
        until(
            lambda: TRANSFER in self.node.prefill.take_sent(),
            "prefill to free its pages",
            PATIENCE_S / 2,
        )


def obey(rank: RecordedRank, command: str, *args: Any) -> Any:  # noqa: ANN401 - JSON
    """What the process does for its parent."""
    match command:
        case "offer":
            rank.offer()
        case "fetch":
            rank.fetch(PeerRef(**args[0]))
        case "await_end":
            return rank.await_end()
        case "await_sent":
            rank.await_sent()
        case _:
            raise ValueError(command)
    return None


if __name__ == "__main__":
    serve(RecordedRank(sys.argv[1], **json.loads(sys.argv[2])), obey)
