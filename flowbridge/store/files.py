"""The files of an open SQLite database: whether they still exist, and whether the database is the one from before.

A file that is removed while it is open goes on working for the process that has it open: commits succeed, and are lost
when the process ends. And a file that was put in its place, a backup say, knows nothing of what was sent since.
"""

import contextlib
import os
import secrets
import sqlite3
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import IO

from sqlalchemy import Connection

from flowbridge import log
from flowbridge.store import lock_file
from flowbridge.store.errors import StoreError
from flowbridge.store.file_check import check_wal
from flowbridge.store.lock_file import State
from flowbridge.store.sqlite_file import HEADER_BYTES, MAGIC, connect, create, epoch_of, identity, sync

MAX_EPOCHS = 5_000  # a checkpoint, which brings the epoch into the file itself, comes after 1,000 pages at the latest

REMOVED = "the store's file was removed or moved"
REPLACED = "another file was put in the place of the store's"
OVERWRITTEN = "the store's file was overwritten"
NO_WAL = "the store's -wal file was removed or replaced"
NO_SHM = "the store's -shm file was removed or replaced"
SHARED = "another flowbridge was started on the same file"

_HINTS = {
    REMOVED: "nothing is accepted, what is queued is sent on. Put the same file back, or stop flowbridge: "
    "at its end it writes all that it has back to this place",
    REPLACED: "nothing is accepted, what is queued is sent on. Stop flowbridge: what it has is written to a file "
    "beside this one (.rescued), and the next start uses what is in this place",
    OVERWRITTEN: "nothing is accepted. Stop flowbridge, remove the -wal and -shm files, put a backup in this place",
    NO_WAL: "nothing is accepted, what is queued is sent on. Restart flowbridge: nothing is lost by that",
    NO_SHM: "nothing is accepted, what is queued is sent on. Restart flowbridge: nothing is lost by that",
    SHARED: "the lock file beside it was removed, which must not be done: nothing more is accepted or sent here. "
    "Stop this flowbridge",
}


class Files:
    """Made before the database is opened and closed after it: a descriptor of ours must not be closed in between.

    POSIX drops all locks of a process on a file, SQLite's as well, when the process closes any descriptor of it.
    Raises StoreError when the -wal file belongs to another database. For one thread at a time, but for `verify`.
    """

    def __init__(self, path: str, lock: IO[bytes]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 (a link is not followed: it may be changed, too)
        real = self.path.resolve()  # where SQLite keeps its other files
        self._paths = {"": self.path, **{name: Path(f"{real}{name}") for name in ("-wal", "-shm", ".lock")}}
        self._lock = lock
        self._file = os.open(self.path, os.O_RDONLY)
        self._anchor: sqlite3.Connection | None = None
        self._epochs: deque[int] = deque(maxlen=MAX_EPOCHS)
        self._seen_version = 0
        self._is_pending = False  # a new epoch was begun
        self._found = ""  # by the last full check
        self._own: dict[str, tuple[int, int] | None] = {}
        self.is_shared = False  # with another process, which cannot be repaired
        self.state = lock_file.read(lock)  # as the lock file has it
        file = os.fstat(self._file)
        self.continues = file.st_size == 0  # the database is the one that was here before, with all that was written
        wal = self._paths["-wal"]
        if wal.exists() and (wrong := check_wal(self.path, wal, self.header(), file, self.state)):
            self.close()
            raise StoreError(wrong)

    def begin(self) -> None:
        """The database is open. From here on its files have to stay, and commands can read which they are."""
        # One connection that stays: SQLite itself removes the -wal file when the last one is closed.
        self._anchor = connect(self.path)
        epoch = self._ask("PRAGMA user_version")
        self._seen_version = self._ask("PRAGMA data_version")
        self._own = {name: self._identity(name) for name in ("", "-wal", "-shm")}
        file = os.fstat(self._file)
        if self._own[""] != identity(file):
            raise StoreError(f"{self.path} was replaced while it was opened")
        is_same = file.st_ino == self.state.inode and epoch == self.state.epoch != 0
        self.continues |= is_same
        self._note(epoch if is_same else 0)  # 0: until it has a new one, it does not continue, also for the next start
        self._epochs.extend((epoch_of(self.header()), epoch))

    def verify(self, connection: sqlite3.Connection, _: object) -> None:
        """For each new connection: one to another file would mix two databases up."""
        if self._own and self.missing() in (REMOVED, REPLACED):
            connection.close()
            raise sqlite3.OperationalError(self.missing())

    def missing(self) -> str:
        """Why nothing that is committed is kept; empty when it is. Quick: two system calls."""
        try:
            if self._own[""] != identity(found := self.path.stat()):
                return REPLACED
            if self._own["-wal"] != self._identity("-wal"):
                # Both may have gone between the two looks, with their folder.
                return NO_WAL if self._own[""] == identity(self.path.stat()) else REPLACED
        except OSError:
            return REMOVED
        return self._found if found.st_size else OVERWRITTEN

    def check(self) -> str:
        """The same for all files; what can be repaired is."""
        self._found = ""
        if (found := self.missing()) in (REMOVED, REPLACED):
            with contextlib.suppress(OSError):  # its folder is gone, too
                self._keep_lock()  # else another process could take its place
            return found
        self.is_shared = self.is_shared or not self._keep_lock()
        header = self.header()
        if self.is_shared:
            self._found = SHARED
        elif header[:16] != MAGIC or epoch_of(header) not in self._epochs:
            self._found = OVERWRITTEN
        elif found == NO_WAL or self._own["-shm"] != self._identity("-shm"):
            self._found = found or NO_SHM
            # What is in the -wal file alone: into the file that still exists.
            with contextlib.suppress(sqlite3.Error):
                self._ask("PRAGMA wal_checkpoint(PASSIVE)")
        return self._found

    def report(self, missing: str) -> None:
        """Log that the files are missing, or, with an empty text, are back."""
        if missing:
            log.error("store_missing", file=str(self.path), error=missing, hint=_HINTS[missing])
        else:
            log.info("store_back", file=str(self.path))

    def header(self) -> bytes:
        """The first bytes of the database; of the file that is open, also where another one is in its place."""
        return os.pread(self._file, HEADER_BYTES, 0)

    # whether it is the same database as before

    def has_changed(self) -> bool:
        """Whether anything was committed since the last new epoch."""
        return self._ask("PRAGMA data_version") != self._seen_version

    def new_epoch(self, connection: Connection) -> None:
        """Mark the database, in a transaction: copies that were made before are older from here on."""
        epoch = secrets.randbelow(2**31 - 1) + 1
        self._epochs.append(epoch)
        self._is_pending = True
        connection.exec_driver_sql(f"PRAGMA user_version={epoch}")

    def note_epoch(self) -> None:
        """After each commit: record in the lock file which epoch the database has, when that is a new one."""
        if self._is_pending:
            self._seen_version = self._ask("PRAGMA data_version")
            self._note(self._ask("PRAGMA user_version"))
            self._is_pending = False

    def _note(self, epoch: int) -> None:
        inode, wal = (own[1] if (own := self._own[name]) else 0 for name in ("", "-wal"))
        self.state = lock_file.write(self._lock, State(epoch, inode, wal))

    # the end

    def close(self) -> None:
        """After all other connections. What is not in its place any more is written there, or beside it."""
        lost = self.missing() if self._own else ""
        if self._anchor is not None:
            rescued = self._copy(self._anchor) if lost in (REMOVED, REPLACED) else None
            self._anchor.close()
            if rescued is not None:
                self._put_back(rescued)
        os.close(self._file)
        self._lock.close()

    def _copy(self, anchor: sqlite3.Connection) -> Path | None:
        path = Path(f"{self.path}.rescued-{secrets.token_hex(4)}")
        try:
            create(path)
            with contextlib.closing(connect(path)) as copy:
                anchor.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")
            sync(path)
        except (OSError, sqlite3.Error) as error:
            path.unlink(missing_ok=True)
            log.error("store_lost", file=str(self.path), error=error)
            return None
        return path

    def _put_back(self, rescued: Path) -> None:
        for name in ("-wal", "-shm"):  # of the file that is gone; to another one they would do harm
            if self._own[name] == self._identity(name):
                self._paths[name].unlink()
        try:
            os.link(rescued, self.path)  # nothing is overwritten
        except OSError:
            log.error("store_rescued", file=str(rescued), hint=f"{self.path} is another file: choose one of them")
            return
        rescued.unlink()
        sync(self.path)
        lock_file.write(self._lock, replace(self.state, inode=self.path.stat().st_ino))
        log.warning("store_rescued", file=str(self.path), hint="it had been removed, and is there again")

    def _keep_lock(self) -> bool:
        """Create a lock file that is gone again. False when another process has it."""
        path = self._paths[".lock"]
        if self._identity(".lock") == identity(os.fstat(self._lock.fileno())):
            return True
        try:
            lock = lock_file.take(path)
        except BlockingIOError:
            return False
        self._lock.close()
        self._lock = lock
        self.state = lock_file.write(lock, self.state)
        log.warning(
            "store_lock_made_again", file=str(path), hint="it was removed: two processes on one file would disagree"
        )
        return True

    def _identity(self, name: str) -> tuple[int, int] | None:
        try:
            return identity(self._paths[name].stat())
        except FileNotFoundError:
            return None

    def _ask(self, pragma: str) -> int:
        assert self._anchor is not None
        return int(self._anchor.execute(pragma).fetchone()[0])
