"""Messages and frames: what goes in comes out, and what is not ours is only ever a WireError."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.types import RegionRecord, SegmentRecord

from mooncake_connector import wire
from mooncake_connector.errors import WireError
from mooncake_connector.layout import CacheLayout, CacheSpec, GroupSpec, LayerLayout
from mooncake_connector.plan import PageRun

SPEC = CacheSpec(
    model="m",
    model_digest="d",
    revision="",
    dtype="bfloat16",
    page_size=64,
    order="CPU_ATTN/LBHNC",
    tp_rank=0,
    tp_size=1,
    groups=(GroupSpec(kind="window", layers=("a", "b"), page_bytes=(4, 4), window=128),),
)
LAYER = LayerLayout(address=1 << 47, page_stride=8, piece_bytes=2, piece_offsets=(0, 4), pages=3)
MESSAGES: list[wire.Message] = [
    wire.Hello(
        version=wire.VERSION,
        engine_id="e",
        rank=1,
        incarnation="i",
        expects="",
        spec=SPEC,
        heartbeat_s=2.0,
    ),
    wire.Welcome(
        version=wire.VERSION,
        engine_id="e",
        rank=1,
        incarnation="i",
        spec=SPEC,
        layout=CacheLayout(((LAYER, LAYER),)),
        segment=SegmentRecord(
            name="s",
            incarnation="i",
            machine_id="m",
            regions=(RegionRecord(1 << 47, 24, "cpu"),),
            endpoints={"tcp": msgspec.Raw(msgspec.msgpack.encode({"port": 1}))},
        ),
        heartbeat_s=2.0,
    ),
    wire.Refused(reason="no"),
    wire.Ping(),
    wire.Claim(transfer_id="t"),
    wire.Subscribe(
        transfer_id="t",
        reader="r",
        readers=1,
        first=(2, 0),
        tokens=200,
        prompt_key="k",
        remaining_s=299.5,
    ),
    wire.Ready(
        transfer_id="t",
        attempt=1,
        reader="r",
        grant=b"\x00\xff" * 8,
        pages=(wire.Pages(2, b"\x07\0\0\0"), wire.Pages(0, b"")),
        last=True,
    ),
    wire.Gone(transfer_id="t", attempt=1, reader="r", reason="preempted", retry=True),
    wire.Release(transfer_id="t", attempt=1, reader="r", ok=True),
    wire.Released(transfer_id="t", attempt=1, reader="r", held=False),
]
BODIES = [wire.encode(message)[wire.PREFIX_BYTES :] for message in MESSAGES]


def body(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_out_as_it_went_in(message: wire.Message) -> None:
    frame = wire.encode(message)
    assert int.from_bytes(frame[: wire.PREFIX_BYTES], "big") == len(frame) - wire.PREFIX_BYTES
    assert wire.decode(frame[wire.PREFIX_BYTES :]) == message


def test_every_kind_of_message_is_in_the_list_above() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.AnyMessage.__args__)


def test_an_unknown_field_of_a_newer_peer_is_ignored() -> None:
    assert wire.decode(body(type="claim", transfer_id="t", since=1)) == wire.Claim(transfer_id="t")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (b"", "truncated"),
        (b"\xc1", "malformed"),
        (msgspec.msgpack.encode("ping"), "Expected `object`"),
        (body(transfer_id="t"), "missing required field `type`"),
        (body(type="steal", transfer_id="t"), "Invalid value 'steal'"),
        (body(type="claim"), "missing required field `transfer_id`"),
        (body(type="claim", transfer_id=7), "Expected `str`, got `int`"),
        (body(type="gone", transfer_id="t", attempt=1, reason="", retry=1), "`bool`"),
        (BODIES[0] + b"\x00", "trailing"),
        (b"\x82\xa4type\xa5claim\xabtransfer_id\xa1\xff", "(?i)utf-8"),
        (b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 100_000 + b"\xc0", "recursion"),
    ],
)
def test_what_is_no_message_is_a_wire_error_that_says_what_is_wrong(what: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        wire.decode(what)


@pytest.mark.parametrize("whole", BODIES, ids=[type(m).__name__ for m in MESSAGES])
def test_a_message_cut_short_anywhere_is_a_wire_error(whole: bytes) -> None:
    for length in range(len(whole)):
        with pytest.raises(WireError):
            wire.decode(whole[:length])


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data)  # 200 random bytes spell no tag of ours


@given(st.sampled_from(BODIES), st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = wire.decode(bytes(damaged))
    except WireError:
        return
    assert isinstance(message, wire.Message)
    if isinstance(message, wire.Ready):
        for pages in message.pages:
            try:
                run = wire.unpack_pages(pages)
            except WireError:
                continue
            assert len(run.ids) * 4 == len(pages.ids)


@given(st.integers(0, 1 << 20), st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_a_run_of_pages_comes_out_as_it_went_in(first: int, ids: list[int]) -> None:
    run = wire.unpack_pages(wire.pack_pages(PageRun(first, np.array(ids, np.uint64))))
    assert (run.first, run.ids.tolist(), run.ids.dtype) == (first, ids, np.uint64)


@pytest.mark.parametrize("pages", [wire.Pages(-1, b""), wire.Pages(0, b"\0\0\0")])
def test_a_run_with_half_an_id_or_before_the_prompt_is_refused(pages: wire.Pages) -> None:
    with pytest.raises(WireError, match="page run at"):
        wire.unpack_pages(pages)
