"""flowbridge.services.readings: what callers read of the delivery log, in turns and beside the writer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowbridge.services.readings import Readings
from flowbridge.store import Database, delivery_log
from tests.integration.store.events import put, states
from tests.integration.store.test_database import busy, count
from tests.patience import PATIENCE


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    database.start()
    yield database
    await database.stop()


async def test_reading_does_not_wait_for_the_writer(database: Database) -> None:
    readings = Readings(database)
    await database.run(lambda connection: put(connection, "one"))
    async with busy(database), asyncio.timeout(PATIENCE / 2):
        assert await readings.read(count) == 1
        assert await readings.find(lambda connection: delivery_log.get(connection, "one")) is not None


async def test_what_is_not_there_yet_is_found_at_the_writer(database: Database) -> None:
    readings = Readings(database)
    linger = database.run(lambda connection: put(connection, "one"), lingers=True)
    assert await readings.find(lambda connection: delivery_log.get(connection, "one")) is not None
    assert await readings.find(lambda connection: delivery_log.get(connection, "two")) is None
    await linger


async def test_last_reading_sees_what_was_asked_of_the_writer_before(database: Database) -> None:
    readings = Readings(database)
    linger = database.run(lambda connection: put(connection, "one"), lingers=True)
    assert list(await readings.read_last(states)) == ["one"]
    assert linger.done()
