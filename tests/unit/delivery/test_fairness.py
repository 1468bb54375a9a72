"""flowbridge.delivery.fairness: whose turn it is, and what one account leaves to others."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from flowbridge.delivery.fairness import Places, share_of_lanes
from tests.unit.delivery.crowd import Crowd, settle


class Accounts(Crowd):
    """Requests of accounts, each of which holds its place until it is let go."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    async def come(self, account: str, *names: str) -> None:
        await self.enter(lambda: self._places.hold(account), *names)


@contextlib.asynccontextmanager
async def crowd(places: Places) -> AsyncIterator[Accounts]:
    people = Accounts(places)
    yield people
    await people.scatter()
    assert places.is_idle


async def test_accounts_take_turns_however_many_of_one_wait() -> None:
    async with crowd(Places(2, 2)) as people:
        await people.come("hog", "h1", "h2", "h3", "h4", "h5")
        await people.come("quiet", "q1", "q2")
        await people.come("other", "o1")
        for name in ("h1", "h2", "h3", "q1", "o1", "h4"):
            await people.go(name)
        assert people.came == ["h1", "h2", "h3", "q1", "o1", "h4", "q2", "h5"]


async def test_one_account_leaves_places_that_others_find_at_once() -> None:
    async with crowd(Places(4, 3)) as people:
        await people.come("hog", "h1", "h2", "h3", "h4", "h5")
        assert people.inside == ["h1", "h2", "h3"]
        await people.come("quiet", "q1", "q2")
        assert people.inside == ["h1", "h2", "h3", "q1"]
        await people.go("q1")
        assert people.inside == ["h1", "h2", "h3", "q2"]
        await people.go("h1", "q2")
        assert people.inside == ["h2", "h3", "h4"]


async def test_request_that_gives_up_keeps_no_place_and_no_turn() -> None:
    async with crowd(Places(1, 1)) as people:
        await people.come("one", "a")
        await people.come("two", "b", "c")
        await people.come("three", "d")
        await people.give_up("b", "d")
        await people.go("a")
        assert people.inside == ["c"]
        await people.give_up("c")
        assert people.inside == []


async def test_request_that_gives_up_just_when_its_turn_comes_passes_it_on() -> None:
    async with crowd(Places(1, 1)) as people:
        await people.come("one", "a")
        await people.come("two", "b")
        await people.come("three", "c")
        people.ends["a"].set()
        for _ in range(2):  # until b has been given the place, and does not know it
            await asyncio.sleep(0)
        people.tasks["b"].cancel()
        await settle()
        assert people.inside == ["c"]


@pytest.mark.parametrize(("accounts", "share"), [(0, 2_000), (1, 1_000), (3, 500)])
def test_accounts_leave_as_many_lanes_to_the_next_one_as_each_may_hold(accounts: int, share: int) -> None:
    held = Counter({f"account {number}": 1 for number in range(accounts)})
    assert share_of_lanes(held, 2_000) == share


async def test_place_is_given_back_when_its_holder_fails() -> None:
    places = Places(1, 1)
    with contextlib.suppress(ValueError):
        async with places.hold("a"):
            assert not places.finds("b")
            raise ValueError
    assert places.is_idle
