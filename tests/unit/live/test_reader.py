"""flowbridge.live.reader, in front of a homeserver of dictionaries."""

import random
from typing import cast

import pytest

from flowbridge.errors import HomeserverError
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.live.position import Position, parse
from flowbridge.live.reader import Item, Reader
from tests.live import Rooms, answer

ME = "@me:hs"


def reader(of: Rooms, timeline: int = 100) -> Reader:
    return Reader(cast("Homeserver", of), ME, "token", timeline=timeline)


async def rest(of: Rooms, position: Position) -> list[Item]:
    return [item async for item in reader(of).rest(position)]


def ids(items: list[Item]) -> list[str]:
    return [str(item.event["event_id"]) for item in items]


def busy() -> Rooms:
    rooms: dict[str, list[tuple[int, str]]] = {"a": [], "b": [], "c": []}
    for place in range(1, 31):
        room = "abc"[place % 3] if place < 25 else "a"
        rooms[room].append((place, f"${place}"))
    return Rooms(**rooms)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("timeline", [1, 4, 100])
async def test_from_each_position_of_a_batch_exactly_the_rest_comes(shuffled: bool, timeline: int) -> None:
    homeserver = busy()
    homeserver.shuffled = shuffled
    news = await reader(homeserver, timeline).poll("4", cautious=False)
    told = [item async for item in reader(homeserver).items(news)]
    assert sorted(ids(told)) == sorted(f"${place}" for place in range(5, 31))
    homeserver.rooms["!a"].append((31, "$later"))
    homeserver.rooms["!d"] = [(32, "$another-room")]
    for number, item in enumerate(told, 1):
        position = parse(str(item.position))
        missing = [] if position.between else ids(await rest(homeserver, position))
        assert sorted(missing) == sorted(ids(told[number:])), str(item.position)


async def test_resumed_again_and_again_nothing_is_lost_or_repeated() -> None:
    chance = random.Random(4)  # noqa: S311 - chance, no secret
    homeserver = busy()
    homeserver.shuffled = True
    news = await reader(homeserver).poll("4", cautious=False)
    told = [item async for item in reader(homeserver).items(news)][:5]  # in the order of /sync
    position, found = parse(str(told[-1].position)), ids(told)
    while not position.between:
        items = await rest(homeserver, position)
        told = items[: chance.randint(1, 2)]
        found += ids(told)
        position = parse(str(told[-1].position)) if len(told) < len(items) else Position("30")
    assert sorted(found) == sorted(f"${place}" for place in range(5, 31))


async def test_room_that_is_closed_is_left_out() -> None:
    homeserver = busy()
    homeserver.closed.add("!b")
    found = ids(await rest(homeserver, Position("30", "0")))
    assert sorted(found) == sorted(id_ for room in "ac" for _, id_ in homeserver.rooms[f"!{room}"])


async def test_only_what_happened_while_one_was_in_the_room_counts_and_how_one_left() -> None:
    homeserver = Rooms(a=[(1, "$before"), (2, "$invite"), (3, "$join"), (4, "$in"), (5, "$kick"), (6, "$after")])
    member = {"type": "m.room.member", "state_key": ME}
    homeserver.extra = {
        "$before": {"unsigned": {"membership": "leave"}},
        "$invite": {**member, "content": {"membership": "invite"}, "unsigned": {"membership": "invite"}},
        "$join": {**member, "content": {"membership": "join"}, "unsigned": {"membership": "join"}},
        "$in": {"unsigned": {"age": 7}},
        "$kick": {**member, "content": {"membership": "leave"}, "unsigned": {"membership": "leave"}},
        "$after": {"type": "m.room.member", "state_key": "@you:hs", "unsigned": {"membership": "leave"}},
    }
    assert ids(await rest(homeserver, Position("6", "0"))) == ["$join", "$in", "$kick"]


async def test_equal_questions_are_asked_once() -> None:
    homeserver = busy()
    one = reader(homeserver)
    first = [item async for item in one.rest(Position("30", "4"))]
    asked = len(homeserver.targets)
    again = [item async for item in one.rest(Position("30", "4"))]
    assert ids(again) == ids(first)
    assert len(homeserver.targets) == asked


async def test_refusal_is_passed_on() -> None:
    class Refusing(Rooms):
        def ask(self, target: str) -> Answer:
            return answer({"errcode": "M_UNKNOWN_TOKEN", "error": "no"}, 401)

    with pytest.raises(HomeserverError) as caught:
        await rest(Refusing(), Position("2", "1"))
    assert (caught.value.status, caught.value.errcode) == (401, "M_UNKNOWN_TOKEN")
