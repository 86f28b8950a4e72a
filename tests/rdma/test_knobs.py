"""Each knob on real verbs: what queue pairs say of themselves, and what the kernel counts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rdma_watch
from mooncake_engine import PathUnavailable
from mooncake_engine.transport.rdma.verbs.base import Opcode
from mooncake_engine.types import Op
from rdma_stage import OURS
from rdma_watch import MIB, Side, two

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.completions import Completions

KIB = 1 << 10
RTS = 3
DEFAULTS = {
    "path_mtu": 4096,
    "traffic_class": 0,
    "flow_label": 0,
    "max_rd_atomic": 16,
    "max_dest_rd_atomic": 16,
    "min_rnr_timer": 12,
    "timeout": 14,
    "retry_cnt": 6,
    "rnr_retry": 7,
    "port_num": 1,
    "pkey_index": 0,
    "sgid_index": 1,  # RoCE v2 over IPv4; 0 is the address of the link
    "max_send_sge": 4,
    "max_inline_data": 64,
}
SETTINGS: dict[str, Any] = {
    "mtu": 1024,
    "traffic_class": 106,
    "flow_label": 0x12345,
    "max_rd_atomic": 8,
    "max_dest_rd_atomic": 4,
    "min_rnr_timer": 9,
    "send_timeout": 17,
    "send_retry_count": 5,
    "send_rnr_count": 3,
    "max_wr": 63,
    "max_sge": 8,
    "max_inline": 128,
}
#: Of the initiator's. A READ that it has under way is one that the target serves.
SET = DEFAULTS | {
    "path_mtu": 1024,
    "traffic_class": 106,
    "flow_label": 0x12345,
    "max_rd_atomic": 4,
    "max_dest_rd_atomic": 4,
    "min_rnr_timer": 9,
    "timeout": 17,
    "retry_cnt": 5,
    "rnr_retry": 3,
    "max_send_sge": 8,
    "max_inline_data": 128,
}


@pytest.mark.parametrize(
    ("settings", "initiators", "targets", "requests"),
    [
        ({"send_timeout": 14}, DEFAULTS, DEFAULTS, 256),  # that of these tests is longer
        (SETTINGS, SET, SET | {"max_rd_atomic": 8}, 63),
    ],
    ids=["as it comes", "set"],
)
def test_queue_pairs_of_both_ends_say_what_was_set(
    settings: dict[str, Any], initiators: dict[str, int], targets: dict[str, int], requests: int
) -> None:
    with two(**settings) as (near, far):
        near.read(far, (0, 0, 64 * KIB))
        for side, wanted in ((near, initiators), (far, targets)):
            assert len(side.queue_pairs) == 2  # num_qp
            for pair in side.queue_pairs:
                found = pair.query()
                assert found["qp_state"] == RTS
                assert {name: found[name] for name in wanted} == wanted
                assert requests <= found["max_send_wr"] < 2 * requests + 2  # rounded up by some


@pytest.mark.parametrize("lower", ["initiator", "target"])
def test_both_ends_use_the_smaller_of_their_mtus(lower: str) -> None:
    settings: dict[str, Any] = {lower: {"mtu": 512}}
    with two(num_qp=1, **settings) as (near, far):
        near.read(far, (0, 0, 16 * KIB))
        found = [pair.query()["path_mtu"] for pair in (*near.queue_pairs, *far.queue_pairs)]
        assert found == [512, 512]


def test_the_kernel_counts_as_many_things_as_were_asked_for() -> None:
    before = rdma_watch.kernel_counts(OURS[0])
    depths = rdma_watch.kernel_depths(OURS[0])
    channels, threads = _event_channels(), _threads()
    settings = {
        "num_qp": 5,
        "num_cq": 3,
        "max_cqe": 500,
        "num_comp_channels": 2,
        "num_workers": 4,
        "max_mr_bytes": 256 * KIB,
    }
    with two(initiator=settings) as (near, far):
        near.read(far, (0, 0, MIB))  # over the borders of registrations too
        after = rdma_watch.kernel_counts(OURS[0])
        assert {kind: after[kind] - before[kind] for kind in ("qp", "cq", "mr")} == {
            "qp": 5,
            "cq": 3 + 1,  # one more receives
            "mr": 4,
        }
        more = rdma_watch.kernel_depths(OURS[0])
        for depth in depths:
            more.remove(depth)
        assert [500 <= depth < 1024 for depth in more] == [True] * 4  # some NICs round up
        assert _threads() - threads == {f"rdma-{OURS[0]}-{i}" for i in range(4)}
        # The target's too; and each open device has one for events of its own.
        assert _event_channels() - channels == (2 + 1) + (1 + 1)
    assert rdma_watch.kernel_counts(OURS[0]) == before


def test_a_port_that_the_nic_lacks_is_refused_by_name() -> None:
    with pytest.raises(PathUnavailable, match=rf"{OURS[0]}: .*port 2"):
        Side(OURS[:1], {"port": 2}, MIB)


def test_a_gid_index_that_is_not_set_is_refused_with_those_that_are() -> None:
    with pytest.raises(PathUnavailable, match=rf"{OURS[0]}: .*77"):
        Side(OURS[:1], {"gid_index": 77}, MIB)


def test_no_chain_is_longer_than_was_said_and_small_writes_go_inline() -> None:
    runs = [(8 * KIB * i, 4 * KIB + 8 * KIB * i, 32) for i in range(40)]
    with two(num_qp=1, initiator={"max_chain": 7, "max_inline": 32}) as (near, far):
        assert near.move(Op.WRITE, far, *runs).ok
        assert near.queue_pairs[0].query()["max_inline_data"] >= 32
        few = near.posts
    with two(num_qp=1, initiator={"max_inline": 0}) as (near, far):
        assert near.move(Op.WRITE, far, *runs).ok
        many = near.posts
    assert {post.opcode for post in few + many} == {Opcode.WRITE}
    assert sum(post.requests for post in few) == sum(post.requests for post in many) == 40
    assert max(post.requests for post in few) == 7
    assert max(post.requests for post in many) == 40
    assert {post.inline for post in few} == {32}
    assert {post.inline for post in many} == {0}


def test_no_more_is_posted_than_may_be_under_way() -> None:
    with two(num_qp=1, initiator={"max_outstanding": 3, "slice_bytes": 4 * KIB}) as (near, far):
        near.read(far, (0, 0, 128 * KIB))
        assert sum(post.requests for post in near.posts) == 32
        assert max(post.requests for post in near.posts) == 3


def _watched(
    completions: Completions, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """What a lane does from now on to see them: the polls, and that it had itself woken."""
    polled: list[str] = []
    armed: list[str] = []
    poll, arm = completions.poll, completions.arm
    arming = threading.local()

    def noted(where: list[str]) -> None:
        name = threading.current_thread().name
        if not name.startswith("rdma-"):  # the channel's
            where.append(name)

    def polling() -> int:
        if not getattr(arming, "now", False):  # which polls, too
            noted(polled)
        return poll()

    def arming_them() -> None:
        noted(armed)
        arming.now = True
        arm()
        arming.now = False

    monkeypatch.setattr(completions, "poll", polling)
    monkeypatch.setattr(completions, "arm", arming_them)
    return polled, armed


@pytest.mark.parametrize(("poll_us", "sleeps"), [(0.0, True), (50_000.0, False)])
def test_a_lane_polls_as_long_as_was_said_before_it_sleeps(
    poll_us: float, *, sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(initiator={"poll_us": poll_us}) as (near, far):
        near.read(far, (0, 0, 4 * KIB))  # endpoints are ready now
        (completions,) = near.contexts[0].completions
        polled, armed = _watched(completions, monkeypatch)
        near.read(far, (0, 0, 4 * KIB))
        # The channel's thread may be faster than the lane's first look, which then does neither.
        assert not (polled if sleeps else armed)


def _event_channels() -> int:
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(entry.readlink()))
        except FileNotFoundError:  # the one that lists them
            continue
    return sum("infinibandevent" in name for name in names)


def _threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(f"rdma-{OURS[0]}-")}
