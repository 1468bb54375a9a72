"""Work that waits for the writer thread, and what an error says about its commit."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, OperationalError

T = TypeVar("T")

Undo = Callable[[Connection, str], None]


@dataclass(slots=True)
class Job(Generic[T]):
    """Some work on a connection; see `Database.run` for the options."""

    work: Callable[[Connection], T]
    future: "asyncio.Future[T]"
    alone: bool = False
    undo: Undo | None = None
    found_nothing: Callable[[], bool] | None = None
    result: T | None = None
    is_at_commit: bool = False  # the last run has come so far
    is_doubtful: bool = False  # it may be committed: a commit was begun, and how it ended is unknown

    def run(self, connection: Connection) -> None:
        self.result = self.work(connection)
        if self.found_nothing is not None and self.found_nothing():
            self.is_doubtful = False

    def failed(self, error: Exception) -> None:
        self.is_doubtful = self.is_doubtful or (self.is_at_commit and may_be_committed(error))


def transactions(jobs: Sequence[Job[Any]]) -> Iterator[list[Job[Any]]]:
    """The same jobs in the same order, cut so that each that is to be `alone` is."""
    for _, together in groupby(enumerate(jobs), key=lambda pair: pair[0] if pair[1].alone else -1):
        yield [job for _, job in together]


def finish(group: Sequence[Job[Any]], error: Exception | None = None) -> None:
    """Give the callers their results, or this error. On the event loop."""
    for job in group:
        if job.future.done():
            continue
        if error is None:
            job.future.set_result(job.result)
        else:
            job.future.set_exception(error)


def may_be_committed(error: Exception) -> bool:
    """Whether a commit that failed with this may have been done all the same."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):  # a full disk takes no last page, without which the others are void
        return not any(words in str(error.orig) for words in ("full", "locked"))
    return getattr(error.orig, "sqlstate", None) is None  # an error that PostgreSQL itself reports is certain


def is_transient(error: Exception) -> bool:
    """Whether the database may work in a moment: locked, restarted, connection lost."""
    if not isinstance(error, DBAPIError):
        return False
    is_full = any(words in str(error.orig) for words in ("full", "No space left"))
    return error.connection_invalidated or (isinstance(error, OperationalError) and not is_full)
