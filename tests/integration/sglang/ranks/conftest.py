"""One process that has imported SGLang for all tests here, and servers forked from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sglang_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sglang_ranks import Forks, Servers


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = sglang_ranks.Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture
def servers(forks: Forks, tmp_path: Path) -> Iterator[Servers]:
    with sglang_ranks.servers(forks, tmp_path) as made:
        yield made
