"""Callers take turns."""

import pytest

from flowbridge.limits.turns import Turns


def taken(turns: Turns[str]) -> list[str]:
    found = []
    while turns:
        assert turns.next == turns.next
        found.append(turns.next)
        assert turns.take() == found[-1]
    return found


def test_callers_take_turns_and_each_keeps_its_order() -> None:
    turns = Turns[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.add(item[0], item)
    assert taken(turns) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_caller_that_comes_back_is_behind_the_others() -> None:
    turns = Turns[str]()
    turns.add("a", "a1")
    turns.add("b", "b1")
    assert turns.take() == "a1"
    turns.add("a", "a2")
    assert taken(turns) == ["b1", "a2"]


def test_items_of_a_caller_are_counted() -> None:
    turns = Turns[str]()
    assert (turns.of("a"), bool(turns)) == (0, False)
    turns.add("a", "a1")
    turns.add("a", "a2")
    assert (turns.of("a"), turns.of("b"), bool(turns)) == (2, 0, True)
    turns.take()
    turns.take()
    assert turns.of("a") == 0
    with pytest.raises(KeyError):
        turns.take()
