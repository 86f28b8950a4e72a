"""Messages between a decode node and a prefill node, and their frames. Pure.

A frame is a 4-byte big-endian length and one msgpack map tagged by "type". Decode connects to
prefill's control endpoint, sends `Hello`, and gets `Welcome` or `Refused`; then both sides send
the rest. `docs/path-of-a-transfer.md` walks through one request.

Every message about a transfer carries its `transfer_id`; prefill's answers carry the `attempt`
too, since a preempted prefill computes into other pages, and the `reader`, since a transfer id may
be used again (SGLang's rooms) while an answer to its last use is on its way. The connection itself
fixes the two incarnations: `Hello.expects` names prefill's, a restarted peer gets a new one.
"""

from __future__ import annotations

import msgspec
import numpy as np
from mooncake_engine.types import SegmentRecord

from mooncake_connector.errors import WireError
from mooncake_connector.layout import CacheLayout, CacheSpec
from mooncake_connector.plan import PageRun

#: Goes up with every change that an older peer would misread.
VERSION = 2
#: Length prefix in front of every message.
PREFIX_BYTES = 4


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """Base of all messages."""


class Hello(Message, frozen=True, kw_only=True):
    """Decode -> prefill, first. `expects` is prefill's incarnation, "" when not yet known."""

    version: int
    engine_id: str
    rank: int
    incarnation: str
    expects: str
    spec: CacheSpec
    heartbeat_s: float


class Welcome(Message, frozen=True, kw_only=True):
    """Prefill -> decode: where my pages are."""

    version: int
    engine_id: str
    rank: int
    incarnation: str
    spec: CacheSpec
    layout: CacheLayout
    segment: SegmentRecord
    heartbeat_s: float


class Refused(Message, frozen=True, kw_only=True):
    """Prefill -> decode, instead of Welcome: the connection closes after it."""

    reason: str


class Ping(Message, frozen=True, kw_only=True):
    """Both ways, every `heartbeat_interval_s`; says nothing but that the node lives."""


class Claim(Message, frozen=True, kw_only=True):
    """Decode -> prefill: I will come for this transfer; if I die, do not keep it for me."""

    transfer_id: str


class Subscribe(Message, frozen=True, kw_only=True):
    """Decode -> prefill: tell me its pages as they become final. Idempotent per reader.

    Attributes:
        reader: Unique per reading rank and request, stable over repeats; answers carry it.
        readers: How many readers this prefill rank has to wait for.
        first: Per group: pages before this position are not wanted (decode's own prefix hit).
        tokens: Length of the prompt.
        prompt_key: See `prompt_key.py`; a differing one is refused.
        remaining_s: What is left of the request's total, a duration.
    """

    transfer_id: str
    reader: str
    readers: int
    first: tuple[int, ...]
    tokens: int
    prompt_key: str
    remaining_s: float


class Pages(msgspec.Struct, frozen=True, array_like=True):
    """A `PageRun` on the wire: ids are little-endian uint32."""

    first: int
    ids: bytes


class Ready(Message, frozen=True, kw_only=True):
    """Prefill -> decode: these pages are final. One `Pages` per group; `last`: no more come."""

    transfer_id: str
    attempt: int
    reader: str
    grant: bytes
    pages: tuple[Pages, ...]
    last: bool


class Gone(Message, frozen=True, kw_only=True):
    """Prefill -> decode, at any time: this attempt's pages are no more; `retry`: subscribe anew."""

    transfer_id: str
    attempt: int
    reader: str
    reason: str
    retry: bool


class Release(Message, frozen=True, kw_only=True):
    """Decode -> prefill, after all own reads completed: I need the pages no more. Idempotent."""

    transfer_id: str
    attempt: int
    reader: str
    ok: bool


class Released(Message, frozen=True, kw_only=True):
    """Prefill -> decode: `held` when the pages were mine at every moment up to now."""

    transfer_id: str
    attempt: int
    reader: str
    held: bool


AnyMessage = (
    Hello | Welcome | Refused | Ping | Claim | Subscribe | Ready | Gone | Release | Released
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The frame of one message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def decode(body: bytes) -> AnyMessage:
    """The message of one frame's body.

    Raises:
        WireError: When it is not one of ours; the connection it came by is to be closed.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # The last two: text that is not UTF-8, and an unknown field of a thousand nested lists.
        raise WireError(f"not a message of wire version {VERSION}: {exc}") from exc


def pack_pages(run: PageRun) -> Pages:
    """A run of pages for `Ready`."""
    return Pages(run.first, run.ids.astype("<u4").tobytes())


def unpack_pages(pages: Pages) -> PageRun:
    """The other way.

    Raises:
        WireError: When the ids are not whole.
    """
    if pages.first < 0 or len(pages.ids) % 4:
        raise WireError(f"page run at {pages.first} has {len(pages.ids)} bytes of ids, not 4 each")
    return PageRun(pages.first, np.frombuffer(pages.ids, "<u4").astype(np.uint64))
