"""`mooncake-connector topology`: which NIC is near which memory, and which pairs go best."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from mooncake_engine import topology
from mooncake_engine.errors import ConfigError
from rich.console import Console
from rich.tree import Tree

from mooncake_connector.config import load_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mooncake_engine.config import EngineConfig, RdmaConfig
    from mooncake_engine.topology import Machine, Matrix, Nic


def show_topology(
    as_json: Annotated[
        bool, typer.Option("--json", help="The matrix alone, as MC_CUSTOM_TOPO_JSON takes it.")
    ] = False,
    sysfs: Annotated[Path, typer.Option(help="Look at another machine's copy.")] = Path("/sys"),
    measure: Annotated[
        str,
        typer.Option(metavar="PEER", help="Measure each pair of NICs with this running engine."),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="File for what was measured: rail_topology_file.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.05, max=60, help="How long to measure a pair's bandwidth.")
    ] = 1.0,
    config: Annotated[
        Path | None, typer.Option(help="mooncake.json; $MOONCAKE_CONFIG_PATH.")
    ] = None,
) -> None:
    """Show this machine's NICs and which of them each memory uses, or measure them with a peer.

    Settings count: NICs that they leave out are left out, and a topology file goes before sysfs.
    """
    engine = load_config(str(config) if config else None).config.engine
    if bool(measure) != bool(out):
        raise ConfigError(
            "--measure PEER and --out FILE go together: who to measure with, where to"
        )
    machine = topology.discover(sysfs)
    if out:
        _measure(machine, engine, measure, out, seconds)
        return
    rows = _matrix(machine, engine.rdma)
    if as_json:
        typer.echo(topology.to_json(rows), nl=False)
        return
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_tree(machine, rows, engine.rdma))


def _matrix(machine: Machine, rdma: RdmaConfig) -> Matrix:
    rows = topology.matrix(machine, rdma.devices, rdma.devices_excluded)
    if not rdma.topology_file:
        return rows
    return topology.narrow(topology.load_matrix(rdma.topology_file), topology.names_of(rows))


def _tree(machine: Machine, rows: Matrix, rdma: RdmaConfig) -> Tree:
    used = topology.names_of(rows)
    nics, gpus, nodes = len(machine.nics), len(machine.gpus), len(machine.nodes)
    tree = Tree(f"{nics} RDMA devices, {gpus} GPUs, {nodes} NUMA nodes")
    devices = tree.add("devices")
    for nic in machine.nics:
        devices.add(_described(nic) + ("" if nic.name in used else "  (left out by the settings)"))
    if not machine.nics:
        devices.add("none: no driver is loaded, or this container was not given /sys and devices")
    memory = tree.add(f"memory, by {rdma.topology_file or 'PCI distance and NUMA node'}")
    addresses = {f"cuda:{gpu.index}": gpu for gpu in machine.gpus}
    for location, row in rows.items():
        gpu = addresses.get(location)
        branch = memory.add(location + (f"  {gpu.pci}  {_node(gpu.numa)}" if gpu else ""))
        near = {nic.name: topology.distance(gpu, nic).name for nic in machine.nics} if gpu else {}
        branch.add(f"preferred  {_listed(row.preferred, near)}")
        if row.available:
            branch.add(f"fallback   {_listed(row.available, near)}")
    if machine.gpus:
        tree.add("cuda:N are numbered by PCI address, as with CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return tree


def _described(nic: Nic) -> str:
    words = [nic.name, nic.pci or "no PCI address", _node(nic.numa), *nic.netdevs]
    for port in nic.ports:
        shown = [f"port {port.number}", port.state, port.link_layer, port.rate]
        words.append(" ".join(filter(None, shown)))
    return "  ".join(words)


def _node(numa: int) -> str:
    return f"node {numa}" if numa >= 0 else "node unknown"


def _listed(names: Iterable[str], near: dict[str, str]) -> str:
    shown = (f"{name} ({near[name]})" if name in near else name for name in names)
    return ", ".join(shown) or "none"


def _measure(machine: Machine, config: EngineConfig, peer: str, out: Path, seconds: float) -> None:
    # Here, so that the matrix need not wait for what an engine imports.
    from mooncake_engine import TransferEngine

    from mooncake_connector.topology_measure import measure

    config = msgspec.structs.replace(
        config,
        protocol="rdma",
        strict_transport=True,
        # The file that names the best pairs is about to be written: all pairs count.
        rdma=msgspec.structs.replace(config.rdma, rail_topology_file=""),
    )
    with TransferEngine(config) as engine:
        record = measure(
            engine,
            engine.open_segment(peer),
            machine,
            seconds=seconds,
            report=functools.partial(typer.echo, err=True),
        )
    topology.dump_rails(out, record)
    typer.echo(f"wrote {out}")
