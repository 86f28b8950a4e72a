from __future__ import annotations

from mooncake_engine.topology import HostPair, Measured, Priority, RailTable, Side, partners

ROWS = {
    "cpu:0": Priority(("a", "b"), ("c",)),
    "cpu:1": Priority(("c",), ("a", "b")),
    "cuda:0": Priority(("b",), ("a", "c")),
}
OURS = Side({"a": 0, "b": 0, "c": 1}, ROWS)
THEIRS = Side({"x": 0, "y": 1}, {"cpu:0": Priority(("x",), ()), "cpu:1": Priority(("y",), ())})


def table(**groups: str) -> RailTable:
    """`_0_1="ax by"`: the pairs of our node 0 and the peer's node 1."""
    return RailTable(
        [
            HostPair(
                dst_host="peer",
                partition_matchings={
                    key[1:].replace("_", "-", 1): tuple(Measured(*pair) for pair in pairs.split())
                    for key, pairs in groups.items()
                },
            )
        ]
    )


def test_pairs_are_those_of_the_nodes_of_both_memories() -> None:
    found = partners(table(_0_0="ax bx", _0_1="by", _1_1="cy"), OURS, THEIRS)
    assert found["cpu:0", "cpu:0"] == ((0, 0), (1, 0))
    assert found["cpu:0", "cpu:1"] == ((1, 1),)
    assert found["cpu:1", "cpu:1"] == ((2, 1),)


def test_memory_near_one_nic_takes_the_partner_of_that_nic() -> None:
    found = partners(table(_0_0="ax bx", _0_1="ay by"), OURS, THEIRS)
    assert found["cuda:0", "cpu:0"] == ((1, 0),)
    assert found["cuda:0", "cpu:1"] == ((1, 1),)


def test_memory_of_no_known_node_takes_the_partners_of_all_nics() -> None:
    found = partners(table(_0_0="ax", _0_1="by", _1_1="cy"), OURS, THEIRS)
    assert sorted(found["cpu", "cpu"]) == [(0, 0), (1, 1), (2, 1)]
    assert found["cpu", "cpu:0"] == ((0, 0),)


def test_locations_between_which_nothing_was_measured_are_left_out() -> None:
    found = partners(table(_0_0="ax"), OURS, THEIRS)
    assert ("cpu:1", "cpu:0") not in found
    assert ("cuda:0", "cpu:0") not in found


def test_nics_that_are_not_in_use_are_left_out() -> None:
    found = partners(table(_0_0="zx az ax"), OURS, THEIRS)
    assert found["cpu:0", "cpu:0"] == ((0, 0),)
    assert Side({"a": 0}, ROWS).numa_of("cpu:1") == -1


def test_what_was_measured_with_that_peer_goes_before_what_was_with_others() -> None:
    others = HostPair(dst_host="other", partition_matchings={"0-0": (Measured("b", "x"),)})
    both = RailTable([others, *table(_0_0="ax").records])
    assert partners(both, OURS, THEIRS, "peer")["cpu:0", "cpu:0"] == ((0, 0),)
    assert partners(both, OURS, THEIRS, "new")["cpu:0", "cpu:0"] == ((1, 0), (0, 0))
