"""Acceptances and outcomes on their way to the disk, each group in one commit."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection

from flowbridge.limits.shares import Share
from flowbridge.store import accounts, leases, outbox
from flowbridge.store.database import Database
from flowbridge.store.errors import MISSING_RETRY_MS, ShareTaken, StoreFull, StoreUnavailable
from flowbridge.store.json_columns import history_to_json, to_json
from flowbridge.store.leases import Fence
from flowbridge.store.outbox import ROW_BYTES, Row

AGAIN_SECONDS = 1.0
WAIT_MS = 1_000  # until a caller with many requests under way should come again


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery ended. `error` is the Matrix error of a dead one: {"status", "errcode", "error", …}."""

    state: Literal["sent", "dead"]
    event_id: str | None = None
    error: dict[str, Any] | None = None


@dataclass(eq=False, slots=True)
class Ticket:
    """An accepted event on its way through this process."""

    row: Row
    committed: "asyncio.Future[None]"
    settled: "asyncio.Future[Outcome | None]"  # None: this process ends before the delivery does
    idem: str | None = None
    fingerprint: str | None = None
    request: str | None = None  # the body as it came, where it was not the content
    urgent: bool = False  # somebody waits for the commit
    dirty: bool = False  # the lane is not ours: say so with the row
    waiters: int = 0  # how many callers want to know the outcome
    tried: bool = False  # the homeserver may have it
    held: bool = False  # it lies in a lane of ours
    counted: bool = False  # among what is queued
    withdrawn: bool = False
    token: str = ""  # the caller's own, with which it is sent rather than with another one of the account
    existing: dict[str, Any] | None = None  # the row that was accepted under the same key before
    outcome: Outcome | None = None
    settled_at: int = 0
    attempts: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    written: bool = False
    size: int = 0  # in the store, about; told when it is accepted
    # Whose share of the store it takes: the API key's, or that of the account which sent it with its own token. Many
    # keys share the bot's account: one of them must not take what the others need.
    caller: str = field(init=False)

    def __post_init__(self) -> None:
        self.caller = self.row.api_key or self.row.account

    def measure(self) -> int:
        """Its bytes in the store, about."""
        if not self.size:
            request = self.request or ""
            bytes_ = len(request) if request.isascii() else len(request.encode())
            self.size = ROW_BYTES + len(self.row.content) + bytes_
        return self.size

    def values(self) -> dict[str, Any]:
        """The row as it is inserted; with its outcome when it has one by then."""
        row, outcome = self.row, self.outcome
        return {
            "delivery": row.delivery,
            "lane": row.lane,
            "account": row.account,
            "room_id": row.room_id,
            "event_type": row.event_type,
            "state_key": row.state_key,
            "content": row.content.decode(),
            "request": self.request,
            "txn_id": row.txn_id,
            "idem": self.idem,
            "fingerprint": self.fingerprint,
            "state": outcome.state if outcome else "queued",
            "attempts": self.attempts,
            "history": history_to_json(self.history),
            "event_id": outcome.event_id if outcome else None,
            "error": to_json(outcome.error) if outcome and outcome.error else None,
            "api_key": row.api_key,
            "accepted_at": row.accepted_at,
            "settled_at": self.settled_at if outcome else None,
        }


class WriteQueue:
    """Collects what is to be written; one piece of work writes all that has come together.

    `max_waiting`: acceptances that may wait for their commit; `share`: of these, what one caller may have.
    """

    def __init__(self, database: Database, *, max_waiting: int = 10_000, share: float = 1.0) -> None:
        self._database = database
        self._max_waiting = max_waiting
        self._waiting = Share(max_waiting, share)
        self._new: deque[Ticket] = deque()
        self._outcomes: deque[dict[str, Any]] = deque()
        self._doubts: deque[tuple[Fence, int | None]] = deque()
        self._accounts: deque[dict[str, Any]] = deque()
        self._planned = False
        self._pending: dict[str, tuple[str, dict[str, Any]]] = {}  # delivery → txn id, outcome not on the disk yet
        self.unwritten: set[str] = set()  # deliveries whose outcome the store has refused to take so far

    def append(self, ticket: Ticket) -> None:
        """Write an acceptance. `ticket.committed` tells when it is on the disk. Raises StoreFull."""
        if len(self._new) >= self._max_waiting:
            raise StoreFull("too many callers wait for the store")
        caller = ticket.caller
        if not self._waiting.takes(caller):
            waiting = self._waiting.of(caller)
            if not waiting:
                raise StoreFull("too many callers wait for the store")
            raise ShareTaken(
                f"{waiting} requests of this API key or account wait for the store already, which is its share",
                retry_after_ms=WAIT_MS,
            )
        self._waiting.add(caller)
        self._new.append(ticket)
        self._plan(lingers=not ticket.urgent)

    def settle(self, ticket: Ticket, fence: Fence) -> None:
        """Write an outcome: into the row itself when that is not written yet, so that most sends cost one statement."""
        if ticket.written:  # set by the writer before it looks for the outcome, which we have set before we look
            outcome = _settlement(ticket, fence)
            self._pending[ticket.row.delivery] = ticket.row.txn_id, outcome
            self._outcomes.append(outcome)
            self._plan()

    def amended(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the outbox as it will be: an outcome that was told may be on its way to the disk still."""
        txn_id, outcome = self._pending.get(row["delivery"], ("", {}))
        # A replay, which has another transaction id, is queued after the outcome was written.
        if row["state"] != "queued" or row["txn_id"] != txn_id:
            return row
        return {**row, **{name: outcome[f"b_{name}"] for name in _OUTCOME}}

    def unsettled_lanes(self) -> set[str]:
        """The lanes of outcomes that were told and are not on the disk yet."""
        return {outcome["b_lane"] for _, outcome in self._pending.values()}

    def doubt(self, fence: Fence, since: float | None) -> None:
        """Write since when (seconds) the head of a lane may have been sent, or that there is no doubt any more."""
        self._doubts.append((fence, None if since is None else int(since * 1000)))
        self._plan()

    def remember(self, account: dict[str, Any]) -> None:
        """Write whose token it is, or that it was refused, before what is accepted from now on."""
        self._accounts.append(account)
        self._plan()

    def hurry(self) -> None:
        """Write at once what waits, also what was to be tried again later."""
        self._plan(lingers=False)

    def _plan(self, *, lingers: bool = True) -> None:
        """To be called after something was put into a queue: the writer may empty them at any moment."""
        if not self._planned:
            self._planned = True  # first, for the same reason
            batch = _Batch(self)
            writing = self._database.run(
                batch.write,
                lingers=lingers,
                always=True,
                alone=True,
                undo=batch.undo,
                found_nothing=batch.found_nothing,
            )
            writing.add_done_callback(batch.done)
        elif not lingers:
            self._database.hurry()

    def _take(self, batch: "_Batch") -> None:
        self._planned = False
        _drain(self._accounts, batch.accounts)
        _drain(self._new, batch.new)
        _drain(self._outcomes, batch.outcomes)
        _drain(self._doubts, batch.doubts)

    def _again(self, batch: "_Batch") -> None:
        """An outcome that could not be written is never given up: the event would be sent once more."""
        self._accounts.extendleft(reversed(batch.accounts))
        self._outcomes.extendleft(reversed(batch.outcomes))
        self._doubts.extendleft(reversed(batch.doubts))
        self.unwritten.update(outcome["b_delivery"] for outcome in batch.outcomes)
        asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._plan)


class _Batch:
    """What one piece of work writes; the same again when it has to be repeated."""

    def __init__(self, write_queue: WriteQueue) -> None:
        self._write_queue = write_queue
        self._taken = False
        self.accounts: list[dict[str, Any]] = []
        self.new: list[Ticket] = []
        self.outcomes: list[dict[str, Any]] = []
        self.doubts: list[tuple[Fence, int | None]] = []
        self.refused: set[str] = set()
        self.missing = ""  # why nothing new is taken
        self._ran = False  # to its end
        self._is_anew = False

    def write(self, connection: Connection) -> None:
        self._take()
        self._is_anew = False
        if not self._write_queue._database.is_sqlite:
            self._lock(connection)
        for account in sorted(self.accounts, key=lambda account: str(account["account"])):
            accounts.write(connection, account)
        self.missing = self._write_queue._database.missing
        if not self.missing:  # else outcomes alone: they are true as long as this process has the file
            self.refused = self._append(connection)
        outbox.settle(connection, self.outcomes)
        for fence, since in self.doubts:
            leases.doubt(connection, fence, since)
        self._ran = True

    def found_nothing(self) -> bool:
        """Whether the rows of an earlier run were not there, and will not be: all of them, since they come together."""
        return self._is_anew

    def undo(self, connection: Connection, missing: str) -> None:
        """The file that the acceptances went into is not there any more, and will not be after this process."""
        self.missing = missing
        outbox.remove_queued(connection, [ticket.row.delivery for ticket in self.new if ticket.existing is None])

    def _take(self) -> None:
        if not self._taken:
            self._taken = True
            self._write_queue._take(self)

    def _lock(self, connection: Connection) -> None:
        """Every lane that this writes to, before any row of an event.

        Of two replicas that insert the same key, one waits for the other's row, and must not hold a lane meanwhile
        that the other one wants. So new lanes are made here, and marked: with a row that proves to be there already,
        for nothing.
        """
        pairs = {(ticket.row.lane, ticket.row.account) for ticket in self.new if ticket.dirty}
        marked = {lane for lane, _ in pairs}
        held = {fence.lane for fence, _ in self.doubts} - marked
        pairs.update((lane, lane.partition("|")[0]) for lane in held)
        leases.mark_dirty(connection, pairs, exclude=held)

    def done(self, future: "asyncio.Future[None]") -> None:
        self._take()  # the store may be so far away that nothing was even begun
        error = None if future.cancelled() else future.exception()
        for ticket in self.new:
            self._write_queue._waiting.remove(ticket.caller)
            if ticket.committed.done():
                continue
            if error is not None:
                ticket.committed.set_exception(error)
            elif self.missing:
                ticket.committed.set_exception(StoreUnavailable(self.missing, retry_after_ms=MISSING_RETRY_MS))
            elif ticket.row.delivery in self.refused:
                ticket.committed.set_exception(StoreUnavailable("the store refuses this event"))
            else:
                ticket.committed.set_result(None)
        if error is not None and (self.accounts or self.outcomes or self.doubts):
            self._write_queue._again(self)
            return
        for outcome in self.outcomes:
            self._write_queue._pending.pop(outcome["b_delivery"], None)
        if self._write_queue.unwritten:
            self._write_queue.unwritten.difference_update(outcome["b_delivery"] for outcome in self.outcomes)

    def _append(self, connection: Connection) -> set[str]:
        if self._ran and not self._write_queue._database.is_sqlite:
            self._is_anew = self._insert_first(connection)
        for ticket in self.new:
            ticket.written = True
        refused = outbox.insert_rows(connection, [ticket.values() for ticket in self.new])
        self._join(connection)
        if self._write_queue._database.is_sqlite:
            fresh = [ticket for ticket in self.new if ticket.existing is None]
            leases.mark_dirty(connection, [(ticket.row.lane, ticket.row.account) for ticket in fresh if ticket.dirty])
        return refused

    def _insert_first(self, connection: Connection) -> bool:
        """Insert a row that an earlier run has inserted: whether that is not there, once that run is over.

        PostgreSQL may be committing it still, though the connection is lost: then this waits for it.
        """
        mine = (one for one in self.new if one.existing is None and one.row.delivery not in self.refused)
        first = next(mine, None)
        return first is None or outbox.insert_one(connection, first.values())

    def _join(self, connection: Connection) -> None:
        """Find the tickets whose key was used before: their rows were not inserted.

        Afterwards, since another replica may have been faster by less than this transaction.
        """
        keyed = [ticket for ticket in self.new if ticket.idem]
        if not keyed:
            return
        known = outbox.by_idem(connection, [ticket.idem for ticket in keyed if ticket.idem])
        for ticket in keyed:
            row = known.get(ticket.idem or "")
            ticket.existing = row if row is not None and row["delivery"] != ticket.row.delivery else None


_OUTCOME = ("state", "attempts", "history", "event_id", "error", "settled_at")


def _drain(source: deque[Any], target: list[Any]) -> None:
    while source:
        target.append(source.popleft())


def _settlement(ticket: Ticket, fence: Fence) -> dict[str, Any]:
    outcome = ticket.outcome
    assert outcome is not None
    return {
        "b_delivery": ticket.row.delivery,
        "b_lane": fence.lane,
        "b_owner": fence.owner,
        "b_fence": fence.number,
        "b_state": outcome.state,
        "b_attempts": ticket.attempts,
        "b_history": history_to_json(ticket.history),
        "b_event_id": outcome.event_id,
        "b_error": to_json(outcome.error) if outcome.error else None,
        "b_settled_at": ticket.settled_at,
    }
