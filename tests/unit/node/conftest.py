"""Prefill and decode ranks that close themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from node_stage import Rank, ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make() -> Iterator[Callable[..., Rank]]:
    """Makes ranks; see `node_stage.Rank`."""
    with ranks() as make_one:
        yield make_one


@pytest.fixture
def prefill(make: Callable[..., Rank]) -> Rank:
    """A rank with random bytes in its cache and usual times."""
    return make("prefill", seed=1)


@pytest.fixture
def decode(make: Callable[..., Rank]) -> Rank:
    """A rank with zeros in its cache and usual times."""
    return make("decode")
