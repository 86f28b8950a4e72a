"""Which NICs serve which memory first: Mooncake's priority matrix.

A row per memory location, "cpu:0" for a NUMA node and "cuda:0" for a GPU; in JSON as Mooncake
writes it: {"cpu:0": [["mlx5_0"], ["mlx5_1"]], ...}, preferred NICs and those to fall back to.
"""

from __future__ import annotations

import difflib
import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mooncake_engine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mooncake_engine.topology.sysfs import Gpu, Machine, Nic, Node

_LOCATION = re.compile(r"\*|[a-z]+(:\d+)?")
_ANY = "*"  # Mooncake's name of a place that is not known
_OWN_NODE = 10  # SLIT: the distance of a NUMA node to itself


class Distance(enum.IntEnum):
    """How far two PCI functions are apart, by the names of `nvidia-smi topo -m`."""

    PIX = 0  # one PCIe switch between them at most
    PXB = 1  # several PCIe switches
    PHB = 2  # the CPU's PCIe host bridge
    NODE = 3  # several host bridges of one NUMA node
    SYS = 4  # the link between NUMA nodes; or not known


class Priority(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The NICs for one memory location: preferred are alike, available are nearest first."""

    preferred: tuple[str, ...]
    available: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """All of them, preferred first."""
        return self.preferred + self.available


Matrix = dict[str, Priority]


def distance(one: Nic | Gpu, other: Nic | Gpu) -> Distance:
    """How far apart two devices are; SYS when one of them hangs below no PCI host bridge."""
    shared = 0
    for here, there in zip(one.path, other.path, strict=False):
        if here != there:
            break
        shared += 1
    if shared == 0:
        same_node = one.path and other.path and one.numa == other.numa >= 0
        return Distance.NODE if same_node else Distance.SYS
    if shared == 1:
        return Distance.PHB
    # Below one switch each way is its downstream port and the device, without one only the device.
    below = max(len(one.path), len(other.path)) - shared
    return Distance.PIX if below <= 2 else Distance.PXB


def matrix(machine: Machine, only: Collection[str] = (), excluded: Collection[str] = ()) -> Matrix:
    """The matrix of a machine.

    `cpu:N` prefers the NICs of its NUMA node; a node without NICs (half of them under sub-NUMA
    clustering) those of the nearest node that has some. `cuda:N` prefers the NICs at the smallest
    `Distance`. A NIC whose node is not known is preferred by every node: nothing tells against it.

    Args:
        machine: From `discover`.
        only: Names of the NICs to use; empty: all.
        excluded: Names of those not to use, whatever `only` says; names of none are let pass.

    Raises:
        ConfigError: `only` names a NIC that this machine does not have.
    """
    there = [nic.name for nic in machine.nics]
    for name in only:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(there) or 'none'}"
            raise ConfigError(f"this machine has no RDMA device {name!r}; {hint}")
    nics = [
        nic for nic in machine.nics if nic.name not in excluded and (not only or nic.name in only)
    ]
    rows = {f"cpu:{node.index}": _of_node(node, nics) for node in machine.nodes}
    return rows | {f"cuda:{gpu.index}": _of_gpu(gpu, nics) for gpu in machine.gpus}


def _of_node(node: Node, nics: Sequence[Nic]) -> Priority:
    known = {nic.name: node.distances[nic.numa] for nic in nics if nic.numa in node.distances}
    least = min(known.values(), default=_OWN_NODE)
    return _split({nic.name: known.get(nic.name, least) for nic in nics})


def _of_gpu(gpu: Gpu, nics: Sequence[Nic]) -> Priority:
    return _split({nic.name: distance(gpu, nic) for nic in nics})


def _split(far: Mapping[str, int]) -> Priority:
    least = min(far.values(), default=0)
    by_distance = sorted(far, key=far.__getitem__)  # stable: by name where equally far
    return Priority(
        tuple(name for name in by_distance if far[name] == least),
        tuple(name for name in by_distance if far[name] > least),
    )


def names_of(rows: Matrix) -> tuple[str, ...]:
    """Every NIC that the matrix names, once."""
    return tuple(dict.fromkeys(name for row in rows.values() for name in row.all()))


def narrow(rows: Matrix, nics: Collection[str]) -> Matrix:
    """The matrix without the NICs that are not among `nics`: filtered, or they did not open."""
    return {
        location: Priority(
            tuple(name for name in row.preferred if name in nics),
            tuple(name for name in row.available if name in nics),
        )
        for location, row in rows.items()
    }


def nics_for(rows: Matrix, location: str) -> Priority:
    """The NICs for memory at a location; preferred is empty only when there are no NICs.

    "cpu" is memory of no known NUMA node: what any node prefers is preferred. A location without
    a row uses the row "*" if there is one, else every NIC alike.
    """
    row = rows.get(location)
    if row is None and location == "cpu":
        nodes = [row for name, row in rows.items() if name.startswith("cpu:")]
        row = _joined(nodes) if nodes else None
    if row is None:
        row = rows.get(_ANY) or Priority(names_of(rows), ())
    return row if row.preferred else Priority(row.available, ())


def _joined(rows: Iterable[Priority]) -> Priority:
    rows = list(rows)
    preferred = dict.fromkeys(name for row in rows for name in row.preferred)
    others = dict.fromkeys(name for row in rows for name in row.available if name not in preferred)
    return Priority(tuple(preferred), tuple(others))


def cpus_near(machine: Machine, nic: str) -> frozenset[int] | None:
    """CPUs of the NIC's NUMA node, None when it or its node is unknown or has no CPU.

    A container may not be allowed all of them: cut with `os.sched_getaffinity(0)` before pinning.
    """
    found = machine.nic(nic)
    if found is None:
        return None
    near = (node.cpus for node in machine.nodes if node.index == found.numa)
    return next(near, frozenset()) or None


def to_json(rows: Matrix) -> str:
    """As `load_matrix` and Mooncake read it, a row per line."""
    lines = (
        f'  "{location}": {msgspec.json.encode(row).decode()}' for location, row in rows.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_matrix(source: str | Path) -> Matrix:
    """The matrix in a file, or in the text itself when it begins with a brace.

    Raises:
        ConfigError: It cannot be read or is no priority matrix; says where and what is expected.
    """
    text, where = str(source), "the NIC priority matrix"
    if not text.lstrip().startswith("{"):
        where = f"the NIC priority matrix in {source}"
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"cannot read {where}: {why}; `mooncake-connector topology --json` writes one"
            ) from exc
    location, rows = "", dict[str, Priority]()
    try:
        # Row by row: decoded as a whole, an error would not name its row.
        for location, raw in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).items():
            rows[location] = msgspec.json.decode(raw, type=Priority)
    except msgspec.DecodeError as exc:
        at = f" at {location!r}" if location else ""
        raise ConfigError(
            f"{where} cannot be used{at}: {exc}; expected "
            '{"cpu:0": [["preferred"], ["fallback"]], "cuda:0": ...}'
        ) from exc
    for location, row in rows.items():
        _check(location, row, where)
    if not names_of(rows):
        raise ConfigError(f"{where} names no NIC; leave it out to have them chosen by sysfs")
    return rows


def _check(location: str, row: Priority, where: str) -> None:
    if not _LOCATION.fullmatch(location):
        raise ConfigError(
            f"{where} has a row {location!r}; a memory location is cpu:0, cuda:0, cpu or *"
        )
    names = row.all()
    if not all(names):
        raise ConfigError(f"{where} has an empty name for {location}; give a NIC's, as mlx5_0")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{where} names {twice[0]} twice for {location}; leave one")
