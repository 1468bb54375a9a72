"""flowbridge.delivery.waiting: what a queued event waits for, in words."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from flowbridge.delivery.breaker import FAILURES
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.delivery.waiting import Waiting, in_store, waiting
from flowbridge.models.timing import Timing
from flowbridge.store import clock, delivery_log
from tests.rig import ROOM, Behaviour, MakeRig, Rig, Rooms, error, refuse_connection, slow, unreachable, until


async def told(rig: Rig, pending: PendingDelivery) -> Waiting:
    name = pending.row.delivery
    found = (await rig.database.run(lambda connection: delivery_log.standings(connection, [name])))[name]
    return waiting(rig.account_limits, rig.breaker, pending.row.account, found, me=rig.worker.owner)


def seconds(found: Waiting) -> float:
    assert found.until is not None, found
    return found.until / 1000 - time.time()


@pytest.mark.parametrize(
    ("behaviour", "reason", "lasts"),
    [
        (slow(60_000), "the homeserver limits how much this account may send", 60),
        (
            error(403, "M_USER_SUSPENDED", "Suspended"),
            "the homeserver refuses the account: Suspended (M_USER_SUSPENDED)",
            Timing().halt_pauses[0],
        ),
        (error(401, "M_UNKNOWN_TOKEN", "Logged out"), "the homeserver refuses the account: Logged out", None),
        (refuse_connection, "the homeserver cannot be reached", None),
    ],
)
async def test_event_says_what_its_account_or_homeserver_waits_for(
    make: MakeRig, rooms: Rooms, behaviour: Behaviour, reason: str, lasts: float | None
) -> None:
    rooms.always(behaviour)
    rooms.version = unreachable() if behaviour is refuse_connection else None
    async with make() as rig:
        deliveries = [await rig.accept("a", f"!{number}:hs") for number in range(FAILURES)]
        await until(lambda: rig.account_limits.pause_of(deliveries[0].row.account) > 0)
        found = await told(rig, deliveries[0])
        assert found.reason == reason
        if lasts is not None:
            assert 0 < seconds(found) <= lasts * 1.1


async def test_event_says_that_its_account_is_not_in_the_room(make: MakeRig, rooms: Rooms) -> None:
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN", "no"))
    async with make() as rig:
        first = await rig.accept("a")
        await until(lambda: rig.lane() and rig.lane().owner is None and rig.lane().lease_until)
        second, third = await rig.accept("b"), await rig.accept("c")
        words = f"@alice:hs is not in this room: invite @alice:hs, or POST /join/{ROOM} (no)"
        found = await told(rig, first)
        assert found.reason == words
        assert 50 < seconds(found) <= 60
        found = await told(rig, second)
        assert found.reason == f"an older event of this room first; of the first one: {words}"
        assert (await told(rig, third)).reason.startswith("2 older events of this room first")


async def test_event_says_how_its_last_attempt_failed(make: MakeRig, rooms: Rooms) -> None:
    make.tune(first_pause=55.0, max_pause=55.0)  # a fifth more or less
    rooms.always(error(500, "M_UNKNOWN", "Internal server error"))
    async with make() as rig:
        first = await rig.accept("a")
        await until(lambda: rig.lane() and rig.lane().owner is None and rig.lane().lease_until)
        second = await rig.accept("b")
        found = await told(rig, first)
        assert found.reason == "the last attempt failed: Internal server error"
        assert 40 < seconds(found) <= 66
        behind = await told(rig, second)
        assert behind.reason == "an older event of this room first; of the first one: its last attempt failed"


async def test_settled_event_waits_for_nothing(make: MakeRig) -> None:
    async with make() as rig:
        pending = rig.offer("a")
        await rig.worker.wait(pending, 5)
        await rig.settled()
        names = [pending.row.delivery]
        assert await rig.database.run(lambda connection: delivery_log.standings(connection, names)) == {}


# as far as the store says it: for a command, and of what another replica sends


def standing(history: list[dict[str, Any]] | None = None, before: int = 0, **values: Any) -> delivery_log.Standing:
    return delivery_log.Standing(before, json.dumps(history or []), values.pop("rests_until", None), "head", **values)


SOON, LATELY = clock.now_ms() + 3_600_000, clock.now_ms() - 3_600_000
FAILED: dict[str, Any] = {"at": 1, "status": 502, "error": "bad gateway"}
LIMITED: dict[str, Any] = {"at": 1, "status": 429, "error": "Too many", "paused": ["slow", SOON]}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (standing(), Waiting("its turn comes")),
        (standing(owner="another"), Waiting("it is being sent")),
        (standing([FAILED], rests_until=SOON), Waiting("the last attempt failed: bad gateway", SOON)),
        (standing([LIMITED]), Waiting("the homeserver limits how much this account may send", SOON)),
        (standing([{**LIMITED, "paused": ["slow", LATELY]}]), Waiting("its turn comes")),
        (
            standing([{**FAILED, "paused": ["account", SOON]}], owner="another"),
            Waiting("the homeserver refuses the account: bad gateway", SOON),
        ),
        (
            standing([{**FAILED, "paused": ["token", LATELY]}]),
            Waiting("the homeserver refuses the account: bad gateway"),
        ),
        (standing([{**FAILED, "absent": [0, SOON]}]), Waiting("bad gateway", SOON)),
        (standing(is_locked_out=True), Waiting("no access token of its account is accepted")),
        (standing(before=1), Waiting("an older event of this room first", None, "head")),
        (
            standing([LIMITED], before=2),
            Waiting(
                "2 older events of this room first; of the first one: the homeserver limits how much this account may "
                "send",
                SOON,
                "head",
            ),
        ),
    ],
)
def test_store_says_what_an_event_waits_for(place: delivery_log.Standing, expected: Waiting) -> None:
    assert in_store(place) == expected


async def test_pause_of_an_account_is_in_the_store_for_other_processes(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(slow(60_000))
    async with make() as rig:
        pending = await rig.accept("a")
        await until(lambda: rig.account_limits.pause_of(pending.row.account) > 0)
        name = pending.row.delivery
        place = None
        while place is None or place.history == "[]":
            place = (await rig.database.run(lambda connection: delivery_log.standings(connection, [name])))[name]
        found = in_store(place)
        assert found.reason == "the homeserver limits how much this account may send"
        assert 0 < seconds(found) <= 66


async def test_event_of_another_replica_is_judged_by_the_store_alone(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(slow(60_000))
    async with make() as rig:
        pending = await rig.accept("a")
        await until(lambda: rig.account_limits.pause_of(pending.row.account) > 0)
        there = standing(owner="another")
        account = pending.row.account
        found = waiting(rig.account_limits, rig.breaker, account, there, me=rig.worker.owner)
        assert found == Waiting("it is being sent")
        mine = replace(there, owner=rig.worker.owner)
        found = waiting(rig.account_limits, rig.breaker, account, mine, me=rig.worker.owner)
        assert found.reason == "the homeserver limits how much this account may send"


async def test_event_in_flight_is_being_sent(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        place = standing(owner=rig.worker.owner)
        found = waiting(rig.account_limits, rig.breaker, "a", place, is_sending=True, me=rig.worker.owner)
        assert found == Waiting("it is being sent")
        found = waiting(rig.account_limits, rig.breaker, "a", place, me=rig.worker.owner)
        assert found == Waiting("its turn comes"), "it waits for a place"


async def test_homeserver_that_is_away_is_asked_again_at_a_known_time(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(refuse_connection)
    rooms.version = unreachable()
    async with make() as rig:
        deliveries = [await rig.accept("a", f"!{number}:hs") for number in range(FAILURES)]
        await until(lambda: rig.breaker.is_open)
        await asyncio.sleep(0)  # the probe begins
        found = await told(rig, deliveries[0])
        assert found.reason == "the homeserver cannot be reached"
        assert -1 < seconds(found) <= Timing().max_probe_pause
