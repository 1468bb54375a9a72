"""The PostgreSQL that tests run on, or why there is none."""

import os
from collections.abc import Iterator

import pytest

from benchmarks.postgres import LocalPostgres, PostgresError, why_unavailable

__all__ = [
    "LocalPostgres",
    "PostgresError",
    "kept_url",
    "own_postgres",
    "postgres",
    "require_postgres",
    "why_unavailable",
]


def require_postgres(*, private: bool = False) -> None:
    """Skip the test, saying why, when there is no PostgreSQL; in CI, fail it.

    Where TEST_DATABASE_URL names one, a test that would kill it is skipped in CI, too.
    """
    if why := why_unavailable(private=private):
        required = os.environ.get("CI", "").lower() not in ("", "0", "false")
        if not required or (private and os.environ.get("TEST_DATABASE_URL")):
            pytest.skip(f"NOT TESTED ON POSTGRESQL: {why}")
        pytest.fail(f"CI must test on PostgreSQL. {why}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalPostgres]:
    """One server for all tests, each with its `fresh_database()`: whoever stops it takes own_postgres."""
    require_postgres()
    with LocalPostgres() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[LocalPostgres]:
    """A server of the test's own, to kill, stop and start."""
    require_postgres(private=True)
    with LocalPostgres(private=True) as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def kept_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of one database for all tests of an engine: making one takes PostgreSQL a while."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database()
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/flowbridge.db"
