"""What a device has not computed yet is not told to anybody."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from mooncake_connector.device_order import call_behind

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kernel:
    """A device event: fires, or reports an error, when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ran = threading.Event()
        self._error = error

    def synchronize(self) -> None:
        assert self.ran.wait(30.0)
        if self._error is not None:
            raise self._error


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def test_calls_come_in_order_and_not_before_their_kernels_have_run(
    threads: ThreadPoolExecutor,
) -> None:
    said: list[str] = []
    first, second = Kernel(), Kernel()
    waits = [
        call_behind(threads, [kernel], lambda name=name: said.append(name), said.append)
        for kernel, name in ((first, "first"), (second, "second"))
    ]
    second.ran.set()
    assert not waits[1].done()
    assert said == []
    first.ran.set()
    for wait in waits:
        wait.result(30.0)
    assert said == ["first", "second"]


def test_an_error_of_the_device_is_told_instead(threads: ThreadPoolExecutor) -> None:
    said: list[str] = []
    kernel = Kernel(RuntimeError("CUDA error: an illegal memory access was encountered"))
    kernel.ran.set()
    call_behind(threads, [kernel], lambda: said.append("ready"), said.append).result(30.0)
    assert said == [
        "the forward pass failed on the device: CUDA error: an illegal memory access was "
        "encountered"
    ]
