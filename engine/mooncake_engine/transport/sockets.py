"""Opens sockets: which address and port to listen on, how to reach one, how they are set up."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time

from mooncake_engine.errors import PathUnavailable

# A host that vanished without a word is noticed after 4 + 3 * 2 = 10 s on an idle lane, and
# after 10 s of unacknowledged bytes on a busy one.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
)
_BACKLOG = 1024


def host_port(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def configure(sock: socket.socket) -> None:
    """Set what every data socket needs: no delay, and a dead host noticed in 10 s."""
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO. Unlike `settimeout` this keeps the socket blocking."""
    micros = max(int(seconds * 1e6), 1)  # 0 would mean forever
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(micros, 1_000_000)))


def listen(host: str, min_port: int, max_port: int, section: str = "tcp") -> socket.socket:
    """Listen on the first free port of the range; 0 and 0 let the kernel choose.

    Args:
        host: Address or name of this machine.
        min_port: First of the range.
        max_port: Last of it.
        section: Of the settings that these come from, for messages.

    Raises:
        PathUnavailable: Naming the address and the range when nothing of it can be used.
    """
    if min_port > max_port or (min_port == 0) != (max_port == 0):
        raise PathUnavailable(
            f"ports {min_port}-{max_port} are no range; set {section}.min_port <= "
            f"{section}.max_port, or both to 0 for any port"
        )
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as unknown:
        raise PathUnavailable(
            f"cannot resolve the bind address {host!r} ({unknown}); set {section}.bind_address to "
            "an address of this machine"
        ) from unknown
    family, _, _, _, address = found[0]
    last: OSError | None = None
    for port in range(min_port, max_port + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of an earlier engine in TIME_WAIT must not block its port for a minute.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address[0], port, *address[2:]))
            sock.listen(_BACKLOG)
        except OSError as failure:
            sock.close()
            last = failure
            if failure.errno not in {errno.EADDRINUSE, errno.EACCES}:
                break  # the address is at fault, not the port
        else:
            return sock
    raise PathUnavailable(
        f"cannot listen on {host}, tcp ports {min_port}-{max_port}: {last}; free or widen "
        f"{section}.min_port..{section}.max_port, or set {section}.bind_address to an address of "
        "this machine"
    ) from last


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect within `timeout_s` (name resolution not counted), trying each address of `host`.

    Raises:
        OSError: Of the last address tried.
    """
    deadline = time.monotonic() + timeout_s
    last = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            configure(sock)
            set_timeout(sock, socket.SO_SNDTIMEO, remaining)  # also bounds connect(2)
            sock.connect(address)
        except BlockingIOError as unfinished:  # how connect(2) says that SO_SNDTIMEO passed
            sock.close()
            last = TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout_s:g} s")
            last.__cause__ = unfinished
        except OSError as failure:
            sock.close()
            last = failure
        else:
            return sock
    raise last


def wake_accept(listener: socket.socket) -> None:
    """Make a blocked accept of another thread fail now, and every later one. Idempotent."""
    with contextlib.suppress(OSError):  # shut or closed before
        listener.shutdown(socket.SHUT_RDWR)
