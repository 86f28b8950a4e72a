"""Where a side runs and what its buffer is made of."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
from mooncake_engine import topology

if TYPE_CHECKING:
    from numpy.typing import NDArray


def stay_near(device: str, machine: topology.Machine | None = None) -> frozenset[int]:
    """Keep this process on the NUMA node of `device`, else on the one that it runs on.

    Called before there are threads and memory: threads made later stay there too, and the kernel
    gives memory from the node of the thread that touches it first.

    Returns:
        The CPUs; empty where there is one node, and nothing to keep to.
    """
    machine = machine or topology.discover()
    if len(machine.nodes) < 2:
        return frozenset()
    nic = machine.nic(device.partition(",")[0])
    allowed = os.sched_getaffinity(0)
    here = next((n.index for n in machine.nodes if _cpu() in n.cpus), -1)
    wanted = nic.numa if nic else here
    cpus = next((node.cpus & allowed for node in machine.nodes if node.index == wanted), None)
    if not cpus:  # a node of memory alone, or one that we may not run on
        return frozenset()
    os.sched_setaffinity(0, cpus)
    return frozenset(cpus)


def _cpu() -> int:
    """The CPU that runs this thread: field 39 of its stat, the 37th behind the name."""
    with open("/proc/thread-self/stat") as file:  # noqa: PTH123 - no folder to name
        return int(file.read().rpartition(")")[2].split()[36])


def touched_pages(nbytes: int) -> NDArray[np.uint8]:
    """So many bytes from a page's start on, each page written once; the array owns them.

    Plain pages, as a framework's allocator gives for a KV cache on a CPU.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    memory[:: mmap.PAGESIZE] = 1
    return memory
