"""What tests on real servers share: etcd, the model that is served, where logs go, the stage.

`scripts/test` names both folders; without it they are temporary, and the model is made anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from etcd_stage import EtcdServer, Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from server_stage import ServerStage


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model, which need not exist."""
    named = os.environ.get("MOONCAKE_TEST_MODEL")
    return Path(named) if named else tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the servers' logs; kept after the run when it was named."""
    named = os.environ.get("MOONCAKE_TEST_LOGS")
    folder = Path(named) if named else tmp_path_factory.mktemp("logs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A real one, on ports of its own."""
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def stores() -> Iterator[Stores]:
    """Opens metadata stores, closed after the test."""
    opened = Stores()
    yield opened
    opened.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows how its servers' logs ended just then: nobody may see them later."""
    report = yield
    stage = getattr(item, "funcargs", {}).get("stage")
    if report.failed and stage is not None:
        for server in (stage.prefill, stage.decode):
            report.sections.append((f"{call.when}: end of {server.log}", server.tail(15)))
    return report


# `session_stage` is each framework's own.


@pytest.fixture
def stage(session_stage: ServerStage) -> Iterator[ServerStage]:
    """The servers; afterwards no request may be left and every page must be free."""
    session_stage.alive()
    yield session_stage
    session_stage.idle()


@pytest.fixture
def prompt(stage: ServerStage, request: pytest.FixtureRequest) -> Callable[[int], list[int]]:
    """Makes prompts of a length, each unlike any other of this run, so that no cache has it."""
    return lambda length: stage.prompt(length, request.node.nodeid)
