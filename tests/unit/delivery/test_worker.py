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

import pytest
from sqlalchemy import Connection

from flowbridge.delivery.backpressure import Limits
from flowbridge.delivery.lanes import Bounds
from flowbridge.delivery.limiter import WIDEST
from flowbridge.delivery.pending import Outcome
from flowbridge.store import Row, StoreFull, StoreUnavailable, abandoned, delivery_log, leases, outbox, tables
from flowbridge.store.leases import ASKED
from tests.patience import PATIENCE
from tests.rig import (
    ALICE,
    BOB,
    ROOM,
    Behaviour,
    MakeRig,
    Rig,
    Rooms,
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
from tests.statements import heard
from tests.unit.delivery.test_lane import sent_but_not_written, tell

OTHER = "!other:hs"
HOUR = 3_600_000


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.002, max_pause=0.01, poll_seconds=0.02)


def numbers(until_: int) -> list[str]:
    return [str(number) for number in range(until_)]


# order


async def test_events_go_in_the_order_of_acceptance_whether_by_the_store_or_not(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        for number in numbers(300):
            rig.offer(number, waits=False, key=number if number.endswith("7") else None)
            if number.endswith("00"):
                await until(lambda: len(rooms.sends) > 20)
        await rig.settled()
    assert rooms.bodies() == numbers(300)


async def claimed_unnoticed(rig: Rig, fence: int) -> None:
    """Until the store says that the lane is ours, and not a moment longer: the worker has not heard of it yet."""
    for _ in range(100):
        await asyncio.sleep(0)
        if is_claimed(rig, fence):
            return
    raise AssertionError("nobody claims it")


def is_claimed(rig: Rig, fence: int) -> bool:
    """Whether that happens within a moment in which the event loop is busy with something else."""
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        if (found := rig.lane()) is not None and found.fence == fence:
            return True
        time.sleep(0.001)
    return False


async def test_event_that_comes_while_its_lane_is_claimed_is_not_overtaken(make: MakeRig, rooms: Rooms) -> None:
    """What the claim has read is older, and what comes after it may go straight into the lane."""
    async with make() as rig:
        await rig.database.run(lambda connection: None)
        rig.offer("1", waits=False)
        await claimed_unnoticed(rig, 1)
        assert sum(rig.worker.lanes().values()) == 0
        rig.offer("2")
        await until(lambda: sum(rig.worker.lanes().values()))
        rig.offer("3")
        await until(lambda: rooms.bodies() == ["1", "2", "3"])


async def test_event_put_into_a_lane_that_is_claimed_anew_is_not_forgotten(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """The store goes by the clock on the wall, and a step of that ends a lease that the process believes in."""
    async with make() as rig:
        await rig.send("1")
        await rig.settled()
        tell(path, "UPDATE lanes SET lease_until = 1")
        await claimed_unnoticed(rig, 2)
        rooms.then(silence)
        rig.offer("2", waits=False)
        await until(lambda: rooms.bodies() == ["1", "2"])


async def test_long_lane_is_sent_to_its_end_beside_others(make: MakeRig, rooms: Rooms) -> None:
    """With other lanes at work a claim reads less than a lane may hold: that is not all there is."""
    async with make() as rig:
        await rig.send("x", OTHER)
        for number in numbers(120):
            rig.offer(number, waits=False)
        await until(lambda: len(rooms.bodies()) >= 49)
        rig.offer("120", waits=False)
        await until(lambda: rooms.bodies() == numbers(121))


async def test_order_is_kept_over_crashes_and_stops(make: MakeRig, rooms: Rooms) -> None:
    for turn, end in enumerate((Rig.crash, Rig.stop, Rig.crash, Rig.crash, Rig.stop)):
        async with make() as rig:
            for number in range(70):
                rig.offer(str(70 * turn + number), waits=False)
            await rooms.reads(70 * turn + 1)
            await end(rig)
    async with make() as rig:
        await rig.settled(350)
    assert rooms.bodies() == numbers(350)


async def test_replay_is_not_overtaken_by_what_is_sent_after_its_answer(make: MakeRig, rooms: Rooms) -> None:
    """It lies in the store, and what comes may go straight into the lane."""
    async with make() as rig:
        pending = await rig.accept("first")
        await rig.settled()
        await rig.send("x")
        await replay(rig, pending.row.delivery)
        await rig.send("after the replay")
        assert rooms.bodies() == ["first", "x", "first", "after the replay"]


async def test_replay_into_a_lane_that_is_being_claimed_is_not_overtaken(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        pending = await rig.accept("first")
        await rig.settled()
    async with make() as rig:
        await rig.database.run(lambda connection: None)
        rig.offer("x", waits=False)
        await claimed_unnoticed(rig, 2)
        with rig.database.engine.begin() as connection:
            delivery_log.replay(connection, pending.row.delivery, "new", "me")
        rig.worker.wake(pending.row.lane)
        await until(lambda: held(rig))
        rig.offer("after the replay", waits=False)
        await rooms.reads(4)
        assert rooms.bodies() == ["first", "x", "first", "after the replay"]


async def replay(rig: Rig, delivery: str) -> None:
    """As the delivery log does, up to its answer."""
    again = await rig.database.run(lambda connection: delivery_log.replay(connection, delivery, "new", "me"))
    assert again is not None
    rig.worker.wake(again["lane"])


# memory


async def blocked(rig: Rig, number: int, room: str = ROOM) -> None:
    """Fill a room whose first event does not get through."""
    template = rig.pending("", room)
    rows = []
    for count in range(number):
        name = f"blocked-{count}"
        content = json.dumps({"msgtype": "m.text", "body": name})
        rows.append({**template.values(), "delivery": name, "txn_id": name, "content": content})
    await rig.database.run(lambda connection: outbox.insert_rows(connection, rows))
    pair = (template.row.lane, template.row.account)
    await rig.database.run(lambda connection: leases.mark_dirty(connection, [pair]))
    rig.worker.wake()


async def test_ten_thousand_events_in_a_blocked_room_cost_others_nothing(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(lambda sent: silence if sent.room == OTHER else None)
    async with make() as rig:
        await blocked(rig, 10_000, OTHER)
        await until(lambda: rooms.tries(OTHER))
        with heard(rig.database.engine) as seen:
            for number in numbers(100):
                await rig.send(number)
            await rig.settled(100)
        assert rooms.bodies() == numbers(100)
        assert rooms.tries(OTHER) == ["blocked-0"]
        assert seen.asked
        assert [text for text, values in seen.asked if OTHER in str(values)] == []
        assert rig.remembered <= outbox.BATCH
        await rig.crash()


async def test_fifty_events_of_a_lane_are_held_in_memory(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        for number in numbers(500):
            rig.offer(number, waits=False)
        await until(lambda: rig.states() == ["queued"] * 500)
        await until(lambda: rig.remembered <= 50)
        for number in numbers(100):
            await rig.accept(number)
        assert rig.remembered <= 50
        answered.set()
        await rig.settled()
        await until(lambda: rig.remembered == 0)
        assert rig.backpressure.queued == 0


async def test_lane_that_has_caught_up_goes_by_memory_again_although_events_keep_coming(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the store is read, one more event comes: there would always be more in it."""
    make.tune(batch=5)
    most = 50
    async with make() as rig:
        await rig.send("0")
        answered, loop = asyncio.Event(), asyncio.get_running_loop()
        rooms.always(after(answered))
        offered = [0]

        def offer() -> None:
            if offered[-1] < most:
                offered.append(offered[-1] + 1)
                rig.offer(str(offered[-1]), waits=False)

        def read(connection: Connection, lane: str, limit: int) -> list[Row]:
            loop.call_soon_threadsafe(offer)  # ahead of what is read
            return fetch(connection, lane, limit)

        fetch = outbox.fetch
        monkeypatch.setattr(outbox, "fetch", read)
        for _ in range(12):
            offer()
        rooms.always(None)
        answered.set()
        await rig.settled(13)
        await until(lambda: len(rooms.bodies()) == len(offered))
        assert 12 < len(offered) - 1 < most / 2, "it reads the store for ever"
        with heard(rig.database.engine) as seen:
            for number in range(100, 120):
                await rig.send(str(number))
            await rig.settled()
        assert seen.asked
        assert not [text for text, values in seen.asked if text.startswith("SELECT") and ROOM in str(values)]
        assert rooms.bodies() == [*map(str, offered), *map(str, range(100, 120))]


async def test_all_lanes_together_hold_no_more_than_is_allowed(make: MakeRig, rooms: Rooms) -> None:
    make.tune(events=100)
    names = [f"!{number}:hs" for number in range(20)]
    async with make(first=20) as rig:
        for name in names:  # the first half comes into its lanes, the other by way of the store
            if name in names[:10]:
                await rig.send("first", name)
        rooms.always(silence)
        for body in numbers(40):
            for name in names:
                rig.offer(body, name, waits=False)
        await until(lambda: len(rig.states()) == 810)
        await until(lambda: {sent.room for sent in rooms.sends} == set(names))
        assert rig.remembered <= 2 * 100  # lanes that were claimed when there were few hold their share of then
        await rig.crash()


async def test_waiting_leaves_nothing_behind(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.always(silence)
        pending = await rig.accept("a", key="k")
        await until(lambda: rooms.sends)
        row = pending.row
        for _ in range(100):
            joined = await rig.worker.join(row, waits=True)
            assert await rig.worker.wait(joined, 0) is None
        assert joined.waiters == 0
        assert len(joined.settled._callbacks or []) <= 3
        assert rig.remembered == 1
        await rig.crash()


# room for everybody


@pytest.fixture
def few_lanes(make: MakeRig) -> int:
    make.tune(lanes=20, claims=5)
    return 20


def held(rig: Rig) -> int:
    found = rig.worker.lanes()
    return found["sending"] + found["pause"] + found["idle"]


async def test_rooms_that_are_done_make_room_for_others(make: MakeRig, rooms: Rooms, few_lanes: int) -> None:
    async with make() as rig:
        for number in range(80):
            rig.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: len(rooms.sends) == 80 or held(rig) > few_lanes)
        assert held(rig) <= few_lanes
        await rig.settled(80)


@pytest.mark.parametrize("why", ["429", "401"])
async def test_account_that_pauses_with_many_rooms_does_not_stand_in_the_way(
    make: MakeRig, rooms: Rooms, few_lanes: int, why: str
) -> None:
    behaviours = {"429": slow(60_000), "401": error(401, "M_UNKNOWN_TOKEN")}
    rooms.script(lambda sent: behaviours[why] if sent.token == ALICE.token else None)
    async with make() as rig:
        for number in range(50):
            rig.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: rooms.sends)
        for number in range(15):
            assert await rig.send("b", f"!{number}:hs", caller=BOB) is not None
        assert held(rig) <= few_lanes
        rooms.always(None)
        rig.tokens.remember(replace(ALICE, token="new"))
        rig.account_limits.limiter(rig.tokens.remember(ALICE)).open()
        tell(Path(str(rig.database.url.database)), "UPDATE lanes SET lease_until = 0 WHERE owner IS NULL")
        await rig.settled()


async def test_account_whose_rooms_are_slow_leaves_room_for_others(make: MakeRig, rooms: Rooms, few_lanes: int) -> None:
    """Its lanes wait, and it is not paused: there are just too many of them."""
    rooms.script(lambda sent: silence if sent.token == ALICE.token else None)
    async with make() as rig:
        for number in range(100):
            rig.offer("a", f"!{number}:hs", waits=False)
        await until(lambda: held(rig) > few_lanes // 2)
        for number in range(25):
            assert await rig.send("b", f"!{number}:hs", caller=BOB) is not None
        await rig.crash()


async def test_lane_that_is_given_back_before_it_has_begun_is_not_kept_for_ever(make: MakeRig, rooms: Rooms) -> None:
    """A task that is cancelled before its first step does not even run its `finally`."""
    make.tune(lanes=1, claims=1, max_rest=0.02)
    async with make() as rig:
        rooms.then(error(401, "M_UNKNOWN_TOKEN"))
        first = rig.offer("1", waits=False)
        await until(lambda: rig.account_limits.distrusted)
        await until(lambda: rig.lane().fence >= 3)
        rig.offer("2", waits=False)
        await soon(first.committed)
        rig.tokens.remember(replace(ALICE, token="new"))
        rooms.users["new"] = rooms.users[ALICE.token]
        await until(lambda: rooms.bodies() == ["1", "2"])


async def test_idle_lane_is_given_back(make: MakeRig) -> None:
    make.tune(idle_seconds=0.05)
    async with make() as rig:
        await rig.send("a")
        await until(lambda: held(rig) == 0 and rig.lane().owner is None)
        assert rig.lane().dirty == 0
        assert await rig.send("b")


async def test_unknown_lanes_that_are_ours_by_the_store_are_given_back(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """A claim whose commit was answered with a lost connection."""
    async with make(lease=0.6, deadline=0.1) as rig:
        await rig.send("a")
        owner = rig.lane().owner
        await blocked(rig, 1, OTHER)
        tell(
            path,
            "UPDATE lanes SET owner = ?, fence = 7, lease_until = ?, dirty = 0 WHERE lane LIKE '%other%'",
            owner,
            int(time.time() * 1000) + 30_000,
        )
        await until(lambda: rooms.bodies(OTHER) == ["blocked-0"])


# acceptance


async def test_full_store_takes_nothing_and_remembers_nothing(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(silence)
    async with make(limits=Limits(3, 2, 1 << 30, 0)) as rig:
        for _ in range(2):
            await rig.accept("a")
        with pytest.raises(StoreFull, match="2 events are queued for this room"):
            rig.offer("b")
        await rig.accept("a", OTHER)
        with pytest.raises(StoreFull, match="3 events are queued"):
            rig.offer("b", "!third:hs")
        assert len(rig.states()) == 3
        assert rig.remembered <= 3
        await rig.crash()


async def test_event_that_the_store_refuses_is_not_half_accepted(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.send("a")
        tell(
            path,
            "CREATE TRIGGER no BEFORE INSERT ON outbox WHEN NEW.content LIKE '%bad%' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
        answered = asyncio.Event()
        rooms.then(after(answered))  # what comes behind it must not be on its way when the store refuses it
        first = rig.offer("first")
        deliveries = [rig.offer("bad", key=key, waits=waits) for key in ("k", None) for waits in (True, False)]
        waiting = [
            asyncio.ensure_future(rig.worker.wait(pending, PATIENCE)) for pending in deliveries if pending.waiters
        ]
        for pending in deliveries:
            with pytest.raises(StoreUnavailable):
                await soon(pending.committed)
            await asyncio.sleep(0)  # the worker hears of it in its turn
            assert pending.withdrawn
        for task in waiting:
            with pytest.raises(StoreUnavailable):
                await soon(task)
        answered.set()
        assert (await soon(first.settled)).state == "sent"
        assert await rig.send("b") is not None
        await rig.settled(3)
        assert rooms.bodies() == ["a", "first", "b"]
        assert len(rig.states()) == 3
        await until(lambda: rig.remembered == 0)
        assert rig.backpressure.queued == 0


@pytest.fixture
def impatient_store(make: MakeRig) -> None:
    """It soon stops waiting for a locked file."""
    make.tune(sqlite_busy_seconds=0.02, store_retry_seconds=0.1)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.usefixtures("impatient_store")
async def test_event_that_is_sent_but_cannot_be_written_was_sent(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        with locked(path):
            pending = rig.offer("b")
            assert (await rig.worker.wait(pending, PATIENCE)) == Outcome("sent", "$2")
            with pytest.raises(StoreUnavailable):
                await soon(pending.committed)
            assert not pending.withdrawn
        assert await rig.send("c") is not None
        await rig.settled(2)
        assert rooms.bodies() == ["a", "b", "c"]
        assert len(rig.states()) == 2  # nobody was promised that b is in the log
        assert rig.backpressure.queued == 0


async def test_event_that_may_be_in_the_room_and_cannot_be_written_is_not_taken_back(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        answered = asyncio.Event()
        rooms.then(after(answered))
        with locked(path):
            pending = rig.offer("b")
            await until(lambda: len(rooms.sends) == 2)
            with pytest.raises(StoreUnavailable):
                await soon(pending.committed)
            assert not pending.settled.done()  # whoever waits must not hear that nothing happened
            answered.set()
            assert await rig.worker.wait(pending, PATIENCE) == Outcome("sent", "$2")


async def test_event_that_was_cut_off_and_cannot_be_written_is_not_taken_back(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """It was under way when its lane was lost, which tells nothing about whether it arrived."""
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        rooms.then(silence)
        with rig.busy_writer():
            tell_when_written = rig.offer("b")
            await until(lambda: len(rooms.sends) == 2)
            rig.worker._lanes.drop(next(iter(rig.worker._lanes)))
            await asyncio.sleep(0)
        await soon(tell_when_written.committed)
        assert tell_when_written.maybe_sent


@pytest.mark.usefixtures("impatient_store")
async def test_nothing_goes_past_a_store_that_is_in_trouble(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """Sent first it could only be said that it may be in the room; so it is said that it was not accepted."""
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        with locked(path):
            await until(lambda: rig.database.trouble)
            pending = rig.offer("b")
            with pytest.raises(StoreUnavailable):
                await rig.worker.wait(pending, PATIENCE)
            assert pending.withdrawn
        assert await rig.send("c")
        assert rooms.tries() == ["a", "c"]


async def test_worker_starts_on_a_store_that_cannot_be_written_and_recovers_later(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """A disk may be full; what a dead process held is taken over once there is space."""
    async with make() as rig:
        rooms.always(refuse_connection)
        await rig.accept("a")
        await until(lambda: rooms.sends)
        await rig.crash()
    rooms.always(None)
    rig = make()
    rig.database.open()
    with locked(path):
        rig.database.start()
        await rig.worker.start()
        await until(lambda: rig.database.trouble)
    await rig.settled()
    assert rooms.bodies() == ["a"]
    await rig.stop()


# taking back
async def test_event_that_was_never_tried_can_be_taken_back(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        b, c = rig.offer("b"), rig.offer("c")
        assert await rig.worker.wait(b, 0) is None
        assert await rig.worker.withdraw(b)
        assert b.settled.result() is None
        answered.set()
        assert await soon(c.settled)
        await rig.settled()
        assert rooms.bodies() == ["a", "c"]
        assert len(rig.states()) == 2
        await until(lambda: rig.remembered == 0)
        assert rig.backpressure.queued == 0


async def test_event_that_may_be_in_the_room_is_not_taken_back(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered, cut))
        pending = rig.offer("a")
        await until(lambda: rooms.sends)
        assert not await rig.worker.withdraw(pending)  # it is on its way
        rooms.always(refuse_connection)
        answered.set()
        await until(lambda: len(rooms.sends) > 1)
        assert not await rig.worker.withdraw(pending)  # nobody knows
        rooms.always(None)
        assert await rig.worker.wait(pending, PATIENCE) == Outcome("sent", "$1")
        assert not await rig.worker.withdraw(pending)


async def test_event_that_waits_for_its_account_can_be_taken_back(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(slow(60_000))
        pending = rig.offer("a")
        await until(lambda: rooms.sends)
        await until(lambda: rig.worker.lanes()["sending"] == 0)
        assert not await rig.worker.withdraw(pending)  # somebody waits, who would hear of it as of a failure
        assert await rig.worker.wait(pending, 0) is None
        assert await rig.worker.withdraw(pending)
        assert rig.states() == []
        await rig.crash()


async def test_events_that_a_dead_process_may_have_sent_are_not_taken_back(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """The caller asks again after a crash; told that nothing was sent, it would send a second one."""
    async with make() as rig:
        await sent_but_not_written(rig, "a", "b")
    names = _deliveries(path)
    rooms.always(slow(60_000))
    async with make() as rig:
        await until(lambda: rooms.sends)
        for name in names:
            found = await rig.database.run(partial(outbox.waiting, delivery=name))
            assert found is not None
            pending = await rig.worker.join(found[0], waits=True)
            assert await rig.worker.wait(pending, 0) is None
            assert not await rig.worker.withdraw(pending)
        assert rig.states() == ["queued", "queued"]
        await rig.crash()


def _deliveries(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT delivery FROM outbox ORDER BY id")]


async def test_event_that_is_taken_back_is_not_read_from_the_store_in_that_moment(make: MakeRig, rooms: Rooms) -> None:
    """The lane asks for its next events, and before it has them one is withdrawn."""
    make.tune(batch=2)
    answered = asyncio.Event()
    async with make() as rig:
        rooms.script(lambda _: after(answered))
        await rig.accept("a")
        await rig.accept("b")
        await until(lambda: rooms.sends)
        c, d = rig.offer("c"), rig.offer("d")
        await soon(d.committed)
        with rig.busy_writer():
            answered.set()
            await until(lambda: rooms.bodies() == ["a", "b"])
            await asyncio.sleep(0)  # the lane has asked
            assert await rig.worker.wait(c, 0) is None
            taking_back = asyncio.ensure_future(rig.worker.withdraw(c))
            await asyncio.sleep(0)
        assert await soon(taking_back)
        assert await soon(d.settled)
        assert rooms.bodies() == ["a", "b", "d"]
        await rig.settled()
        await until(lambda: rig.remembered == 0)


@pytest.mark.usefixtures("impatient_store")
async def test_event_that_cannot_be_taken_back_is_sent_after_all(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """Whether its turn comes before or after the store has said no."""
    async with make() as rig:
        for turn in ("before", "after"):
            rooms.timeline.clear()
            rooms.sends.clear()
            answered = asyncio.Event()
            rooms.then(after(answered))
            rig.offer("a")
            b = rig.offer("b")
            await soon(b.committed)
            await until(lambda: rooms.sends)
            assert await rig.worker.wait(b, 0) is None
            with locked(path):
                taking_back = asyncio.ensure_future(rig.worker.withdraw(b))
                await asyncio.sleep(0)
                if turn == "before":
                    answered.set()
                    await until(lambda: rooms.bodies() == ["a"])
                with pytest.raises(StoreUnavailable):
                    await soon(taking_back)
            answered.set()
            await until(lambda: rooms.bodies() == ["a", "b"])
            await rig.settled()
        await until(lambda: not rig.backpressure.queued)


async def test_cancelled_event_is_given_up_even_when_it_was_tried(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.always(slow(60_000))
        rooms.then(cut)
        pending = rig.offer("a")
        await until(lambda: len(rooms.sends) == 2)
        assert pending.maybe_sent
        assert await rig.worker.cancel(pending.row.delivery)
        assert rig.states() == []
        assert pending.settled.result() is None
        assert not await rig.worker.cancel(pending.row.delivery)
        await until(lambda: rig.remembered == 0)
        assert rig.backpressure.queued == 0
        await rig.crash()


async def test_event_on_its_way_is_not_cancelled(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        pending = await rig.accept("a")
        await until(lambda: rooms.sends)
        assert not await rig.worker.cancel(pending.row.delivery)
        answered.set()
        await rig.settled()
        assert not await rig.worker.cancel(pending.row.delivery)
        assert not await rig.worker.cancel("unknown")
        assert rooms.bodies() == ["a"]


async def test_event_that_lies_in_the_store_is_cancelled(make: MakeRig, rooms: Rooms) -> None:
    make.tune(batch=1)
    async with make() as rig:
        rooms.then(slow(60_000))
        deliveries = [await rig.accept(number) for number in numbers(5)]
        await until(lambda: rooms.sends)
        assert await rig.worker.cancel(deliveries[3].row.delivery)
        assert len(rig.states()) == 4
        assert rig.remembered <= 1
        await rig.crash()


async def test_event_of_another_owner_is_neither_cancelled_nor_taken_back(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    async with make(lease=30.0) as rig:
        rooms.then(slow(60_000))
        pending = rig.offer("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET owner = 'other', fence = fence + 1")  # we have slept, and do not know yet
        assert not await rig.worker.cancel(pending.row.delivery)
        assert not await rig.worker.withdraw(pending)
        assert rig.states() == ["queued"]
        await rig.crash()


# waiting


async def test_second_caller_waits_with_the_first(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        first = rig.offer("a", key="k")
        await soon(first.committed)
        again = rig.offer("a", key="k")
        await soon(again.committed)
        assert again.existing is not None
        joined = await rig.worker.join(outbox.row_of(again.existing), waits=True)
        waits = [asyncio.ensure_future(rig.worker.wait(pending, PATIENCE)) for pending in (first, joined)]
        answered.set()
        assert [await soon(task) for task in waits] == [Outcome("sent", "$1")] * 2
        assert len(rooms.sends) == 1
        await until(lambda: rig.remembered == 0)


Resting = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def resting(make: MakeRig, rooms: Rooms) -> Resting:
    """Nothing gets through. To be awaited: until the lane rests for a minute, and nothing of it is in memory."""
    make.tune(rest_pause=0.0, first_pause=60.0, max_pause=60.0)
    rooms.always(refuse_connection)

    async def rests(rig: Rig) -> None:
        await until(lambda: rooms.sends and rig.lane().owner is None and rig.remembered == 0)

    return rests


async def test_repeat_that_does_not_wait_leaves_nothing_behind(make: MakeRig, resting: Resting) -> None:
    async with make() as rig:
        for number in numbers(20):
            await rig.accept(number, key=number)
        await resting(rig)
        for number in numbers(20):
            await rig.accept(number, key=number)
        assert rig.states() == ["queued"] * 20
        assert rig.remembered == 0


async def test_replay_of_what_another_replica_sent_goes_out_anew(
    make: MakeRig, rooms: Rooms, path: Path, resting: Resting
) -> None:
    """Under the transaction id of then, which somebody who waits here still has, the homeserver would send nothing."""
    async with make() as rig:
        pending = await rig.accept("a")
        await resting(rig)
        joined = await rig.worker.join(pending.row, waits=True)
        rooms.always(None)
        tell(path, "UPDATE outbox SET state = 'sent', event_id = '$there', settled_at = 1")
        await rig.database.run(lambda connection: delivery_log.replay(connection, pending.row.delivery, "new", "me"))
        await rig.worker.joined(ALICE.user_id, ROOM)
        assert await rig.worker.wait(joined, PATIENCE) == Outcome("sent", "$1")
        assert rooms.sends[-1].txn_id == "new"
        await rig.settled()
        assert any("replayed" in entry for entry in json.loads(rig.rows("history")[0])), "the audit is kept"


async def test_delivery_that_was_settled_a_moment_ago_is_joined(make: MakeRig) -> None:
    async with make() as rig:
        pending = await rig.accept("a", key="k")
        found = await rig.database.run(lambda connection: outbox.waiting(connection, pending.row.delivery))
        row = found[0] if found else pending.row  # as it was read before it was settled
        await rig.settled()
        joined = await rig.worker.join(row, waits=True)
        assert await rig.worker.wait(joined, PATIENCE) == Outcome("sent", "$1")
        await until(lambda: rig.remembered == 0)


@pytest.mark.usefixtures("impatient_store")
async def test_joining_that_fails_leaves_nothing_behind(make: MakeRig, path: Path) -> None:
    async with make() as rig:
        pending = await rig.accept("a")
        await rig.settled()
        await until(lambda: rig.remembered == 0)
        with locked(path), pytest.raises(StoreUnavailable):
            await rig.worker.join(pending.row, waits=True)
        assert rig.remembered == 0


async def test_outcome_that_another_process_has_written_is_heard_by_all_who_wait(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """Also by those who came after many others."""
    make.tune(outcomes=10)
    async with make() as rig:
        rooms.always(silence)
        deliveries = [rig.offer(number) for number in numbers(120)]
        await soon(deliveries[-1].committed)
        await until(lambda: rooms.sends)
        last = deliveries[-1].row.delivery
        tell(path, "UPDATE outbox SET state = 'sent', event_id = '$there' WHERE delivery = ?", last)
        rig.worker.wake()
        assert await rig.worker.wait(deliveries[-1], PATIENCE) == Outcome("sent", "$there")
        await rig.crash()


async def test_who_waits_is_sent_away_before_the_end_and_the_event_goes_on(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        deliveries = [rig.offer(number) for number in numbers(60)]
        await until(lambda: rooms.sends)
        rig.worker.release_waiters()
        for pending in deliveries:
            assert await rig.worker.wait(pending, PATIENCE) is None
            assert not await rig.worker.withdraw(pending)
        answered.set()
        await rig.settled()
        assert rooms.bodies() == numbers(60)
        await until(lambda: rig.remembered == 0)


async def test_replayed_event_goes_at_once_though_its_lane_is_held(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(error(400, "M_BAD_JSON"))
        pending = await rig.accept("a")
        await rig.settled()
        assert held(rig) == 1
        await replay(rig, pending.row.delivery)
        await until(lambda: rooms.bodies() == ["a"])


# the end


async def test_stop_finishes_what_is_under_way_and_begins_nothing(make: MakeRig, rooms: Rooms, path: Path) -> None:
    answered = asyncio.Event()
    async with make() as rig:
        rooms.script(lambda _: after(answered))
        for room in (ROOM, OTHER):
            await rig.accept("a", room)
            await rig.accept("b", room)
        await until(lambda: len(rooms.sends) == 2)
        stopping = asyncio.ensure_future(rig.stop())
        await asyncio.sleep(0)
        answered.set()
        await soon(stopping)
    assert rooms.tries() == ["a", "a"]
    assert left(path) == [("sent", None), ("queued", None)] * 2
    rooms.always(None)
    async with make() as rig:
        await rig.settled()
        assert rooms.looks == []
    assert (rooms.bodies(), rooms.bodies(OTHER)) == (["a", "b"], ["a", "b"])


def left(path: Path) -> list[tuple[str, str | None]]:
    """The state of each event and the owner of its lane."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT state, owner FROM outbox LEFT JOIN lanes USING (lane) ORDER BY outbox.lane, id"
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("why", ["gate", "look-up", "pause", "rest"])
async def test_stop_does_not_wait_for_lanes_that_wait(make: MakeRig, rooms: Rooms, path: Path, why: str) -> None:
    make.tune(first_pause=2 * PATIENCE, max_pause=2 * PATIENCE, rest_pause=PATIENCE if why == "rest" else 3 * PATIENCE)
    behaviours: dict[str, Behaviour] = {"gate": slow(120_000)}
    rooms.always(behaviours.get(why, refuse_connection))
    rooms.encrypted[ROOM] = 2 * PATIENCE if why == "look-up" else False
    async with make(refuse_encrypted=True) as rig:
        await rig.accept("a")
        await until(lambda: rooms.looks if why == "look-up" else rooms.sends)
        await until(lambda: rig.worker.lanes()["sending"] == 0)
        await soon(rig.stop(3 * PATIENCE))
    assert left(path) == [("queued", None)]


async def test_stop_during_a_claim_gives_what_it_claimed_back(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.database.run(lambda connection: None)
        with rig.busy_writer():
            rig.offer("a", waits=False)
            for _ in range(5):
                await asyncio.sleep(0)  # the keeper asks for lanes
            stopping = asyncio.ensure_future(rig.stop())
            for _ in range(5):
                await asyncio.sleep(0)
        await soon(stopping)
    assert rooms.sends == []
    assert left(path) == [("queued", None)]
    async with make() as rig:
        await rig.settled()


async def test_event_that_comes_during_the_stop_is_found_by_the_next_start(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        await rig.worker.stop()
        late = rig.offer("b", waits=False)
        await soon(late.committed)
        await rig.database.stop()
        rig.ended = True
    async with make() as rig:
        await until(lambda: rooms.bodies() == ["a", "b"])
        await rig.settled()


async def test_stop_while_the_homeserver_is_away_ends_the_probing(make: MakeRig, rooms: Rooms) -> None:
    make.tune(first_probe_pause=0.01, max_probe_pause=0.01)
    async with make() as rig:
        rooms.always(refuse_connection)
        rooms.version = unreachable()
        for room in numbers(6):
            await rig.accept("a", f"!{room}:hs")
        await until(lambda: rig.breaker.is_open)
        await until(lambda: rooms.looks)
        await rig.stop()
        asked = len(rooms.looks)
        await asyncio.sleep(0.05)
        assert len(rooms.looks) == asked


async def test_homeserver_that_was_away_gets_everything_in_order(make: MakeRig, rooms: Rooms) -> None:
    make.tune(first_probe_pause=0.01)
    async with make() as rig:
        rooms.always(refuse_connection)
        for number in numbers(20):
            for room in (ROOM, OTHER):
                await rig.accept(number, room)
        await until(lambda: rig.breaker.is_open)
        rooms.always(None)
        await rig.settled()
        assert rooms.bodies() == rooms.bodies(OTHER) == numbers(20)


# a homeserver that misbehaves in every way at once


async def test_nothing_is_lost_doubled_or_reordered_in_a_storm(make: MakeRig, rooms: Rooms) -> None:
    storm = [lose, cut, slow(1), error(500, "M_UNKNOWN"), None, None, lose, None, refuse_connection, None, None]
    turn = iter(range(10**9))
    rooms.script(lambda sent: storm[next(turn) % len(storm)])
    names = [f"!{number}:hs" for number in range(8)]
    async with make() as rig:
        for number in numbers(40):
            for name in names:
                caller = ALICE if name < "!4:hs" else BOB
                rig.offer(number, name, caller=caller, waits=False, key=number if int(number) % 3 else None)
            await asyncio.sleep(0)
        await rig.settled(320)
        assert {name: rooms.bodies(name) for name in names} == {name: numbers(40) for name in names}
        assert rig.states() == ["sent"] * 320


def test_limits_of_memory_are_those_of_the_design() -> None:
    assert (outbox.BATCH, Bounds().events, Bounds().lanes) == (50, 10_000, 2_000)


async def test_account_whose_requests_hang_leaves_places_to_others(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(lambda sent: silence if sent.token == ALICE.token else None)
    async with make(first=WIDEST) as rig:  # as that of an account of which much went well
        for number in range(WIDEST + 10):
            rig.offer(f"hangs-{number}", f"!{number}:hs", waits=False)
        await until(lambda: len(rooms.sends) >= 48)
        assert await rig.send("quick", OTHER, caller=BOB, seconds=5) is not None
        await rig.crash()


async def test_of_large_events_few_are_held_in_memory(make: MakeRig, rooms: Rooms) -> None:
    make.tune(bytes=300_000)
    go = asyncio.Event()
    rooms.always(after(go))
    async with make() as rig:
        held = []
        for _ in range(20):
            await rig.accept("x" * 60_000)
            held += [len(lane.queue) for lane in rig.worker._lanes]
        assert 0 < max(held) <= 3
        go.set()
        await rooms.reads(20)
        await rig.settled()
    assert rig.states() == ["sent"] * 20


# lanes that a command asks for


async def test_lane_that_a_command_asks_for_is_given_back_for_a_moment(make: MakeRig, rooms: Rooms) -> None:
    """What lies in memory would be sent although the command says that it is removed."""
    async with make() as rig:
        await rig.send("first")
        rooms.then(slow(600_000))
        for body in ("a", "b"):
            await rig.accept(body)
        await until(lambda: len(rooms.sends) > 1)
        lane, chosen = rig.lane().lane, [tables.outbox.c.room_id == ROOM]
        assert await rig.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 0
        await rig.database.run(lambda c: abandoned.ask_for(c, [lane]))
        rig.worker.wake()
        await until(lambda: not rig.lane().owner)
        assert await rig.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 2
        rig.account_limits.limiter(lane.partition("|")[0]).open()
        assert await rig.send("after") is not None
    assert rooms.tries() == ["first", "a", "after"]
    assert rig.states() == ["sent", "sent"]


async def test_event_on_its_way_is_not_removed_and_those_behind_it_may_be(make: MakeRig, rooms: Rooms) -> None:
    make.tune(yield_seconds=PATIENCE)  # a busy machine may take the usual 3 s
    answered = asyncio.Event()
    async with make() as rig:
        await rig.send("first")
        rooms.then(after(answered))
        for body in ("on its way", "behind"):
            await rig.accept(body)
        await until(lambda: rig.worker.lanes()["sending"])
        lane, chosen = rig.lane().lane, [tables.outbox.c.room_id == ROOM]
        assert await rig.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 0
        await rig.database.run(lambda c: abandoned.ask_for(c, [lane]))
        rig.worker.wake()
        await until(lambda: lane in rig.worker._lanes._asked)
        assert rig.lane().owner
        assert rig.lane().dirty != ASKED
        answered.set()
        await until(lambda: not rig.lane().owner)
        assert await rig.database.run(lambda c: abandoned.remove(c, [lane], chosen)) == 1
    assert rooms.bodies() == ["first", "on its way"]
    assert rig.states() == ["sent", "sent"]
