"""One program in a process group of its own: started, waited for, and surely ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

POLL_S = 0.25  # between two looks at a server that is starting
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # SGLang's router writes colours to files, too


class ServerFailed(RuntimeError):
    """A server ended or was not ready in time; the message shows the end of its log."""


class Child:
    """A running program. Its output goes to `log`, which is written anew."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Start `command`; `env` is added to this process' environment."""
        self.name = name
        self.command = tuple(command)
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                # A terminal's Ctrl-C is ours, and its children end with it. No session of its own:
                # Linux shares CPUs out among sessions (sched_autogroup), and on two cores a server
                # that spins in sched_yield(), as vLLM's workers do, then kept all others waiting
                # for seconds.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Process id, also the id of its group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True until the program itself ended."""
        return self._process.poll() is None

    def tail(self, lines: int = 30) -> str:
        """The last lines of the log, without colours."""
        text = COLOUR.sub("", self.log.read_text(errors="replace"))
        return "\n".join(text.splitlines()[-lines:])

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return when `ready()`; `ServerFailed` when the program ends or time runs out."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(POLL_S)  # an end is seen at once, not at the next look
                raise self.failure(f"ended with exit status {code} before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {timeout_s:.0f} s")

    def failure(self, what: str) -> ServerFailed:
        """An error that names this program and shows the end of its log."""
        return ServerFailed(
            f"{self.name} (pid {self.pid}) {what}; the last lines of {self.log}:\n{self.tail()}"
        )

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End the whole group at once, as a crash would, and reap the program."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask to end, wait up to `grace_s`, then end whatever is left of the group."""
        self.signal(signal.SIGCONT)  # a stopped process takes no other signal
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def stop_all(children: Sequence[Child], grace_s: float = 10.0) -> None:
    """Stop all of them side by side; Ctrl-C meanwhile does not leave one behind."""
    deadline = time.monotonic() + grace_s
    with _signals_ignored():
        for child in children:
            child.signal(signal.SIGTERM)
        for child in children:
            child.stop(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that `finally` blocks run."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
