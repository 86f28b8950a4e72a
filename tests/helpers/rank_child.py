"""A `node_stage.Rank` in a process of its own, for tests that kill or stop it.

`python rank_child.py NAME OPTIONS` (JSON) answers one JSON line per line; `RankProcess` is the
other end of the pipes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from node_stage import SOON, Rank, run

from mooncake_connector.peers import PeerRef

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    import numpy as np


def digest(pages: np.ndarray) -> str:
    """A name for bytes that fits on a line."""
    return hashlib.blake2b(pages.tobytes(), digest_size=16).hexdigest()


class RankProcess:
    """The rank's process as its parent sees it. Leaving the context kills it."""

    script = Path(__file__)  # what it runs, which ends with `serve`
    patience_s = 2 * SOON  # for one answer

    def __init__(self, name: str, **options: Any) -> None:  # noqa: ANN401 - Rank's
        self._process = subprocess.Popen(
            [sys.executable, self.script, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        self._line = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()

    @functools.cached_property
    def ref(self) -> PeerRef:
        """What it says first. Python takes its time: who makes several lets them start at once."""
        return PeerRef(**self._answer())

    def start(self, command: str, *args: Any) -> None:  # noqa: ANN401 - JSON
        """Give a command whose answer is asked for later."""
        assert self.ref  # it has started
        assert self._process.stdin
        self._process.stdin.write(json.dumps([command, *args]).encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, command: str, *args: Any) -> Any:  # noqa: ANN401 - JSON
        """Give a command and wait for its answer."""
        self.start(command, *args)
        return self._answer()

    def finish(self) -> Any:  # noqa: ANN401 - JSON
        """The answer to the oldest command that was started."""
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(SOON)

    def stop(self) -> None:
        """Stop it in its tracks; returns when it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _answer(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdout
        number, end = self._process.stdout.fileno(), time.monotonic() + self.patience_s
        while b"\n" not in self._line:
            left = end - time.monotonic()
            assert left > 0, "the process did not answer"
            if select.select([number], [], [], left)[0]:
                more = os.read(number, 65536)
                assert more, "the process has ended"
                self._line += more
        line, _, self._line = self._line.partition(b"\n")
        return json.loads(line)


def obey(rank: Rank, command: str, *args: Any) -> Any:  # noqa: ANN401 - JSON
    """What the process does for its parent."""
    match command:
        case "offer":
            transfer, pages = args
            rank.offer(run(0, *pages), transfer=transfer)
        case "end":
            rank.node.prefill.end(args[0], "reused", retry=False)
        case "await_sent":
            rank.await_sent(args[0])
        case "fetch":
            ref, transfer, pages = args
            rank.fetch(PeerRef(**ref), run(0, *pages), request=transfer, transfer=transfer)
        case "hold_reads":
            rank.faults.slice_bytes = 1024  # so that a read is many moves
            rank.faults.hold(after=args[0])
        case "await_read":
            rank.faults.wait_held()
        case "release_reads":
            rank.faults.release()
        case "await_end":
            transfer, pages = args
            return {"right": rank.await_end(transfer), "bytes": digest(rank.pages(run(0, *pages)))}
        case "digest":
            return digest(rank.pages(run(0, *args[0])))
        case "failures":
            rank.look()
            return rank.failures
        case _:
            raise ValueError(command)
    return None


def serve(rank: Any, obey: Callable[..., Any]) -> None:  # noqa: ANN401 - has `ref` and `close`
    """Say where the rank is, then `obey(rank, command, ...)` until the parent hangs up."""
    answer: Any = msgspec.to_builtins(rank.ref)
    try:
        while True:
            print(json.dumps(answer), flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            answer = obey(rank, *json.loads(line))
    finally:
        rank.close()


if __name__ == "__main__":
    serve(Rank(sys.argv[1], **json.loads(sys.argv[2])), obey)
