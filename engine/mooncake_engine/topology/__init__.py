"""Which NIC is near which memory: from sysfs, from a file, or measured. Opens no device."""

from mooncake_engine.topology.matching import matchings
from mooncake_engine.topology.partners import Side, partners
from mooncake_engine.topology.priority import (
    Distance,
    Matrix,
    Priority,
    cpus_near,
    distance,
    load_matrix,
    matrix,
    names_of,
    narrow,
    nics_for,
    to_json,
)
from mooncake_engine.topology.rails import (
    HostPair,
    Measured,
    NicPair,
    RailTable,
    dump_rails,
    host_of,
    load_rails,
)
from mooncake_engine.topology.sysfs import Gpu, Machine, Nic, Node, Port, discover

__all__ = [
    "Distance",
    "Gpu",
    "HostPair",
    "Machine",
    "Matrix",
    "Measured",
    "Nic",
    "NicPair",
    "Node",
    "Port",
    "Priority",
    "RailTable",
    "Side",
    "cpus_near",
    "discover",
    "distance",
    "dump_rails",
    "host_of",
    "load_matrix",
    "load_rails",
    "matchings",
    "matrix",
    "names_of",
    "narrow",
    "nics_for",
    "partners",
    "to_json",
]
