"""flowbridge.limits.concurrency: a bound in all, and one caller's share of it."""

import asyncio

import pytest

from flowbridge.errors import TooMany, Unavailable
from flowbridge.limits.concurrency import Limiter


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("things", 3, 2, waiting=4)


def test_caller_holds_its_share_and_no_more(limiter: Limiter) -> None:
    assert limiter.has_room("hog")
    places = [limiter.hold("hog"), limiter.hold("hog")]
    assert not limiter.has_room("hog")
    assert limiter.has_room("other")
    with pytest.raises(TooMany, match="2 of the 3 things are yours already") as caught:
        limiter.hold("hog")
    assert (caught.value.status, caught.value.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert caught.value.headers() == {"Retry-After": "1"}
    places.append(limiter.hold("other"))
    assert not limiter.has_room("third")
    with pytest.raises(TooMany, match="all 3 things are taken"):
        limiter.hold("third")
    places[0].free()
    places[0].free()  # once is enough
    limiter.hold("third")
    with pytest.raises(TooMany):
        limiter.hold("other")


def test_bridge_itself_keeps_to_no_bound(limiter: Limiter) -> None:
    for _ in range(10):
        limiter.hold("")
        assert limiter.has_room("")
    limiter.hold("other").free()


async def test_callers_have_turns_one_after_another_however_many_of_each_wait() -> None:
    limiter, order = Limiter("things", 1, 1), list[str]()
    held = limiter.hold("first")

    async def work(who: str) -> None:
        async with limiter.turn(who):
            order.append(who)

    tasks = [asyncio.create_task(work(who)) for who in ("hog", "hog", "hog", "hog", "quiet", "third")]
    await asyncio.sleep(0)
    assert order == []
    held.free()
    await asyncio.gather(*tasks)
    assert order == ["hog", "quiet", "third", "hog", "hog", "hog"]


async def test_turn_goes_to_a_caller_below_its_share(limiter: Limiter) -> None:
    held = [limiter.hold("hog"), limiter.hold("hog"), limiter.hold("other")]
    hog, quiet = (asyncio.create_task(limiter.wait(who)) for who in ("hog", "quiet"))
    await asyncio.sleep(0)
    held[2].free()
    (await quiet).free()
    assert not hog.done()
    held[0].free()
    (await hog).free()


async def test_place_that_its_caller_no_longer_wants_is_passed_on() -> None:
    limiter = Limiter("things", 1, 1)
    held = limiter.hold("first")
    gone, other = (asyncio.create_task(limiter.wait(who)) for who in ("gone", "other"))
    await asyncio.sleep(0)
    held.free()  # now it is the turn of the one that goes away
    gone.cancel()
    (await other).free()
    with pytest.raises(asyncio.CancelledError):
        await gone
    limiter.hold("any").free()


async def test_caller_that_goes_away_while_it_waits_leaves_nothing_behind() -> None:
    limiter = Limiter("things", 1, 1)
    held = limiter.hold("first")
    gone = asyncio.create_task(limiter.wait("gone"))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    held.free()
    limiter.hold("any").free()
    assert limiter.is_idle


async def test_waiting_ends_with_whose_fault_it_is(limiter: Limiter) -> None:
    places = [limiter.hold("hog"), limiter.hold("hog"), limiter.hold("other")]
    with pytest.raises(TooMany, match="yours already"):
        await limiter.wait("hog", 0.001)
    with pytest.raises(Unavailable, match="taken by other callers"):
        await limiter.wait("quiet", 0.001)
    for place in places:
        place.free()
    assert limiter.is_idle


async def test_only_so_many_of_one_caller_wait(limiter: Limiter) -> None:
    places = [limiter.hold("hog"), limiter.hold("hog")]
    waiting = [asyncio.create_task(limiter.wait("hog")) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(TooMany):
        await limiter.wait("hog")
    for place in places:
        place.free()
    for turn in waiting:
        (await turn).free()
