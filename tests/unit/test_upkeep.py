"""flowbridge.upkeep: what is forgotten, and when; and that no trouble ends it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import insert, select, update

from flowbridge import upkeep as module
from flowbridge.callers import Callers
from flowbridge.settings import Settings
from flowbridge.store import outbox, tables
from flowbridge.store.outbox import now_ms
from flowbridge.upkeep import Upkeep
from tests.worker import ALICE, BOB, Rooms, Worker, lose, refuse_connection, slow, until

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
    for name in ("COUNT_SECONDS", "PURGE_SECONDS", "IDLE_SECONDS", "AGAIN_SECONDS", "REFRESH_SECONDS"):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(module, "COUNT_SHARE", 0)


@contextlib.asynccontextmanager
async def running(worker: Worker, callers: FakeCallers | None = None, **values: Any) -> AsyncIterator[None]:
    """Upkeep at work, over and over."""
    keep = Upkeep(Settings.load(**values), worker.database, worker.stock, cast("Callers", callers or FakeCallers()))
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
    await put(worker, "queued", accepted_at=now - 90 * DAY)
    await put(worker, "sent", state="sent", settled_at=now - DAY + HOUR)
    await put(worker, "sent long ago", state="sent", settled_at=now - DAY - HOUR)
    await put(worker, "dead", state="dead", settled_at=now - 29 * DAY)
    await put(worker, "dead long ago", state="dead", settled_at=now - 31 * DAY)
    async with running(worker):
        await until(lambda: names(worker) == {"queued", "sent", "dead"})


async def test_retention_is_a_setting(worker: Worker) -> None:
    now = now_ms()
    await put(worker, "queued", accepted_at=0)
    await put(worker, "sent", state="sent", settled_at=now - 1)
    await put(worker, "dead", state="dead", settled_at=now - 2 * DAY)
    async with running(worker, keep_sent_hours=0, keep_dead_days=1):
        await until(lambda: names(worker) == {"queued"})


@pytest.mark.parametrize("why", ["retention", "space"])
async def test_what_a_lane_in_doubt_has_sent_stays(worker: Worker, why: str) -> None:
    """By it the doubtful event is told from an equal one that the room holds (design, rule 5)."""
    rooms = worker.rooms
    callers = FakeCallers()
    rooms.then(lose, *[refuse_connection] * 3, slow(60_000), room=OTHER)
    await worker.send("alarm")
    await worker.accept("alarm", OTHER)
    await until(lambda: worker.lane(OTHER) and worker.lane(OTHER).uncertain_since)
    lane = worker.lane(OTHER).lane
    await put(worker, "equal", lane=lane, state="sent", event_id="$0", settled_at=1)
    settings = {"keep_sent_hours": 0} if why == "retention" else {"max_database_bytes": 1_000}
    async with running(worker, callers, **settings):
        await until(lambda: len(worker.rows("delivery")) == 2)
        await rounds(worker, callers)
        assert "equal" in names(worker)
        await worker.database.run(
            lambda connection: connection.execute(update(tables.lanes).values(uncertain_since=None))
        )
        await until(lambda: "equal" not in names(worker))
    await worker.crash()


async def test_sent_events_go_early_when_the_space_is_needed_and_nothing_else_does(worker: Worker) -> None:
    now = now_ms()
    for number in range(50):
        await put(worker, f"sent-{number}", state="sent", settled_at=now - number)
    await put(worker, "queued")
    await put(worker, "dead", state="dead", settled_at=now)
    async with running(worker, max_database_bytes=10_000):
        await until(lambda: names(worker) == {"queued", "dead"})
    await worker.stock.refresh()
    async with running(worker, max_database_bytes=int(worker.stock.used_bytes / 0.9) + 10_000):
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
        await until(lambda: (worker.stock.queued, worker.stock.dead) == (1, 1))


@pytest.mark.parametrize("trouble", [RuntimeError(), RuntimeError("two\nlines"), AssertionError()])
async def test_no_trouble_ends_it(worker: Worker, monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    """Also such as says nothing of itself."""
    callers, work = FakeCallers(), outbox.purge

    def fail(*_: Any, **__: Any) -> int:
        raise trouble

    callers.broken = trouble
    monkeypatch.setattr(outbox, "purge", fail)
    await put(worker, "sent", state="sent", settled_at=1)
    async with running(worker, callers):
        await until(lambda: callers.refreshed >= 3)
        assert names(worker) == {"sent"}
        monkeypatch.setattr(outbox, "purge", work)
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
    keep: Callable[..., Any] = Upkeep(
        Settings.load(), worker.database, worker.stock, cast("Callers", FakeCallers())
    )._count

    async def slowly() -> float:
        return 2.0

    monkeypatch.setattr(worker.stock, "refresh", slowly)
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
    assert worker.stock.queued == 0
    await worker.stock.refresh()
    assert worker.stock.queued == 1
