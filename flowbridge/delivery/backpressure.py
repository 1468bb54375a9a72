"""Back-pressure: how much is queued, and whether there may be more, before an event is half accepted."""

import asyncio
import contextlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, text

from flowbridge import log
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.limits.shares import Share
from flowbridge.models.timing import Timing
from flowbridge.store import holdings, outbox, retention
from flowbridge.store.database import Database
from flowbridge.store.errors import MISSING_RETRY_MS, RoomShareTaken, ShareTaken, StoreFull, StoreUnavailable
from flowbridge.store.holdings import Piece, Place
from flowbridge.store.outbox import ROW_BYTES

FULL_RETRY_MS = 10_000
SPACE_RETRY_MS = 1_000
FILLED = 0.9  # of the allowed bytes: from here on settled events are dropped early
TIGHT = 0.95  # likewise: from here on callers with much in the store wait for that
GROWN = 0.02  # likewise: accepted into a nearly full store before its size is read again
PIECE_ROWS = 50  # that a census adds up at once, at first: others read the store, too
TOLD_SECONDS = 60.0  # between two log lines on one caller's share


@dataclass(frozen=True, slots=True)
class Limits:
    """When the store is full: queued events in all and per lane, bytes of the database, bytes free on its disk.

    `share`: the fraction of events and bytes that one caller may take, and of a lane that one API key may.
    """

    queued: int
    per_lane: int
    database_bytes: int
    free_disk_bytes: int
    share: float = 1.0


@dataclass(slots=True)
class _Change:
    """Whether an event of this lane was counted before a refresh began, and whether it is now."""

    lane: str
    before: bool
    now: bool = False


class Backpressure:
    """Counts what this process accepts and settles; `refresh` and `census` learn what other processes did.

    `pressed` is set when space is short: settled events have to go. For one event loop.
    """

    def __init__(
        self, database: Database, limits: Limits, *, piece_rows: int = PIECE_ROWS, timing: Timing = Timing()
    ) -> None:
        self._database = database
        self._piece_rows = piece_rows
        self._piece_seconds = timing.piece_seconds
        self._limits = limits
        self.queued_by_lane: dict[str, int] = {}
        self._counting = asyncio.Lock()
        self._changed: dict[str, _Change] | None = None  # by delivery, while `refresh` reads the store
        self._added: dict[str, PendingDelivery] | None = None  # likewise, while `census` learns where it ends
        self.queued = 0
        self.dead = 0
        self.used_bytes = 0
        self.oldest_at: float | None = None  # time.time() at which the oldest queued event was accepted
        self.full = ""  # why nothing is accepted, as of the last refresh
        self.pressed = asyncio.Event()
        self._tight = TIGHT * limits.database_bytes
        self._grown = 0  # bytes accepted since `used_bytes` was read
        self.rows = Share(limits.queued, limits.share)
        self.bytes = Share(FILLED * limits.database_bytes, limits.share)  # of queued events
        self.dead_bytes, self.sent_bytes = Share(math.inf, 1.0), Share(math.inf, 1.0)  # bytes; they only count
        # All API keys share the bot's lane of a room. What each has in it, by `_in`, and what it may have:
        self.rows_in_lanes = Share(math.inf, 1.0)
        self._of_lane = Share(limits.per_lane, limits.share)
        self._told: dict[str, float] = {}

    def admit(self, lane: str, caller: str = "", size: int = 0) -> None:
        """Check that there is room for one more event of this caller in this lane.

        Raises StoreFull, ShareTaken for the caller's own share, StoreUnavailable for a missing or malformed file.
        """
        if self._database.missing:
            raise StoreUnavailable(self._database.missing, retry_after_ms=MISSING_RETRY_MS)
        if self._database.damage:
            raise StoreUnavailable(self._database.damage)
        if self.full:
            raise StoreFull(self.full, retry_after_ms=FULL_RETRY_MS)
        if self.used_bytes + self._grown >= self._tight:
            self._spare(caller)
        if self.queued >= self._limits.queued:
            raise StoreFull(f"{self.queued} events are queued already", retry_after_ms=FULL_RETRY_MS)
        if (number := self.queued_by_lane.get(lane, 0)) >= self._of_lane.easy:
            self._share_lane(lane, caller, number)
        if not self.rows.takes(caller) or not self.bytes.takes(caller, size):
            self._refuse(caller, size)
        elif self.bytes.reserved and self.bytes.free < (1 - TIGHT) * self.bytes.limit:
            self._spare(caller)

    def _share_lane(self, lane: str, caller: str, number: int) -> None:
        if number >= self._limits.per_lane:
            raise StoreFull(f"{number} events are queued for this room already", retry_after_ms=FULL_RETRY_MS)
        held = self.rows_in_lanes.of(_in(lane, caller))
        is_own = lane.startswith(f"{caller}|")  # the user's own lane: no other caller needs room in it
        if held and not is_own and held + 1 > self._of_lane.threshold(number - held):
            raise RoomShareTaken(
                f"{held} events of this API key are queued for this room already, which is its share: more is accepted "
                "when some of them are sent",
                retry_after_ms=FULL_RETRY_MS,
            )

    def _spare(self, caller: str) -> None:
        """Space is short: what is left is for callers who have little, until settled events are dropped."""
        self.pressed.set()
        limit = self._limits.database_bytes
        if self.used_bytes + self._grown >= limit:
            raise StoreFull(self._too_large(), retry_after_ms=FULL_RETRY_MS)
        held = self.bytes.of(caller) + self.dead_bytes.of(caller) + self.sent_bytes.of(caller)
        if held > (1 - FILLED) * limit:
            raise ShareTaken(
                f"the store holds {held} bytes of this API key or account, which is its share while space is short",
                retry_after_ms=SPACE_RETRY_MS,
            )

    def _refuse(self, caller: str, size: int) -> None:
        rows, used = self.rows.of(caller), self.bytes.of(caller)
        if self.rows.is_full():
            raise StoreFull(f"{self.rows.total} events are queued already", retry_after_ms=FULL_RETRY_MS)
        if self.bytes.is_full(size):
            taken = self.bytes.total + self.bytes.reserved
            raise StoreFull(f"{taken} bytes of events are queued or dead letters", retry_after_ms=FULL_RETRY_MS)
        now = time.monotonic()
        if self._told.get(caller, -math.inf) < now - TOLD_SECONDS:
            self._told = {other: at for other, at in self._told.items() if at >= now - TOLD_SECONDS}
            self._told[caller] = now
            log.warning("share_taken", caller=caller, events=rows, bytes=used)
        raise ShareTaken(
            f"{rows} events ({used} bytes) of this API key or account are queued already, which is its share of the "
            "store: more is accepted when some of them are sent",
            retry_after_ms=FULL_RETRY_MS,
        )

    @property
    def allowed_bytes(self) -> float:
        """The bytes that the store may take, as far as its disk has them."""
        return self.bytes.limit / FILLED

    @property
    def is_crowded(self) -> bool:
        """Whether dead letters leave too little room for queued events."""
        return self.bytes.reserved > 0 and self.bytes.free < (1 - FILLED) * self.bytes.limit

    @property
    def average(self) -> float:
        """Bytes of a queued event, on average."""
        return self.bytes.total / self.rows.total if self.rows.total else 0.0

    def queued_in(self, lane: str) -> int:
        """How many events are known here to be queued in a lane."""
        return self.queued_by_lane.get(lane, 0)

    def accounts(self) -> set[str]:
        """The accounts with queued events."""
        return {lane.partition("|")[0] for lane in self.queued_by_lane}

    def add(self, pending: PendingDelivery) -> None:
        """To be called before the writer may take it: a row that is not counted here is taken for another process's."""
        before = pending.count()
        if self._changed is not None:
            self._changed.setdefault(pending.row.delivery, _Change(pending.row.lane, before)).now = True
        if self._added is not None:
            self._added[pending.row.delivery] = pending
        self._count(pending.row.lane, 1)
        caller, size = pending.caller, pending.size
        self.rows.add(caller)
        if pending.row.api_key:
            self.rows_in_lanes.add(_in(pending.row.lane, caller))
        self.bytes.add(caller, size)
        self._grown += size
        limit = self._limits.database_bytes
        if self._grown > GROWN * limit and self.used_bytes + self._grown > FILLED * limit:
            self.pressed.set()

    def remove(self, pending: PendingDelivery) -> None:
        """It is settled, withdrawn, or was not accepted after all."""
        if not pending.uncount():
            return
        if self._changed is not None:
            self._changed.setdefault(pending.row.delivery, _Change(pending.row.lane, before=True)).now = False
        self._count(pending.row.lane, -1)
        caller, size = pending.caller, pending.size
        self.rows.remove(caller)
        if pending.row.api_key:
            self.rows_in_lanes.remove(_in(pending.row.lane, caller))
        self.bytes.remove(caller, size)
        outcome = pending.outcome
        if outcome is not None and outcome.state == "dead":
            self.dead_bytes.add(caller, size)
            self.bytes.reserved = self.dead_bytes.total
            if self.is_crowded:
                self.pressed.set()
        elif outcome is not None:
            self.sent_bytes.add(caller, size)

    def _count(self, lane: str, change: int) -> None:
        before = self.queued_by_lane.pop(lane, 0)
        now = max(0, before + change)
        self.queued += now - before
        if now:
            self.queued_by_lane[lane] = now

    async def refresh(self) -> float:
        """Count again, including what other processes did. Returns the seconds that it took."""
        async with self._counting:
            try:
                return await self._refresh()
            finally:
                self._changed = None

    async def _refresh(self) -> float:
        started = time.monotonic()
        changed = self._changed = {}
        await self._database.flush()  # outcomes linger before they are written
        lanes, oldest_ms, dead, used, found = await self._database.read(partial(self._look, changed=changed))
        self.queued_by_lane = {lane: number for lane, (number, _) in lanes.items()}
        self.queued = sum(self.queued_by_lane.values())
        for delivery, change in changed.items():
            self._count(change.lane, change.now - found.get(delivery, change.before))
        self.dead, self.used_bytes, self._grown = dead, used, 0
        if used >= FILLED * self._limits.database_bytes or self.is_crowded:
            self.pressed.set()
        else:
            self.pressed.clear()
        self.oldest_at = oldest_ms / 1000 if oldest_ms is not None else None
        self.full = await asyncio.to_thread(self._lack)
        return time.monotonic() - started

    async def census(self) -> float:
        """Add up what each caller holds, as `refresh` does for lanes. Returns the seconds that reading took.

        Sent events count only if they will soon have to go.
        """
        last = await self._begin()
        in_lanes: Counter[str] = Counter()
        rows, bytes_, seconds = await self._add_up(holdings.queued, last, in_lanes)
        self.rows.learn(rows)
        self.rows_in_lanes.learn(in_lanes)
        self.bytes.learn(bytes_)
        settled: list[tuple[Callable[..., Piece], Share]] = [(holdings.dead, self.dead_bytes)]
        if self.used_bytes > FILLED / 2 * self._limits.database_bytes:
            settled.append((holdings.sent, self.sent_bytes))
        for work, weights in settled:
            weights.begin()
            await self._database.flush()
            _, bytes_, taken = await self._add_up(work, last)
            seconds += taken
            weights.learn(bytes_)
        self.bytes.reserved = self.dead_bytes.total
        return seconds

    async def _begin(self) -> int:
        """Returns the id up to which queued events will be added up; `learn` adds those accepted after it."""
        added = self._added = {}

        def until(
            connection: Connection,
        ) -> tuple[int, list[PendingDelivery]]:  # on the writer thread, between two commits
            return holdings.newest(connection), [pending for pending in list(added.values()) if pending.written]

        self.rows.begin()
        self.rows_in_lanes.begin()
        self.bytes.begin()
        try:
            last, written = await self._database.run(until)
        finally:
            self._added = None
        for pending in written:
            self.rows.found(pending.caller)
            if pending.row.api_key:
                self.rows_in_lanes.found(_in(pending.row.lane, pending.caller))
            self.bytes.found(pending.caller, pending.size)
        return last

    async def _add_up(
        self, work: Callable[..., Piece], last: int, in_lanes: Counter[str] | None = None
    ) -> tuple[Counter[str], Counter[str], float]:
        """Events and bytes of each caller, and the seconds that it took. `in_lanes`: events by `_in`."""
        rows: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        after: Place | None = ("", 0)
        limit, seconds = self._piece_rows, 0.0
        while after is not None:
            started = time.monotonic()
            piece = await self._database.read(partial(work, after=after, last=last, limit=limit))
            taken = time.monotonic() - started
            seconds += taken
            if taken > 2 * self._piece_seconds:
                limit = max(1, limit // 2)
            elif taken < self._piece_seconds / 2:
                limit *= 2
            for lane, caller, number, weight in piece.held:
                rows[caller] += number
                if in_lanes is not None:
                    in_lanes[_in(lane, caller)] += number
                weights[caller] += weight
            after = piece.end
        return rows, weights, seconds

    async def drop_some(self) -> int:
        """Drop some settled events early, to make space for queued ones; returns how many.

        First dead letters of a caller beyond its share, so that they do not push out other callers' sent events. Then
        sent events of the caller that holds most. Last, dead letters of a caller that holds more than a share of what
        the others leave. 0: all that is left has to stay.
        """
        return (
            await self.drop_dead()
            or await self._drop(self.sent_bytes, "sent", lambda _: -math.inf)
            or await self._database.run(retention.purge_oldest)  # what no census has counted yet
            or await self._drop(self.dead_bytes, "dead", self._rest)
        )

    async def drop_dead(self) -> int:
        """Drop dead letters early of a caller beyond its share of them; returns how many."""
        return await self._drop(self.dead_bytes, "dead", lambda _: self._limits.share * self.bytes.limit) or (
            await self._drop(self.dead_bytes, "dead", self._rest) if self.is_crowded else 0
        )

    def _rest(self, held: int) -> float:
        """How many bytes a caller who holds so many may hold of what the others leave."""
        return self.bytes.threshold(self.bytes.total + self.bytes.reserved - held)

    async def _drop(self, kept: Share, state: str, most: Callable[[int], float]) -> int:
        """Drop the oldest in this state of the largest caller that holds too much, up to that excess."""

        def held(caller: str) -> int:
            return self.bytes.of(caller) + self.dead_bytes.of(caller)

        for caller in sorted(kept.callers(), key=lambda one: held(one) + self.sent_bytes.of(one), reverse=True):
            beyond = held(caller) - most(held(caller))
            if beyond <= 0:
                continue
            found = await self._database.read(
                partial(holdings.oldest, caller=caller, state=state, most=min(beyond, holdings.DROP_BYTES))
            )
            ids = [id_ for id_, _ in found]
            gone = await self._database.run(partial(holdings.drop, ids=ids, state=state)) if ids else 0
            kept.remove(caller, sum(weight for _, weight in found) if gone else kept.of(caller))
            self.bytes.reserved = self.dead_bytes.total
            if gone and state == "dead":
                log.warning("dead_letters_dropped", caller=caller, events=gone, hint="they took more than a share")
            if gone:
                return gone
        return 0

    def _look(
        self, connection: Connection, changed: "dict[str, _Change]"
    ) -> tuple[dict[str, tuple[int, int]], int | None, int, int, dict[str, bool]]:
        lanes = outbox.queued(connection)
        # Later commits are not seen. Earlier ones are other processes', or noted in `changed`, which is copied in one
        # step, since the loop goes on noting.
        deliveries = list(changed)
        queued = outbox.queued_of(connection, deliveries)
        first = min((first for _, first in lanes.values()), default=None)
        oldest = outbox.accepted_at(connection, first) if first is not None else None
        used = used_bytes(connection, self._limits.database_bytes // 2)
        return lanes, oldest, outbox.dead(connection), used, {one: one in queued for one in deliveries}

    def _lack(self) -> str:
        if self.used_bytes >= self._limits.database_bytes:
            return self._too_large()
        if self._database.is_sqlite and self._database.url.database:
            file = Path(self._database.url.database).absolute()
            try:
                free = shutil.disk_usage(file.parent).free
            except FileNotFoundError:
                return ""  # the database says that the file is gone
            with contextlib.suppress(OSError):  # a share is one of what the disk really has
                there_is = file.stat().st_size + free - self._limits.free_disk_bytes
                self.bytes.limit = FILLED * min(self._limits.database_bytes, max(there_is, 0))
            if free < self._limits.free_disk_bytes:
                return f"{free} bytes are free on the store's disk: flowbridge stops at {self._limits.free_disk_bytes}"
        return ""

    def _too_large(self) -> str:
        used = self.used_bytes + self._grown
        return f"the database holds {used} bytes, and {self._limits.database_bytes} are allowed"


def _in(lane: str, caller: str) -> str:
    """The name of a caller's part of a lane."""
    return f"{caller} {lane}"


def used_bytes(connection: Connection, enough: int) -> int:
    """Bytes in use by the store, without free pages; exact only from `enough` on."""
    if connection.dialect.name == "postgresql":
        size = connection.scalar(text("SELECT pg_total_relation_size('outbox')")) or 0
        return int(size) if size < enough else live_bytes(connection)  # a table never shrinks by deletions
    pages = connection.scalar(text("PRAGMA page_count")) or 0
    free = connection.scalar(text("PRAGMA freelist_count")) or 0
    return int(pages - free) * int(connection.scalar(text("PRAGMA page_size")) or 0)


def live_bytes(connection: Connection) -> int:
    """Bytes of the events themselves: the whole table is read."""
    width = "octet_length(content) + octet_length(history) + coalesce(octet_length(request), 0)"
    return int(connection.scalar(text(f"SELECT sum({width} + {ROW_BYTES}) FROM outbox")) or 0)  # noqa: S608 (constants)
