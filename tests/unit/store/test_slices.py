"""flowbridge.store.slices: a large job gives way to other writers."""

import pytest

from flowbridge.store import slices
from flowbridge.store.slices import Slices


def job(seconds_a_row: float, times: int) -> tuple[list[int], list[float]]:
    """The sizes of the slices of a job, and the pauses between them."""
    now = 0.0
    one = Slices(clock=lambda: now)
    rows: list[int] = []
    pauses: list[float] = []

    def work(number: int) -> int:
        nonlocal now
        now += number * seconds_a_row
        rows.append(number)
        return number

    for _ in range(times):
        assert one.run(work) == rows[-1]
        pauses.append(one.pause)
    return rows, pauses


def test_slices_grow_while_they_are_quick() -> None:
    rows, pauses = job(0.000_001, 8)
    assert rows == [250, 500, 1_000, 2_000, 2_500, 2_500, 2_500, 2_500]
    assert set(pauses) == {slices.PAUSE_SECONDS}


def test_slices_shrink_while_they_are_slow_and_the_pauses_grow() -> None:
    times = iter([0.0, 0.001, 0.001, 0.002, 0.002, 0.022, 0.022, 0.042, 0.042, 0.062])
    one = Slices(clock=lambda: next(times))
    assert [one.run(lambda rows: rows) for _ in range(5)] == [250, 500, 1_000, 500, 250]
    assert one.rows == slices.LEAST
    assert one.pause == pytest.approx(4 * 0.02)


def test_slice_that_takes_its_time_stays_as_it_is() -> None:
    rows, pauses = job(0.000_018, 3)
    assert rows == [250, 250, 250]
    assert pauses == [slices.PAUSE_SECONDS] * 3


def test_slice_that_fails_counts_too() -> None:
    one = Slices()
    try:
        one.run(lambda _: 1 // 0)
    except ZeroDivisionError:
        assert one.pause >= slices.PAUSE_SECONDS
