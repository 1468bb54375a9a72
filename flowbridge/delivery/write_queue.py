"""The write queue: acceptances and outcomes on their way to the disk, one commit for all that come together."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from flowbridge.delivery import binding
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.delivery.replicas import Replicas
from flowbridge.limits.shares import Share
from flowbridge.models.timing import Timing
from flowbridge.store import accounts, leases, outbox
from flowbridge.store.database import Database
from flowbridge.store.errors import MISSING_RETRY_MS, ShareTaken, StoreFull, StoreUnavailable
from flowbridge.store.leases import Fence, Mark

PATIENT_SECONDS = 0.004  # that a commit waits for more, where no person waits: with 32 senders it halves its cost
WAIT_MS = 1_000  # until a caller with many requests in flight should come again


class WriteQueue:
    """`max_waiting`: acceptances that may wait for their commit; `share`: the fraction of these for one caller."""

    def __init__(
        self, database: Database, *, max_waiting: int = 10_000, share: float = 1.0, timing: Timing = Timing()
    ) -> None:
        self._database = database
        self._timing = timing
        self._max_waiting = max_waiting
        self._waiting = Share(max_waiting, share)
        self._new: deque[PendingDelivery] = deque()
        self._outcomes: deque[dict[str, Any]] = deque()
        self._doubts: deque[tuple[Fence, int | None]] = deque()
        self._accounts: deque[dict[str, Any]] = deque()
        self._planned = False
        self._hurrying = False
        # Outcomes that are not on the disk yet: delivery → transaction id, outcome.
        self._outcomes_by_delivery: dict[str, tuple[str, dict[str, Any]]] = {}
        self.unwritten: set[str] = set()  # deliveries whose outcome the store has refused so far
        self.replicas: Replicas | None = None  # the others, on PostgreSQL

    def append(self, pending: PendingDelivery, *, urgent: bool = True) -> None:
        """Write an acceptance. `pending.committed` tells when it is on the disk. Raises StoreFull.

        The events that follow it are written with it, in one commit, or not at all. `urgent`: a caller waits for the
        commit.
        """
        if len(self._new) >= self._max_waiting:
            raise StoreFull("too many callers wait for the store")
        caller = pending.caller
        if not self._waiting.takes(caller):
            waiting = self._waiting.of(caller)
            if not waiting:
                raise StoreFull("too many callers wait for the store")
            raise ShareTaken(
                f"{waiting} requests of this API key or account wait for the store already, which is its share",
                retry_after_ms=WAIT_MS,
            )
        self._waiting.add(caller, 1 + len(pending.following))
        self._new.append(pending)
        self._plan(lingers=not urgent or pending.is_patient)
        if urgent and pending.is_patient and not self._hurrying:
            self._hurrying = True
            asyncio.get_running_loop().call_later(PATIENT_SECONDS, self._hurry)

    def settle(self, pending: PendingDelivery, fence: Fence) -> None:
        """Write an outcome: with the row itself when that is not written yet, so that most sends cost one statement."""
        if pending.written:  # why the writer misses no outcome: see PendingDelivery
            holder = {"b_lane": fence.lane, "b_owner": fence.owner, "b_fence": fence.number}
            outcome = {**pending.settlement(), **holder}
            self._outcomes_by_delivery[pending.row.delivery] = pending.row.txn_id, outcome
            self._outcomes.append(outcome)
            self._plan(lingers=self.replicas is None or not self.replicas.is_awaited(pending.row.delivery))

    def amended(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the outbox with its outcome, if that is still on its way to the disk."""
        txn_id, outcome = self._outcomes_by_delivery.get(row["delivery"], ("", {}))
        # A replay has another transaction id, and its outcome is not known yet.
        if row["state"] != "queued" or row["txn_id"] != txn_id:
            return row
        return {**row, **{name: outcome[f"b_{name}"] for name in _OUTCOME}}

    def unsettled_lanes(self) -> set[str]:
        """The lanes of outcomes that are not on the disk yet."""
        return {outcome["b_lane"] for _, outcome in self._outcomes_by_delivery.values()}

    def doubt(self, fence: Fence, since: float | None) -> None:
        """Write since when (seconds) the head of a lane may have been sent; None: it is in no doubt any more."""
        self._doubts.append((fence, None if since is None else int(since * 1000)))
        self._plan()

    def remember(self, account: dict[str, Any]) -> None:
        """Write whose token it is, or that it was refused, before any later acceptance."""
        self._accounts.append(account)
        self._plan()

    def hurry(self) -> None:
        """Write at once what waits, including what was to be retried later."""
        self._plan(lingers=False)

    def _plan(self, *, lingers: bool = True) -> None:
        """To be called after an append to a queue: the writer may drain them at any moment."""
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

    def _hurry(self) -> None:
        self._hurrying = False
        self._database.hurry()

    def _take(self, batch: "_Batch") -> None:
        self._planned = False
        _drain(self._accounts, batch.accounts)
        while self._new:
            pending = self._new.popleft()
            batch.new.append(pending)
            if pending.following:
                batch.new.extend(pending.following)
        _drain(self._outcomes, batch.outcomes)
        _drain(self._doubts, batch.doubts)

    def _retry(self, batch: "_Batch") -> None:
        """Retry later. An outcome is never given up: the event would be sent once more."""
        self._accounts.extendleft(reversed(batch.accounts))
        self._outcomes.extendleft(reversed(batch.outcomes))
        self._doubts.extendleft(reversed(batch.doubts))
        self.unwritten.update(outcome["b_delivery"] for outcome in batch.outcomes)
        asyncio.get_running_loop().call_later(self._timing.rewrite_seconds, self._plan)


class _Batch:
    """What one piece of work writes; the same when it is repeated."""

    def __init__(self, write_queue: WriteQueue) -> None:
        self._write_queue = write_queue
        self._taken = False
        self.accounts: list[dict[str, Any]] = []
        self.new: list[PendingDelivery] = []
        self.outcomes: list[dict[str, Any]] = []
        self.doubts: list[tuple[Fence, int | None]] = []
        self.refused: set[str] = set()
        self.missing = ""  # why no acceptance is written
        self.marks: dict[str, Mark] = {}  # lanes of acceptances, as other replicas know them
        self._ran = False  # to its end
        self._binds = True
        self._found_nothing = False

    def write(self, connection: Connection) -> None:
        self._take()
        self._found_nothing = False
        if not self._write_queue._database.is_sqlite:
            self._lock(connection)
        for account in sorted(self.accounts, key=lambda account: str(account["account"])):
            accounts.write(connection, account)
        self.missing = self._write_queue._database.missing
        if not self.missing:  # else outcomes alone: they hold as long as this process has the file
            self.refused = self._append(connection)
        settled = outbox.settle(connection, self.outcomes)
        for fence, since in self.doubts:
            leases.doubt(connection, fence, since)
        if (replicas := self._write_queue.replicas) is not None:
            replicas.tell_new(connection, self.marks, [one for one in self.new if one.row.delivery not in self.refused])
            replicas.tell_ended(connection, settled, self.outcomes)
        self._ran = True

    def found_nothing(self) -> bool:
        """Whether no row of an earlier run is in the store, nor will be: they come together or not at all."""
        return self._found_nothing

    def undo(self, connection: Connection, missing: str) -> None:
        """The file that took the acceptances was removed, and ends with this process: take them back."""
        self.missing = missing
        outbox.remove_queued(connection, [pending.row.delivery for pending in self.new if pending.existing is None])

    def _take(self) -> None:
        if not self._taken:
            self._taken = True
            self._write_queue._take(self)

    def _lock(self, connection: Connection) -> None:
        """Lock every lane that this writes to, before any row of an event.

        Of two replicas that insert the same key, one waits for the other's row, and must not hold a lane meanwhile that
        the other one wants. So new lanes are made and marked here, in vain if the row proves to be there already.
        """
        pairs = {(pending.row.lane, pending.row.account) for pending in self.new if pending.dirty}
        marked = {lane for lane, _ in pairs}
        held = {fence.lane for fence, _ in self.doubts} - marked
        pairs.update((lane, lane.partition("|")[0]) for lane in held)
        if (replicas := self._write_queue.replicas) is None:
            leases.mark_dirty(connection, pairs, exclude=held)
        else:
            self.marks = leases.mark_new(connection, pairs, replicas.owner, exclude=held)

    def done(self, future: "asyncio.Future[None]") -> None:
        self._take()  # if the store was not reached, the work was never called
        error = None if future.cancelled() else future.exception()
        for pending in self.new:
            self._write_queue._waiting.remove(pending.caller)
            if error is None and self.missing:
                pending.end_write(StoreUnavailable(self.missing, retry_after_ms=MISSING_RETRY_MS))
            elif error is None and pending.row.delivery in self.refused:
                pending.end_write(StoreUnavailable("the store refuses this event"))
            else:
                if (mark := self.marks.get(pending.row.lane)) is not None:
                    pending.place(mark)
                pending.end_write(error)
        if error is not None and (self.accounts or self.outcomes or self.doubts):
            self._write_queue._retry(self)
            return
        if self._write_queue.replicas is not None:
            self._write_queue.replicas.forget(self.outcomes)
        for outcome in self.outcomes:
            self._write_queue._outcomes_by_delivery.pop(outcome["b_delivery"], None)
        if self._write_queue.unwritten:
            self._write_queue.unwritten.difference_update(outcome["b_delivery"] for outcome in self.outcomes)

    def _append(self, connection: Connection) -> set[str]:
        if self._ran and not self._write_queue._database.is_sqlite:
            self._found_nothing = self._insert_first(connection)
        contents = self._write_queue._database.contents
        refused = outbox.insert_rows(connection, [pending.begin_write(contents) for pending in self.new])
        self._join(connection)
        for pending in self.new:
            if pending.following or pending.before is not None:
                refused |= self._together(connection, pending, refused)
        if self._write_queue._database.is_sqlite:
            fresh = [pending for pending in self.new if pending.existing is None]
            leases.mark_dirty(
                connection, [(pending.row.lane, pending.row.account) for pending in fresh if pending.dirty]
            )
            leases.reclaim(connection, [pending.reclaim for pending in self.new if pending.reclaim is not None])
            if self._binds:
                self._bind(connection, [pending for pending in fresh if pending.row.delivery not in refused])
        return refused

    def _bind(self, connection: Connection, fresh: Sequence[PendingDelivery]) -> None:
        """Bind what may be bound early. When that fails, the next run does without: acceptances do not depend on it."""
        early = [pending for pending in fresh if pending.binds_early]
        if early:
            self._binds = False
            rows = [pending.row for pending in early]
            found = binding.resolve_inserted(connection, rows, self._write_queue.amended)
            for pending in early:
                pending.set_resolved(found.get(pending.row.delivery))
            self._binds = True

    def _together(self, connection: Connection, first: PendingDelivery, refused: set[str]) -> set[str]:
        """A message is accepted as a whole: take its other events back when its key, or an event, was not accepted.

        Returns the events that are refused with another one.
        """
        deliveries = {pending.row.delivery for pending in (first, *first.following)}
        if first.existing is not None:
            for pending in first.following:
                pending.set_existing(first.existing)
        elif refused.isdisjoint(deliveries):
            return set()
        outbox.remove_queued(connection, list(deliveries))
        return set() if first.existing is not None else deliveries

    def _insert_first(self, connection: Connection) -> bool:
        """Insert a row that an earlier run inserted; whether that run left none.

        PostgreSQL may still be committing it although the connection was lost: then this waits for it.
        """
        mine = (one for one in self.new if one.existing is None and one.row.delivery not in self.refused)
        first = next(mine, None)
        return first is None or outbox.insert_one(connection, first.values(self._write_queue._database.contents))

    def _join(self, connection: Connection) -> None:
        """Find the deliveries whose key was used before: their rows were not inserted, or are to be taken back.

        After the insertion, since another replica may have inserted the key during this transaction.
        """
        keyed = [pending for pending in self.new if pending.idem]
        if not keyed:
            return
        taken = outbox.taken(connection, [key for pending in keyed for key in pending.idems])
        earlier = {pending.row.delivery: pending.earlier(taken) for pending in keyed}
        known = (
            outbox.by_delivery(connection, [name for name in earlier.values() if name]) if any(earlier.values()) else {}
        )
        for pending in keyed:
            pending.set_existing(known.get(earlier[pending.row.delivery]))


_OUTCOME = ("state", "attempts", "history", "event_id", "error", "settled_at")


def _drain(source: deque[Any], target: list[Any]) -> None:
    while source:
        target.append(source.popleft())
