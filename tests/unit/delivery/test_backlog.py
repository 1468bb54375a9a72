"""flowbridge.delivery.worker: a room gets its turn, whatever else the same account has queued."""

import asyncio
from collections.abc import Callable

from sqlalchemy import Connection, insert

from flowbridge.homeserver.pool import Answer
from flowbridge.store import tables
from flowbridge.store.clock import now_ms
from tests.patience import PATIENCE
from tests.rig import ALICE, Behaviour, MakeRig, Rig, Rooms, Sent, accept, until

ROOMS = 1_500
EVENTS = 300_000
QUIET = "!quiet:hs"


# Written by the database itself: 300,000 rows of parameters take Python twice as long.
BACKLOG = """
WITH RECURSIVE
    turns(turn) AS (VALUES (0) UNION ALL SELECT turn + 1 FROM turns WHERE turn + 1 < :turns),
    rooms(number, room) AS (
        VALUES (0, '!0:hs')
        UNION ALL SELECT number + 1, '!' || (number + 1) || ':hs' FROM rooms WHERE number + 1 < :rooms
    )
INSERT INTO outbox (delivery, txn_id, lane, account, room_id, event_type, accepted_at, state, content)
SELECT
    turn || '-' || room, turn || '-' || room, :account || '|' || room, :account, room, 'm.room.message', :now, 'queued',
    '{"body": ' || turn || ', "msgtype": "m.text"}'
FROM turns, rooms ORDER BY turn, number
"""


def backlog(account: str, events: int = EVENTS) -> Callable[[Connection], None]:
    """Events in 1,500 rooms, as they lie in the store after an outage."""

    def write(connection: Connection) -> None:
        names = [f"!{number}:hs" for number in range(ROOMS)]
        lanes = [{"lane": f"{account}|{room}", "account": account, "dirty": 1, "sent_with": ""} for room in names]
        connection.execute(insert(tables.lanes), lanes)
        what = {"account": account, "now": now_ms(), "rooms": ROOMS, "turns": events // ROOMS}
        connection.exec_driver_sql(BACKLOG, what)

    return write


def taking(seconds: float) -> Behaviour:
    async def behave(rooms: Rooms, sent: Sent) -> Answer:
        await asyncio.sleep(seconds)
        return await accept(rooms, sent)

    return behave


async def test_quiet_room_gets_its_turn_beside_a_backlog_in_1500_rooms(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(taking(0.1))  # 640 a second at most: a round over all rooms takes seconds
    rig: Rig = make()
    async with rig:
        account = rig.tokens.remember(ALICE)
        await rig.database.run(backlog(account), alone=True)
        await rig.backpressure.refresh()
        rig.worker.wake()
        await until(lambda: rig.worker.lanes()["pause"] > 900)
        waits = []  # in sends of others: seconds would tell how busy the machine is
        for number in range(5):
            before = len(rooms.sends)
            outcome = await rig.send("fresh", f"{QUIET}{number}")
            waits.append(len(rooms.sends) - before)
            assert outcome is not None, (waits, rig.worker.lanes())
        for number in range(5):
            before = len(rooms.sends)
            room = f"!later{number}:hs"
            await rig.accept("nobody waits for it", room)
            await until(lambda room=room: rooms.timeline[room])  # type: ignore[misc]
            waits.append(len(rooms.sends) - before)
        assert sorted(waits)[len(waits) // 2] < ROOMS / 2, waits
        await rig.crash()


async def test_every_room_of_a_backlog_gets_its_turn(make: MakeRig, rooms: Rooms) -> None:
    """Also the last 500, for which there was no place at first."""
    rig: Rig = make()
    async with rig:
        events = EVENTS // 10
        await rig.database.run(backlog(rig.tokens.remember(ALICE), events), alone=True)
        await rig.backpressure.refresh()
        rig.worker.wake()
        await until(lambda: len(rooms.timeline) == ROOMS, 2 * PATIENCE)
        seen = [len(events) for events in rooms.timeline.values()]
        assert sum(seen) < events, "others were drained before"
        for room, found in rooms.timeline.items():
            bodies = [event["content"]["body"] for event in found]
            assert bodies == list(range(len(bodies))), room
        await rig.crash()
