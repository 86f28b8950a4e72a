"""Load made on purpose: pure Python beside the engine, or cores that are taken."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A loop that says when it began, and that ends when its parent is gone (PR_SET_PDEATHSIG, KILL).
_LOOP = """
import ctypes, os
ctypes.CDLL(None).prctl(1, 9)
os.write(1, b".")
while True:
    pass
"""


class BusyPython:
    """A thread that holds the interpreter's lock whenever it can, as a scheduler at work does.

    The switch interval stays as it is: an engine lives in somebody else's server.
    """

    def __init__(self) -> None:
        self._ending = False
        self._spent = 0.0
        self._thread = threading.Thread(target=self._spin, name="bench-busy", daemon=True)
        self._thread.start()
        assert self._thread.ident is not None  # set by start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident)

    def _spin(self) -> None:
        table: dict[int, int] = {}
        while not self._ending:
            for key in range(64):  # dicts and small ints, what schedulers are made of
                table[key] = table.get(key, 0) + 1
        self._spent = time.thread_time()

    def cpu_s(self) -> float:
        """Its own CPU seconds so far; only before `close`."""
        return time.clock_gettime(self._clock)

    def close(self) -> float:
        """End it and wait; its CPU seconds in all."""
        self._ending = True
        self._thread.join()
        return self._spent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes of our own that each take a core, if they get one."""
    with contextlib.ExitStack() as running:
        for _ in range(count):
            loop = subprocess.Popen(  # noqa: S603 - our own interpreter and text
                [sys.executable, "-IS", "-c", _LOOP],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                process_group=0,  # a terminal's Ctrl-C is the driver's; no session: see ChildSide
            )
            running.callback(_end, loop)
            assert loop.stdout is not None  # asked for above
            loop.stdout.read(1)
        yield


def _end(loop: subprocess.Popen[bytes]) -> None:
    loop.kill()
    loop.communicate()
