"""What the homeserver once said of names, kept in the store: accepting goes on while the homeserver is away."""

import contextlib
from collections.abc import Callable

from sqlalchemy import Connection

from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import ignore_result
from flowbridge.store import Database, StoreFull, StoreUnavailable, clock, resolved

NOTE_SECONDS = 3_600.0  # a name in use is written again this often
KEEP_SECONDS = 90 * 86_400.0  # how long an unused name is kept
MAX_NOTED = 10_000


class Names:
    """For one event loop. The store can be written from `begin` on."""

    def __init__(self, database: Database, *, max_noted: int = MAX_NOTED) -> None:
        self._database = database
        self._begun = False
        self._noted = Cache[str, str](max_noted, NOTE_SECONDS)  # what was written lately

    def begin(self) -> None:
        self._begun = True

    async def find(self, name: str) -> str | None:
        """What a name led to; None also when the store cannot be read."""
        if not self._database.is_open:
            return None
        try:
            return await self._database.read(lambda connection: resolved.find(connection, name))
        except StoreUnavailable:
            return None

    def note(self, name: str, value: str) -> None:
        """Write what a name leads to, in the background."""
        if self._begun and self._noted.get(name) != value:
            self._noted.put(name, value)
            self._write(lambda connection: resolved.note(connection, name, value, clock.now_ms()))

    def forget(self, name: str) -> None:
        """Remove a name that does not lead there any more, in the background."""
        self._noted.pop(name)
        if self._begun:
            self._write(lambda connection: resolved.remove(connection, name))

    def _write(self, work: Callable[[Connection], None]) -> None:
        with contextlib.suppress(StoreFull):
            self._database.run(work, lingers=True).add_done_callback(ignore_result)
