"""One aggregated server, one pair and its router for all tests here; each leaves them at rest."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import sglang_stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sglang_stage import Stage


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "restarts: kills a server and starts another; runs late")
    config.addinivalue_line("markers", "leaves_none: kills a server for good; runs last")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The other tests shall meet the servers of the session's start."""
    late = ("leaves_none", "restarts")
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in late])


@pytest.fixture(scope="session")
def session_stage(logs: Path, model: Path) -> Iterator[Stage]:
    if importlib.util.find_spec("sglang") is None:
        pytest.fail("SGLang is not installed here; run these tests by `scripts/test sglang`")
    with sglang_stage.opened(logs, model) as stage:
        yield stage
