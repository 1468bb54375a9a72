"""A database that was put back to an earlier time doubles nothing; on each engine."""

import contextlib
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from flowbridge import log
from flowbridge.store import backup
from tests.postgres import LocalPostgres
from tests.rig import ROOM, SERVICE, MakeRig, Rig, Rooms, accept, cut, error, unreachable, until

OTHER = "!other:hs"


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.01, max_pause=0.02)


@dataclass
class Store:
    """A database that can be copied while it is used, and put back."""

    url: str
    copies: int = field(default=0, init=False)

    def copy(self) -> str:
        """What names the copy."""
        raise NotImplementedError

    def restore(self, copy: str) -> None:
        """Put it in the place of what is there; nothing runs on that."""
        raise NotImplementedError


@dataclass
class File(Store):
    folder: Path
    how: str

    @property
    def path(self) -> Path:
        return self.folder / "flowbridge.db"

    def copy(self) -> str:
        self.copies += 1
        to = self.folder.with_name(f"copy-{self.copies}")
        if self.how == "folder":  # as a snapshot of a file system does it: all of one moment
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                # Not by this process: to close a file ends all locks that it has on it, SQLite's, too.
                subprocess.run(["cp", "-R", str(self.folder), str(to)], check=True)
                connection.execute("ROLLBACK")
        else:
            to.mkdir()
            backup.copy_database(self.path, to / "flowbridge.db")
        return str(to)

    def restore(self, copy: str) -> None:
        if self.how == "folder":
            shutil.rmtree(self.folder)
            shutil.copytree(copy, self.folder)
            return
        for name in ("-wal", "-shm"):
            self.path.with_name(f"flowbridge.db{name}").unlink(missing_ok=True)
        if self.how == "in place":
            self.path.write_bytes((Path(copy) / "flowbridge.db").read_bytes())
            return
        for each in self.folder.iterdir():
            each.unlink()
        shutil.copy(Path(copy) / "flowbridge.db", self.path)


@dataclass
class Postgres(Store):
    how: str

    def copy(self) -> str:
        url = make_url(self.url)
        self.copies += 1
        if self.how == "template":
            name = f"{url.database}_copy_{self.copies}"
            self._tell(f'CREATE DATABASE "{name}" TEMPLATE "{url.database}"')
            return name
        return self._run("pg_dump", "--format=plain", "--clean", self.plain)

    def restore(self, copy: str) -> None:
        database = make_url(self.url).database
        if self.how == "template":
            self._tell(f'DROP DATABASE "{database}" WITH (FORCE)', f'ALTER DATABASE "{copy}" RENAME TO "{database}"')
            return
        if self.how == "new":
            self._tell(f'DROP DATABASE "{database}" WITH (FORCE)', f'CREATE DATABASE "{database}" TEMPLATE template0')
        self._run("psql", "--quiet", self.plain, stdin=copy)

    @property
    def plain(self) -> str:
        return self.url.replace("+psycopg", "")

    def _run(self, *command: str, stdin: str = "") -> str:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout

    def _tell(self, *statements: str) -> None:
        server = make_url(self.url).set(database="postgres")
        with create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
            for statement in statements:
                connection.execute(text(statement))


WAYS = ["sqlite: backup", "sqlite: in place", "sqlite: folder", "postgresql: clean", "postgresql: new"]


@pytest.fixture(params=WAYS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    engine, how = request.param.split(": ")
    if engine == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return Postgres(server.fresh_database(), how)
    folder = tmp_path / "store"
    folder.mkdir()
    return File(f"sqlite:///{folder}/flowbridge.db", folder, how)


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


Make = MakeRig


@pytest.fixture
def make(store: Store, rooms: Rooms) -> Make:
    return MakeRig(store.url, rooms, lease=1.0, deadline=0.3)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(log, "warning", lambda action, **_: seen.append(action))
    return seen


async def test_restored_backup_doubles_nothing_though_the_homeserver_forgets_at_once(
    make: Make, store: Store, rooms: Rooms, lines: list[str]
) -> None:
    async with make() as rig:
        await rig.send("first")
        rooms.always(error(503, "M_UNKNOWN"))
        for number in range(5):
            await rig.accept(f"{number}")
            await rig.accept(f"{number}", OTHER)
        copy = store.copy()
        rooms.always(None)
        await rig.settled()
        await rig.send("after the backup")
        await rig.settled()
    rooms.forget()
    store.restore(copy)
    lines.clear()
    async with make() as rig:
        await rig.settled()
        assert set(rig.states()) == {"sent"}
        assert sorted(rig.rows("event_id")) == sorted(
            event["event_id"] for room in (ROOM, OTHER) for event in rooms.timeline[room][:6]
        )
        await rig.send("last")
    assert rooms.bodies() == ["first", *"01234", "after the backup", "last"]
    assert rooms.bodies(OTHER) == [*"01234"]
    assert "store_restored" in lines


async def test_what_is_missing_in_between_is_sent_and_the_rest_not_again(
    make: Make, store: Store, rooms: Rooms
) -> None:
    """One that was deleted after the backup is there again; what was sent after it is not sent once more."""
    async with make() as rig:
        rooms.always(cut)
        deliveries = [await rig.accept(f"{number}") for number in range(6)]
        copy = store.copy()
        for number in (0, 2):
            while not await rig.worker.cancel(deliveries[number].row.delivery):
                pass
        rooms.always(None)
        await rig.settled()
    assert rooms.bodies() == ["1", "3", "4", "5"]
    rooms.forget()
    store.restore(copy)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["1", "3", "4", "5", "0", "2"]


async def test_what_the_backup_holds_and_was_never_sent_is_sent_in_order(
    make: Make, store: Store, rooms: Rooms
) -> None:
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        for number in range(6):
            await rig.accept(f"{number}")
        copy = store.copy()
        rooms.always(None)
        rooms.then(accept, accept, accept, *[error(503, "M_UNKNOWN")] * 1_000)
        await until(lambda: len(rooms.timeline[ROOM]) == 3)
        await rig.crash()
    rooms.forget()
    rooms.following.clear()
    store.restore(copy)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == [*"012345"]


async def test_token_without_device_finds_equal_events_one_by_one(make: Make, store: Store, rooms: Rooms) -> None:
    """No transaction id is shown to it: five alike are told apart by which are known."""
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        for _ in range(5):
            await rig.accept("alike", caller=SERVICE)
        copy = store.copy()
        rooms.always(None)
        await rig.settled()
    rooms.forget()
    rooms.shows_txn_ids = False
    store.restore(copy)
    async with make() as rig:
        await rig.settled()
        assert len(set(rig.rows("event_id"))) == 5
    assert rooms.bodies() == ["alike"] * 5


async def test_restart_on_the_same_database_asks_nothing(
    make: Make, store: Store, rooms: Rooms, lines: list[str]
) -> None:
    async with make() as rig:  # nothing is queued while it learns that there was no start before
        await rig.send("first", OTHER)
        await rig.settled()
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        await rig.accept("a")
        await until(lambda: len(rooms.sends) > 1)
    for _ in range(2):
        async with make() as rig:
            await rig.accept("b", OTHER)
    lines.clear()
    rooms.always(None)
    async with make() as rig:
        await rig.settled()
    assert "store_restored" not in lines
    assert ("recent", ROOM) not in rooms.looks
    assert rooms.bodies() == ["a"]


async def test_what_waits_for_longer_than_homeservers_remember_is_looked_for_once(
    make: Make, store: Store, rooms: Rooms
) -> None:
    """As after a whole machine was put back to an earlier time: nothing tells that from a restart."""
    async with make() as rig:
        rooms.always(error(429, "M_LIMIT_EXCEEDED", retry_after_ms=100))  # never taken, and so never in doubt
        for body in "ab":
            await rig.accept(body)
        await until(lambda: rooms.sends)
        await rig.stop()
        tell(store.url, "UPDATE outbox SET accepted_at = accepted_at - 3600000")
        tell(store.url, "UPDATE lanes SET uncertain_since = NULL")
    rooms.always(None)
    async with make() as rig:
        await rig.settled()
    assert rooms.looks.count(("recent", ROOM)) >= 1
    assert rooms.bodies() == ["a", "b"]


async def test_doubt_of_a_backup_outlives_a_crash(make: Make, store: Store, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        for number in range(3):
            await rig.accept(f"{number}")
        copy = store.copy()
        rooms.always(None)
        await rig.settled()
    rooms.forget()
    store.restore(copy)
    rooms.reading = unreachable()
    for _ in range(2):
        async with make() as rig:
            await until(lambda: rooms.looks)
            rooms.looks.clear()
            await rig.crash()
    rooms.reading = None
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == [*"012"]


def tell(url: str, statement: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize("store", ["postgresql: template"], indirect=True)
async def test_copy_of_a_whole_database_is_known_as_one(make: Make, store: Store, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        await rig.accept("a")
        await rig.stop()
    copy = store.copy()
    rooms.always(None)
    async with make() as rig:
        await rig.settled()
    rooms.forget()
    store.restore(copy)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a"]


async def test_role_that_does_not_own_the_table_looks_each_time(
    postgres: LocalPostgres, rooms: Rooms, lines: list[str]
) -> None:
    url = make_url(postgres.fresh_database())
    as_owner = url.render_as_string(hide_password=False)
    async with Rig(as_owner, rooms):
        pass
    role = f"user_{url.database}"
    for statement in (
        f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'right'",
        f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}"',
        f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO "{role}"',
        "COMMENT ON TABLE outbox IS NULL",
    ):
        tell(as_owner, statement)
    theirs = url.set(username=role, password="right").render_as_string(hide_password=False)
    try:
        rooms.always(error(503, "M_UNKNOWN"))
        async with Rig(theirs, rooms) as rig:
            await rig.accept("a")
        rooms.always(None)
        async with Rig(theirs, rooms) as rig:
            await rig.settled()
        assert "store_not_marked" in lines
        assert ("recent", ROOM) in rooms.looks
        assert rooms.bodies() == ["a"]
    finally:
        with contextlib.suppress(Exception):
            tell(as_owner, f'DROP OWNED BY "{role}"')
            tell(as_owner, f'DROP ROLE "{role}"')


@pytest.mark.parametrize("store", ["sqlite: copied by hand"], indirect=True)
async def test_copy_that_sqlite_made_is_known_by_its_epoch(make: Make, store: Store, rooms: Rooms) -> None:
    """Put back into the very same file, after an end that could write nothing down."""
    assert isinstance(store, File)
    copy = store.folder.with_name("copy.db")
    make.tune(file_check_seconds=0.02)
    async with make() as rig:
        rooms.always(error(503, "M_UNKNOWN"))
        await rig.accept("a")
        vacuum(store.path, copy)
        rooms.always(None)
        await rig.settled()
        files = rig.database.files
        assert files is not None
        before = files.state
        await rig.accept("b", OTHER)
        await until(lambda: files.state != before)
        await rig.crash()
    rooms.forget()
    store.path.write_bytes(copy.read_bytes())
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a"]


def vacuum(path: Path, to: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("VACUUM INTO ?", (str(to),))
