from __future__ import annotations

from mooncake_connector.bench.sweep import Row, doubling, sweep


def test_doubling_ends_at_the_last_value_that_is_not_above() -> None:
    assert doubling(4096, 20000) == [4096, 8192, 16384]
    assert doubling(3, 3) == [3]


def test_batch_sizes_turn_fastest_and_threads_slowest() -> None:
    rows = sweep((4, 8), (1, 2), (1, 3), 1 << 20)
    assert [row[:3] for row in rows] == [
        *[(4, 1, 1), (4, 2, 1), (8, 1, 1), (8, 2, 1)],
        *[(4, 1, 3), (4, 2, 3), (8, 1, 3), (8, 2, 3)],
    ]


def test_a_row_that_needs_more_than_the_buffer_is_skipped_and_says_what_it_needs() -> None:
    fits, too_much = sweep((64, 64), (4, 8), (2,), 64 * 4 * 2)
    assert fits == Row(64, 4, 2)
    assert too_much == Row(64, 8, 2, "needs 1024 of 512 bytes")
