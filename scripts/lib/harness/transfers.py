"""What a server of ours says about its transfers on `/metrics`."""

from __future__ import annotations

import time
from typing import Self

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from harness.servers import get

PREFIX = "mooncake_connector:"
LOOK_S = 0.1  # between two looks for what is counted soon


class Transfers(msgspec.Struct, frozen=True):
    """Totals since the server started, or between two looks.

    Attributes:
        requests: Requests whose KV was received whole.
        nbytes: Bytes moved.
        seconds: Submit to last byte, summed over batches.
        exposed: On prefill: last page computed to all taken by decode, summed over requests.
        paths: Transport -> batches.
    """

    requests: int
    nbytes: int
    seconds: float
    exposed: float
    paths: dict[str, int]

    @classmethod
    def of(cls, url: str) -> Self:
        """Ask the server at `url`."""
        values: dict[str, float] = {}
        paths: dict[str, int] = {}
        for family in text_string_to_metric_families(get(url, "/metrics", timeout_s=30)[1]):
            for sample in family.samples:
                name = sample.name.removeprefix(PREFIX)
                if name == "path_batches_total":
                    path = sample.labels["path"]
                    paths[path] = paths.get(path, 0) + int(sample.value)
                else:
                    values[name] = values.get(name, 0) + sample.value
        return cls(
            requests=int(values.get("requests_total", 0)),
            nbytes=int(values.get("transfer_bytes_sum", 0)),
            seconds=values.get("transfer_seconds_sum", 0.0),
            exposed=values.get("exposed_seconds_sum", 0.0),
            paths=paths,
        )

    @classmethod
    def gained(cls, url: str, before: Self, *, requests: int = 1, within_s: float) -> Transfers:
        """What happened since `before`, once `requests` more are counted or `within_s` are over.

        Counted is what two looks agree on: SGLang reads a file per kind of metric, one after the
        other, while another process writes them.
        """
        deadline = time.monotonic() + within_s
        last = None
        while True:
            moved = cls.of(url).since(before)
            if (moved.requests >= requests and moved == last) or time.monotonic() >= deadline:
                return moved
            last = moved
            time.sleep(LOOK_S)

    def since(self, before: Transfers) -> Transfers:
        """What happened between `before` and this look."""
        paths = {name: count - before.paths.get(name, 0) for name, count in self.paths.items()}
        return Transfers(
            requests=self.requests - before.requests,
            nbytes=self.nbytes - before.nbytes,
            seconds=self.seconds - before.seconds,
            exposed=self.exposed - before.exposed,
            paths={name: count for name, count in paths.items() if count},
        )

    @property
    def path(self) -> str:
        """The transports used, "-" for none."""
        return "+".join(sorted(self.paths)) or "-"
