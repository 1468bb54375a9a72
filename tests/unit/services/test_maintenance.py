"""flowbridge.services.maintenance: what is forgotten, and when; and that no trouble ends it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import insert, select, update

from flowbridge.auth.callers import Callers
from flowbridge.services import maintenance as module
from flowbridge.services.maintenance import Maintenance
from flowbridge.settings import Settings
from flowbridge.store import retention, tables
from flowbridge.store.clock import now_ms
from tests.worker import (
    ALICE,
    BOB,
    Rooms,
    Worker,
    after,
    error,
    lose,
    refuse_connection,
    slow,
    soon,
    unreachable,
    until,
)

HOUR = 3_600_000
DAY = 24 * HOUR
OTHER = "!other:hs"

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeCallers:
    """Counts how often it is asked to learn of new keys; `broken`: it cannot."""

    def __init__(self) -> None:
        self.refreshed = 0
        self.broken: Exception | None = None

    async def refresh(self) -> None:
        self.refreshed += 1
        if self.broken:
            raise self.broken


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    async with Worker(f"sqlite:///{tmp_path}/flowbridge.db", Rooms()) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COUNT", "PURGE", "GIVE_UP", "IDLE", "AGAIN", "REFRESH"):
        monkeypatch.setattr(module, f"{name}_SECONDS", 0.01)
    monkeypatch.setattr(module, "COUNT_SHARE", 0)


@contextlib.asynccontextmanager
async def running(worker: Worker, callers: FakeCallers | None = None, **values: Any) -> AsyncIterator[None]:
    """Maintenance at work, over and over."""
    known = cast("Callers", callers or FakeCallers())
    keep = Maintenance(Settings.load(**values), worker.database, worker.backpressure, known, worker.courier)
    task = asyncio.create_task(keep.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rounds(worker: Worker, callers: FakeCallers, number: int = 3) -> None:
    """Until everything has had its turn so often."""
    seen = callers.refreshed
    await until(lambda: callers.refreshed >= seen + number)
    await worker.database.run(lambda connection: None)


async def put(worker: Worker, name: str, **values: Any) -> None:
    row = {**worker.ticket("a").values(), "delivery": name, **values}
    await worker.database.run(lambda connection: connection.execute(insert(tables.outbox), [row]))


def names(worker: Worker) -> set[str]:
    return set(worker.rows("delivery"))


async def test_sent_events_go_after_a_day_and_dead_ones_after_thirty(worker: Worker) -> None:
    now = now_ms()
    await put(worker, "queued", accepted_at=now - 6 * DAY)
    await put(worker, "sent", state="sent", settled_at=now - DAY + HOUR)
    await put(worker, "sent long ago", state="sent", settled_at=now - DAY - HOUR)
    await put(worker, "dead", state="dead", settled_at=now - 29 * DAY)
    await put(worker, "dead long ago", state="dead", settled_at=now - 31 * DAY)
    async with running(worker):
        await until(lambda: names(worker) == {"queued", "sent", "dead"})


async def test_retention_is_a_setting(worker: Worker) -> None:
    now = now_ms()
    await put(worker, "queued", accepted_at=now - 6 * DAY)
    await put(worker, "sent", state="sent", settled_at=now - 1)
    await put(worker, "dead", state="dead", settled_at=now - 2 * DAY)
    async with running(worker, keep_sent_hours=0, keep_dead_days=1):
        await until(lambda: names(worker) == {"queued"})


@pytest.mark.parametrize("why", ["retention", "space"])
async def test_what_a_lane_in_doubt_has_sent_is_known_when_it_is_gone(worker: Worker, why: str) -> None:
    """By it the doubtful event is told from an equal one that the room holds (design, rule 5)."""
    rooms = worker.rooms
    callers = FakeCallers()
    rooms.then(lose, *[refuse_connection] * 3, slow(60_000), room=OTHER)
    await worker.send("alarm")
    await worker.accept("alarm", OTHER)
    await until(lambda: worker.lane(OTHER) and worker.lane(OTHER).uncertain_since)
    lane = worker.lane(OTHER).lane
    await put(worker, "equal", lane=lane, state="sent", event_id="$0", settled_at=now_ms())
    settings = {"keep_sent_hours": 0} if why == "retention" else {"max_database_bytes": 1_000}
    async with running(worker, callers, **settings):
        await until(lambda: worker.states() == ["queued"])
        await rounds(worker, callers)
        known = await worker.database.read(lambda connection: retention.sent_before(connection, lane, 0, ["$0", "$1"]))
        assert known == {"$0"}
    await worker.crash()


async def test_ids_that_tell_nothing_any_more_are_forgotten(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.02)
    old = {"event_id": "$0", "lane": "lane", "settled_at": 1}
    await worker.database.run(lambda connection: connection.execute(insert(tables.gone).values(old)))
    async with running(worker):
        await until(lambda: not worker.database._read(lambda connection: connection.execute(select(tables.gone)).all()))


async def test_sent_events_go_early_when_the_space_is_needed_and_nothing_else_does(worker: Worker) -> None:
    now = now_ms()
    for number in range(50):
        await put(worker, f"sent-{number}", state="sent", settled_at=now - number)
    await put(worker, "queued")
    await put(worker, "dead", state="dead", settled_at=now)
    async with running(worker, max_database_bytes=10_000):
        await until(lambda: names(worker) == {"queued", "dead"})
    await worker.backpressure.refresh()
    async with running(worker, max_database_bytes=int(worker.backpressure.used_bytes / 0.9) + 10_000):
        await put(worker, "sent", state="sent", settled_at=now)
        await asyncio.sleep(0.05)
        assert "sent" in names(worker)


async def test_much_goes_in_pieces(worker: Worker) -> None:
    rows = [{**worker.ticket("a").values(), "state": "sent", "settled_at": 1} for _ in range(5_100)]
    await worker.database.run(lambda connection: connection.execute(insert(tables.outbox), rows))
    async with running(worker):
        await until(lambda: len(worker.rows("id")) == 100)
        await until(lambda: worker.rows("id") == [])


async def test_idle_lanes_and_tokens_are_forgotten_and_those_in_use_are_not(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)  # all have been seen longer ago than that
    worker.rooms.script(lambda sent: slow(60_000) if sent.token == ALICE.token else None)
    await worker.accept("a")
    await worker.accept("b", caller=BOB)
    await worker.settled(1)
    async with running(worker):
        await until(lambda: tokens(worker)[worker.tokens.remember(BOB)] is None)
        assert tokens(worker)[worker.tokens.remember(ALICE)] is not None
        assert worker.lane(caller=BOB) is not None  # its owner still holds it
        await worker.courier.stop()
        await until(lambda: worker.lane(caller=BOB) is None)
        assert worker.lane() is not None


def tokens(worker: Worker) -> dict[str, str | None]:
    with worker.database.engine.connect().execution_options(reads=True) as connection:
        found = connection.execute(select(tables.tokens.c.account, tables.tokens.c.token))
        return {row.account: row.token for row in found}


async def test_counts_are_refreshed(worker: Worker) -> None:
    async with running(worker):
        await put(worker, "queued")
        await put(worker, "dead", state="dead", settled_at=now_ms())
        await until(lambda: (worker.backpressure.queued, worker.backpressure.dead) == (1, 1))


@pytest.mark.parametrize("trouble", [RuntimeError(), RuntimeError("two\nlines"), AssertionError()])
async def test_no_trouble_ends_it(worker: Worker, monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    """Also such as says nothing of itself."""
    callers, work = FakeCallers(), retention.purge

    def fail(*_: Any, **__: Any) -> int:
        raise trouble

    callers.broken = trouble
    monkeypatch.setattr(retention, "purge", fail)
    await put(worker, "sent", state="sent", settled_at=1)
    async with running(worker, callers):
        await until(lambda: callers.refreshed >= 3)
        assert names(worker) == {"sent"}
        monkeypatch.setattr(retention, "purge", work)
        callers.broken = None
        await until(lambda: names(worker) == set())


async def test_new_keys_are_learnt_while_other_work_takes_long(worker: Worker) -> None:
    """A revoked key must not be good for as long as a purge takes."""
    callers = FakeCallers()
    with worker.busy_writer():
        async with running(worker, callers):
            await until(lambda: callers.refreshed >= 5)


async def test_pace_of_counting_is_a_share_of_what_it_costs(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT_SHARE", 50)
    keep: Callable[..., Any] = Maintenance(
        Settings.load(), worker.database, worker.backpressure, cast("Callers", FakeCallers()), worker.courier
    )._count

    async def slowly() -> float:
        return 2.0

    monkeypatch.setattr(worker.backpressure, "refresh", slowly)
    assert await keep() == 100.0


async def test_what_the_core_has_just_counted_is_not_counted_again_at_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that comes while it is counted may be counted twice: at the start nearly every first one would be."""
    monkeypatch.setattr(module, "COUNT_SECONDS", 60.0)
    callers = FakeCallers()
    async with running(worker, callers):
        await put(worker, "of another process")
        await rounds(worker, callers)
    assert worker.backpressure.queued == 0
    await worker.backpressure.refresh()
    assert worker.backpressure.queued == 1


# what was not delivered in time


def told(worker: Worker) -> dict[str, str]:
    """What the dead letters say."""
    found = worker.rows("delivery", "state", "error")
    return {delivery: json.loads(error)["error"] for delivery, state, error in found if state == "dead"}


def aged(worker: Worker, days: float) -> "asyncio.Future[Any]":
    """As if all that is queued had been so for this much longer."""
    ms = int(days * DAY)
    return worker.database.run(
        lambda connection: connection.execute(
            update(tables.outbox).values(accepted_at=tables.outbox.c.accepted_at - ms)
        )
    )


STUCK = {
    "limited": (slow(600_000), "no"),
    "token": (error(401, "M_UNKNOWN_TOKEN"), "no"),
    "away": (refuse_connection, "cannot connect"),
    "broken": (error(500, "M_UNKNOWN"), "no"),
    "absent": (error(403, "M_FORBIDDEN"), "no"),
}


@pytest.mark.parametrize("name", STUCK)
async def test_event_is_dead_after_seven_days_in_whatever_state_its_account_or_room_is(
    worker: Worker, name: str
) -> None:
    """429 for ever, a token that is refused, a homeserver that is away: no attempt is the last one."""
    behaviour, reason = STUCK[name]
    rooms = worker.rooms
    rooms.joined = False
    rooms.version = unreachable()
    rooms.always(behaviour)
    for body in ("a", "b"):
        await worker.accept(body)
    await until(lambda: rooms.sends)
    await aged(worker, 7.1)
    await worker.accept("young")
    first, second, young = worker.rows("delivery")
    async with running(worker):
        await until(lambda: set(told(worker)) == {first, second})
        assert told(worker)[first].startswith("it was not delivered within 7 days: ")
        assert reason in told(worker)[first]
        assert worker.states()[2] == "queued"
        rooms.always(None)
        rooms.version = None
        worker.carrier.trust(worker.tokens.remember(ALICE))
        for gate in (worker.carrier._everyone, *worker.carrier._limiters.values()):
            gate._closed_until = 0.0
    await worker.database.run(lambda connection: connection.execute(update(tables.lanes).values(lease_until=0)))
    worker.courier.wake()
    await until(lambda: rooms.bodies() == ["young"])
    assert young not in told(worker)


async def test_event_that_nothing_holds_and_no_lane_knows_dies_too(worker: Worker) -> None:
    await put(worker, "never claimed", accepted_at=now_ms() - 8 * DAY)
    async with running(worker):
        await until(lambda: told(worker))
    assert told(worker)["never claimed"] == "it was not delivered within 7 days: its turn did not come"


async def test_days_are_a_setting(worker: Worker) -> None:
    await put(worker, "old", accepted_at=now_ms() - 2 * DAY)
    async with running(worker, keep_queued_days=3):
        await asyncio.sleep(0.1)
        assert worker.states() == ["queued"]
    async with running(worker, keep_queued_days=1):
        await until(lambda: worker.states() == ["dead"])


async def test_event_that_is_on_its_way_is_sent_and_not_dead(worker: Worker) -> None:
    """Its 200 comes in after it became too old: that counts."""
    answered, callers = asyncio.Event(), FakeCallers()
    worker.rooms.then(after(answered))
    await worker.accept("a")
    await worker.accept("b")
    await until(lambda: worker.lane() and worker.courier.lanes()["sending"])
    await aged(worker, 8)
    async with running(worker, callers):
        await rounds(worker, callers, 10)
        assert worker.states() == ["queued", "queued"]
        answered.set()
        await worker.settled()
    assert worker.states()[0] == "sent"
    assert worker.rooms.bodies()[0] == "a"


async def test_caller_who_waits_hears_of_it(worker: Worker) -> None:
    worker.rooms.always(slow(600_000))
    waiting = asyncio.ensure_future(worker.send("a"))
    await until(lambda: worker.rooms.sends and worker.states())
    await aged(worker, 8)
    async with running(worker):
        outcome = await soon(waiting)
    assert outcome.state == "dead"
    assert outcome.error["status"] == 504
    assert worker.backpressure.queued == 0


async def test_lane_of_another_replica_is_left_to_it(worker: Worker) -> None:
    """It may be sending at this moment; each replica does this for what it holds."""
    callers = FakeCallers()
    await put(worker, "theirs", accepted_at=now_ms() - 8 * DAY)
    lane = worker.ticket("a").row
    held = {
        "lane": lane.lane,
        "account": lane.account,
        "owner": "other",
        "fence": 3,
        "lease_until": now_ms() + HOUR,
        "sent_with": "",
    }
    await worker.database.run(lambda connection: connection.execute(insert(tables.lanes), [held]))
    async with running(worker, callers):
        await rounds(worker, callers, 10)
        assert worker.states() == ["queued"]
        long_ago = {"lease_until": now_ms() - 2 * HOUR}
        await worker.courier.stop()  # no worker takes it over, as with an account that is paused
        await worker.database.run(lambda connection: connection.execute(update(tables.lanes).values(**long_ago)))
        await until(lambda: told(worker))
    assert told(worker)["theirs"].endswith("it may be in the room all the same")


async def test_outcome_that_the_store_has_not_taken_so_far_is_not_overwritten(worker: Worker) -> None:
    callers = FakeCallers()
    await put(worker, "sent already", accepted_at=now_ms() - 8 * DAY)
    worker.write_queue.unwritten.add("sent already")
    async with running(worker, callers):
        await rounds(worker, callers, 10)
        assert worker.states() == ["queued"]


async def test_many_go_in_pieces_and_lanes_that_are_young_stay(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowbridge.store.abandoned.LOOK_LANES", 3)
    monkeypatch.setattr("flowbridge.store.abandoned.EVENTS", 2)
    monkeypatch.setattr(module, "GIVE_UP_LANES", 2)
    await worker.courier.stop()
    for number in range(10):
        for age in (8, 9 if number % 2 else 1):
            ticket = worker.ticket("a", f"!room-{number}:hs")
            values = {**ticket.values(), "accepted_at": now_ms() - age * DAY}
            await worker.database.run(
                lambda connection, row=values: connection.execute(insert(tables.outbox), [row])  # type: ignore[misc]
            )
    await worker.backpressure.refresh()
    async with running(worker):
        await until(lambda: worker.states().count("dead") == 15)
    assert worker.states().count("queued") == 5
