"""A lane: the events of an account in a room, sent one after another.

An event ends as sent, or as dead if the homeserver refuses it for good. After anything else it is tried again under
the same transaction id, which the homeserver remembers. Once it may have forgotten, the event is looked for first.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from flowbridge import log, metrics
from flowbridge.delivery import binding
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.attempt import Attempt, Attempts
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.binder import Binder
from flowbridge.delivery.pending import Keeps, Outcome, PendingDeliveries, PendingDelivery
from flowbridge.delivery.refills import Refills
from flowbridge.delivery.suspects import Suspects, Suspicion, is_failure, must_be_looked_for
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.errors import Errcode, GatewayTimeout, HomeserverError
from flowbridge.homeserver.answers import Verdict
from flowbridge.limits.tasks import ended, ignore_result
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Row, clock, leases, outbox
from flowbridge.store.contents import is_readable
from flowbridge.store.engine import reason
from flowbridge.store.errors import StoreFull
from flowbridge.store.json_columns import history_to_json
from flowbridge.store.leases import Claim

DAY_SECONDS = 86_400.0
MAX_BOUND = 50  # events of a lane that are bound at once
TOLD = 50  # waiting callers that are told of a refusal in one go
IN_DOUBT = "; it may be in the room all the same"
HAND_OVER_SECONDS = 0.05  # until the process that can send for it may claim a lane
EARLY_MS = 5  # an attempt may be this early


@dataclass(frozen=True, slots=True)
class Shared:
    """What all lanes of a process have in common. The callables are the worker's, which knows the other lanes."""

    database: Database
    write_queue: WriteQueue
    binder: Binder
    refills: Refills
    backpressure: Backpressure
    limits: AccountLimits
    attempts: Attempts
    suspects: Suspects
    deliveries: PendingDeliveries
    deadline: float  # seconds that one attempt takes at most
    keeps: Keeps  # contents, of what was sent
    keep_seconds: float  # an event that is older is not tried again, …
    gives_up_at: float  # … but not before this moment (monotonic)
    timing: Timing
    idle: dict["Lane", None]  # the lanes with nothing to send, the longest idle first
    batch: Callable[[], int]  # how many events a lane may hold at the moment
    renew: Callable[[], Awaitable[None]]  # prolongs all leases
    account_refused: Callable[[str, Verdict], None]  # tells the callers who wait in other lanes of the account


class LeaseLost(Exception):
    """Another process may send for this lane by now."""


class Lane:
    """A lane held by this process. `lease_until`: monotonic seconds. `full`: there may be more than was claimed."""

    def __init__(self, shared: Shared, claim: Claim, lease_until: float, *, full: bool) -> None:
        self._shared = shared
        self.fence = claim.fence
        self.account = claim.account
        self.lease_until = lease_until
        self.queue: deque[PendingDelivery] = deque()
        self.uncertain_since = claim.uncertain_since / 1000 if claim.uncertain_since else None  # as time.time()
        # An earlier holder may have sent more than the head: any event accepted until now (ms), perhaps by the clock of
        # another replica.
        self._doubtful_until = clock.now_ms() + clock.CLOCK_SKEW_MS if claim.uncertain_since else 0
        # After a restored backup, a missing event proves nothing: it may have been deleted, and the next one sent.
        self._restored = leases.is_restored(claim.uncertain_since)
        # The digest of the token that sent all events in doubt; "" for an unknown one, or several. It is in the store
        # before anything is sent: after a crash, a holder with another token looks into the room first.
        self._sent_with = claim.sent_with
        self._merged = leases.MERGED if claim.sent_with == leases.MERGED else ""
        self._sends_with: str | None = None  # another digest that is yet to be stored
        self._missing = False  # the head was looked for and not found
        self.is_claimed = True  # its claim is on the disk; else it is on its way there with an event
        self.is_fresh = False  # it was idle, or a caller waits: its next event is not queued behind a backlog
        self.had_turn = False  # one of its events was settled
        self.is_roused = False  # its account has joined the room since the last attempt began
        self.rests_for = ""  # the kind of the verdict that made it rest
        self.at_work = False  # a request is in flight
        self.task: asyncio.Task[None] | None = None
        self._more = False  # the store may have further events
        self._reading = False
        self._arrived: list[PendingDelivery] = []  # while the store is read: they come behind what is found there
        self._stopping = False
        self._wake = asyncio.Event()
        self.idle_since: float | None = None  # monotonic; None while there is something to send
        self._fill(claim.rows, full=full)

    def may_enqueue(self) -> bool:
        """Whether a new event may be enqueued at once: nothing older stays in the store."""
        is_current = not (self._more or self._stopping)
        return is_current and len(self.queue) + len(self._arrived) < self._shared.batch() and self.is_held()

    def enqueue(self, pending: PendingDelivery) -> None:
        if self._reading:
            pending.hold()
            self._arrived.append(pending)
        else:
            self._hold(pending)
            self._wake.set()

    def _hold(self, pending: PendingDelivery) -> None:
        pending.hold()
        self.queue.append(pending)

    def expect_more(self) -> None:
        """The store may have events that this lane does not know."""
        self._more = True
        self._wake.set()

    def is_held(self) -> bool:
        """Whether a request sent now ends before the lease does."""
        return time.monotonic() + self._shared.deadline < self.lease_until

    def is_sending(self, pending: PendingDelivery) -> bool:
        return self.at_work and self._is_head(pending)

    def is_uncertain(self, pending: PendingDelivery) -> bool:
        """Whether the homeserver may have this event."""
        if pending.maybe_sent or self.is_sending(pending):
            return True
        return self.uncertain_since is not None and (self._is_head(pending) or self._is_doubtful(pending))

    def _is_head(self, pending: PendingDelivery) -> bool:
        return bool(self.queue) and self.queue[0] is pending

    def stop(self) -> None:
        """Finish the request in flight, and begin no other."""
        self._stopping = True
        self._wake.set()
        if self.task is not None and not self.at_work:
            self.task.cancel()

    def end_if_idle(self, since: float) -> bool:
        """End the lane if it has been idle since then (monotonic seconds); whether it has."""
        if self.idle_since is None or self.idle_since >= since or self._wake.is_set():
            return False
        self._stopping = True
        self._wake.set()
        self._shared.idle.pop(self, None)
        return True

    def release(self) -> None:
        """Let go of its deliveries."""
        self._pass_over(self._arrived)
        while self.queue:
            pending = self._pop()
            self._shared.deliveries.leave(pending)

    def _pop(self) -> PendingDelivery:
        pending = self.queue.popleft()
        pending.release()
        return pending

    async def run(self) -> float:
        """Send until the lane is stopped or has to rest; returns for how many seconds. Raises LeaseLost."""
        while not self._stopping:
            if self.queue:
                if not self._is_doubtful(self.queue[0]):
                    self._be_certain()
                rest = await self._deliver(self.queue[0])
                if rest:
                    return rest
                self._pop()
            elif self._more:
                await self._refill()
            else:
                self._be_certain()
                self._wake.clear()
                self.idle_since = time.monotonic()
                self._shared.idle[self] = None
                await self._wake.wait()
                self._shared.idle.pop(self, None)
                self.idle_since = None
                self.is_fresh = True
        return 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing of it is queued, nor in doubt."""
        return self.uncertain_since is None and not (self.queue or self._more or self._arrived)

    @property
    def sent_with(self) -> str:
        """The digest of the token that it was last sent with, as the store knows it."""
        return self._sent_with

    @property
    def has_more(self) -> bool:
        """Whether it holds a backlog."""
        return self._more or len(self.queue) > 1

    async def refuse_waiting(self, verdict: Verdict) -> None:
        """Refuse the events behind a refused one whose callers wait: these would fare no better.

        A caller with an API key is not told of a refused account, which is the bridge's, but of a missing membership.
        """
        for number, pending in enumerate(self._shared.deliveries.awaited(self.fence.lane)):
            if number % TOLD == 0:
                await asyncio.sleep(0)  # let other tasks run
            is_new = pending.idem is None or pending.committed.done()  # else its key may be an older delivery's
            is_told = verdict.kind == "absent" or pending.row.api_key is None
            if is_new and is_told and not (pending.settled.done() or pending.withdrawn or self.is_uncertain(pending)):
                pending.record(_entry(time.time(), verdict))
                pending.withdraw()
                self._close(pending, verdict)

    async def _refill(self) -> None:
        """Read on in the store, behind all that was offered until now.

        What is offered meanwhile is held, too, so that a lane which has caught up is back in memory whatever its load:
        of events that come faster than the store is read there is always one more.
        """
        self._more, self._reading = False, True  # what does not fit into memory sets `_more` again
        lane, batch = self.fence.lane, self._shared.batch()
        try:
            rows = await self._shared.refills.fetch(lane, batch)
        except Exception as error:
            self._more = True
            self._end_reading([])
            log.warning("store_away", error=reason(error))
            await asyncio.sleep(self._shared.timing.first_pause)
        else:
            self._fill(rows, full=len(rows) >= batch or len(rows) + len(self._arrived) > batch)
            self._end_reading(rows)
            if rows and not self.queue:  # all settled here, and their outcomes not stored yet: the store is in trouble
                await asyncio.sleep(self._shared.timing.first_pause)
        finally:
            self._reading = False

    def _end_reading(self, rows: Sequence[Row]) -> None:
        """Enqueue what arrived meanwhile; if the store has more than these rows, it is read from there in its turn."""
        arrived, self._arrived, self._reading = self._arrived, [], False
        if self._more:
            self._pass_over(arrived)
            return
        found = {row.delivery for row in rows}
        self.queue.extend(pending for pending in arrived if pending.row.delivery not in found)

    def _pass_over(self, arrived: Sequence[PendingDelivery]) -> None:
        for pending in arrived:
            pending.release()
            if pending.committed.done():  # else it is forgotten when it is
                self._shared.deliveries.leave(pending)

    def _fill(self, rows: Sequence[Row], *, full: bool) -> None:
        for row in rows:
            if row.delivery not in self._shared.write_queue.unwritten:
                self._hold(self._shared.deliveries.of(row))
        self._more = self._more or full

    async def _deliver(self, pending: PendingDelivery) -> float:
        """Try until it is settled; returns 0, or for how many seconds the lane is to rest first."""
        if pending.idem is not None or pending.row.binding is not None:
            # The commit tells whether it is new; what it refers to is found after it. Awaited even when done: the
            # worker's callback has to run first.
            await ended(pending.committed)
        if self._is_due(pending) and not await self._bind(pending):
            return 0.0
        limits = self._shared.limits
        while not (self._stopping or pending.withdrawn):
            if not self.is_held():
                await self._keep_lease()
            if limits.distrusted and self._is_overdue(pending) and (reason := limits.waits_for(self.account)):
                self._settle(pending, self._given_up(reason))  # at once: a paused account makes one attempt in 5 s
                return 0.0
            started = time.time()
            verdict = await self._attempt(pending)
            if verdict is None:
                await self._change_token()
                continue
            if verdict.kind == "elsewhere":
                log.info("lane_handed_over", lane=self.fence.lane)
                return HAND_OVER_SECONDS
            suspicion = None
            if verdict.kind == "again" and is_failure(verdict):
                suspicion = await self._shared.suspects.weigh(self.fence.lane, pending.history, started, verdict)
            pause = self._judge(pending, started, verdict, suspicion)
            if pause is None:
                return 0.0
            self._note(pending)
            if verdict.kind == "absent":
                await self.refuse_waiting(verdict)
            if pause > self._shared.timing.rest_pause:
                self.rests_for = verdict.kind
                return pause
            if not self._stopping:
                await asyncio.sleep(pause)
        return 0.0

    async def _bind(self, pending: PendingDelivery) -> bool:
        """Give it the relations to events that were sent before it; False: it is not to be sent."""
        while not (self._stopping or pending.withdrawn or pending.outcome is not None):
            await self._keep_lease()
            if (early := pending.resolved) is not None:  # with its insertion
                self._take_over(pending, early)
                return not early.said
            behind = (each for each in islice(self.queue, 1, None) if self._is_to_be_bound(each))
            together = [pending, *islice(behind, MAX_BOUND - 1)]
            urgent = any(each.waiters for each in together)
            try:
                found = await self._shared.binder.bind([each.row for each in together], self.fence, urgent=urgent)
            except Exception as error:
                log.warning("store_away", error=reason(error))
                await asyncio.sleep(self._shared.timing.first_pause)
                continue
            if found is None:
                raise LeaseLost
            for each, resolved in zip(together, found, strict=False):
                if each.outcome is None:  # else it was refused meanwhile
                    self._take_over(each, resolved)
            return not (found[0].missing or found[0].said)
        return False

    def _is_to_be_bound(self, pending: PendingDelivery) -> bool:
        if pending.row.binding is None or pending.outcome is not None or pending.withdrawn:
            return False
        return pending.is_stored and self._is_due(pending)

    @staticmethod
    def _is_due(pending: PendingDelivery) -> bool:
        row = pending.row  # one that cannot be read waits: see `Attempts`
        return row.binding is not None and binding.is_due(row) and is_readable(row.content)

    def _take_over(self, pending: PendingDelivery, resolved: binding.Resolved) -> None:
        """What the store says of its relations. Without a need to send it, it has ended."""
        if resolved.missing:
            missing = HomeserverError(resolved.missing, errcode=Errcode.NOT_FOUND, status=404)
            self._settle(pending, Verdict("dead", error=missing))
            return
        pending.bind(resolved.content, resolved.history, resolved.binding)
        for entry in resolved.history:
            if "note" in entry:
                action = "nothing_new" if resolved.said else "target_missing"
                log.info(action, delivery=pending.row.delivery, note=entry["note"])
        if resolved.said:
            self.had_turn = True
            self._close(pending, Verdict("sent", event_id=resolved.said))

    async def _attempt(self, pending: PendingDelivery) -> Verdict | None:
        """Wait for the account's turn, then try once. None: it is not to be sent, or not yet."""
        shared, limits, started = self._shared, self._shared.limits, time.time()
        self._missing = self.is_roused = False
        ahead, self.is_fresh = self.is_fresh or pending.waiters > 0, False
        attempt = Attempt(
            pending.row,
            self.uncertain_since,
            self._sent_with,
            must_look=pending.attempts > 0 and must_be_looked_for(pending.history),
            own=pending.token,
            # An event in doubt is looked for with another token of the account: the refusal is not the event's.
            waits=self.uncertain_since is None and pending.waiters > 0 and pending.row.api_key is None,
        )
        try:
            async with limits.permit(self.account, ahead=ahead):
                ready = shared.attempts.prepare_at_once(attempt)
                verdict = None if ready else await shared.attempts.prepare(attempt)
                if attempt.sealed is not None:
                    pending.encrypt()
                if verdict is None:
                    self.at_work = self._may_send(pending, attempt)
                    if not self.at_work:
                        return None
                    verdict = await shared.attempts.send(attempt)
                if limits.apply(self.account, verdict, attempt.token):
                    shared.account_refused(self.account, verdict)
                return verdict
        except BaseException:  # cancelled, or a fault
            if self.at_work:
                self._may_be_there(pending, started)
            raise
        finally:
            self.at_work = False

    def _may_send(self, pending: PendingDelivery, attempt: Attempt) -> bool:
        """Checked right before a request goes out: a process that slept may have lost the lane meanwhile."""
        if attempt.digest != self._sent_with:
            several = self._merged if self.uncertain_since is not None else attempt.digest
            if several != self._sent_with:
                self._sends_with = several
                return False
        self._missing = attempt.looked
        return not self._stopping and not pending.withdrawn and self.is_held()

    async def _change_token(self) -> None:
        """Store which token sends from now on, if it changes. Raises LeaseLost."""
        digest, self._sends_with = self._sends_with, None
        if digest is None:
            return
        try:
            held = await self._shared.database.run(
                lambda connection: leases.use_token(connection, self.fence, digest), alone=True
            )
        except Exception as error:
            log.warning("store_away", error=reason(error))
            await asyncio.sleep(self._shared.timing.first_pause)
            return
        if not held:
            raise LeaseLost
        self._sent_with = digest

    async def _keep_lease(self) -> None:
        if not self.is_held():
            with contextlib.suppress(Exception):
                await self._shared.renew()
            if not self.is_held():
                raise LeaseLost

    def _note(self, pending: PendingDelivery) -> None:
        """Store the attempts so far, for the delivery log and a later holder. It is not waited for."""
        delivery, attempts, history = (
            pending.row.delivery,
            pending.attempts,
            history_to_json(pending.history),
        )
        with contextlib.suppress(StoreFull):  # it is only a record
            noting = self._shared.database.run(
                lambda connection: outbox.note(connection, delivery, attempts, history), lingers=True
            )
            noting.add_done_callback(ignore_result)

    def _judge(
        self, pending: PendingDelivery, started: float, found: Verdict, suspicion: Suspicion | None
    ) -> float | None:
        """Record an attempt; returns seconds until the next one, or None if this one settled the event."""
        entry, wait = _entry(started, found), None
        if suspicion is not None:
            entry["failed"] = suspicion.entry()
        elif found.kind in ("slow", "account", "token"):  # other replicas learn of an account's pause from its events
            entry["paused"] = [found.kind, _ends(self._shared.limits.pause_of(self.account))]
        if found.kind == "absent":
            wait = _wait_for_invitation(pending.history, entry, self._shared.timing.absent_pauses)
        pending.record(entry)
        if found.kind == "sent":
            pending.count_attempt()
            self._settle(pending, found)
            return None
        if found.kind == "slow":
            return 0.0
        is_old, is_open = self._is_overdue(pending), self._leaves_open(found)
        if found.kind == "token" and (is_open or not self._hears_of_token(pending)):
            if not is_old:
                return 0.0  # the account waits for a token
            found = self._given_up(self._shared.limits.waits_for(self.account) or "its access token is refused")
        is_told = pending.waiters > 0 and not is_open and (pending.row.api_key is None or found.kind != "account")
        if found.kind == "account" and not (is_told or is_old):
            return 0.0  # likewise: the account pauses, not the lane
        pending.count_attempt()
        if is_old and (found.kind == "again" or (found.kind in ("account", "absent") and not is_told)):
            assert found.error is not None
            found = self._given_up(found.error.error, sent=found.error.sent)
        if found.kind == "again":
            pause = self._again(pending, started, found)
            if suspicion is None or not (suspicion.is_due and suspicion.counts):
                return pause
            if not self._missing:  # the history makes the next attempt look for it
                return self._shared.timing.first_pause
            found = self._set_aside(pending, suspicion, found)
        if found.kind == "absent" and wait is not None and not is_told:
            return wait
        if found.kind == "absent" and is_open and found.error is not None:
            found = _dead(found.error.error, in_doubt=True)
        self._settle(pending, found)
        return None

    def _leaves_open(self, found: Verdict) -> bool:
        """Whether the head may be in the room in spite of this refusal.

        An earlier request may have put it there. This answers something else: a look into the room, or a token that
        was good then. A caller who is told 4xx would send it once more.
        """
        return self.uncertain_since is not None and (found.beforehand or found.kind in ("token", "account"))

    def _set_aside(self, pending: PendingDelivery, suspicion: Suspicion, found: Verdict) -> Verdict:
        """The homeserver fails at this event alone: make it a dead letter, so that the lane goes on."""
        error = found.error
        assert error is not None
        self._shared.suspects.set_aside(self.fence.lane)
        log.warning(
            "event_set_aside", delivery=pending.row.delivery, room=pending.row.room_id, attempts=pending.attempts
        )
        seconds = round(time.time() - suspicion.since / 1000)
        text = (
            f"set aside after {pending.attempts} attempts: for {seconds} s the homeserver has answered "
            f"{error.status} ({error.error}) to this event, and taken others"
        )
        return Verdict("dead", error=HomeserverError(text, errcode=error.errcode, status=error.status))

    def _is_overdue(self, pending: PendingDelivery) -> bool:
        """Whether an event is so old that the next attempt without an answer is its last."""
        is_old = time.time() - pending.row.accepted_at / 1000 >= self._shared.keep_seconds
        return is_old and time.monotonic() >= self._shared.gives_up_at

    def _given_up(self, reason: str, *, sent: bool = False) -> Verdict:
        """The verdict over an overdue event: no 401, which would be about the caller's own token.

        `sent`: the last attempt may have put it into the room.
        """
        days = self._shared.keep_seconds / DAY_SECONDS
        text = f"it was not delivered within {days:g} days: {reason}"
        return _dead(text, in_doubt=sent or self.uncertain_since is not None)

    def _hears_of_token(self, pending: PendingDelivery) -> bool:
        """Whether a caller waits whose own token is the refused one."""
        is_own = pending.row.api_key is None and self._shared.limits.is_refused(pending.token)
        return is_own and pending.waiters > 0

    def _again(self, pending: PendingDelivery, started: float, found: Verdict) -> float:
        assert found.error is not None
        if found.error.sent:
            self._may_be_there(pending, started)
        pause = pause_after(pending.attempts - 1, self._shared.timing)
        if pending.attempts & (pending.attempts - 1) == 0:  # 1, 2, 4, 8 …: an outage must not fill the log
            log.warning(
                "not_delivered",
                delivery=pending.row.delivery,
                room=pending.row.room_id,
                attempts=pending.attempts,
                again_in=round(pause, 1),
                error=found.error.error,
            )
        return pause

    def _may_be_there(self, pending: PendingDelivery, started: float) -> None:
        """The homeserver may have it. The first such time counts, since homeservers forget that first."""
        pending.begin()
        if self.uncertain_since is None:
            self._doubt(started)

    def _is_doubtful(self, pending: PendingDelivery) -> bool:
        """Whether an earlier holder of this lane may have sent it."""
        return pending.row.accepted_at <= self._doubtful_until

    def _be_certain(self) -> None:
        if self.uncertain_since is not None:
            self._doubt(None)

    def _doubt(self, since: float | None) -> None:
        self.uncertain_since = since
        self._shared.write_queue.doubt(self.fence, since)

    def _settle(self, pending: PendingDelivery, found: Verdict) -> None:
        """Settle the head."""
        self.had_turn = True
        if found.kind == "sent":
            self._shared.suspects.passed(self.fence.lane)
            if self._missing and not (self._restored or self._merged):
                # It was never sent before, and so nothing behind it was. A refused event would prove nothing: it may
                # have been refused before, and the events behind it sent.
                self._doubtful_until = 0
        self._close(pending, found)
        if not self._is_doubtful(pending):
            self._be_certain()

    def _close(self, pending: PendingDelivery, found: Verdict) -> None:
        """Store how an event ended, and tell its waiters."""
        error = found.error
        if found.kind == "sent":
            outcome = Outcome("sent", found.event_id)
        else:
            assert error is not None
            outcome = Outcome("dead", error={"status": error.status, **error.body()})
        pending.settle(outcome, clock.now_ms(), self._shared.keeps)
        if error is not None:  # of a verdict that is not "sent"
            log.warning(
                "event_dead",
                delivery=pending.row.delivery,
                room=pending.row.room_id,
                errcode=str(error.errcode),
                error=error.error,
            )
        metrics.count(metrics.settled, outcome.state)
        self._shared.backpressure.remove(pending)
        self._shared.write_queue.settle(pending, self.fence)
        pending.answer(outcome)


def _dead(text: str, *, in_doubt: bool) -> Verdict:
    """The verdict over an event that was not refused: no 4xx, which would say that it is not in its room."""
    return Verdict("dead", error=GatewayTimeout(f"{text}{IN_DOUBT if in_doubt else ''}"))


def _wait_for_invitation(
    history: Sequence[Mapping[str, Any]], entry: dict[str, Any], pauses: Sequence[float]
) -> float | None:
    """Seconds until an event is tried again whose account is not in the room; None after the last of the pauses.

    The attempt's entry says which pause it is and when that ends (ms): attempts in between, which waiting callers
    cause, must not use the pauses up.
    """
    now = clock.now_ms()
    since = takewhile(lambda earlier: "replayed" not in earlier, reversed(history))
    absences = [earlier["absent"] for earlier in since if "absent" in earlier]
    number, until = -1, 0
    if absences:  # flowbridge 0.x wrote `true` for each pause
        number, until = (len(absences) - 1, 0) if absences[0] is True else absences[0]
    if now + EARLY_MS >= until:
        number += 1
        if number >= len(pauses):
            return None
        until = now + int(pauses[number] * 1000)
    entry["absent"] = [number, until]
    return max(0.001, (until - now) / 1000)


def _ends(seconds: float) -> int | None:
    """When a pause ends (ms); None for one without an end that is known."""
    return int((time.time() + seconds) * 1000) if seconds < float("inf") else None


def pause_after(failures: int, timing: Timing) -> float:
    """Seconds to wait after a failure with so many before it: exponential backoff with jitter."""
    return min(timing.first_pause * 2.0 ** min(failures, 10), timing.max_pause) * random.uniform(0.8, 1.2)  # noqa: S311 (no secret)


def _entry(started: float, found: Verdict) -> dict[str, Any]:
    """One attempt as the delivery log shows it."""
    entry: dict[str, Any] = {"at": int(started * 1000), "ms": int((time.time() - started) * 1000)}
    if found.error is None:
        return {**entry, "status": 200}
    return {
        **entry,
        "status": found.error.status,
        "errcode": str(found.error.errcode),
        "error": found.error.error[:300],
    }
