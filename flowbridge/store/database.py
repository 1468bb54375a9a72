"""One engine, one writer thread, group commit.

All that waits while a commit runs joins the next one: a hundred senders pay for one fsync. What the engine refuses is
run again by itself, so that it does not take its group along.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from flowbridge import log, metrics
from flowbridge.store import damage
from flowbridge.store.continuity import is_continued, resume
from flowbridge.store.engine import connect, is_sqlite, name, own, parse, reason, told
from flowbridge.store.errors import StoreError, StoreFull, StoreUnavailable, StoreUnsure
from flowbridge.store.files import LOOK_SECONDS, Files

T = TypeVar("T")

MAX_WAITING = 10_000
MAX_GROUP = 500
LINGER_SECONDS = 0.05  # for which work that nobody waits for may gather company
RETRY_SECONDS = 10.0  # how long a database that is away, or locked, is waited for


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[[Connection], T]
    future: "asyncio.Future[T]"
    alone: bool = False
    undo: Callable[[Connection, str], None] | None = None
    found_nothing: Callable[[], bool] | None = None
    result: T | None = None
    is_at_commit: bool = False  # the last run has come so far
    is_doubtful: bool = False  # it may be committed: that was begun, and nobody said how it ended

    def failed(self, error: Exception) -> None:
        self.is_doubtful = self.is_doubtful or (self.is_at_commit and _may_be_done(error))


class Database:
    """The store, and the thread that does all work on it. Raises StoreError for a URL that is none."""

    engine: Engine

    def __init__(self, url: str) -> None:
        self.url = parse(url)
        self.is_sqlite = is_sqlite(self.url)
        self.is_open = False
        self.trouble = ""  # why the last commit failed, if it did
        self.missing = ""  # why nothing may be accepted although commits succeed: SQLite's file is not there any more
        self.damage = ""  # why nothing may be written any more: SQLite's file is malformed
        self.files: Files | None = None  # of an SQLite database that is this process' own
        self._look_at = 0.0  # monotonic
        self._is_continued = False  # nothing was sent from another copy of it
        self._hurry = threading.Event()
        self._is_ending = False  # what is asked from here on is not done
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="flowbridge-store", daemon=True)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-read")
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, *, shared: bool = False, make: bool = False) -> None:
        """Open it and bring its schema up to date. Raises StoreError: one line.

        `shared`: beside a server that may be running on the same SQLite file, for a command that is soon done. Then
        StoreAbsent where there is none, unless it is to `make` it: never where a server has one still.
        """
        if self.is_open:
            return
        if self.is_sqlite and not shared:
            self.files = own(self.url)
        try:
            self.engine = connect(self.url, shared=shared, make=make or not shared)
            if not shared:
                if self.is_sqlite:
                    self._check_all()
                self._begin()
            self.is_open = True
        finally:
            if self.files is not None and not self.is_open:
                self.files.close()

    def _begin(self) -> None:
        """It is this process' own from here on, or this replica's."""
        try:
            if self.files is not None:
                self.files.begin()
                event.listen(self.engine, "connect", self.files.verify, insert=True)
            with told(self.url):
                self._is_continued = self._read(lambda connection: is_continued(connection, self.files))
        except BaseException:
            self.engine.dispose()
            raise

    def start(self) -> None:
        """Begin to work; to be called on the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Finish what waits, then close."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        self._reader.shutdown()
        self.close()

    def close(self) -> None:
        if self.files is not None and not self.missing:
            self._new_epoch(self.files)
        if self.files is not None:
            refusals = (SQLAlchemyError, sqlite3.Error)
            with contextlib.suppress(*refusals), contextlib.closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")  # not possible inside a transaction
        self.engine.dispose()
        if self.files is not None:
            self.files.close()

    async def resume(self, lease_ms: int) -> None:
        """Before anything is sent. Raises StoreUnavailable."""
        await self.run(
            lambda connection: resume(connection, self.files, lease_ms, continued=self._is_continued), alone=True
        )

    def hurry(self) -> None:
        """Somebody waits for what is queued: do not linger for more."""
        self._hurry.set()

    def run(
        self,
        work: Callable[[Connection], T],
        *,
        lingers: bool = False,
        always: bool = False,
        alone: bool = False,
        undo: Callable[[Connection, str], None] | None = None,
        found_nothing: Callable[[], bool] | None = None,
    ) -> "asyncio.Future[T]":
        """Queue some work; the future is done when its commit is. Work may run more than once before it succeeds.

        Also when it was committed, and the answer to that got lost: then it has to see what it has done.
        `found_nothing`: tells that the run that has just ended has seen that nothing of an earlier one is there.

        `undo`: takes back what must not be promised, when the database's file proves to have been missing (and why)
        once that was committed.

        `alone`: it locks several rows that other replicas lock, too. It does so in one order; with more work in the
        same transaction there would be none.

        Raises StoreFull, unless it is to be done `always`; the future raises StoreUnavailable, and StoreUnsure where it
        may be done all the same.
        """
        assert self._loop is not None
        if self._jobs.qsize() >= MAX_WAITING and not always:
            raise StoreFull("too many callers wait for the store")
        future: asyncio.Future[T] = self._loop.create_future()
        if not lingers:
            self._hurry.set()
        self._jobs.put(_Job(work, future, alone, undo, found_nothing))
        return future

    async def look(self) -> None:
        """Look whether an SQLite file is still whole, as far as that is quickly seen. Raises StoreUnavailable."""
        if not self.is_sqlite:
            return
        if self.files is not None:
            with contextlib.suppress(OSError):  # what follows tells that, too
                if why := damage.of_head(self.files.header()):
                    self._is_damaged(why)
        await self.read(lambda connection: connection.exec_driver_sql("SELECT max(id) FROM outbox").scalar())
        if self.damage:
            raise StoreUnavailable(self.damage)

    def _check_all(self) -> None:
        try:
            with self.engine.connect().execution_options(reads=True) as connection:
                found = damage.of_all(connection)
        except SQLAlchemyError as error:
            found = reason(error)
        if found:
            self.engine.dispose()
            raise StoreError(f"{name(self.url)} is malformed, restore a backup of it: {found}")

    def _is_damaged(self, why: str) -> None:
        """From here on until it is started again with another file: what is written now might never be read."""
        if not self.damage:
            self.damage = f"the database is malformed: {why}"
            log.error("store_damaged", database=name(self.url), error=why)

    async def flush(self, *, lingers: bool = False) -> None:
        """Wait until all that was asked for so far is on the disk; not when it cannot be brought there just now."""
        if not self.trouble:
            with contextlib.suppress(StoreFull, StoreUnavailable):
                await self.run(lambda connection: None, lingers=lingers)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Some reading, of one moment, beside the writer and one at a time. Raises StoreUnavailable."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, work)
        except SQLAlchemyError as error:
            if self.is_sqlite and (why := damage.named(error)):
                self._is_damaged(why)
            raise StoreUnavailable(f"the store cannot be read: {reason(error)}") from None

    def _read(self, work: Callable[[Connection], T]) -> T:
        level: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(reads=True, **level) as connection:
            return work(connection)

    # the writer thread

    def _write(self) -> None:
        while (taken := self._take()) is not None:
            for group in [taken] if self.is_sqlite else _transactions(taken):
                try:
                    self._commit(group)
                except Exception as error:
                    self._one_by_one(group, error)
            if self.files is not None and time.monotonic() >= self._look_at:
                self._look(self.files)
        log.info("store_closed")

    def _take(self) -> list[_Job[Any]] | None:
        first = None if self._is_ending else self._next()
        if first is None:
            return None
        self._hurry.wait(LINGER_SECONDS)
        self._hurry.clear()
        group = [first]
        while len(group) < MAX_GROUP:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._is_ending = True
                break
            group.append(job)
        return group

    def _next(self) -> _Job[Any] | None:
        while True:
            try:
                return self._jobs.get(timeout=LOOK_SECONDS if self.files is not None else None)
            except queue.Empty:
                if self.files is not None:
                    self._look(self.files)

    def _commit(self, group: Sequence[_Job[Any]]) -> None:
        started = time.perf_counter()
        if self.files is not None and self.files.is_shared:
            raise StoreUnavailable(self.missing)
        for job in group:
            job.is_at_commit = False
        with self.engine.begin() as connection:
            for job in group:
                job.result = job.work(connection)
                if job.found_nothing is not None and job.found_nothing():
                    job.is_doubtful = False
            for job in group:
                job.is_at_commit = True
        metrics.commit_seconds.observe(time.perf_counter() - started)
        self.trouble = ""
        unsure = self._look_after(self.files, group) if self.files is not None else ""
        if unsure:  # it is done, and must not be done again
            self._tell(partial(_failed, StoreUnsure(unsure)), [job for job in group if job.undo is not None])
            group = [job for job in group if job.undo is None]
        self._tell(_succeeded, group)

    def _look_after(self, files: Files, group: Sequence[_Job[Any]]) -> str:
        """It is committed, but nobody has heard of it yet. Returns why what should be taken back could not be."""
        try:
            files.note_epoch()
        except Exception as error:  # after the next commit, then
            log.warning("store_not_looked_at", error=error)
        self._is_missing(files, files.missing())
        all_ = [job.undo for job in group if job.undo is not None] if self.missing else []
        if all_:
            try:
                with self.engine.begin() as connection:
                    for undo in all_:
                        undo(connection, self.missing)
            except Exception as error:
                return f"{self.missing}, and it cannot be taken back: {reason(error)}"
        return ""

    def _is_missing(self, files: Files, missing: str) -> None:
        if missing != self.missing:
            self.missing = missing
            if missing:
                files.say(missing)
            else:
                log.info("store_back", file=str(files.path))

    def _look(self, files: Files) -> None:
        """At everything, which is not done after each commit."""
        try:
            self._is_missing(files, files.look())
        except (OSError, sqlite3.Error) as error:
            log.warning("store_not_looked_at", error=error)
        if not (self.missing or self.trouble):  # what is locked or full would be waited for once more
            self._new_epoch(files)
        self._look_at = time.monotonic() + LOOK_SECONDS

    def _new_epoch(self, files: Files) -> None:
        """Tell what is in the database now from any copy that was made of it before."""
        with contextlib.suppress(SQLAlchemyError, sqlite3.Error):  # locked, or full: another time
            if files.has_changed():
                with self.engine.begin() as connection:
                    files.new_epoch(connection)
                files.note_epoch()

    def _one_by_one(self, group: Sequence[_Job[Any]], error: Exception) -> None:
        deadline = time.monotonic() + RETRY_SECONDS
        for job in group:
            trouble = self._insist(job, error, deadline)
            if trouble is not None:
                why = f"the store cannot be written: {reason(trouble)}"
                away = StoreUnsure(why) if job.is_doubtful else StoreUnavailable(why)
                self._tell(partial(_failed, away), [job])

    def _insist(self, job: _Job[Any], error: Exception, deadline: float) -> Exception | None:
        """Run one job, again and again as long as what is wrong may pass; returns what was wrong to the last."""
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
                if self.is_sqlite and (why := damage.named(again)):
                    self._is_damaged(why)
                if not _passes(again) or time.monotonic() > deadline:
                    job.failed(again)
                    return again
                error = again
            else:
                return None
            time.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _tell(self, what: Callable[[Sequence[_Job[Any]]], None], group: Sequence[_Job[Any]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(what, group)


def _transactions(jobs: Sequence[_Job[Any]]) -> Iterator[list[_Job[Any]]]:
    """The same jobs in the same order: those that are to be alone are."""
    for _, together in groupby(enumerate(jobs), key=lambda pair: pair[0] if pair[1].alone else -1):
        yield [job for _, job in together]


def _succeeded(group: Sequence[_Job[Any]]) -> None:
    for job in group:
        if not job.future.done():
            job.future.set_result(job.result)


def _failed(reason: Exception, group: Sequence[_Job[Any]]) -> None:
    for job in group:
        if not job.future.done():
            job.future.set_exception(reason)


def _may_be_done(error: Exception) -> bool:
    """Whether a commit that ended so may be one all the same."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):  # a full disk takes no last page, without which the others are nothing
        return not any(words in str(error.orig) for words in ("full", "locked"))
    return getattr(error.orig, "sqlstate", None) is None  # what PostgreSQL itself says of it is true


def _passes(error: Exception) -> bool:
    """Whether a database says that it may work in a moment: locked, restarted, connection lost."""
    if not isinstance(error, DBAPIError):
        return False
    is_full = any(words in str(error.orig) for words in ("full", "No space left"))
    return error.connection_invalidated or (isinstance(error, OperationalError) and not is_full)
