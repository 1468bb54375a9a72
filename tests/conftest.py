"""A real Synapse, and a real PostgreSQL, for the whole run, each started when the first test asks for it."""

import inspect
import itertools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.store import Database
from flowbridge.store.tables import metadata
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres
from tests.postgres import kept_url as kept_url
from tests.postgres import own_postgres as own_postgres
from tests.postgres import postgres as postgres

MakeAccount = Callable[[], Account]
MakeRoom = Callable[..., str]
NewDatabase = Callable[[], str]

# For a call that names no limit httpx has one of 5 s, which a busy machine reaches.
_DEFAULT: httpx.Timeout = inspect.signature(httpx.Client).parameters["timeout"].default
_DEFAULT.connect = _DEFAULT.read = _DEFAULT.write = _DEFAULT.pool = PATIENCE

# Hypothesis takes an example that lasts 200 ms, or the making of ten that lasts a second, for a fault of the test.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def synapse() -> Iterator[LocalSynapse]:
    """One for all tests: whoever stops it or changes its limits starts another of their own."""
    with LocalSynapse(rate_limits=False) as homeserver:
        yield homeserver


@pytest.fixture(scope="session")
def make_account(synapse: LocalSynapse) -> MakeAccount:
    """`make_account()`: a new user of a random name."""
    return lambda: synapse.register(f"user-{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def make_room(synapse: LocalSynapse) -> Iterator[MakeRoom]:
    """`make_room(account, preset="public_chat", …)`: the id of a new room, made with this createRoom body."""
    with httpx.Client(base_url=synapse.url, trust_env=False) as client:

        def make(account: Account, **body: Any) -> str:
            headers = {"Authorization": f"Bearer {account.access_token}"}
            response = client.post("/_matrix/client/v3/createRoom", json=body, headers=headers)
            return str(response.raise_for_status().json()["room_id"])

        yield make


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """`new_database()`: the URL of a database that is empty, or not there yet. The test runs on each engine."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database
    numbers = itertools.count(1)
    return lambda: f"sqlite:///{tmp_path}/flowbridge-{next(numbers)}.db"


@pytest.fixture
def database_url(new_database: NewDatabase) -> str:
    return new_database()


@pytest.fixture
def bot(make_account: MakeAccount) -> Account:
    """The account that the bridge acts as."""
    return make_account()


@pytest.fixture
def friend(make_account: MakeAccount) -> Account:
    """Somebody else on the same homeserver."""
    return make_account()


@pytest.fixture
def empty_url(kept_url: str) -> str:
    """The URL of a database with nothing in its tables. The test runs on each engine."""
    database = Database(kept_url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    database.engine.dispose()
    return kept_url
