"""The file beside an SQLite database that keeps it to one process, and remembers which database that was."""

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

LOCK_SECONDS = 1.0  # for which the lock is waited for: commands have it for a moment
POLL_SECONDS = 0.02

_STATE_BYTES = 256
_CLOCK_NS = 50_000_000  # a file system's clock ticks every 10 ms, at worst


@dataclass(frozen=True, slots=True)
class State:
    """What the lock file remembers of the database. `epoch`: as the database itself has it.

    `at`: when that was written (ns). A file system reuses inode numbers, but no copy of the lock file has such a time
    of its last change (ctime), whatever else is copied with it.
    """

    epoch: int = 0
    inode: int = 0
    wal: int = 0
    at: int = 0


def path_of(database: Path) -> Path:
    return Path(f"{database}.lock")


def take(path: Path, seconds: float = 0.0) -> IO[bytes]:
    """The lock file, locked; created when it does not exist. Raises BlockingIOError when another process has it."""
    import fcntl  # which Windows has not: there PostgreSQL alone can be used

    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb")
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return lock
    except BaseException:
        lock.close()
        raise


def is_held(path: Path) -> bool:
    """Whether a flowbridge runs on the database of this lock file."""
    import fcntl

    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read(lock: IO[bytes]) -> State:
    try:
        state = State(**json.loads(os.pread(lock.fileno(), _STATE_BYTES, 0)))
    except (ValueError, TypeError):
        return State()  # a new one, or an older version's
    return state if _is_written_at(lock, state.at) else State()  # a copy of it knows other files


def read_at(path: Path) -> State:
    """The state in a lock file that another process may have; an empty one where there is no such file."""
    with contextlib.suppress(OSError), path.open("rb") as lock:
        return read(lock)
    return State()


def write(lock: IO[bytes], state: State) -> State:
    """Returns the state with its time. Where it cannot be written, the next start does not trust the database."""
    with contextlib.suppress(OSError):
        for _ in range(5):  # the process may stand still between the time and the writing
            state = replace(state, at=time.time_ns())
            os.pwrite(lock.fileno(), json.dumps(asdict(state)).encode().ljust(_STATE_BYTES), 0)
            if _is_written_at(lock, state.at):
                break
    return state


def _is_written_at(lock: IO[bytes], at: int) -> bool:
    found = os.fstat(lock.fileno())
    # A copy that keeps the time of the last writing (cp -p, tar, rsync -t) has another one of its last change: it is
    # known as a copy even if it was made, and put back, within a tick.
    return found.st_mtime_ns == found.st_ctime_ns and abs(found.st_ctime_ns - at) < _CLOCK_NS
