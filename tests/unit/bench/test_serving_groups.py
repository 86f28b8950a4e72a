"""Which set-ups are up at the same time, and how the command line chooses them."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest
from serving import vllm_setups
from serving.command import chosen
from serving.groups import capacity, grouped
from serving.setup import Setup
from serving.urls import named
from serving.urls import setups as url_setups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.setup import Place, Running

VLLM = vllm_setups.setups()


@contextlib.contextmanager
def unopened(place: Place) -> Iterator[Running]:
    raise AssertionError(place)
    yield


def a_peer(number: int) -> Setup:
    return Setup(
        name=f"peer {number}",
        framework="vllm",
        route="tcp",
        kind="peer",
        servers=2,
        open=unopened,
    )


def servers(group: list[Setup]) -> int:
    return sum(setup.servers for setup in group)


@pytest.mark.parametrize("room", [5, 7, 9, 13, 40])
def test_every_group_fits_and_holds_the_reference(room: int) -> None:
    groups = grouped(VLLM, room)
    assert all(group[0].name == "aggregated" for group in groups)
    assert all(servers(group) <= room for group in groups)
    seen = {setup.name for group in groups for setup in group}
    assert seen == {setup.name for setup in VLLM}


@pytest.mark.parametrize("room", [5, 7, 9, 13, 40])
def test_every_peer_is_up_beside_ours_of_its_route(room: int) -> None:
    for group in grouped(VLLM, room):
        ours = {(setup.route, setup.pairs) for setup in group if setup.kind == "ours"}
        assert {(setup.route, setup.pairs) for setup in group if setup.kind == "peer"} <= ours


def test_with_enough_memory_everything_is_up_at_once() -> None:
    assert len(grouped(VLLM, 40)) == 1


def test_a_family_that_is_cut_up_names_each_peer_once() -> None:
    ours = next(setup for setup in VLLM if setup.kind == "ours")
    family = [VLLM[0], ours, *(a_peer(number) for number in range(4))]
    groups = grouped(family, 7)
    peers = [setup.name for group in groups for setup in group if setup.kind == "peer"]
    assert sorted(peers) == [f"peer {number}" for number in range(4)]
    assert len(groups) == 2


def test_a_small_machine_still_gets_the_reference_and_a_pair() -> None:
    assert capacity(1 << 30, "vllm") == capacity(1 << 30, "sglang") == 3


def test_four_pairs_of_vllm_and_three_of_sglang_fit_into_24_gib() -> None:
    assert 9 <= capacity(23 << 30, "vllm") <= 10
    assert 7 <= capacity(23 << 30, "sglang") <= 8


def test_names_are_unique_and_comparable_rows_have_the_same_servers() -> None:
    assert len({setup.name for setup in VLLM}) == len(VLLM)
    for one, other in itertools.combinations(VLLM, 2):
        if one.route and (one.route, one.pairs) == (other.route, other.pairs):
            assert one.servers == other.servers


def test_the_reference_is_there_whatever_is_chosen() -> None:
    names = [setup.name for setup in chosen(VLLM, ["Mooncake tcp"])]
    assert names == ["aggregated", "Mooncake, tcp"]


def test_a_name_that_chooses_nothing_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'mooncacke'; there are aggregated, 2 regular"):
        chosen(VLLM, ["mooncacke"])


@pytest.mark.parametrize(
    "text", ["http://a:1", "x=", "x=a:1", "=http://a:1", "x=http://a:1,http://b:2", "x=ftp://a"]
)
def test_what_is_no_name_and_url_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=http://HOST:PORT"):
        named(text, 1, 1)


def test_the_first_url_is_the_reference_and_ours_is_compared_with_the_rest() -> None:
    made = url_setups(["a=http://a:1", "ours=http://b:2/", "theirs=http://c:3"], [], "m")
    assert [(setup.name, setup.kind) for setup in made] == [
        ("a", "aggregated"),
        ("ours", "ours"),
        ("theirs", "peer"),
    ]
    assert len(grouped(made, 3)) == 1


def test_legs_without_a_url_of_that_name_are_refused() -> None:
    with pytest.raises(ValueError, match="--legs of y: there is no --url"):
        url_setups(["x=http://a:1"], ["y=http://a:1,http://b:2"], "m")
