"""The writer thread: group commit, and what happens when the engine refuses, is locked, or goes away."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine, event, func, select, text
from sqlalchemy.exc import OperationalError

from flowbridge.models.timing import Timing
from flowbridge.store import Database, StoreFull, StoreUnavailable, StoreUnsure, outbox
from flowbridge.store.files import REMOVED
from flowbridge.store.tables import outbox as events
from tests.integration.store import events as rows
from tests.integration.store.events import only_postgresql, only_sqlite, put, states
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres


@asynccontextmanager
async def working(url: str, **options: Any) -> AsyncIterator[Database]:
    """A database with these options, open and at work."""
    database = Database(url, **options)
    database.open()
    database.start()
    yield database
    await database.stop()


@pytest.fixture
async def impatient(url: str) -> AsyncIterator[Database]:
    """A database that soon stops retrying a commit."""
    async with working(url, timing=Timing(store_retry_seconds=0.2)) as database:
        yield database


def put_one(name: str) -> Callable[[Connection], None]:
    return lambda connection: put(connection, name)


def count(connection: Connection) -> int:
    return connection.scalar(select(func.count()).select_from(events)) or 0


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {PATIENCE:g} s"
        await asyncio.sleep(0.01)


class Door:
    """Work that keeps the writer busy, in a transaction, until it is let go."""

    def __init__(self, work: Callable[[Connection], object] = lambda _: None) -> None:
        self._work = work
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, connection: Connection) -> None:
        self._work(connection)
        self.reached.set()
        assert self._open.wait(PATIENCE)

    def let_go(self) -> None:
        self._open.set()


@asynccontextmanager
async def busy(database: Database, work: Callable[[Connection], object] = lambda _: None) -> AsyncIterator[None]:
    """The writer is in the middle of a transaction while this lasts."""
    door = Door(work)
    running = database.run(door)
    try:
        await until(door.reached.is_set)
        yield
    finally:
        door.let_go()
        await running


@contextmanager
def commits(database: Database) -> Iterator[list[int]]:
    """Counts them: `[0]`."""
    seen = [0]

    def note(_: Connection) -> None:
        seen[0] += 1

    event.listen(database.engine, "commit", note)
    yield seen
    event.remove(database.engine, "commit", note)


@contextmanager
def failing(database: Database, name: str, *errors: Exception | None, after: bool = False) -> Iterator[list[str]]:
    """Calls of this driver function fail with these errors, in turn; `after` they have done their work."""
    left, calls = list(errors), []
    dialect = database.engine.dialect
    original = getattr(dialect, name)

    def call(connection: Any) -> None:
        calls.append(name)
        error = left.pop(0) if left else None
        if error is None or after:
            original(connection)
        if error is not None:
            raise error

    setattr(dialect, name, call)
    try:
        yield calls
    finally:
        delattr(dialect, name)


def connection_lost(database: Database) -> Exception:
    """What the driver says of it, or what comes nearest to it with a file."""
    if database.is_sqlite:
        return sqlite3.OperationalError("disk I/O error")
    import psycopg

    return psycopg.OperationalError("server closed the connection unexpectedly")


# group commit


async def test_hundred_callers_share_one_commit(database: Database) -> None:
    with commits(database) as seen:
        async with busy(database):
            waiting = [database.run(put_one(f"event-{number}")) for number in range(100)]
        await asyncio.gather(*waiting)
        assert seen[0] <= 3  # the writer's, and that of the hundred
    assert await database.read(count) == 100


async def test_group_is_bounded(url: str) -> None:
    async with working(url, max_group=10) as database:
        with commits(database) as seen:
            async with busy(database):
                waiting = [database.run(put_one(f"event-{number}")) for number in range(30)]
            await asyncio.gather(*waiting)
            assert 3 <= seen[0] <= 5


async def test_work_is_done_in_the_order_in_which_it_was_asked_for(database: Database) -> None:
    names = [f"event-{number}" for number in range(50)]
    await asyncio.gather(*[database.run(put_one(name)) for name in names])
    assert list(await database.read(states)) == names


async def test_answer_is_given_after_the_commit(database: Database) -> None:
    with create_engine(database.url, poolclass=NullPool).connect() as other:
        for number in range(20):
            await database.run(put_one(f"event-{number}"), lingers=bool(number % 2))
            assert count(other) == number + 1
            other.rollback()


async def test_work_gives_its_result(database: Database) -> None:
    assert await asyncio.gather(*[database.run(lambda _, n=n: n * n) for n in range(5)]) == [0, 1, 4, 9, 16]  # type: ignore[misc]


async def test_what_the_engine_refuses_fails_alone(database: Database) -> None:
    def poison(connection: Connection) -> None:
        put(connection, "before")
        connection.execute(events.insert(), [rows.event("poison", content=None)])

    async with busy(database):
        waiting = [database.run(put_one("one")), database.run(poison), database.run(put_one("two"))]
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in done] == [type(None), StoreUnavailable, type(None)]
    assert list(await database.read(states)) == ["one", "two"]


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault of ours"), AssertionError()], ids=["worded", "wordless"])
async def test_error_in_a_programs_own_work_fails_alone_and_at_once(database: Database, error: Exception) -> None:
    def broken(connection: Connection) -> None:
        raise error

    async with busy(database):
        waiting = [database.run(put_one("one")), database.run(broken), database.run(put_one("two"))]
    async with asyncio.timeout(PATIENCE / 2):
        done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[1], StoreUnavailable)
    assert list(await database.read(states)) == ["one", "two"]


async def test_stop_finishes_what_waits(url: str) -> None:
    database = Database(url)
    database.open()
    database.start()
    waiting = [database.run(put_one(f"event-{number}"), lingers=True) for number in range(30)]
    await database.stop()
    await asyncio.gather(*waiting)
    again = Database(url)
    again.open()
    with again.engine.begin() as connection:
        assert count(connection) == 30
    again.close()


async def test_caller_who_left_does_not_disturb_the_others(database: Database) -> None:
    async with busy(database):
        gone, here = database.run(put_one("gone")), database.run(put_one("here"))
        gone.cancel()
    await here
    assert list(await database.read(states)) == ["gone", "here"]


# back-pressure


async def test_queue_that_is_full_takes_nothing_more_and_loses_nothing(url: str) -> None:
    async with working(url, max_waiting=3) as database:
        async with busy(database):
            taken = [database.run(put_one(f"event-{number}")) for number in range(3)]
            for _ in range(2):
                with pytest.raises(StoreFull) as caught:
                    database.run(put_one("too much"))
        assert caught.value.headers() == {"Retry-After": "1"}
        await asyncio.gather(*taken)
        await database.run(put_one("later"))
        assert list(await database.read(states)) == ["event-0", "event-1", "event-2", "later"]


# reading


async def test_reading_does_not_wait_for_the_writer_and_sees_what_is_committed(database: Database) -> None:
    await database.run(put_one("committed"))
    async with busy(database, put_one("not yet")):
        async with asyncio.timeout(PATIENCE / 2):
            assert list(await database.read(states)) == ["committed"]
    assert list(await database.read(states)) == ["committed", "not yet"]


async def test_writing_does_not_wait_for_a_reader(database: Database) -> None:
    await database.run(put_one("one"))
    seen, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> tuple[int, int]:
        first = count(connection)
        seen.set()
        assert go_on.wait(PATIENCE)
        return first, count(connection)

    reading = asyncio.ensure_future(database.read(slow))
    await until(seen.is_set)
    async with asyncio.timeout(PATIENCE / 2):
        await database.run(put_one("two"))
    go_on.set()
    first, _ = await reading
    assert first == 1


async def test_reading_that_fails_says_so(database: Database) -> None:
    def wrong(connection: Connection) -> None:
        connection.execute(text("SELECT * FROM nowhere"))

    with pytest.raises(StoreUnavailable, match="the store cannot be read") as caught:
        await database.read(wrong)
    assert "\n" not in str(caught.value)
    assert await database.read(count) == 0


async def test_flush_waits_for_what_was_asked_before(database: Database) -> None:
    done = database.run(lambda connection: None, lingers=True)
    await asyncio.wait_for(database.flush(), PATIENCE)
    assert done.done()


async def test_flush_does_not_wait_for_a_store_in_trouble(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at the delivery log does so because something is wrong."""
    database.trouble = "the disk is full"
    asked: list[object] = []
    monkeypatch.setattr(database, "run", asked.append)
    await database.flush()
    assert asked == []


@only_sqlite
async def test_look_at_the_file_leaves_sqlites_locks_alone(database: Database) -> None:
    """Where a process closes a descriptor of the file, it loses them: then the next command that ends removes -wal."""
    assert database.files is not None
    await database.run(put_one("one"))
    await database.check()
    command = f"import sqlite3; sqlite3.connect({database.url.database!r}).execute('PRAGMA user_version').fetchall()"
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", command], check=True, timeout=PATIENCE)
    assert not database.files.missing()
    await database.run(put_one("two"))
    assert not database.missing


# the writer's own connection


def remove(path: Path) -> None:
    path.unlink()


@only_postgresql
async def test_connection_that_the_server_ended_while_idle_is_replaced_before_it_is_used(database: Database) -> None:
    await database.run(put_one("one"))
    ending = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with create_engine(database.url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as other:
        other.execute(ending)
        left = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        await until(lambda: other.scalar(left) == 1)
    runs: list[Connection] = []

    def work(connection: Connection) -> None:
        runs.append(connection)
        put(connection, "two")

    await database.run(work)
    assert len(runs) == 1
    assert list(await database.read(states)) == ["one", "two"]


@only_sqlite
async def test_what_is_in_a_removed_file_can_still_be_read(database: Database) -> None:
    await database.run(put_one("one"))
    remove(Path(str(database.url.database)))
    assert list(await database.read(states)) == ["one"]


# trouble that passes


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Somebody else has the database locked against writing."""
    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        with contextmanager(_raw)(str(engine.url.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    with engine.begin() as other:
        other.execute(text("LOCK TABLE outbox IN EXCLUSIVE MODE"))
        yield


def _raw(path: str) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    yield connection
    connection.close()


async def test_work_waits_for_a_database_that_is_locked(database: Database) -> None:
    with locked(database.url.render_as_string(hide_password=False)):
        waiting = [database.run(put_one("one")), database.run(put_one("two"))]
        done, _ = await asyncio.wait(waiting, timeout=3)  # contract: a file that is locked for 3 s
        assert not done
    await asyncio.gather(*waiting)
    assert list(await database.read(states)) == ["one", "two"]
    assert not database.trouble


@only_sqlite  # PostgreSQL waits for ever
async def test_lock_that_lasts_longer_than_sqlite_waits_is_waited_for(url: str) -> None:
    async with working(url, timing=Timing(sqlite_busy_seconds=0.05)) as database:
        with locked(url):
            waiting = [database.run(put_one("one")), database.run(put_one("two"))]
            await until(lambda: "locked" in database.trouble)
        await asyncio.gather(*waiting)
        assert list(await database.read(states)) == ["one", "two"]


@only_sqlite  # PostgreSQL waits for ever
async def test_lock_that_does_not_end_is_told(url: str) -> None:
    async with working(url, timing=Timing(sqlite_busy_seconds=0.05, store_retry_seconds=0.3)) as database:
        with locked(url), pytest.raises(StoreUnavailable, match="locked"):
            await database.run(put_one("one"))
        await database.run(put_one("two"))
        assert list(await database.read(states)) == ["two"]


def full(database: Database) -> Exception:
    """What the driver says of a disk that is."""
    if database.is_sqlite:
        return sqlite3.OperationalError("database or disk is full")
    import psycopg

    return psycopg.errors.DiskFull("could not extend file: No space left on device (disk is full)")


async def test_full_disk_is_told_at_once_and_accepts_nothing(database: Database) -> None:
    with failing(database, "do_commit", *[full(database)] * 50) as calls:
        with pytest.raises(StoreUnavailable, match="full") as caught:
            await database.run(put_one("one"))
        assert not isinstance(caught.value, StoreUnsure)
        assert len(calls) <= 3
    assert await database.read(count) == 0
    await database.run(put_one("two"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_connection_lost_in_the_middle_of_a_commit_doubles_nothing(database: Database, after: bool) -> None:
    """Whether the database has done it or not: the work is done once more, and is there once."""
    mine, other = rows.event("mine"), rows.event("other")
    with failing(database, "do_commit", None, connection_lost(database), after=after) as calls:
        async with busy(database):  # the first commit; the second is that of the two
            waiting = [
                database.run(lambda connection: outbox.insert_rows(connection, [mine])),
                database.run(lambda connection: outbox.insert_rows(connection, [other])),
            ]
        assert await asyncio.gather(*waiting) == [set(), set()]
        assert len(calls) > 2
    assert list(await database.read(states)) == ["mine", "other"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_commit_that_nobody_heard_of_may_be_one(impatient: Database, after: bool) -> None:
    """A 503 would say that nothing of it is kept."""
    mine = rows.event("mine")
    with (
        failing(impatient, "do_commit", *[connection_lost(impatient)] * 100, after=after),
        pytest.raises(StoreUnsure, match="may have taken this") as caught,
    ):
        await impatient.run(lambda connection: outbox.insert_rows(connection, [mine]))
    assert caught.value.status == 504
    assert caught.value.headers() == {}
    assert list(await impatient.read(states)) == ["mine"] * after


async def test_what_fails_before_its_commit_is_surely_not_done(impatient: Database) -> None:
    def lost(connection: Connection) -> None:
        put(connection, "mine")
        raise OperationalError("INSERT", {}, connection_lost(impatient), connection_invalidated=True)

    with pytest.raises(StoreUnavailable) as caught:
        await impatient.run(lost)
    assert not isinstance(caught.value, StoreUnsure)
    assert caught.value.status == 503


async def test_doubt_ends_with_a_run_that_sees_nothing_of_the_one_before(impatient: Database) -> None:
    ran = [0]

    def work(connection: Connection) -> None:
        ran[0] += 1
        if ran[0] > 2:
            connection.exec_driver_sql("SELECT nothing")

    with failing(impatient, "do_commit", *[connection_lost(impatient)] * 2):
        with pytest.raises(StoreUnavailable) as caught:
            await impatient.run(work, found_nothing=lambda: ran[0] == 2)
        assert isinstance(caught.value, StoreUnsure), "the second commit may be one, too"
    ran[0] = 0
    with (
        failing(impatient, "do_commit", connection_lost(impatient), full(impatient)),
        pytest.raises(StoreUnavailable, match="full") as caught,
    ):
        await impatient.run(work, found_nothing=lambda: ran[0] == 2)
    assert not isinstance(caught.value, StoreUnsure)


@only_sqlite
async def test_what_is_committed_is_not_done_again_whatever_goes_wrong_then(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, ran = database.files, [0, 0]
    assert files is not None

    def work(connection: Connection) -> None:
        ran[0] += 1
        put(connection, f"event-{ran[0]}")

    def undone(connection: Connection) -> None:
        ran[1] += 1

    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(files, "note_epoch", broken)
    await database.run(work)
    assert (ran[0], list(await database.read(states))) == (1, ["event-1"])
    monkeypatch.setattr(files, "missing", lambda: REMOVED)
    async with busy(database):
        waiting = [database.run(work), database.run(undone, undo=broken)]
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert done[0] is None
    assert isinstance(done[1], StoreUnsure), "it is kept where the process has the file still"
    assert (ran, list(await database.read(states))) == ([2, 1], ["event-1", "event-2"])
    monkeypatch.undo()


# PostgreSQL that goes away


@only_postgresql
async def test_session_ended_by_the_server_is_replaced(database: Database) -> None:
    ended: list[bool] = []

    def work(connection: Connection) -> None:
        put(connection, "one")
        if not ended:
            ended.append(True)
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    async with busy(database):
        waiting = [database.run(work), database.run(put_one("two"))]
    await asyncio.gather(*waiting)
    assert list(await database.read(states)) == ["one", "two"]


@pytest.mark.parametrize("end", [LocalPostgres.kill, LocalPostgres.stop], ids=["kill", "stop"])
async def test_work_queued_while_postgresql_is_away_is_done_when_it_is_back(
    own_postgres: LocalPostgres, end: Callable[[LocalPostgres], None]
) -> None:
    patient = Timing(store_retry_seconds=PATIENCE)  # a start takes a busy machine more than ten seconds
    async with working(own_postgres.url, timing=patient) as database:
        await database.run(put_one("before"))
        await asyncio.to_thread(end, own_postgres)
        waiting = [database.run(put_one(f"event-{number}")) for number in range(10)]
        await until(lambda: database.trouble)
        with pytest.raises(StoreUnavailable, match="cannot be read"):
            await database.read(count)
        await asyncio.to_thread(own_postgres.start)
        await asyncio.gather(*waiting)
        assert list(await database.read(states)) == ["before", *[f"event-{number}" for number in range(10)]]
        assert not database.trouble


async def test_postgresql_that_stays_away_is_told(own_postgres: LocalPostgres) -> None:
    async with working(own_postgres.url, timing=Timing(store_retry_seconds=0.2)) as database:
        await asyncio.to_thread(own_postgres.kill)
        with pytest.raises(StoreUnavailable, match="cannot be written") as caught:
            await database.run(put_one("one"))
        assert "\n" not in str(caught.value)


@only_postgresql
async def test_replica_that_was_stopped_in_a_transaction_does_not_hold_up_the_others(
    url: str, database: Database
) -> None:
    stopped = Database(url, timing=Timing(idle_transaction_seconds=0.5))
    stopped.open()
    connection = stopped.engine.connect()
    put(connection, "held")  # as if the process stood still here
    try:
        async with asyncio.timeout(PATIENCE):
            await database.run(put_one("mine"))
    finally:
        connection.invalidate()
        connection.close()
        stopped.close()
    assert list(await database.read(states)) == ["mine"]
