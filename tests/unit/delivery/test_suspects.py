"""flowbridge.delivery.suspects: one event that the homeserver fails at is set aside; an outage is waited out."""

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from flowbridge.delivery import suspects
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.homeserver.pool import Answer
from flowbridge.store import delivery_log
from tests.rig import (
    ROOM,
    Behaviour,
    MakeRig,
    Rig,
    Rooms,
    Sent,
    cut,
    error,
    raw,
    soon,
    until,
)

OTHER = "!other:hs"
SECONDS = 0.2
BROKEN = error(500, "M_UNKNOWN", "Internal server error")


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.002, max_pause=0.02, recent_seconds=0.0, poll_seconds=0.02, first_probe_pause=0.01)


def poison(behaviour: Behaviour = BROKEN) -> Callable[[Sent], Behaviour | None]:
    return lambda sent: behaviour if str(sent.body).startswith("poison") else None


def event(rig: Rig, pending: PendingDelivery) -> dict[str, Any]:
    """An event as the store has it."""
    columns = ("delivery", "state", "attempts", "event_id", "error", "history")
    found = next(dict(zip(columns, row, strict=True)) for row in rig.rows(*columns) if row[0] == pending.row.delivery)
    return {**found, "error": json.loads(found["error"] or "null"), "history": json.loads(found["history"])}


def is_queued(rig: Rig, pending: PendingDelivery) -> bool:
    return bool(event(rig, pending)["state"] == "queued")


async def traffic(rig: Rig, while_: Callable[[], object], room: str = OTHER) -> int:
    """Others send for as long as that holds; how many events that were."""
    number = 0
    while while_():
        assert (await soon(rig.worker.wait(rig.offer(f"other {number}", room), 5))).state == "sent"
        number += 1
        assert number < 5_000, "nothing was set aside"
        await asyncio.sleep(0.005)
    return number


async def test_event_that_alone_fails_is_set_aside_and_its_lane_goes_on(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(poison())
    async with make(set_aside=SECONDS) as rig:
        bad = await rig.accept("poison")
        behind = await rig.accept("behind")
        await traffic(rig, lambda: is_queued(rig, behind))
        found = event(rig, bad)
        assert found["state"] == "dead"
        assert (found["error"]["status"], found["error"]["errcode"]) == (500, "M_UNKNOWN")
        assert found["error"]["error"].startswith(f"set aside after {len(rooms.tries(ROOM)) - 1} attempts: ")
        assert "Internal server error" in found["error"]["error"]
        assert rooms.bodies() == ["behind"]
        assert ("recent", ROOM) in rooms.looks, "it may be in the room after all"
        assert {entry["status"] for entry in found["history"]} == {500}


async def test_event_that_is_in_the_room_after_all_is_sent_and_not_set_aside(make: MakeRig, rooms: Rooms) -> None:
    async def store_and_fail(rooms: Rooms, sent: Sent) -> Answer:
        rooms.store(sent)
        return await BROKEN(rooms, sent)

    rooms.script(poison(store_and_fail))
    async with make(set_aside=SECONDS) as rig:
        bad = await rig.accept("poison")
        await traffic(rig, lambda: is_queued(rig, bad))
        found = event(rig, bad)
        assert (found["state"], found["event_id"]) == ("sent", rooms.timeline[ROOM][0]["event_id"])
        assert rooms.bodies() == ["poison"]


async def test_homeserver_that_fails_at_everything_is_waited_out(make: MakeRig, rooms: Rooms) -> None:
    async with make(set_aside=SECONDS) as rig:
        await traffic(rig, lambda: len(rooms.timeline[OTHER]) < 5)
        rooms.always(BROKEN)
        for number in range(20):
            await rig.accept("a", f"!{number}:hs")
        await until(lambda: all(len(rooms.tries(f"!{number}:hs")) > 30 for number in range(20)))  # thrice the seconds
        rooms.always(None)
        await rig.settled()
        assert set(rig.states()) == {"sent"}


async def test_homeserver_that_fails_nine_times_in_ten_is_waited_out(make: MakeRig, rooms: Rooms) -> None:
    """Some events pass all the time, and each event fails for long."""
    chance = random.Random(1)  # noqa: S311 (no secret)
    failing = True
    rooms.script(lambda _: BROKEN if failing and chance.random() < 0.9 else None)
    async with make(set_aside=SECONDS) as rig:
        for number in range(200):
            await rig.accept("a", f"!{number % 30}:hs")
        await until(lambda: len(rooms.sends) > 1_200)
        failing = False
        await rig.settled()
        assert set(rig.states()) == {"sent"}
        assert max(rig.rows("attempts")) > 15


@pytest.mark.parametrize(
    ("what", "behaviour"),
    [
        ("no answer", cut),
        ("page of a proxy", raw(Answer(502, ((b"content-type", b"text/html"),), b"<html>"))),
        ("5xx without an errcode", raw(Answer(500, (), b"{}"))),
    ],
)
async def test_what_the_homeserver_did_not_say_sets_nothing_aside(
    make: MakeRig, rooms: Rooms, what: str, behaviour: Behaviour
) -> None:
    rooms.script(poison(behaviour))
    async with make(set_aside=SECONDS) as rig:
        bad = await rig.accept("poison")
        await traffic(rig, lambda: len(rooms.tries(ROOM)) < 40)
        assert is_queued(rig, bad), what


async def test_without_other_events_nothing_is_set_aside(make: MakeRig, rooms: Rooms) -> None:
    """Nobody can tell an outage from a poisoned event then."""
    rooms.script(poison())
    async with make(set_aside=SECONDS) as rig:
        bad = await rig.accept("poison")
        behind = await rig.accept("behind")
        await until(lambda: len(rooms.tries(ROOM)) > 40)
        assert is_queued(rig, bad)
        await traffic(rig, lambda: is_queued(rig, behind))
        await rig.settled()
        assert rooms.bodies() == ["behind"]


async def test_zero_seconds_set_nothing_aside(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(poison())
    async with make(set_aside=0.0) as rig:
        bad = await rig.accept("poison")
        await traffic(rig, lambda: len(rooms.tries(ROOM)) < 40)
        assert is_queued(rig, bad)


async def test_what_was_tried_counts_over_restarts(make: MakeRig, rooms: Rooms) -> None:
    """Each process lives for one attempt at it, or two."""
    rooms.script(poison())
    for number in range(100):
        async with make(set_aside=SECONDS) as rig:
            if number == 0:
                await rig.accept("poison")
            tried = len(rooms.tries(ROOM))
            await rig.send("other", OTHER)
            await until(_tried(rig, rooms, tried))
            if "dead" in rig.states():
                break
    else:
        raise AssertionError("it was never set aside")
    assert number >= 2


def _tried(rig: Rig, rooms: Rooms, before: int) -> Callable[[], bool]:
    return lambda: len(rooms.tries(ROOM)) > before or "dead" in rig.states()


async def test_next_event_of_the_lane_has_to_fail_for_longer(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(poison())
    async with make(set_aside=SECONDS) as rig:
        bad = [await rig.accept(f"poison {number}") for number in range(2)]
        last = await rig.accept("behind")
        await traffic(rig, lambda: is_queued(rig, last))
        found = [event(rig, pending) for pending in bad]
        assert all(one["error"]["error"].startswith("set aside") for one in found)
        lasted = [one["history"][-1]["at"] - one["history"][-1]["failed"][1] for one in found]
        assert lasted[0] >= SECONDS * 1000 * 0.95
        assert lasted[1] >= SECONDS * 2000 * 0.95


async def test_event_that_was_set_aside_is_replayed(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(poison())
    async with make(set_aside=SECONDS) as rig:
        bad = await rig.accept("poison")
        await traffic(rig, lambda: is_queued(rig, bad))
        await rig.settled()
        rooms.always(None)
        await rig.database.run(lambda connection: delivery_log.replay(connection, bad.row.delivery, "again", "test"))
        rig.worker.wake()
        await rig.settled()
        assert rooms.bodies() == ["poison"]


def test_history_of_a_replayed_event_begins_again() -> None:
    entries: list[dict[str, Any]] = [{"at": 1, "ms": 1, "failed": [4, 1, 1]}, {"at": 2, "replayed": {}}, {"at": 3}]
    assert not suspects.must_be_looked_for(entries)
    assert suspects.must_be_looked_for(entries[:1])
    assert suspects.last_failure(entries) is None
    assert suspects.last_failure([*entries, {"at": 4, "ms": 0, "failed": [0, 0, 0]}]) == {
        "at": 4,
        "ms": 0,
        "failed": [0, 0, 0],
    }
