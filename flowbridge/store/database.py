"""One engine, one writer thread, group commit.

All that waits while a commit runs joins the next one: a hundred senders pay for one fsync. Work that the engine refuses
is run again alone, so that it does not fail its group.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError

from flowbridge import log, metrics
from flowbridge.models.timing import Timing
from flowbridge.store import damage, file_check
from flowbridge.store.contents import Contents
from flowbridge.store.continuity import is_continued, resume
from flowbridge.store.engine import connect, is_quiet, is_sqlite, name, own, parse, reason, reported
from flowbridge.store.errors import StoreError, StoreFull, StoreUnavailable, StoreUnsure
from flowbridge.store.files import Files
from flowbridge.store.jobs import Job, Undo, finish, is_transient, transactions

T = TypeVar("T")

MAX_WAITING = 10_000
MAX_GROUP = 500
LINGER_SECONDS = 0.05  # for which work that no caller waits for may collect more


class Database:
    """The store, and the thread that does all writing. Raises StoreError for a URL that is not one."""

    engine: Engine

    def __init__(
        self,
        url: str,
        *,
        timing: Timing = Timing(),
        max_waiting: int = MAX_WAITING,
        max_group: int = MAX_GROUP,
    ) -> None:
        self.url = parse(url)
        self.is_sqlite = is_sqlite(self.url)
        self.contents = Contents()
        self.is_open = False
        self.trouble = ""  # why the last commit failed, if it did
        self.missing = ""  # why nothing may be accepted although commits succeed: SQLite's file does not exist any more
        self.damage = ""  # why nothing may be written any more: SQLite's file is malformed
        self.files: Files | None = None  # of an SQLite database that is this process' own
        self._timing = timing
        self._max_waiting = max_waiting
        self._max_group = max_group
        self._next_check = 0.0  # of the files; monotonic
        self._is_continued = False  # nothing was sent from another copy of it
        self._kept: Connection | None = None  # the writer's connection, between two commits
        self._hurry = threading.Event()
        self._is_ending = False  # jobs that come from here on are not done
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="flowbridge-store", daemon=True)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-read")
        self._loop: asyncio.AbstractEventLoop | None = None

    # opening and closing

    def open(self, *, shared: bool = False, make: bool = False, required: bool = False) -> None:
        """Open it and bring its schema up to date. Raises StoreError: one line.

        `shared`: beside a server that may be running on the same SQLite file, for a command that is soon done. Then
        StoreAbsent where there is no database, unless `make`: never where a server has one still. `required`:
        StoreAbsent although it is not shared.
        """
        if self.is_open:
            return
        make = (make or not shared) and not required
        if self.is_sqlite and not make:
            file_check.require(Path(str(self.url.database)))
        if self.is_sqlite and not shared:
            self.files = own(self.url)
        try:
            self.engine = connect(self.url, self._timing, shared=shared, make=make)
            self.engine.update_execution_options(contents=self.contents)
            if not shared:
                try:
                    self._begin()
                except BaseException:
                    self.engine.dispose()
                    raise
            self.is_open = True
        finally:
            if self.files is not None and not self.is_open:
                self.files.close()

    def _begin(self) -> None:
        """From here on it is this process' own, or this replica's."""
        if self.files is not None:
            self._check_all()
            self.files.begin()
            event.listen(self.engine, "connect", self.files.verify, insert=True)
        with reported(self.url), self.reading() as connection:
            self._is_continued = is_continued(connection, self.files)
            self._kept = self.engine.connect()  # beside one for readers: once the file is gone, no more can be made

    def _check_all(self) -> None:
        try:
            with self.reading() as connection:
                found = damage.of_all(connection)
        except SQLAlchemyError as error:
            found = reason(error)
        if found:
            raise StoreError(f"{name(self.url)} is malformed, restore a backup of it: {found}")

    def start(self) -> None:
        """Start the writer; to be called on the event loop that `run` is called on."""
        self._loop = asyncio.get_running_loop()
        self._writer.start()

    async def resume(self, lease_ms: int) -> None:
        """Before anything is sent. Raises StoreUnavailable."""
        await self.run(
            lambda connection: resume(connection, self.files, lease_ms, continued=self._is_continued), alone=True
        )

    async def stop(self) -> None:
        """Finish the jobs that wait, then close."""
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        self._reader.shutdown()
        self.close()

    def close(self) -> None:
        if self.files is not None and not self.missing:
            self._new_epoch(self.files)
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        if self.files is not None:
            refusals = (SQLAlchemyError, sqlite3.Error)
            with contextlib.suppress(*refusals), contextlib.closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")  # not possible inside a transaction
        self.engine.dispose()
        if self.files is not None:
            self.files.close()
        self.is_open = False

    # writing

    def run(
        self,
        work: Callable[[Connection], T],
        *,
        lingers: bool = False,
        always: bool = False,
        alone: bool = False,
        undo: Undo | None = None,
        found_nothing: Callable[[], bool] | None = None,
    ) -> "asyncio.Future[T]":
        """Queue some work; the future is done when its commit is. Work may run more than once before it succeeds.

        Also when it was committed, and the answer to that got lost: then it has to see what it has done.
        `found_nothing`: whether the run that has just ended found nothing of an earlier run.

        `undo`: takes back what must not be promised, when the database's file proves to have been missing (and why)
        after the commit.

        `alone`: it locks several rows that other replicas lock, too. It does so in one order; with more work in the
        same transaction there would be none.

        Raises StoreFull, unless it is to be done `always`; the future raises StoreUnavailable, and StoreUnsure where it
        may have been done all the same.
        """
        assert self._loop is not None
        if self._jobs.qsize() >= self._max_waiting and not always:
            raise StoreFull("too many callers wait for the store")
        future: asyncio.Future[T] = self._loop.create_future()
        if not lingers:
            self._hurry.set()
        self._jobs.put(Job(work, future, alone, undo, found_nothing))
        return future

    @property
    def waiting(self) -> int:
        """The number of jobs that the writer has not begun."""
        return self._jobs.qsize()

    def hurry(self) -> None:
        """A caller waits for what is queued: do not linger for more."""
        self._hurry.set()

    async def flush(self, *, lingers: bool = False) -> None:
        """Wait until the work queued so far is on the disk; not while it cannot be written there."""
        if not self.trouble:
            with contextlib.suppress(StoreFull, StoreUnavailable):
                await self.run(lambda connection: None, lingers=lingers)

    # reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees the database as of one moment, beside the writer."""
        level: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(reads=True, **level) as connection:
            yield connection

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Some reading, beside the writer, one at a time. Raises StoreUnavailable."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, work)
        except SQLAlchemyError as error:
            self._check_damage(error)
            raise StoreUnavailable(f"the store cannot be read: {reason(error)}") from None

    def _read(self, work: Callable[[Connection], T]) -> T:
        with self.reading() as connection:
            return work(connection)

    async def check(self) -> None:
        """Check whether the store can be read, and an SQLite file is whole, as far as that is quick.

        Raises StoreUnavailable.
        """
        if not self.is_sqlite:
            return
        if self.files is not None:
            with contextlib.suppress(OSError):  # reading reports that, too
                if why := damage.of_head(self.files.header()):
                    self._is_damaged(why)
        await self.read(lambda connection: connection.exec_driver_sql("SELECT max(id) FROM outbox").scalar())
        if self.damage:
            raise StoreUnavailable(self.damage)

    def _check_damage(self, error: Exception) -> None:
        if self.is_sqlite and (why := damage.named(error)):
            self._is_damaged(why)

    def _is_damaged(self, why: str) -> None:
        """Until the next start with another file: what is written now might never be read."""
        if not self.damage:
            self.damage = f"the database is malformed: {why}"
            log.error("store_damaged", database=name(self.url), error=why)

    # the writer thread

    def _write(self) -> None:
        while group := self._next_group():
            for together in [group] if self.is_sqlite else transactions(group):
                try:
                    self._commit(together)
                except Exception as error:
                    self._commit_each(together, error)
            if self.files is not None and time.monotonic() >= self._next_check:
                self._check_files(self.files)
        log.info("store_closed")

    def _next_group(self) -> list[Job[Any]]:
        """The jobs of the next commit; none at the end."""
        group: list[Job[Any]] = []
        job = None if self._is_ending else self._next_job()
        if job is not None:
            self._hurry.wait(LINGER_SECONDS)
            self._hurry.clear()
        while job is not None:
            group.append(job)
            if len(group) == self._max_group:
                return group
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group
        self._is_ending = True
        return group

    def _next_job(self) -> Job[Any] | None:
        while True:
            try:
                return self._jobs.get(timeout=self._timing.file_check_seconds if self.files is not None else None)
            except queue.Empty:
                if self.files is not None:
                    self._check_files(self.files)

    def _commit(self, group: Sequence[Job[Any]]) -> None:
        started = time.perf_counter()
        if self.files is not None and self.files.is_shared:
            raise StoreUnavailable(self.missing)
        for job in group:
            job.is_at_commit = False
        with self._writing() as connection:
            for job in group:
                job.run(connection)
            for job in group:
                job.is_at_commit = True
        metrics.commit_seconds.observe(time.perf_counter() - started)
        self.trouble = ""
        unsure = self._check_commit(self.files, group) if self.files is not None else ""
        if unsure:  # it is committed, and must not be done again
            self._finish([job for job in group if job.undo is not None], StoreUnsure(unsure))
            group = [job for job in group if job.undo is None]
        self._finish(group)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction on the writer's connection, which it keeps: to have it from the pool each time takes 40 µs."""
        connection, self._kept = self._kept, None
        if connection is not None and not is_quiet(connection):
            connection.invalidate()
            connection.close()
            connection = None
        if connection is None:
            connection = self.engine.connect()
        try:
            with connection.begin():
                yield connection
        except BaseException:
            connection.close()
            raise
        self._kept = connection

    def _commit_each(self, group: Sequence[Job[Any]], error: Exception) -> None:
        """Run the jobs of a failed commit one by one."""
        deadline = time.monotonic() + self._timing.store_retry_seconds
        for job in group:
            trouble = self._retry(job, error, deadline)
            if trouble is not None:
                why = f"the store cannot be written: {reason(trouble)}"
                self._finish([job], StoreUnsure(why) if job.is_doubtful else StoreUnavailable(why))

    def _retry(self, job: Job[Any], error: Exception, deadline: float) -> Exception | None:
        """Run one job until it succeeds, or its error is not transient; returns the last error."""
        pause = 0.05
        while True:
            job.failed(error)
            metrics.commit_failures.inc()
            if not self.trouble:
                log.warning("store_refused", error=reason(error))
            self.trouble = reason(error)
            try:
                self._commit([job])
            except Exception as again:
                self._check_damage(again)
                if not is_transient(again) or time.monotonic() > deadline:
                    job.failed(again)
                    return again
                error = again
            else:
                return None
            time.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _finish(self, group: Sequence[Job[Any]], error: Exception | None = None) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
            self._loop.call_soon_threadsafe(finish, group, error)

    # SQLite's files, on the writer thread

    def _check_commit(self, files: Files, group: Sequence[Job[Any]]) -> str:
        """After a commit, before its callers are told. Returns why what should be taken back could not be."""
        try:
            files.note_epoch()
        except Exception as error:  # after the next commit, then
            log.warning("store_not_looked_at", error=error)
        self._set_missing(files, files.missing())
        undos = [job.undo for job in group if job.undo is not None] if self.missing else []
        if undos:
            try:
                with self._writing() as connection:
                    for undo in undos:
                        undo(connection, self.missing)
            except Exception as error:
                return f"{self.missing}, and it cannot be taken back: {reason(error)}"
        return ""

    def _check_files(self, files: Files) -> None:
        """The checks that are not done after each commit."""
        try:
            self._set_missing(files, files.check())
        except (OSError, sqlite3.Error) as error:
            log.warning("store_not_looked_at", error=error)
        if not (self.missing or self.trouble):  # a locked or full database would be waited for once more
            self._new_epoch(files)
        self._next_check = time.monotonic() + self._timing.file_check_seconds

    def _set_missing(self, files: Files, missing: str) -> None:
        if missing != self.missing:
            self.missing = missing
            files.report(missing)

    def _new_epoch(self, files: Files) -> None:
        """Distinguish what is in the database now from any copy that was made of it before."""
        with contextlib.suppress(SQLAlchemyError, sqlite3.Error):  # locked, or full: another time
            if files.has_changed():
                with self._writing() as connection:
                    files.new_epoch(connection)
                files.note_epoch()
