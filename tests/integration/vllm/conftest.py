"""One aggregated server and one pair for all tests here; each leaves the pair at rest."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import vllm_stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.servers import Server
    from vllm_stage import Stage


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "restarts: kills servers and starts others; runs last")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that restart come last: the others shall meet the servers of the session's start."""
    items.sort(key=lambda item: item.get_closest_marker("restarts") is not None)


@pytest.fixture(scope="session")
def session_stage(logs: Path, model: Path) -> Iterator[Stage]:
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("vLLM is not installed here; run these tests by `scripts/test integration`")
    with vllm_stage.opened(logs, model) as stage:
        yield stage


@pytest.fixture(scope="session")
def proxies(session_stage: Stage) -> dict[str, Server]:
    """An embedded proxy of each style, by style."""
    started = {style: session_stage.proxy(style) for style in ("prefill-first", "both-at-once")}
    for proxy in started.values():
        proxy.wait_ready()
    return started
