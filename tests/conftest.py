"""For all tiers: a test that leaves something open fails."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A closed thing is gone at once; a thread that was told to end may need a time slice.
GRACE_S = 5.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "keeps_open(reason): leaves descriptors or threads open, for this reason"
    )


@pytest.fixture(autouse=True)
def nothing_stays_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaks a file descriptor, a thread, or a name of ours in /dev/shm."""
    if request.node.get_closest_marker("keeps_open"):
        yield
        return
    things, threads = open_things(), set(threading.enumerate())
    yield
    end = time.monotonic() + GRACE_S
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, end - time.monotonic()))
    left = open_things() - things
    if left:
        gc.collect()  # what only a reference cycle keeps open is no leak
        left &= open_things()
    left |= {f"thread {thread.name}" for thread in set(threading.enumerate()) - threads}
    assert not left, f"left open: {', '.join(sorted(left))}"


def open_things() -> set[str]:
    """Descriptors of this process, and names in /dev/shm, which belong to the whole machine."""
    things = {str(name) for name in Path("/dev/shm").iterdir() if "mooncake" in name.name}
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            things.add(f"fd {descriptor.name} -> {descriptor.readlink()}")
    return things
