"""Skips what needs the loops in C where nobody could build them."""

from __future__ import annotations

import shutil

import pytest
from mooncake_engine import native


def needs_native() -> None:
    """Skip without a compiler; with one, a missing library is a failure."""
    try:
        native.library()
    except native.Unavailable as why:
        if shutil.which("gcc"):
            raise
        pytest.skip(str(why))  # no compiler here, so there is nothing to test
