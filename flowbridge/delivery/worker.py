"""The worker: enqueues new events into their lanes, and tells callers how their events ended.

A lane is an account in a room. The process that holds its lease sends its events in order. Lanes never wait for each
other.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection

from flowbridge import log, metrics
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.attempt import Attempts
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.binder import Binder
from flowbridge.delivery.lane import DAY_SECONDS, Lane, Shared
from flowbridge.delivery.lanes import Bounds, Lanes
from flowbridge.delivery.pending import Keeps, Outcome, PendingDeliveries, PendingDelivery
from flowbridge.delivery.refills import Refills
from flowbridge.delivery.replicas import Replicas
from flowbridge.delivery.suspects import Suspects
from flowbridge.delivery.watching import Watchers
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.homeserver.answers import Verdict
from flowbridge.limits.shares import Share
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Row, StoreFull, StoreUnsure, abandoned, clock, leases, outbox
from flowbridge.store.engine import reason
from flowbridge.store.leases import Mark, Reclaim

KEEP_DAYS = 7.0
GRACE_SECONDS = 60.0  # after the start, to send events that became too old while the bridge was down
MAX_WAITERS = 3_000  # callers that wait for an outcome, of the 4,096 connections of web/connections.py


class Worker:
    """`deadline`: seconds that one attempt may take; `lease`: seconds for which a lane is claimed.

    `set_aside`: seconds after which an event becomes a dead letter if the homeserver fails at it alone; 0: never.
    `share`: the fraction of all waiting callers that may be one caller's. `keep_days`: days after which an unsent event
    is given up, but not within `grace` seconds of the start. `encrypts`: of several processes each leaves the lanes to
    another one which that has the device for. `keeps`: the contents that the delivery log keeps.
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
        encrypts: bool = False,
        keeps: Keeps = "all",
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
        self._deliveries = PendingDeliveries()
        self.watchers = Watchers(self._deliveries, self._waiters)
        self._keep_days = keep_days
        self._lanes = Lanes(
            database,
            write_queue,
            backpressure,
            limits,
            self._deliveries,
            lambda claim, lease_until, full: Lane(self._shared, claim, lease_until, full=full),
            lease=lease,
            encrypts=encrypts,
            timing=timing,
            bounds=self._bounds,
        )
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
            keeps,
            keep_days * DAY_SECONDS,
            time.monotonic() + grace,
            timing,
            idle=self._lanes.idle,
            batch=self._lanes.batch,
            renew=self._lanes.renew,
            account_refused=self._account_refused,
        )
        self._looks = False  # another process may have added events to lanes held here
        self._telling: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._replicas: Replicas | None = None
        self._listening: asyncio.Task[None] | None = None
        if not database.is_sqlite:
            self._replicas = write_queue.replicas = Replicas(
                self._lanes.owner, new=self._has_new, ended=self._has_ended
            )

    def offer(self, pending: PendingDelivery) -> None:
        """Accept a new delivery: straight into its lane if that is held here and short, else by way of the store.

        With several replicas always by way of the store, which alone knows what another one accepted before. So do
        messages of several events. Raises StoreFull.
        """
        self._backpressure.admit(pending.row.lane, pending.caller, pending.size)
        if pending.following:
            self._offer_together(pending)
            return
        well = self._database.is_sqlite and not self._database.trouble  # else the event may go out and its commit fail
        lane = self._lanes.get(pending.row.lane)
        if lane is None and well:
            lane = self._lanes.reopen(pending.row.lane)
        direct = lane is not None and well and lane.may_enqueue() and self._lanes.batch() > 1
        urgent = not direct or pending.idem is not None or pending.row.binding is not None or not pending.waiters
        if lane is None or not self._database.is_sqlite or not lane.is_held():
            pending.mark_dirty()
        if lane is not None and not lane.is_claimed:
            pending.claim_lane(Reclaim(lane.fence, lane.account, lane.sent_with, self._lanes.lease_ms))
        if direct and pending.row.binding is not None:  # in a longer lane it would take long to see whether it may
            pending.bind_early()
        self._backpressure.add(pending)
        try:
            self._write_queue.append(pending, urgent=urgent)
        except StoreFull:
            self._backpressure.remove(pending)
            raise
        self._deliveries.add(pending)
        pending.committed.add_done_callback(lambda done: self._on_written(pending, done))
        if lane is None:
            self._lanes.miss(pending.row.lane)
        if self._replicas is None:
            self._pass_on(pending, lane, direct=direct)  # else when it is known whose lane it is
        if self._limits.has_halts:
            self._retry_halted([pending])

    def _pass_on(self, pending: PendingDelivery, lane: Lane | None, *, direct: bool) -> None:
        """Let its lane have a new event: directly, if nothing in the store is before it."""
        if lane is None:
            if pending.waiters or self._backpressure.queued_in(pending.row.lane) <= 1:
                self._lanes.want(pending.row.lane)
            self._lanes.wake()
        elif direct:
            lane.enqueue(pending)
        else:
            lane.expect_more()  # it reads the store after this commit

    def _pass_on_written(self, pending: PendingDelivery, mark: Mark) -> None:
        """The same with several replicas, after the commit: whose lane it was, and whether others had added to it."""
        lane = self._lanes.get(pending.row.lane)
        if mark.owner in (None, self._lanes.owner) and not (
            pending.held or pending.withdrawn or pending.settled.done()
        ):
            self._pass_on(pending, lane, direct=not mark.dirty and lane is not None and lane.may_enqueue())

    def _has_new(self, name: str) -> None:
        """Another replica has added an event to a lane that is, or was, held here."""
        if (lane := self._lanes.get(name)) is not None:
            lane.expect_more()
        else:
            self._lanes.miss(name)
            self._lanes.want(name)

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
            self._lanes.miss(name)
            self._lanes.want(name)
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
                self.watchers.leave(pending)
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
        heard: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )  # asyncio.wait costs several times more
        watch = self.watchers.watch(pending, seconds, partial(_wake, heard))
        try:
            await heard
            return pending.settled.result() if pending.settled.done() else None
        finally:
            watch.end()

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
        if found is None or found[1] not in (None, self._lanes.owner):
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
            self._lanes.drop(lane)
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
        self._lanes.wake()
        return len(errors)

    async def _remove(self, pending: PendingDelivery) -> bool:
        delivery = pending.row.delivery
        removing = self._database.run(
            lambda connection: outbox.withdraw(connection, delivery, self._lanes.owner), alone=True
        )
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
            self._lanes.rouse_all(names)
            if not self._database.is_sqlite:
                # A replica whose attempt failed just before the join lets its lane rest only now.
                asyncio.get_running_loop().call_later(self._shared.deadline + 1.0, self._lanes.rouse_all, names)

    def rouse(self, lane: str) -> None:
        """Try a lane at once if it is known here to rest."""
        self._lanes.rouse(lane)

    def wake(self, name: str | None = None) -> None:
        """The store has new events, which later offers must not overtake: in this lane, or in any that is held here."""
        if name is None:
            self._looks = True
        elif (lane := self._lanes.get(name)) is not None:
            lane.expect_more()
        else:
            self._lanes.miss(name)
        self._lanes.wake()

    def release_waiters(self) -> None:
        """Answer all callers who wait, without an outcome: this process is about to end."""
        self._deliveries.release_waiters()

    @property
    def owner(self) -> str:
        """Under which name this process holds its lanes in the store."""
        return self._lanes.owner

    def is_sending(self, delivery: str) -> bool:
        """Whether a request of this delivery is in flight here."""
        pending = self._deliveries.get(delivery)
        lane = self._lanes.get(pending.row.lane) if pending is not None else None
        return pending is not None and lane is not None and lane.is_sending(pending)

    def lanes(self) -> dict[str, int]:
        """How many lanes are held: `sending`, in a `pause`, or `idle`; `uncertain` counts across these."""
        return self._lanes.count()

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
        lanes = list(self._lanes)
        tasks = [lane.task for lane in lanes if lane.task is not None]
        for lane in lanes:
            lane.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for lane in lanes:
            self._lanes.forget(lane)
        self._limits.stop()
        self._write_queue.hurry()  # the last chance for outcomes that the store has refused so far
        await self._lanes.release_all()

    def _on_written(self, pending: PendingDelivery, done: "asyncio.Future[None]") -> None:
        error = None if done.cancelled() else done.exception()
        lane = self._lanes.get(pending.row.lane)
        is_reopened = lane is not None and pending.reclaim is not None and lane.fence == pending.reclaim.fence
        if lane is not None and is_reopened and error is None:
            lane.is_claimed = True
        if error is None and pending.existing is None:
            if pending.mark is not None:
                self._pass_on_written(pending, pending.mark)
            self._deliveries.leave(pending)
            if pending.idem is not None and pending.waiters:  # until now it was not known to be new
                self._retry_halted([pending])
                if self._lanes.rests(pending.row.lane):
                    self._lanes.want(pending.row.lane)
            return
        was_tried = pending.outcome is not None or pending.maybe_sent or (lane is not None and lane.is_sending(pending))
        if lane is not None and is_reopened and error is not None:
            self._lanes.drop(lane)  # its claim is not on the disk
        if error is not None and was_tried:
            return  # it is in the room, or may be: its waiters get the outcome
        pending.withdraw()
        self._backpressure.remove(pending)
        if lane is not None and isinstance(error, StoreUnsure):
            lane.expect_more()  # if it is in the store after all, it is sent from there
        pending.refuse(error)

    async def _keep(self) -> None:
        """Claim lanes, renew leases, learn what other processes did; for ever."""
        renew_at = 0.0
        pace = self._lease / 3 if self._database.is_sqlite else self._timing.poll_seconds
        resumed = False
        while True:
            is_more = False
            try:
                if not resumed:  # not in `start`: the disk may be full at first
                    await self._database.resume(self._lanes.lease_ms)
                    resumed = True
                if self._looks or time.monotonic() >= renew_at:
                    self._looks = False
                    await self._lanes.renew()
                    await self._learn_outcomes(self._deliveries.held_elsewhere())
                    renew_at = time.monotonic() + pace
                is_more = await self._lanes.claim()
            except Exception as error:
                log.warning("store_away", error=reason(error))
            self._lanes.end_idle()
            if self._limits.has_halts:  # also for callers whose lane was being claimed when they came
                self._retry_halted(self._deliveries.awaited())
            if not is_more:
                await self._lanes.woken()

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
        if lanes := [lane for lane in self._lanes if lane.account == account and waits(lane.fence.lane)]:
            telling = asyncio.ensure_future(self._tell(account, lanes, found))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, account: str, lanes: Sequence[Lane], found: Verdict) -> None:
        """Lane by lane: telling three thousand callers in one go held up all others."""
        for lane in lanes:
            if self._limits.refusal_of(account) and self._lanes.get(lane.fence.lane) is lane:
                await lane.refuse_waiting(found)

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
