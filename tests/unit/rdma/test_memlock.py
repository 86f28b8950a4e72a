"""The limit of locked memory, read as the kernel applies it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.transport.rdma.memlock import LEAST, Limit, read

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
EVERYBODY = f"         0          0 {(1 << 32) - 1}\n"
ROOTLESS = "         0       1000          1\n"
WITH_IPC_LOCK, WITHOUT = "0000000000004000", "00000000a80425fb"  # Docker's default set


def _process(folder: Path, capabilities: str, uid_map: str | None = EVERYBODY) -> Path:
    status = f"Name:\tnode\nVmPin:\t    2048 kB\nCapEff:\t{capabilities}\n"
    (folder / "status").write_text(status)
    if uid_map is not None:
        (folder / "uid_map").write_text(uid_map)
    return folder


@pytest.fixture
def limited() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        pytest.skip("this process has no locked-memory limit; the child of another test lowers it")
    return soft


def test_the_limit_holds_for_a_process_without_the_capability(tmp_path: Path, limited: int) -> None:
    assert read(_process(tmp_path, WITHOUT)) == Limit(limited, 2 * MIB)


def test_the_capability_lifts_the_limit(tmp_path: Path) -> None:
    assert read(_process(tmp_path, WITH_IPC_LOCK)) == Limit(None, 2 * MIB)


def test_without_user_namespaces_the_capability_counts(tmp_path: Path) -> None:
    assert read(_process(tmp_path, WITH_IPC_LOCK, None)).allowed is None


def test_the_capability_of_a_rootless_container_is_void(tmp_path: Path, limited: int) -> None:
    assert read(_process(tmp_path, WITH_IPC_LOCK, ROOTLESS)).allowed == limited


def test_what_fits_beside_what_is_pinned_is_not_refused() -> None:
    limit = Limit(8 * MIB, 2 * MIB)
    assert limit.refusal(6 * MIB) is None
    assert Limit(None, 1 << 50).refusal(1 << 50) is None


def test_what_does_not_fit_is_refused_with_the_figures_and_the_remedies() -> None:
    refusal = Limit(8 * MIB, 2 * MIB).refusal(6 * MIB + 1)
    assert refusal is not None
    for part in (str(6 * MIB + 1), str(2 * MIB), str(8 * MIB), "ulimit -l", "--ulimit memlock=-1"):
        assert part in refusal


def test_a_limit_that_holds_no_cache_is_refused_at_start() -> None:
    assert Limit(LEAST, 0).refusal_at_start() is None
    assert Limit(None, 0).refusal_at_start() is None
    refusal = Limit(LEAST - 1, 0).refusal_at_start()
    assert refusal is not None
    assert "--ulimit memlock=-1" in refusal


_CHILD = """
import os, resource
from mooncake_engine import PathUnavailable, RdmaConfig  # now: the files may be root's alone
from mooncake_engine.transport.rdma import memlock
from mooncake_engine.transport.rdma.gpu import Gpu
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.types import Region
from verbs_stub import Provider, StubDevice
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # drops every capability
print(memlock.read().allowed, memlock.read().refusal(2 << 20) is not None)
provider, config, region = Provider(), RdmaConfig(), Region(1 << 40, 600 << 10, "cpu")
devices = [StubDevice(provider, "nic0"), StubDevice(provider, "nic1")]
try:
    Registrations(devices, config, Gpu(config)).add(region)
except PathUnavailable as refusal:
    print(refusal)
print(len(provider.calls))
Registrations(devices[:1], config, Gpu(config)).add(region)
print(len(provider.calls))
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What a child without privileges says, of which 1 MiB may be locked."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_lowered_limit_is_seen_in_a_process_without_privileges(lines: list[str]) -> None:
    assert lines[0].split() == [str(MIB), "True"]


def test_a_region_beyond_the_limit_on_all_devices_is_refused_before_any_is_asked(
    lines: list[str],
) -> None:
    _, refusal, asked, asked_of_one = lines
    for part in (str(600 << 10), str(1200 << 10), "nic0, nic1", "ulimit -l"):
        assert part in refusal
    assert (asked, asked_of_one) == ("0", "1")
