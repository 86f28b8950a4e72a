"""Prefill's scheduler half: what it tells the workers as vLLM schedules."""

from __future__ import annotations

from types import SimpleNamespace

from mooncake_connector.vllm.requests_out import PrefillRequests
from mooncake_connector.vllm.step import Endpoint, Step

PAGE = 64


def requests(windows: tuple[int, ...] = (0,)) -> PrefillRequests:
    made = PrefillRequests("engine-p", PAGE, windows, range(len(windows)))
    made.endpoints = [Endpoint("127.0.0.1:7000", "ab")]
    return made


def scheduled(
    *,
    new: tuple[tuple[str, list[list[int]], int], ...] = (),
    cached: tuple[tuple[str, list[list[int]] | None, int], ...] = (),
    tokens: dict[str, int] | None = None,
    preempted: set[str] | None = None,
    resumed: set[str] | None = None,
) -> SimpleNamespace:
    """A step as vLLM's SchedulerOutput describes it, in the fields that the connector reads."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=tuple(blocks), num_computed_tokens=computed)
            for name, blocks, computed in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            new_block_ids=[None if b is None else tuple(b) for _, b, _ in cached],
            num_computed_tokens=[computed for _, _, computed in cached],
            resumed_req_ids=resumed or set(),
        ),
        num_scheduled_tokens=tokens or {},
        preempted_req_ids=preempted,
    )


def offered(tokens: int, windows: tuple[int, ...] = (0,)) -> tuple[PrefillRequests, Step]:
    made, step = requests(windows), Step()
    made.add("r", {"do_remote_decode": True, "transfer_id": "t"}, tokens, "key", step)
    return made, step


def test_a_prompt_in_one_chunk_is_final_at_once_with_its_partial_page() -> None:
    made, step = offered(130)
    made.scheduled(scheduled(new=(("r", [[7, 8, 9]], 0),), tokens={"r": 130}), step)
    assert [tuple(o) for o in step.opened] == [("t", "r", "key")]
    (final,) = step.final
    assert final == ("t", (0,), ([7, 8, 9],), True)


def test_chunks_name_each_full_page_once_and_the_partial_one_last() -> None:
    made, _ = offered(150)
    first, second, third = Step(), Step(), Step()
    made.scheduled(scheduled(new=(("r", [[1, 2]], 0),), tokens={"r": 100}), first)
    made.scheduled(scheduled(cached=(("r", None, 100),), tokens={"r": 20}), second)
    made.scheduled(scheduled(cached=(("r", [[3]], 120),), tokens={"r": 30}), third)
    assert first.final == [("t", (0,), ([1],), False)]
    assert second.final == []
    assert third.final == [("t", (1,), ([2, 3],), True)]


def test_tokens_generated_behind_the_prompt_are_not_offered() -> None:
    made, step = offered(64)
    made.scheduled(scheduled(new=(("r", [[1]], 0),), tokens={"r": 64}), step)
    later = Step()
    made.scheduled(scheduled(cached=(("r", [[2]], 64),), tokens={"r": 1}), later)
    assert later.final == []


def test_a_local_prefix_hit_is_offered_too() -> None:
    made, step = offered(130)
    made.scheduled(scheduled(new=(("r", [[4, 5, 6]], 128),), tokens={"r": 2}), step)
    assert step.final == [("t", (0,), ([4, 5, 6],), True)]


def test_a_preempted_request_ends_its_attempt_and_starts_over_in_other_blocks() -> None:
    made, _ = offered(130)
    made.scheduled(scheduled(new=(("r", [[1, 2]], 0),), tokens={"r": 128}), Step())
    step = Step()
    made.scheduled(scheduled(preempted={"r"}), step)
    assert [(e.transfer_id, e.retry) for e in step.ended] == [("t", True)]
    assert [o.transfer_id for o in step.opened] == ["t"]
    again = Step()
    made.scheduled(
        scheduled(cached=(("r", [[11, 12, 13]], 0),), tokens={"r": 130}, resumed={"r"}), again
    )
    assert again.final == [("t", (0,), ([11, 12, 13],), True)]


def test_a_window_group_goes_with_the_last_chunk_only_and_clipped() -> None:
    made, _ = offered(64 * 5, windows=(0, 100))
    blocks = [[1, 2, 3, 4, 5], [21, 22, 23, 24, 25]]
    first, last = Step(), Step()
    made.scheduled(scheduled(new=(("r", blocks, 0),), tokens={"r": 256}), first)
    made.scheduled(scheduled(cached=(("r", None, 256),), tokens={"r": 64}), last)
    assert first.final == [("t", (0, 4), ([1, 2, 3, 4], []), False)]
    # 100 tokens may touch three pages of 64
    assert last.final == [("t", (4, 2), ([5], [23, 24, 25]), True)]


def test_a_finished_prefill_is_held_and_says_where_its_pages_are() -> None:
    made, step = offered(64)
    made.scheduled(scheduled(new=(("r", [[1]], 0),), tokens={"r": 64}), step)
    keep, params = made.finished("r", "FINISHED_LENGTH_CAPPED", complete=True, step=step)
    assert keep
    assert params is not None
    assert params["remote_endpoints"] == ["127.0.0.1:7000"]
    assert params["transfer_id"] == "t"
    assert [tuple(h) for h in step.held] == [("t", "r")]


def test_an_aborted_prefill_is_ended_and_not_held() -> None:
    made, step = offered(640)
    made.scheduled(scheduled(new=(("r", [[1]], 0),), tokens={"r": 64}), step)
    keep, params = made.finished("r", "FINISHED_ABORTED", complete=False, step=step)
    assert (keep, params) == (False, None)
    assert [(e.transfer_id, e.retry) for e in step.ended] == [("t", False)]
    assert not step.held


def test_a_second_request_with_a_live_transfer_id_is_not_offered() -> None:
    made, step = offered(64)
    made.add("r2", {"transfer_id": "t"}, 64, "other", step)
    assert len(step.opened) == 1
    assert made.finished("r2", "FINISHED_LENGTH_CAPPED", complete=True, step=step) == (False, None)


def test_a_cache_reset_ends_what_is_computing_and_what_is_held() -> None:
    made, step = offered(64)
    made.scheduled(scheduled(new=(("r", [[1]], 0),), tokens={"r": 64}), step)
    made.finished("r", "FINISHED_STOPPED", complete=True, step=step)
    made.add("r2", {}, 640, "k2", step)
    reset = Step()
    made.reset(reset)
    assert {e.transfer_id for e in reset.ended} == {"t", "r2"}


def test_the_children_of_one_prompt_share_one_hold() -> None:
    made, step = requests(), Step()
    children = [f"{index}_cmpl-x-0-0123abcd" for index in range(3)]
    for child in children:
        made.add(child, {"do_remote_decode": True}, 64, "key", step)
    assert len(step.opened) == 1
    first, second, third = children
    made.scheduled(scheduled(new=((first, [[1]], 0),), tokens={first: 64}), step)
    keep, params = made.finished(first, "FINISHED_LENGTH_CAPPED", complete=True, step=step)
    assert keep
    for child in (second, third):
        assert made.finished(child, "FINISHED_LENGTH_CAPPED", complete=True, step=step) == (
            False,
            params,
        )


def test_only_the_first_prompt_of_a_call_is_offered() -> None:
    made, step = requests(), Step()
    made.add("cmpl-x-0-0123abcd", {"do_remote_decode": True}, 64, "key", step)
    made.add("cmpl-x-1-0123abcd", {"do_remote_decode": True}, 64, "other", step)
    assert [o.request_id for o in step.opened] == ["cmpl-x-0-0123abcd"]
