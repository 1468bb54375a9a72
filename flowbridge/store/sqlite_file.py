"""An SQLite database as a file: making it, connecting to it, and what its header says."""

import os
import sqlite3
from pathlib import Path

MAGIC = b"SQLite format 3\0"  # what a database begins with
HEADER_BYTES = 100  # https://www.sqlite.org/fileformat.html#the_database_header


def create(path: Path) -> None:
    """A new file, closed to others: SQLite gives -wal and -shm the same mode. Raises FileExistsError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def connect(path: Path, timeout: float = 5.0) -> sqlite3.Connection:
    """A connection to a file that exists: SQLite would create an empty one. Transactions are explicit."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, timeout=timeout, uri=True, check_same_thread=False, isolation_level=None)


def sync(path: Path) -> None:
    """Bring a new file, and its name, to the disk."""
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def epoch_of(header: bytes) -> int:
    """`user_version`, which holds the epoch: see `continuity`."""
    return int.from_bytes(header[60:64], "big", signed=True)


def is_copy(header: bytes) -> bool:
    """Whether a file is a backup: a database that has no -wal file."""
    return header[:16] == MAGIC and header[18:20] == b"\1\1"
