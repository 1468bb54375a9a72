"""Several workers on one PostgreSQL: who has a room, what others hear of it, and what becomes of it at the end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.delivery.waiting import Waiting, waiting
from flowbridge.events.relations import Binding
from flowbridge.events.stories import Chapter
from flowbridge.store import StoreUnavailable, delivery_log, engine
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres
from tests.rig import ALICE, ROOM, MakeRig, Rig, Rooms, after, error, refuse_connection, slow, soon, until

OTHER = "!other:hs"


@pytest.fixture
def url(postgres: LocalPostgres) -> str:
    return postgres.fresh_database()


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def make(url: str, rooms: Rooms) -> MakeRig:
    """`make()`: one more replica."""
    return MakeRig(url, rooms)


@pytest.fixture
async def pair(make: MakeRig) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two replicas of which the first has the room."""
    async with make() as one:
        await one.send("first")
        await one.settled()
        async with make() as other:
            yield one, other


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.002, max_pause=0.01, poll_seconds=0.03)


def tell(url: str, *statements: str) -> None:
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def lanes_of(rig: Rig) -> int:
    found = rig.worker.lanes()
    return found["sending"] + found["pause"] + found["idle"]


async def test_event_goes_by_whoever_has_the_room_and_who_waits_elsewhere_hears(
    pair: tuple[Rig, Rig], rooms: Rooms
) -> None:
    one, other = pair
    for number in range(5):
        assert await other.send(str(number)) == Outcome("sent", f"${number + 2}")
    assert (lanes_of(one), lanes_of(other)) == (1, 0)
    await until(lambda: other.remembered == 0)


NEVER = 100 * PATIENCE


async def test_replicas_tell_each_other_of_events_and_of_how_they_ended(make: MakeRig, rooms: Rooms) -> None:
    """Neither looks into the store by itself."""
    make.tune(poll_seconds=NEVER)
    async with make() as one:
        await one.send("first")
        async with make() as other:
            await until(lambda: listeners(one.url) == 2)
            for number in range(5):
                assert await soon(other.send(str(number))) == Outcome("sent", f"${number + 2}")
            rooms.then(error(400, "M_BAD_JSON"))
            dead = await soon(other.send("dead"))
            assert (dead.state, dead.error["errcode"]) == ("dead", "M_BAD_JSON")
            accepted = await other.accept("nobody waits")
            await until(lambda: rooms.bodies()[-1:] == ["nobody waits"])
            assert accepted.row.delivery
            assert (lanes_of(one), lanes_of(other)) == (1, 0)


async def test_replica_whose_listening_was_cut_listens_again(make: MakeRig, rooms: Rooms, url: str) -> None:
    make.tune(listen_retry_seconds=0.02)
    async with make() as one:
        await one.send("first")
        async with make() as other:
            await until(lambda: listeners(url) == 2)
            before = listeners(url, column="min(backend_start)")
            await asyncio.to_thread(tell, url, CUT_LISTENERS)
            await until(lambda: listeners(url) == 2 and listeners(url, column="min(backend_start)") > before)
            assert await soon(other.send("second")) == Outcome("sent", "$2")


async def test_replicas_behind_a_pooler_look_for_what_others_did(
    make: MakeRig, rooms: Rooms, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names a process of its own; of what it prepares for one session, another might get something else."""
    monkeypatch.setattr(engine, "_SESSION", engine._SESSION.replace("pg_backend_pid()", "0"))
    async with make() as one:
        await one.send("first")
        async with make() as other:
            for number in range(10):
                assert await soon(other.send(str(number))) == Outcome("sent", f"${number + 2}")
            assert (lanes_of(one), lanes_of(other)) == (1, 0)
            assert listeners(url) == 0
            prepared = text("SELECT count(*) FROM pg_prepared_statements")
            assert await one.database.run(lambda connection: connection.scalar(prepared)) == 0


def listeners(url: str, column: str = "count(*)") -> Any:
    """How many replicas listen."""
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        return connection.scalar(text(f"SELECT {column} FROM pg_stat_activity WHERE {LISTENERS}"))  # noqa: S608


async def test_order_is_that_of_acceptance_at_whichever_replica(pair: tuple[Rig, Rig], rooms: Rooms) -> None:
    for number in range(30):
        await pair[number % 2].accept(str(number))
    await pair[0].settled(31)
    assert rooms.bodies() == ["first", *map(str, range(30))]


async def test_replay_by_a_replica_that_has_heard_of_the_event_before_is_sent(
    pair: tuple[Rig, Rig], rooms: Rooms
) -> None:
    """A repeat came there while the other one was at it. The homeserver knows the transaction id of then."""
    one, other = pair
    answered = asyncio.Event()
    rooms.then(after(answered))
    pending = await one.accept("a", key="k")
    await until(lambda: len(rooms.sends) == 2)
    await other.accept("a", key="k")
    assert other.remembered == 0
    answered.set()
    await one.settled()
    await one.stop()
    await other.database.run(lambda connection: delivery_log.replay(connection, pending.row.delivery, "new", "me"))
    other.worker.wake()
    await until(lambda: rooms.bodies() == ["first", "a", "a"])
    assert rooms.sends[-1].txn_id == "new"


async def told(rig: Rig, pending: PendingDelivery) -> Waiting:
    """What a delivery waits for, as this replica says it."""
    name, me = pending.row.delivery, rig.worker.owner
    place = (await rig.database.read(partial(delivery_log.standings, deliveries=[name])))[name]
    account, is_sending = pending.row.account, rig.worker.is_sending(name)
    return waiting(rig.account_limits, rig.breaker, account, place, is_sending=is_sending, me=me)


async def test_replica_says_what_an_event_waits_for_that_another_one_sends(pair: tuple[Rig, Rig], rooms: Rooms) -> None:
    one, other = pair
    answered = asyncio.Event()
    rooms.then(after(answered))
    sending = await one.accept("a")
    await until(lambda: len(rooms.sends) == 2)
    behind = await other.accept("b")
    for replica in pair:
        assert await told(replica, sending) == Waiting("it is being sent")
    older = Waiting("an older event of this room first", None, sending.row.delivery)
    assert await told(other, behind) == older
    rooms.always(slow(60_000))
    answered.set()
    await until(lambda: one.account_limits.pause_of(behind.row.account) > 0)
    assert other.account_limits.pause_of(behind.row.account) == 0, "it has not heard of that itself"
    async with asyncio.timeout(PATIENCE):
        while (found := await told(other, behind)).until is None:
            await one.database.flush()  # the attempt is on its way to the store
    assert found.reason == "the homeserver limits how much this account may send"
    assert 0 < found.until / 1000 - time.time() <= 66


async def test_join_through_a_replica_wakes_what_another_one_lets_rest_just_now(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one has been told that the account is not in the room, by a homeserver that did not know better yet."""
    make.tune(absent_pauses=(10 * PATIENCE,))
    asked, told = asyncio.Event(), asyncio.Event()

    async def late(*_: str) -> bool:
        asked.set()
        await told.wait()
        return False

    monkeypatch.setattr(rooms, "is_joined", late)
    rooms.then(error(403, "M_FORBIDDEN"))
    loop, later = asyncio.get_running_loop(), list[Callable[[], object]]()
    call_later = loop.call_later

    def hold(seconds: float, what: Callable[..., object], *which: Any) -> Any:
        if seconds <= one.deadline:
            return call_later(seconds, what, *which)
        later.append(partial(what, *which))  # by then the other one's attempt is over
        return None

    async with make() as one, make() as other:
        await one.accept("a")
        await soon(asked.wait())
        monkeypatch.setattr(loop, "call_later", hold)
        await other.worker.joined(ALICE.user_id, ROOM)
        await until(lambda: not other.worker._lanes._wanted)  # it is not to be had
        told.set()
        await until(lambda: one.lane().owner is None)
        for rouse in later:
            rouse()
        await until(lambda: rooms.bodies() == ["a"])


async def test_room_is_handed_over_at_once_by_a_replica_that_ends(pair: tuple[Rig, Rig], rooms: Rooms) -> None:
    one, other = pair
    answered = asyncio.Event()
    rooms.then(after(answered))
    for body in "abc":
        await one.accept(body)
    await until(lambda: len(rooms.sends) == 2)
    waiting = asyncio.ensure_future(other.send("d"))
    stopping = asyncio.ensure_future(one.stop())
    await asyncio.sleep(0)
    answered.set()
    await soon(stopping)
    assert await soon(waiting)
    assert rooms.tries() == ["first", "a", "b", "c", "d"]
    assert lanes_of(other) == 1
    assert rooms.looks == []


async def test_who_waits_hears_though_the_room_has_become_ones_own(make: MakeRig, rooms: Rooms) -> None:
    """The other one has settled it and gone, before anybody here has asked what became of it."""
    make.tune(poll_seconds=0.5)
    async with make() as one, contextlib.AsyncExitStack() as later:
        await one.send("first")
        other = await later.enter_async_context(make())
        pending = other.offer("a")
        await until(lambda: rooms.bodies() == ["first", "a"])
        await one.stop()
        other.offer("b", waits=False)  # so it takes the room at once
        await until(lambda: lanes_of(other))
        assert await other.worker.wait(pending, PATIENCE) == Outcome("sent", "$2")


async def test_dead_replicas_rooms_are_taken_over_after_the_lease(make: MakeRig, rooms: Rooms, url: str) -> None:
    answered = asyncio.Event()
    async with make(lease=3.0, deadline=0.2) as one, contextlib.AsyncExitStack() as later:
        rooms.then(after(answered))
        await one.accept("a")
        await one.accept("b")
        await until(lambda: rooms.sends)
        other = await later.enter_async_context(make(lease=3.0, deadline=0.2))
        began = time.monotonic()
        await one.crash()
        waiting = asyncio.ensure_future(other.send("c"))
        assert await soon(waiting)
        assert time.monotonic() - began > 0.3
        await other.settled()
    assert rooms.bodies() == ["a", "b", "c"]


async def test_what_a_dead_replica_may_have_sent_is_looked_for_when_that_is_long_ago(
    make: MakeRig, rooms: Rooms, url: str
) -> None:
    async with make() as one:
        await one.accept("a")
        await one.settled()
        rooms.always(refuse_connection)
        await one.accept("b")
        await one.accept("c")
        await until(lambda: len(rooms.sends) > 1)
        await one.crash()
    rooms.store(next(sent for sent in rooms.sends if sent.body == "b"))
    rooms.forget()
    rooms.always(None)
    tell(
        url,
        "UPDATE outbox SET accepted_at = accepted_at - 3600000",
        "UPDATE lanes SET lease_until = lease_until - 3600000",
    )
    async with make() as other:
        await other.settled()
    assert rooms.bodies() == ["a", "b", "c"]


async def test_zombie_sends_nothing_after_its_lease_and_settles_nothing(make: MakeRig, rooms: Rooms) -> None:
    async with make(lease=1.0, deadline=0.3) as one, contextlib.AsyncExitStack() as later:
        await one.send("first")
        other = await later.enter_async_context(make(lease=1.0, deadline=0.3))
        rooms.always(slow(50))
        for number in range(10):
            await one.accept(str(number))
        await until(lambda: len(rooms.sends) > 1)
        with one.busy_writer():  # it does not get to the database any more, and has events in memory
            await until(lambda: lanes_of(other))
            taken_over = len(rooms.sends)
            rooms.always(None)
            await other.settled()
            assert rooms.bodies() == ["first", *map(str, range(10))]
            assert rooms.tries()[taken_over:] == [str(number) for number in range(10)]
        await until(lambda: lanes_of(one) == 0)
        assert set(other.states()) == {"sent"}
        assert await one.send("last")
    assert rooms.bodies() == ["first", *map(str, range(10)), "last"]


async def test_same_key_at_two_replicas_at_the_same_moment_is_one_event(pair: tuple[Rig, Rig], rooms: Rooms) -> None:
    for number in range(6):
        key = f"key-{number}"
        deliveries = await asyncio.gather(*[rig.accept(str(number), key=key, waits=True) for rig in pair])
        outcomes = await asyncio.gather(
            *[rig.worker.wait(pending, PATIENCE) for rig, pending in zip(pair, deliveries, strict=True)]
        )
        assert deliveries[0].row.delivery == deliveries[1].row.delivery
        assert outcomes[0] == outcomes[1] == Outcome("sent", f"${number + 2}")
    assert rooms.tries() == ["first", *map(str, range(6))]


async def test_event_whose_room_another_replica_has_is_not_taken_back(pair: tuple[Rig, Rig], rooms: Rooms) -> None:
    one, other = pair
    rooms.always(slow(60_000))
    pending = other.offer("a")
    await until(lambda: len(rooms.sends) == 2)
    assert not await other.worker.withdraw(pending)
    assert not await other.worker.cancel(pending.row.delivery)
    assert other.states() == ["sent", "queued"]
    assert await one.worker.cancel(pending.row.delivery)
    assert other.states() == ["sent"]


async def test_rooms_are_shared_out_and_none_has_two_owners(make: MakeRig, rooms: Rooms) -> None:
    async with make() as one, make() as other:
        for number in range(10):
            for room in range(20):
                (one, other)[room % 2].offer(str(number), f"!{room}:hs", waits=False)
        await one.settled(200)
        assert all(rooms.bodies(f"!{room}:hs") == list("0123456789") for room in range(20))
        assert len(rooms.sends) == 200
        assert lanes_of(one) + lanes_of(other) == 20


CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


LISTENERS = "datname = current_database() AND query LIKE 'LISTEN flowbridge%'"
CUT_LISTENERS = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {LISTENERS}"  # noqa: S608


@contextlib.contextmanager
def unreachable_database(url: str, postgres: LocalPostgres) -> Iterator[None]:
    name = make_url(url).database
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as inside:
        tell(postgres.url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        inside.execute(text(CUT))
    yield
    tell(postgres.url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


async def test_worker_goes_on_when_a_database_that_was_away_is_back(
    make: MakeRig, rooms: Rooms, url: str, postgres: LocalPostgres
) -> None:
    """Also when it was away for so long that those who waited were told: nothing hangs on for ever."""
    make.tune(store_retry_seconds=0.1)
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        with unreachable_database(url, postgres):
            pending = rig.offer("b")
            with pytest.raises(StoreUnavailable):
                await soon(pending.committed)
            with pytest.raises(StoreUnavailable):
                await rig.worker.wait(pending, PATIENCE)
        await until(lambda: not rig.database.trouble)
        assert await rig.send("c")
        await until(lambda: rig.states() == ["sent", "sent"])
        assert rooms.bodies() == ["a", "c"]


async def test_connections_that_are_cut_again_and_again_lose_and_double_nothing(
    make: MakeRig, rooms: Rooms, url: str
) -> None:
    async with make() as one, make() as other:
        for number in range(24):
            await (one, other)[number % 2].accept(str(number), key=str(number))
            if number % 8 == 0:
                await asyncio.to_thread(tell, url, CUT)
        await one.settled(24)
        assert one.states() == ["sent"] * 24
    assert rooms.bodies() == [str(number) for number in range(24)]


async def test_key_has_one_first_message_however_many_replicas_take_its_messages(
    pair: tuple[Rig, Rig], rooms: Rooms
) -> None:
    binding = Binding(key="build 1")
    pending = [rig.offer(str(number), binding=binding) for number in range(10) for rig in pair]
    for each, rig in zip(pending, pair * 10, strict=True):
        assert (await rig.worker.wait(each, PATIENCE)) is not None
    relations = [event["content"].get("m.relates_to") for event in rooms.timeline[ROOM][1:]]
    first = rooms.timeline[ROOM][1]["event_id"]
    assert relations == [None, *[{"rel_type": "m.replace", "event_id": first}] * 19]


async def test_story_has_one_first_message_however_many_replicas_are_told_it(
    pair: tuple[Rig, Rig], rooms: Rooms
) -> None:
    fires, done = Chapter("firing", ("a",), 1, "fires"), Chapter("resolved", (), 2, "done")
    pending = [
        rig.offer(chapter.digest, binding=Binding(key="alert", chapter=chapter))
        for chapter in (fires, fires, done, fires, done)
        for rig in pair
    ]
    for each, rig in zip(pending, pair * 5, strict=True):
        outcome = await rig.worker.wait(each, PATIENCE)
        assert outcome
        assert outcome.state == "sent"
    told = [event["content"] for event in rooms.timeline[ROOM][1:]]
    # In the order in which the two took them: it is resolved, or fires and is; and never fires again.
    first, *others = told
    assert len(told) <= 2
    assert "m.relates_to" not in first
    assert [content["m.new_content"]["body"] for content in others] == ["done"] * len(others)


async def test_event_of_a_story_that_a_dead_replica_has_decided_is_sent_by_the_next(
    make: MakeRig, rooms: Rooms
) -> None:
    make.tune(poll_seconds=0.03)
    rooms.always(refuse_connection)
    binding = Binding(key="alert", chapter=Chapter("firing", ("a",), 1, "fires"))
    async with make(lease=1.5, deadline=0.5) as one:
        first = one.offer("fires", binding=binding)
        await soon(first.committed)
        await until(lambda: "bound_as" in str(one.rows("binding")))
        again = one.offer("fires", binding=binding)
        await soon(again.committed)
        await one.crash()
    rooms.always(None)
    async with make(lease=1.5, deadline=0.5) as other:
        await other.settled(2)
        assert other.rows("event_id") == ["$1", "$1"]
    assert rooms.bodies() == ["fires"]


async def test_message_of_several_events_is_accepted_by_one_replica_as_a_whole(
    pair: tuple[Rig, Rig], rooms: Rooms
) -> None:
    for number in range(10):
        both = [rig.offer(f"{number}", key=f"k{number}", following=[f"{number}a", f"{number}b"]) for rig in pair]
        await soon(asyncio.gather(*(each.committed for each in both)))
        assert [each.existing is None for each in both].count(True) == 1
    await until(lambda: len(rooms.timeline[ROOM]) >= 31)
    bodies = rooms.bodies()[1:]
    assert sorted(bodies) == sorted(f"{number}{part}" for number in range(10) for part in ("", "a", "b"))
    for number in range(10):
        at = bodies.index(str(number))
        assert bodies[at : at + 3] == [f"{number}{part}" for part in ("", "a", "b")]


async def test_binding_of_a_replica_that_died_is_found_by_the_next(make: MakeRig, rooms: Rooms) -> None:
    make.tune(poll_seconds=0.03)
    rooms.always(refuse_connection)
    async with make(lease=1.5, deadline=0.5) as one:
        first = one.offer("first", binding=Binding(key="k"))
        await soon(first.committed)
        second = one.offer("second", binding=Binding(key="k"))
        await soon(second.committed)
        await one.crash()
    rooms.always(None)
    async with make(lease=1.5, deadline=0.5):
        await rooms.reads(2)
    assert rooms.timeline[ROOM][1]["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": "$1"}
