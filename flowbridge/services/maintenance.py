"""What has to be done from time to time: count, forget what is old, learn of new keys."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from sqlalchemy import Connection

from flowbridge import log
from flowbridge.auth import names
from flowbridge.auth.api_keys import REFRESH_SECONDS
from flowbridge.auth.callers import Callers
from flowbridge.auth.tokens import KEEP_SECONDS
from flowbridge.delivery import Courier
from flowbridge.delivery.backpressure import FILLED, Backpressure
from flowbridge.settings import Settings
from flowbridge.store import Database, abandoned, accounts, clock, leases, resolved, retention
from flowbridge.store.engine import reason

AGAIN_SECONDS = 10.0  # after work that failed
COUNT_SECONDS = 10.0
COUNT_SHARE = 50  # counting takes at most one of so many seconds
PURGE_SECONDS = 60.0
GIVE_UP_SECONDS = 60.0  # so much, too, for what an outage of the bridge itself has made too old: it may be sent
GIVE_UP_LANES = 100
IDLE_SECONDS = 600.0
SPACE_SECONDS = 1.0  # likewise, where space is short
HOUR_MS = 3_600_000


class Maintenance:
    def __init__(
        self, settings: Settings, database: Database, backpressure: Backpressure, callers: Callers, courier: Courier
    ) -> None:
        self._settings = settings
        self._database = database
        self._backpressure = backpressure
        self._callers = callers
        self._courier = courier

    async def run(self) -> None:
        """For ever; each kind of work at its own pace. To learn of keys and to count, the core has begun with."""
        await asyncio.gather(
            _forever(self._learn_keys, REFRESH_SECONDS),
            _forever(self._count, COUNT_SECONDS),
            _forever(self._census),
            _forever(self._purge),
            _forever(self._give_up, GIVE_UP_SECONDS),
            _forever(self._forget_idle),
        )

    async def _learn_keys(self) -> float:
        await self._callers.refresh()
        return REFRESH_SECONDS

    async def _count(self) -> float:
        return max(COUNT_SECONDS, COUNT_SHARE * await self._backpressure.refresh())

    async def _census(self) -> float:
        return max(COUNT_SECONDS, COUNT_SHARE * await self._backpressure.census())

    async def _purge(self) -> float:
        now = clock.now_ms()
        sent = now - int(self._settings.keep_sent_hours * HOUR_MS)
        dead = now - int(self._settings.keep_dead_days * 24 * HOUR_MS)
        gone = await self._repeat(lambda: self._database.run(partial(retention.purge, sent=sent, dead=dead)))
        if self._backpressure.pressed.is_set():
            await self._backpressure.refresh()
        while self._backpressure.is_crowded and (early := await self._backpressure.drop_dead()):
            gone += early
        while self._backpressure.used_bytes >= FILLED * self._settings.max_database_bytes:
            early = await self._backpressure.drop_some()
            if not early:
                return PURGE_SECONDS  # all that is left has to stay
            gone += early
            await self._backpressure.refresh()
        if gone:
            log.info("events_purged", events=gone)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PURGE_SECONDS):
                await self._backpressure.pressed.wait()
        return min(SPACE_SECONDS, PURGE_SECONDS)

    async def _give_up(self) -> float:
        """Whatever is not delivered in time is a dead letter, also where nothing was even tried."""
        before = clock.now_ms() - int(self._settings.keep_queued_days * 24 * HOUR_MS)
        oldest, gone = self._backpressure.oldest_at, 0
        after: int | None = 0
        while oldest is not None and oldest * 1000 < before and after is not None:
            names, after = await self._database.read(partial(abandoned.overdue, before=before, after=after))
            for start in range(0, len(names), GIVE_UP_LANES):
                some = names[start : start + GIVE_UP_LANES]
                gone += await self._repeat(partial(self._courier.give_up, some, before))
        if gone:
            log.warning("events_given_up", events=gone, days=self._settings.keep_queued_days)
            await self._backpressure.refresh()
        return GIVE_UP_SECONDS

    async def _forget_idle(self) -> float:
        before = clock.now_ms() - int(KEEP_SECONDS * 1000)
        await self._repeat(lambda: self._database.run(leases.forget_idle, alone=True))
        await self._repeat(lambda: self._database.run(retention.forget_ids))
        await self._database.run(lambda connection: accounts.drop_idle_tokens(connection, before))
        await self._database.run(partial(_forget_unseen, seen_before=clock.now_ms() - int(names.KEEP_SECONDS * 1000)))
        return IDLE_SECONDS

    async def _repeat(self, work: Callable[[], Awaitable[int]]) -> int:
        """A large job in small pieces, so that accepting does not wait for it."""
        gone = 0
        while piece := await work():
            gone += piece
            await asyncio.sleep(0.05)
        return gone


def _forget_unseen(connection: Connection, seen_before: int) -> None:
    """Devices come and go: what has not been seen for long is asked for again when it is."""
    accounts.forget_tokens(connection, seen_before)
    resolved.forget(connection, seen_before)


async def _forever(work: Callable[[], Awaitable[float]], begin: float = 0.0) -> None:
    """Do it again and again, first after `begin` seconds; it says how many seconds later."""
    await asyncio.sleep(begin)
    while True:
        try:
            pause = await work()
        except Exception as error:
            log.warning("upkeep_failed", error=reason(error))
            pause = AGAIN_SECONDS
        await asyncio.sleep(pause)
