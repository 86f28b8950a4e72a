"""What tests on real servers share: the model they serve, and where their logs go.

`scripts/test` names both folders; without it they are temporary, and the model is made anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
