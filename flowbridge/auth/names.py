"""What the homeserver once said of names, kept in the store, so that accepting goes on while the homeserver is away."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from sqlalchemy import Connection

from flowbridge.store import Database, StoreFull, StoreUnavailable, clock, resolved

NOTE_SECONDS = 3_600.0  # a name in use is noted again so often
KEEP_SECONDS = 90 * 86_400.0  # for how long a name is kept that nobody uses
MAX_NOTED = 10_000


class Names:
    """For one event loop. `begin`: from here on the store can be written."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._begun = False
        self._noted: dict[str, tuple[str, float]] = {}  # what was written, and when, monotonic

    def begin(self) -> None:
        self._begun = True

    async def find(self, name: str) -> str | None:
        """What a name led to; None also when the store cannot tell."""
        if not self._database.is_open:
            return None
        try:
            return await self._database.read(lambda connection: resolved.find(connection, name))
        except StoreUnavailable:
            return None

    def note(self, name: str, value: str) -> None:
        """Write what a name leads to; nobody waits for it."""
        noted, at = self._noted.get(name, ("", 0.0))
        now = time.monotonic()
        if not self._begun or (noted == value and now < at + NOTE_SECONDS):
            return
        if len(self._noted) >= MAX_NOTED and name not in self._noted:
            del self._noted[next(iter(self._noted))]
        self._noted[name] = (value, now)
        self._write(lambda connection: resolved.note(connection, name, value, clock.now_ms()))

    def forget(self, name: str) -> None:
        """It does not lead there any more; nobody waits for that to be written."""
        self._noted.pop(name, None)
        if self._begun:
            self._write(lambda connection: resolved.remove(connection, name))

    def _write(self, work: Callable[[Connection], None]) -> None:
        with contextlib.suppress(StoreFull):
            self._database.run(work, lingers=True).add_done_callback(_heard)


def _heard(writing: "asyncio.Future[None]") -> None:
    if not writing.cancelled():
        writing.exception()
