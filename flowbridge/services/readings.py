"""Readings of the delivery log on callers' behalf: one at a time and callers in turns, however many each of them wants.

Accepting events must not wait for them, nor must other readers of the store.
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
        """What is committed. Raises StoreUnavailable; TooMany for a caller who has too many waiting."""
        async with self._turn.turn(peer.who() or "here"):
            return await self._database.read(work)

    async def read_last(self, work: Callable[[Connection], T]) -> T:
        """As `read`, with all that was asked of the writer before: an outcome that was told lingers on its way."""
        async with self._turn.turn(peer.who() or "here"):
            await self._database.flush(lingers=True)  # without a commit of its own, for which others would pay
            return await self._database.read(work)

    async def find(self, work: Callable[[Connection], T | None]) -> T | None:
        """As `read`, and what is not there is asked of the writer, who may be about to write it.

        A 200 does not wait for the disk.
        """
        found = await self.read(work)
        if found is None:
            async with self._turn.turn(peer.who() or "here"):
                found = await self._database.run(work)
        return found
