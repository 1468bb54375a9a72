"""How many files the process may have open: raised at the start, watched, and logged when it is reached.

libuv accepts connections beyond it and closes them without a word, so `connections.py` keeps to a lower bound.
"""

import contextlib
import errno
import os
import time
from typing import Final

from flowbridge import log

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

WANTED: Final = 8_192  # 4,096 callers, 3,744 connections to the homeserver, the store, temporary files
QUIET_SECONDS: Final = 60.0


def limit() -> int | None:
    """The limit in force, if there is one."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Allow as many as the system permits (`ulimit -Hn`): the usual 1,024 are for programs that use select()."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for value in () if soft == hard else (hard, max(soft, WANTED)):  # macOS refuses its own "unlimited"
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (value, hard))
            break
    found = limit()
    if found is not None and found < WANTED:
        log.warning("file_limit_low", limit=found, wanted=WANTED, hint="raise it with `ulimit -Hn`, or LimitNOFILE=")


class Watch:
    """Logs when no file can be opened: then connections are neither accepted nor made."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def check(self) -> None:
        """To be called about once a second; takes some microseconds."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            log.error("file_limit_reached", limit=limit(), error=error.strerror)
