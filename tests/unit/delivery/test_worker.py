"""flowbridge.delivery.worker: order, room for everybody, what callers hear, and what a start finds after an end."""

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from flowbridge.delivery import attempt, lane
from flowbridge.delivery import worker as courier
from flowbridge.delivery.backpressure import Limits
from flowbridge.delivery.write_queue import Outcome
from flowbridge.models.timing import Timing
from flowbridge.store import StoreFull, StoreUnavailable, abandoned, delivery_log, leases, outbox, tables
from flowbridge.store.leases import ASKED
from tests.patience import PATIENCE
from tests.unit.delivery.test_lane import sent_but_not_written, tell
from tests.worker import (
    ALICE,
    BOB,
    ROOM,
    Behaviour,
    MakeWorker,
    Rooms,
    Worker,
    after,
    cut,
    error,
    lose,
    refuse_connection,
    silence,
    slow,
    soon,
    unreachable,
    until,
)

OTHER = "!other:hs"
HOUR = 3_600_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(lane, "MAX_PAUSE", 0.01)
    monkeypatch.setattr(courier, "POLL_SECONDS", 0.02)


def numbers(until_: int) -> list[str]:
    return [str(number) for number in range(until_)]


# order


async def test_events_go_in_the_order_of_acceptance_whether_by_the_store_or_not(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        for number in numbers(300):
            worker.offer(number, waits=False, key=number if number.endswith("7") else None)
            if number.endswith("00"):
                await until(lambda: len(rooms.sends) > 20)
        await worker.settled()
    assert rooms.bodies() == numbers(300)


async def claimed_unnoticed(worker: Worker, fence: int) -> None:
    """Until the store says that the lane is ours, and not a moment longer: the courier has not heard of it yet."""
    for _ in range(100):
        await asyncio.sleep(0)
        if is_claimed(worker, fence):
            return
    raise AssertionError("nobody claims it")


def is_claimed(worker: Worker, fence: int) -> bool:
    """Whether that happens within a moment in which the event loop is busy with something else."""
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        if (found := worker.lane()) is not None and found.fence == fence:
            return True
        time.sleep(0.001)
    return False


async def test_event_that_comes_while_its_lane_is_claimed_is_not_overtaken(make: MakeWorker, rooms: Rooms) -> None:
    """What the claim has read is older, and what comes after it may go straight into the lane."""
    async with make() as worker:
        await worker.database.run(lambda connection: None)
        worker.offer("1", waits=False)
        await claimed_unnoticed(worker, 1)
        assert sum(worker.courier.lanes().values()) == 0
        worker.offer("2")
        await until(lambda: sum(worker.courier.lanes().values()))
        worker.offer("3")
        await until(lambda: rooms.bodies() == ["1", "2", "3"])


async def test_event_put_into_a_lane_that_is_claimed_anew_is_not_forgotten(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """The store goes by the clock on the wall, and a step of that ends a lease that the process believes in."""
    async with make() as worker:
        await worker.send("1")
        await worker.settled()
        tell(path, "UPDATE lanes SET lease_until = 1")
        await claimed_unnoticed(worker, 2)
        rooms.then(silence)
        worker.offer("2", waits=False)
        await until(lambda: rooms.bodies() == ["1", "2"])


async def test_long_lane_is_sent_to_its_end_beside_others(make: MakeWorker, rooms: Rooms) -> None:
    """With other lanes at work a claim reads less than a lane may hold: that is not all there is."""
    async with make() as worker:
        await worker.send("x", OTHER)
        for number in numbers(120):
            worker.offer(number, waits=False)
        await until(lambda: len(rooms.bodies()) >= 49)
        worker.offer("120", waits=False)
        await until(lambda: rooms.bodies() == numbers(121))


async def test_order_is_kept_over_crashes_and_stops(make: MakeWorker, rooms: Rooms) -> None:
    for turn, end in enumerate((Worker.crash, Worker.stop, Worker.crash, Worker.crash, Worker.stop)):
        async with make() as worker:
            for number in range(70):
                worker.offer(str(70 * turn + number), waits=False)
            await rooms.reads(70 * turn + 1)
            await end(worker)
    async with make() as worker:
        await worker.settled(350)
    assert rooms.bodies() == numbers(350)


async def test_replay_is_not_overtaken_by_what_is_sent_after_its_answer(make: MakeWorker, rooms: Rooms) -> None:
    """It lies in the store, and what comes may go straight into the lane."""
    async with make() as worker:
        ticket = await worker.accept("first")
        await worker.settled()
        await worker.send("x")
        await replay(worker, ticket.row.delivery)
        await worker.send("after the replay")
        assert rooms.bodies() == ["first", "x", "first", "after the replay"]


async def test_replay_into_a_lane_that_is_being_claimed_is_not_overtaken(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        ticket = await worker.accept("first")
        await worker.settled()
    async with make() as worker:
        await worker.database.run(lambda connection: None)
        worker.offer("x", waits=False)
        await claimed_unnoticed(worker, 2)
        with worker.database.engine.begin() as connection:
            delivery_log.replay(connection, ticket.row.delivery, "new", "me")
        worker.courier.wake(ticket.row.lane)
        await until(lambda: held(worker))
        worker.offer("after the replay", waits=False)
        await rooms.reads(4)
        assert rooms.bodies() == ["first", "x", "first", "after the replay"]


async def replay(worker: Worker, delivery: str) -> None:
    """As the delivery log does, up to its answer."""
    again = await worker.database.run(lambda connection: delivery_log.replay(connection, delivery, "new", "me"))
    assert again is not None
    worker.courier.wake(again["lane"])


# memory


async def blocked(worker: Worker, number: int, room: str = ROOM) -> None:
    """Fill a room whose first event does not get through."""
    template = worker.ticket("", room)
    rows = []
    for count in range(number):
        name = f"blocked-{count}"
        content = json.dumps({"msgtype": "m.text", "body": name})
        rows.append({**template.values(), "delivery": name, "txn_id": name, "content": content})
    await worker.database.run(lambda connection: outbox.insert_rows(connection, rows))
    pair = (template.row.lane, template.row.account)
    await worker.database.run(lambda connection: leases.mark_dirty(connection, [pair]))
    worker.courier.wake()


@contextlib.contextmanager
def statements(worker: Worker, about: str) -> Iterator[list[str]]:
    """What is asked of the database meanwhile about something."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if about in str(parameters):
            seen.append(statement)

    event.listen(worker.database.engine, "before_cursor_execute", note)
    yield seen
    event.remove(worker.database.engine, "before_cursor_execute", note)


async def test_ten_thousand_events_in_a_blocked_room_cost_others_nothing(make: MakeWorker, rooms: Rooms) -> None:
    rooms.script(lambda sent: silence if sent.room == OTHER else None)
    async with make() as worker:
        await blocked(worker, 10_000, OTHER)
        await until(lambda: rooms.tries(OTHER))
        with statements(worker, OTHER) as seen:
            for number in numbers(100):
                await worker.send(number)
            await worker.settled(100)
        assert rooms.bodies() == numbers(100)
        assert rooms.tries(OTHER) == ["blocked-0"]
        assert seen == []
        assert worker.remembered <= outbox.BATCH
        await worker.crash()


async def test_fifty_events_of_a_lane_are_held_in_memory(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        for number in numbers(500):
            worker.offer(number, waits=False)
        await until(lambda: worker.states() == ["queued"] * 500)
        await until(lambda: worker.remembered <= 50)
        for number in numbers(100):
            await worker.accept(number)
        assert worker.remembered <= 50
        answered.set()
        await worker.settled()
        await until(lambda: worker.remembered == 0)
        assert worker.backpressure.queued == 0


async def test_all_lanes_together_hold_no_more_than_is_allowed(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "MAX_HELD", 100)
    monkeypatch.setattr(attempt, "FIRST", 20)
    names = [f"!{number}:hs" for number in range(20)]
    async with make() as worker:
        for name in names:  # the first half comes into its lanes, the other by way of the store
            if name in names[:10]:
                await worker.send("first", name)
        rooms.always(silence)
        for body in numbers(40):
            for name in names:
                worker.offer(body, name, waits=False)
        await until(lambda: len(worker.states()) == 810)
        await until(lambda: {sent.room for sent in rooms.sends} == set(names))
        assert worker.remembered <= 2 * 100  # lanes that were claimed when there were few hold their share of then
        await worker.crash()


async def test_waiting_leaves_nothing_behind(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.always(silence)
        ticket = await worker.accept("a", key="k")
        await until(lambda: rooms.sends)
        row = ticket.row
        for _ in range(100):
            joined = await worker.courier.join(row, waits=True)
            assert await worker.courier.wait(joined, 0) is None
        assert joined.waiters == 0
        assert len(joined.settled._callbacks or []) <= 3
        assert worker.remembered == 1
        await worker.crash()


# room for everybody


@pytest.fixture
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(courier, "MAX_LANES", 20)
    monkeypatch.setattr(courier, "CLAIM_LANES", 5)
    return 20


def held(worker: Worker) -> int:
    found = worker.courier.lanes()
    return found["sending"] + found["pause"] + found["idle"]


async def test_rooms_that_are_done_make_room_for_others(make: MakeWorker, rooms: Rooms, few_lanes: int) -> None:
    async with make() as worker:
        for number in range(80):
            worker.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: len(rooms.sends) == 80 or held(worker) > few_lanes)
        assert held(worker) <= few_lanes
        await worker.settled(80)


@pytest.mark.parametrize("why", ["429", "401"])
async def test_account_that_pauses_with_many_rooms_does_not_stand_in_the_way(
    make: MakeWorker, rooms: Rooms, few_lanes: int, why: str
) -> None:
    behaviours = {"429": slow(60_000), "401": error(401, "M_UNKNOWN_TOKEN")}
    rooms.script(lambda sent: behaviours[why] if sent.token == ALICE.token else None)
    async with make() as worker:
        for number in range(50):
            worker.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: rooms.sends)
        for number in range(15):
            assert await worker.send("b", f"!{number}:hs", caller=BOB) is not None
        assert held(worker) <= few_lanes
        rooms.always(None)
        worker.tokens.remember(replace(ALICE, token="new"))
        worker.carrier._limiters[worker.tokens.remember(ALICE)].open()
        tell(Path(str(worker.database.url.database)), "UPDATE lanes SET lease_until = 0 WHERE owner IS NULL")
        await worker.settled()


async def test_account_whose_rooms_are_slow_leaves_room_for_others(
    make: MakeWorker, rooms: Rooms, few_lanes: int
) -> None:
    """Its lanes wait, and it is not paused: there are just too many of them."""
    rooms.script(lambda sent: silence if sent.token == ALICE.token else None)
    async with make() as worker:
        for number in range(100):
            worker.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: held(worker) > few_lanes // 2)
        for number in range(25):
            assert await worker.send("b", f"!{number}:hs", caller=BOB) is not None
        await worker.crash()


async def test_lane_that_is_given_back_before_it_has_begun_is_not_kept_for_ever(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled before its first step does not even run its `finally`."""
    monkeypatch.setattr(courier, "MAX_LANES", 1)
    monkeypatch.setattr(courier, "CLAIM_LANES", 1)
    monkeypatch.setattr(courier, "MAX_REST", 0.02)
    async with make() as worker:
        rooms.then(error(401, "M_UNKNOWN_TOKEN"))
        first = worker.offer("1", waits=False)
        await until(lambda: worker.carrier.distrusted)
        await until(lambda: worker.lane().fence >= 3)
        worker.offer("2", waits=False)
        await soon(first.committed)
        worker.tokens.remember(replace(ALICE, token="new"))
        rooms.users["new"] = rooms.users[ALICE.token]
        await until(lambda: rooms.bodies() == ["1", "2"])


async def test_idle_lane_is_given_back(make: MakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "IDLE_SECONDS", 0.05)
    async with make() as worker:
        await worker.send("a")
        await until(lambda: held(worker) == 0 and worker.lane().owner is None)
        assert worker.lane().dirty == 0
        assert await worker.send("b")


async def test_unknown_lanes_that_are_ours_by_the_store_are_given_back(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """A claim whose commit was answered with a lost connection."""
    async with make(lease=0.6, deadline=0.1) as worker:
        await worker.send("a")
        owner = worker.lane().owner
        await blocked(worker, 1, OTHER)
        tell(
            path,
            "UPDATE lanes SET owner = ?, fence = 7, lease_until = ?, dirty = 0 WHERE lane LIKE '%other%'",
            owner,
            int(time.time() * 1000) + 30_000,
        )
        await until(lambda: rooms.bodies(OTHER) == ["blocked-0"])


# acceptance


async def test_full_store_takes_nothing_and_remembers_nothing(make: MakeWorker, rooms: Rooms) -> None:
    rooms.always(silence)
    async with make(limits=Limits(3, 2, 1 << 30, 0)) as worker:
        for _ in range(2):
            await worker.accept("a")
        with pytest.raises(StoreFull, match="2 events are queued for this room"):
            worker.offer("b")
        await worker.accept("a", OTHER)
        with pytest.raises(StoreFull, match="3 events are queued"):
            worker.offer("b", "!third:hs")
        assert len(worker.states()) == 3
        assert worker.remembered <= 3
        await worker.crash()


async def test_event_that_the_store_refuses_is_not_half_accepted(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.send("a")
        tell(
            path,
            "CREATE TRIGGER no BEFORE INSERT ON outbox WHEN NEW.content LIKE '%bad%' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
        answered = asyncio.Event()
        rooms.then(after(answered))  # what comes behind it must not be on its way when the store refuses it
        first = worker.offer("first")
        tickets = [worker.offer("bad", key=key, waits=waits) for key in ("k", None) for waits in (True, False)]
        waiting = [asyncio.ensure_future(worker.courier.wait(ticket, PATIENCE)) for ticket in tickets if ticket.waiters]
        for ticket in tickets:
            with pytest.raises(StoreUnavailable):
                await soon(ticket.committed)
            await asyncio.sleep(0)  # the courier hears of it in its turn
            assert ticket.withdrawn
        for task in waiting:
            with pytest.raises(StoreUnavailable):
                await soon(task)
        answered.set()
        assert (await soon(first.settled)).state == "sent"
        assert await worker.send("b") is not None
        await worker.settled(3)
        assert rooms.bodies() == ["a", "first", "b"]
        assert len(worker.states()) == 3
        await until(lambda: worker.remembered == 0)
        assert worker.backpressure.queued == 0


# A store that soon stops waiting for a locked file.
IMPATIENT_STORE = Timing(sqlite_busy_seconds=0.02, store_retry_seconds=0.1)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def test_event_that_is_sent_but_cannot_be_written_was_sent(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make(timing=IMPATIENT_STORE) as worker:
        await worker.send("a")
        await worker.settled()
        with locked(path):
            ticket = worker.offer("b")
            assert (await worker.courier.wait(ticket, PATIENCE)) == Outcome("sent", "$2")
            with pytest.raises(StoreUnavailable):
                await soon(ticket.committed)
            assert not ticket.withdrawn
        assert await worker.send("c") is not None
        await worker.settled(2)
        assert rooms.bodies() == ["a", "b", "c"]
        assert len(worker.states()) == 2  # nobody was promised that b is in the log
        assert worker.backpressure.queued == 0


async def test_event_that_may_be_in_the_room_and_cannot_be_written_is_not_taken_back(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    async with make(timing=IMPATIENT_STORE) as worker:
        await worker.send("a")
        await worker.settled()
        answered = asyncio.Event()
        rooms.then(after(answered))
        with locked(path):
            ticket = worker.offer("b")
            await until(lambda: len(rooms.sends) == 2)
            with pytest.raises(StoreUnavailable):
                await soon(ticket.committed)
            assert not ticket.settled.done()  # whoever waits must not hear that nothing happened
            answered.set()
            assert await worker.courier.wait(ticket, PATIENCE) == Outcome("sent", "$2")


async def test_event_that_was_cut_off_and_cannot_be_written_is_not_taken_back(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was under way when its lane was lost, which tells nothing about whether it arrived."""
    async with make() as worker:
        await worker.send("a")
        await worker.settled()
        rooms.then(silence)
        with worker.busy_writer():
            tell_when_written = worker.offer("b")
            await until(lambda: len(rooms.sends) == 2)
            worker.courier._drop(next(iter(worker.courier._lanes.values())))
            await asyncio.sleep(0)
        await soon(tell_when_written.committed)
        assert tell_when_written.tried


async def test_nothing_goes_past_a_store_that_is_in_trouble(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    """Sent first it could only be said that it may be in the room; so it is said that it was not accepted."""
    async with make(timing=IMPATIENT_STORE) as worker:
        await worker.send("a")
        await worker.settled()
        with locked(path):
            await until(lambda: worker.database.trouble)
            ticket = worker.offer("b")
            with pytest.raises(StoreUnavailable):
                await worker.courier.wait(ticket, PATIENCE)
            assert ticket.withdrawn
        assert await worker.send("c")
        assert rooms.tries() == ["a", "c"]


async def test_worker_starts_on_a_store_that_cannot_be_written_and_recovers_later(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """A disk may be full; what a dead process held is taken over once there is space."""
    async with make(timing=IMPATIENT_STORE) as worker:
        rooms.always(refuse_connection)
        await worker.accept("a")
        await until(lambda: rooms.sends)
        await worker.crash()
    rooms.always(None)
    worker = make(timing=IMPATIENT_STORE)
    worker.database.open()
    with locked(path):
        worker.database.start()
        await worker.courier.start()
        await until(lambda: worker.database.trouble)
    await worker.settled()
    assert rooms.bodies() == ["a"]
    await worker.stop()


# taking back
async def test_event_that_was_never_tried_can_be_taken_back(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        b, c = worker.offer("b"), worker.offer("c")
        assert await worker.courier.wait(b, 0) is None
        assert await worker.courier.withdraw(b)
        assert b.settled.result() is None
        answered.set()
        assert await soon(c.settled)
        await worker.settled()
        assert rooms.bodies() == ["a", "c"]
        assert len(worker.states()) == 2
        await until(lambda: worker.remembered == 0)
        assert worker.backpressure.queued == 0


async def test_event_that_may_be_in_the_room_is_not_taken_back(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered, cut))
        ticket = worker.offer("a")
        await until(lambda: rooms.sends)
        assert not await worker.courier.withdraw(ticket)  # it is on its way
        rooms.always(refuse_connection)
        answered.set()
        await until(lambda: len(rooms.sends) > 1)
        assert not await worker.courier.withdraw(ticket)  # nobody knows
        rooms.always(None)
        assert await worker.courier.wait(ticket, PATIENCE) == Outcome("sent", "$1")
        assert not await worker.courier.withdraw(ticket)


async def test_event_that_waits_for_its_account_can_be_taken_back(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(slow(60_000))
        ticket = worker.offer("a")
        await until(lambda: rooms.sends)
        await until(lambda: worker.courier.lanes()["sending"] == 0)
        assert not await worker.courier.withdraw(ticket)  # somebody waits, who would hear of it as of a failure
        assert await worker.courier.wait(ticket, 0) is None
        assert await worker.courier.withdraw(ticket)
        assert worker.states() == []
        await worker.crash()


async def test_events_that_a_dead_process_may_have_sent_are_not_taken_back(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """The caller asks again after a crash; told that nothing was sent, it would send a second one."""
    async with make() as worker:
        await sent_but_not_written(worker, "a", "b")
    names = _deliveries(path)
    rooms.always(slow(60_000))
    async with make() as worker:
        await until(lambda: rooms.sends)
        for name in names:
            found = await worker.database.run(partial(outbox.waiting, delivery=name))
            assert found is not None
            ticket = await worker.courier.join(found[0], waits=True)
            assert await worker.courier.wait(ticket, 0) is None
            assert not await worker.courier.withdraw(ticket)
        assert worker.states() == ["queued", "queued"]
        await worker.crash()


def _deliveries(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT delivery FROM outbox ORDER BY id")]


async def test_event_that_is_taken_back_is_not_read_from_the_store_in_that_moment(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane asks for its next events, and before it has them one is withdrawn."""
    monkeypatch.setattr(courier, "BATCH", 2)
    answered = asyncio.Event()
    async with make() as worker:
        rooms.script(lambda _: after(answered))
        await worker.accept("a")
        await worker.accept("b")
        await until(lambda: rooms.sends)
        c, d = worker.offer("c"), worker.offer("d")
        await soon(d.committed)
        with worker.busy_writer():
            answered.set()
            await until(lambda: rooms.bodies() == ["a", "b"])
            await asyncio.sleep(0)  # the lane has asked
            assert await worker.courier.wait(c, 0) is None
            taking_back = asyncio.ensure_future(worker.courier.withdraw(c))
            await asyncio.sleep(0)
        assert await soon(taking_back)
        assert await soon(d.settled)
        assert rooms.bodies() == ["a", "b", "d"]
        await worker.settled()
        await until(lambda: worker.remembered == 0)


async def test_event_that_cannot_be_taken_back_is_sent_after_all(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    """Whether its turn comes before or after the store has said no."""
    async with make(timing=IMPATIENT_STORE) as worker:
        for turn in ("before", "after"):
            rooms.timeline.clear()
            rooms.sends.clear()
            answered = asyncio.Event()
            rooms.then(after(answered))
            worker.offer("a")
            b = worker.offer("b")
            await soon(b.committed)
            await until(lambda: rooms.sends)
            assert await worker.courier.wait(b, 0) is None
            with locked(path):
                taking_back = asyncio.ensure_future(worker.courier.withdraw(b))
                await asyncio.sleep(0)
                if turn == "before":
                    answered.set()
                    await until(lambda: rooms.bodies() == ["a"])
                with pytest.raises(StoreUnavailable):
                    await soon(taking_back)
            answered.set()
            await until(lambda: rooms.bodies() == ["a", "b"])
            await worker.settled()
        await until(lambda: not worker.backpressure.queued)


async def test_cancelled_event_is_given_up_even_when_it_was_tried(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.always(slow(60_000))
        rooms.then(cut)
        ticket = worker.offer("a")
        await until(lambda: len(rooms.sends) == 2)
        assert ticket.tried
        assert await worker.courier.cancel(ticket.row.delivery)
        assert worker.states() == []
        assert ticket.settled.result() is None
        assert not await worker.courier.cancel(ticket.row.delivery)
        await until(lambda: worker.remembered == 0)
        assert worker.backpressure.queued == 0
        await worker.crash()


async def test_event_on_its_way_is_not_cancelled(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        ticket = await worker.accept("a")
        await until(lambda: rooms.sends)
        assert not await worker.courier.cancel(ticket.row.delivery)
        answered.set()
        await worker.settled()
        assert not await worker.courier.cancel(ticket.row.delivery)
        assert not await worker.courier.cancel("unknown")
        assert rooms.bodies() == ["a"]


async def test_event_that_lies_in_the_store_is_cancelled(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "BATCH", 1)
    async with make() as worker:
        rooms.then(slow(60_000))
        tickets = [await worker.accept(number) for number in numbers(5)]
        await until(lambda: rooms.sends)
        assert await worker.courier.cancel(tickets[3].row.delivery)
        assert len(worker.states()) == 4
        assert worker.remembered <= 1
        await worker.crash()


async def test_event_of_another_owner_is_neither_cancelled_nor_taken_back(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    async with make(lease=30.0) as worker:
        rooms.then(slow(60_000))
        ticket = worker.offer("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET owner = 'other', fence = fence + 1")  # we have slept, and do not know yet
        assert not await worker.courier.cancel(ticket.row.delivery)
        assert not await worker.courier.withdraw(ticket)
        assert worker.states() == ["queued"]
        await worker.crash()


# waiting


async def test_second_caller_waits_with_the_first(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        first = worker.offer("a", key="k")
        await soon(first.committed)
        again = worker.offer("a", key="k")
        await soon(again.committed)
        assert again.existing is not None
        joined = await worker.courier.join(outbox.row_of(again.existing), waits=True)
        waits = [asyncio.ensure_future(worker.courier.wait(ticket, PATIENCE)) for ticket in (first, joined)]
        answered.set()
        assert [await soon(task) for task in waits] == [Outcome("sent", "$1")] * 2
        assert len(rooms.sends) == 1
        await until(lambda: worker.remembered == 0)


Resting = Callable[[Worker], Awaitable[None]]


@pytest.fixture
def resting(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> Resting:
    """Nothing gets through. To be awaited: until the lane rests for a minute, and nothing of it is in memory."""
    for name, seconds in (("REST_SECONDS", 0.0), ("FIRST_PAUSE", 60.0), ("MAX_PAUSE", 60.0)):
        monkeypatch.setattr(lane, name, seconds)
    rooms.always(refuse_connection)

    async def rests(worker: Worker) -> None:
        await until(lambda: rooms.sends and worker.lane().owner is None and worker.remembered == 0)

    return rests


async def test_repeat_that_does_not_wait_leaves_nothing_behind(make: MakeWorker, resting: Resting) -> None:
    async with make() as worker:
        for number in numbers(20):
            await worker.accept(number, key=number)
        await resting(worker)
        for number in numbers(20):
            await worker.accept(number, key=number)
        assert worker.states() == ["queued"] * 20
        assert worker.remembered == 0


async def test_replay_of_what_another_replica_sent_goes_out_anew(
    make: MakeWorker, rooms: Rooms, path: Path, resting: Resting
) -> None:
    """Under the transaction id of then, which somebody who waits here still has, the homeserver would send nothing."""
    async with make() as worker:
        ticket = await worker.accept("a")
        await resting(worker)
        joined = await worker.courier.join(ticket.row, waits=True)
        rooms.always(None)
        tell(path, "UPDATE outbox SET state = 'sent', event_id = '$there', settled_at = 1")
        await worker.database.run(lambda connection: delivery_log.replay(connection, ticket.row.delivery, "new", "me"))
        await worker.courier.joined(ALICE.user_id, ROOM)
        assert await worker.courier.wait(joined, PATIENCE) == Outcome("sent", "$1")
        assert rooms.sends[-1].txn_id == "new"
        await worker.settled()
        assert any("replayed" in entry for entry in json.loads(worker.rows("history")[0])), "the audit is kept"


async def test_delivery_that_was_settled_a_moment_ago_is_joined(make: MakeWorker) -> None:
    async with make() as worker:
        ticket = await worker.accept("a", key="k")
        found = await worker.database.run(lambda connection: outbox.waiting(connection, ticket.row.delivery))
        row = found[0] if found else ticket.row  # as it was read before it was settled
        await worker.settled()
        joined = await worker.courier.join(row, waits=True)
        assert await worker.courier.wait(joined, PATIENCE) == Outcome("sent", "$1")
        await until(lambda: worker.remembered == 0)


async def test_joining_that_fails_leaves_nothing_behind(make: MakeWorker, path: Path) -> None:
    async with make(timing=IMPATIENT_STORE) as worker:
        ticket = await worker.accept("a")
        await worker.settled()
        await until(lambda: worker.remembered == 0)
        with locked(path), pytest.raises(StoreUnavailable):
            await worker.courier.join(ticket.row, waits=True)
        assert worker.remembered == 0


async def test_outcome_that_another_process_has_written_is_heard_by_all_who_wait(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by those who came after many others."""
    monkeypatch.setattr(courier, "HEARD", 10)
    async with make() as worker:
        rooms.always(silence)
        tickets = [worker.offer(number) for number in numbers(120)]
        await soon(tickets[-1].committed)
        await until(lambda: rooms.sends)
        last = tickets[-1].row.delivery
        tell(path, "UPDATE outbox SET state = 'sent', event_id = '$there' WHERE delivery = ?", last)
        worker.courier.wake()
        assert await worker.courier.wait(tickets[-1], PATIENCE) == Outcome("sent", "$there")
        await worker.crash()


async def test_who_waits_is_sent_away_before_the_end_and_the_event_goes_on(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        tickets = [worker.offer(number) for number in numbers(60)]
        await until(lambda: rooms.sends)
        worker.courier.hush()
        for ticket in tickets:
            assert await worker.courier.wait(ticket, PATIENCE) is None
            assert not await worker.courier.withdraw(ticket)
        answered.set()
        await worker.settled()
        assert rooms.bodies() == numbers(60)
        await until(lambda: worker.remembered == 0)


async def test_replayed_event_goes_at_once_though_its_lane_is_held(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(error(400, "M_BAD_JSON"))
        ticket = await worker.accept("a")
        await worker.settled()
        assert held(worker) == 1
        await replay(worker, ticket.row.delivery)
        await until(lambda: rooms.bodies() == ["a"])


# the end


async def test_stop_finishes_what_is_under_way_and_begins_nothing(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    answered = asyncio.Event()
    async with make() as worker:
        rooms.script(lambda _: after(answered))
        for room in (ROOM, OTHER):
            await worker.accept("a", room)
            await worker.accept("b", room)
        await until(lambda: len(rooms.sends) == 2)
        stopping = asyncio.ensure_future(worker.stop())
        await asyncio.sleep(0)
        answered.set()
        await soon(stopping)
    assert rooms.tries() == ["a", "a"]
    assert left(path) == [("sent", None), ("queued", None)] * 2
    rooms.always(None)
    async with make() as worker:
        await worker.settled()
        assert rooms.looks == []
    assert (rooms.bodies(), rooms.bodies(OTHER)) == (["a", "b"], ["a", "b"])


def left(path: Path) -> list[tuple[str, str | None]]:
    """The state of each event and the owner of its lane."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT state, owner FROM outbox LEFT JOIN lanes USING (lane) ORDER BY outbox.lane, id"
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("why", ["gate", "look-up", "pause", "rest"])
async def test_stop_does_not_wait_for_lanes_that_wait(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(lane, "FIRST_PAUSE", 2 * PATIENCE)
    monkeypatch.setattr(lane, "MAX_PAUSE", 2 * PATIENCE)
    monkeypatch.setattr(lane, "REST_SECONDS", PATIENCE if why == "rest" else 3 * PATIENCE)
    behaviours: dict[str, Behaviour] = {"gate": slow(120_000)}
    rooms.always(behaviours.get(why, refuse_connection))
    rooms.encrypted[ROOM] = 2 * PATIENCE if why == "look-up" else False
    async with make(refuse_encrypted=True) as worker:
        await worker.accept("a")
        await until(lambda: rooms.looks if why == "look-up" else rooms.sends)
        await until(lambda: worker.courier.lanes()["sending"] == 0)
        await soon(worker.stop(3 * PATIENCE))
    assert left(path) == [("queued", None)]


async def test_stop_during_a_claim_gives_what_it_claimed_back(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.database.run(lambda connection: None)
        with worker.busy_writer():
            worker.offer("a", waits=False)
            for _ in range(5):
                await asyncio.sleep(0)  # the keeper asks for lanes
            stopping = asyncio.ensure_future(worker.stop())
            for _ in range(5):
                await asyncio.sleep(0)
        await soon(stopping)
    assert rooms.sends == []
    assert left(path) == [("queued", None)]
    async with make() as worker:
        await worker.settled()


async def test_event_that_comes_during_the_stop_is_found_by_the_next_start(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    async with make() as worker:
        await worker.send("a")
        await worker.settled()
        await worker.courier.stop()
        late = worker.offer("b", waits=False)
        await soon(late.committed)
        await worker.database.stop()
        worker._ended = True
    async with make() as worker:
        await until(lambda: rooms.bodies() == ["a", "b"])
        await worker.settled()


async def test_stop_while_the_homeserver_is_away_ends_the_probing(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "FIRST_PROBE_PAUSE", 0.01)
    monkeypatch.setattr(attempt, "MAX_PROBE_PAUSE", 0.01)
    async with make() as worker:
        rooms.always(refuse_connection)
        rooms.version = unreachable()
        for room in numbers(6):
            await worker.accept("a", f"!{room}:hs")
        await until(lambda: worker.carrier.is_away)
        await until(lambda: rooms.looks)
        await worker.stop()
        asked = len(rooms.looks)
        await asyncio.sleep(0.05)
        assert len(rooms.looks) == asked


async def test_homeserver_that_was_away_gets_everything_in_order(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "FIRST_PROBE_PAUSE", 0.01)
    async with make() as worker:
        rooms.always(refuse_connection)
        for number in numbers(20):
            for room in (ROOM, OTHER):
                await worker.accept(number, room)
        await until(lambda: worker.carrier.is_away)
        rooms.always(None)
        await worker.settled()
        assert rooms.bodies() == rooms.bodies(OTHER) == numbers(20)


# a homeserver that misbehaves in every way at once


async def test_nothing_is_lost_doubled_or_reordered_in_a_storm(make: MakeWorker, rooms: Rooms) -> None:
    storm = [lose, cut, slow(1), error(500, "M_UNKNOWN"), None, None, lose, None, refuse_connection, None, None]
    turn = iter(range(10**9))
    rooms.script(lambda sent: storm[next(turn) % len(storm)])
    names = [f"!{number}:hs" for number in range(8)]
    async with make() as worker:
        for number in numbers(40):
            for name in names:
                caller = ALICE if name < "!4:hs" else BOB
                worker.offer(number, name, caller=caller, waits=False, key=number if int(number) % 3 else None)
            await asyncio.sleep(0)
        await worker.settled(320)
        assert {name: rooms.bodies(name) for name in names} == {name: numbers(40) for name in names}
        assert worker.states() == ["sent"] * 320


def test_limits_of_memory_are_those_of_the_design() -> None:
    assert (outbox.BATCH, courier.MAX_HELD, courier.MAX_LANES) == (50, 10_000, 2_000)


async def test_account_whose_requests_hang_leaves_places_to_others(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "FIRST", attempt.WIDEST)  # as that of an account of which much went well
    rooms.script(lambda sent: silence if sent.token == ALICE.token else None)
    async with make() as worker:
        for number in range(attempt.WIDEST + 10):
            worker.offer(f"hangs-{number}", f"!{number}:hs", waits=False)
        await until(lambda: len(rooms.sends) >= 48)
        assert await worker.send("quick", OTHER, caller=BOB, seconds=5) is not None
        await worker.crash()


async def test_of_large_events_few_are_held_in_memory(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "HELD_BYTES", 300_000)
    go = asyncio.Event()
    rooms.always(after(go))
    async with make() as worker:
        held = []
        for _ in range(20):
            await worker.accept("x" * 60_000)
            held += [len(lane.tickets) for lane in worker.courier._lanes.values()]
        assert 0 < max(held) <= 3
        go.set()
        await rooms.reads(20)
        await worker.settled()
    assert worker.states() == ["sent"] * 20


# lanes that a command asks for


async def test_lane_that_a_command_asks_for_is_given_back_for_a_moment(make: MakeWorker, rooms: Rooms) -> None:
    """What lies in memory would be sent although the command says that it is removed."""
    async with make() as worker:
        await worker.send("first")
        rooms.then(slow(600_000))
        for body in ("a", "b"):
            await worker.accept(body)
        await until(lambda: len(rooms.sends) > 1)
        lane, chosen = worker.lane().lane, [tables.outbox.c.room_id == ROOM]
        assert await worker.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 0
        await worker.database.run(lambda c: abandoned.ask_for(c, [lane]))
        worker.courier.wake()
        await until(lambda: not worker.lane().owner)
        assert await worker.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 2
        worker.carrier._limiters[lane.partition("|")[0]]._closed_until = 0.0
        assert await worker.send("after") is not None
    assert rooms.tries() == ["first", "a", "after"]
    assert worker.states() == ["sent", "sent"]


async def test_event_on_its_way_is_not_removed_and_those_behind_it_may_be(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowbridge.delivery.worker.ASKED_SECONDS", PATIENCE)  # a busy machine may take the usual 3 s
    answered = asyncio.Event()
    async with make() as worker:
        await worker.send("first")
        rooms.then(after(answered))
        for body in ("on its way", "behind"):
            await worker.accept(body)
        await until(lambda: worker.courier.lanes()["sending"])
        lane, chosen = worker.lane().lane, [tables.outbox.c.room_id == ROOM]
        assert await worker.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 0
        await worker.database.run(lambda c: abandoned.ask_for(c, [lane]))
        worker.courier.wake()
        await until(lambda: lane in worker.courier._asked)
        assert worker.lane().owner
        assert worker.lane().dirty != ASKED
        answered.set()
        await until(lambda: not worker.lane().owner)
        assert await worker.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 1
    assert rooms.bodies() == ["first", "on its way"]
    assert worker.states() == ["sent", "sent"]
