"""What sysfs tells of this machine's NICs, GPUs and NUMA nodes. Pure, given the folder.

Nothing here fails: a file that is missing or refuses to be read (containers mask many) is a fact
that is not known, and a link that leads nowhere is a device that was pulled out meanwhile.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

_FUNCTION = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_NVIDIA = "0x10de"
_DISPLAY = ("0x0300", "0x0302")  # a VGA controller (workstation cards), a 3D controller (servers)


class Port(msgspec.Struct, frozen=True):
    """One port of a NIC, as the kernel shows it; "" where it does not."""

    number: int
    state: str = ""  # "ACTIVE", "DOWN", ...; proves little: rxe moves bytes while DOWN
    link_layer: str = ""  # "InfiniBand", "Ethernet"
    rate: str = ""  # "100 Gb/sec (4X EDR)"


class Nic(msgspec.Struct, frozen=True):
    """One RDMA device.

    Attributes:
        name: As verbs know it: "mlx5_0".
        pci: Address of the PCI function that its bytes go through, "0000:3b:00.0"; "" for a
            software device on a virtual interface.
        numa: NUMA node of that function; -1 when unknown.
        path: Its way through the PCI tree, from the host bridge down to the function.
        netdevs: Network interfaces of the device.
        ports: Its ports, by number.
    """

    name: str
    pci: str = ""
    numa: int = -1
    path: tuple[str, ...] = ()
    netdevs: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU; fields as those of `Nic`."""

    index: int  # the N of "cuda:N"
    pci: str
    numa: int = -1
    path: tuple[str, ...] = ()


class Node(msgspec.Struct, frozen=True):
    """One NUMA node."""

    index: int
    cpus: frozenset[int]  # empty for a node of memory alone (CXL, HBM)
    distances: dict[int, int]  # firmware's SLIT: node -> distance, 10 to itself


class Machine(msgspec.Struct, frozen=True):
    """What is there. NICs in the order of their names, GPUs by index, nodes by index."""

    nics: tuple[Nic, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    nodes: tuple[Node, ...] = ()

    def nic(self, name: str) -> Nic | None:
        """The NIC of that name."""
        return next((nic for nic in self.nics if nic.name == name), None)


def discover(root: Path = Path("/sys"), cuda_order: Sequence[str] | None = None) -> Machine:
    """This machine, or the one whose sysfs lies at `root`.

    GPUs are numbered by PCI address, as CUDA does with `CUDA_DEVICE_ORDER=PCI_BUS_ID`. CUDA's own
    default is FASTEST_FIRST (another order only where models differ), and `CUDA_VISIBLE_DEVICES`
    leaves some out: whoever can ask the driver (`cuDeviceGetPCIBusId`) gives `cuda_order`, the PCI
    addresses by index, and only those GPUs are there.
    """
    root = root.resolve()
    nodes = _nodes(root)
    # Firmware of single-node machines and of most guests says -1; there is no farther node then.
    alone = nodes[0].index if len(nodes) == 1 else -1
    nics = (_nic(root, folder, alone) for folder in _entries(root / "class/infiniband"))
    found = {gpu.pci: gpu for gpu in _gpus(root, alone)}
    if cuda_order is None:
        cuda_order = sorted(found, key=_address_order)
    gpus = []
    for index, address in enumerate(cuda_order):
        pci = plain_address(address)
        gpus.append(msgspec.structs.replace(found.get(pci, Gpu(0, pci)), index=index))
    return Machine(tuple(nic for nic in nics if nic), tuple(gpus), nodes)


def plain_address(address: str) -> str:
    """A PCI address as sysfs writes it; CUDA writes capitals, NVML a domain of eight digits."""
    parts = _FUNCTION.fullmatch(address.lower())
    if parts is None:
        return address
    domain, bus, device, function = parts.groups()
    return f"{int(domain, 16):04x}:{bus}:{device}.{function}"


def _nic(root: Path, folder: Path, alone: int) -> Nic | None:
    if _resolved(folder) is None:
        return None
    device = _resolved(folder / "device")
    netdevs = tuple(entry.name for entry in _entries(device / "net")) if device else ()
    if device is None:
        # Soft-RoCE hangs below no device; it tells the interface that it sends by.
        parent = _read(folder / "parent") or _read(folder / "ports/1/gid_attrs/ndevs/0")
        netdevs = (parent,) if parent else ()
        device = _resolved(root / "class/net" / parent / "device") if parent else None
    path = _pci_path(device)
    return Nic(
        name=folder.name,
        pci=path[-1] if path else "",
        numa=_numa(root, device, alone),
        path=path,
        netdevs=netdevs,
        ports=tuple(_port(entry) for entry in _entries(folder / "ports") if entry.name.isdigit()),
    )


def _port(folder: Path) -> Port:
    return Port(
        number=int(folder.name),
        state=_read(folder / "state").rpartition(": ")[2],  # "4: ACTIVE"
        link_layer=_read(folder / "link_layer"),
        rate=_read(folder / "rate"),
    )


def _gpus(root: Path, alone: int) -> list[Gpu]:
    gpus = []
    for entry in _entries(root / "bus/pci/devices"):
        if _read(entry / "vendor") != _NVIDIA or not _read(entry / "class").startswith(_DISPLAY):
            continue
        device = _resolved(entry)
        gpus.append(Gpu(0, entry.name, _numa(root, device, alone), _pci_path(device)))
    return gpus


def _nodes(root: Path) -> tuple[Node, ...]:
    folder = root / "devices/system/node"
    found = {int(entry.name[4:]): entry for entry in _entries(folder, r"node\d+")}
    if not found:  # a kernel without CONFIG_NUMA
        return (Node(0, _cpu_list(_read(root / "devices/system/cpu/online")), {0: 10}),)
    nodes = []
    for index, entry in sorted(found.items()):
        distances = [int(word) for word in _read(entry / "distance").split()]
        known = len(distances) == len(found)
        nodes.append(
            Node(
                index,
                _cpu_list(_read(entry / "cpulist")),
                dict(zip(sorted(found), distances, strict=True)) if known else {index: 10},
            )
        )
    return tuple(nodes)


def _cpu_list(text: str) -> frozenset[int]:
    """The set that a text like "0-3,8" means."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _pci_path(device: Path | None) -> tuple[str, ...]:
    """Host bridge, bridges, function. What hangs below a function (an mlx5 SF) is left out."""
    parts = device.parts if device else ()
    return tuple(p for p in parts if _HOST_BRIDGE.fullmatch(p) or _FUNCTION.fullmatch(p))


def _numa(root: Path, device: Path | None, alone: int) -> int:
    while device is not None and device != root and root in device.parents:
        text = _read(device / "numa_node")
        if text:
            return int(text) if int(text) >= 0 else alone
        device = device.parent  # an mlx5 SF has no such file, the function above it has
    return alone


def _address_order(address: str) -> tuple[int, ...]:
    parts = _FUNCTION.fullmatch(address)
    return tuple(int(part, 16) for part in parts.groups()) if parts else ()


def _entries(folder: Path, pattern: str = ".*") -> list[Path]:
    """What a folder holds, mlx5_2 before mlx5_10; nothing when there is no such folder."""
    try:
        found = [entry for entry in folder.iterdir() if re.fullmatch(pattern, entry.name)]
    except OSError:
        return []
    return sorted(found, key=lambda entry: natural_order(entry.name))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which numbers in names count as numbers."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # nothing there; a loop of links, before Python 3.13
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
