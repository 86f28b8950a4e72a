"""Which set-ups are up at the same time, so that those that are compared take turns. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.setup import Setup

#: Of a server, its pages among it once all have been used. With 24 GiB nine of vLLM's fit: all that
#: moves over TCP, four pairs and the reference. Nine of SGLang's pushed everybody's code out of
#: memory: a load that takes a minute had not ended after eleven.
SERVER_BYTES = {"vllm": 2 << 30, "sglang": 5 << 29}
#: For the client, the framework's benchmark, routers and etcd.
RESERVED_BYTES = 2 << 30


def capacity(available_bytes: int, framework: str) -> int:
    """How many of its servers fit; never fewer than one pair and the reference."""
    return max(3, (available_bytes - RESERVED_BYTES) // SERVER_BYTES[framework])


def grouped(setups: Sequence[Setup], servers: int) -> list[list[Setup]]:
    """Groups of at most `servers` servers, the reference in each.

    Set-ups that are compared (one route, as many pairs) share a group; a family too large for one
    is cut up, ours being in each part. The rest go where there is room.
    """
    reference = [setup for setup in setups if setup.kind == "aggregated"][:1]
    room = servers - _size(reference)
    families: dict[tuple[str, int], list[Setup]] = {}
    single = []
    for setup in setups:
        if setup in reference:
            continue
        if setup.route:
            families.setdefault((setup.route, setup.pairs), []).append(setup)
        else:
            single.append(setup)
    groups: list[list[Setup]] = []
    for family in families.values():
        parts = _parts(family, room)
        # Only a whole family may join another one: parts of two would be taken for one.
        _place(groups, parts[0], room) if len(parts) == 1 else groups.extend(parts)
    for setup in single:
        _place(groups, [setup], room)
    return [[*reference, *group] for group in groups] or ([reference] if reference else [])


def _parts(family: list[Setup], room: int) -> list[list[Setup]]:
    if _size(family) <= room:
        return [family]
    ours = [setup for setup in family if setup.kind == "ours"][:1]
    parts: list[list[Setup]] = []
    for setup in family:
        if setup in ours:
            continue
        if not parts or _size(parts[-1]) + setup.servers > room:
            parts.append([*ours])
        parts[-1].append(setup)
    return parts


def _place(groups: list[list[Setup]], family: list[Setup], room: int) -> None:
    for group in groups:
        if _size(group) + _size(family) <= room:
            group += family
            return
    groups.append(list(family))


def _size(setups: Sequence[Setup]) -> int:
    return sum(setup.servers for setup in setups)
