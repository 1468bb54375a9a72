"""flowbridge.auth.first_key: when a key is made, who sees it, and what is never overwritten."""

import io
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from flowbridge.auth import first_key
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys

pytestmark = pytest.mark.usefixtures("nothing_set")

SECRET = r"fb_[\w-]{43}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/events.db")
    database.open(shared=True, make=True)
    yield database
    database.engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "events.db.first-key"


def make(database: Database, **values: Any) -> None:
    values = {"access_token": "bot", **values}
    first_key.make(Settings.load(database_url=f"sqlite:///{database.url.database}", **values), database)


def known(database: Database) -> list[tuple[bytes, ApiKey]]:
    with database.engine.begin() as connection:
        return api_keys.valid(connection)


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The bridge's own: asyncio may tell here of what another test has left."""
    return [record.msg for record in caplog.records if record.name.startswith("flowbridge")]


def said(caplog: pytest.LogCaptureFixture) -> str:
    return json.dumps([{**vars(record)} for record in caplog.records], default=str)


def test_key_is_written_to_a_file_of_its_owner_alone(
    database: Database, file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    before = os.umask(0)
    try:
        make(database)
    finally:
        os.umask(before)
    secret = file.read_text().strip()
    assert re.fullmatch(SECRET, secret)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert known(database) == [(api_keys.digest(secret), ApiKey("first", "first", admin=True))]
    assert str(file) in said(caplog)
    assert secret not in said(caplog) + "".join(capfd.readouterr())


def test_key_is_shown_once_on_a_terminal(
    database: Database, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make(database)
    make(database)
    (secret,) = re.findall(SECRET, terminal.getvalue())
    assert known(database)[0][0] == api_keys.digest(secret)
    assert not file.exists()
    assert secret not in said(caplog)


@pytest.mark.parametrize(
    "values",
    [
        {"access_token": None},
        {"api_keys": "fb_fixed-of-32-characters-and-some-more"},
        {"access_token": None, "api_keys": "fb_fixed-of-32-characters-and-some-more"},
    ],
)
def test_none_is_made_where_none_is_of_use(database: Database, file: Path, values: dict[str, Any]) -> None:
    make(database, **values)
    assert not file.exists()
    assert known(database) == []


@pytest.mark.parametrize("revoked", [False, True])
def test_none_is_made_where_there_was_one(database: Database, file: Path, *, revoked: bool) -> None:
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("one"), "fb_one")
        if revoked:
            api_keys.revoke(connection, "one")
    make(database)
    assert not file.exists()
    assert len(known(database)) == (0 if revoked else 1)


def test_revoked_first_key_is_not_made_anew(database: Database, file: Path) -> None:
    make(database)
    file.unlink()
    with database.engine.begin() as connection:
        api_keys.revoke(connection, api_keys.FIRST)
    make(database)
    assert not file.exists()
    assert known(database) == []


def test_file_that_is_there_is_left_alone(database: Database, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("somebody's")
    make(database)
    assert file.read_text() == "somebody's"
    assert known(database) == []
    assert actions(caplog) == ["first_key_not_made"]
    assert str(file) in said(caplog)
    file.unlink()
    make(database)
    assert len(known(database)) == 1


def test_link_is_not_followed(database: Database, file: Path, tmp_path: Path) -> None:
    file.symlink_to(tmp_path / "elsewhere")
    make(database)
    assert not (tmp_path / "elsewhere").exists()
    assert known(database) == []


def test_disk_that_is_full_leaves_neither_file_nor_key(
    database: Database, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        make(database)
    assert not file.exists()
    assert known(database) == []
    assert "No space left" in said(caplog)
    make(database)
    assert file.exists()


def test_commit_that_fails_leaves_no_file(database: Database, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> None:
        raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    event.listen(database.engine, "commit", fail)
    make(database)
    event.remove(database.engine, "commit", fail)
    assert not file.exists()
    assert known(database) == []
    assert actions(caplog) == ["first_key_not_made"]
    assert not re.search(SECRET, said(caplog))


def test_without_a_database_file_it_is_in_the_working_directory() -> None:
    settings = Settings.load(database_url="postgresql+psycopg://flow:secret@db/flow")
    assert first_key.path_beside(settings) == Path("flowbridge.first-key")
