from __future__ import annotations

from mooncake_connector.sglang.rooms import RoomRanks


def test_the_rooms_that_are_known_are_answered() -> None:
    rooms = RoomRanks(lifetime_s=10)
    rooms.put(5, 1, now=0)
    rooms.put(1 << 62, 0, now=0)
    assert rooms.find([5, 6, 1 << 62], now=9) == {5: 1, 1 << 62: 0}


def test_a_room_used_again_lives_from_then_on() -> None:
    rooms = RoomRanks(lifetime_s=10)
    rooms.put(5, 1, now=0)
    rooms.put(5, 3, now=8)
    assert rooms.find([5], now=17) == {5: 3}


def test_an_old_room_is_not_answered_and_not_kept() -> None:
    rooms = RoomRanks(lifetime_s=10)
    rooms.put(5, 1, now=0)
    rooms.put(6, 1, now=4)
    assert rooms.find([5, 6], now=10) == {6: 1}
    rooms.put(7, 1, now=12)
    assert len(rooms) == 2


def test_there_are_never_more_rooms_than_the_limit_and_the_oldest_go() -> None:
    rooms = RoomRanks(lifetime_s=10, limit=3)
    for room in range(100):
        rooms.put(room, 0, now=0)
    assert rooms.find(list(range(100)), now=0) == {97: 0, 98: 0, 99: 0}
    assert len(rooms) == 3


def test_a_room_used_again_is_not_the_oldest_any_more() -> None:
    rooms = RoomRanks(lifetime_s=10, limit=2)
    for room in (5, 6, 5, 7):
        rooms.put(room, 0, now=0)
    assert rooms.find([5, 6, 7], now=0) == {5: 0, 7: 0}
