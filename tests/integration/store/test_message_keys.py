"""Callers' keys for messages: whose they are, how long they are kept, and how many."""

import pytest
from sqlalchemy import Engine, func, select

from flowbridge.store import message_keys, retention
from flowbridge.store.tables import message_keys as table
from tests.integration.store.events import put

ROOM = "!room:hs"


def test_key_stands_for_one_delivery_of_an_owner_and_room(engine: Engine) -> None:
    with engine.begin() as connection:
        message_keys.assign(connection, "a", ROOM, "k", "first", 1)
        message_keys.assign(connection, "b", ROOM, "k", "other", 1)
        message_keys.assign(connection, "a", ROOM, "k", "second", 2)
        assert message_keys.find(connection, "a", ROOM, "k") == {"delivery": "second", "event_id": None}
        assert message_keys.find(connection, "b", ROOM, "k") == {"delivery": "other", "event_id": None}
        assert message_keys.find(connection, "a", "!other:hs", "k") is None
        assert message_keys.find(connection, "a", ROOM, "K") is None


def test_key_keeps_its_story_until_a_message_of_none_has_it(engine: Engine) -> None:
    with engine.begin() as connection:
        message_keys.assign(connection, "a", ROOM, "k", "first", 1, event_id="$1", story="told")
        assert message_keys.read(connection, "a", ROOM, "k") == ("first", "$1", "told")
        assert message_keys.read(connection, "a", ROOM, "other") is None
        message_keys.touch(connection, "a", ROOM, "k", 2)
        assert message_keys.read(connection, "a", ROOM, "k") == ("first", "$1", None)
        message_keys.assign(connection, "a", ROOM, "k", "second", 3, story="told")
        message_keys.assign(connection, "a", ROOM, "k", "third", 4)
        assert message_keys.read(connection, "a", ROOM, "k") == ("third", None, None)


def test_event_id_of_a_deleted_delivery_is_kept(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "sent", state="sent", event_id="$1", settled_at=1)
        put(connection, "dead", state="dead", settled_at=1)
        put(connection, "unnamed", state="sent", event_id="$3", settled_at=1)
        for delivery in ("sent", "dead"):
            message_keys.assign(connection, "a", ROOM, delivery, delivery, 1)
        assert retention.purge(connection, 5, 5) == 3
        assert message_keys.find(connection, "a", ROOM, "sent") == {"delivery": "sent", "event_id": "$1"}
        assert message_keys.find(connection, "a", ROOM, "dead") == {"delivery": "dead", "event_id": None}
        assert message_keys.of_delivery(connection, "sent") == "$1"
        assert message_keys.of_delivery(connection, "dead") is None
        assert message_keys.of_delivery(connection, "unnamed") is None


def test_keys_that_are_not_used_are_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "PURGED", 2)
    with engine.begin() as connection:
        for number in range(5):
            message_keys.assign(connection, "a", ROOM, str(number), "d", number)
        message_keys.touch(connection, "a", ROOM, "0", 10)
        assert [message_keys.forget(connection, 4) for _ in range(3)] == [2, 1, 0]
        assert message_keys.find(connection, "a", ROOM, "0") is not None
        assert connection.scalar(select(func.count()).select_from(table)) == 2


def test_owner_has_so_many_keys_and_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "MAX_KEYS", 3)
    with engine.begin() as connection:
        message_keys.assign(connection, "other", ROOM, "k", "d", 0)
        for number in range(5):
            message_keys.assign(connection, "a", ROOM, str(number), "d", number)
            message_keys.assign(connection, "a", ROOM, str(number), "d", number)  # the same again takes no more room
        kept = [key for key in map(str, range(5)) if message_keys.find(connection, "a", ROOM, key)]
        assert kept == ["2", "3", "4"]
        assert message_keys.find(connection, "other", ROOM, "k") is not None


def test_owner_with_many_keys_is_counted_now_and_then(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "MAX_KEYS", 300)
    chances = iter([1] * 400 + [0])
    monkeypatch.setattr(message_keys.random, "randrange", lambda number: next(chances))
    with engine.begin() as connection:
        for number in range(400):
            message_keys.assign(connection, "a", ROOM, str(number), "d", number)
        assert connection.scalar(select(func.count()).select_from(table)) == 400
        message_keys.assign(connection, "a", ROOM, "400", "d", 400)
        assert connection.scalar(select(func.count()).select_from(table)) == 300
        assert message_keys.find(connection, "a", ROOM, "101") is not None
