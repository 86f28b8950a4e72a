"""What tests on real servers need from `scripts/test`, which makes the model and names folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the tiny model."""
    return _folder("MOONCAKE_TEST_MODEL")


@pytest.fixture(scope="session")
def logs() -> Path:
    """Folder for the servers' logs; kept after the run."""
    folder = _folder("MOONCAKE_TEST_LOGS")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.fail(f"{variable} is not set; run these tests by `scripts/test integration`")
    return Path(value)
