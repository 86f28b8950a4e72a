"""Knobs that show when something runs out: endpoints, time, tries, ports."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rails
import rdma_watch
from mooncake_engine import Status
from mooncake_engine.transport.rdma.endpoint import State
from mooncake_engine.types import Op
from rdma_stage import OURS, THEIRS
from rdma_watch import MIB, Side, ready, two

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10


@pytest.mark.parametrize(("policy", "leaves"), [("FIFO", 0), ("SIEVE", 1)])
def test_an_endpoint_makes_room_for_a_new_one_by_age_or_by_use(policy: str, leaves: int) -> None:
    settings = {"endpoint_store": policy, "max_endpoints": 2, "num_qp": 1}
    before = rdma_watch.kernel_counts(OURS[0])["qp"]
    with (
        Side(THEIRS[:1], {}, MIB) as first,
        Side(THEIRS[:1], {}, MIB) as second,
        Side(THEIRS[:1], {}, MIB) as third,
        Side(OURS[:1], settings, MIB) as near,
    ):
        near.read(first, (0, 0, 4 * KIB))  # used; the second one is not
        near.engine.open_segment(second.engine.record())
        ready(near.kept[1].endpoint)
        near.engine.open_segment(third.engine.record())
        assert [kept.evicted for kept in near.kept] == [[], [], [near.kept[leaves].endpoint]]
        assert near.kept[leaves].endpoint.state is State.CLOSED
        assert rdma_watch.kernel_counts(OURS[0])["qp"] - before == 2
        for far in (third, second, first):
            near.read(far, (0, 0, 4 * KIB))
        assert rdma_watch.kernel_counts(OURS[0])["qp"] - before == 2


def test_keys_and_queue_pairs_are_told_where_was_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"bind_address": "127.0.0.2", "min_port": port, "max_port": port + 20}
        with Side(OURS[:1], settings, MIB) as side:
            chosen = side.published.port
            assert port < chosen <= port + 20
            socket.create_connection(("127.0.0.2", chosen), 10).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", chosen), 10)


class Silence:
    """Packets of the first rail go to nobody: the far end hears nothing, and nobody says so.

    A rail that is down is noticed when a packet is sent; a dead peer or switch is not.
    """

    def __init__(self) -> None:
        theirs = rails.interface(THEIRS[0])
        self._right = Path(f"/sys/class/net/{theirs}/address").read_text().strip()
        self._neighbour = (rails.A.addresses[1], "dev", rails.interface(OURS[0]))

    def begin(self) -> None:
        self._tell("02:00:00:00:00:99")

    def end(self) -> None:
        self._tell(self._right)

    def _tell(self, lladdr: str) -> None:
        command = ("ip", "neigh", "replace", *self._neighbour, "lladdr", lladdr)
        subprocess.run(command, check=True)


@pytest.fixture
def silence() -> Iterator[Silence]:
    """Not begun yet; ended afterwards."""
    if not rails.in_guest():
        pytest.skip("a neighbour is made unreachable in the guest only")
    silence = Silence()
    yield silence
    silence.end()


def test_a_path_on_which_nothing_moves_is_given_up_after_the_time_that_was_said(
    silence: Silence,
) -> None:
    # Alone, the NIC would try for half a minute.
    with two(send_timeout=20, initiator={"slice_timeout_s": 0.5}) as (near, far):
        near.read(far, (0, 0, 64 * KIB))
        silence.begin()
        began = time.monotonic()
        end = near.move(Op.READ, far, (0, 0, 64 * KIB))
        assert 0.5 < time.monotonic() - began < 4
    assert end.status is Status.PEER_GONE
    assert "moved nothing for 0.5 s" in end.error


@pytest.mark.parametrize("retries", [1, 3])
def test_a_request_is_tried_again_as_often_as_was_said(retries: int, silence: Silence) -> None:
    settings: dict[str, Any] = {
        "retry_count": retries,
        "rail_error_threshold": 1000,  # the rail never rests
        "send_timeout": 14,
        "send_retry_count": 1,
        "num_qp": 1,
    }
    with two(**settings) as (near, far):
        near.read(far, (0, 0, 64 * KIB))
        # Each endpoint is proven, and what it is given then is lost.
        near.before_post = silence.begin
        near.on_kept = silence.end
        end = near.move(Op.READ, far, (0, 0, 64 * KIB))
        assert end.status is Status.PEER_GONE
        assert f"given up after {retries} retries" in end.error
        assert sum(post.requests for post in near.posts) == 1 + 1 + retries
        near.before_post = silence.end
        near.read(far, (0, 0, 64 * KIB))
