"""flowbridge.limits.shares: what one caller may take of a bound, and what stays for others."""

import pytest

from flowbridge.limits.shares import Share


def fill(share: Share, caller: str) -> int:
    """Take as much as there is for this caller; what it holds then."""
    while share.takes(caller):
        share.add(caller)
    return share.of(caller)


@pytest.mark.parametrize(("most", "taken"), [(0.25, 25), (0.5, 50), (0.8, 80), (1.0, 100)])
def test_one_caller_alone_takes_its_share_and_no_more(most: float, taken: int) -> None:
    assert fill(Share(100, most), "hog") == taken


def test_however_many_hogs_there_are_something_is_left_for_the_next_one() -> None:
    share = Share(10_000, 0.5)
    for number in range(50):
        fill(share, f"hog-{number}")
        assert share.free == pytest.approx(10_000 / (number + 2), abs=20)
        assert share.takes("quiet")
    assert fill(share, "quiet") >= 3
    assert share.takes("another")


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_first_event_of_a_caller_goes_as_long_as_it_fits(limit: int) -> None:
    share = Share(limit, 0.25)
    for number in range(limit):
        assert share.takes(f"caller-{number}")
        share.add(f"caller-{number}")
    assert not share.takes("late")
    assert share.is_full()


def test_what_is_reserved_leaves_less_for_all() -> None:
    share = Share(100, 0.5)
    share.reserved = 60
    assert fill(share, "hog") == 11
    assert share.threshold(60) == pytest.approx(11.4, abs=0.1)


def test_amounts_may_be_of_any_size() -> None:
    share = Share(1_000, 0.5)
    assert not share.takes("a", 1_001)
    assert share.takes("a", 1_000)
    share.add("a", 400)
    assert share.takes("a", 100)
    assert not share.takes("a", 201)
    assert share.takes("b", 600)


def test_what_is_given_back_may_be_taken_again_and_nothing_falls_below_nothing() -> None:
    share = Share(100, 0.5)
    fill(share, "hog")
    share.remove("hog", 10)
    assert fill(share, "hog") == 50
    share.remove("hog", 99)
    share.remove("nobody")
    assert (share.total, share.callers()) == (0, [])


def test_what_changes_during_a_look_up_is_not_forgotten_by_it() -> None:
    share = Share(100, 0.5)
    share.add("gone", 5)
    share.begin()
    share.add("new", 2)
    share.remove("old", 1)
    share.learn({"old": 3, "never": 0})
    assert {caller: share.of(caller) for caller in share.callers()} == {"old": 2, "new": 2}
    assert share.total == 4
