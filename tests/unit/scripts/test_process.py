from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from harness.process import Child, ServerFailed, stop_all

# Starts a child of its own and says both pids, then waits to be ended.
WITH_CHILD = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(os.getpid(), child.pid, flush=True)
signal.pause()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + WITH_CHILD


def start(tmp_path: Path, program: str, name: str = "server") -> Child:
    return Child(name, [sys.executable, "-c", program], tmp_path / f"{name}.log")


def pids(child: Child) -> list[int]:
    """Its own and its child's pid, as soon as both run."""
    child.wait_until(lambda: child.log.read_text().endswith("\n"), timeout_s=30)
    return [int(word) for word in child.tail().split()]


def ended(pid: int) -> bool:
    """Gone, or a zombie that waits for whoever inherited it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def all_ended(group: list[int]) -> bool:
    """An orphan that was killed ends a moment after the signal."""
    deadline = time.monotonic() + 10
    while not all(map(ended, group)):
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True


def test_the_end_of_a_log_is_shown_without_colours(tmp_path: Path) -> None:
    shown = r"\x1b[32mINFO\x1b[0m \x1b[1;3mready\x1b[0m"
    program = f"import signal; print('{shown}', flush=True); signal.pause()"
    with start(tmp_path, program) as child:
        child.wait_until(lambda: child.log.read_text().endswith("\n"), timeout_s=30)
        assert child.tail() == "INFO ready"


def test_a_server_that_dies_while_starting_shows_the_end_of_its_log(tmp_path: Path) -> None:
    child = start(tmp_path, "import sys; print('no such model'); sys.exit(3)", "prefill")
    with child, pytest.raises(ServerFailed) as caught:
        child.wait_until(lambda: False, timeout_s=30)
    message = str(caught.value)
    assert "prefill" in message
    assert "exit status 3" in message
    assert str(tmp_path / "prefill.log") in message
    assert message.endswith("no such model")


def test_a_server_that_is_never_ready_fails_after_its_time(tmp_path: Path) -> None:
    with (
        start(tmp_path, WITH_CHILD) as child,
        pytest.raises(ServerFailed, match=r"not ready after 1 s"),
    ):
        child.wait_until(lambda: False, timeout_s=1)


def test_stopping_ends_what_the_server_itself_started(tmp_path: Path) -> None:
    with start(tmp_path, WITH_CHILD) as child:
        group = pids(child)
        child.stop()
        assert all_ended(group)


def test_a_server_that_ignores_the_request_to_stop_is_ended_after_its_grace(
    tmp_path: Path,
) -> None:
    with start(tmp_path, DEAF) as child:
        group = pids(child)
        child.stop(grace_s=0.5)
        assert all_ended(group)


def test_a_suspended_server_is_ended_too(tmp_path: Path) -> None:
    with start(tmp_path, WITH_CHILD) as child:
        group = pids(child)
        child.signal(signal.SIGSTOP)
        child.stop()
        assert all_ended(group)


def test_several_servers_share_one_grace(tmp_path: Path) -> None:
    children = [start(tmp_path, DEAF, f"server{number}") for number in range(3)]
    groups = [pids(child) for child in children]
    handler = signal.getsignal(signal.SIGINT)  # ignored when a shell started us in the background
    begin = time.monotonic()
    stop_all(children, grace_s=1)
    assert all(all_ended(group) for group in groups)
    assert time.monotonic() - begin < 3  # one grace, not three, and time for a busy machine
    assert signal.getsignal(signal.SIGINT) is handler


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    child = start(tmp_path, "pass")
    child.stop()
    child.stop()
    assert not child.running
