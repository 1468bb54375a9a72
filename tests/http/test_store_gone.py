"""A bridge whose PostgreSQL loses the tables or the database, and one whose disk takes nothing more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from flowbridge.models.timing import Timing
from tests.http.conftest import HELLO, SEND, Bridge, as_caller, running
from tests.http.sends import ASYNC, KEYED
from tests.patience import until
from tests.postgres import LocalPostgres
from tests.upstream import Rooms, Upstream


@pytest.fixture
def url(postgres: LocalPostgres) -> str:
    return postgres.fresh_database()


@pytest.fixture
def own(upstream: Upstream, tmp_path: Path, url: str) -> Iterator[Bridge]:
    secrets: dict[str, Any] = {"database_url": SecretStr(url), "secret_key": SecretStr(Fernet.generate_key().decode())}
    with running(upstream, tmp_path, timing=Timing(store_retry_seconds=0.5), **secrets) as bridge:
        yield bridge


def drop_table(url: str) -> None:
    tell(url, "DROP TABLE outbox")


def drop_all_tables(url: str) -> None:
    tell(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


def drop_database(url: str) -> None:
    tell(as_admin(url), f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')


def make_it_anew(url: str) -> None:
    drop_database(url)
    tell(as_admin(url), f'CREATE DATABASE "{make_url(url).database}" TEMPLATE template0')


@pytest.mark.parametrize("harm", [drop_table, drop_all_tables, drop_database, make_it_anew])
def test_nothing_is_accepted_and_it_says_why(own: Bridge, rooms: Rooms, url: str, harm: object) -> None:
    with as_caller(own) as caller:
        assert caller.post(SEND, json=HELLO).status_code == 200
        assert callable(harm)
        harm(url)
        for headers in ({}, ASYNC, KEYED):
            refused(caller.post(SEND, json=HELLO, headers=headers))
        refused(caller.get("/deliveries"))
        not_ready = refused(caller.get("/readyz"))
        assert not_ready.json()["flowbridge"]["failed"] == "store"
    assert len(rooms.events) == 1


def test_event_that_the_store_may_have_taken_is_not_said_to_be_refused(
    own: Bridge, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers to commits get lost for longer than they are tried again: these were done all the same."""
    commit: Any = PGDialect_psycopg.do_commit

    def lose(self: Any, connection: Any) -> None:
        commit(self, connection)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    with as_caller(own) as caller:
        assert caller.post(SEND, json=HELLO).status_code == 200
        monkeypatch.setattr(PGDialect_psycopg, "do_commit", lose)
        for headers in ({}, ASYNC, KEYED):
            unsure = caller.post(SEND, json=HELLO, headers=headers)
            assert unsure.status_code == 504, unsure.text
            assert "may have taken this" in unsure.json()["error"]
            assert "Retry-After" not in unsure.headers
        monkeypatch.undo()
        until(lambda: len(rooms.events) == 4)
        found = caller.post(SEND, json=HELLO, headers=KEYED)
        assert (found.status_code, found.headers["Idempotent-Replayed"]) == (200, "true")
    assert len(rooms.events) == 4


def refused(answer: httpx.Response) -> httpx.Response:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["errcode"] == "M_UNKNOWN"
    return answer


def as_admin(url: str) -> str:
    return make_url(url).set(database="postgres").render_as_string(hide_password=False)


def tell(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
