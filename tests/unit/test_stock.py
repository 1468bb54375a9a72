"""flowbridge.store.stock: how much is queued, by whoever, and when nothing more is taken."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from flowbridge.store import StoreFull, tables
from flowbridge.store.outbox import now_ms
from flowbridge.store.stock import Limits, Stock
from tests.worker import BOB, ROOM, Rooms, Worker, soon

OTHER = "!other:hs"


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    """Its database is what is used here; nothing is offered to its courier."""
    async with Worker(f"sqlite:///{tmp_path}/flowbridge.db", Rooms()) as worker:
        yield worker


@pytest.fixture
def make(worker: Worker) -> Callable[..., Stock]:
    def make(queued: int = 100, per_lane: int = 100, database_bytes: int = 1 << 30, free_disk: int = 0) -> Stock:
        return Stock(worker.database, Limits(queued, per_lane, database_bytes, free_disk))

    return make


async def put(worker: Worker, number: int, room: str = ROOM, **values: Any) -> None:
    """Events that another process has accepted."""
    rows = [{**worker.ticket("a", room).values(), **values} for _ in range(number)]
    await worker.database.run(lambda connection: connection.execute(insert(tables.outbox), rows))


async def test_what_is_added_and_removed_is_counted_at_once(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make()
    tickets = [worker.ticket("a", room) for room in (ROOM, ROOM, OTHER)]
    for ticket in tickets:
        stock.add(ticket)
    assert stock.queued == 3
    for ticket in (tickets[0], tickets[0], worker.ticket("never added")):
        stock.remove(ticket)
    assert stock.queued == 2
    for ticket in tickets:
        stock.remove(ticket)
    assert stock.queued == 0
    assert stock._lanes == {}


async def test_what_others_accepted_counts_from_the_next_refresh_on(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make(queued=3)
    await put(worker, 2)
    await put(worker, 1, OTHER, accepted_at=now_ms() - 60_000)
    await put(worker, 1, state="sent", settled_at=1)
    await put(worker, 2, state="dead", settled_at=1)
    assert stock.queued == 0
    await stock.refresh()
    assert (stock.queued, stock.dead) == (3, 2)
    assert stock.used_bytes > 0
    with pytest.raises(StoreFull, match="3 events are queued already"):
        stock.admit("!third:hs")
    await worker.database.run(lambda connection: connection.execute(update(tables.outbox).values(state="sent")))
    await stock.refresh()
    stock.admit("!third:hs")
    assert stock.oldest_at is None


async def test_age_of_the_oldest_is_that_of_the_first_in_any_lane(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make()
    await put(worker, 1, OTHER, accepted_at=5_000)
    await put(worker, 3, accepted_at=6_000)
    await stock.refresh()
    assert stock.oldest_at == 5.0


async def test_one_room_cannot_take_all_the_room(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make(per_lane=2)
    for _ in range(2):
        stock.add(worker.ticket("a"))
    lane = worker.ticket("a").row.lane
    with pytest.raises(StoreFull, match="2 events are queued for this room already") as caught:
        stock.admit(lane)
    assert caught.value.status == 503
    assert caught.value.headers() == {"Retry-After": "10"}
    stock.admit(worker.ticket("a", OTHER).row.lane)
    stock.admit(worker.ticket("a", caller=BOB).row.lane)


async def test_what_changes_during_a_refresh_is_not_forgotten_by_it(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make()
    await put(worker, 2)
    await stock.refresh()
    leaving, coming = worker.ticket("a"), worker.ticket("b", OTHER)
    leaving.counted = True
    refreshing = asyncio.ensure_future(stock.refresh())
    await asyncio.sleep(0)
    stock.remove(leaving)
    stock.add(coming)
    stock.add(worker.ticket("c", OTHER))
    await soon(refreshing)
    assert stock.queued == 3
    assert stock._lanes == {leaving.row.lane: 1, coming.row.lane: 2}


async def test_counts_never_fall_below_nothing(worker: Worker, make: Callable[..., Stock]) -> None:
    """An outcome may be counted that a refresh has seen in the store already."""
    stock = make()
    ticket = worker.ticket("a")
    stock.add(ticket)
    await stock.refresh()
    stock.remove(ticket)
    assert stock.queued == 0
    stock.add(worker.ticket("b"))
    assert stock.queued == 1


async def test_database_that_is_too_large_takes_nothing(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make(database_bytes=1_000)
    stock.admit(ROOM)  # that is not known yet
    await stock.refresh()
    with pytest.raises(StoreFull, match=r"the database holds \d+ bytes, and 1000 are allowed"):
        stock.admit(ROOM)


async def test_space_that_deleted_events_left_is_free(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make()
    await put(worker, 200, content='{"a": "' + "x" * 2_000 + '"}')
    await stock.refresh()
    full = stock.used_bytes
    await worker.database.run(lambda connection: connection.execute(tables.outbox.delete()))
    await stock.refresh()
    assert stock.used_bytes < full / 2


async def test_disk_that_is_nearly_full_takes_nothing_until_there_is_space(
    worker: Worker, make: Callable[..., Stock], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(100, 100 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    stock = make(free_disk=11)
    await stock.refresh()
    with pytest.raises(StoreFull, match="10 bytes are free on the store's disk: flowbridge stops at 11"):
        stock.admit(ROOM)
    free = 11
    await stock.refresh()
    stock.admit(ROOM)
    assert asked == [Path(str(worker.database.url.database)).parent] * 2


async def test_refresh_that_fails_leaves_the_counts(worker: Worker, make: Callable[..., Stock]) -> None:
    stock = make()
    for _ in range(3):
        stock.add(worker.ticket("a"))
    await worker.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE outbox RENAME TO elsewhere"))
    with pytest.raises(Exception, match="no such table"):
        await stock.refresh()
    assert stock.queued == 3
    await worker.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO outbox"))


async def test_refresh_says_how_long_it_took(worker: Worker, make: Callable[..., Stock]) -> None:
    began = time.monotonic()
    seconds = await make().refresh()
    assert 0 < seconds <= time.monotonic() - began
