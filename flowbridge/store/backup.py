"""A copy of an SQLite database that may be in use: everything committed at one moment, in one file."""

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path

from flowbridge.store.errors import StoreError
from flowbridge.store.sqlite_file import connect, create, sync

WAIT_SECONDS = 30.0  # for a lock on the database


def copy_database(source: Path, target: Path) -> None:
    """To a new file that only its owner may read. Raises StoreError: one line."""

    def write(part: Path) -> None:
        with (
            contextlib.closing(connect(source, WAIT_SECONDS)) as database,
            contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy,
        ):
            database.backup(copy)  # in one step: what is written meanwhile does not wait for it
            copy.execute("PRAGMA journal_mode=DELETE")  # no -wal file beside it
            copy.execute("PRAGMA user_version=0")  # no epoch: a copy is recognised whenever it is put back
            problem = str(copy.execute("PRAGMA quick_check(1)").fetchone()[0])
        if problem != "ok":
            raise StoreError(f"{source} is damaged: {problem.splitlines()[0]}")

    _make(target, write)


def copy_key(source: Path, target: Path) -> None:
    """The same for the small file of the key."""
    _make(target, lambda part: part.write_bytes(source.read_bytes()))


def _make(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely, or not at all."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        create(part)
        try:
            write(part)
            os.link(part, target)  # nothing is overwritten
        finally:
            part.unlink()
        sync(target)
    except FileExistsError:
        raise StoreError(f"{target} is there already, and is not overwritten") from None
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise StoreError(f"cannot copy the database: {error}") from None
