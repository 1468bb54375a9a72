"""Fixtures for more than one file."""

from pathlib import Path

import pytest

from flowbridge.settings import Settings
from flowbridge.store import Database
from flowbridge.store.tables import metadata
from tests.postgres import LocalPostgres


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, and no `.env` in the folder."""
    for name in Settings.model_fields:
        for variable in (name.upper(), f"FLOWBRIDGE_{name.upper()}"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(f"{variable}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def kept_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of one database for all tests of an engine: making one takes PostgreSQL a while."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database()
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/flowbridge.db"


@pytest.fixture
def empty_url(kept_url: str) -> str:
    """The URL of a database with nothing in its tables. The test runs on each engine."""
    database = Database(kept_url)
    database.open(shared=True)
    with database.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    database.engine.dispose()
    return kept_url
