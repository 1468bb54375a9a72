"""flowbridge.delivery.limiter: how many are let through, in which order, and what stays of those who go away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from flowbridge.delivery.limiter import RateLimiter
from tests.rig import until
from tests.unit.delivery.crowd import Crowd, settle


class Requests(Crowd):
    def __init__(self, limiter: RateLimiter) -> None:
        super().__init__()
        self._limiter = limiter

    async def come(self, *names: str) -> None:
        await self.enter(self._limiter.passage, *names)


Skip = Callable[[float], None]


@pytest.fixture
async def skip(monkeypatch: pytest.MonkeyPatch) -> Skip:
    """`skip(seconds)`: the event loop's clock moves on by so much."""
    loop, skipped = asyncio.get_running_loop(), 0.0
    now = loop.time

    def skip(seconds: float) -> None:
        nonlocal skipped
        skipped += seconds

    monkeypatch.setattr(loop, "time", lambda: now() + skipped)
    return skip


@contextlib.asynccontextmanager
async def crowd(limiter: RateLimiter) -> AsyncIterator[Requests]:
    people = Requests(limiter)
    yield people
    await people.scatter()


async def test_no_more_than_the_window_are_let_through_and_in_the_order_they_came() -> None:
    async with crowd(RateLimiter(2)) as people:
        await people.come("a", "b", "c", "d", "e")
        assert people.inside == ["a", "b"]
        await people.go("b")
        assert people.inside == ["a", "c"]
        await people.go("a", "c")
        assert people.came == ["a", "b", "c", "d", "e"]


async def test_nobody_overtakes_those_who_wait() -> None:
    limiter = RateLimiter(1)
    async with crowd(limiter) as people:
        await people.come("a", "b")
        await people.go("a")
        await people.come("c")
        assert people.inside == ["b"]


async def test_nobody_overtakes_when_the_window_has_grown() -> None:
    limiter = RateLimiter(2)
    limiter.shut()
    limiter.open()
    async with crowd(limiter) as people:
        await people.come("a", "b")
        limiter.went_well()
        await people.come("c")
        await people.go("a")
        assert people.came[:2] == ["a", "b"]


async def test_place_of_a_caller_who_fails_is_free_again() -> None:
    limiter = RateLimiter(1)
    with pytest.raises(RuntimeError):
        async with limiter.passage():
            raise RuntimeError
    async with crowd(limiter) as people:
        await people.come("a")
        assert people.inside == ["a"]


async def test_turn_of_a_caller_who_went_away_is_the_next_ones() -> None:
    async with crowd(RateLimiter(1)) as people:
        await people.come("a", "b", "c")
        await people.give_up("b")
        await people.go("a")
        assert people.inside == ["c"]


async def test_place_given_to_a_caller_who_goes_away_in_that_moment_is_not_lost() -> None:
    limiter = RateLimiter(1)
    async with crowd(limiter) as people:
        await people.come("a", "b", "c")
        people.ends["a"].set()
        await asyncio.sleep(0)
        assert (people.inside, limiter.in_flight) == ([], 1)
        people.tasks["b"].cancel()  # it has its turn, and does not know yet
        await settle()
        assert people.inside == ["c"]


async def test_callers_who_went_away_leave_nothing_in_a_gate_that_stays_shut() -> None:
    limiter = RateLimiter(1)
    limiter.shut()
    async with crowd(limiter) as people:
        names = [str(number) for number in range(1_000)]
        await people.come("first", *names)
        await people.give_up(*names)
        assert len(limiter._queue) == 1
        limiter.open()
        await settle()
        assert people.inside == ["first"]


async def test_shut_gate_lets_nobody_through_until_it_is_opened() -> None:
    limiter = RateLimiter(2)
    limiter.shut()
    assert limiter.closed_for == float("inf")
    async with crowd(limiter) as people:
        await people.come("a", "b")
        assert people.inside == []
        limiter.open()
        await settle()
        assert people.inside == ["a"]  # at first one at a time
        limiter.went_well()
        await people.go("a")
        await people.come("c")
        assert people.inside == ["b", "c"]


async def test_closed_gate_opens_by_itself_and_not_before(skip: Skip) -> None:
    limiter = RateLimiter(4)
    limiter.too_much(1_000)
    async with crowd(limiter) as people:
        await people.come("a")
        assert people.inside == []
        assert 0 < limiter.closed_for <= 1_000
        skip(500)
        await people.come("b")
        assert people.inside == []
        skip(500)
        await until(lambda: people.inside)
        assert limiter.closed_for == 0


async def test_longer_pause_counts_when_two_are_asked_for(skip: Skip) -> None:
    limiter = RateLimiter(4)
    limiter.too_much(1_000)
    limiter.too_much(1)
    async with crowd(limiter) as people:
        await people.come("a")
        skip(500)
        await people.come("b")
        assert people.inside == []
        skip(500)
        await until(lambda: people.inside)


async def test_pause_that_is_prolonged_while_somebody_waits_is_waited_out(skip: Skip) -> None:
    limiter = RateLimiter(4)
    limiter.too_much(100)
    async with crowd(limiter) as people:
        await people.come("a")
        limiter.too_much(1_000)
        skip(500)
        await people.come("b")
        assert people.inside == []
        skip(500)
        await until(lambda: people.inside)


async def width(limiter: RateLimiter) -> int:
    """How many it lets through at once."""
    async with crowd(limiter) as people:
        await people.come(*[str(number) for number in range(100)])
        return len(people.inside)


async def go_well(limiter: RateLimiter, number: int) -> None:
    """So many answers come that are no refusals, while others wait."""
    async with crowd(limiter) as people:
        await people.come(*[str(number) for number in range(100)])
        for _ in range(number):
            limiter.went_well()


async def refuse(limiter: RateLimiter, seconds: float = 0.0001) -> None:
    """A refusal, and the end of the pause."""
    limiter.too_much(seconds)
    await until(lambda: limiter.closed_for == 0)


async def test_window_begins_narrow_and_doubles_until_it_is_too_much() -> None:
    limiter = RateLimiter(64, first=8)
    widths = []
    for _ in range(5):
        wide = await width(limiter)
        widths.append(wide)
        await go_well(limiter, wide)
    assert widths == [8, 16, 32, 64, 64]


async def test_window_does_not_grow_when_nobody_waits() -> None:
    limiter = RateLimiter(64, first=8)
    async with crowd(limiter) as people:
        await people.come("a", "b")
        for _ in range(100):
            limiter.went_well()
    assert await width(limiter) == 8


async def test_window_halves_once_for_all_that_were_under_way() -> None:
    limiter = RateLimiter(16)
    await go_well(limiter, 16)
    for _ in range(8):
        limiter.too_much(0.0001)
    await until(lambda: limiter.closed_for == 0)
    assert await width(limiter) == 8
    for _ in range(10):
        await refuse(limiter)
    assert await width(limiter) == 1


async def test_window_grows_slowly_after_it_was_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is under way at the next limit is refused with the first one."""
    limiter = RateLimiter(64, first=8)
    await refuse(limiter)
    loop, began, seconds = asyncio.get_running_loop(), asyncio.get_running_loop().time(), 0.0
    monkeypatch.setattr(loop, "time", lambda: began + seconds)
    await go_well(limiter, 1_000)
    assert await width(limiter) == 4
    grown = []
    for _ in range(20):
        seconds += 0.2
        await go_well(limiter, 2)
        grown.append(await width(limiter))
    assert grown == sorted(grown)
    assert 7 <= grown[-1] <= 8, "by one a second"


async def test_answers_that_come_during_a_pause_do_not_change_the_window(skip: Skip) -> None:
    limiter = RateLimiter(64, first=8)
    limiter.too_much(100)
    await go_well(limiter, 100)
    skip(100)
    await until(lambda: limiter.closed_for == 0)
    assert await width(limiter) == 4


async def test_window_grows_by_one_for_each_windowful_once_the_limit_is_long_ago() -> None:
    limiter = RateLimiter(16, limited_seconds=0.0)
    await go_well(limiter, 16)
    await refuse(limiter)
    await go_well(limiter, 8)
    assert await width(limiter) == 8
    await go_well(limiter, 2)
    assert await width(limiter) == 9
    await go_well(limiter, 200)
    assert await width(limiter) == 16


async def test_window_doubles_after_an_outage_up_to_where_it_was() -> None:
    limiter = RateLimiter(16)
    limiter.shut()
    limiter.open()
    widths = []
    for _ in range(6):
        wide = await width(limiter)
        widths.append(wide)
        await go_well(limiter, wide)
    assert widths == [1, 2, 4, 8, 16, 16]


async def test_idle_is_what_nobody_uses_and_nothing_closes() -> None:
    limiter = RateLimiter(1)
    assert limiter.is_idle
    async with crowd(limiter) as people:
        await people.come("a", "b")
        assert not limiter.is_idle
        await people.go("a", "b")
        assert limiter.is_idle
    limiter.too_much(60)
    assert not limiter.is_idle
    limiter.open()
    limiter.shut()
    assert not limiter.is_idle


async def test_those_who_come_ahead_take_turns_with_a_long_queue() -> None:
    limiter = RateLimiter(1)
    order: list[str] = []

    async def through(name: str, *, ahead: bool) -> None:
        async with limiter.passage(ahead=ahead):
            order.append(name)
            await asyncio.sleep(0)

    async with limiter.passage():
        tasks = [asyncio.ensure_future(through(f"queued {number}", ahead=False)) for number in range(4)]
        await asyncio.sleep(0)
        tasks += [asyncio.ensure_future(through(f"ahead {number}", ahead=True)) for number in range(2)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["ahead 0", "queued 0", "ahead 1", "queued 1", "queued 2", "queued 3"]
    assert limiter.is_idle


async def test_place_of_one_who_came_ahead_and_went_away_is_given_to_the_next() -> None:
    limiter = RateLimiter(1)
    async with limiter.passage():
        gone = asyncio.ensure_future(_pass(limiter, ahead=True))
        stays = asyncio.ensure_future(_pass(limiter, ahead=False))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
    await asyncio.wait_for(stays, 5)
    assert limiter.is_idle


async def _pass(limiter: RateLimiter, *, ahead: bool) -> None:
    async with limiter.passage(ahead=ahead):
        pass
