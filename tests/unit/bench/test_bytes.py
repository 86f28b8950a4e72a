from __future__ import annotations

import numpy as np
import pytest

from mooncake_connector.bench.pattern import PERIOD, Pattern, check

SIZE = 2 * PERIOD + 5000
HERE = np.array([9000, 0, 200, PERIOD + 77], np.uint64)
THERE = np.array([0, PERIOD - 10, 77, 3], np.uint64)
LENGTHS = np.array([100, 100, 1, 4000], np.uint64)


def moved() -> np.ndarray:
    """What the receiver holds after a right transfer."""
    memory, source = np.empty(SIZE, np.uint8), np.empty(SIZE, np.uint8)
    Pattern(1).fill(memory)
    Pattern(2).fill(source)
    for here, there, length in zip(HERE.tolist(), THERE.tolist(), LENGTHS.tolist(), strict=True):
        memory[here : here + length] = source[there : there + length]
    return memory


def complaint(memory: np.ndarray) -> str:
    return check(memory, HERE, THERE, LENGTHS, Pattern(1), Pattern(2))


def test_bytes_in_their_places_are_right() -> None:
    assert complaint(moved()) == ""


@pytest.mark.parametrize(
    ("offset", "descriptor"), [(9000, 0), (99, 1), (200, 2), (PERIOD + 4076, 3)]
)
def test_one_wrong_byte_of_a_descriptor_is_found(offset: int, descriptor: int) -> None:
    memory = moved()
    memory[offset] ^= 1
    assert complaint(memory).startswith(f"descriptor {descriptor} of 4")


@pytest.mark.parametrize("offset", [100, 199, 201, 8999, 9100, PERIOD + 4077, SIZE - 1])
def test_a_byte_changed_outside_of_them_is_found(offset: int) -> None:
    memory = moved()
    memory[offset] ^= 1
    assert complaint(memory) == f"byte {offset} lies in no descriptor and was changed all the same"


def test_pieces_that_changed_places_are_found() -> None:
    memory = moved()
    memory[9000:9100], memory[:100] = memory[:100].copy(), memory[9000:9100].copy()
    assert "byte 0" in complaint(memory)
