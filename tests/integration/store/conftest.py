"""A database on each engine in turn, empty at the beginning of each test."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import Engine

from flowbridge.store import Database
from flowbridge.store.tables import metadata
from tests.postgres import LocalPostgres


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def kept_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of one database for all tests of an engine: making one takes PostgreSQL a while."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database()
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/flowbridge.db"


@pytest.fixture
def url(kept_url: str) -> str:
    database = Database(kept_url)
    database.open()
    with database.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    database.close()
    return kept_url


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
