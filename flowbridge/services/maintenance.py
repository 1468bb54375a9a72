"""Recurring work: count what is stored, forget what is old, learn of new API keys."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from sqlalchemy import Connection

from flowbridge import log, metrics
from flowbridge.auth import names
from flowbridge.auth.api_keys import ApiKeys
from flowbridge.delivery import Worker
from flowbridge.delivery.backpressure import FILLED, Backpressure, live_bytes
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import (
    Database,
    abandoned,
    accounts,
    clock,
    holdings,
    hooks,
    leases,
    log_blocks,
    message_keys,
    refused,
    resolved,
    retention,
)
from flowbridge.store.engine import reason
from flowbridge.store.slices import Slices

COUNT_SHARE = 50  # counting takes at most one of so many seconds
GIVE_UP_LANES = 100
BLOCKS = 4  # of the delivery log that are looked at together: some 20 ms beside the writer
PIECE_PAUSE = 0.05  # between two pieces of a large job, for accepting
SPACE_SECONDS = 1.0  # between two purges while space is short
DAY_MS = 86_400_000
# Sent events of more than a day are the log, not the memory of their keys: these may take so much of the allowed bytes.
# Well below FILLED, so that the log alone never makes space short.
LOGGED = 0.4
TOLD_SECONDS = 3_600.0  # between two warnings that the log is shortened


class Maintenance:
    """`beside`: other recurring work, and the pause in seconds before each time."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        backpressure: Backpressure,
        keys: ApiKeys,
        worker: Worker,
        *,
        flush_refused: Callable[[], Awaitable[None]] | None = None,
        beside: Sequence[tuple[Callable[[], Awaitable[None]], float]] = (),
        timing: Timing = Timing(),
        count_share: int = COUNT_SHARE,
        give_up_lanes: int = GIVE_UP_LANES,
    ) -> None:
        self._settings = settings
        self._database = database
        self._backpressure = backpressure
        self._keys = keys
        self._worker = worker
        self._flush_refused = flush_refused
        self._beside = beside
        self._blanked_until = 0  # ms: contents of what was sent before are gone
        self._told_at = -math.inf  # monotonic
        self._next_upkeep = -math.inf  # likewise: of the delivery log
        self._timing = timing
        self._count_share = count_share
        self._give_up_lanes = give_up_lanes

    async def run(self) -> None:
        """For ever; each kind of work at its own pace. The core has refreshed the keys and the counts at its start."""
        timing = self._timing
        await asyncio.gather(
            self._forever(self._keys.refresh, timing.key_refresh_seconds, begin=timing.key_refresh_seconds),
            self._forever(self._count, begin=timing.count_seconds),
            self._forever(self._census),
            self._forever(self._purge),
            self._forever(self._tell_blocks, timing.count_seconds),
            self._forever(self._give_up, timing.give_up_seconds, begin=timing.give_up_seconds),
            self._forever(self._forget_idle, timing.forget_seconds),
            self._forever(self._write_refused, timing.refused_seconds),
            *(self._forever(work, pause, begin=pause) for work, pause in self._beside),
        )

    async def _forever(
        self, work: Callable[[], Awaitable[float | None]], pause: float = 0.0, *, begin: float = 0.0
    ) -> None:
        """Repeat the work, first after `begin` seconds, then after what it returns, or every `pause` seconds."""
        await asyncio.sleep(begin)
        while True:
            try:
                seconds = await work() or pause
            except Exception as error:
                log.warning("upkeep_failed", error=reason(error))
                seconds = self._timing.upkeep_retry_seconds
            await asyncio.sleep(seconds)

    async def _count(self) -> float:
        return max(self._timing.count_seconds, self._count_share * await self._backpressure.refresh())

    async def _census(self) -> float:
        return max(self._timing.count_seconds, self._count_share * await self._backpressure.census())

    async def _purge(self) -> float:
        now = clock.now_ms()
        sent = now - int(self._settings.sent_days * DAY_MS)
        dead = now - int(self._settings.keep_dead_days * DAY_MS)
        gone = await self._in_slices(partial(retention.purge, sent=sent, dead=dead))
        if time.monotonic() >= self._next_upkeep:  # while space is short, the rest comes once a second
            self._next_upkeep = time.monotonic() + self._timing.purge_seconds
            await self._database.run(partial(refused.purge, before=sent))
            await self._database.run(partial(hooks.purge, now=now, requests=sent))
            await self._blank(now)
            gone += await self._shorten(now)
        if self._backpressure.pressed.is_set():
            await self._backpressure.refresh()
        while self._backpressure.is_crowded and (early := await self._backpressure.drop_dead()):
            gone += early
        while self._backpressure.used_bytes >= FILLED * self._settings.max_database_bytes:
            early = await self._backpressure.drop_some()
            if not early:
                return self._timing.purge_seconds  # all that is left has to stay
            gone += early
            await self._backpressure.refresh()
        if gone:
            log.info("events_purged", events=gone)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.purge_seconds):
                await self._backpressure.pressed.wait()
        return min(SPACE_SECONDS, self._timing.purge_seconds)

    async def _tell_blocks(self) -> None:
        """Write down what is in the newer pieces of the delivery log, and forget those that are gone."""
        await self._database.run(log_blocks.forget, lingers=True)
        while blocks := await self._database.read(partial(log_blocks.missing, limit=BLOCKS)):
            await self._database.run(partial(log_blocks.add, blocks=blocks), lingers=True)
            await asyncio.sleep(PIECE_PAUSE)

    async def _blank(self, now: int) -> None:
        """Blank contents that are not to be kept for as long as what else the log has of sent events."""
        days = self._settings.keep_content_days
        if days is None or days >= self._settings.sent_days:
            return
        before = now - int(days * DAY_MS)

        def piece(connection: Connection, limit: int) -> int:
            number, self._blanked_until = retention.blank(connection, before, self._blanked_until, limit)
            return number

        await self._in_slices(piece)

    async def _shorten(self, now: int) -> int:
        """Delete the oldest sent events before their time where the log is at its bound: rows, or bytes."""
        yesterday = now - DAY_MS
        nth = await self._database.read(partial(retention.nth_newest, number=self._settings.max_sent))
        beyond = min(nth + 1, yesterday)  # itself, too
        gone = await self._in_slices(partial(retention.purge_oldest, before=beyond))
        excess = await self._excess()
        while excess > 0:
            rows, freed = await self._database.run(partial(holdings.drop_oldest, before=yesterday, most=excess))
            if not rows:
                break
            gone, excess = gone + rows, excess - freed
            await asyncio.sleep(PIECE_PAUSE)
        oldest = await self._database.read(retention.oldest_sent)
        metrics.log_seconds.set((now - oldest) / 1000 if oldest is not None else 0)
        if gone:
            metrics.dropped_early.inc(gone)
            self._tell(now, oldest, gone)
            await self._backpressure.refresh()
        return gone

    async def _excess(self) -> float:
        """By how many bytes the store is larger than the log may make it."""
        bound = LOGGED * self._backpressure.allowed_bytes
        used = self._backpressure.used_bytes
        if used > bound and not self._database.is_sqlite:  # a table never shrinks by deletions
            used = await self._database.read(live_bytes)
        return used - bound

    def _tell(self, now: int, oldest: int | None, gone: int) -> None:
        if time.monotonic() < self._told_at + TOLD_SECONDS:
            return
        self._told_at = time.monotonic()
        log.warning(
            "log_shortened",
            events=gone,
            days=round((now - oldest) / DAY_MS, 1) if oldest is not None else 0,
            hint="FLOWBRIDGE_MAX_DATABASE_BYTES or FLOWBRIDGE_MAX_SENT allow no more: sent events go before "
            "FLOWBRIDGE_KEEP_SENT_DAYS",
        )

    async def _write_refused(self) -> None:
        if self._flush_refused is not None:
            await self._flush_refused()

    async def _give_up(self) -> None:
        """Make a dead letter of each event that was not delivered in time, also where nothing was even tried."""
        before = clock.now_ms() - int(self._settings.keep_queued_days * DAY_MS)
        oldest, gone = self._backpressure.oldest_at, 0
        after: int | None = 0
        while oldest is not None and oldest * 1000 < before and after is not None:
            lanes, after = await self._database.read(partial(abandoned.overdue, before=before, after=after))
            for start in range(0, len(lanes), self._give_up_lanes):
                some = lanes[start : start + self._give_up_lanes]
                gone += await self._repeat(partial(self._worker.give_up, some, before))
        if gone:
            log.warning("events_given_up", events=gone, days=self._settings.keep_queued_days)
            await self._backpressure.refresh()

    async def _forget_idle(self) -> None:
        idle = clock.now_ms() - int(self._timing.token_idle_seconds * 1000)
        unseen = clock.now_ms() - int(names.KEEP_SECONDS * 1000)  # what is needed again is asked for again
        await self._repeat(lambda: self._database.run(leases.forget_idle, alone=True))
        unused = clock.now_ms() - message_keys.KEEP_DAYS * DAY_MS
        await self._repeat(lambda: self._database.run(partial(message_keys.forget, used_before=unused)))
        await self._repeat(lambda: self._database.run(retention.forget_ids))
        await self._database.run(lambda connection: accounts.drop_idle_tokens(connection, idle))
        await self._database.run(lambda connection: accounts.forget_tokens(connection, unseen))
        await self._database.run(lambda connection: resolved.forget(connection, unseen))

    async def _in_slices(self, work: Callable[..., int]) -> int:
        """A large job on the rows of the outbox, of which the writer gets a few milliseconds at a time."""
        gone, slices = 0, Slices()
        while piece := await self._database.run(
            lambda connection: slices.run(lambda rows: work(connection, limit=rows)), lingers=True
        ):
            gone += piece
            await asyncio.sleep(slices.pause)
        return gone

    async def _repeat(self, work: Callable[[], Awaitable[int]]) -> int:
        """A large job in small pieces, so that accepting does not wait for it."""
        gone = 0
        while piece := await work():
            gone += piece
            await asyncio.sleep(PIECE_PAUSE)
        return gone
