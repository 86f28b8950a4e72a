"""Which of a port's addresses (GIDs) to use, and whether two NICs' fit together. Pure."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine.errors import PathUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_engine.transport.rdma.records import DeviceRecord
    from mooncake_engine.transport.rdma.verbs.base import GidEntry

_SUBNET_PREFIX = 8  # bytes of an InfiniBand GID
_KINDS = {"ib": "InfiniBand", "roce_v1": "RoCE v1", "roce_v2": "RoCE v2"}
# Best first. RoCE v1 last: it is not routed, and a peer that has both prefers v2 too.
_RANKS = (
    ("roce_v2", "IPv4"),
    ("roce_v2", "IPv6"),
    ("roce_v2", "link-local IPv4"),
    ("roce_v2", "link-local IPv6"),
    ("roce_v1", "IPv4"),
    ("roce_v1", "IPv6"),
    ("roce_v1", "link-local IPv4"),
    ("roce_v1", "link-local IPv6"),
)


class Chosen(NamedTuple):
    """A port's GID to use, and why."""

    gid_index: int
    raw: bytes
    kind: str
    reason: str


def choose(gids: Sequence[GidEntry], wanted_index: int, link_layer: str) -> Chosen:
    """The GID of a port to use.

    On Ethernet RoCE v2 goes before v1, and IPv4 before IPv6 before addresses that are good on one
    link only; of equals the first. InfiniBand has its subnet and port GUID at index 0.

    Args:
        gids: Those that are set.
        wanted_index: Take this one; -1: choose.
        link_layer: "infiniband" or "ethernet".

    Raises:
        PathUnavailable: There is none, or not the wanted one; lists what is there.
    """
    there = "; ".join(f"{gid.gid_index}: {_shown(gid)}" for gid in gids) or "none is set"
    if wanted_index >= 0:
        for gid in gids:
            if gid.gid_index == wanted_index:
                return _chosen(gid, f"GID {wanted_index} ({_shown(gid)}): as configured")
        raise PathUnavailable(
            f"there is no GID {wanted_index} (MC_GID_INDEX, rdma.gid_index) on this port, which "
            f"has: {there}"
        )
    if link_layer == "infiniband":
        first = [gid for gid in gids if gid.gid_index == 0]
        if not first:
            raise PathUnavailable(
                f"the port has no GID 0 (it has: {there}); is its link up, with a subnet manager?"
            )
        return _chosen(first[0], f"GID 0 ({_shown(first[0])}): the port's own on InfiniBand")
    usable = [gid for gid in gids if _rank(gid) < len(_RANKS)]
    if not usable:
        raise PathUnavailable(
            f"the port has no RoCE GID (it has: {there}); give its network interface an address"
        )
    best = min(usable, key=lambda gid: (_rank(gid), gid.gid_index))
    others = f"first choice of {len(usable)}" if len(usable) > 1 else "the only one"
    return _chosen(best, f"GID {best.gid_index} ({_shown(best)}): {others}")


def mismatch(ours: DeviceRecord, theirs: DeviceRecord) -> str:
    """Why no queue pair of one NIC can reach one of the other; empty when nothing tells."""
    if ours.link_layer != theirs.link_layer:
        return (
            f"{ours.name} is on {ours.link_layer} and the peer's {theirs.name} on "
            f"{theirs.link_layer}; only NICs of one kind reach each other"
        )
    if ours.gid_kind != theirs.gid_kind:
        return (
            f"{ours.name} uses {_kind(ours.gid_kind)} and the peer's {theirs.name} "
            f"{_kind(theirs.gid_kind)}; set MC_GID_INDEX (rdma.gid_index) so that both use the same"
        )
    if ours.link_layer != "infiniband" and _family(ours.gid) != _family(theirs.gid):
        return (
            f"{ours.name} uses {_family(ours.gid)} ({_address(ours.gid)}) and the peer's "
            f"{theirs.name} {_family(theirs.gid)} ({_address(theirs.gid)}); give both interfaces "
            "an address of one family, or set MC_GID_INDEX (rdma.gid_index)"
        )
    return ""


def crosses(ours: DeviceRecord, theirs: DeviceRecord) -> bool:
    """The way leads through an InfiniBand router: the subnet prefixes differ."""
    return (
        ours.link_layer == theirs.link_layer == "infiniband"
        and ours.gid[:_SUBNET_PREFIX] != theirs.gid[:_SUBNET_PREFIX]
    )


def remarks(ours: DeviceRecord, theirs: DeviceRecord, wanted_mtu: int) -> str:
    """What is unequal and may work all the same; to be told when it does not. Empty: nothing."""
    notes = []
    if crosses(ours, theirs):
        notes.append(
            f"their InfiniBand subnets differ ({ours.gid[:_SUBNET_PREFIX].hex()} and "
            f"{theirs.gid[:_SUBNET_PREFIX].hex()}), so that a router is needed between them"
        )
    elif ours.link_layer == "infiniband" and not (ours.lid and theirs.lid):
        without = theirs.name if ours.lid else ours.name
        notes.append(f"{without} has no LID: no subnet manager has seen it")
    if _local(ours.gid) != _local(theirs.gid) and ours.link_layer != "infiniband":
        local, wide = (ours, theirs) if _local(ours.gid) else (theirs, ours)
        notes.append(
            f"{local.name} has an address of its link only ({_address(local.gid)}), and "
            f"{wide.name} a routed one ({_address(wide.gid)})"
        )
    mtu = min(ours.active_mtu, theirs.active_mtu, wanted_mtu)
    if ours.active_mtu != theirs.active_mtu:
        notes.append(
            f"the MTU of {ours.name} is {ours.active_mtu} and of {theirs.name} "
            f"{theirs.active_mtu}: {mtu} is used, and switches between them must pass it"
        )
    return "; ".join(notes)


def _chosen(gid: GidEntry, reason: str) -> Chosen:
    return Chosen(gid.gid_index, gid.raw, gid.kind, reason)


def _rank(gid: GidEntry) -> int:
    scope = "link-local " if _local(gid.raw) else ""
    kind = (gid.kind, f"{scope}{_family(gid.raw)}")
    return _RANKS.index(kind) if kind in _RANKS else len(_RANKS)


def _ip(raw: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


def _family(raw: bytes) -> str:
    return f"IPv{_ip(raw).version}"


def _local(raw: bytes) -> bool:
    """Good on one link or one machine only."""
    address = _ip(raw)
    return address.is_link_local or address.is_loopback or address.is_unspecified


def _address(raw: bytes) -> str:
    return str(_ip(raw))


def _kind(kind: str) -> str:
    return _KINDS.get(kind, kind)


def _shown(gid: GidEntry) -> str:
    on = f" on {gid.netdev}" if gid.netdev else ""
    return f"{_kind(gid.kind)}, {_address(gid.raw)}{on}"
