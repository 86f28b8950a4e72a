"""A target on another machine: a server that starts a side for each connection to it.

The connection itself is the side's channel, so that the driver speaks to it as to a child. Whoever
reaches the port can have memory allocated and moved here: it is for a network that you trust.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from mooncake_connector.bench.base import BackendFailed
from mooncake_connector.bench.handle import CLOSE_S, RemoteSide

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECT_S = 5.0


def reach(target: str, name: str) -> RemoteSide:
    """Connect to a target server.

    Args:
        target: Its host:port.
        name: What the side is called in errors.

    Raises:
        BackendFailed: Nobody listens there.
    """
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise BackendFailed(f"the target {target!r} is not host:port; its command prints it")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
    except OSError as error:
        raise BackendFailed(
            f"no benchmark target answers at {target}: {error}; start it there with --mode target"
        ) from error
    return RemoteSide(name, connection)


class TargetServer:
    """Listens until it is closed; a context manager. Sides end with their connections."""

    def __init__(self, host: str, port: int, options: dict[str, str] | None = None) -> None:
        """Listen.

        Args:
            host: Address that initiators reach this machine at; sides are told it too.
            port: 0: any.
            options: Go before those that an initiator asks for: this machine's device_name.

        Raises:
            OSError: The address cannot be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._options = {"host": host, **(options or {})}
        self._sides: list[subprocess.Popen[bytes]] = []
        self._woken, self._wake = os.pipe()
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._listener.getsockname()[1]}"

    def serve(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Accept initiators until `close` is called by another thread, or Ctrl-C."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._woken in ready:
                return
            connection, peer = self._listener.accept()
            self._sides = [side for side in self._sides if side.poll() is None]
            report(f"initiator at {peer[0]}")
            with connection:
                self._sides.append(self._start(connection))

    def _start(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        given = [f"{name}={value}" for name, value in self._options.items()]
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "mooncake_connector.bench.side", str(os.getpid()), *given],
            stdin=connection.fileno(),
            stdout=connection.fileno(),
            process_group=0,  # as in `handle.py`
        )

    def stop(self) -> None:
        """Have `serve` return; from any thread."""
        os.write(self._wake, b".")

    def close(self) -> None:
        """Stop listening and end every side; after `serve` returned. Idempotent."""
        self._listener.close()
        sides, self._sides = self._sides, []
        for side in sides:
            side.terminate()
        for side in sides:
            with contextlib.suppress(subprocess.TimeoutExpired):
                side.wait(CLOSE_S)
            side.kill()
            side.wait()
        for descriptor in {self._woken, self._wake} - {-1}:
            os.close(descriptor)
        self._woken = self._wake = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
