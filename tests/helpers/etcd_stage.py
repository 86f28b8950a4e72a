"""A real etcd for tests, a line to it that can be cut, and a way to watch without sleeping."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from harness.servers import free_port
from mooncake_engine.config import MetadataConfig
from mooncake_engine.metadata import open_store

from mooncake_connector.etcd_server import etcd_command, find_etcd

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from mooncake_engine.metadata.base import MetadataStore


def wait_until(condition: Callable[[], bool], within: float, what: str) -> None:
    deadline = time.monotonic() + within
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        pause.wait(0.02)


class EtcdServer:
    """One etcd that can be stopped, killed, emptied and started again on the same ports."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "etcd-data"
        self.log = folder / "etcd.log"
        self.port, self.peer_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.flags: list[str] = []
        self.ca: Path | None = None  # set: the server speaks TLS
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = etcd_command(self.data, "127.0.0.1", self.port, self.peer_port)
        if self.ca is not None:
            command = [
                part.replace(f"http://{self.address}", f"https://{self.address}")
                for part in command
            ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--unsafe-no-fsync", *self.flags], stdout=log, stderr=log
            )
        wait_until(self._healthy, 20, f"etcd is healthy; its log is {self.log}")

    def _healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        if self.ca is not None:  # client certificates may be asked for: being reachable will do
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return True
            return False
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://{self.address}/health", timeout=1) as answer,
        ):
            return b"true" in answer.read()
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self.data)
        self.start()

    def ctl(self, *arguments: str) -> None:
        etcdctl = Path(find_etcd()).with_name("etcdctl")
        subprocess.run(
            [etcdctl, f"--endpoints={self.address}", *arguments],
            check=True,
            capture_output=True,
            timeout=20,
        )


class Seen:
    """What a watch reported."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[tuple[str, bytes | None]] = []
        self.now: dict[str, bytes] = {}

    def __call__(self, key: str, value: bytes | None) -> None:
        with self._changed:
            self.events.append((key, value))
            if value is None:
                self.now.pop(key, None)
            else:
                self.now[key] = value
            self._changed.notify_all()

    @property
    def gone(self) -> list[str]:
        return [key for key, value in self.events if value is None]

    def until(self, expected: dict[str, bytes], within: float = 10) -> None:
        with self._changed:
            met = self._changed.wait_for(lambda: self.now == expected, within)
        assert met, f"expected {expected} within {within} s; reported were {self.events}"

    def stays(self, for_s: float) -> None:
        """Nothing is reported for that long: time itself is what is tested."""
        with self._changed:
            before = len(self.events)
            met = self._changed.wait_for(lambda: len(self.events) > before, for_s)
        assert not met, f"reported although nothing happened: {self.events[before:]}"


class Stores:
    """Opens stores and closes them after the test."""

    def __init__(self) -> None:
        self._open: list[MetadataStore] = []

    def __call__(self, *endpoints: str, **settings: object) -> MetadataStore:
        settings = {"lease_ttl_s": 2, "timeout_s": 2.0, "cluster": "test", **settings}
        config = MetadataConfig(backend="etcd", endpoints=endpoints, **settings)  # type: ignore[arg-type]  # fields of the caller's choice
        store = open_store(config, "127.0.0.1")
        self._open.append(store)
        return store

    def close(self) -> None:
        for store in self._open:
            store.close()


class Relay:
    """A TCP line to a port of this machine that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._mended = threading.Event()
        self._mended.set()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        for end in self._ends:
            end.close()

    def cut(self) -> None:
        self._mended.clear()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._mended.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                if not self._mended.is_set():
                    near.shutdown(socket.SHUT_RDWR)
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends.append(far)
                for pair in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._copy, args=pair)
                    self._threads.append(thread)
                    thread.start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
