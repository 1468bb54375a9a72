"""Callers take turns."""

import pytest

from flowbridge.limits.turns import Turns


def turns_of(*items: str) -> Turns[str]:
    """Items by the names of their callers: a1, a2, b1 …"""
    turns = Turns[str]()
    for item in items:
        turns.add(item[0], item)
    return turns


def taken(turns: Turns[str], most: int = 100) -> list[str]:
    found: list[str] = []
    while turns and len(found) < most:
        found.append(turns.next)
        assert turns.next == turns.take() == found[-1]
    return found


def test_callers_take_turns_and_each_keeps_its_order() -> None:
    turns = turns_of("a1", "a2", "a3", "b1", "c1", "c2")
    assert taken(turns) == ["c1", "b1", "a1", "c2", "a2", "a3"]


def test_caller_that_had_nothing_waiting_comes_first() -> None:
    turns = turns_of("a1", "a2", "a3", "a4")
    assert taken(turns, 2) == ["a1", "a2"]
    turns.add("b", "b1")
    assert taken(turns) == ["b1", "a3", "a4"]


def test_caller_comes_first_once_in_a_round() -> None:
    turns = turns_of("a1", "a2", "a3")
    turns.add("b", "b1")
    assert turns.take() == "b1"
    turns.add("b", "b2")  # the others were not asked meanwhile
    assert taken(turns, 2) == ["a1", "b2"]
    turns.add("b", "b3")
    assert taken(turns) == ["a2", "b3", "a3"]


def test_callers_without_end_keep_nobody_from_a_turn() -> None:
    turns = turns_of("a1", "a2")
    found = []
    for number in range(20):  # each of them again and again
        turns.add("bcd"[number % 3], f"{'bcd'[number % 3]}{number}")
        found.append(turns.take())
    assert {"a1", "a2"} <= set(found[:10])


def test_items_of_a_caller_are_counted() -> None:
    turns = turns_of("a1", "a2")
    assert (turns.of("a"), turns.of("b"), bool(turns)) == (2, 0, True)
    assert taken(turns) == ["a1", "a2"]
    assert (turns.of("a"), bool(turns)) == (0, False)
    with pytest.raises(IndexError):
        turns.take()
