"""flowbridge.store.log_blocks: which pieces of the delivery log a search may pass over."""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, delete, insert, select

from flowbridge.store import Database, clock, delivery_log, log_blocks, outbox, tables
from flowbridge.store.delivery_log import Scope, Selection, Whose
from tests.integration.store import events as rows

HOUR = 3_600_000
Seen = list[str]


@pytest.fixture
def database(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    database.open()
    yield database
    database.close()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """For no bridge that runs in this process, too: it would write filters that mean other ids a moment later."""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flowbridge-serve")]
    monkeypatch.setattr(log_blocks, "SIZE", 4)
    monkeypatch.setattr(log_blocks, "READ", 5)


def put(connection: Connection, *events: dict[str, object], ago: int = HOUR) -> None:
    for event in events:
        event["accepted_at"] = clock.now_ms() - ago
    outbox.insert_rows(connection, list(events))


def filled(connection: Connection) -> int:
    """Make all filters that can be made; returns how many."""
    number = 0
    while found := log_blocks.missing(connection, 3):
        log_blocks.add(connection, found)
        number += len(found)
    return number


def history(connection: Connection) -> None:
    """A hundred events, with rare ones far apart."""
    for number in range(100):
        name, room = f"e{number}", f"!{number % 7}:hs"
        event = rows.event(name, f"acc{number % 5}|{room}")
        if number in (3, 50, 97):
            event["room_id"], event["event_type"], event["caller_key"] = "!rare:hs", "org.rare", f"key{number}"
        if number in (20, 60):
            event["api_key"] = "rarekey"
        put(connection, event)


def found(connection: Connection, selection: Selection, span: int | None = None) -> Seen:
    seen: Seen = []
    before: int | None = None
    while True:
        page, before = delivery_log.page(connection, selection, 2, before, span)
        seen += [row["delivery"] for row in page]
        if before is None:
            return seen


SELECTIONS = {
    "a rare room": Selection(room_id="!rare:hs"),
    "a room": Selection(room_id="!2:hs"),
    "no such room": Selection(room_id="!none:hs"),
    "a rare type": Selection(event_type="org.rare"),
    "a rare type in a room": Selection(event_type="org.rare", room_id="!2:hs"),
    "a key": Selection(key="key50"),
    "no such key": Selection(key="nothing"),
    "an api key": Selection(whose=Whose(api_key="rarekey")),
    "no such user": Selection(whose=Whose(user_id="@nobody:hs")),
    "a scope": Selection(whose=Whose(scope=Scope(frozenset({"!rare:hs", "!1:hs"}), ("org.rare", "m.room.message")))),
    "a scope of types": Selection(whose=Whose(scope=Scope(None, ("org.*",)))),
    "sent in a room": Selection(states=("sent",), room_id="!rare:hs"),
}


@pytest.mark.parametrize("span", [None, 5])
@pytest.mark.parametrize("name", SELECTIONS)
def test_search_finds_the_same_with_filters_and_without(database: Database, name: str, span: int | None) -> None:
    selection = SELECTIONS[name]
    with database.engine.begin() as connection:
        history(connection)
        without = found(connection, selection, span)
        assert filled(connection) >= 20
        assert found(connection, selection, span) == without
        put(connection, rows.event("newest", "acc|!rare:hs"))
        connection.execute(delete(tables.log_blocks).where(tables.log_blocks.c.block == 12))
        among = found(connection, selection, span)
        assert [one for one in among if one != "newest"] == without


def test_search_reads_only_pieces_that_may_have_a_match(database: Database) -> None:
    with database.engine.begin() as connection:
        history(connection)
        filled(connection)
        ids = dict(connection.execute(select(tables.outbox.c.delivery, tables.outbox.c.id)).all())
        windows = list(log_blocks.windows(connection, [{("r", "!rare:hs")}], min(ids.values()), max(ids.values()) + 1))
        assert sum(high - low for low, high in windows) < 40  # three of 25, the newest, and what is taken for one
        for name in ("e3", "e50", "e97"):
            assert any(low <= ids[name] < high for low, high in windows)
        assert [low for low, _ in windows] == sorted((low for low, _ in windows), reverse=True)


def test_piece_that_may_still_grow_has_no_filter(database: Database) -> None:
    """Another replica, with an older id, may commit later."""
    with database.engine.begin() as connection:
        for number in range(12):
            put(connection, rows.event(f"old{number}", "acc|!a:hs"))
        known = filled(connection)
        for number in range(12):
            put(connection, rows.event(f"new{number}", "acc|!a:hs"), ago=0)
        assert filled(connection) <= 1
        assert known >= 2


def test_filters_of_what_is_deleted_are_forgotten(database: Database) -> None:
    with database.engine.begin() as connection:
        history(connection)
        number = filled(connection)
        first = connection.scalar(select(tables.outbox.c.id).where(tables.outbox.c.delivery == "e50"))
        connection.execute(delete(tables.outbox).where(tables.outbox.c.id < first))
        assert log_blocks.forget(connection) >= 10
        left = list(connection.scalars(select(tables.log_blocks.c.block).order_by(tables.log_blocks.c.block)))
        assert len(left) < number - 9
        assert left[0] == (first or 0) // log_blocks.SIZE


def test_two_replicas_may_make_the_same_filter(database: Database) -> None:
    with database.engine.begin() as connection:
        history(connection)
        some = log_blocks.missing(connection, 2)
        log_blocks.add(connection, some)
        log_blocks.add(connection, some)
        assert len(some) == 2


def test_ends_of_a_search_may_be_anything(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(insert(tables.accounts), [{"account": "acc", "user_id": "@a:hs"}])
        history(connection)
        filled(connection)
        for before in (0, 1, 2**31, 2**63 - 1):
            delivery_log.page(connection, Selection(room_id="!none:hs"), 2, before, 10)
        until = Selection(until=clock.now_ms() - 100 * HOUR)
        assert found(connection, until) == []
        assert found(connection, Selection(until=clock.now_ms())) == [f"e{number}" for number in range(99, -1, -1)]
