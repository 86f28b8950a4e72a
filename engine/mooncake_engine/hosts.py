"""Which machine this is, and the address that peers reach it at."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mooncake_engine.config import EngineConfig

# Addresses that documentation owns: connecting a UDP socket asks the routing table, sends nothing.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def default_address() -> str:
    """This machine's address on the default route; 127.0.0.1 when there is no route."""
    for family, elsewhere in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((elsewhere, 9))
                address: str = probe.getsockname()[0]
                return address
        except OSError:  # no such family or no route
            continue
    return "127.0.0.1"


def is_wildcard(host: str) -> bool:
    """True for the addresses that mean all interfaces and so cannot be told to a peer."""
    return host in {"0.0.0.0", "::"}  # noqa: S104 - recognised, not bound to


def own_address(config: EngineConfig) -> str:
    """What peers are told: `host`, else the address that tcp binds, else the default route's."""
    bound = config.tcp.bind_address
    return config.host or ("" if is_wildcard(bound) else bound) or default_address()


def machine_id() -> str:
    """Equal for processes that share a kernel: its boot id, which containers see too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # a sandbox without /proc: like nobody's, so that nothing is taken as local
        return secrets.token_hex(16)


def random_name() -> str:
    """`<hostname>-<pid>-<random>`: tells an operator where a segment lives."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
