"""How much is queued, and whether there may be more: back-pressure before anything is half accepted."""

import asyncio
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, text

from flowbridge.store import outbox
from flowbridge.store.database import Database
from flowbridge.store.errors import MISSING_RETRY_MS, StoreFull, StoreUnavailable
from flowbridge.store.journal import Ticket

FULL_RETRY_MS = 10_000
ROW_BYTES = 600  # of an event beside its texts, with its share of the indexes


@dataclass(frozen=True, slots=True)
class Limits:
    """When a store is full: queued events in all and per lane, bytes of the database, bytes free on its disk."""

    queued: int
    per_lane: int
    database_bytes: int
    free_disk_bytes: int


class Stock:
    """Counts what this process accepts and settles; `refresh` learns what others did. For one event loop."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits
        self._lanes: dict[str, int] = {}
        self._meanwhile: Counter[str] = Counter()  # what changed since the store was last read
        self.queued = 0
        self.dead = 0
        self.used_bytes = 0
        self.oldest_at: float | None = None  # time.time() of the acceptance of the event that waits longest
        self.full = ""  # why nothing is accepted, for what `refresh` looks at

    def admit(self, lane: str) -> None:
        """Raises StoreFull when there is no room for one more event in this lane, StoreUnavailable without a file."""
        if self._database.missing:
            raise StoreUnavailable(self._database.missing, retry_after_ms=MISSING_RETRY_MS)
        if self.full:
            raise StoreFull(self.full, retry_after_ms=FULL_RETRY_MS)
        if self.queued >= self._limits.queued:
            raise StoreFull(f"{self.queued} events are queued already", retry_after_ms=FULL_RETRY_MS)
        if self._lanes.get(lane, 0) >= self._limits.per_lane:
            raise StoreFull(
                f"{self._lanes[lane]} events are queued for this room already", retry_after_ms=FULL_RETRY_MS
            )

    def queued_in(self, lane: str) -> int:
        """How many events are queued in a lane, as far as is known here."""
        return self._lanes.get(lane, 0)

    def accounts(self) -> set[str]:
        """The accounts of which something is queued."""
        return {lane.partition("|")[0] for lane in self._lanes}

    def add(self, ticket: Ticket) -> None:
        ticket.counted = True
        self._count(ticket.row.lane, 1)
        self._meanwhile[ticket.row.lane] += 1

    def remove(self, ticket: Ticket) -> None:
        """It is settled, withdrawn, or was not accepted after all."""
        if not ticket.counted:
            return
        ticket.counted = False
        self._count(ticket.row.lane, -1)
        self._meanwhile[ticket.row.lane] -= 1

    def _count(self, lane: str, change: int) -> None:
        before = self._lanes.pop(lane, 0)
        now = max(0, before + change)
        self.queued += now - before
        if now:
            self._lanes[lane] = now

    async def refresh(self) -> float:
        """Count anew: what other processes did is known from here on. Returns the seconds that it took.

        An event that is accepted meanwhile may be counted twice, until the next time.
        """
        started = time.monotonic()
        self._meanwhile.clear()
        await self._database.flush()  # outcomes linger on their way to the disk
        lanes, oldest_ms, dead, used = await self._database.read(self._look)
        self._lanes = {lane: number for lane, (number, _) in lanes.items()}
        self.queued = sum(self._lanes.values())
        for lane, change in self._meanwhile.items():
            self._count(lane, change)
        self.dead, self.used_bytes = dead, used
        self.oldest_at = oldest_ms / 1000 if oldest_ms is not None else None
        self.full = await asyncio.to_thread(self._lack)
        return time.monotonic() - started

    def _look(self, connection: Connection) -> tuple[dict[str, tuple[int, int]], int | None, int, int]:
        lanes = outbox.queued(connection)
        first = min((first for _, first in lanes.values()), default=None)
        oldest = outbox.accepted_at(connection, first) if first is not None else None
        return lanes, oldest, outbox.dead(connection), used_bytes(connection, self._limits.database_bytes // 2)

    def _lack(self) -> str:
        if self.used_bytes >= self._limits.database_bytes:
            return f"the database holds {self.used_bytes} bytes, and {self._limits.database_bytes} are allowed"
        if self._database.is_sqlite and self._database.url.database:
            try:
                free = shutil.disk_usage(Path(self._database.url.database).absolute().parent).free
            except FileNotFoundError:
                return ""  # that the file is gone is told by the database
            if free < self._limits.free_disk_bytes:
                return f"{free} bytes are free on the store's disk: flowbridge stops at {self._limits.free_disk_bytes}"
        return ""


def used_bytes(connection: Connection, enough: int) -> int:
    """Bytes that the store takes, without what is free for use again; exact only from `enough` on."""
    if connection.dialect.name == "postgresql":
        size = connection.scalar(text("SELECT pg_total_relation_size('outbox')")) or 0
        return int(size) if size < enough else _live_bytes(connection)  # a table never shrinks by what is deleted
    pages = connection.scalar(text("PRAGMA page_count")) or 0
    free = connection.scalar(text("PRAGMA freelist_count")) or 0
    return int(pages - free) * int(connection.scalar(text("PRAGMA page_size")) or 0)


def _live_bytes(connection: Connection) -> int:
    width = "octet_length(content) + octet_length(history) + coalesce(octet_length(request), 0)"
    return int(connection.scalar(text(f"SELECT sum({width} + {ROW_BYTES}) FROM outbox")) or 0)  # noqa: S608 (constants)
