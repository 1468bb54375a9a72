"""Whether an SQLite file is malformed: what is written to such a file may be lost without any error."""

import sqlite3

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from flowbridge.store import outbox
from flowbridge.store.sqlite_file import MAGIC

CHECKED_BYTES = 64 * 1024**2  # up to this size a file is checked completely at the start: some 0.2 s
_MALFORMED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def named(error: BaseException) -> str:
    """SQLite's description of a malformed file, in one line; an empty string for any other error."""
    said = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(said, sqlite3.Error) and getattr(said, "sqlite_errorcode", 0) & 0xFF in _MALFORMED:
        return str(said).partition("\n")[0]
    return ""


def of_head(head: bytes) -> str:
    """What is wrong with the first bytes of a file; an empty string when they are right, or it is empty."""
    return "" if head[: len(MAGIC)] in (MAGIC, b"") else "the file is not a database any more"


def of_all(connection: Connection) -> str:
    """What is wrong with a database: with all of it, or with what is queued when it is large.

    Raises DatabaseError where it cannot even be read.
    """
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar() or 0
    if pages * (connection.exec_driver_sql("PRAGMA page_size").scalar() or 0) <= CHECKED_BYTES:
        found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
        if found != "ok":
            return found.removeprefix("*** in database main ***").strip().partition("\n")[0]
    outbox.queued(connection)
    return ""
