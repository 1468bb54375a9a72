"""flowbridge.delivery.write_queue: two threads fill and empty the same queues, and nothing is left in them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from flowbridge.delivery.pending import PendingDelivery
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Row, StoreFull, StoreUnavailable
from tests.rig import PATIENCE, soon, until
from tests.unit.delivery.test_worker import locked

T = TypeVar("T")


class Quick(Database):
    """Its writer is always faster than the event loop: what is asked for is done before `run` comes back."""

    def run(
        self, work: Callable[[Connection], T], *, lingers: bool = False, always: bool = False, **_: Any
    ) -> "asyncio.Future[T]":
        done = threading.Event()

        def noticed(connection: Connection) -> T:
            try:
                return work(connection)
            finally:
                done.set()

        future = super().run(noticed, always=always)
        assert done.wait(PATIENCE)
        return future


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncIterator[WriteQueue]:
    database = Quick(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    database.start()
    yield WriteQueue(database)
    await database.stop()


def pending(name: str) -> PendingDelivery:
    row = Row(name, "lane", "account", "!room:hs", "m.room.message", None, b"{}", name, 1)
    return PendingDelivery(row)


async def test_event_is_written_however_fast_the_writer_is(quick: WriteQueue) -> None:
    """It may look for what there is before `append` has come to its end."""
    for name in ("one", "two", "three"):
        one = pending(name)
        quick.append(one)
        await soon(one.committed)


async def test_full_queue_of_other_work_does_not_keep_the_journal_from_writing(tmp_path: Path) -> None:
    """What has been sent must be written down, whoever else waits."""
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db", max_waiting=3)
    database.open()
    database.start()
    write_queue = WriteQueue(database)
    taken, free = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        taken.set()
        free.wait(PATIENCE)

    database.run(hold)
    await until(taken.is_set)
    others = [database.run(lambda connection: None) for _ in range(3)]
    with pytest.raises(StoreFull):
        database.run(lambda connection: None)
    one = pending("one")
    write_queue.append(one)
    free.set()
    await soon(one.committed)
    await asyncio.gather(*others)
    await database.stop()


async def test_store_that_could_not_even_be_reached_is_told_and_later_written_to(tmp_path: Path) -> None:
    """BEGIN itself failed: the work was never called, and who waits must hear of it all the same."""
    impatient = Timing(sqlite_busy_seconds=0.02, store_retry_seconds=0.05)
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db", timing=impatient)
    database.open()
    database.start()
    write_queue = WriteQueue(database)
    with locked(tmp_path / "flowbridge.db"):
        for name in ("one", "two"):
            lost = pending(name)
            write_queue.append(lost)
            with pytest.raises(StoreUnavailable):
                await soon(lost.committed)
    found = pending("three")
    write_queue.append(found)
    await soon(found.committed)
    await database.stop()
