"""What stages of real servers have in common, whatever framework they run."""

from __future__ import annotations

import http
import http.client
import itertools
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from etcd_stage import wait_until
from harness.completions import token_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from harness.servers import Server

#: For one reply on two cores that do other things too; a quiet machine needs a second.
REPLY_S = 120.0
#: Until a server without work says so: one engine step and one look at its metrics. SGLang aborts
#: 2 s after a streaming client left, and 4 s after one that waits for a whole answer.
IDLE_S = 20.0

SCRIPTS = Path(__file__).parents[2] / "scripts/lib"


class ServerStage:
    """One aggregated server, which is always right, beside a prefill/decode pair."""

    aggregated: Server
    prefill: Server
    decode: Server

    def __init__(self, at_rest: Callable[[Server], bool]) -> None:
        """`at_rest`: has a server no request and no page in use?"""
        self._at_rest = at_rest
        self._asked: dict[str, itertools.count[int]] = {}

    def alive(self) -> None:
        """Raise `ServerFailed`, with the end of its log, for a server that ended."""
        for server in (self.aggregated, self.prefill, self.decode):
            if not server.running:
                raise server.failure("has ended, though no test killed it")

    def idle(self) -> None:
        """Fail unless both sides come to rest with every page free."""
        self.alive()
        for server in (self.prefill, self.decode):
            wait_until(
                lambda server=server: self._at_rest(server), IDLE_S, f"{server.name} is at rest"
            )
        self.alive()  # a server that finds pages missing when it comes to rest ends

    def prompt(self, length: int, name: str = "") -> list[int]:
        """Token ids that no other request of this run begins with, the same in every run."""
        count = self._asked.setdefault(name, itertools.count())
        return token_prompt(length, zlib.crc32(f"{name} {next(count)} {length}".encode()))


def made(model: Path) -> Path:
    """The tiny model's folder, which is made when it is not there."""
    if not model.exists():
        subprocess.run([sys.executable, SCRIPTS / "tiny_model.py", model], check=True, timeout=300)
    return model


def until(condition: Callable[[], object], within: float, what: str) -> None:
    """As `wait_until`, for a server that may be starting: no answer is not yet."""
    looks: list[str] = []  # what came of each and how long it took

    def met() -> bool:
        begin = time.monotonic()
        try:
            answer = condition()
        except (OSError, http.client.HTTPException) as error:
            answer = None
            looks.append(repr(error))
        else:
            looks.append(f"{answer} after {time.monotonic() - begin:.2f} s")
        return bool(answer)

    try:
        wait_until(met, within, what)
    except AssertionError as error:
        raise AssertionError(f"{error}; {len(looks)} looks, the last: {looks[-3:]}") from None


class LeavingClient:
    """A request whose client goes away when the test wants it."""

    def __init__(self, server: Server, path: str, body: dict[str, Any]) -> None:
        """Send it; the answer is streamed when `body` says so."""
        self._connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=REPLY_S)
        self._connection.request(
            "POST", path, json.dumps(body), headers={"Content-Type": "application/json"}
        )
        self._response: http.client.HTTPResponse | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """Of a streamed answer, as they come."""
        self._response = self._connection.getresponse()
        assert self._response.status == http.HTTPStatus.OK, self._response.read()
        for line in self._response:
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]":
                yield json.loads(data)

    def leave(self) -> None:
        """Go away."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
