"""One aggregated server, one pair and its router for all tests here; each leaves them at rest."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sglang_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang_stage import Stage


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "restarts: kills a server and starts another; runs late")
    config.addinivalue_line("markers", "leaves_none: kills a server for good; runs last")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The other tests shall meet the servers of the session's start."""
    late = ("leaves_none", "restarts")
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in late])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers' logs go."""
    named = os.environ.get("MOONCAKE_TEST_LOGS")
    return Path(named) if named else tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model, which need not exist."""
    if importlib.util.find_spec("sglang") is None:
        pytest.fail("SGLang is not installed here; run these tests by `scripts/test sglang`")
    named = os.environ.get("MOONCAKE_TEST_MODEL")
    return Path(named) if named else tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="session")
def session_stage(folder: Path, model: Path) -> Iterator[Stage]:
    with sglang_stage.opened(folder, model) as stage:
        yield stage


@pytest.fixture
def stage(session_stage: Stage) -> Iterator[Stage]:
    """The servers; afterwards no request may be left and every page must be free."""
    session_stage.alive()
    yield session_stage
    session_stage.idle()


@pytest.fixture
def prompt(stage: Stage, request: pytest.FixtureRequest) -> Callable[[int], list[int]]:
    """Makes prompts of a length, each unlike any other of this run, so that no cache has it."""
    return lambda length: stage.prompt(length, request.node.nodeid)
