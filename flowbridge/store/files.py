"""The files of an open SQLite database: are they still there, and is the database the one that was there before?

A file that is removed while it is open goes on working for the process that has it open: commits succeed, and are gone
with the process. And a file that was put in its place, a backup say, knows nothing of what was sent since.
"""

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from sqlalchemy import Connection

from flowbridge import log
from flowbridge.store.errors import StoreAbsent, StoreError

LOOK_SECONDS = 2.0  # between two looks at everything; what a commit went into is looked at after each
MAX_EPOCHS = 5_000  # a checkpoint, which brings the epoch into the file itself, comes after 1,000 pages at the latest

LOCK_SECONDS = 1.0  # for which the lock is waited for: commands have it for a moment
AGAIN_SECONDS = 0.02

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100  # https://www.sqlite.org/fileformat.html#the_database_header
_STATE_BYTES = 256
_CLOCK_NS = 50_000_000  # a file system's clock ticks every 10 ms, at worst

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


_kept: dict[tuple[int, int], int] = {}  # files that commands have looked at: no other can be what is named by these

_REMOVED = "{0} was removed or moved, and a flowbridge that runs has it open still: stop that, which puts it back"

_LEFT = "{0} is gone, and what was written last is in {0}-wal: put that file back, or a backup and no -wal"


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered beside the database, in the lock file. `epoch`: what the database itself holds, too.

    `at`: when that was written (ns). A file system gives numbers of inodes away again, but no copy of the lock file has
    such a time of its last change (ctime), whatever else is copied with it.
    """

    epoch: int = 0
    inode: int = 0
    wal: int = 0
    at: int = 0


class Files:
    """Made before the database is opened and closed after it: a descriptor of ours must not be closed in between.

    POSIX drops all locks of a process on a file, SQLite's as well, when the process closes any descriptor of it.
    Raises StoreError when the -wal file belongs to another database. For one thread at a time, but for `verify`.
    """

    def __init__(self, path: str, lock: IO[bytes]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 (a link is left as it is: it may be changed, too)
        real = self.path.resolve()  # where SQLite keeps its other files
        self._paths = {"": self.path, **{name: Path(f"{real}{name}") for name in ("-wal", "-shm", ".lock")}}
        self._lock = lock
        self._file = os.open(self.path, os.O_RDONLY)
        self._anchor: sqlite3.Connection | None = None
        self._epochs: deque[int] = deque(maxlen=MAX_EPOCHS)
        self._seen_version = 0
        self._is_pending = False  # a new epoch was begun
        self._found = ""  # by the last look at everything
        self._own: dict[str, tuple[int, int] | None] = {}
        self.is_shared = False  # with another process, for which no mending is known
        self._noted = _read_state(self._lock)
        is_new = os.fstat(self._file).st_size == 0
        self.continues = is_new  # the database is the one that was here before, with all that was written to it
        try:
            self._check_wal()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """The database is open. From here on its files have to stay, and commands are told which they are."""
        # One connection that stays: SQLite itself removes the -wal file when the last one is closed.
        self._anchor = sqlite3.connect(_uri(self.path), uri=True, check_same_thread=False, isolation_level=None)
        epoch = self._ask("PRAGMA user_version")
        self._seen_version = self._ask("PRAGMA data_version")
        self._own = {name: self._identity(name) for name in ("", "-wal", "-shm")}
        file = os.fstat(self._file)
        if self._own[""] != _identity(file):
            raise StoreError(f"{self.path} was replaced while it was opened")
        is_same = file.st_ino == self._noted.inode and epoch == self._noted.epoch != 0
        self.continues |= is_same
        self._note(epoch if is_same else 0)  # 0: until it has a new one, it does not continue, also for the next start
        self._epochs.extend((_header_epoch(self.header()), epoch))

    def verify(self, connection: sqlite3.Connection, _: object) -> None:
        """For each new connection: one to another file would mix two databases up."""
        if self._own and self.missing() in (REMOVED, REPLACED):
            connection.close()
            raise sqlite3.OperationalError(self.missing())

    def missing(self) -> str:
        """Why nothing that is committed is kept; empty when it is. Quick: two system calls."""
        try:
            if self._own[""] != _identity(found := self.path.stat()):
                return REPLACED
            if self._own["-wal"] != self._identity("-wal"):
                return NO_WAL
        except OSError:
            return REMOVED
        return self._found if found.st_size else OVERWRITTEN

    def look(self) -> str:
        """The same of everything, and what can be mended is."""
        self._found = ""
        if (found := self.missing()) in (REMOVED, REPLACED):
            with contextlib.suppress(OSError):  # its folder is gone, too
                self._keep_lock()  # else its place would seem to be nobody's
            return found
        if self._is_shared():
            self._found = SHARED
        elif not self._is_ours(self.header()):
            self._found = OVERWRITTEN
        elif found == NO_WAL or self._own["-shm"] != self._identity("-shm"):
            self._found = found or NO_SHM
            # What lies in the -wal file alone: into the file that is still there.
            with contextlib.suppress(sqlite3.Error):
                self._ask("PRAGMA wal_checkpoint(PASSIVE)")
        return self._found

    def say(self, missing: str) -> None:
        """Log it."""
        log.error("store_missing", file=str(self.path), error=missing, hint=_HINTS[missing])

    # is it the same database as before

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
        """After each commit: remember beside the database which epoch it has, when that is a new one."""
        if self._is_pending:
            self._seen_version = self._ask("PRAGMA data_version")
            self._note(self._ask("PRAGMA user_version"))
            self._is_pending = False

    def _note(self, epoch: int) -> None:
        self._noted = State(epoch, *(own[1] if (own := self._own[name]) else 0 for name in ("", "-wal")))
        self._write_state()

    def _write_state(self) -> None:
        with contextlib.suppress(OSError):  # then the next start looks for what is queued in its rooms
            for _ in range(5):  # the process may stand still between the time and the writing
                self._noted = replace(self._noted, at=time.time_ns())
                os.pwrite(self._lock.fileno(), json.dumps(asdict(self._noted)).encode().ljust(_STATE_BYTES), 0)
                if _is_written_at(self._lock, self._noted.at):
                    break

    def _check_wal(self) -> None:
        """A -wal file that belongs to another database would be written into this one."""
        wal = self._paths["-wal"]
        if wal.exists() and _has_others_wal(wal, self.header(), os.fstat(self._file), self._noted):
            raise StoreError(_others_wal(self.path))

    # the end

    def close(self) -> None:
        """After all other connections. What is not in its place any more is written there, or beside it."""
        rescued = None
        lost = self.missing() if self._own else ""
        if self._anchor is not None:
            if lost in (REMOVED, REPLACED):
                rescued = self._copy()
            self._anchor.close()
        if rescued is not None:
            self._put_back(rescued)
        os.close(self._file)
        self._lock.close()

    def _copy(self) -> Path | None:
        assert self._anchor is not None
        path = Path(f"{self.path}.rescued-{secrets.token_hex(4)}")
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(sqlite3.connect(path)) as copy:
                self._anchor.backup(copy)
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
        self._noted = replace(self._noted, inode=self.path.stat().st_ino)
        self._write_state()
        log.warning("store_rescued", file=str(self.path), hint="it had been removed, and is there again")

    # looking

    def _is_shared(self) -> bool:
        """Whether another process has the database, too."""
        self.is_shared = self.is_shared or not self._keep_lock()
        return self.is_shared

    def _keep_lock(self) -> bool:
        """A lock file that is gone is made again. False when another process has it."""
        path = self._paths[".lock"]
        if self._identity(".lock") == _identity(os.fstat(self._lock.fileno())):
            return True
        try:
            lock = take_lock(path)
        except BlockingIOError:
            return False
        self._lock.close()
        self._lock = lock
        self._write_state()
        log.warning(
            "store_lock_made_again", file=str(path), hint="it was removed: two processes on one file would disagree"
        )
        return True

    def _is_ours(self, header: bytes) -> bool:
        return header[:16] == _MAGIC and _header_epoch(header) in self._epochs

    def header(self) -> bytes:
        """The first bytes of the database; of the file that is open, also where another one is in its place."""
        return os.pread(self._file, _HEADER_BYTES, 0)

    def _identity(self, name: str) -> tuple[int, int] | None:
        try:
            return _identity(self._paths[name].stat())
        except FileNotFoundError:
            return None

    def _ask(self, pragma: str) -> int:
        assert self._anchor is not None
        return int(self._anchor.execute(pragma).fetchone()[0])


def make(path: Path) -> None:
    """A new file, closed to others: SQLite gives -wal and -shm the same mode. One that is there stays as it is."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def take_lock(path: Path, seconds: float = 0.0) -> IO[bytes]:
    """The lock file, locked; made when it is not there. Raises BlockingIOError when another process has it so long."""
    import fcntl

    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb")
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(AGAIN_SECONDS)
            else:
                return lock
    except BaseException:
        lock.close()
        raise


def make_beside(path: Path) -> None:
    """As `make`, for a command; not in the place of a file that a running flowbridge has still. Raises StoreError."""
    real = path.resolve()
    deadline = time.monotonic() + LOCK_SECONDS
    while not real.exists():
        if Path(f"{real}-wal").exists():
            raise StoreError((_REMOVED if _is_held(real) else _LEFT).format(path))
        try:
            with take_lock(Path(f"{real}.lock")):
                make(real)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(_REMOVED.format(path)) from None
            time.sleep(AGAIN_SECONDS)


def check(path: Path) -> None:
    """Before a command opens it: is it there, and the one that its -wal file belongs to? Raises StoreError.

    StoreAbsent when there is none, nor has there been. A server that starts is waited for, until it says which file
    it has.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while wrong := _is_wrong(path):
        if not _is_held(path.resolve()) or time.monotonic() > deadline:
            raise StoreError(wrong)
        time.sleep(AGAIN_SECONDS)


def _is_wrong(path: Path) -> str:
    real = path.resolve()
    wal = Path(f"{real}-wal")
    is_held, noted = _is_held(real), State()
    with contextlib.suppress(OSError), Path(f"{real}.lock").open("rb") as lock:
        noted = _read_state(lock)
    try:
        found = real.stat()
        header = _header_of(real)
    except FileNotFoundError:
        if is_held or wal.exists():
            return (_REMOVED if is_held else _LEFT).format(path)
        raise StoreAbsent(
            f"there is no file {path}: the commands and `serve` have to be run with the same setting"
        ) from None
    if is_held and noted.inode not in (0, found.st_ino):
        return f"{path} is another file than the one that a running flowbridge has open: stop that, and see its log"
    if is_held and noted.inode and not header:
        return f"{path} was overwritten while a flowbridge runs on it: stop that, and see its log"
    return _others_wal(path) if _has_others_wal(wal, header, found, noted) else ""


def _is_held(real: Path) -> bool:
    """Whether a flowbridge runs on this database."""
    import fcntl

    try:
        with Path(f"{real}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _header_of(path: Path) -> bytes:
    """Through a descriptor that stays open: to close one would drop SQLite's locks on the file in this process."""
    if (file := _kept.get(_identity(path.stat()))) is None:
        file = os.open(path, os.O_RDONLY)
        _kept[_identity(os.fstat(file))] = file
    return os.pread(file, _HEADER_BYTES, 0)


def _read_state(lock: IO[bytes]) -> State:
    try:
        state = State(**json.loads(os.pread(lock.fileno(), _STATE_BYTES, 0)))
    except (ValueError, TypeError):
        return State()  # a new one, or an older version's
    return state if _is_written_at(lock, state.at) else State()  # a copy of it knows other files


def _is_written_at(lock: IO[bytes], at: int) -> bool:
    return abs(os.fstat(lock.fileno()).st_ctime_ns - at) < _CLOCK_NS


def _has_others_wal(path: Path, header: bytes, file: os.stat_result, noted: State) -> bool:
    try:
        wal = path.stat()
    except FileNotFoundError:
        return False
    was_copied = header[:16] == _MAGIC and header[18:20] == b"\1\1"  # a backup: no database with a -wal file
    was_replaced = noted.wal == wal.st_ino and file.st_ino != noted.inode
    return wal.st_size > 0 and (was_copied or was_replaced)


def _others_wal(path: Path) -> str:
    return (
        f"{path.name}-wal belongs to another database than {path.name}: if that is a restored backup, remove "
        f"{path.name}-wal and {path.name}-shm"
    )


def connect(path: str, seconds: float) -> sqlite3.Connection:
    """A connection to a file that is there: another would be made, empty, when it is gone."""
    return sqlite3.connect(_uri(Path(path)), timeout=seconds, uri=True, check_same_thread=False)


def sync(path: Path) -> None:
    """A new file, and its name, onto the disk."""
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _uri(path: Path) -> str:
    return f"{path.absolute().as_uri()}?mode=rw"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _header_epoch(header: bytes) -> int:
    return int.from_bytes(header[60:64], "big", signed=True)
