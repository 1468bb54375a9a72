"""flowbridge.limits.cache"""

import pytest

from flowbridge.limits import cache
from flowbridge.limits.cache import Cache


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(cache, "time", made)
    return made


def test_entry_is_kept_until_it_is_removed() -> None:
    kept = Cache[str, int | None](2)
    assert kept.put("a", 1) == 1
    kept.put("b", None)
    assert (kept.get("a"), kept.get("b", 7), kept.get("c"), kept.get("c", 7)) == (1, None, None, 7)
    assert "b" in kept
    assert (kept.pop("a"), kept.pop("a"), kept.pop("a", 7)) == (1, None, 7)
    assert list(kept.items()) == [("b", None)]
    kept.clear()
    assert len(kept) == 0


def test_entry_that_was_written_longest_ago_makes_room() -> None:
    kept = Cache[str, int](2)
    for key in "abac":
        kept.put(key, 0)
        assert len(kept) <= 2
    assert [key for key, _ in kept.items()] == ["a", "c"]


def test_entry_expires_after_its_own_time_or_that_of_all(clock: Clock) -> None:
    kept = Cache[str, int](3, seconds=10)
    kept.put("long", 1, seconds=20)
    kept.put("usual", 2)
    clock.now += 10
    assert ("long" in kept, "usual" in kept) == (True, False)
    assert (kept.get("long"), kept.get("usual"), kept.pop("usual")) == (1, None, None)
    assert list(kept.items()) == [("long", 1)]
    assert kept.put("usual", 3) == 3
    assert kept.get("usual") == 3


def test_weights_are_bounded_by_their_sum() -> None:
    kept = Cache[str, int](10)
    for key, weight in (("a", 4), ("b", 4), ("a", 6)):
        kept.put(key, 0, weight=weight)
    assert len(kept) == 2
    kept.put("c", 0, weight=5)
    assert [key for key, _ in kept.items()] == ["c"], "a and c are more than 10, and b was older"
    kept.put("d", 0, weight=11)
    assert len(kept) == 0, "larger than all of it"
