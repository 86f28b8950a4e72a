"""What peers are told of us before anything is connected: this transport's part of the record."""

from __future__ import annotations

from typing import Annotated

import msgspec

from mooncake_engine.topology import Priority

#: Of what is published and of what is said over the control connection.
VERSION = 1


class DeviceRecord(msgspec.Struct, frozen=True, array_like=True):
    """One NIC of an engine, as its peers know it.

    Attributes:
        name: As verbs know it: "mlx5_0".
        port: The port in use.
        lid: Its local identifier on InfiniBand; 0 on Ethernet.
        gid: The GID in use.
        gid_kind: "ib", "roce_v1" or "roce_v2".
        link_layer: "infiniband" or "ethernet".
        active_mtu: Of the port, bytes.
        numa_node: -1: not known.
        can_read: Whether it can READ from a peer.
        max_dest_rd_atomic: READs that each of its queue pairs serves at once.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=255)]
    lid: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    gid: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    gid_kind: str
    link_layer: str
    active_mtu: Annotated[int, msgspec.Meta(ge=256, le=4096)]
    numa_node: int
    can_read: bool
    max_dest_rd_atomic: Annotated[int, msgspec.Meta(ge=0, le=255)]


class RdmaEndpoint(msgspec.Struct, frozen=True):
    """Where a peer's control socket listens, and its NICs.

    The order of `devices` is that of the keys that it tells (`keys.KeyRow`). `matrix` has a row
    per memory location: which of them are near to it.
    """

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    version: int
    devices: tuple[DeviceRecord, ...]
    matrix: dict[str, Priority]
