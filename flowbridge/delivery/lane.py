"""A lane: the events of an account in a room, sent one after another.

An event ends as sent, or as dead when the homeserver refuses it for good; anything else is tried again with the same
transaction id, which the homeserver remembers. When it may have forgotten, the room is looked into first.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from flowbridge import log, metrics
from flowbridge.delivery.attempt import Carrier
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.pending import Tickets
from flowbridge.delivery.suspects import Suspects, Suspicion, is_failure, must_be_looked_for
from flowbridge.delivery.write_queue import Outcome, Ticket, WriteQueue
from flowbridge.errors import GatewayTimeout, HomeserverError
from flowbridge.homeserver.answers import Verdict
from flowbridge.store import Database, Row, clock, leases, outbox
from flowbridge.store.clock import CLOCK_SKEW_MS
from flowbridge.store.engine import reason
from flowbridge.store.errors import StoreFull
from flowbridge.store.json_columns import history_to_json
from flowbridge.store.leases import Claim

DAY_SECONDS = 86_400.0
DEAD_SECONDS = 7 * DAY_SECONDS  # after which an event is given up, whatever it waits for
ABSENT_SECONDS = (60.0, 300.0, 900.0)  # an invitation may be on its way
FIRST_PAUSE = 0.5
MAX_PAUSE = 60.0
REST_SECONDS = 5.0  # for a longer pause than this a lane is given back
TOLD = 50  # callers who wait that are told of a refusal in one go
IN_DOUBT = "; it may be in the room all the same"
EARLY_MS = 5  # by which an attempt may come before its time


@dataclass(frozen=True, slots=True)
class Shared:
    """What all lanes of a process have in common. `renew` prolongs their leases."""

    database: Database
    write_queue: WriteQueue
    backpressure: Backpressure
    carrier: Carrier
    suspects: Suspects
    tickets: Tickets
    deadline: float  # seconds that one attempt takes at most
    batch: Callable[[], int]  # how many events a lane may hold just now
    renew: Callable[[], Awaitable[None]]
    keep_seconds: float = DEAD_SECONDS  # an event that is older is not tried again
    gives_up_at: float = 0.0  # monotonic; not before


class LeaseLost(Exception):
    """Another process may send for this lane by now."""


class Lane:
    """A lane that this process holds. `lease_until`: monotonic seconds. `full`: there may be more than was claimed."""

    def __init__(self, shared: Shared, claim: Claim, lease_until: float, *, full: bool) -> None:
        self._shared = shared
        self.fence = claim.fence
        self.account = claim.account
        self.lease_until = lease_until
        self.tickets: deque[Ticket] = deque()
        self.uncertain_since = claim.uncertain_since / 1000 if claim.uncertain_since else None  # as time.time()
        # Whoever held the lane before may have sent more than its head: each event that was accepted until now (ms),
        # by the clock of another replica perhaps.
        self._doubtful_until = clock.now_ms() + CLOCK_SKEW_MS if claim.uncertain_since else 0
        # Of a backup, an event that is missing proves nothing: it may have been deleted later, and the next one sent.
        self._restored = leases.is_restored(claim.uncertain_since)
        # The digest of the token that all that is in doubt was sent with; "" unknown, or several. It is in the store
        # before anything is sent: whoever claims the lane after a crash looks into the room unless it has the same.
        self._sent_with = claim.sent_with
        self._merged = leases.MERGED if claim.sent_with == leases.MERGED else ""
        self._sends_with: str | None = None  # another one that is yet to be written
        self._missing = False  # the head was looked for, and is not in the room
        self.is_fresh = False  # it was idle, or is claimed for a caller: its next event goes before long queues
        self.had_turn = False  # one of its events has come to its end
        self.is_roused = False  # its account has joined the room since the last attempt began
        self.rests_for = ""  # the kind of the verdict that it rests after
        self.at_work = False  # a request is under way
        self.task: asyncio.Task[None] | None = None
        self._more = False  # there are, or may be, further events in the store
        self._reading = False
        self._stopping = False
        self._wake = asyncio.Event()
        self.idle_since: float | None = None  # monotonic; None while there is something to send
        self._fill(claim.rows, full=full)

    def takes(self) -> bool:
        """Whether a new event may be put here at once: nothing older is on its way from the store."""
        is_current = not (self._more or self._reading or self._stopping)
        return is_current and len(self.tickets) < self._shared.batch() and self.is_held()

    def put(self, ticket: Ticket) -> None:
        ticket.held = True
        self.tickets.append(ticket)
        self._wake.set()

    def look(self) -> None:
        """There are events in the store that it may not know."""
        self._more = True
        self._wake.set()

    def is_held(self) -> bool:
        """Whether a request sent now ends before the lease does."""
        return time.monotonic() + self._shared.deadline < self.lease_until

    def is_sending(self, ticket: Ticket) -> bool:
        return self.at_work and bool(self.tickets) and self.tickets[0] is ticket

    def is_uncertain(self, ticket: Ticket) -> bool:
        """Whether the homeserver may have this event."""
        if ticket.tried or self.is_sending(ticket):
            return True
        is_head = bool(self.tickets) and self.tickets[0] is ticket
        return self.uncertain_since is not None and (is_head or self._is_doubtful(ticket))

    def stop(self) -> None:
        """Finish what is under way, and begin nothing more."""
        self._stopping = True
        self._wake.set()
        if self.task is not None and not self.at_work:
            self.task.cancel()

    def end_if_idle(self, since: float) -> None:
        """Begin nothing more when there has been nothing since then (monotonic seconds)."""
        if self.idle_since is not None and self.idle_since < since and not self._wake.is_set():
            self._stopping = True
            self._wake.set()

    def leave(self) -> None:
        """Let go of its tickets."""
        while self.tickets:
            ticket = self.tickets.popleft()
            ticket.held = False
            self._shared.tickets.leave(ticket)

    async def run(self) -> float:
        """Send until there is nothing for a while; returns for how many seconds it is to rest. Raises LeaseLost."""
        while not self._stopping:
            if self.tickets:
                if not self._is_doubtful(self.tickets[0]):
                    self._be_certain()
                rest = await self._deliver(self.tickets[0])
                if rest:
                    return rest
                self.tickets.popleft().held = False
            elif self._more:
                await self._refill()
            else:
                self._be_certain()
                self._wake.clear()
                self.idle_since = time.monotonic()
                await self._wake.wait()
                self.idle_since = None
                self.is_fresh = True
        return 0.0

    @property
    def has_more(self) -> bool:
        """Whether it holds a backlog."""
        return self._more or len(self.tickets) > 1

    async def refuse_waiting(self, found: Verdict) -> None:
        """Tell the callers who wait behind an event that the homeserver refuses, too: theirs would fare no better.

        With an API key the bridge's account is not the caller's business; whether it is in the room is.
        """
        for number, ticket in enumerate(self._shared.tickets.waiting_in(self.fence.lane)):
            if number % TOLD == 0:
                await asyncio.sleep(0)  # others have their turn
            is_new = ticket.idem is None or ticket.committed.done()  # else it may be an older delivery's
            is_told = found.kind == "absent" or ticket.row.api_key is None
            if is_new and is_told and not (ticket.settled.done() or ticket.withdrawn or self.is_uncertain(ticket)):
                ticket.history = [*ticket.history, _entry(time.time(), found)]
                ticket.withdrawn = True  # from the lane
                self._close(ticket, found)

    async def _refill(self) -> None:
        self._more, self._reading = False, True  # whoever comes from here on says `look` again
        lane, batch = self.fence.lane, self._shared.batch()
        try:
            rows = await self._shared.database.run(lambda connection: outbox.fetch(connection, lane, batch))
        except Exception as error:
            self._more = True
            log.warning("store_away", error=reason(error))
            await asyncio.sleep(FIRST_PAUSE)
        else:
            self._fill(rows, full=len(rows) >= batch)
            if rows and not self.tickets:  # their outcomes are not written yet: the store is in trouble
                await asyncio.sleep(FIRST_PAUSE)
        finally:
            self._reading = False

    def _fill(self, rows: Sequence[Row], *, full: bool) -> None:
        for row in rows:
            if row.delivery not in self._shared.write_queue.unwritten:
                ticket = self._shared.tickets.of(row)
                ticket.held = ticket.written = True
                self.tickets.append(ticket)
        self._more = self._more or full

    async def _deliver(self, ticket: Ticket) -> float:
        """Try until it is settled; more than 0: not settled, and the lane is to rest for so many seconds."""
        if ticket.idem is not None:
            # Whether it is new is known then. Also when that is done: what the courier makes of it comes just before.
            await asyncio.wait([ticket.committed])
        while not (self._stopping or ticket.withdrawn):
            await self._keep_lease()
            carrier = self._shared.carrier
            if carrier.distrusted and self._is_overdue(ticket) and (reason := carrier.waits_for(self.account)):
                self._settle(ticket, self._given_up(reason))  # at once: a paused account makes an attempt every 5 s
                return 0.0
            started = time.time()
            found = await self._carry(ticket)
            if found is None:
                await self._change_token()
                continue
            suspicion = None
            if found.kind == "again" and is_failure(found):
                suspicion = await self._shared.suspects.weigh(self.fence.lane, ticket.history, started, found)
            pause = self._judge(ticket, started, found, suspicion)
            if pause is None:
                return 0.0
            self._note(ticket)
            if found.kind == "absent":
                await self.refuse_waiting(found)
            if pause > REST_SECONDS:
                self.rests_for = found.kind
                return pause
            if not self._stopping:
                await asyncio.sleep(pause)
        return 0.0

    async def _carry(self, ticket: Ticket) -> Verdict | None:
        started = time.time()
        self._missing = self.is_roused = False
        ahead, self.is_fresh = self.is_fresh or ticket.waiters > 0, False
        try:
            return await self._shared.carrier.carry(
                ticket.row,
                self.uncertain_since,
                lambda looked, digest: self._begin(ticket, digest, looked=looked),
                must_look=ticket.attempts > 0 and must_be_looked_for(ticket.history),
                ahead=ahead,
                sent_with=self._sent_with,
                own=ticket.token,
                # One in doubt is looked for with another token of the account: what is refused here is not the event.
                waits=self.uncertain_since is None and bool(ticket.waiters) and ticket.row.api_key is None,
            )
        except BaseException:  # a stop, or a fault of ours
            if self.at_work:
                self._may_be_there(ticket, started)
            raise
        finally:
            self.at_work = False

    def _begin(self, ticket: Ticket, digest: str, *, looked: bool) -> bool:
        """Asked right before a request goes out: a process that slept may have lost the lane meanwhile.

        `digest`: of the token that sends it. `looked`: the event is not in the room.
        """
        if digest != self._sent_with:
            several = self._merged if self.uncertain_since is not None else digest
            if several != self._sent_with:
                self._sends_with = several
                return False
        self._missing = looked
        self.at_work = not self._stopping and not ticket.withdrawn and self.is_held()
        return self.at_work

    async def _change_token(self) -> None:
        """Write which token the lane is sent with from now on, if it changes. Raises LeaseLost."""
        digest, self._sends_with = self._sends_with, None
        if digest is None:
            return
        try:
            held = await self._shared.database.run(
                lambda connection: leases.use_token(connection, self.fence, digest), alone=True
            )
        except Exception as error:
            log.warning("store_away", error=reason(error))
            await asyncio.sleep(FIRST_PAUSE)
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

    def _note(self, ticket: Ticket) -> None:
        """Write down what has been tried, for the delivery log and for whoever goes on; nobody waits for it."""
        delivery, attempts, history = ticket.row.delivery, ticket.attempts, history_to_json(ticket.history)
        with contextlib.suppress(StoreFull):  # it is a record only
            noting = self._shared.database.run(
                lambda connection: outbox.note(connection, delivery, attempts, history), lingers=True
            )
            noting.add_done_callback(_heard)

    def _judge(self, ticket: Ticket, started: float, found: Verdict, suspicion: Suspicion | None) -> float | None:
        """Record an attempt: the seconds until the next one, or None when the event is settled by it."""
        entry = _entry(started, found)
        if suspicion is not None:
            entry["failed"] = suspicion.entry()
        wait = _wait_for_invitation(ticket.history, entry) if found.kind == "absent" else None
        ticket.history = _latest([*ticket.history, entry])
        if found.kind == "sent":
            ticket.attempts += 1
            self._settle(ticket, found)
            return None
        if found.kind == "slow":
            return 0.0
        is_old, is_open = self._is_overdue(ticket), self._leaves_open(found)
        if found.kind == "token" and (is_open or not self._hears_of_token(ticket)):
            if not is_old:
                return 0.0  # the account waits for a token
            found = self._given_up(self._shared.carrier.waits_for(self.account) or "its access token is refused")
        is_told = ticket.waiters > 0 and not is_open and (ticket.row.api_key is None or found.kind != "account")
        if found.kind == "account" and not (is_told or is_old):
            return 0.0  # likewise; what pauses is the account
        ticket.attempts += 1
        if is_old and (found.kind == "again" or (found.kind in ("account", "absent") and not is_told)):
            assert found.error is not None
            found = self._given_up(found.error.error, sent=found.error.sent)
        if found.kind == "again":
            pause = self._again(ticket, started, found)
            if suspicion is None or not (suspicion.is_due and suspicion.counts):
                return pause
            if not self._missing:  # as the history says, it is looked for next time
                return FIRST_PAUSE
            found = self._set_aside(ticket, suspicion, found)
        if found.kind == "absent" and wait is not None and not is_told:
            return wait
        if found.kind == "absent" and is_open and found.error is not None:
            found = _dead(found.error.error, in_doubt=True)
        self._settle(ticket, found)
        return None

    def _leaves_open(self, found: Verdict) -> bool:
        """Whether the head may be in the room although this refuses something.

        It was sent before, perhaps, and this is no answer to that: it is one to a look into the room, say, or to a
        token that was good then. A caller who was told 4xx would send it once more.
        """
        return self.uncertain_since is not None and (found.beforehand or found.kind in ("token", "account"))

    def _set_aside(self, ticket: Ticket, suspicion: Suspicion, found: Verdict) -> Verdict:
        """The homeserver fails at this event alone: let those behind it go."""
        error = found.error
        assert error is not None
        self._shared.suspects.set_aside(self.fence.lane)
        log.warning("event_set_aside", delivery=ticket.row.delivery, room=ticket.row.room_id, attempts=ticket.attempts)
        seconds = round(time.time() - suspicion.since / 1000)
        text = (
            f"set aside after {ticket.attempts} attempts: for {seconds} s the homeserver has answered "
            f"{error.status} ({error.error}) to this event, and taken others"
        )
        return Verdict("dead", error=HomeserverError(text, errcode=error.errcode, status=error.status))

    def _is_overdue(self, ticket: Ticket) -> bool:
        """Whether an event has waited for so long that it is given up at the next attempt that brings no answer."""
        is_old = time.time() - ticket.row.accepted_at / 1000 >= self._shared.keep_seconds
        return is_old and time.monotonic() >= self._shared.gives_up_at

    def _given_up(self, reason: str, *, sent: bool = False) -> Verdict:
        """The end of an event that is overdue, and why: not as a 401, which is about a caller's own token.

        `sent`: the last attempt may have put it into the room.
        """
        days = self._shared.keep_seconds / DAY_SECONDS
        text = f"it was not delivered within {days:g} days: {reason}"
        return _dead(text, in_doubt=sent or self.uncertain_since is not None)

    def _hears_of_token(self, ticket: Ticket) -> bool:
        """Whether a caller waits who sent with a token of its own, which is the one that is refused."""
        is_own = ticket.row.api_key is None and self._shared.carrier.is_refused(ticket.token)
        return is_own and ticket.waiters > 0

    def _again(self, ticket: Ticket, started: float, found: Verdict) -> float:
        assert found.error is not None
        if found.error.sent:
            self._may_be_there(ticket, started)
        pause = pause_after(ticket.attempts - 1)
        if ticket.attempts & (ticket.attempts - 1) == 0:  # 1, 2, 4, 8 …: an outage must not fill the log
            log.warning(
                "not_delivered",
                delivery=ticket.row.delivery,
                room=ticket.row.room_id,
                attempts=ticket.attempts,
                again_in=round(pause, 1),
                error=found.error.error,
            )
        return pause

    def _may_be_there(self, ticket: Ticket, started: float) -> None:
        """The homeserver may have taken it; what counts is the first time, since that is forgotten first."""
        ticket.tried = True
        if self.uncertain_since is None:
            self._doubt(started)

    def _is_doubtful(self, ticket: Ticket) -> bool:
        """Whether somebody who held this lane before may have sent it."""
        return ticket.row.accepted_at <= self._doubtful_until

    def _be_certain(self) -> None:
        if self.uncertain_since is not None:
            self._doubt(None)

    def _doubt(self, since: float | None) -> None:
        self.uncertain_since = since
        self._shared.write_queue.doubt(self.fence, since)

    def _settle(self, ticket: Ticket, found: Verdict) -> None:
        """The head has come to its end."""
        self.had_turn = True
        if found.kind == "sent":
            self._shared.suspects.passed(self.fence.lane)
            if self._missing and not (self._restored or self._merged):
                # It was never sent before, and so nothing is there that comes after it. One that is refused proves
                # nothing: it may have been refused before, and what comes after it sent.
                self._doubtful_until = 0
        self._close(ticket, found)
        if not self._is_doubtful(ticket):
            self._be_certain()

    def _close(self, ticket: Ticket, found: Verdict) -> None:
        """Write down how an event ended, and tell who waits."""
        ticket.settled_at = clock.now_ms()  # before the outcome, which the writer may see at once
        if found.kind == "sent":
            ticket.outcome = Outcome("sent", found.event_id)
        else:
            error = found.error
            assert error is not None
            ticket.outcome = Outcome("dead", error={"status": error.status, **error.body()})
            log.warning(
                "event_dead",
                delivery=ticket.row.delivery,
                room=ticket.row.room_id,
                errcode=str(error.errcode),
                error=error.error,
            )
        metrics.count(metrics.settled, ticket.outcome.state)
        self._shared.backpressure.remove(ticket)
        self._shared.write_queue.settle(ticket, self.fence)
        if not ticket.settled.done():
            ticket.settled.set_result(ticket.outcome)


def _dead(text: str, *, in_doubt: bool) -> Verdict:
    """The end of an event that the homeserver has not refused: no 4xx, which would say that it is not in its room."""
    return Verdict("dead", error=GatewayTimeout(f"{text}{IN_DOUBT if in_doubt else ''}"))


def _heard(noting: "asyncio.Future[None]") -> None:
    if not noting.cancelled():
        noting.exception()


def _latest(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last attempts, and all replays: those are the audit."""
    from_here = len(history) - outbox.HISTORY
    return [entry for index, entry in enumerate(history) if index >= from_here or "replayed" in entry]


def _wait_for_invitation(history: Sequence[Mapping[str, Any]], entry: dict[str, Any]) -> float | None:
    """Seconds until an event is tried again whose account is not in the room; None when it has waited long enough.

    Notes in the entry of this attempt which of the waits it is, and when that ends (ms): a caller who waits may have
    the lane tried in between, which must not use the waits up.
    """
    now = clock.now_ms()
    since = takewhile(lambda earlier: "replayed" not in earlier, reversed(history))
    absences = [earlier["absent"] for earlier in since if "absent" in earlier]
    number, until = -1, 0
    if absences:  # `true` was written by flowbridge 0.x for each wait that was over
        number, until = (len(absences) - 1, 0) if absences[0] is True else absences[0]
    if now + EARLY_MS >= until:
        number += 1
        if number >= len(ABSENT_SECONDS):
            return None
        until = now + int(ABSENT_SECONDS[number] * 1000)
    entry["absent"] = [number, until]
    return max(0.001, (until - now) / 1000)


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures before this one: twice as long each time, up to a minute."""
    return min(FIRST_PAUSE * 2.0 ** min(failures, 10), MAX_PAUSE) * random.uniform(0.8, 1.2)  # noqa: S311 (no secret)


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
