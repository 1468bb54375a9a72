"""The worker: claims lanes, renews their leases, enqueues new events, and tells callers how their events ended.

A lane is an account in a room. The process that holds its lease sends its events in order. Lanes never wait for each
other.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from flowbridge import log, metrics
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.attempt import Attempts
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.binder import Binder
from flowbridge.delivery.fairness import share_of_lanes
from flowbridge.delivery.lane import DAY_SECONDS, Lane, LeaseLost, Shared
from flowbridge.delivery.pending import Outcome, PendingDeliveries, PendingDelivery
from flowbridge.delivery.refills import Refills
from flowbridge.delivery.replicas import Replicas
from flowbridge.delivery.suspects import Suspects
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.homeserver.answers import Verdict
from flowbridge.limits.shares import Share
from flowbridge.limits.tasks import Once
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Fence, Row, StoreFull, StoreUnsure, abandoned, clock, leases, outbox
from flowbridge.store.engine import reason
from flowbridge.store.leases import ASKED, Claim, Mark
from flowbridge.store.outbox import BATCH

PAUSED_SECONDS = 2.0  # an account that pauses for longer makes room for others
MAX_WANTED = 10_000  # lanes to be claimed before others
MAX_ASLEEP = 10_000  # resting lanes that are remembered
ROTATED = 50  # lanes of an account with too many that make room for its other lanes …
ROTATE_SECONDS = 0.5  # … at most this often
KEEP_DAYS = 7.0
GRACE_SECONDS = 60.0  # after the start, to send events that became too old while the bridge was down
MAX_WAITERS = 3_000  # callers that wait for an outcome, of the 4,096 connections of web/connections.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much a worker holds and asks for at once."""

    lanes: int = 2_000  # that are held
    claims: int = 200  # lanes in one claim
    batch: int = BATCH  # events of a lane in memory
    events: int = 10_000  # likewise of all lanes …
    bytes: int = 128 * 1024 * 1024  # … and no more than this: ten thousand of 60 kB would be 600 MB
    outcomes: int = 500  # deliveries in one question for outcomes


class Worker:
    """`deadline`: seconds that one attempt may take; `lease`: seconds for which a lane is claimed.

    `set_aside`: seconds after which an event becomes a dead letter if the homeserver fails at it alone; 0: never.
    `share`: the fraction of all waiting callers that may be one caller's. `keep_days`: days after which an unsent event
    is given up, but not within `grace` seconds of the start.
    """

    def __init__(
        self,
        database: Database,
        write_queue: WriteQueue,
        backpressure: Backpressure,
        limits: AccountLimits,
        attempts: Attempts,
        *,
        deadline: float = 10.0,
        lease: float = 30.0,
        set_aside: float = 300.0,
        share: float = 1.0,
        keep_days: float = KEEP_DAYS,
        grace: float = GRACE_SECONDS,
        timing: Timing = Timing(),
        bounds: Bounds | None = None,
    ) -> None:
        self._waiters = Share(MAX_WAITERS, share)
        self._database = database
        self._write_queue = write_queue
        self._backpressure = backpressure
        self._limits = limits
        self._timing = timing
        self._bounds = bounds or Bounds()
        self._lease = lease
        self._owner = secrets.token_hex(8)
        self._lanes: dict[str, Lane] = {}
        self._deliveries = PendingDeliveries()
        self._missed: set[str] = set()  # lanes that were offered an event while lanes were being claimed
        self._wanted: dict[str, None] = {}  # lanes to claim before others, in this order, even if they rest
        self._asleep: dict[str, float] = {}  # resting lanes → when callers may have them woken, monotonic
        self._releasing: set[str] = set()  # lanes whose release is under way
        self._rotated_at = 0.0  # monotonic
        self._keep_days = keep_days
        self._shared = Shared(
            database,
            write_queue,
            Binder(database, write_queue.amended),
            Refills(database),
            backpressure,
            limits,
            attempts,
            Suspects(database, set_aside, timing=timing),
            self._deliveries,
            deadline,
            keep_days * DAY_SECONDS,
            time.monotonic() + grace,
            timing,
            batch=self._batch,
            renew=self._renew,
            account_refused=self._account_refused,
        )
        self._most_held = self._bounds.events  # events that all lanes together may hold
        self._asked: set[str] = set()  # lanes that a command wants for a moment
        self._wake = asyncio.Event()
        self._looks = False  # another process may have added events to lanes held here
        self._renewing: Once[None, None] = Once()
        self._telling: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._replicas: Replicas | None = None
        self._listening: asyncio.Task[None] | None = None
        if not database.is_sqlite:
            self._replicas = write_queue.replicas = Replicas(self._owner, new=self._has_new, ended=self._has_ended)

    def offer(self, pending: PendingDelivery) -> None:
        """Accept a new delivery: straight into its lane if that is held here and short, else by way of the store.

        With several replicas always by way of the store, which alone knows what another one accepted before. So do
        messages of several events. Raises StoreFull.
        """
        self._backpressure.admit(pending.row.lane, pending.caller, pending.size)
        if pending.following:
            self._offer_together(pending)
            return
        lane = self._lanes.get(pending.row.lane)
        well = self._database.is_sqlite and not self._database.trouble  # else the event may go out and its commit fail
        direct = lane is not None and well and lane.may_enqueue() and self._batch() > 1
        urgent = not direct or pending.idem is not None or pending.row.binding is not None or not pending.waiters
        if lane is None or not self._database.is_sqlite or not lane.is_held():
            pending.mark_dirty()
        self._backpressure.add(pending)
        try:
            self._write_queue.append(pending, urgent=urgent)
        except StoreFull:
            self._backpressure.remove(pending)
            raise
        self._deliveries.add(pending)
        pending.committed.add_done_callback(lambda done: self._on_written(pending, done))
        if lane is None:
            self._missed.add(pending.row.lane)
        if self._replicas is None:
            self._pass_on(pending, lane, direct=direct)  # else when it is known whose lane it is
        if self._limits.has_halts:
            self._retry_halted([pending])

    def _pass_on(self, pending: PendingDelivery, lane: Lane | None, *, direct: bool) -> None:
        """Let its lane have a new event: directly, if nothing in the store is before it."""
        if lane is None:
            if pending.waiters or self._backpressure.queued_in(pending.row.lane) <= 1:
                self._want(pending.row.lane)
            self._wake.set()
        elif direct:
            lane.enqueue(pending)
        else:
            lane.expect_more()  # it reads the store after this commit

    def _pass_on_written(self, pending: PendingDelivery, mark: Mark) -> None:
        """The same with several replicas, after the commit: whose lane it was, and whether others had added to it."""
        lane = self._lanes.get(pending.row.lane)
        if mark.owner in (None, self._owner) and not (pending.held or pending.withdrawn or pending.settled.done()):
            self._pass_on(pending, lane, direct=not mark.dirty and lane is not None and lane.may_enqueue())

    def _has_new(self, name: str) -> None:
        """Another replica has added an event to a lane that is, or was, held here."""
        if (lane := self._lanes.get(name)) is not None:
            lane.expect_more()
        else:
            self._missed.add(name)
            self._want(name)

    def _has_ended(self, delivery: str, outcome: Outcome) -> None:
        """Another replica has sent a delivery that a caller waits for here."""
        if (pending := self._deliveries.get(delivery)) is not None:
            pending.answer(outcome)

    def _offer_together(self, first: PendingDelivery) -> None:
        """As `offer`, for an event with others that follow it."""
        name, counted = first.row.lane, [first]
        first.mark_dirty()
        self._backpressure.add(first)
        try:
            for pending in first.following:
                self._backpressure.admit(name, pending.caller, pending.size)
                self._backpressure.add(pending)
                counted.append(pending)
            self._write_queue.append(first, urgent=True)
        except BaseException:
            for pending in counted:
                self._backpressure.remove(pending)
            raise
        for pending in counted:
            self._deliveries.add(pending)
            pending.committed.add_done_callback(partial(self._on_written, pending))
        if (lane := self._lanes.get(name)) is not None:
            lane.expect_more()
        else:
            self._missed.add(name)
            self._want(name)
        if self._limits.has_halts:
            self._retry_halted([first])

    async def join(self, row: Row, *, waits: bool) -> PendingDelivery:
        """The delivery of an event that was accepted before, to wait for."""
        known = self._deliveries.get(row.delivery)
        pending = known or self._deliveries.of(row)
        if waits:
            pending.add_waiter()
        try:
            if known is None:  # it may have been settled meanwhile
                await self._learn_outcomes([row.delivery])
        except BaseException:
            if waits:
                self._stop_waiting(pending)
            raise
        self._deliveries.leave(pending)
        return pending

    async def rows(self, deliveries: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Whole rows of the store, with outcomes that are on their way to it."""
        found = await self._database.run(partial(outbox.by_delivery, deliveries=deliveries))
        return {name: self._write_queue.amended(row) for name, row in found.items()}

    async def accepted_before(self, pending: PendingDelivery) -> dict[str, Any] | None:
        """The row of what was accepted under the same key, with its outcome; None if there is nothing."""
        if pending.idem is None:
            return None
        row = await self._database.run(partial(_accepted_before, pending=pending))
        return self._write_queue.amended(row) if row else None

    def may_wait(self, caller: str) -> bool:
        """Whether one more request of this caller may wait for an outcome."""
        return self._waiters.takes(caller)

    async def wait(self, pending: PendingDelivery, seconds: float) -> Outcome | None:
        """How the delivery ended; None if it has not within `seconds`. To be called once for each waiter."""
        loop = asyncio.get_running_loop()
        caller = pending.caller
        self._waiters.add(caller)
        heard: asyncio.Future[None] = loop.create_future()  # asyncio.wait does the same at several times the cost
        hear = partial(_wake, heard)
        timer = loop.call_later(seconds, hear)
        pending.settled.add_done_callback(hear)
        try:
            await heard
            return pending.settled.result() if pending.settled.done() else None
        finally:
            timer.cancel()
            pending.settled.remove_done_callback(hear)
            self._waiters.remove(caller)
            self._stop_waiting(pending)

    def _stop_waiting(self, pending: PendingDelivery) -> None:
        pending.remove_waiter()
        self._deliveries.leave(pending)

    async def withdraw(self, pending: PendingDelivery) -> bool:
        """Take back an event that was never tried and that no other caller waits for; whether that was possible."""
        pending = self._deliveries.get(pending.row.delivery) or pending  # a lane may have read it from the store
        lane = self._lanes.get(pending.row.lane)
        if lane is None or pending.waiters or pending.settled.done() or lane.is_uncertain(pending):
            return False
        return await self._remove(pending)

    async def cancel(self, delivery: str) -> bool:
        """Give up a queued event, tried or not. False while it is being sent, or if it is not queued any more."""
        found = await self._database.run(lambda connection: outbox.waiting(connection, delivery))
        if found is None or found[1] not in (None, self._owner):
            return False
        pending = self._deliveries.of(found[0])
        lane = self._lanes.get(pending.row.lane)
        if pending.settled.done() or (lane is not None and lane.is_sending(pending)):
            return False
        return await self._remove(pending)

    async def give_up(self, names: Sequence[str], before: int) -> int:
        """Make dead letters of a batch of events that these lanes accepted before (ms); returns how many.

        Skips events that are being sent and lanes of other replicas, which do this for their own. Skips lanes with
        outcomes on their way to the disk, too: if that write fails, the store still says that these are queued.
        """
        busy = self._write_queue.unsettled_lanes()
        busy.update(name for name in names if (lane := self._lanes.get(name)) is not None and lane.at_work)
        names = [name for name in names if name not in busy]
        lanes = [lane for name in names if (lane := self._lanes.get(name)) is not None]
        for lane in lanes:
            self._drop(lane)
        work = partial(
            abandoned.give_up,
            names=names,
            before=before,
            why=f"it was not delivered within {self._keep_days:g} days",
            reasons=dict(self._limits.distrusted),
            mine=[lane.fence for lane in lanes],
            exclude=set(self._write_queue.unwritten),
        )
        errors = await self._database.run(work, alone=True)
        for delivery, error in errors.items():
            metrics.count(metrics.settled, "dead")
            pending = self._deliveries.get(delivery)
            if pending is not None and not pending.settled.done():
                outcome = Outcome("dead", error=error)
                pending.settle(outcome, clock.now_ms())
                self._backpressure.remove(pending)
                pending.answer(outcome)
        self._wake.set()
        return len(errors)

    async def _remove(self, pending: PendingDelivery) -> bool:
        delivery = pending.row.delivery
        removing = self._database.run(lambda connection: outbox.withdraw(connection, delivery, self._owner), alone=True)
        pending.withdraw()
        self._deliveries.add(pending)  # a lane may be reading it from the store
        removing.add_done_callback(lambda _: self._on_removed(pending, removing))
        return await asyncio.shield(removing)

    def _on_removed(self, pending: PendingDelivery, removing: "asyncio.Future[bool]") -> None:
        if removing.exception() is not None:  # it is still queued
            pending.restore()
            if not pending.held and (lane := self._lanes.get(pending.row.lane)) is not None:
                lane.expect_more()
            self._deliveries.leave(pending)
            return
        if removing.result():
            self._backpressure.remove(pending)
        pending.answer(None)

    async def joined(self, user_id: str, room_id: str) -> None:
        """A user has joined a room: try the events that wait for that at once."""
        with contextlib.suppress(Exception):  # else they are tried when their pause ends
            names = await self._database.read(lambda connection: leases.lanes_in(connection, user_id, room_id))
            self._rouse_all(names)
            if not self._database.is_sqlite:
                # A replica whose attempt failed just before the join lets its lane rest only now.
                asyncio.get_running_loop().call_later(self._shared.deadline + 1.0, self._rouse_all, names)

    def _rouse_all(self, names: Sequence[str]) -> None:
        for name in names:
            self._asleep.pop(name, None)
            if (lane := self._lanes.get(name)) is not None:
                lane.is_roused = True
            self._want(name)

    def rouse(self, lane: str) -> None:
        """Try a lane at once if it is known here to rest."""
        if self._asleep.pop(lane, None) is not None:
            self._want(lane)

    def wake(self, name: str | None = None) -> None:
        """The store has new events, which later offers must not overtake: in this lane, or in any that is held here."""
        if name is None:
            self._looks = True
        elif (lane := self._lanes.get(name)) is not None:
            lane.expect_more()
        else:
            self._missed.add(name)
        self._wake.set()

    def release_waiters(self) -> None:
        """Answer all callers who wait, without an outcome: this process is about to end."""
        self._deliveries.release_waiters()

    @property
    def owner(self) -> str:
        """Under which name this process holds its lanes in the store."""
        return self._owner

    def is_sending(self, delivery: str) -> bool:
        """Whether a request of this delivery is in flight here."""
        pending = self._deliveries.get(delivery)
        lane = self._lanes.get(pending.row.lane) if pending is not None else None
        return pending is not None and lane is not None and lane.is_sending(pending)

    def lanes(self) -> dict[str, int]:
        """How many lanes are held: `sending`, in a `pause`, or `idle`; `uncertain` counts across these."""
        found = {"sending": 0, "pause": 0, "idle": 0, "uncertain": 0}
        for lane in self._lanes.values():
            kind = "sending" if lane.at_work else "pause" if lane.queue else "idle"
            found[kind] += 1
            found["uncertain"] += lane.uncertain_since is not None
        return found

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep())
        if self._replicas is not None:
            listening = self._replicas.listen(self._database, self.wake, self._timing.listen_retry_seconds)
            self._listening = asyncio.create_task(listening)

    async def stop(self, seconds: float = 10.0) -> None:
        """Finish and settle requests in flight, then release all lanes."""
        for task in (self._keeper, self._listening, *self._telling):
            if task is not None:
                task.cancel()
        lanes = list(self._lanes.values())
        tasks = [lane.task for lane in lanes if lane.task is not None]
        for lane in lanes:
            lane.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for lane in lanes:
            self._forget(lane)
        self._limits.stop()
        self._write_queue.hurry()  # the last chance for outcomes that the store has refused so far
        if not await self._unsettled(self._write_queue.unsettled_lanes()):  # else the leases run out: all is in doubt
            with contextlib.suppress(Exception):
                await self._database.run(lambda connection: leases.release_all(connection, self._owner), alone=True)

    @property
    def _lease_ms(self) -> int:
        return int(self._lease * 1000)

    def _batch(self) -> int:
        """How many events a lane may hold: the more lanes, the fewer."""
        return max(1, min(self._bounds.batch, self._most_held // (len(self._lanes) + 1)))

    def _on_written(self, pending: PendingDelivery, done: "asyncio.Future[None]") -> None:
        error = None if done.cancelled() else done.exception()
        if error is None and pending.existing is None:
            if pending.mark is not None:
                self._pass_on_written(pending, pending.mark)
            self._deliveries.leave(pending)
            if pending.idem is not None and pending.waiters:  # until now it was not known to be new
                self._retry_halted([pending])
                if pending.row.lane in self._asleep:
                    self._want(pending.row.lane)
            return
        lane = self._lanes.get(pending.row.lane)
        was_tried = pending.outcome is not None or pending.maybe_sent or (lane is not None and lane.is_sending(pending))
        if error is not None and was_tried:
            return  # it is in the room, or may be: its waiters get the outcome
        pending.withdraw()
        self._backpressure.remove(pending)
        if lane is not None and isinstance(error, StoreUnsure):
            lane.expect_more()  # if it is in the store after all, it is sent from there
        pending.refuse(error)

    # claims and leases

    async def _keep(self) -> None:
        """Claim lanes, renew leases, learn what other processes did; for ever."""
        renew_at = 0.0
        pace = self._lease / 3 if self._database.is_sqlite else self._timing.poll_seconds
        resumed = False
        while True:
            claims: Sequence[Claim] = ()
            try:
                if not resumed:  # not in `start`: the disk may be full at first
                    await self._database.resume(self._lease_ms)
                    resumed = True
                if self._looks or time.monotonic() >= renew_at:
                    self._looks = False
                    await self._renew()
                    await self._learn_outcomes(self._deliveries.held_elsewhere())
                    renew_at = time.monotonic() + pace
                claims = await self._claim()
            except Exception as error:
                log.warning("store_away", error=reason(error))
            self._end_idle()
            if self._limits.has_halts:  # also for callers whose lane was being claimed when they came
                self._retry_halted(self._deliveries.awaited())
            if len(claims) < self._bounds.claims:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timing.poll_seconds):
                        await self._wake.wait()
                self._wake.clear()

    def _end_idle(self) -> None:
        long_ago = time.monotonic() - self._timing.idle_seconds
        for lane in self._lanes.values():
            lane.end_if_idle(long_ago)

    async def _claim(self) -> Sequence[Claim]:
        self._missed.clear()
        self._most_held = min(
            self._bounds.events, int(self._bounds.bytes / max(self._backpressure.average, 1.0))
        )  # of large events, fewer
        if wanted := self._due():
            await self._claim_some(len(wanted), only=wanted)
            for name in wanted:
                del self._wanted[name]
        but = await self._make_room() if len(self._lanes) > self._bounds.lanes // 2 else []
        limit = min(self._bounds.claims, self._bounds.lanes - len(self._lanes))
        return await self._claim_some(limit, but=but) if limit > 0 else ()

    def _due(self) -> list[str]:
        """The lanes to claim before all others, since a caller waits or their room was quiet until now.

        For these an account may exceed its share, by half a claim at most.
        """
        if not self._wanted:
            return []
        now = time.monotonic()
        held = Counter(lane.account for lane in self._lanes.values())
        most = share_of_lanes(held, self._bounds.lanes) + self._bounds.claims // 2
        room = min(self._bounds.claims, self._bounds.lanes + self._bounds.claims - len(self._lanes))
        due: list[str] = []
        for name in list(self._wanted):
            account = name.partition("|")[0]
            if name in self._lanes:
                del self._wanted[name]
            elif len(due) >= room:
                break
            elif name not in self._releasing and self._asleep.get(name, 0.0) <= now and held[account] < most:
                held[account] += 1
                due.append(name)
        return due

    def _want(self, lane: str) -> None:
        """Claim a lane before others; beyond MAX_WANTED, when its turn comes."""
        if len(self._wanted) < MAX_WANTED:
            self._wanted[lane] = None
        self._wake.set()

    async def _claim_some(self, limit: int, *, but: Sequence[str] = (), only: Sequence[str] = ()) -> Sequence[Claim]:
        asked = time.monotonic()
        batch = max(1, min(self._bounds.batch, self._most_held // (len(self._lanes) + limit)))
        claims = await self._database.run(
            lambda connection: leases.claim(
                connection, self._owner, limit, self._lease_ms, batch=batch, exclude=but, only=only
            ),
            alone=True,
        )
        for claim in claims:
            self._take(claim, asked + self._lease, full=len(claim.rows) >= batch, is_fresh=bool(only))
        return claims

    def _take(self, claim: Claim, lease_until: float, *, full: bool, is_fresh: bool = False) -> None:
        name = claim.fence.lane
        old = self._lanes.get(name)
        if old is not None:
            self._drop(old)  # it was lost, and claimed again
        # Events offered since the lane was read may be in the store by now.
        full = full or old is not None or name in self._missed
        lane = self._lanes[name] = Lane(self._shared, claim, lease_until, full=full)
        lane.is_fresh = is_fresh
        lane.task = asyncio.create_task(self._attend(lane))

    async def _attend(self, lane: Lane) -> None:
        """Run a lane, and release it when it is done."""
        rest = 0.0
        try:
            rest = await lane.run()
        except LeaseLost:
            self._lost(lane)
            return
        except Exception as error:  # a fault in one lane must not stop it for good
            log.error("lane_failed", exc_info=error, lane=lane.fence.lane)
            rest = self._timing.poll_seconds
        finally:
            self._forget(lane)
        if lane.fence.lane in self._asked:
            self._asked.discard(lane.fence.lane)
            rest = max(rest, self._timing.yield_seconds)
        await self._let_rest(lane, rest)

    async def _let_rest(self, lane: Lane, rest: float) -> None:
        name = lane.fence.lane
        if lane.is_roused and lane.rests_for == "absent":
            rest = 0.0
        if rest:
            if len(self._asleep) >= MAX_ASLEEP:
                del self._asleep[next(iter(self._asleep))]
            timing = self._timing
            pause = timing.absent_wake_seconds if lane.rests_for == "absent" else timing.wake_seconds
            self._asleep[name] = time.monotonic() + pause
        else:
            self._asleep.pop(name, None)
        self._releasing.add(name)
        try:
            await self._release([lane.fence], rest)
        finally:
            self._releasing.discard(name)
        if lane.rests_for == "absent" and self._deliveries.awaited(name):  # callers who came too late to be told
            self._want(name)
        if name in self._wanted:
            self._wake.set()

    def _retry_halted(self, deliveries: Iterable[PendingDelivery]) -> None:
        """Retry halted accounts early for callers who wait with tokens of their own."""
        if self._limits.has_halts:
            for account in {
                pending.row.account for pending in deliveries if pending.waiters and pending.row.api_key is None
            }:
                self._limits.retry_soon(account)

    def _account_refused(self, account: str, found: Verdict) -> None:
        """The homeserver refuses an account: tell the callers who wait for one of its events."""
        waits = self._deliveries.awaited
        if lanes := [lane for name, lane in self._lanes.items() if lane.account == account and waits(name)]:
            telling = asyncio.ensure_future(self._tell(account, lanes, found))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, account: str, lanes: Sequence[Lane], found: Verdict) -> None:
        """Lane by lane: telling three thousand callers in one go held up all others."""
        for lane in lanes:
            if self._limits.refusal_of(account) and self._lanes.get(lane.fence.lane) is lane:
                await lane.refuse_waiting(found)

    def _forget(self, lane: Lane) -> None:
        """From here on events for this lane go by way of the store."""
        lane.release()
        if self._lanes.get(lane.fence.lane) is lane:
            del self._lanes[lane.fence.lane]

    def _drop(self, lane: Lane) -> None:
        """End a lane from outside, even one whose task has not begun."""
        self._forget(lane)
        if lane.task is not None:
            lane.task.cancel()

    def _lost(self, lane: Lane) -> None:
        metrics.leases_lost.inc()
        log.warning("lease_lost", lane=lane.fence.lane)

    async def _release(self, fences: Sequence[Fence], rest: float = 0.0) -> None:
        with contextlib.suppress(Exception):  # else the leases expire
            unsettled = await self._unsettled({fence.lane for fence in fences})
            fences = [fence for fence in fences if fence.lane not in unsettled]
            await self._database.run(
                lambda connection: leases.release(connection, fences, int(rest * 1000)), alone=True
            )
            if not rest:
                self._wake.set()

    async def _unsettled(self, names: set[str]) -> set[str]:
        """Those of these lanes, which send nothing any more, with an outcome that the store has refused to take.

        Without the lane the outcome is void, and the event would be sent once more without a doubt. So the lease is
        kept until the outcome is written; the lane is a stray one then.
        """
        if not self._write_queue.unsettled_lanes() & names:
            return set()
        with contextlib.suppress(Exception):
            await self._database.run(lambda connection: None)  # outcomes that were merely queued are written by then
        return self._write_queue.unsettled_lanes() & names

    async def _make_room(self) -> list[str]:
        """Release lanes that send nothing; returns the accounts that may claim no more of them.

        A thousand rooms of one caller must not hold up others, nor one more room of the same caller.
        """
        paused = set(self._limits.paused(PAUSED_SECONDS))
        resting: dict[str, list[Fence]] = defaultdict(list)
        for lane in list(self._lanes.values()):
            if lane.account in paused and not lane.at_work:
                self._drop(lane)
                resting[lane.account].append(lane.fence)
        for account, fences in resting.items():
            rest = min(self._limits.pause_of(account), self._timing.max_rest)
            asyncio.ensure_future(self._release(fences, rest))  # noqa: RUF006 (the leases expire if it fails)
        self._end_longest_idle(len(self._lanes) - self._bounds.lanes // 2)
        held = Counter(lane.account for lane in self._lanes.values())
        share = share_of_lanes(held, self._bounds.lanes)
        many = [account for account, number in held.items() if number > share and account not in paused]
        if many:
            await self._rotate(many)
        return [*paused, *many]

    async def _rotate(self, accounts: Sequence[str]) -> None:
        """In accounts with too many lanes, release those that were served for longest if other lanes of theirs wait."""
        now = time.monotonic()
        if now < self._rotated_at + ROTATE_SECONDS:
            return
        self._rotated_at = now
        waiting = await self._database.read(lambda connection: leases.free(connection, accounts, ROTATED))
        fences: list[Fence] = []
        for lane in list(self._lanes.values()):  # in the order of their claims
            if len(fences) >= waiting:
                break
            if lane.account in accounts and lane.has_more and lane.had_turn and not lane.at_work:
                self._drop(lane)
                fences.append(lane.fence)
        if fences:
            await self._release(fences)

    def _end_longest_idle(self, number: int) -> None:
        idle = [(lane.idle_since, lane) for lane in self._lanes.values() if lane.idle_since is not None]
        for _, lane in sorted(idle, key=lambda pair: pair[0])[: max(0, number)]:
            lane.end_if_idle(math.inf)

    async def _renew(self) -> None:
        """Prolong all leases; concurrent calls share one statement."""
        await self._renewing.get(None, self._renew_all)

    async def _renew_all(self) -> None:
        asked = time.monotonic()
        held = await self._database.run(
            lambda connection: leases.renew(connection, self._owner, self._lease_ms), alone=True
        )
        for name, lane in list(self._lanes.items()):
            number, dirty = held.pop(name, (-1, 0))
            if number != lane.fence.number:
                self._lost(lane)
                self._drop(lane)
                continue
            lane.lease_until = asked + self._lease
            if dirty == ASKED:
                self._yield(lane)
            elif dirty:
                lane.expect_more()
        stray = [Fence(name, self._owner, number) for name, (number, _) in held.items()]
        if stray:  # held here according to the store, and unknown: let any process claim them
            await self._release(stray)

    def _yield(self, lane: Lane) -> None:
        """A command wants to remove events of this lane: release it for a moment, once nothing of it is in flight."""
        if lane.at_work:
            self._asked.add(lane.fence.lane)
            lane.stop()
        else:
            self._drop(lane)
            asyncio.ensure_future(self._release([lane.fence], self._timing.yield_seconds))  # noqa: RUF006 (the lease expires if it fails)

    async def _learn_outcomes(self, deliveries: Sequence[str]) -> None:
        """Learn how deliveries ended that callers wait for here and that another process sent."""
        for start in range(0, len(deliveries), self._bounds.outcomes):
            asked = deliveries[start : start + self._bounds.outcomes]
            ended = await self._database.run(partial(outbox.outcomes, deliveries=asked))
            for delivery, (state, event_id, error) in ended.items():
                pending = self._deliveries.get(delivery)
                if pending is not None:
                    pending.answer(Outcome(state, event_id, error))


def _wake(heard: "asyncio.Future[None]", _: object = None) -> None:
    if not heard.done():
        heard.set_result(None)


def _accepted_before(connection: Connection, pending: PendingDelivery) -> dict[str, Any] | None:
    earlier = pending.earlier(outbox.taken(connection, pending.idems))
    return outbox.by_delivery(connection, [earlier]).get(earlier) if earlier else None
