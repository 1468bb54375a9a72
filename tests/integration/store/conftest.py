"""A database on each engine in turn, empty at the beginning of each test."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import Engine

from flowbridge.store import Database


@pytest.fixture
def url(empty_url: str) -> str:
    return empty_url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """Open and at work."""
    database = Database(url)
    database.open()
    database.start()
    yield database
    await database.stop()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """Only open: each `with engine.begin()` is a transaction of its own."""
    database = Database(url)
    database.open()
    yield database.engine
    database.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is broken on purpose need not be in the report of a test that fails."""
    logger = logging.getLogger("flowbridge")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)
