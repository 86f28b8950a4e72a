from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_stage import BUFFER, ours_over, scattered
from etcd_stage import wait_until

from mooncake_connector.bench import handle, messages
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.bench.conditions import Condition, workload
from mooncake_connector.bench.handle import ChildSide
from mooncake_connector.bench.pair import Pair
from mooncake_connector.bench.remote import TargetServer

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON = 30.0  # only a side that hangs takes so long; a start takes two seconds where others work


def state(pid: int) -> str:
    """As ps shows it: T is stopped; empty: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def stopped(pid: int) -> bool:
    """Every thread: the one that is busy stops a moment after the first."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    return all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T" for t in threads)


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def open_target(side: handle.Handle) -> messages.Opened:
    command = messages.Open(
        role="target",
        backend="ours",
        options={"protocol": "tcp"},
        environment={},
        nbytes=BUFFER,
    )
    return side.ask(command, messages.Opened)


def test_a_side_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    variant = Variant(
        backend="ours", name="ours, nowhere", route=Route.TCP, options={"protocol": "loopback"}
    )
    with Pair(variant, BUFFER, tmp_path) as pair, pytest.raises(BackendFailed) as failure:
        pair.connect()  # loopback reaches this process only
    assert "cannot open segment" in str(failure.value)
    assert str(tmp_path / "ours-nowhere-initiator.log") in str(failure.value)


def test_a_failed_run_leaves_its_side_alive(tmp_path: Path) -> None:
    outside = workload("outside", scattered("read", 3))
    outside.work[0][0].remote[1] = 1 << 40
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(outside, 0.0)
        with pytest.raises(BackendFailed, match="OutOfBounds"):
            pair.measure(0.0, runs=1)
        pair.check(workload("inside", scattered("read", 3)))


def test_a_side_that_is_killed_while_it_measures_ends_the_wait(tmp_path: Path) -> None:
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(workload("any", scattered("read", 3)), 0.0)
        pair.initiator.post(messages.Measure(seconds=SOON))
        assert isinstance(pair.initiator, ChildSide)
        os.kill(pair.initiator.pid, signal.SIGKILL)
        with pytest.raises(BackendFailed, match=r"initiator ended .*killed by SIGKILL"):
            pair.initiator.answer(messages.Measured, SOON)
        with pytest.raises(BackendFailed, match="ended before it could be asked to measure"):
            pair.measure(0.0, runs=1)


def test_a_side_that_is_killed_beside_busy_threads_is_told_as_any_other(tmp_path: Path) -> None:
    def measured_while_killed(pair: Pair) -> None:
        assert isinstance(pair.initiator, ChildSide)
        with pair.beside(Condition(busy_python=True)):
            os.kill(pair.initiator.pid, signal.SIGKILL)
            pair.measure(SOON)

    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(workload("any", scattered("read", 3)), 0.0)
        with pytest.raises(BackendFailed, match="killed by SIGKILL"):
            measured_while_killed(pair)


def test_a_target_that_is_killed_fails_the_initiators_run(tmp_path: Path) -> None:
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(workload("any", scattered("read", 3)), 0.0)
        pair.initiator.post(messages.Measure(seconds=SOON))
        assert isinstance(pair.target, ChildSide)
        os.kill(pair.target.pid, signal.SIGKILL)
        with pytest.raises(BackendFailed, match="peer_gone"):
            pair.initiator.answer(messages.Measured, SOON)


def test_a_side_that_hangs_is_ended_and_its_log_shows_where(tmp_path: Path) -> None:
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(workload("any", scattered("read", 3)), 0.0)
        assert isinstance(pair.target, ChildSide)
        target = pair.target.pid
        pair.target.suspend()
        wait_until(lambda: state(target) == "T", SOON, "the target stopped")
        pair.initiator.post(messages.Measure(seconds=0.0, runs=1))
        with pytest.raises(BackendFailed, match="no answer for 0 s and was ended"):
            pair.initiator.answer(messages.Measured, 0.2)
        assert isinstance(pair.initiator, ChildSide)
        assert "workers.py" in pair.initiator.log.read_text()
        assert not state(pair.initiator.pid)


def test_a_suspended_side_takes_no_cpu_time(tmp_path: Path) -> None:
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        sides = (pair.target, pair.initiator)
        pids = [side.pid for side in sides if isinstance(side, ChildSide)]
        with pair.beside(Condition(busy_python=True)):
            pair.suspend()
            wait_until(lambda: all(stopped(pid) for pid in pids), SOON, "both stopped")
            before = [ticks(pid) for pid in pids]
            with pytest.raises(TimeoutError):  # takes 0.3 s, in which a busy thread has 30 ticks
                pair.initiator._channel.receive(0.3)
            assert [ticks(pid) for pid in pids] == before
            pair.resume()
            wait_until(lambda: ticks(pids[0]) > before[0], SOON, "the busy thread goes on")


def test_what_an_engine_prints_goes_to_the_log(tmp_path: Path) -> None:
    noisy = """
import os
from mooncake_connector.bench import side
from mooncake_connector.bench.backends import ours
class Target(ours.Target):
    def address(self):
        print("from Python", flush=True)
        os.write(1, b"from C\\n")
        return super().address()
ours.Target = Target
side.main()
"""
    log = tmp_path / "noisy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", noisy, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        channel = handle.Channel(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno()))
        process.stdin.close()
        with contextlib.closing(handle.Handle("noisy", channel)) as side:
            assert open_target(side).address
    assert log.read_text() == "from Python\nfrom C\n"
    assert process.returncode == 0


def test_sides_die_with_their_driver_even_while_suspended(tmp_path: Path) -> None:
    driver = f"""
import sys, time
from pathlib import Path
from mooncake_connector.bench import messages
from mooncake_connector.bench.handle import ChildSide
side = ChildSide("any", {{}}, Path({str(tmp_path)!r}) / "any.log")
side.ask(messages.Clock(), messages.Seconds)
side.suspend()
print(side.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert state(pid)
        process.kill()
    wait_until(lambda: state(pid) in {"", "Z"}, SOON, "the side is gone")


@contextlib.contextmanager
def serving() -> Iterator[TargetServer]:
    with TargetServer("127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def test_a_target_elsewhere_serves_one_initiator_after_the_other(tmp_path: Path) -> None:
    with serving() as server:
        for _ in range(2):
            with Pair(ours_over(Route.TCP), BUFFER, tmp_path, server.address) as pair:
                pair.check(workload("any", scattered("write", 5)))
                pair.prepare(workload("any", scattered("write", 5)), 0.0)
                assert pair.measure(0.0, runs=2).target_cpu_s > 0


def test_a_target_that_nobody_started_is_said_so(tmp_path: Path) -> None:
    with TargetServer("127.0.0.1", 0) as server:
        address = server.address
    with pytest.raises(BackendFailed, match=rf"no benchmark target answers at {address}"):
        Pair(ours_over(Route.TCP), BUFFER, tmp_path, address)


def test_a_first_contact_needs_a_fresh_pair(tmp_path: Path) -> None:
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        assert pair.first_contact(scattered("read", 1)) > 0
        with pytest.raises(AssertionError, match="fresh pair"):
            pair.first_contact(scattered("read", 1))
