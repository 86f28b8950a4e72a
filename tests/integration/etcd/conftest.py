"""What tests of etcd have beside a started one: one that is not, a watch, a publisher to kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from etcd_stage import EtcdServer, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def cold_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """Not started yet."""
    server = EtcdServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def seen() -> Seen:
    return Seen()


PUBLISHER = """
import sys, time
from mooncake_engine.config import MetadataConfig
from mooncake_engine.metadata import open_store

endpoint, key, value = sys.argv[1:]
config = MetadataConfig(backend="etcd", endpoints=(endpoint,), lease_ttl_s=2, cluster="test")
store = open_store(config, "127.0.0.1")
store.put(key, value.encode())
print("published", flush=True)
sys.stdin.read()  # until killed
"""


@pytest.fixture
def publish() -> Iterator[Callable[[str, str, str], subprocess.Popen[str]]]:
    """Publish a key from a process of its own, which a test may kill."""
    processes: list[subprocess.Popen[str]] = []

    def start(endpoint: str, key: str, value: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, endpoint, key, value],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "published\n"
        return process

    yield start
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
