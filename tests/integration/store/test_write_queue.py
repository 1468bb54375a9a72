"""Acceptances and outcomes on their way to the disk."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Connection, select

from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.models.timing import Timing
from flowbridge.store import (
    Database,
    Fence,
    Row,
    StoreFull,
    StoreUnavailable,
    StoreUnsure,
    accounts,
    delivery_log,
    leases,
    outbox,
)
from flowbridge.store.tables import lanes
from tests import patience
from tests.integration.store import test_accounts
from tests.integration.store.events import LANE, OTHER, claim, claim_one, event, lane, only_postgresql, put, states
from tests.integration.store.test_database import busy, connection_lost, failing, full, until
from tests.statements import heard


@pytest.fixture
async def writer(database: Database) -> WriteQueue:
    return WriteQueue(database, timing=Timing(rewrite_seconds=0.02))


@pytest.fixture
async def replica(url: str) -> AsyncIterator[Database]:
    """Another process on the same PostgreSQL."""
    database = Database(url)
    database.open()
    database.start()
    yield database
    await database.stop()


def pending(name: str, *, dirty: bool = False, row: Mapping[str, Any] | None = None, **values: Any) -> PendingDelivery:
    whole = Row(name, LANE, "account", "!room:example.org", "m.room.message", None, b"{}", f"txn-{name}", 1_000)
    one = PendingDelivery(whole._replace(**row or {}), **values)
    if dirty:
        one.mark_dirty()
    return one


def keyed(name: str, key: str = "key", fingerprint: str = "f", **values: Any) -> PendingDelivery:
    return pending(name, idem=key, fingerprint=fingerprint, **values)


def end(one: PendingDelivery, state: Any = "sent", **values: Any) -> PendingDelivery:
    one.settle(Outcome(state, **values), 2_000)
    return one


def row_of(name: str) -> Any:
    return lambda connection: delivery_log.get(connection, name)


async def accepted(writer: WriteQueue, *deliveries: PendingDelivery) -> None:
    for one in deliveries:
        writer.append(one)
    await asyncio.gather(*[one.committed for one in deliveries])


async def held(database: Database) -> Fence:
    """The lane, with something in it, claimed."""
    await database.run(lambda connection: put(connection, "first"))
    return (await database.run(claim_one)).fence


async def test_accepted_is_what_is_on_the_disk(database: Database, writer: WriteQueue) -> None:
    row = {"state_key": "key", "content": '{"a":"\u2713"}'.encode(), "api_key": "id"}
    whole = pending("one", row=row, idem="key", fingerprint="print", request="as it came", dirty=True)
    await accepted(writer, whole)
    row = await database.read(row_of("one"))
    assert row is not None
    assert {name: row[name] for name in whole.values()} == whole.values()
    assert row["content"] == '{"a":"\u2713"}'


async def test_all_that_comes_together_is_one_piece_of_work(database: Database, writer: WriteQueue) -> None:
    deliveries = [pending(f"event-{number}") for number in range(100)]
    async with busy(database):
        for one in deliveries:
            writer.append(one)
        assert database.waiting == 1
    await asyncio.gather(*[one.committed for one in deliveries])
    assert list(await database.read(states)) == [one.row.delivery for one in deliveries]


async def test_only_what_its_owner_does_not_know_makes_a_lane_dirty(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    await accepted(writer, pending("known"))
    assert (await database.read(lane)).dirty == 0
    await accepted(writer, pending("unknown", dirty=True))
    assert (await database.read(lane)).dirty == 1
    assert (await database.read(lane)).owner == fence.owner


async def test_event_that_is_settled_before_it_is_written_is_written_as_settled(
    database: Database, writer: WriteQueue
) -> None:
    fence = await held(database)
    one = pending("one")
    async with busy(database):
        writer.append(one)
        writer.settle(end(one, event_id="$one"), fence)
    await one.committed
    row = await database.read(row_of("one"))
    assert row is not None
    assert (row["state"], row["event_id"], row["settled_at"]) == ("sent", "$one", 2_000)


async def test_event_that_is_settled_later_is_settled_in_its_row(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    one, two = pending("one"), pending("two")
    await accepted(writer, one, two)
    writer.settle(end(one, event_id="$one"), fence)
    two.record({"status": 403})
    for _ in range(3):
        two.count_attempt()
    writer.settle(end(two, "dead", error={"status": 403, "errcode": "M_FORBIDDEN"}), fence)
    await accepted(writer, pending("three"))  # written after them
    row = await database.read(row_of("two"))
    assert row is not None
    assert (row["state"], row["attempts"], row["history"]) == ("dead", 3, '[{"status": 403}]')
    assert (await database.read(lambda c: outbox.outcomes(c, ["one", "two", "three"]))) == {
        "one": ("sent", "$one", None),
        "two": ("dead", None, {"status": 403, "errcode": "M_FORBIDDEN"}),
    }


async def test_outcome_and_doubt_of_a_zombie_are_not_written(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    one = pending("one")
    await accepted(writer, one)
    await database.run(lambda connection: leases.recover(connection, 30_000))
    new = (await database.run(lambda connection: claim(connection, "other")))[0].fence
    await database.run(lambda connection: leases.doubt(connection, new, 7))
    writer.settle(end(one), fence)
    writer.doubt(fence, None)
    await accepted(writer, pending("two"))
    assert (await database.read(states))["one"] == "queued"
    assert (await database.read(lane)).uncertain_since == 7


async def test_doubt_is_written_in_milliseconds(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    writer.doubt(fence, 12.345)
    await accepted(writer, pending("one"))
    assert (await database.read(lane)).uncertain_since == 12_345
    writer.doubt(fence, None)
    await accepted(writer, pending("two"))
    assert (await database.read(lane)).uncertain_since is None


async def test_account_is_written_before_the_event_that_needs_it(database: Database, writer: WriteQueue) -> None:
    async with busy(database):
        writer.remember(test_accounts.account("alice", "token"))
        writer.append(one := pending("one"))
        assert database.waiting == 1
    await one.committed
    assert await database.read(lambda c: accounts.by_token(c, "token")) == ("@alice:example.org", "DEVICE")


# keys


async def test_same_key_twice_in_one_group_is_one_event(database: Database, writer: WriteQueue) -> None:
    one, again, other = keyed("one"), keyed("again", fingerprint="g"), keyed("other", "other key")
    async with busy(database):
        for each in (one, again, other):
            writer.append(each)
    await asyncio.gather(one.committed, again.committed, other.committed)
    assert list(await database.read(states)) == ["one", "other"]
    assert (one.existing, other.existing) == (None, None)
    assert again.existing is not None
    assert (again.existing["delivery"], again.existing["fingerprint"]) == ("one", "f")


async def test_same_key_in_a_later_group_is_the_event_that_was_accepted(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    one, again = keyed("one"), keyed("again")
    await accepted(writer, one)
    writer.settle(end(one, event_id="$one"), fence)
    await accepted(writer, again)
    assert again.existing is None or again.existing["delivery"] == "one"
    third = keyed("third")
    await accepted(writer, third)
    assert third.existing is not None
    assert (third.existing["state"], third.existing["event_id"]) == ("sent", "$one")
    assert list(await database.read(states)) == ["first", "one"]


@only_postgresql
async def test_same_key_at_two_replicas_at_once_is_one_event(
    database: Database, replica: Database, writer: WriteQueue
) -> None:
    """The second one finds the first's row in its transaction, after its own search for the key."""
    here, there = keyed("here"), keyed("there")
    async with busy(replica, lambda connection: outbox.insert_rows(connection, [there.values()])):
        writer.append(here)
        await until(lambda: here.written)
        await until(lambda: waits_for_a_lock(database))
    await here.committed
    assert list(await database.read(states)) == ["there"]
    assert here.existing is not None
    assert here.existing["delivery"] == "there"


def waits_for_a_lock(database: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with database.engine.connect() as connection:
        return bool(connection.exec_driver_sql(query).scalar())


@only_postgresql
@pytest.mark.parametrize("lanes_are_new", [False, True], ids=["known lanes", "new lanes"])
async def test_replicas_that_write_the_same_key_wait_in_no_circle(
    database: Database, replica: Database, writer: WriteQueue, monkeypatch: pytest.MonkeyPatch, lanes_are_new: bool
) -> None:
    """One writes to a single lane, the other to two, and both have the same event for the lane that they share."""
    if not lanes_are_new:
        await database.run(lambda connection: leases.mark_dirty(connection, [(LANE, "account"), (OTHER, "account")]))
    here, there = keyed("here", dirty=True), keyed("there", dirty=True)
    beside = keyed("beside", "another key", dirty=True, row={"lane": OTHER})
    inserted = threading.Event()
    insert = outbox.insert_rows

    def slowly(connection: Connection, rows: Any) -> set[str]:
        refused = insert(connection, rows)
        if rows[0]["delivery"] == here.row.delivery and not inserted.is_set():
            inserted.set()
            patience.until(lambda: waits_for_a_lock(database))
        return refused

    monkeypatch.setattr(outbox, "insert_rows", slowly)
    with heard(database.engine, replica.engine) as seen:
        writer.append(here)
        await until(inserted.is_set)
        await accepted(WriteQueue(replica), beside, there)
        await here.committed
    assert seen.refused == []
    assert there.existing is not None
    assert there.existing["delivery"] == here.row.delivery


async def test_repeat_after_a_lost_commit_is_the_same_event(database: Database, writer: WriteQueue) -> None:
    one, plain = keyed("one"), pending("plain", dirty=True)
    with failing(database, "do_commit", connection_lost(database), after=True):
        await accepted(writer, one, plain)
    assert one.existing is None
    assert list(await database.read(states)) == ["one", "plain"]


@only_postgresql
@pytest.mark.parametrize("is_done", [False, True])
async def test_acceptance_whose_commit_is_in_doubt_is_looked_for_by_the_next_try(
    database: Database, writer: WriteQueue, is_done: bool
) -> None:
    """What is there is accepted; what is not, for sure, is refused where the next commit is."""
    again, one = keyed("again"), pending("one")
    await accepted(writer, keyed("before"))
    with failing(database, "do_commit", connection_lost(database), after=is_done):
        writer.append(again)
        writer.append(one)
        await asyncio.gather(again.committed, one.committed)
    assert list(await database.read(states)) == ["before", "one"]
    two = pending("two")
    with (
        failing(database, "do_commit", connection_lost(database), full(database)),
        pytest.raises(StoreUnavailable, match="full") as caught,
    ):
        await accepted(writer, two)
    assert not isinstance(caught.value, StoreUnsure)
    assert list(await database.read(states)) == ["before", "one"]


# trouble


async def test_event_that_the_engine_refuses_fails_alone(database: Database, writer: WriteQueue) -> None:
    one, poison, two = pending("one"), pending("poison", row={"room_id": None}), pending("two")
    async with busy(database):
        for each in (one, poison, two):
            writer.append(each)
    done = await asyncio.gather(one.committed, poison.committed, two.committed, return_exceptions=True)
    assert [type(result) for result in done] == [type(None), StoreUnavailable, type(None)]
    assert list(await database.read(states)) == ["one", "two"]


async def test_acceptance_that_cannot_be_written_is_told_and_leaves_nothing(
    database: Database, writer: WriteQueue
) -> None:
    one = pending("one", dirty=True)
    with failing(database, "do_commit", *[RuntimeError("no more")] * 10), pytest.raises(StoreUnavailable):
        await accepted(writer, one)
    await accepted(writer, pending("two"))
    assert list(await database.read(states)) == ["two"]
    assert await database.read(lambda c: list(c.execute(select(lanes)))) == []


async def test_outcome_is_never_given_up(database: Database, writer: WriteQueue) -> None:
    fence = await held(database)
    one = pending("one")
    await accepted(writer, one)
    with failing(database, "do_commit", *[RuntimeError("no more")] * 6) as calls:
        writer.settle(end(one, event_id="$one"), fence)
        writer.doubt(fence, 3.0)
        writer.remember(test_accounts.account("alice", "token"))
        await until(lambda: len(calls) >= 3)
        assert writer.unwritten == {"one"}
        await until(lambda: len(calls) >= 7)
    await until(lambda: not writer.unwritten)
    assert (await database.read(states))["one"] == "sent"
    assert (await database.read(lane)).uncertain_since == 3_000
    assert await database.read(lambda c: accounts.by_token(c, "token"))


async def test_journal_that_is_full_takes_nothing_more_and_loses_nothing(database: Database) -> None:
    writer = WriteQueue(database, max_waiting=2)
    async with busy(database):
        one, two = pending("one"), pending("two")
        writer.append(one)
        writer.append(two)
        with pytest.raises(StoreFull):
            writer.append(pending("too much"))
    await asyncio.gather(one.committed, two.committed)
    await accepted(writer, pending("later"))
    assert list(await database.read(states)) == ["one", "two", "later"]


async def test_row_of_a_pending_delivery_is_what_these_tests_insert() -> None:
    assert set(pending("one").values()) == set(event())
