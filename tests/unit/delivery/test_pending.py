"""flowbridge.delivery.pending: the states of a delivery, whatever happens to it and in whichever order."""

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge.delivery import pending as module
from flowbridge.delivery.pending import Outcome, PendingDeliveries, PendingDelivery
from flowbridge.store import Row, outbox
from flowbridge.store.errors import StoreUnavailable

ROW = Row("delivery", "account|!room:hs", "account", "!room:hs", "m.room.message", None, b"{}", "txn", 1)
SENT = Outcome("sent", "$1")
DEAD = Outcome("dead", error={"status": 403, "errcode": "M_FORBIDDEN"})


# the two threads


class Threads:
    """Runs two pieces of work, each in a thread, so many lines of `pending.py` of the one, then of the other."""

    def __init__(self, schedule: list[int]) -> None:
        self._schedule = iter([bool(turn % 2) for turn, lines in enumerate(schedule) for _ in range(lines)])
        self._turn: bool | None = next(self._schedule, None)
        self._over: set[bool] = set()
        self._changed = threading.Condition()

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        threads = [
            threading.Thread(target=self._traced, args=(name, work)) for name, work in ((False, first), (True, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()

    def _traced(self, name: bool, work: Callable[[], None]) -> None:
        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename != module.__file__:
                return None
            if event == "line":
                self._wait(name)
            return trace

        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
            with self._changed:
                self._over.add(name)
                self._changed.notify_all()

    def _wait(self, name: bool) -> None:
        """Until it is this thread's turn; the other one has none any more when it is over, or the schedule is."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn in (None, name) or (not name) in self._over, 10)
            if self._turn == name:
                self._turn = next(self._schedule, None)
                self._changed.notify_all()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 4) | st.just(40), max_size=6))
def test_outcome_reaches_the_disk_however_the_threads_interleave(schedule: list[int]) -> None:
    """With the row, or by a statement of its own: the loop and the writer wait for no lock of each other."""
    pending = asyncio.run(_new())
    pending.record({"status": 200})
    pending.count_attempt()
    rows: list[dict[str, Any]] = []
    statements: list[dict[str, Any]] = []

    def write() -> None:
        rows.append(pending.begin_write())

    def settle() -> None:
        pending.settle(SENT, 7)
        if pending.written:
            statements.append(pending.settlement())

    Threads(schedule).run(write, settle)
    (row,) = rows
    assert row["state"] == "sent" or statements
    if row["state"] == "sent":  # then all that belongs to it
        found = [row[name] for name in ("event_id", "settled_at", "attempts", "history")]
        assert found == ["$1", 7, 1, '[{"status": 200}]']
    for statement in statements:
        assert statement == {
            "b_delivery": "delivery",
            "b_state": "sent",
            "b_attempts": 1,
            "b_history": '[{"status": 200}]',
            "b_event_id": "$1",
            "b_error": None,
            "b_settled_at": 7,
        }


async def _new(**how: Any) -> PendingDelivery:
    return PendingDelivery(ROW, **how)


# the states


class Model:
    """What is to be seen of a delivery after some transitions."""

    def __init__(self) -> None:
        self.pending = PendingDelivery(ROW)
        self.pending.add_waiter()
        self.known = PendingDeliveries()
        self.known.add(self.pending)
        self.waiters, self.held, self.counted, self.maybe_sent, self.attempts = 1, False, False, False, 0
        self.committed: BaseException | bool = False
        self.outcome: Outcome | None = None
        self.answered: Any = None  # what the waiters have heard, in a tuple
        self.withdrawn = False

    async def apply(self, step: str) -> None:
        getattr(self, f"_{step}")()
        await asyncio.sleep(0)  # callbacks have their turn
        await asyncio.sleep(0)
        self._check()

    def _check(self) -> None:
        pending = self.pending
        assert (pending.waiters, pending.held, pending.maybe_sent) == (self.waiters, self.held, self.maybe_sent)
        assert (pending.outcome, pending.withdrawn, pending.attempts) == (self.outcome, self.withdrawn, self.attempts)
        assert pending.committed.done() == bool(self.committed)
        assert pending.settled.done() == (self.answered is not None)
        assert pending.is_awaited == (self.waiters > 0 and self.answered is None)
        # A delivery that is over is forgotten at once, and one that nothing here needs when it is left.
        assert (self.known.get("delivery") is pending) == (self.answered is None and not self._is_left)
        assert self.known.awaited() == self.known.awaited(ROW.lane)
        assert self.known.awaited() == ([pending] if pending.is_awaited and not self._is_left else [])
        values = pending.values()
        assert values["state"] == (self.outcome.state if self.outcome else "queued")
        assert (values["settled_at"] is None) == (self.outcome is None)

    _is_left = False

    def _commit(self) -> None:
        self.pending.begin_write()
        self.pending.end_write(None)
        self.committed = self.committed or True

    def _fail(self) -> None:
        error = StoreUnavailable("no")
        self.pending.end_write(error)
        self.committed = self.committed or error

    def _wait(self) -> None:
        self.pending.add_waiter()
        self.waiters += 1

    def _unwait(self) -> None:
        if self.waiters:
            self.pending.remove_waiter()
            self.waiters -= 1

    def _hold(self) -> None:
        self.pending.hold()
        self.held = True

    def _release(self) -> None:
        self.pending.release()
        self.held = False

    def _leave(self) -> None:
        self.known.leave(self.pending)
        self._is_left = self._is_left or (not self.held and not self.waiters)

    def _begin(self) -> None:
        self.pending.begin()
        self.maybe_sent = True

    def _attempt(self) -> None:
        self.pending.record({"at": self.attempts})
        self.pending.count_attempt()
        self.attempts += 1

    def _count(self) -> None:
        assert self.pending.count() == self.counted
        self.counted = True

    def _uncount(self) -> None:
        assert self.pending.uncount() == self.counted
        self.counted = False

    def _settle(self) -> None:
        outcome = self.outcome or SENT
        self.pending.settle(outcome, 7)
        self.pending.answer(outcome)
        self.outcome = outcome
        self.answered = self.answered or (outcome,)

    def _answer(self) -> None:
        self.pending.answer(DEAD)
        self.answered = self.answered or (DEAD,)

    def _send_away(self) -> None:
        self.known.release_waiters()
        if self.waiters and not self._is_left:
            self.answered = self.answered or (None,)

    def _withdraw(self) -> None:
        self.pending.withdraw()
        self.withdrawn = True

    def _restore(self) -> None:
        self.pending.restore()
        self.withdrawn = False

    def _refuse(self) -> None:
        error = StoreUnavailable("no")
        self.pending.refuse(error)
        self.answered = self.answered or (error,)

    def _yield_to_the_first(self) -> None:
        self.pending.refuse(None)
        self.answered = self.answered or (asyncio.CancelledError,)

    def heard(self) -> tuple[Any, ...] | None:
        """What the waiters have heard."""
        settled = self.pending.settled
        if not settled.done():
            return None
        if settled.cancelled():
            return (asyncio.CancelledError,)
        return (settled.exception() or settled.result(),)


def _steps() -> Iterator[str]:
    plumbing = {"apply", "check", "is_left"}
    return (name[1:] for name in vars(Model) if name.startswith("_") and name[1:] not in plumbing and name[1] != "_")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(_steps())), max_size=25))
def test_states_are_those_of_the_model_after_any_transitions(steps: list[str]) -> None:
    async def play() -> None:
        model = Model()
        for step in steps:
            await model.apply(step)
            assert model.heard() == model.answered, "waiters are told once, and the first answer stays"

    asyncio.run(play())


# what is read from the store


def test_row_of_the_store_is_counted_written_and_known_to_have_been_tried() -> None:
    async def read() -> None:
        pending = PendingDelivery.stored(ROW._replace(attempts=2, history='[{"at": 1}, {"at": 2}]'))
        assert (pending.attempts, pending.maybe_sent, pending.written) == (2, True, True)
        assert pending.history == [{"at": 1}, {"at": 2}]
        assert pending.uncount()

    asyncio.run(read())


@pytest.mark.parametrize("txn_id", ["txn", "new"])
def test_replay_begins_anew_and_its_waiters_stay(txn_id: str) -> None:
    async def replay() -> None:
        known = PendingDeliveries()
        pending = known.add(PendingDelivery(ROW))
        pending.add_waiter()
        pending.settle(SENT, 7)
        pending.withdraw()
        found = known.of(ROW._replace(txn_id=txn_id, attempts=1, history='[{"at": 1}]'))
        assert found is pending
        assert (found.row.txn_id, found.waiters, found.attempts) == (txn_id, 1, 1)
        assert (found.outcome, found.withdrawn) == ((None, False) if txn_id == "new" else (SENT, True))

    asyncio.run(replay())


def test_history_keeps_the_last_attempts_and_every_replay() -> None:
    async def record() -> None:
        pending = PendingDelivery(ROW)
        pending.record({"replayed": "by me"})
        for number in range(100):
            pending.record({"at": number})
        assert pending.history[0] == {"replayed": "by me"}
        assert pending.history[1:] == [{"at": number} for number in range(100 - outbox.HISTORY, 100)]
        assert json.loads(pending.values()["history"]) == pending.history

    asyncio.run(record())
