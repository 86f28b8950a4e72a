"""Equal keys mean equal KV: everything that changes the KV changes the key."""

from __future__ import annotations

import array

from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.prompt_key import prompt_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=20)
extras = st.lists(st.text(max_size=5), max_size=4)


@given(tokens, extras, tokens, extras)
def test_keys_are_equal_exactly_when_the_prompts_are(
    first: list[int], beside: list[str], second: list[int], aside: list[str]
) -> None:
    same = (first, beside) == (second, aside)
    assert (prompt_key(first, beside) == prompt_key(second, aside)) is same


def test_a_key_is_the_same_in_every_process_and_version() -> None:
    assert prompt_key([1, 2, 3], ["lora"]) == prompt_key((1, 2, 3), iter(["lora"]))
    assert prompt_key([]) == "cae66941d9efbd404e4d88758ea67670"


def test_a_list_and_an_array_of_the_same_tokens_have_one_key() -> None:
    ids = [1, 2, 2**31, 2**32 - 1]
    assert prompt_key(array.array("q", ids)) == prompt_key(ids)


def test_where_one_extra_ends_and_the_next_begins_counts() -> None:
    assert prompt_key([1], ["ab", "c"]) != prompt_key([1], ["a", "bc"])


def test_tokens_and_extras_do_not_run_into_each_other() -> None:
    assert prompt_key([1], ["\x00" * 4]) != prompt_key([1, 0])


def test_the_order_of_tokens_and_their_number_count() -> None:
    assert len({prompt_key(p) for p in ([], [0], [0, 0], [1, 2], [2, 1])}) == 5
