"""flowbridge.cli.keys: scopes that can be none make no key."""

import sqlite3
from pathlib import Path

import pytest

from flowbridge import log
from flowbridge.cli import keys, store
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import StoreError

pytestmark = pytest.mark.usefixtures("nothing_set")

OPTIONS = ("--name", "--room", "--event-type", "--user")


def create(option: str, *values: str, timing: Timing = Timing()) -> int:
    given = {name: list(values) if name == option else [] for name in OPTIONS}
    name = given["--name"][0] if given["--name"] else ""
    scopes = (given["--room"], given["--event-type"], given["--user"])
    return keys.create(Settings.load(), name, *scopes, admin=False, timing=timing)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--room", ("",)),
        ("--room", ("room",)),
        ("--room", ("!a:hs,!b:hs",)),
        ("--room", ("!a:hs #b:hs",)),
        ("--room", ("#nameless",)),
        ("--room", ("!a:hs", "@user:hs")),
        ("--room", ("!a\n:hs",)),
        ("--room", ("!" + "x" * 300,)),
        ("--room", ("!\udcff:hs",)),
        ("--room", ("!%\udcff:hs",)),
        ("--event-type", ("",)),
        ("--event-type", ("m.*.name",)),
        ("--event-type", ("m.room.**",)),
        ("--event-type", ("m.room.name m.room.topic",)),
        ("--event-type", ("m.room.name,m.room.topic",)),
        ("--event-type", ("..",)),
        ("--event-type", ("a/b",)),
        ("--event-type", ("\udcff",)),
        ("--event-type", ("%\udcff",)),
        ("--user", ("",)),
        ("--user", ("alice",)),
        ("--user", ("@alice",)),
        ("--user", ("@:hs",)),
        ("--user", ("@alice:hs,@bob:hs",)),
        ("--user", ("@alice:hs @bob:hs",)),
        ("--user", ("@a\0:hs",)),
        ("--user", ("@" + "x" * 300 + ":hs",)),
        ("--user", ("\udcff",)),
        ("--name", ("two\nlines",)),
        ("--name", ("\x1b[31mred",)),
        ("--name", ("x" * 256,)),
        ("--name", ("\udcff",)),
    ],
)
def test_what_can_be_no_scope_is_one_line(
    option: str, values: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create(option, *values) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"flowbridge: {option}: ")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "the database was not even opened"


@pytest.mark.parametrize("room", ["!a:hs", "!opaque", "#ops:hs", "#a,b:hs", "#%41:hs", "#tür:hs:8448"])
def test_room_is_taken_as_it_is(room: str) -> None:
    assert keys.room_scope(room) == room


@pytest.mark.parametrize("event_type", ["m.room.message", "m.room.*", "*", "org.example.100%25"])
def test_event_type_is_taken_as_it_is(event_type: str) -> None:
    assert keys.event_type_scope(event_type) == event_type


def test_scopes_in_words() -> None:
    assert keys.describe(ApiKey("k")) == "all rooms; all event types"
    key = ApiKey("k", rooms=("!a:hs", "#b:hs"), event_types=("m.room.*",), admin=True)
    assert keys.describe(key) == "!a:hs, #b:hs; m.room.*; admin"
    key = ApiKey("k", users=("@alice:hs", "@bob:hs"))
    assert keys.describe(key) == "all rooms; all event types; for @alice:hs, @bob:hs"


def test_times_are_utc() -> None:
    assert keys.moment(1_700_000_000_999) == "2023-11-14T22:13:20Z"
    assert keys.moment(None) == "-"


def test_database_that_stays_locked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "setup", lambda *_: None)
    hasty = Timing(sqlite_busy_seconds=0.02)
    store.create(Settings.load())
    assert create("--name", "one") == 0
    locked = sqlite3.connect(tmp_path / "flowbridge.db", isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    capsys.readouterr()
    with pytest.raises(StoreError, match="locked"):
        create("--name", "two", timing=hasty)
    with pytest.raises(StoreError, match="locked"):
        keys.revoke(Settings.load(), "one", timing=hasty)
    assert capsys.readouterr().out == ""
    locked.execute("COMMIT")
    locked.close()
    assert keys.show(Settings.load()) == 0
    assert "two" not in capsys.readouterr().out
