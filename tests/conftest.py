"""A real Synapse and a real PostgreSQL for the whole run, each started when the first test asks for it."""

import gc
import inspect
import itertools
import os
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
from flowbridge.web.server import tune_collector
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres, why_unavailable

MakeAccount = Callable[[], Account]
MakeRoom = Callable[..., str]
NewDatabase = Callable[[], str]

# httpx's default limit is 5 s, which a busy machine reaches.
_DEFAULT: httpx.Timeout = inspect.signature(httpx.Client).parameters["timeout"].default
_DEFAULT.connect = _DEFAULT.read = _DEFAULT.write = _DEFAULT.pool = PATIENCE

# Hypothesis takes an example of 200 ms, or a second spent generating ten, for a fault of the test.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

# Encryption is tested where a test asks for it: by default the bridge would, since its library is installed here.
os.environ.setdefault("FLOWBRIDGE_ENCRYPTED_ROOMS", "refuse")

gc.disable()  # until all tests are collected: to look through them again and again took a third of that time


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """As the bridge does: never look again through what stays, here every test, and seldom through the rest."""
    tune_collector()
    gc.enable()


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: four workers on two cores, since tests wait for processes and deadlines much of their time."""
    return max(4, (os.cpu_count() or 1) * 3 // 2)


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
def synapse() -> Iterator[LocalSynapse]:
    """One for all tests: a test that stops it or changes its limits starts its own."""
    with LocalSynapse(rate_limits=False) as homeserver:
        yield homeserver


@pytest.fixture(scope="session")
def make_account(synapse: LocalSynapse) -> MakeAccount:
    """`make_account()`: a new user with a random name."""
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


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalPostgres]:
    """One server for all tests, each with its `fresh_database()`. A test that stops it takes `own_postgres`."""
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
    """The URL of one database for all tests of an engine: PostgreSQL needs a while to create one."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database()
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/flowbridge.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """`new_database()`: the URL of a database that is empty or does not exist yet. The test runs on each engine."""
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
    """Another account on the same homeserver."""
    return make_account()


@pytest.fixture
def empty_url(kept_url: str) -> str:
    """The URL of a database with empty tables. The test runs on each engine."""
    database = Database(kept_url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    database.engine.dispose()
    return kept_url
