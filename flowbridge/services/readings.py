"""Reads of the delivery log for callers: one at a time, and callers in turns, however many reads each of them wants.

Neither accepting events nor other reads of the store must wait for them.
"""

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.store import Database

T = TypeVar("T")


class Readings:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = Limiter("readings of the delivery log", 1, 1)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Read what is committed. Raises StoreUnavailable; TooMany for a caller with too many reads waiting."""
        async with self._turn.turn(peer.who() or "here"):
            return await self._database.read(work)

    async def read_last(self, work: Callable[[Connection], T]) -> T:
        """As `read`, after all writes queued before: an outcome may still be on its way to the disk."""
        async with self._turn.turn(peer.who() or "here"):
            await self._database.flush(lingers=True)  # without a commit of its own, which others would wait for
            return await self._database.read(work)

    async def find(self, work: Callable[[Connection], T | None]) -> T | None:
        """As `read`; what is not there is looked up behind the queued writes: a 200 does not wait for the disk."""
        found = await self.read(work)
        if found is None:
            async with self._turn.turn(peer.who() or "here"):
                found = await self._database.run(work)
        return found
