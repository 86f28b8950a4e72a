"""What the scheduler half tells the worker half each engine step. Pickled by vLLM.

Imports nothing of vLLM, so that who decides what goes in here can be tested without it;
`connector.py` tells vLLM's abstract classes that `Step` and `Endpoint` are of their kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Ended(NamedTuple):
    """Prefill: the blocks of this transfer are about to be reused."""

    transfer_id: str
    reason: str
    retry: bool


class Opened(NamedTuple):
    """Prefill: this request's KV will be offered."""

    transfer_id: str
    request_id: str
    prompt_key: str


class Final(NamedTuple):
    """Prefill: behind this step's forward pass these blocks are final.

    `first[g]` is the position of `block_ids[g][0]` in group g.
    """

    transfer_id: str
    first: tuple[int, ...]
    block_ids: tuple[list[int], ...]
    last: bool


class Held(NamedTuple):
    """Prefill: the request finished; vLLM keeps its blocks until we report it sent."""

    transfer_id: str
    request_id: str


class Remote(NamedTuple):
    """Decode: where a transfer comes from. One address and incarnation per rank, or a bootstrap."""

    transfer_id: str
    addresses: tuple[str, ...]
    incarnations: tuple[str, ...]
    bootstrap: str
    engine_id: str
    protocol: str = ""  # a transport forced by a test
    delay_s: float = 0.0  # per slice, asked for by a test


class Fetch(NamedTuple):
    """Decode: the request is parked; fill its blocks.

    `first[g]` is the position of `block_ids[g][0]` in group g.
    """

    request_id: str
    remote: Remote
    first: tuple[int, ...]
    block_ids: tuple[list[int], ...]
    tokens: int
    prompt_key: str


@dataclass
class Step:
    """One engine step. Ended goes first, before any block is reused; Final and Held last."""

    ended: list[Ended] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    final: list[Final] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    claims: list[Remote] = field(default_factory=list)
    declined: list[tuple[str, Remote]] = field(default_factory=list)  # (request id, remote)
    fetches: list[Fetch] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Endpoint:
    """Worker to scheduler, once: where this rank's node listens."""

    address: str
    incarnation: str
