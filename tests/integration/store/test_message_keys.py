"""Callers' keys for messages: whose they are, how long they are kept, and how many."""

import pytest
from sqlalchemy import Connection, Engine, func, select

from flowbridge.store import message_keys, retention
from flowbridge.store.message_keys import Known
from flowbridge.store.tables import message_keys as table
from tests.integration.store.events import put

ROOM = "!room:hs"


def assign(connection: Connection, owner: str, room_id: str, key: str, delivery: str, now: int) -> None:
    message_keys.write(connection, {(owner, room_id, key): Known(delivery)}, now)


def find(connection: Connection, owner: str, room_id: str, key: str) -> dict[str, str | None] | None:
    known = message_keys.read(connection, [(owner, room_id, key)]).get((owner, room_id, key))
    return {"delivery": known.delivery, "event_id": known.event_id} if known else None


def test_key_stands_for_one_delivery_of_an_owner_and_room(engine: Engine) -> None:
    with engine.begin() as connection:
        assign(connection, "a", ROOM, "k", "first", 1)
        assign(connection, "b", ROOM, "k", "other", 1)
        assign(connection, "a", ROOM, "k", "second", 2)
        assert find(connection, "a", ROOM, "k") == {"delivery": "second", "event_id": None}
        assert find(connection, "b", ROOM, "k") == {"delivery": "other", "event_id": None}
        assert find(connection, "a", "!other:hs", "k") is None
        assert find(connection, "a", ROOM, "K") is None


def test_keys_are_read_and_written_together(engine: Engine) -> None:
    told = {
        ("a", ROOM, "k"): Known("first", "$1", '{"said": []}'),
        ("a", ROOM, "ü 🔥 'x' \"y\""): Known("second"),
        ("b", "!other:hs", "k"): Known("third", None, "told"),
    }
    with engine.begin() as connection:
        message_keys.write(connection, {}, 0)
        message_keys.write(connection, told, 1)
        assert message_keys.read(connection, [*told, ("a", ROOM, "other")]) == told
        assert message_keys.read(connection, []) == {}
        message_keys.write(connection, {("a", ROOM, "k"): Known("fourth")}, 2)
        assert message_keys.read(connection, told) == {**told, ("a", ROOM, "k"): Known("fourth")}


def test_event_id_of_a_deleted_delivery_is_kept(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "sent", state="sent", event_id="$1", settled_at=1)
        put(connection, "dead", state="dead", settled_at=1)
        put(connection, "unnamed", state="sent", event_id="$3", settled_at=1)
        for delivery in ("sent", "dead"):
            assign(connection, "a", ROOM, delivery, delivery, 1)
        assert retention.purge(connection, 5, 5) == 3
        assert find(connection, "a", ROOM, "sent") == {"delivery": "sent", "event_id": "$1"}
        assert find(connection, "a", ROOM, "dead") == {"delivery": "dead", "event_id": None}
        assert message_keys.of_delivery(connection, "sent") == "$1"
        assert message_keys.of_delivery(connection, "dead") is None
        assert message_keys.of_delivery(connection, "unnamed") is None


def test_keys_that_are_not_used_are_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "PURGED", 2)
    with engine.begin() as connection:
        for number in range(5):
            assign(connection, "a", ROOM, str(number), "d", number)
        assign(connection, "a", ROOM, "0", "d", 10)
        assert [message_keys.forget(connection, 4) for _ in range(3)] == [2, 1, 0]
        assert find(connection, "a", ROOM, "0") is not None
        assert connection.scalar(select(func.count()).select_from(table)) == 2


def test_owner_has_so_many_keys_and_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "MAX_KEYS", 3)
    with engine.begin() as connection:
        assign(connection, "other", ROOM, "k", "d", 0)
        for number in range(5):
            assign(connection, "a", ROOM, str(number), "d", number)
            assign(connection, "a", ROOM, str(number), "d", number)  # the same again takes no more room
        kept = [key for key in map(str, range(5)) if find(connection, "a", ROOM, key)]
        assert kept == ["2", "3", "4"]
        assert find(connection, "other", ROOM, "k") is not None


def test_owner_with_many_keys_is_counted_now_and_then(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "MAX_KEYS", 300)
    chances = iter([0.9] * 400 + [0.1])
    monkeypatch.setattr("flowbridge.store.message_keys.random.random", lambda: next(chances))
    with engine.begin() as connection:
        for number in range(400):
            assign(connection, "a", ROOM, str(number), "d", number)
        assert connection.scalar(select(func.count()).select_from(table)) == 400
        assign(connection, "a", ROOM, "400", "d", 400)
        assert connection.scalar(select(func.count()).select_from(table)) == 300
        assert find(connection, "a", ROOM, "101") is not None
