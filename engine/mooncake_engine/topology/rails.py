"""Measured pairs of NICs: which of ours goes best with which of a peer's.

The file is that of Mooncake's `scripts/generate_cluster_topology.py`: a list of host pairs, each
with what was measured (`endpoints`) and the pairs chosen of it (`partition_matchings`), by
"<our NUMA node>-<the peer's>". One such object alone is read too, and so is what TENT's own
`rail_topo_path` takes, {"all": [{"local": .., "remote": ..}], "direct": [..]}.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from mooncake_engine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PARTITION = re.compile(r"(-?\d+)-(-?\d+)(_extra)?")
_ANYWHERE = -1
_NOT_MEASURED_US = 1e9

Nonnegative = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


class Measured(msgspec.Struct, frozen=True):
    """One pair of NICs."""

    src_dev: Name
    dst_dev: Name
    src_numa: int = _ANYWHERE
    dst_numa: int = _ANYWHERE
    bandwidth: Nonnegative = 0.0  # MiB/s, as perftest prints it; 0: not measured
    latency: Nonnegative = 0.0  # us

    def piece_us(self) -> float:
        """Microseconds that one MiB takes alone: bandwidth and latency in one figure."""
        return self.latency + (1e6 / self.bandwidth if self.bandwidth else _NOT_MEASURED_US)


class NicPair(msgspec.Struct, frozen=True):
    """A rail by its NICs' names, as a link offers it for measuring."""

    local: str
    remote: str
    remote_numa: int = _ANYWHERE  # NUMA node of the peer's NIC


class HostPair(msgspec.Struct, frozen=True):
    """What was measured between two hosts."""

    src_host: str = ""
    dst_host: str = ""
    endpoints: tuple[Measured, ...] = ()
    partition_matchings: dict[str, tuple[Measured, ...]] = {}


class _TentPair(msgspec.Struct, frozen=True):
    local: Name
    remote: Name


class _File(HostPair, frozen=True):
    """One object, ours or TENT's."""

    all: tuple[_TentPair, ...] = ()
    direct: tuple[_TentPair, ...] = ()


class RailTable:
    """The pairs of a file, to be asked."""

    def __init__(self, records: Iterable[HostPair]) -> None:
        self.records = tuple(records)

    def best(
        self, local_numa: int = -1, remote_numa: int = -1, peer: str = ""
    ) -> tuple[tuple[str, str], ...]:
        """Pairs (our NIC, the peer's NIC), best first; empty: choose without us.

        Args:
            local_numa: NUMA node of our memory; -1: any.
            remote_numa: Of the peer's.
            peer: Host as `host_of` gives it. What was measured with it, if something was, goes
                before what was measured with others of its kind.
        """
        records = [record for record in self.records if peer and record.dst_host == peer]
        found: list[tuple[bool, float, tuple[str, str]]] = []
        for record in records or self.records:
            for key, pairs in record.partition_matchings.items():
                partition = _PARTITION.fullmatch(key)
                assert partition, "load_rails has checked"
                if not _fits(partition[1], local_numa) or not _fits(partition[2], remote_numa):
                    continue
                extra = partition[3] is not None
                found += ((extra, pair.piece_us(), (pair.src_dev, pair.dst_dev)) for pair in pairs)
        found.sort(key=lambda entry: entry[:2])  # stable: what was not measured keeps its order
        return tuple(dict.fromkeys(pair for _, _, pair in found))


def _fits(node: str, wanted: int) -> bool:
    return wanted == _ANYWHERE or int(node) in {wanted, _ANYWHERE}


def host_of(segment: str) -> str:
    """The host in a segment's name: "10.0.0.2:15000" (p2p), "[fe80::1]:15000", "node7-812-1f0e"."""
    host, colon, port = segment.rpartition(":")
    if colon and port.isdigit():
        return host.strip("[]")
    return re.sub(r"-\d+-[0-9a-f]+$", "", segment)


def load_rails(path: str | Path) -> RailTable:
    """The table in a file.

    Raises:
        ConfigError: It cannot be read or holds no pairs; says where and what is expected.
    """
    table = RailTable(_read(Path(path)))
    if not table.best():
        raise ConfigError(
            f"the rail topology {path} holds no partition_matchings; "
            "`mooncake-connector topology --measure PEER --out FILE` writes them"
        )
    return table


def dump_rails(path: str | Path, record: HostPair) -> None:
    """Write what was measured between two hosts; what the file says of other pairs is kept.

    Raises:
        ConfigError: The file cannot be written, or is there and holds something else.
    """
    path = Path(path)
    hosts = (record.src_host, record.dst_host)
    kept = _read(path) if path.exists() else ()
    records = [*(old for old in kept if (old.src_host, old.dst_host) != hosts), record]
    text = msgspec.json.format(msgspec.json.encode(records), indent=2)
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.write_bytes(text + b"\n")
        beside.replace(path)  # a reader sees the old file or the new one
    except OSError as exc:
        raise ConfigError(f"cannot write the rail topology {path}: {exc.strerror}") from exc


def _read(path: Path) -> tuple[HostPair, ...]:
    try:
        decoded = msgspec.json.decode(path.read_bytes(), type=tuple[HostPair, ...] | _File)
    except OSError as exc:
        raise ConfigError(
            f"cannot read the rail topology {path}: {exc.strerror}; "
            "`mooncake-connector topology --measure PEER --out FILE` writes one"
        ) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"the rail topology {path} cannot be used: {exc}; expected a list of host pairs "
            'with "partition_matchings": {"0-0": [{"src_dev": "mlx5_0", "dst_dev": "mlx5_0"}]}'
        ) from exc
    records = (_of_tent(decoded),) if isinstance(decoded, _File) else decoded
    for key in itertools.chain.from_iterable(record.partition_matchings for record in records):
        if not _PARTITION.fullmatch(key):
            raise ConfigError(
                f"the rail topology {path} has a partition {key!r}; "
                'expected two NUMA nodes as in "0-1"'
            )
    return records


def _of_tent(file: _File) -> HostPair:
    """TENT's pairs as ours, of any NUMA nodes: "direct" are the best, "all" those that work."""
    best = tuple(Measured(pair.local, pair.remote) for pair in file.direct or file.all)
    ours = {"-1--1": best} if best else {}
    return HostPair(
        file.src_host, file.dst_host, file.endpoints, {**ours, **file.partition_matchings}
    )
