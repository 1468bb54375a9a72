"""A copy of an SQLite database that may be in use: all that was committed at one moment, in one file."""

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path

from flowbridge.store.errors import StoreError
from flowbridge.store.files import connect, sync

WAIT_SECONDS = 30.0  # for a lock on the database


def copy_database(source: Path, target: Path) -> None:
    """To a file that is not there yet, for its owner only. Raises StoreError: one line."""

    def write(part: Path) -> None:
        with (
            contextlib.closing(connect(str(source), WAIT_SECONDS)) as database,
            contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy,
        ):
            database.backup(copy)  # in one step: what is written meanwhile does not wait for it
            copy.execute("PRAGMA journal_mode=DELETE")  # no -wal file beside it
            copy.execute("PRAGMA user_version=0")  # no epoch: a copy is known as such whenever it is put back
            problem = str(copy.execute("PRAGMA quick_check(1)").fetchone()[0])
        if problem != "ok":
            raise StoreError(f"{source} is damaged: {problem.splitlines()[0]}")

    _make(target, write)


def copy_key(source: Path, target: Path) -> None:
    """The same of a small file."""
    _make(target, lambda part: part.write_bytes(source.read_bytes()))


def _make(target: Path, write: Callable[[Path], object]) -> None:
    """On the disk whole, or not at all."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
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
