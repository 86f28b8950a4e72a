"""Recorded pages are moved again by two processes, and what differs from the recording is named.

The recordings are made here; `tests/integration/vllm/test_recording.py` makes real ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from engines import config
from kv_recording import NoRecording, Recording, Side, Tensor, read, save
from kv_replay import replay

from mooncake_connector.layout import CacheSpec, GroupSpec

if TYPE_CHECKING:
    from pathlib import Path

PAGES, SHAPE = 12, (2, 4, 8)  # of a page: heads, tokens, content
ELEMENTS, ITEM = 64, 4
LAYERS = ("one", "two")
SPEC = CacheSpec(
    model="tiny",
    model_digest="0",
    revision="",
    dtype="float32",
    page_size=4,
    order="HTC",
    tp_rank=0,
    tp_size=1,
    groups=(GroupSpec(kind="full", layers=LAYERS, page_bytes=(ELEMENTS * ITEM,) * 2),),
)
DENSE = (ELEMENTS, 32, 8, 1)


def side(ids: tuple[int, ...], **fields: object) -> Side:
    """Each layer has a storage of its own and random pages, the same in every call."""
    random = np.random.default_rng(1)
    return msgspec.structs.replace(
        Side(
            spec=SPEC,
            storages=(PAGES * ELEMENTS * ITEM,) * 2,
            tensors={
                name: Tensor(n, 0, (PAGES, *SHAPE), DENSE, ITEM) for n, name in enumerate(LAYERS)
            },
            prompt_key="key",
            first=(0,),
            ids=(ids,),
            contents={name: random.bytes(len(ids) * ELEMENTS * ITEM) for name in LAYERS},
        ),
        **fields,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recording.msgpack"


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_decode_holds_the_recorded_pages_and_nothing_else(file: Path, protocol: str) -> None:
    save(file, Recording(tokens=11, prefill=side((7, 2, 9)), decode=side((1, 2, 3))))
    replayed = replay(file, config(protocol), config(protocol))
    assert replayed == ("", [], 0, {protocol: 1}, 3 * 2 * ELEMENTS * ITEM)


def test_a_cache_whose_layers_share_one_storage_is_replayed_as_it_was(file: Path) -> None:
    """Blocks of the two layers alternate, heads outside of tokens, behind 64 bytes of others."""
    strides = (2 * ELEMENTS, 32, 8, 1)
    together = side(
        (5, 4, 11),
        storages=(64 + 2 * PAGES * ELEMENTS * ITEM,),
        tensors={
            name: Tensor(0, 64 + n * ELEMENTS * ITEM, (PAGES, *SHAPE), strides, ITEM)
            for n, name in enumerate(LAYERS)
        },
    )
    save(file, Recording(tokens=11, prefill=side((7, 2, 9)), decode=together))
    assert replay(file, config("tcp"), config("tcp"))[:3] == ("", [], 0)


def test_a_page_that_differs_from_the_recording_is_named(file: Path) -> None:
    decode = side((1, 2, 3))
    spoilt = bytearray(decode.contents["two"])
    spoilt[ELEMENTS * ITEM + 5] ^= 1  # one bit of the second page
    decode = msgspec.structs.replace(decode, contents=decode.contents | {"two": bytes(spoilt)})
    save(file, Recording(tokens=11, prefill=side((7, 2, 9)), decode=decode))
    replayed = replay(file, config("tcp"), config("tcp"))
    assert replayed.wrong == ["two, page 2: 1 of 64 elements differ"]


def test_a_fetch_that_fails_says_why(file: Path) -> None:
    other = side((1, 2, 3), prompt_key="another")
    save(file, Recording(tokens=11, prefill=side((7, 2, 9)), decode=other))
    replayed = replay(file, config("tcp"), config("tcp"))
    assert "its prompt key is key, decode's is another" in replayed.error
    assert len(replayed.wrong) == 6


def test_a_missing_recording_says_how_to_make_one(file: Path) -> None:
    with pytest.raises(NoRecording, match="run `scripts/test integration"):
        read(file, Recording)


def test_half_a_recording_says_how_to_make_one(file: Path) -> None:
    save(file, side((1, 2, 3)))
    with pytest.raises(NoRecording, match=r"cannot be read .* run `scripts/test integration"):
        read(file, Recording)
