"""flowbridge.delivery.waiting: what a queued event waits for, in words."""

import time

import pytest

from flowbridge.delivery.breaker import FAILURES
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.delivery.waiting import Waiting, waiting
from flowbridge.models.timing import Timing
from flowbridge.store import delivery_log
from tests.rig import ROOM, Behaviour, MakeRig, Rig, Rooms, error, refuse_connection, slow, unreachable, until


async def told(rig: Rig, pending: PendingDelivery) -> Waiting:
    found = await rig.database.run(lambda connection: delivery_log.standing(connection, pending.row.delivery))
    assert found is not None
    return waiting(rig.account_limits, rig.breaker, pending.row.account, found)


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
        found = await rig.database.run(lambda connection: delivery_log.standing(connection, pending.row.delivery))
        assert found is None
