"""Set-ups of servers that the user already runs: the same load and table, nothing is started.

    --url aggregated=http://a:8000 --url ours=http://proxy:8000
    --legs ours=http://p:8100,http://d:8200          both legs by the client, prefill first
    --legs mooncake=http://p:8100,http://d:8200,http://p:8998      both at once, bootstrap server

The first `--url` is the reference: its tokens are taken for right, its decode step is subtracted.
One named "ours..." is compared with each of the others.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from harness.completions import complete

from serving import legs, vllm_load
from serving.setup import Running, Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from harness.completions import Reply

    from serving.setup import Exchange, Load, LoadFigures, Place


def setups(urls: Sequence[str], both_legs: Sequence[str], model: str) -> tuple[Setup, ...]:
    """One for each `--url`, of servers that speak OpenAI's API; `ValueError` as `user_run`."""
    return user_run(urls, both_legs, lambda url, pair: partial(_opened, url, pair, model))


def user_run(
    urls: Sequence[str],
    both_legs: Sequence[str],
    opener: Callable[[str, tuple[str, ...]], Callable[[Place], AbstractContextManager[Running]]],
) -> tuple[Setup, ...]:
    """Servers that are up already, one set-up for each `--url`; the first is the reference.

    Args:
        urls: NAME=URL each, of what takes requests.
        both_legs: NAME=PREFILL,DECODE[,BOOTSTRAP] each, of some of them.
        opener: Of a URL and the URLs of its pair (none where `--legs` has none) -> `Setup.open`.

    Raises:
        ValueError: For what is not NAME=URL, or legs of a name without a URL.
    """
    routers = dict(named(text, 1, 1) for text in urls)
    pairs = dict(named(text, 2, 3) for text in both_legs)
    if unknown := sorted(pairs.keys() - routers.keys()):
        raise ValueError(f"--legs of {', '.join(unknown)}: there is no --url of that name")
    return tuple(
        Setup(
            name=name,
            framework="url",
            route="",
            kind=_kind(name) if number else "aggregated",
            servers=0,
            open=opener(url, pairs.get(name, ())),
        )
        for number, (name, (url,)) in enumerate(routers.items())
    )


def named(text: str, fewest: int, most: int) -> tuple[str, tuple[str, ...]]:
    """NAME=URL[,URL...] -> name and URLs, without a slash at their ends.

    Raises:
        ValueError: Saying what it has to look like.
    """
    name, equals, rest = text.partition("=")
    urls = tuple(part.strip().rstrip("/") for part in rest.split(","))
    usable = [part for part in urls if urlsplit(part).scheme == "http" and urlsplit(part).netloc]
    if not (name and equals) or len(usable) != len(urls) or not fewest <= len(urls) <= most:
        wanted = "NAME=http://HOST:PORT" if most == 1 else "NAME=http://P:PORT,http://D:PORT[,...]"
        raise ValueError(f"{text!r} is not {wanted}")
    return name, urls


def _kind(name: str) -> str:
    return "ours" if name.startswith("ours") else "peer"


@contextlib.contextmanager
def _opened(url: str, pair: tuple[str, ...], model: str, place: Place) -> Iterator[Running]:
    def ask(prompt: list[int], max_tokens: int) -> Reply:
        return complete(url, prompt, max_tokens=max_tokens, model=model)

    def first(prompt: list[int], max_tokens: int) -> Exchange:
        return legs.prefill_first(pair[0], pair[1], prompt, max_tokens, model)

    def at_once(prompt: list[int], max_tokens: int) -> Exchange:
        return legs.both_at_once(pair[0], pair[1], pair[2], prompt, max_tokens, model)

    def load(wanted: Load, result: Path) -> LoadFigures:
        return vllm_load.run(url, str(place.model), wanted, result, model)

    yield Running(
        url=url,
        prefill=pair[:1],
        decode=pair[1:2],
        ask=ask,
        hand=first if len(pair) == len(("prefill", "decode")) else None,
        hand_at_once=at_once if pair[2:] else None,
        load=load,
    )
