"""One engine, one writer thread, group commit.

All that waits while a commit runs joins the next one: a hundred senders pay for one fsync. What the engine refuses is
run again by itself, so that it does not take its group along.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import IO, Any, Generic, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from flowbridge import log, metrics
from flowbridge.store import damage
from flowbridge.store.engine import connect, is_sqlite, lock, name, parse, reason
from flowbridge.store.errors import StoreError, StoreFull, StoreUnavailable

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
    result: T | None = None


class Database:
    """The store, and the thread that does all work on it. Raises StoreError for a URL that is none."""

    engine: Engine

    def __init__(self, url: str) -> None:
        self.url = parse(url)
        self.is_sqlite = is_sqlite(self.url)
        self.is_open = False
        self.trouble = ""  # why the last commit failed, if it did
        self.damage = ""  # why nothing may be written any more: SQLite's file is malformed
        self._lock_file: IO[bytes] | None = None
        self._hurry = threading.Event()
        self._is_ending = False  # what is asked from here on is not done
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="flowbridge-store", daemon=True)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-read")
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, *, shared: bool = False) -> None:
        """Open it and bring its schema up to date. Raises StoreError: one line.

        `shared`: beside a server that may be running on the same SQLite file, for a command that is soon done.
        """
        if self.is_open:
            return
        if self.is_sqlite and not shared:
            self._lock_file = lock(self.url)
        try:
            self.engine = connect(self.url, shared=shared)
            if self.is_sqlite and not shared:
                self._check_all()
            self.is_open = True
        finally:
            if self._lock_file is not None and not self.is_open:
                self._lock_file.close()

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
        if self.is_sqlite:
            with contextlib.suppress(SQLAlchemyError), contextlib.closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")  # not possible inside a transaction
        self.engine.dispose()
        if self._lock_file is not None:
            self._lock_file.close()

    def hurry(self) -> None:
        """Somebody waits for what is queued: do not linger for more."""
        self._hurry.set()

    def run(
        self, work: Callable[[Connection], T], *, lingers: bool = False, always: bool = False, alone: bool = False
    ) -> "asyncio.Future[T]":
        """Queue some work; the future is done when its commit is. Work may run more than once before it succeeds.

        `alone`: it locks several rows that other replicas lock, too. It does so in one order; with more work in the
        same transaction there would be none.

        Raises StoreFull, unless it is to be done `always`; the future raises StoreUnavailable.
        """
        assert self._loop is not None
        if self._jobs.qsize() >= MAX_WAITING and not always:
            raise StoreFull("too many callers wait for the store")
        future: asyncio.Future[T] = self._loop.create_future()
        if not lingers:
            self._hurry.set()
        self._jobs.put(_Job(work, future, alone))
        return future

    async def look(self) -> None:
        """Look whether an SQLite file is still whole, as far as that is quickly seen. Raises StoreUnavailable."""
        if not self.is_sqlite:
            return
        if head := damage.of_head(self.url):
            self._is_damaged(head)
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

    async def flush(self) -> None:
        """Wait until all that was asked for so far is on the disk; not when it cannot be brought there just now."""
        if not self.trouble:
            with contextlib.suppress(StoreFull, StoreUnavailable):
                await self.run(lambda connection: None)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Some reading, beside the writer and one at a time. Raises StoreUnavailable."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, work)
        except SQLAlchemyError as error:
            if self.is_sqlite and (why := damage.named(error)):
                self._is_damaged(why)
            raise StoreUnavailable(f"the store cannot be read: {reason(error)}") from None

    def _read(self, work: Callable[[Connection], T]) -> T:
        with self.engine.connect().execution_options(reads=True) as connection:
            return work(connection)

    # the writer thread

    def _write(self) -> None:
        while (taken := self._take()) is not None:
            for group in [taken] if self.is_sqlite else _transactions(taken):
                try:
                    self._commit(group)
                except Exception as error:
                    self._one_by_one(group, error)
        log.info("store_closed")

    def _take(self) -> list[_Job[Any]] | None:
        first = None if self._is_ending else self._jobs.get()
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

    def _commit(self, group: Sequence[_Job[Any]]) -> None:
        started = time.perf_counter()
        with self.engine.begin() as connection:
            for job in group:
                job.result = job.work(connection)
        metrics.commit_seconds.observe(time.perf_counter() - started)
        self.trouble = ""
        self._tell(_succeeded, group)

    def _one_by_one(self, group: Sequence[_Job[Any]], error: Exception) -> None:
        deadline = time.monotonic() + RETRY_SECONDS
        for job in group:
            trouble = self._insist(job, error, deadline)
            if trouble is not None:
                away = StoreUnavailable(f"the store cannot be written: {reason(trouble)}")
                self._tell(partial(_failed, away), [job])

    def _insist(self, job: _Job[Any], error: Exception, deadline: float) -> Exception | None:
        """Run one job, again and again as long as what is wrong may pass; returns what was wrong to the last."""
        pause = 0.05
        while True:
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


def _passes(error: Exception) -> bool:
    """Whether a database says that it may work in a moment: locked, restarted, connection lost."""
    if not isinstance(error, DBAPIError):
        return False
    is_full = any(words in str(error.orig) for words in ("full", "No space left"))
    return error.connection_invalidated or (isinstance(error, OperationalError) and not is_full)
