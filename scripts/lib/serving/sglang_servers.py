"""How the benchmark starts SGLang: one server, two behind a balancer, or a pair behind a router."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.completions import CompletionFailed, token_prompt
from harness.process import ServerFailed
from harness.servers import HOST
from harness.sglang import BACKEND, SGLangServers

from serving.setup import MAX_TOKENS, PAGE_SIZE, Running, SetupFailed, no_timers
from serving.sglang_load import loading
from serving.sglang_requests import asking, handing
from serving.sglang_timers import timing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.sglang import SGLangServer

    from serving.setup import Hand, Place, Timers

# Three of the longest requests at once: 1 GiB a server, all of it in memory from the start.
POOL_TOKENS = 3 * (MAX_TOKENS + 512)  # decode keeps 512 more free for each
WARM_TOKENS = 2 * PAGE_SIZE + 6
# Mooncake's wheel lies in a thin environment on top of SGLang's, so that our servers cannot see it.
PEERS = Path(sys.prefix).with_name(".venv-sglang-peers") / "bin" / "python"
ON_CPU = Path(__file__).with_name("sglang_on_cpu.py")
STOCK = "mooncake_tcp"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pair is started with.

    Attributes:
        backend: Ours, or one of SGLang's.
        protocol: The path of ours: "tcp" or "shm".
        page_size: Tokens, on both servers.
        chunk: `--chunked-prefill-size`, tokens; 0: the usual one, which holds the longest prompt.
        environment: More of it, name and value, for both servers.
    """

    backend: str = BACKEND
    protocol: str = ""
    page_size: int = PAGE_SIZE
    chunk: int = 0
    environment: tuple[tuple[str, str], ...] = ()

    def flags(self) -> list[str]:
        """More command line, for both servers."""
        if not self.chunk:
            return sizes(self.page_size)
        # On a CPU to launch a forward pass is to compute it: the overlap schedule looks at a
        # chunk's result, and names its pages, when the next chunk's pass has run.
        chunk = ["--chunked-prefill-size", str(self.chunk), "--disable-overlap-schedule"]
        return [*sizes(self.page_size), *chunk]

    def settings(self) -> Mapping[str, Any]:
        """Those of our connector; no other path is taken when this one fails."""
        return {"engine": {"protocol": self.protocol, "strict_transport": True}}

    def launcher(self) -> list[str]:
        """What starts a server in place of SGLang's own command.

        Raises:
            SetupFailed: The peer's environment is missing.
        """
        if self.backend == BACKEND:
            return []
        python = [str(PEERS), "-P"]  # -P: the files beside the script are not for SGLang to import
        try:
            found = subprocess.run(
                [*python, "-c", "import mooncake.engine"],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError as missing:
            raise SetupFailed(
                f"{self.backend} needs mooncake-transfer-engine-non-cuda in {PEERS.parents[1]}, "
                "which `scripts/bench serving --framework sglang` makes"
            ) from missing
        if found.returncode:
            raise SetupFailed(
                f"{shlex.join([*python, '-c', 'import mooncake.engine'])} said: {found.stderr}"
            )
        return [*python, str(ON_CPU)]


def sizes(page_size: int = PAGE_SIZE) -> list[str]:
    """Flags of every server here, behind the harness' own."""
    return ["--page-size", str(page_size), "--max-total-tokens", str(POOL_TOKENS)]


@contextlib.contextmanager
def regular(place: Place, count: int) -> Iterator[Running]:
    """`count` servers that do both halves; SGLang's router before them where there are several."""
    with SGLangServers(place.logs, place.model) as servers:
        with _starting():
            started = [
                servers.sglang("aggregated", name=f"regular-{number}", flags=sizes())
                for number in range(count)
            ]
            _wait(place, started)
            url = started[0].url
            if count > 1:
                balancer = servers.balancer(*started)
                balancer.wait_ready()
                url = balancer.url
            for number, server in enumerate(started):  # a balancer need not reach each one
                _warm(server.url, number)
            running = _running(place, url, started)
        yield running


@contextlib.contextmanager
def pair(place: Place, plan: Plan) -> Iterator[Running]:
    """A prefill and a decode server, and SGLang's router before them."""
    launcher = plan.launcher()
    with SGLangServers(place.logs, place.model) as servers:
        with _starting():
            prefill, decode = (
                servers.sglang(
                    role,
                    settings=plan.settings(),
                    flags=plan.flags(),
                    backend=plan.backend,
                    launcher=launcher,
                    env=dict(plan.environment),
                )
                for role in ("prefill", "decode")
            )
            _wait(place, (prefill, decode))
            router = servers.router(prefill, decode)
            router.wait_ready()
            _warm(router.url)
            running = _running(
                place,
                router.url,
                (prefill, decode),
                hand=handing(prefill.url, decode.url, f"http://{HOST}:{prefill.bootstrap_port}"),
                timers=timing(prefill.url, decode.url, ours=plan.backend == BACKEND),
                facts=dict(plan.environment),
            )
        yield running


@contextlib.contextmanager
def attached(
    place: Place, url: str, prefill: str = "", decode: str = "", bootstrap: str = ""
) -> Iterator[Running]:
    """Servers that the user runs, behind `url`; nothing is started, and nothing ended.

    With the URLs of a pair's servers their timers are read, and with the bootstrap server's the
    handover is taken: it compares prefill's clock with this machine's.
    """
    with _starting():
        _warm(url)
    yield Running(
        url=url,
        prefill=(prefill,) if prefill else (),
        decode=(decode,) if decode else (),
        metrics=tuple(filter(None, (prefill, decode))),
        ask=asking(url),
        hand=handing(prefill, decode, bootstrap) if bootstrap else None,
        load=loading(url, place.model, disaggregated=bool(decode)),
        timers=timing(prefill, decode, ours=False) if prefill and decode else no_timers,
    )


def _running(
    place: Place,
    url: str,
    servers: Sequence[SGLangServer],
    *,
    hand: Hand | None = None,
    timers: Timers = no_timers,
    facts: Mapping[str, str] | None = None,
) -> Running:
    urls = {server.name: server.url for server in servers}
    return Running(
        url=url,
        prefill=(urls["prefill"],) if hand else (),
        decode=(urls["decode"],) if hand else (),
        metrics=tuple(urls.values()),
        ask=asking(url),
        hand=hand,
        load=loading(url, place.model, disaggregated=hand is not None),
        timers=timers,
        # nothing to pause between turns: `--sleep-on-idle` takes no time
        facts={server.name: shlex.join(server.command) for server in servers}
        | versions()
        | dict(facts or {}),
    )


def versions() -> dict[str, str]:
    """Of SGLang and its router."""
    return {name: importlib.metadata.version(name) for name in ("sglang", "sglang-router")}


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """A server that does not start, or does not answer, is why there is no such set-up."""
    try:
        yield
    except (ServerFailed, CompletionFailed, OSError) as failed:
        raise SetupFailed(str(failed)) from failed


def _wait(place: Place, servers: Sequence[SGLangServer]) -> None:
    for server in servers:
        with place.console.status(f"{server.name}: starting; log: {server.log}"):
            server.wait_ready()


def _warm(url: str, number: int = 0) -> None:
    """The first request compiles, allocates and, in a pair, connects."""
    asking(url)(token_prompt(WARM_TOKENS, seed=-1 - number), 4)
