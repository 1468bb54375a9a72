"""flowbridge.live.feed, in front of a homeserver of dictionaries."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from flowbridge.errors import BadGateway, HomeserverError, MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.live.feed import Feed
from flowbridge.live.frames import EventFilter
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position, parse
from flowbridge.live.reader import Reader
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from tests.live import Rooms, answer
from tests.patience import PATIENCE

Make = Callable[[Rooms], Feed]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """`make(rooms)`: a feed of this homeserver."""
    timing = Timing(live_retry_seconds=0.001, empty_poll_seconds=0.002)
    made: list[Feed] = []

    def new(rooms: Rooms) -> Feed:
        reader = Reader(cast("Homeserver", rooms), "@me:hs", "token", timeline=2)
        made.append(Feed("@me:hs", reader, lambda _, error: error, lambda: None, timing=timing))
        return made[-1]

    yield new
    for one in made:
        one.stop()


def listener(of: Feed) -> Listener:
    return Listener(Caller("@me:hs", "DEVICE", "token"), EventFilter(), of.leave)


async def read(of: Listener, number: int) -> tuple[list[str], str]:
    """The ids of so many events, and the last position."""
    found, last, text = list[str](), "", ""
    async with asyncio.timeout(PATIENCE):
        while len(found) < number:
            text += (await of.take(1)).decode()
            *blocks, text = text.split("\n\n")
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
                last = fields.get("id", last)
                if "data" in fields:
                    found.append(json.loads(fields["data"])["event_id"])
    return found, last


def happen(rooms: Rooms, *places: int) -> list[str]:
    """Events in two rooms in turns; their ids."""
    for place in places:
        rooms.rooms[f"!{'ab'[place % 2]}"].append((place, f"${place}"))
    return [f"${place}" for place in places]


async def test_homeserver_that_fails_in_the_middle_of_a_batch_costs_and_repeats_nothing(make: Make) -> None:
    rooms = Rooms(a=[(1, "$1")], b=[])
    of = make(rooms)
    one = listener(of)
    await of.join(one, None)
    rooms.fails = True
    for places in (range(2, 20), range(20, 23), range(23, 50)):
        expected = happen(rooms, *places)
        found, _ = await read(one, len(expected))
        assert sorted(found) == sorted(expected)


async def test_who_resumes_while_events_come_and_calls_fail_has_all_of_them_once(make: Make) -> None:
    rooms = Rooms(a=[(1, "$1")], b=[])
    of = make(rooms)
    first = listener(of)
    await of.join(first, None)
    rooms.fails = True
    expected = happen(rooms, *range(2, 30))
    one = listener(of)
    await of.join(one, Position("1"))
    expected += happen(rooms, *range(30, 60))
    found, position = await read(one, 10)
    one.close()
    again = listener(of)
    # What was taken with the tenth event is lost with the connection: the position is the last one that was read.
    await of.join(again, parse(position))
    rest, _ = await read(again, len(expected) - len(found))
    assert sorted(found + rest) == sorted(expected)


async def test_who_comes_first_while_the_homeserver_is_away_is_told_so(make: Make) -> None:
    class Away(Rooms):
        def ask(self, target: str) -> Answer:
            raise BadGateway("away")

    of = make(Away())
    with pytest.raises(BadGateway):
        await of.join(listener(of), None)
    resuming = listener(of)
    await of.join(resuming, Position("1"))
    assert not resuming.ended, "it knows where it was, and waits"


async def test_refused_token_ends_all_listeners_and_whoever_comes_later(make: Make) -> None:
    rooms = Rooms(a=[(1, "$1")], b=[])
    of = make(rooms)
    both = [listener(of), listener(of)]
    for one in both:
        await of.join(one, None)

    rooms.ask = lambda target: answer(  # type: ignore[method-assign]
        {"errcode": "M_UNKNOWN_TOKEN", "error": "logged out"}, 401
    )
    for one in both:
        await asyncio.wait_for(one.over.wait(), PATIENCE)
        assert isinstance(one.why, MatrixError)
        assert one.why.errcode == "M_UNKNOWN_TOKEN"
    with pytest.raises(HomeserverError):
        await of.join(listener(of), None)


async def test_who_comes_in_the_middle_of_a_batch_is_told_what_comes_after_it(make: Make) -> None:
    rooms = Rooms(a=[(1, "$1")], b=[])
    poll, reached, goes_on = rooms.poll, asyncio.Event(), asyncio.Event()

    async def hold(target: str, **how: object) -> tuple[bytes, Any]:
        if "/messages" in target:
            reached.set()
            await goes_on.wait()
        return await poll(target, **how)

    rooms.poll = hold  # type: ignore[method-assign]
    of = make(rooms)
    first, late = listener(of), listener(of)
    await of.join(first, None)
    batch = happen(rooms, 2, 4, 6, 8)  # more than one poll names: read page by page
    await asyncio.wait_for(reached.wait(), PATIENCE)
    await of.join(late, None)
    goes_on.set()
    assert (await read(first, 4))[0] == batch
    (after,) = happen(rooms, 10)
    assert (await read(late, 1))[0] == [after]


async def test_event_is_told_as_its_readers_see_it_and_once_more_when_that_changes() -> None:
    """The second telling moves no position: whoever resumes from it misses nothing."""

    async def shown(room_id: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**event, "event_id": f"{event['event_id']} in {room_id}"}

    rooms = Rooms(a=[(1, "$1")], b=[])
    reader = Reader(cast("Homeserver", rooms), "@me:hs", "token", timeline=2)
    timing = Timing(live_retry_seconds=0.001, empty_poll_seconds=0.002)
    of = Feed("@me:hs", reader, lambda _, error: error, lambda: None, shown=shown, timing=timing)
    try:
        one = listener(of)
        await of.join(one, None)
        happen(rooms, 2)
        found, position = await read(one, 1)
        assert found == ["$2 in !a"]
        of.tell("!a", {"type": "m.room.message", "event_id": "$again"})
        again, after = await read(one, 1)
        assert (again, after) == (["$again"], position)
        resuming = listener(of)
        await of.join(resuming, parse(after))
        happen(rooms, 4)
        assert (await read(resuming, 1))[0] == ["$4 in !a"]
    finally:
        of.stop()


async def test_server_cannot_say_for_the_bridge_that_an_event_is_verified(make: Make) -> None:
    rooms = Rooms(a=[(1, "$1")], b=[])
    rooms.extra["$2"] = {"flowbridge": {"encrypted": True, "verified": True}, "sender": "@mallory:hs"}
    of = make(rooms)
    one = listener(of)
    await of.join(one, None)
    happen(rooms, 2)
    async with asyncio.timeout(PATIENCE):
        text = ""
        while "$2" not in text:
            text += (await one.take(1)).decode()
    assert "@mallory:hs" in text
    assert "verified" not in text
