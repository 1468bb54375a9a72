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
from flowbridge.delivery.carrier import CLOCK_SKEW_MS, Carrier
from flowbridge.delivery.tickets import Tickets
from flowbridge.errors import GatewayTimeout
from flowbridge.homeserver.verdict import Verdict
from flowbridge.store import Database, Row, outbox
from flowbridge.store.engine import reason
from flowbridge.store.errors import StoreFull
from flowbridge.store.journal import Journal, Outcome, Ticket
from flowbridge.store.outbox import Claim
from flowbridge.store.stock import Stock

DEAD_SECONDS = 7 * 86_400.0  # after which an event is given up, whatever it waits for
ABSENT_SECONDS = (60.0, 300.0, 900.0)  # an invitation may be on its way
FIRST_PAUSE = 0.5
MAX_PAUSE = 60.0
REST_SECONDS = 5.0  # for a longer pause than this a lane is given back


@dataclass(frozen=True, slots=True)
class Shared:
    """What all lanes of a process have in common. `renew` prolongs their leases."""

    database: Database
    journal: Journal
    stock: Stock
    carrier: Carrier
    tickets: Tickets
    deadline: float  # seconds that one attempt takes at most
    batch: Callable[[], int]  # how many events a lane may hold just now
    renew: Callable[[], Awaitable[None]]


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
        self._doubtful_until = outbox.now_ms() + CLOCK_SKEW_MS if claim.uncertain_since else 0
        # The digest of the token that all that is in doubt was sent with; "" unknown, or several. It is in the store
        # before anything is sent: whoever claims the lane after a crash looks into the room unless it has the same.
        self._sent_with = claim.sent_with
        self._merged = outbox.MERGED if claim.sent_with == outbox.MERGED else ""
        self._sends_with: str | None = None  # another one that is yet to be written
        self._missing = False  # the head was looked for, and is not in the room
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
        return 0.0

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
            if row.delivery not in self._shared.journal.unwritten:
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
            if is_overdue(ticket.row) and (reason := self._shared.carrier.waits_for(self.account)):
                self._settle(ticket, given_up(reason))  # at once: a paused account makes an attempt every 5 s
                return 0.0
            started = time.time()
            found = await self._carry(ticket)
            if found is None:
                await self._change_token()
                continue
            pause = self._judge(ticket, started, found)
            if pause is None:
                return 0.0
            self._note(ticket)
            if pause > REST_SECONDS:
                return pause
            if not self._stopping:
                await asyncio.sleep(pause)
        return 0.0

    async def _carry(self, ticket: Ticket) -> Verdict | None:
        started = time.time()
        self._missing = False
        try:
            return await self._shared.carrier.carry(
                ticket.row,
                self.uncertain_since,
                lambda looked, digest: self._begin(ticket, digest, looked=looked),
                sent_with=self._sent_with,
                own=ticket.token,
                waits=bool(ticket.waiters) and ticket.row.api_key is None,
            )
        except asyncio.CancelledError:
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
                lambda connection: outbox.use_token(connection, self.fence, digest), alone=True
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
        delivery, attempts, history = ticket.row.delivery, ticket.attempts, outbox.dumps(ticket.history)
        with contextlib.suppress(StoreFull):  # it is a record only
            noting = self._shared.database.run(
                lambda connection: outbox.note(connection, delivery, attempts, history), lingers=True
            )
            noting.add_done_callback(_heard)

    def _judge(self, ticket: Ticket, started: float, found: Verdict) -> float | None:
        """Record an attempt: the seconds until the next one, or None when the event is settled by it."""
        ticket.history = _latest([*ticket.history, _entry(started, found)])
        if found.kind == "slow":
            return 0.0
        is_old = is_overdue(ticket.row)
        if found.kind == "token" and not self._hears_of_token(ticket):
            if not is_old:
                return 0.0  # the account waits for a token
            found = given_up(self._shared.carrier.waits_for(self.account) or "its access token is refused")
        ticket.attempts += 1
        if found.kind == "again" and not is_old:
            return self._again(ticket, started, found)
        if found.kind == "absent" and not (ticket.waiters or is_old):
            absences = _absences(ticket.history)
            if absences <= len(ABSENT_SECONDS):
                return ABSENT_SECONDS[absences - 1]
        self._settle(ticket, found)
        return None

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
        self._shared.journal.doubt(self.fence, since)

    def _settle(self, ticket: Ticket, found: Verdict) -> None:
        ticket.settled_at = outbox.now_ms()  # before the outcome, which the writer may see at once
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
        self._shared.stock.remove(ticket)
        self._shared.journal.settle(ticket, self.fence)
        if self._missing and found.kind == "sent" and not self._merged:
            # It was never sent before, and so nothing is there that comes after it. One that is refused proves nothing:
            # it may have been refused before, and what comes after it sent.
            self._doubtful_until = 0
        if not self._is_doubtful(ticket):
            self._be_certain()
        if not ticket.settled.done():
            ticket.settled.set_result(ticket.outcome)


def is_overdue(row: Row) -> bool:
    """Whether an event has waited for so long that it is given up at the next attempt that brings no answer."""
    return time.time() - row.accepted_at / 1000 >= DEAD_SECONDS


def given_up(reason: str) -> Verdict:
    """The end of an event that is overdue, and why: not as a 401, which is about a caller's own token."""
    return Verdict("dead", error=GatewayTimeout(f"it could not be sent for 7 days: {reason}"))


def _heard(noting: "asyncio.Future[None]") -> None:
    if not noting.cancelled():
        noting.exception()


def _latest(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last attempts, and all replays: those are the audit."""
    from_here = len(history) - outbox.HISTORY
    return [entry for index, entry in enumerate(history) if index >= from_here or "replayed" in entry]


def _absences(history: Sequence[Mapping[str, Any]]) -> int:
    """How often the account was not in the room, since the event was replayed last if it was."""
    since = takewhile(lambda entry: "replayed" not in entry, reversed(history))
    return sum(entry.get("absent", False) for entry in since)


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures before this one: twice as long each time, up to a minute."""
    return min(FIRST_PAUSE * 2.0 ** min(failures, 10), MAX_PAUSE) * random.uniform(0.8, 1.2)  # noqa: S311 (no secret)


def _entry(started: float, found: Verdict) -> dict[str, object]:
    """One attempt as the delivery log shows it."""
    entry: dict[str, object] = {"at": int(started * 1000), "ms": int((time.time() - started) * 1000)}
    if found.error is None:
        return {**entry, "status": 200}
    if found.kind == "absent":
        entry["absent"] = True
    return {
        **entry,
        "status": found.error.status,
        "errcode": str(found.error.errcode),
        "error": found.error.error[:300],
    }
