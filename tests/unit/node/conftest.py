"""Prefill and decode ranks that close themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from node_stage import Rank, ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make() -> Iterator[Callable[..., Rank]]:
    """Makes ranks; see `node_stage.Rank`. Bare sockets, which say no Ping, may live a minute."""
    with ranks() as make_one:

        def make_patient(name: str, **options: Any) -> Rank:  # noqa: ANN401 - Rank's
            return make_one(name, **{"peer_dead_after_s": 60.0, **options})

        yield make_patient


@pytest.fixture
def prefill(make: Callable[..., Rank]) -> Rank:
    """A rank with random bytes in its cache."""
    return make("prefill", seed=1)


@pytest.fixture
def decode(make: Callable[..., Rank]) -> Rank:
    """A rank with zeros in its cache."""
    return make("decode")
