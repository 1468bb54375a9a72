"""Checks of an SQLite file before it is opened: whether it exists, and is the one that its -wal file belongs to."""

import contextlib
import os
import stat
import time
from pathlib import Path

from flowbridge.store import lock_file
from flowbridge.store.errors import MAKING, StoreAbsent, StoreError
from flowbridge.store.lock_file import LOCK_SECONDS, POLL_SECONDS, State
from flowbridge.store.sqlite_file import HEADER_BYTES, create, identity, is_copy

_REMOVED = "{0} was removed or moved, and a flowbridge that runs has it open still: stop that, which puts it back"
_LEFT = "{0} is gone, and what was written last is in {0}-wal: put that file back, or a backup and no -wal"

# Descriptors of files that commands have checked, by identity: while one is open, no other file can have the same.
_open: dict[tuple[int, int], int] = {}


def create_for_command(path: Path) -> None:
    """Create the file, if it does not exist and no running flowbridge has it open still. Raises StoreError."""
    real = path.resolve()
    lock = lock_file.path_of(real)
    deadline = time.monotonic() + LOCK_SECONDS
    while not real.exists():
        if Path(f"{real}-wal").exists():
            raise StoreError((_REMOVED if lock_file.is_held(lock) else _LEFT).format(path))
        try:
            with lock_file.take(lock), contextlib.suppress(FileExistsError):
                create(real)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(_REMOVED.format(path)) from None
            time.sleep(POLL_SECONDS)


def check(path: Path) -> None:
    """Before a command opens a database. Raises StoreError; StoreAbsent when there is none, nor has there been.

    A server that starts is waited for, until it has recorded which file it has.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while wrong := _problem(path):
        if not lock_file.is_held(lock_file.path_of(path.resolve())) or time.monotonic() > deadline:
            raise StoreError(wrong)
        time.sleep(POLL_SECONDS)


def require(path: Path) -> None:
    """Before a command opens a database that it is not to create. Raises StoreError; StoreAbsent."""
    check(path)
    real = path.resolve()
    if not real.stat().st_size and not Path(f"{real}-wal").exists():
        raise StoreAbsent(f"the file {_place(path)} is empty: {MAKING}")


def check_wal(path: Path, wal: Path, header: bytes, file: os.stat_result, known: State) -> str:
    """What is wrong with the -wal file: one that belongs to another database would be written into this one."""
    try:
        found = wal.stat()
    except FileNotFoundError:
        return ""
    was_replaced = known.wal == found.st_ino and file.st_ino != known.inode
    if found.st_size == 0 or not (is_copy(header) or was_replaced):
        return ""
    return (
        f"{path.name}-wal belongs to another database than {path.name}: if that is a restored backup, remove "
        f"{path.name}-wal and {path.name}-shm"
    )


def _problem(path: Path) -> str:
    real = path.resolve()
    lock, wal = lock_file.path_of(real), Path(f"{real}-wal")
    is_held, known = lock_file.is_held(lock), lock_file.read_at(lock)
    try:
        found = real.stat()
        header = b"" if stat.S_ISDIR(found.st_mode) else _header_of(real)
    except FileNotFoundError:
        if is_held or wal.exists():
            return (_REMOVED if is_held else _LEFT).format(path)
        raise StoreAbsent(f"there is no file {_place(path)}: {MAKING}") from None
    if stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{path} is a folder: name the file in it, sqlite:///{real}/flowbridge.db")
    if is_held and known.inode not in (0, found.st_ino):
        return f"{path} is another file than the one that a running flowbridge has open: stop that, and see its log"
    if is_held and known.inode and not header:
        return f"{path} was overwritten while a flowbridge runs on it: stop that, and see its log"
    return check_wal(path, wal, header, found, known)


def _place(path: Path) -> str:
    """The file, and the folder that it was looked for in, which is not always the one that was thought of."""
    return str(path) if path.is_absolute() else f"{path} in {Path.cwd()}"


def _header_of(path: Path) -> bytes:
    """Through a descriptor that stays open: to close one would drop SQLite's locks on the file in this process."""
    if (file := _open.get(identity(path.stat()))) is None:
        file = os.open(path, os.O_RDONLY)
        _open[identity(os.fstat(file))] = file
    return os.pread(file, HEADER_BYTES, 0)
