"""What etcd tells us: entries, changes, and its three ways to say no."""

from __future__ import annotations

from typing import NamedTuple

from mooncake_engine.errors import MetadataError


class EtcdAway(MetadataError):
    """No endpoint answered in time; the same call may work later."""


class LeaseLost(MetadataError):
    """The server does not know the lease: it ran out, or the server lost its data."""


class RevisionGone(MetadataError):
    """The server does not have that revision: compacted, or it lost its data."""


class Entry(NamedTuple):
    """A key's value and the revision of its last change."""

    value: bytes
    revision: int


class Change(NamedTuple):
    """One event of a watch; `value` is None for a deleted key."""

    key: str
    value: bytes | None
    revision: int
