"""flowbridge.store.refused: calls that were refused, on both engines; whose they are, and how many are kept."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, func, select

from flowbridge.store import refused
from flowbridge.store.delivery_log import ALL, Scope, Selection, Whose
from flowbridge.store.refused import Kept
from flowbridge.store.tables import outbox
from tests.integration.store.events import put

ROOM, OTHER = "!room:hs", "!other:hs"


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        yield connection


def call(name: str, caller: str = "", **values: Any) -> dict[str, Any]:
    return {
        "delivery": f"refused-{name}",
        "caller": caller,
        "user_id": caller if caller.startswith("@") else None,
        "api_key": caller.removeprefix("key ") if caller.startswith("key ") else None,
        "address": "192.0.2.1",
        "room_id": ROOM,
        "event_type": "m.room.message",
        "error": '{"status": 400, "errcode": "M_BAD_JSON", "error": "no"}',
        "number": 1,
        "refused_at": 1_000,
        "last_at": 1_000,
        **values,
    }


def note(connection: Connection, *calls: dict[str, Any], kept: Kept | None = None) -> None:
    refused.write(connection, calls, [], kept or Kept())


def names(connection: Connection, selection: Selection = Selection()) -> list[str]:  # noqa: B008
    return [row["delivery"].removeprefix("refused-") for row in refused.page(connection, selection, 1_000)]


def test_flood_of_one_caller_pushes_out_its_own_oldest_calls_alone(connection: Connection) -> None:
    kept = Kept(total=100, each=3)
    note(connection, call("other", "@bob:hs"), call("guest"), kept=kept)
    for number in range(6):
        note(connection, call(f"{number}", "key hog"), kept=kept)
    assert names(connection) == ["5", "4", "3", "guest", "other"]
    for number in range(6):
        note(connection, call(f"guest-{number}"), kept=kept)
    assert names(connection) == ["guest-5", "guest-4", "guest-3", "5", "4", "3", "other"]


def test_beyond_the_total_the_caller_with_most_loses_the_older_half_of_its_calls(connection: Connection) -> None:
    kept = Kept(total=6, each=5)
    note(connection, *(call(f"hog-{number}", "key hog") for number in range(5)), kept=kept)
    note(connection, call("bob", "@bob:hs"), call("guest"), kept=kept)
    assert names(connection) == ["guest", "bob", "hog-4", "hog-3"]


def test_calls_alike_raise_the_number_of_one_row(connection: Connection) -> None:
    note(connection, call("a", "@bob:hs"))
    again = {"b_delivery": "refused-a", "b_number": 41, "b_last_at": 9_000}
    refused.write(connection, [], [again])
    row = refused.get(connection, "refused-a", ALL)
    assert row is not None
    assert (row["number"], row["refused_at"], row["last_at"]) == (42, 1_000, 9_000)


def test_work_that_runs_twice_makes_one_row(connection: Connection) -> None:
    note(connection, call("a", "@bob:hs"))
    note(connection, call("a", "@bob:hs"))
    assert names(connection) == ["a"]


def test_call_stands_behind_the_events_that_were_accepted_before_it(connection: Connection) -> None:
    note(connection, call("first"))
    put(connection, "event")
    note(connection, call("second"), call("third"))
    rows = refused.page(connection, Selection(), 10)
    newest = connection.scalar(select(func.max(outbox.c.id)))
    assert [row["position"] for row in rows] == [newest, newest, 0]
    before = refused.page(connection, Selection(), 10, (rows[0]["position"], rows[0]["id"]))
    assert [row["delivery"] for row in before] == ["refused-second", "refused-first"]
    assert names(connection) == ["third", "second", "first"]
    (behind,) = refused.page(connection, Selection(), 10, (newest or 0, 0))
    assert behind["delivery"] == "refused-first", "an event's place"


@pytest.mark.parametrize(
    ("whose", "expected"),
    [
        (ALL, ["guest", "topic", "elsewhere", "two", "one", "bob"]),
        (Whose(user_id="@bob:hs"), ["bob"]),
        (Whose(api_key="one"), ["one"]),
        (Whose(api_key="one", users=("@bob:hs",)), ["one", "bob"]),
        (Whose(api_key="one", users=("@bob:hs",), scope=Scope(frozenset({OTHER}))), ["one"]),
        (Whose(scope=Scope(frozenset({ROOM}))), ["topic", "two", "one", "bob"]),
        (Whose(scope=Scope(None, ("m.room.m*",))), ["elsewhere", "two", "one", "bob"]),
        (Whose(scope=Scope(frozenset({OTHER}), ("m.room.topic",))), []),
    ],
)
def test_viewer_sees_its_own_calls_and_those_in_its_scope(
    connection: Connection, whose: Whose, expected: list[str]
) -> None:
    note(connection, call("bob", "@bob:hs"), call("one", "key one"), call("two", "key two"))
    note(connection, call("elsewhere", "key two", room_id=OTHER))
    note(connection, call("topic", "key two", event_type="m.room.topic"), call("guest"))
    assert names(connection, Selection(whose=whose)) == expected
    for name in ("bob", "one", "two", "elsewhere", "topic", "guest"):
        assert (refused.get(connection, f"refused-{name}", whose) is not None) == (name in expected)
        assert refused.remove(connection, f"refused-{name}", whose) == (name in expected)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(room_id=OTHER), ["other"]),
        (Selection(room_id=OTHER, alias="#ops:hs"), ["alias", "other"]),
        (Selection(event_type="m.room.topic"), ["topic"]),
        (Selection(since=1_001), ["topic", "other"]),
        (Selection(until=1_001), ["alias", "other", "a"]),
        (Selection(room_id="' OR 1=1 --"), []),
    ],
)
def test_filters(connection: Connection, selection: Selection, expected: list[str]) -> None:
    note(connection, call("a"), call("other", room_id=OTHER, last_at=5_000))
    note(connection, call("topic", event_type="m.room.topic", refused_at=3_000, last_at=3_000))
    note(connection, call("alias", room_id="#ops:hs"))
    assert names(connection, selection) == expected


def test_call_goes_when_the_last_one_alike_is_old(connection: Connection) -> None:
    note(connection, call("old"), call("again", last_at=5_000))
    assert refused.number(connection, 2_000) == 1
    assert refused.purge(connection, 2_000) == 1
    assert names(connection) == ["again"]
