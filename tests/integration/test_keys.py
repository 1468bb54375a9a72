"""flowbridge.store.api_keys, on both engines."""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from flowbridge.models import ApiKey
from flowbridge.store import Database, api_keys


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.open(shared=True, make=True)
    yield database
    database.engine.dispose()


@pytest.fixture
def other(database: Database, database_url: str) -> Iterator[Database]:
    """Another process on the same database."""
    other = Database(database_url)
    other.open(shared=True, make=True)
    yield other
    other.engine.dispose()


FULL = ApiKey("full", "Töpfe", ("!a:hs", "#ö:hs"), ("m.room.*", "org.x"), admin=True, users=("@é:hs",))


def test_key_comes_back_as_it_was(database: Database) -> None:
    with database.engine.begin() as connection:
        api_keys.add(connection, FULL, "fb_full")
        api_keys.add(connection, ApiKey("bare"), "fb_bare")
    with database.engine.begin() as connection:
        assert sorted(api_keys.valid(connection)) == sorted(
            [(api_keys.digest("fb_full"), FULL), (api_keys.digest("fb_bare"), ApiKey("bare"))]
        )
        full, bare = sorted(api_keys.every(connection), key=lambda entry: entry.key.id, reverse=True)
    assert (full.key, bare.key) == (FULL, ApiKey("bare"))
    assert full.created_at > 1_700_000_000_000
    assert full.revoked_at is full.used_at is None


def test_neither_id_nor_key_can_be_there_twice(database: Database) -> None:
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("one"), "fb_one")
    for id_, secret in (("one", "fb_two"), ("two", "fb_one")):
        with pytest.raises(IntegrityError), database.engine.begin() as connection:
            api_keys.add(connection, ApiKey(id_), secret)


def test_key_itself_is_nowhere_in_the_table(database: Database) -> None:
    secret = api_keys.new_secret()
    with database.engine.begin() as connection:
        api_keys.add(connection, FULL, secret)
        row = connection.execute(text("SELECT * FROM api_keys")).one()
    assert secret[3:] not in repr(row)
    assert api_keys.digest(secret).hex() in repr(row)


def test_revoked_key_opens_nothing_and_stays_in_the_list(database: Database) -> None:
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("one"), "fb_one")
        api_keys.add(connection, ApiKey("two"), "fb_two")
        at = api_keys.revoke(connection, "one")
        assert at is not None
        assert api_keys.revoke(connection, "one") == at
        assert api_keys.revoke(connection, "nobody") is None
        assert api_keys.valid(connection) == [(api_keys.digest("fb_two"), ApiKey("two"))]
        assert {entry.key.id: entry.revoked_at for entry in api_keys.every(connection)} == {"one": at, "two": None}


def test_last_use_only_moves_on(database: Database) -> None:
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("one"), "fb_one")
        for at in (5, 9, 7):
            api_keys.note_use(connection, {"one": at, "nobody": 1})
        assert api_keys.every(connection)[0].used_at == 9


def test_first_key_is_made_only_where_there_was_none(database: Database) -> None:
    with database.engine.begin() as connection:
        assert api_keys.add_first(connection, "fb_first")
        assert not api_keys.add_first(connection, "fb_other")
        assert api_keys.valid(connection) == [(api_keys.digest("fb_first"), ApiKey("first", "first", admin=True))]
        connection.execute(text("DELETE FROM api_keys"))
        api_keys.add(connection, ApiKey("one"), "fb_one")
        api_keys.revoke(connection, "one")
        assert not api_keys.add_first(connection, "fb_first")


@pytest.mark.parametrize("commits", [True, False])
def test_two_replicas_at_once_make_one_first_key(database: Database, other: Database, *, commits: bool) -> None:
    made: list[bool] = []

    def second() -> None:
        with other.engine.begin() as connection:
            made.append(api_keys.add_first(connection, "fb_second"))

    thread = threading.Thread(target=second)
    with database.engine.connect() as connection:
        assert api_keys.add_first(connection, "fb_first")
        thread.start()
        if commits:
            connection.commit()
        else:
            connection.rollback()
    thread.join(20)
    assert made == [not commits]
    with database.engine.begin() as connection:
        assert [digest for digest, _ in api_keys.valid(connection)] == [
            api_keys.digest("fb_first" if commits else "fb_second")
        ]


def test_secrets_hold_256_bits_and_differ() -> None:
    made = {api_keys.new_secret() for _ in range(100)}
    assert len(made) == 100
    assert {len(secret) for secret in made} == {len("fb_") + 43}
