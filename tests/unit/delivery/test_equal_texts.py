"""An event in doubt whose text was sent before: the earlier one is not it, even where its row is gone by then.

With a token that has no device the homeserver shows no transaction id: events are told by what they say alone.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, func, select, update

from flowbridge.store import delivery_log, holdings, retention, tables
from flowbridge.store.clock import now_ms
from flowbridge.store.retention import NEEDED_MS
from tests.rig import SERVICE, MakeRig, Rig, Rooms, accept, lose, silence, soon, until

ALWAYS = 2**62
TEXT = "disk full"


@pytest.fixture(autouse=True)
def _no_txn_ids(rooms: Rooms) -> None:
    rooms.shows_txn_ids = False


def purge(connection: Connection) -> int:
    return retention.purge(connection, ALWAYS, ALWAYS)


def drop(connection: Connection) -> int:
    caller = str(connection.scalar(select(tables.outbox.c.account)))
    return holdings.drop(connection, [id_ for id_, _ in holdings.oldest(connection, caller, "sent")], "sent")


def remove(connection: Connection) -> int:
    return delivery_log.remove(connection, str(connection.scalar(select(tables.outbox.c.delivery))))


def remembered(connection: Connection) -> list[str]:
    return list(connection.scalars(select(tables.gone.c.event_id).order_by(tables.gone.c.event_id)))


async def crash_before_it_is_there(rig: Rig, rooms: Rooms) -> None:
    await until(lambda: len(rooms.sends) == 2)
    await rig.crash()


async def check_that_it_comes(make: MakeRig, rooms: Rooms) -> None:
    """The second of two equal texts."""
    async with make() as rig:
        await rig.settled()
        assert rooms.bodies() == [TEXT, TEXT]
        assert rig.rows("state", "event_id") == [("sent", "$2")]


@pytest.mark.parametrize("forget", [purge, retention.purge_oldest, drop, remove])
async def test_event_is_sent_after_a_crash_when_the_row_of_an_equal_one_is_gone(
    make: MakeRig, rooms: Rooms, forget: Callable[[Connection], int]
) -> None:
    async with make() as rig:
        await rig.send(TEXT, caller=SERVICE)
        await rig.settled()
        assert await rig.database.run(forget) == 1
        assert rig.rows("id") == []
        rooms.then(silence)
        await rig.accept(TEXT, caller=SERVICE)
        await crash_before_it_is_there(rig, rooms)
    await check_that_it_comes(make, rooms)


async def test_event_that_is_replayed_is_sent_after_a_crash_though_it_is_there_once(
    make: MakeRig, rooms: Rooms
) -> None:
    async with make() as rig:
        await rig.send(TEXT, caller=SERVICE)
        await rig.settled()
        (delivery,) = rig.rows("delivery")
        rooms.then(silence)
        replay = partial(delivery_log.replay, delivery=delivery, txn_id="again", by="somebody")
        assert await rig.database.run(replay, alone=True) is not None
        rig.worker.wake()
        await crash_before_it_is_there(rig, rooms)
    await check_that_it_comes(make, rooms)


async def test_event_that_is_there_is_found_though_the_row_of_an_equal_one_is_gone(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await rig.send(TEXT, caller=SERVICE)
        await rig.settled()
        assert await rig.database.run(purge) == 1
        rooms.then(lose, silence)
        await rig.accept(TEXT, caller=SERVICE)
        await until(lambda: len(rooms.sends) == 2)
        await rig.crash()
    rooms.forget()
    rooms.script(lambda _: accept)
    async with make() as rig:
        await rig.settled()
        assert rooms.bodies() == [TEXT, TEXT]
        assert rig.rows("event_id") == ["$2"]


async def test_ids_are_kept_for_as_long_as_they_tell_something(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        for number in range(3):
            await rig.send(f"{number}", caller=SERVICE)
        await rig.settled()
        work = rig.database.run

        def age(table: Any, *event_ids: str, by: int = NEEDED_MS + 1) -> "asyncio.Future[Any]":
            old = update(table).where(table.c.event_id.in_(event_ids)).values(settled_at=now_ms() - by)
            return work(lambda connection: connection.execute(old))

        await age(tables.outbox, "$1")
        assert await work(purge) == 3
        assert await work(remembered) == ["$2", "$3"]
        await age(tables.gone, "$2")
        assert await work(retention.forget_ids) == 1
        # An event that has waited for a long time is told from what was sent before it, and while it waited.
        blocked = asyncio.Event()
        rooms.always(lambda *_: soon(blocked.wait()))
        await rig.accept("waits", caller=SERVICE)
        waiting = update(tables.outbox).values(accepted_at=now_ms() - 10 * NEEDED_MS)
        await work(lambda connection: connection.execute(waiting))
        await age(tables.gone, "$3", by=11 * NEEDED_MS - 1_000)
        assert await work(retention.forget_ids) == 0
        await age(tables.gone, "$3", by=11 * NEEDED_MS + 10_000)
        assert await work(retention.forget_ids) == 1
        assert await work(lambda connection: connection.scalar(select(func.count()).select_from(tables.gone))) == 0
        await rig.crash()
