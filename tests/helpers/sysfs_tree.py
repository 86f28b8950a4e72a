"""Makes folders that look like /sys of a machine that we do not have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class SysfsTree:
    """A fabricated /sys below `root`, with links as the kernel makes them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def link(self, path: str, target: str) -> None:
        """A relative link, whether or not there is something at `target`."""
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(self.root / target, link.parent))

    def node(self, index: int, cpus: str, distances: str = "") -> None:
        folder = f"devices/system/node/node{index}"
        self.file(f"{folder}/cpulist", cpus)
        if distances:
            self.file(f"{folder}/distance", distances)

    def function(self, path: str, numa: int, vendor: str = "0x15b3", kind: str = "0x020000") -> str:
        """A PCI function at "pci0000:10/0000:10:01.0/..."; its folder below the root."""
        folder = f"devices/{path}"
        self.file(f"{folder}/numa_node", str(numa))
        self.file(f"{folder}/vendor", vendor)
        self.file(f"{folder}/class", kind)
        self.link(f"bus/pci/devices/{path.rpartition('/')[2]}", folder)
        return folder

    def gpu(self, path: str, numa: int, kind: str = "0x030200") -> None:
        self.function(path, numa, "0x10de", kind)

    def nic(self, name: str, path: str, numa: int, netdev: str = "", below: str = "") -> None:
        """A NIC on a PCI function, or on something below it (an mlx5 SF)."""
        folder = self.function(path, numa) + (f"/{below}" if below else "")
        if netdev:
            self.file(f"{folder}/net/{netdev}/ifindex", "2")
        self.file(f"{folder}/infiniband/{name}/ports/1/state", "4: ACTIVE")
        self.file(f"{folder}/infiniband/{name}/ports/1/link_layer", "Ethernet")
        self.file(f"{folder}/infiniband/{name}/ports/1/rate", "200 Gb/sec (4X HDR)")
        self.link(f"{folder}/infiniband/{name}/device", folder)
        self.link(f"class/infiniband/{name}", f"{folder}/infiniband/{name}")

    def soft(self, name: str, netdev: str, below: str = "") -> None:
        """Soft-RoCE on an interface, which is virtual or hangs below a PCI function."""
        folder = f"devices/virtual/infiniband/{name}"
        self.file(f"{folder}/parent", netdev)
        self.file(f"{folder}/ports/1/state", "1: DOWN")
        self.link(f"class/infiniband/{name}", folder)
        home = f"{below or 'devices/virtual'}/net/{netdev}"
        self.file(f"{home}/ifindex", "3")
        if below:
            self.link(f"{home}/device", below)
        self.link(f"class/net/{netdev}", home)


#: The 8-GPU server of the tuning guide: node 0 has GPUs 0-3 and mlx5_bond_4, 5, 6, 8.
BONDS = {0: (4, 5, 6, 8), 1: (0, 1, 2, 3)}


def server(root: Path, *, per_switch: int = 1) -> SysfsTree:
    """Two NUMA nodes, 8 GPUs and 8 NICs, `per_switch` of each behind one PCIe switch.

    Switches have host bridges of their own.
    """
    tree = SysfsTree(root)
    tree.node(0, "0-31,64-95", "10 21")
    tree.node(1, "32-63,96-127", "21 10")
    for numa, bonds in BONDS.items():
        for slot, bond in enumerate(bonds):
            switch, place = divmod(slot, per_switch)
            bus = 0x10 + 0x60 * numa + 0x10 * switch
            above = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
            nic, gpu = (f"0000:{bus + 3 + 2 * place + n:02x}:00.0" for n in (0, 1))
            down = f"0000:{bus + 2:02x}"
            tree.nic(f"mlx5_bond_{bond}", f"{above}/{down}:{2 * place:02x}.0/{nic}", numa)
            tree.gpu(f"{above}/{down}:{2 * place + 1:02x}.0/{gpu}", numa)
    return tree
