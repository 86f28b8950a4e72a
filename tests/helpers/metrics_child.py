"""A rank that only counts, in a process of its own: prometheus_client has one setting a process.

`python metrics_child.py LABELS` (JSON) records one `Counts` (JSON) per line and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.sglang.metrics import Metrics
from mooncake_connector.stats import Counts

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self


class CountingRank:
    """The process as its parent sees it. Leaving the context kills it, as a crash would.

    Args:
        folder: Through which processes share metrics, as SGLang's launcher names it.
        labels: Of `Metrics`.
    """

    def __init__(self, folder: Path, **labels: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(labels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass

    def observe(self, counts: Counts) -> None:
        """Return when the process has recorded these."""
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(counts) + b"\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == b"recorded\n"  # b"" when it died


def main() -> None:
    """Record what stdin says."""
    metrics = Metrics(json.loads(sys.argv[1]))
    print("recorded", flush=True)
    for line in sys.stdin.buffer:
        metrics.observe(msgspec.json.decode(line, type=Counts))
        print("recorded", flush=True)


if __name__ == "__main__":
    main()
