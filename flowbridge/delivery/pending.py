"""Deliveries in flight: each accepted event on its way through this process, and the registry of them all."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, Literal

from flowbridge.delivery.binding import Resolved
from flowbridge.limits.tasks import ignore_result
from flowbridge.store import Row, outbox
from flowbridge.store.contents import BLANK, LOCKED, Contents
from flowbridge.store.json_columns import from_json, history_to_json, to_json
from flowbridge.store.leases import Mark, Reclaim
from flowbridge.store.outbox import ROW_BYTES, Fate, Taken

Keeps = Literal["all", "plain", "none"]  # contents of what was sent: of all rooms, of plain ones, of none


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery ended. `error` is the Matrix error of a dead one: {"status", "errcode", "error", …}."""

    state: Literal["sent", "dead"]
    event_id: str | None = None
    error: dict[str, Any] | None = None


def _read_only(slot: str) -> Any:
    """A property of which Python runs no function: a send reads about sixty of them."""
    return property(attrgetter(slot))


@dataclass(frozen=True, slots=True)
class KeyBefore:
    """A key that counts beside an event's own, if it was used no longer ago than `since` (ms)."""

    key: str
    since: int


@dataclass(eq=False, slots=True)
class PendingDelivery:
    """An accepted event until it is settled. `committed` and `settled` are what callers await.

    `committed`: its row is on the disk. `settled`: how it ended; None when this process ends before the delivery does.
    `token`: the caller's own, which sends it rather than another one of the account. `request`: the body as it came,
    where it was not the content. `key`: its Idempotency-Key or txnId, of which `idem` is a hash. `before`: another such
    hash.

    Two threads touch it. The event loop owns it, and makes every transition but three: `begin_write`, `set_existing`
    and `set_resolved` are the writer thread's. What the latter write is read only after `committed` is done, which the
    writer's future orders. The outcome is the one value that both need at the same moment, and neither
    waits for a lock: the writer sets `written` and then reads the outcome, the loop sets the outcome and then reads
    `written`. Whichever is second sees what the other has set, so the outcome reaches the disk with the row, or by a
    statement of its own, or by both, which does no harm. `settle` sets the outcome last: what belongs to it is complete
    by then. The history is replaced, and never changed; the row is replaced when it was read from the store, where the
    writer is done with it.
    """

    _row: Row
    token: str = ""
    request: str | None = None
    idem: str | None = None
    fingerprint: str | None = None
    key: str | None = None
    before: KeyBefore | None = None
    is_patient: bool = False  # its caller does not mind some milliseconds
    following: "tuple[PendingDelivery, ...]" = ()  # the other events of its message: written with it, or not at all
    # Whose share of the store it takes: the API key's, or that of the account which sent it with its own token. Many
    # keys share the bot's account: one of them must not take what the others need.
    caller: str = field(init=False)
    size: int = field(init=False)  # its bytes in the store, about
    committed: "asyncio.Future[None]" = field(init=False)
    settled: "asyncio.Future[Outcome | None]" = field(init=False)
    _waiters: int = field(default=0, init=False)
    _dirty: bool = field(default=False, init=False)
    _reclaim: Reclaim | None = field(default=None, init=False)
    _written: bool = field(default=False, init=False)
    _existing: dict[str, Any] | None = field(default=None, init=False)
    _mark: Mark | None = field(default=None, init=False)
    _counted: bool = field(default=False, init=False)
    _held: bool = field(default=False, init=False)
    _maybe_sent: bool = field(default=False, init=False)
    _withdrawn: bool = field(default=False, init=False)
    _attempts: int = field(default=0, init=False)
    _history: list[dict[str, Any]] = field(default_factory=list, init=False)
    _outcome: Outcome | None = field(default=None, init=False)
    _binds_early: bool = field(default=False, init=False)
    _resolved: Resolved | None = field(default=None, init=False)
    _settled_at: int = field(default=0, init=False)
    _encrypted: bool = field(default=False, init=False)
    _fate: Fate | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        request = self.request or ""
        self.caller = self._row.api_key or self._row.account
        self.size = ROW_BYTES + len(self._row.content) + (len(request) if request.isascii() else len(request.encode()))
        self.committed = loop.create_future()
        self.settled = loop.create_future()

    @classmethod
    def stored(cls, row: Row) -> "PendingDelivery":
        """The delivery of a queued row that was read from the store."""
        pending = cls(row)
        pending._counted = pending._written = True
        pending.committed.set_result(None)
        pending.renew(row)
        return pending

    # What the other modules read.
    row: ClassVar[Row] = _read_only("_row")
    waiters: ClassVar[int] = _read_only("_waiters")  # how many callers want to know the outcome
    dirty: ClassVar[bool] = _read_only("_dirty")  # its row marks the lane for whichever process holds it
    reclaim: ClassVar[Reclaim | None] = _read_only("_reclaim")  # of its lane; it is written with its row
    written: ClassVar[bool] = _read_only("_written")
    existing: ClassVar[dict[str, Any] | None] = _read_only("_existing")  # the row accepted under the same key before
    mark: ClassVar[Mark | None] = _read_only("_mark")  # its lane when it was committed, on PostgreSQL
    held: ClassVar[bool] = _read_only("_held")  # it is in the queue of a lane of this process
    maybe_sent: ClassVar[bool] = _read_only("_maybe_sent")  # the homeserver may have it
    withdrawn: ClassVar[bool] = _read_only("_withdrawn")
    attempts: ClassVar[int] = _read_only("_attempts")
    history: ClassVar[list[dict[str, Any]]] = _read_only("_history")
    outcome: ClassVar[Outcome | None] = _read_only("_outcome")
    binds_early: ClassVar[bool] = _read_only("_binds_early")  # it may be bound by the transaction that inserts it
    resolved: ClassVar[Resolved | None] = _read_only("_resolved")  # what came of that
    encrypted: ClassVar[bool] = _read_only("_encrypted")  # it goes out as an m.room.encrypted

    @property
    def is_stored(self) -> bool:
        """Whether its row is on the disk, and its own."""
        done = self.committed.done() and not self.committed.cancelled()
        return done and self.committed.exception() is None and self._existing is None

    @property
    def is_awaited(self) -> bool:
        """Whether a caller waits for an outcome that is not known yet."""
        return self._waiters > 0 and not self.settled.done()

    def values(self, contents: Contents = LOCKED) -> dict[str, Any]:
        """The row as it is inserted; with its outcome when it has one by then."""
        row, outcome = self._row, self._outcome
        content, request = row.content.decode(), self.request
        if outcome is not None and self._fate == "blank":
            content, request = BLANK, None
        elif row.is_sealed or (outcome is not None and self._fate == "seal"):
            content = contents.seal(content, row.delivery)
            request = None if request is None else contents.seal(request, row.delivery)
        return {
            "delivery": row.delivery,
            "lane": row.lane,
            "account": row.account,
            "room_id": row.room_id,
            "event_type": row.event_type,
            "state_key": row.state_key,
            "content": content,
            "request": request,
            "txn_id": row.txn_id,
            "idem": self.idem,
            "fingerprint": self.fingerprint,
            "state": outcome.state if outcome else "queued",
            "attempts": self._attempts,
            "history": history_to_json(self._history),
            "event_id": outcome.event_id if outcome else None,
            "error": to_json(outcome.error) if outcome and outcome.error else None,
            "api_key": row.api_key,
            "accepted_at": row.accepted_at,
            "settled_at": self._settled_at if outcome else None,
            "caller_key": self.key,
            "binding": row.binding,
        }

    def settlement(self) -> dict[str, Any]:
        """The outcome as a statement of its own writes it."""
        outcome = self._outcome
        assert outcome is not None
        found = {
            "b_delivery": self._row.delivery,
            "b_state": outcome.state,
            "b_attempts": self._attempts,
            "b_history": history_to_json(self._history),
            "b_event_id": outcome.event_id,
            "b_error": to_json(outcome.error) if outcome.error else None,
            "b_settled_at": self._settled_at,
        }
        return found if self._fate is None else {**found, "b_fate": self._fate}

    @property
    def idems(self) -> list[str]:
        """Under which it may have been accepted before."""
        return [key for key in (self.idem, self.before.key if self.before else None) if key is not None]

    def earlier(self, taken: Mapping[str, Taken]) -> str:
        """The other delivery that was accepted under one of its keys; "" where there is none."""
        own, before = taken.get(self.idem or ""), self.before
        if own is not None and own.delivery != self._row.delivery:
            return own.delivery
        other = taken.get(before.key) if before is not None else None
        return other.delivery if other is not None and before is not None and other.accepted_at >= before.since else ""

    # accepted, and committed

    def mark_dirty(self) -> None:
        """Its lane is not held here: say so with the row."""
        self._dirty = True

    def bind_early(self) -> None:
        """It may be bound by the transaction that inserts it."""
        self._binds_early = True

    def claim_lane(self, reclaim: Reclaim) -> None:
        """Its lane was reopened, which the store is yet to learn: say so with the row."""
        self._reclaim = reclaim

    def begin_write(self, contents: Contents = LOCKED) -> dict[str, Any]:
        """The writer thread inserts this row, perhaps once more, after a transaction that was taken back."""
        self._resolved = None
        self._written = True  # before the outcome is read
        return self.values(contents)

    def set_existing(self, row: dict[str, Any] | None) -> None:
        """The writer thread has found the row that was accepted under the same key before, or none."""
        self._existing = row

    def set_resolved(self, resolved: Resolved | None) -> None:
        """The writer thread has bound it with the insertion, or not."""
        self._resolved = resolved

    def end_write(self, error: BaseException | None) -> None:
        """The row is on the disk, or `error` says why not."""
        if self.committed.done():
            return
        if error is None:
            self.committed.set_result(None)
        else:
            self.committed.set_exception(error)
            ignore_result(self.committed)  # not every caller awaits the commit

    def place(self, mark: Mark) -> None:
        """Whose its lane was when the row came to the disk. To be followed by `end_write`."""
        self._mark = mark

    def count(self) -> bool:
        """It is among what is queued from now on; whether it was before."""
        before, self._counted = self._counted, True
        return before

    def uncount(self) -> bool:
        """It is not among what is queued any more; whether it was before."""
        before, self._counted = self._counted, False
        return before

    def add_waiter(self) -> None:
        self._waiters += 1

    def remove_waiter(self) -> None:
        self._waiters -= 1

    def bind(self, content: bytes, history: list[dict[str, Any]], binding: str | None = None) -> None:
        """Its content has its relations from now on, in the store, too. `binding`: what is kept for replays."""
        self._row = self._row._replace(content=content, binding=binding)
        self._history = history
        self._resolved = None

    # begun

    def hold(self) -> None:
        """It is in the queue of a lane."""
        self._held = True

    def release(self) -> None:
        """The lane has let go of it."""
        self._held = False

    def begin(self) -> None:
        """A request went out whose result is not known."""
        self._maybe_sent = True

    def record(self, attempt: dict[str, Any]) -> None:
        """Add an attempt to the history: the last ones stay, and all replays, which are the audit."""
        history = [*self._history, attempt]
        first = len(history) - outbox.HISTORY
        self._history = [entry for index, entry in enumerate(history) if index >= first or _stays(entry)]

    def count_attempt(self) -> None:
        """The last attempt was one at this event: it did not fail for its account, or a pause."""
        self._attempts += 1

    def renew(self, row: Row) -> None:
        """Take over the state of its row: another process may have carried it, and it may have been replayed since.

        Under the transaction id of then nothing would be sent. Its waiters stay: it is the same delivery.
        """
        if row.txn_id != self._row.txn_id:
            self._outcome, self._withdrawn = None, False
        self._row, self._resolved = row, None
        self._attempts, self._maybe_sent, self._history = row.attempts, row.attempts > 0, from_json(row.history)

    def encrypt(self) -> None:
        """The room is encrypted, and it goes there as an m.room.encrypted."""
        self._encrypted = True

    # settled, or withdrawn

    def settle(self, outcome: Outcome, at: int, keeps: Keeps = "all") -> None:
        """It has ended (ms). To be followed by `answer`, once the outcome is on its way to the disk.

        `keeps`: the contents that the log keeps.
        """
        self._settled_at = at
        self._fate = self._fate_of(outcome.state, keeps)
        self._outcome = outcome  # last: the writer thread may read it at once

    def _fate_of(self, state: str, keeps: Keeps) -> Fate | None:
        """What becomes of its content: what went out encrypted never stays in clear."""
        is_hidden = self._encrypted or (self._row.is_sealed and not self._attempts)  # it was never tried: who knows
        if state == "sent" and (keeps == "none" or (keeps == "plain" and is_hidden)):
            return "blank"
        return "seal" if self._encrypted and not self._row.is_sealed else None

    def answer(self, outcome: Outcome | None) -> None:
        """Tell its waiters; None: this process will not know how it ends."""
        if not self.settled.done():
            self.settled.set_result(outcome)

    def withdraw(self) -> None:
        """It is not to be sent: the lane passes over it."""
        self._withdrawn = True

    def restore(self) -> None:
        """It could not be withdrawn: it is queued still."""
        self._withdrawn = False

    def refuse(self, error: BaseException | None) -> None:
        """It was not accepted after all; None: its waiters wait with the delivery that has the same key."""
        if self.settled.done():
            return
        if error is None:
            self.settled.cancel()
        else:
            self.settled.set_exception(error)
            self.settled.exception()  # retrieved: perhaps no caller waits


def _stays(entry: dict[str, Any]) -> bool:
    return "replayed" in entry or "note" in entry


class PendingDeliveries:
    """One PendingDelivery for each delivery, so that its waiters hear of what a lane does. For one event loop."""

    def __init__(self) -> None:
        self._by_delivery: dict[str, PendingDelivery] = {}
        self._by_lane: dict[str, dict[str, PendingDelivery]] = {}  # the same: all waiters of a lane are told at once

    def __len__(self) -> int:
        return len(self._by_delivery)

    def get(self, delivery: str) -> PendingDelivery | None:
        return self._by_delivery.get(delivery)

    def add(self, pending: PendingDelivery) -> PendingDelivery:
        row = pending.row
        self._by_delivery[row.delivery] = pending
        lane = self._by_lane.get(row.lane)
        if lane is None:
            self._by_lane[row.lane] = {row.delivery: pending}
        else:
            lane[row.delivery] = pending
        pending.settled.add_done_callback(lambda _: self._forget(pending))
        return pending

    def of(self, row: Row) -> PendingDelivery:
        """The delivery of an event that is in the store."""
        known = self._by_delivery.get(row.delivery)
        if known is not None:
            is_same = row.txn_id == known.row.txn_id and row.binding == known.row.binding
            if known.held or (is_same and row.attempts <= known.attempts):
                return known
            self._forget(known)
            if not known.settled.done():
                known.renew(row)
                return self.add(known)
        return self.add(PendingDelivery.stored(row))

    def leave(self, pending: PendingDelivery) -> None:
        """Forget a delivery that neither a lane holds nor a caller waits with: the store has it."""
        if not pending.held and not pending.waiters:
            self._forget(pending)

    def _forget(self, pending: PendingDelivery) -> None:
        row = pending.row
        if self._by_delivery.get(row.delivery) is pending:
            del self._by_delivery[row.delivery]
            lane = self._by_lane[row.lane]
            del lane[row.delivery]
            if not lane:
                del self._by_lane[row.lane]

    def held_elsewhere(self) -> list[str]:
        """The ids of deliveries with waiters that no lane of this process holds."""
        return [delivery for delivery, pending in self._by_delivery.items() if pending.waiters and not pending.held]

    def awaited(self, lane: str | None = None) -> list[PendingDelivery]:
        """The deliveries that callers wait for, of one lane or of all, in the order in which they came."""
        known: Iterable[PendingDelivery] = (
            self._by_delivery.values() if lane is None else self._by_lane.get(lane, {}).values()
        )
        return [pending for pending in known if pending.is_awaited]

    def release_waiters(self) -> None:
        """Send all callers who wait away, without an outcome."""
        for pending in self.awaited():
            pending.answer(None)
