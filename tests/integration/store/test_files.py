"""The files of an SQLite database: what happens when they go, and how a database is known again."""

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection

from flowbridge.models.timing import Timing
from flowbridge.store import Database, StoreError, StoreUnavailable, files
from tests.integration.store import events as rows
from tests.integration.store.events import states
from tests.rig import PATIENCE, MakeRig, Rooms, soon, until

OTHER = "!other:hs"


def copied(file: Path, to: Path) -> None:
    """A backup, as of another epoch."""
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")
        target.execute("PRAGMA user_version=1")


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    for each in file.parent.glob("flowbridge.db*"):
        each.unlink()


def remove_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


def replace(file: Path) -> None:
    other = file.with_name("other.db")
    sqlite3.connect(other).close()
    other.rename(file)


def remove_wal(file: Path) -> None:
    file.with_name(f"{file.name}-wal").unlink()


def replace_wal(file: Path) -> None:
    remove_wal(file)
    file.with_name(f"{file.name}-wal").touch()


def truncate(file: Path) -> None:
    os.truncate(file, 0)


QUICK = [
    (remove, files.REMOVED),
    (remove_all, files.REMOVED),
    (remove_folder, files.REMOVED),
    (replace, files.REPLACED),
    (remove_wal, files.NO_WAL),
    (replace_wal, files.NO_WAL),
    (truncate, files.OVERWRITTEN),
]


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"\0" * 4096)


def overwrite_with_a_backup(file: Path) -> None:
    backup = file.with_name("backup.db")
    copied(file, backup)
    file.write_bytes(backup.read_bytes())


def remove_shm(file: Path) -> None:
    file.with_name(f"{file.name}-shm").unlink()


SLOW = [
    (overwrite, files.OVERWRITTEN),
    (overwrite_with_a_backup, files.OVERWRITTEN),
    (remove_shm, files.NO_SHM),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """In a folder that may be removed with it."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "flowbridge.db"


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def make(path: Path, rooms: Rooms) -> MakeRig:
    return MakeRig(f"sqlite:///{path}", rooms)


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{path}")
    database.open()
    database.start()
    yield database
    if database.is_open:  # else the test has stopped it
        await database.stop()


@pytest.mark.parametrize(("harm", "reason"), QUICK)
async def test_commit_that_is_not_kept_is_taken_back_before_it_is_told(
    make: MakeRig, rooms: Rooms, path: Path, harm: Callable[[Path], None], reason: str
) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.accept("b", OTHER)
        await rig.settled(2)
        harm(path)
        with pytest.raises(StoreUnavailable, match=reason.split()[-1]):
            await rig.accept("c", "!third:hs", key="c")
        assert rig.database.missing == reason
        with pytest.raises(StoreUnavailable, match=reason.split()[-1]) as caught:
            await rig.accept("d", "!third:hs")
        assert caught.value.headers() == {"Retry-After": "10"}
        # by the writer: no new connection may be made to a file that is another one by now
        assert list((await rig.database.run(states)).values()) == ["sent", "sent"]
        assert rooms.bodies("!third:hs") == []


@pytest.mark.parametrize(("harm", "reason"), SLOW)
async def test_what_a_commit_does_not_show_is_seen_soon(
    database: Database, path: Path, harm: Callable[[Path], None], reason: str
) -> None:
    harm(path)
    await until(lambda: database.missing == reason)


async def test_undo_is_done_before_the_answer_and_only_of_what_is_promised(database: Database, path: Path) -> None:
    remove(path)
    told: list[str] = []
    promised = database.run(lambda connection: rows.put(connection, "a"), undo=lambda _, missing: told.append(missing))
    noted = database.run(lambda connection: rows.put(connection, "b"))
    await soon(asyncio.gather(promised, noted))
    assert told == [files.REMOVED]
    assert list(await database.read(states)) == ["a", "b"]


async def test_new_connection_is_not_made_to_another_file(database: Database, path: Path) -> None:
    database.engine.dispose()
    replace(path)
    with pytest.raises(StoreUnavailable, match="another file"):
        await database.read(states)
    remove(path)
    with pytest.raises(StoreUnavailable, match="unable to open"):
        await database.read(states)
    assert not list(path.parent.glob("flowbridge.db")), (
        "SQLite makes a file where there is none, unless it is told not to"
    )


async def test_end_puts_a_removed_file_back_with_all_that_was_committed_since(database: Database, path: Path) -> None:
    await database.resume(30_000)
    await database.run(lambda connection: rows.put(connection, "before"))
    remove(path)
    await database.run(lambda connection: rows.put(connection, "after"))
    await database.stop()
    assert sorted(each.name for each in path.parent.iterdir()) == ["flowbridge.db", "flowbridge.db.lock"]
    again = Database(f"sqlite:///{path}")
    again.open()
    again.start()
    assert list(await again.read(states)) == ["before", "after"]
    assert again.files is not None
    assert again.files.continues
    await again.stop()


def file_size(path: Path) -> int:
    return path.stat().st_size


async def test_end_overwrites_nothing_that_is_in_its_place(database: Database, path: Path) -> None:
    await database.run(lambda connection: rows.put(connection, "before"))
    replace(path)
    await database.run(lambda connection: rows.put(connection, "after"))
    await database.stop()
    assert file_size(path) == 0
    assert not list(path.parent.glob("*-wal")), "it would be written into the file that is there now"
    (rescued,) = path.parent.glob("flowbridge.db.rescued-*")
    assert (rescued.stat().st_mode & 0o777) == 0o600
    with sqlite3.connect(rescued) as connection:
        assert connection.execute("SELECT delivery FROM outbox ORDER BY id").fetchall() == [("before",), ("after",)]
    connection.close()


# is it the same database as before


@pytest.fixture
async def quick(path: Path) -> AsyncIterator[Database]:
    """A database that checks its files all the time."""
    database = Database(f"sqlite:///{path}", timing=Timing(file_check_seconds=0.02))
    database.open()
    database.start()
    yield database
    await database.stop()


def put(connection: Connection, name: str) -> None:
    rows.put(connection, name)


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


async def test_epoch_changes_with_what_is_committed_and_not_without(quick: Database, path: Path) -> None:
    seen = version(path)
    for name in "abc":
        await quick.run(partial(put, name=name))
        deadline = time.monotonic() + PATIENCE
        while (now := version(path)) == seen:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        seen = now
    before = quick.files
    assert before is not None
    checks = 0

    def check() -> str:
        nonlocal checks
        checks += 1
        return ""

    before.check = check  # type: ignore[method-assign]
    await until(lambda: checks > 5)
    assert version(path) == seen


def test_minus_wal_of_another_database_is_not_written_into_a_backup(path: Path) -> None:
    """As it lies there after kill -9, and a backup is put in the place of the database."""
    url = f"sqlite:///{path}"
    database = Database(url)
    database.open()
    with database.engine.begin() as connection:
        rows.put(connection, "a")
    for each in path.parent.glob("flowbridge.db*"):
        shutil.copy(each, f"{each}.crashed")
    database.close()
    copied(path, path.with_name("backup.db"))
    for each in path.parent.glob("*.crashed"):
        each.rename(each.with_suffix(""))
    state = path.with_name("flowbridge.db.lock")
    inode, wal = path.stat().st_ino, path.with_name("flowbridge.db-wal").stat().st_ino
    state.write_text(f'{{"epoch": 1, "inode": {inode}, "wal": {wal}}}')
    path.with_name("backup.db").rename(path)
    with pytest.raises(StoreError, match=r"flowbridge\.db-wal belongs to another database"):
        Database(url).open()
    for name in ("-wal", "-shm"):
        path.with_name(f"{path.name}{name}").unlink()
    again = Database(url)
    again.open()
    again.close()
