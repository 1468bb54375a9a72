"""flowbridge.services.refused_calls: what is noted of a refused call, and the share of a flood."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flowbridge.errors import BadRequest, MatrixError, Unauthorized
from flowbridge.limits import peer
from flowbridge.services import refused_calls
from flowbridge.services.refused_calls import RefusedCalls
from flowbridge.store import Database, refused
from flowbridge.store.delivery_log import Selection
from flowbridge.store.refused import Kept
from tests.integration.store.test_database import busy

ROOM, TYPE = "!room:hs", "m.room.message"
WRONG = BadRequest("m.room.message: body is missing")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    database.start()
    yield database
    await database.stop()


def by(name: str = "", address: str = "192.0.2.1") -> None:
    """From here on the request of this caller is served; "": its key or token is not known."""
    peer.enter({"client": (address, 1)})
    if name:
        peer.identified(name)


async def rows(calls: RefusedCalls, database: Database) -> list[dict[str, Any]]:
    await calls.flush()
    return await database.read(lambda connection: refused.page(connection, Selection(), 10_000))


async def test_call_is_kept_with_who_when_where_and_why(database: Database) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    calls.note("%21room%3Ahs", TYPE, WRONG)
    by("@bob:hs", "2001:db8::1")
    calls.note("!room:hs", "m.room.topic", MatrixError("not here", status=403, errcode="M_FORBIDDEN"))
    bob, key = await rows(calls, database)
    assert (key["api_key"], key["user_id"], key["address"]) == ("k1", None, "192.0.2.1")
    assert (key["room_id"], key["event_type"], key["number"]) == (ROOM, TYPE, 1)
    assert key["error"] == ('{"status": 400, "errcode": "M_INVALID_PARAM", "error": "m.room.message: body is missing"}')
    assert (bob["api_key"], bob["user_id"], bob["address"]) == (None, "@bob:hs", "2001:db8::/64")
    assert key["delivery"].startswith("refused-")
    assert key["delivery"] != bob["delivery"]


async def test_calls_alike_are_one_entry_with_a_number(database: Database) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    for _ in range(3):
        calls.note(ROOM, TYPE, WRONG)
    assert [row["number"] for row in await rows(calls, database)] == [3]
    for _ in range(4):
        calls.note(ROOM, TYPE, WRONG)
    (row,) = await rows(calls, database)
    assert row["number"] == 7
    calls.note("!other:hs", TYPE, WRONG)
    by("key k2")
    calls.note(ROOM, TYPE, WRONG)
    assert [row["number"] for row in await rows(calls, database)] == [1, 1, 7]


async def test_calls_alike_are_another_entry_after_a_while(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    calls.note(ROOM, TYPE, WRONG)
    await calls.flush()
    monkeypatch.setattr(refused_calls, "ALIKE_MS", -1)
    calls.note(ROOM, TYPE, WRONG)
    assert [row["number"] for row in await rows(calls, database)] == [1, 1]


async def test_unknown_caller_makes_one_entry_whatever_it_asks_for(database: Database) -> None:
    calls = RefusedCalls(database)
    for number in range(5):
        by()
        calls.note(f"!{number}:hs", TYPE, Unauthorized(f"no {number}"))
    by(address="192.0.2.2")
    calls.note(ROOM, TYPE, Unauthorized("no"))
    other, first = await rows(calls, database)
    assert (first["number"], first["caller"], first["api_key"], first["user_id"]) == (5, "", None, None)
    assert (other["number"], other["address"]) == (1, "192.0.2.2")


async def test_flood_of_different_calls_is_cut_to_its_share(database: Database) -> None:
    calls = RefusedCalls(database, kept=Kept(total=100, each=10), max_new=3)
    by("@bob:hs")
    calls.note(ROOM, TYPE, WRONG)
    by("key hog")
    for number in range(50):
        calls.note(f"!{number}:hs", TYPE, WRONG)
    found = await rows(calls, database)
    assert [(row["caller"], row["room_id"], row["number"]) for row in found] == [
        ("key hog", "", 47),
        ("key hog", "!2:hs", 1),
        ("key hog", "!1:hs", 1),
        ("key hog", "!0:hs", 1),
        ("@bob:hs", ROOM, 1),
    ]
    assert "more of this caller's calls were refused than are listed one by one" in found[0]["error"]
    for number in range(50):
        calls.note(f"!{number % 20}:hs", "another", WRONG)
        await calls.flush()
    found = await rows(calls, database)
    assert len([row for row in found if row["caller"] == "key hog"]) == 10
    assert found[-1]["caller"] == "@bob:hs", "another caller's call is still there"


async def test_memory_is_bounded_while_the_store_is_away(database: Database) -> None:
    calls = RefusedCalls(database, max_open=10)
    database.trouble = "locked"
    for number in range(50):
        by(f"key {number}")
        calls.note(ROOM, TYPE, WRONG)
    await calls.flush()
    assert len(calls._open) == 10
    database.trouble = ""
    assert len(await rows(calls, database)) == 10
    by("key late")
    calls.note(ROOM, TYPE, WRONG)
    assert (await rows(calls, database))[0]["caller"] == "key late", "what is written makes room"


async def test_call_that_the_store_did_not_take_is_written_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    calls.note(ROOM, TYPE, WRONG)
    monkeypatch.setattr(database, "_max_waiting", 0)
    await calls.flush()
    monkeypatch.undo()
    assert [row["number"] for row in await rows(calls, database)] == [1]


async def test_noting_waits_for_no_store(database: Database) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    async with busy(database):
        calls.note(ROOM, TYPE, WRONG)
    assert len(await rows(calls, database)) == 1


async def test_text_that_no_engine_takes_is_kept_all_the_same(database: Database) -> None:
    calls = RefusedCalls(database)
    by("key k1")
    calls.note("%00%ff\ud800" + "x" * 1_000, "t%00", BadRequest("\ud800\0"))
    (row,) = await rows(calls, database)
    assert row["room_id"].startswith("\ufffd\ufffd?xxx")
    assert len(row["room_id"]) == 255
    assert row["event_type"] == "t\ufffd"
