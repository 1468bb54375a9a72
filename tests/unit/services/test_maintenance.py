"""flowbridge.services.maintenance: what is forgotten, and when; and that no trouble ends it."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Connection, insert, select, update

from flowbridge.auth.api_keys import ApiKeys
from flowbridge.delivery.backpressure import used_bytes
from flowbridge.models.hooks import Hook
from flowbridge.models.timing import Timing
from flowbridge.services.maintenance import LOGGED, Maintenance
from flowbridge.settings import Settings
from flowbridge.store import delivery_log, hooks, refused, retention, tables
from flowbridge.store.accounts import account_of
from flowbridge.store.clock import now_ms
from flowbridge.store.delivery_log import Selection
from tests.integration.store.test_refused import call
from tests.rig import (
    ALICE,
    BOB,
    PATIENCE,
    PLENTY,
    Rig,
    Rooms,
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
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Rig(f"sqlite:///{tmp_path}/flowbridge.db", Rooms()) as rig:
        yield rig


QUICK = Timing(
    count_seconds=0.01,
    purge_seconds=0.01,
    give_up_seconds=0.01,
    forget_seconds=0.01,
    upkeep_retry_seconds=0.01,
    key_refresh_seconds=0.01,
    refused_seconds=0.01,
)


@contextlib.asynccontextmanager
async def running(
    rig: Rig,
    callers: FakeCallers | None = None,
    *,
    timing: Timing = QUICK,
    count_share: int = 0,
    flush_refused: Callable[[], Awaitable[None]] | None = None,
    beside: Sequence[tuple[Callable[[], Awaitable[None]], float]] = (),
    **values: Any,
) -> AsyncIterator[None]:
    """Maintenance at work, over and over."""
    keep = Maintenance(
        Settings.load(**values),
        rig.database,
        rig.backpressure,
        cast("ApiKeys", callers or FakeCallers()),
        rig.worker,
        flush_refused=flush_refused,
        beside=beside,
        timing=timing,
        count_share=count_share,
        give_up_lanes=2,
    )
    task = asyncio.create_task(keep.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rounds(rig: Rig, callers: FakeCallers, number: int = 3) -> None:
    """Until everything has had its turn so often."""
    seen = callers.refreshed
    await until(lambda: callers.refreshed >= seen + number)
    await rig.database.run(lambda connection: None)


async def put(rig: Rig, name: str, **values: Any) -> None:
    row = {**rig.pending("a").values(), "delivery": name, **values}
    await rig.database.run(lambda connection: connection.execute(insert(tables.outbox), [row]))


def names(rig: Rig) -> set[str]:
    return set(rig.rows("delivery"))


async def test_settled_events_go_after_thirty_days(rig: Rig) -> None:
    now = now_ms()
    await put(rig, "queued", accepted_at=now - 6 * DAY)
    await put(rig, "sent", state="sent", settled_at=now - 30 * DAY + HOUR)
    await put(rig, "sent long ago", state="sent", settled_at=now - 30 * DAY - HOUR)
    await put(rig, "dead", state="dead", settled_at=now - 29 * DAY)
    await put(rig, "dead long ago", state="dead", settled_at=now - 31 * DAY)
    async with running(rig):
        await until(lambda: names(rig) == {"queued", "sent", "dead"})


async def test_retention_is_a_setting(rig: Rig) -> None:
    now = now_ms()
    await put(rig, "queued", accepted_at=now - 6 * DAY)
    await put(rig, "sent", state="sent", settled_at=now - 1)
    await put(rig, "dead", state="dead", settled_at=now - 2 * DAY)
    async with running(rig, keep_sent_hours=0, keep_dead_days=1):
        await until(lambda: names(rig) == {"queued"})


async def test_retention_is_a_setting_in_days(rig: Rig) -> None:
    now = now_ms()
    await put(rig, "new", state="sent", settled_at=now - HOUR)
    await put(rig, "old", state="sent", settled_at=now - 3 * HOUR)
    async with running(rig, keep_sent_days=2 / 24):
        await until(lambda: names(rig) == {"new"})


async def test_contents_go_before_their_events(rig: Rig) -> None:
    now = now_ms()
    await put(rig, "new", state="sent", settled_at=now - HOUR)
    await put(rig, "old", state="sent", settled_at=now - 2 * DAY, request="as it came")
    await put(rig, "dead", state="dead", settled_at=now - 2 * DAY)
    await put(rig, "queued", accepted_at=now - 2 * DAY)
    async with running(rig, keep_content_days=1):
        await until(lambda: "" in rig.rows("content"))
        assert names(rig) == {"new", "old", "dead", "queued"}
        await put(rig, "late", state="sent", settled_at=now - DAY - HOUR)
        await until(lambda: rig.rows("content").count("") == 2)
    kept = {
        row["delivery"]
        for name in names(rig)
        if (row := await rig.database.read(partial(delivery_log.get, delivery=name))) and row["content"]
    }
    assert kept == {"new", "dead", "queued"}
    old = await rig.database.read(partial(delivery_log.get, delivery="old"))
    assert old is not None
    assert (old["content"], old["request"]) == ("", None)


def shortened(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.msg == "log_shortened"]  # type: ignore[attr-defined]


async def test_log_holds_so_many_sent_events_and_those_of_the_last_day(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    now = now_ms()
    for days in range(10):
        await put(rig, f"{days}", state="sent", settled_at=now - days * DAY - HOUR)
    await put(rig, "dead", state="dead", settled_at=now - 20 * DAY)
    await put(rig, "queued", accepted_at=now - 6 * DAY)
    callers = FakeCallers()
    async with running(rig, callers, max_sent=4):
        await until(lambda: names(rig) == {"0", "1", "2", "3", "dead", "queued"})
        await until(lambda: bool(shortened(caplog)))
        await put(rig, "more", state="sent", settled_at=now - 8 * DAY)
        await until(lambda: "more" not in names(rig))
        await rounds(rig, callers)
    (line,) = shortened(caplog)  # not each minute
    assert line["hint"].startswith("FLOWBRIDGE_MAX_DATABASE_BYTES or FLOWBRIDGE_MAX_SENT allow no more")
    assert line["days"] == 3.0
    async with running(rig, max_sent=0):
        await until(lambda: names(rig) == {"0", "dead", "queued"})


async def test_log_takes_a_part_of_the_bytes_and_leaves_the_last_day(empty_url: str) -> None:
    now = now_ms()
    async with Rig(empty_url, Rooms()) as rig:
        body = {"content": secrets.token_hex(5_000), "state": "sent"}  # which PostgreSQL cannot compress
        for number in range(100):
            await put(rig, f"old-{number:02}", settled_at=now - 2 * DAY + number, **body)
            await put(rig, f"new-{number:02}", settled_at=now - HOUR + number, **body)
        with rig.database.engine.connect() as connection:
            used = used_bytes(connection, 0)
    bound = int(used * 0.75 / LOGGED)
    new = {f"new-{number:02}" for number in range(100)}
    async with Rig(empty_url, Rooms(), limits=replace(PLENTY, database_bytes=bound)) as rig:
        await rig.backpressure.refresh()
        async with running(rig, max_database_bytes=bound):
            await until(lambda: len(names(rig)) < 180)
            await asyncio.sleep(0.1)
            left = names(rig)
    assert new <= left
    assert "old-99" in left, "the oldest go, and no more than have to"
    assert "old-00" not in left
    bound = int(used / 0.85)  # not so little that the last day would have to give way
    async with Rig(empty_url, Rooms(), limits=replace(PLENTY, database_bytes=bound)) as rig:
        await rig.backpressure.refresh()
        async with running(rig, max_database_bytes=bound):
            await until(lambda: names(rig) == new)


async def test_refused_calls_are_written_and_go_with_sent_events(rig: Rig) -> None:
    now, flushed = now_ms(), 0

    async def flush() -> None:
        nonlocal flushed
        flushed += 1

    old = call("old", refused_at=now - 40 * DAY, last_at=now - 31 * DAY)
    new = call("new", refused_at=now - 40 * DAY, last_at=now - 29 * DAY)
    await rig.database.run(lambda connection: refused.write(connection, [old, new], []))
    look = partial(refused.page, selection=Selection(), limit=9)
    callers = FakeCallers()
    async with running(rig, callers, flush_refused=flush):
        await until(lambda: flushed > 2)
        await rounds(rig, callers)
        assert [row["delivery"] for row in await rig.database.read(look)] == ["refused-new"]


async def test_secrets_and_requests_of_hooks_go_at_their_time(rig: Rig) -> None:
    now = now_ms()

    def put_hooks(connection: Connection) -> None:
        hooks.add(connection, Hook("ci", "!room:hs"), hooks.NewSecret("old"), now)
        hooks.rotate(connection, "ci", hooks.NewSecret("new"), now, now - 1)
        hooks.rotate(connection, "file", hooks.NewSecret("ended"), now, now)
        hooks.rotate(connection, "file", hooks.NewSecret("newest"), now, now + 1)
        rows = [
            {"hook": "ci", "received_at": now - days * DAY, "request": f"{days}", "outcome": "{}"} for days in (31, 29)
        ]
        hooks.keep(connection, rows, {"ci": 20})

    def holding() -> set[str]:
        with rig.database.reading() as connection:
            return {each.hash for each in hooks.secrets(connection, 0)}

    await rig.database.run(put_hooks)
    callers = FakeCallers()
    async with running(rig, callers):
        await until(lambda: holding() == {"new", "newest"})
        await rounds(rig, callers)
        requests = await rig.database.read(partial(hooks.requests, name="ci"))
        assert [each["request"] for each in requests] == ["29"]


async def test_other_recurring_work_is_done_beside(rig: Rig) -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    async with running(rig, beside=[(work, 0.01)]):
        await asyncio.wait_for(done.wait(), PATIENCE)


@pytest.mark.parametrize("why", ["retention", "space"])
async def test_what_a_lane_in_doubt_has_sent_is_known_when_it_is_gone(rig: Rig, why: str) -> None:
    """By it the doubtful event is told from an equal one that the room holds (design, rule 5)."""
    rooms = rig.rooms
    callers = FakeCallers()
    rooms.then(lose, *[refuse_connection] * 3, slow(60_000), room=OTHER)
    await rig.send("alarm")
    await rig.accept("alarm", OTHER)
    await until(lambda: rig.lane(OTHER) and rig.lane(OTHER).uncertain_since)
    lane = rig.lane(OTHER).lane
    await put(rig, "equal", lane=lane, state="sent", event_id="$0", settled_at=now_ms())
    settings: dict[str, Any] = {"keep_sent_hours": 0} if why == "retention" else {"max_database_bytes": 1_000}
    async with running(rig, callers, **settings):
        await until(lambda: rig.states() == ["queued"])
        await rounds(rig, callers)
        known = await rig.database.read(lambda connection: retention.sent_before(connection, lane, 0, ["$0", "$1"]))
        assert known == {"$0"}
    await rig.crash()


async def test_ids_that_tell_nothing_any_more_are_forgotten(rig: Rig) -> None:
    old = {"event_id": "$0", "lane": "lane", "settled_at": 1}
    await rig.database.run(lambda connection: connection.execute(insert(tables.gone).values(old)))
    async with running(rig):
        await until(lambda: not gone_ids(rig))


def gone_ids(rig: Rig) -> list[Any]:
    with rig.database.engine.connect().execution_options(reads=True) as connection:
        return list(connection.execute(select(tables.gone)))


async def test_sent_events_go_early_when_the_space_is_needed_and_nothing_else_does(rig: Rig) -> None:
    now = now_ms()
    for number in range(50):
        await put(rig, f"sent-{number}", state="sent", settled_at=now - number)
    await put(rig, "queued")
    await put(rig, "dead", state="dead", settled_at=now)
    async with running(rig, max_database_bytes=10_000):
        await until(lambda: names(rig) == {"queued", "dead"})
    await rig.backpressure.refresh()
    async with running(rig, max_database_bytes=int(rig.backpressure.used_bytes / 0.9) + 10_000):
        await put(rig, "sent", state="sent", settled_at=now)
        await asyncio.sleep(0.05)
        assert "sent" in names(rig)


async def test_much_goes_in_pieces(rig: Rig) -> None:
    rows = [{**rig.pending("a").values(), "state": "sent", "settled_at": 1} for _ in range(5_100)]
    await rig.database.run(lambda connection: connection.execute(insert(tables.outbox), rows))
    async with running(rig):
        await until(lambda: len(rig.rows("id")) == 100)
        await until(lambda: rig.rows("id") == [])


async def test_idle_lanes_and_tokens_are_forgotten_and_those_in_use_are_not(rig: Rig) -> None:
    timing = replace(QUICK, token_idle_seconds=-1.0)  # all have been seen longer ago than that
    rig.rooms.script(lambda sent: slow(60_000) if sent.token == ALICE.token else None)
    await rig.accept("a")
    await rig.accept("b", caller=BOB)
    await rig.settled(1)
    async with running(rig, timing=timing):
        await until(lambda: tokens(rig)[rig.tokens.remember(BOB)] is None)
        assert tokens(rig)[rig.tokens.remember(ALICE)] is not None
        assert rig.lane(caller=BOB) is not None  # its owner still holds it
        await rig.worker.stop()
        await until(lambda: rig.lane(caller=BOB) is None)
        assert rig.lane() is not None


def tokens(rig: Rig) -> dict[str, str | None]:
    with rig.database.engine.connect().execution_options(reads=True) as connection:
        found = connection.execute(select(tables.tokens.c.account, tables.tokens.c.token))
        return {row.account: row.token for row in found}


async def test_counts_are_refreshed(rig: Rig) -> None:
    async with running(rig):
        await put(rig, "queued")
        await put(rig, "dead", state="dead", settled_at=now_ms())
        await until(lambda: (rig.backpressure.queued, rig.backpressure.dead) == (1, 1))


@pytest.mark.parametrize("trouble", [RuntimeError(), RuntimeError("two\nlines"), AssertionError()])
async def test_no_trouble_ends_it(rig: Rig, monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    """Also such as says nothing of itself."""
    callers, work = FakeCallers(), retention.purge

    def fail(*_: Any, **__: Any) -> int:
        raise trouble

    callers.broken = trouble
    monkeypatch.setattr(retention, "purge", fail)
    await put(rig, "sent", state="sent", settled_at=1)
    async with running(rig, callers):
        await until(lambda: callers.refreshed >= 3)
        assert names(rig) == {"sent"}
        monkeypatch.setattr(retention, "purge", work)
        callers.broken = None
        await until(lambda: names(rig) == set())


async def test_new_keys_are_learnt_while_other_work_takes_long(rig: Rig) -> None:
    """A revoked key must not be good for as long as a purge takes."""
    callers = FakeCallers()
    with rig.busy_writer():
        async with running(rig, callers):
            await until(lambda: callers.refreshed >= 5)


async def test_pace_of_counting_is_a_share_of_what_it_costs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    callers, counted = FakeCallers(), 0

    async def slowly() -> float:
        nonlocal counted
        counted += 1
        return 2.0

    monkeypatch.setattr(rig.backpressure, "refresh", slowly)
    async with running(rig, callers, count_share=50):
        await until(lambda: counted > 0)
        await rounds(rig, callers, 5)
    assert counted == 1, "the next is 100 s later"


async def test_what_the_core_has_just_counted_is_not_counted_again_at_once(rig: Rig) -> None:
    """An event that comes while it is counted may be counted twice: at the start nearly every first one would be."""
    callers = FakeCallers()
    async with running(rig, callers, timing=replace(QUICK, count_seconds=60.0)):
        await put(rig, "of another process")
        await rounds(rig, callers)
    assert rig.backpressure.queued == 0
    await rig.backpressure.refresh()
    assert rig.backpressure.queued == 1


# what was not delivered in time


def told(rig: Rig) -> dict[str, str]:
    """What the dead letters say."""
    found = rig.rows("delivery", "state", "error")
    return {delivery: json.loads(error)["error"] for delivery, state, error in found if state == "dead"}


def aged(rig: Rig, days: float) -> "asyncio.Future[Any]":
    """As if all that is queued had been so for this much longer."""
    ms = int(days * DAY)
    return rig.database.run(
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
async def test_event_is_dead_after_seven_days_in_whatever_state_its_account_or_room_is(rig: Rig, name: str) -> None:
    """429 for ever, a token that is refused, a homeserver that is away: no attempt is the last one."""
    behaviour, reason = STUCK[name]
    rooms = rig.rooms
    rooms.joined = False
    rooms.version = unreachable()
    rooms.always(behaviour)
    for body in ("a", "b"):
        await rig.accept(body)
    await until(lambda: rooms.sends)
    await aged(rig, 7.1)
    await rig.accept("young")
    first, second, young = rig.rows("delivery")
    async with running(rig):
        await until(lambda: set(told(rig)) == {first, second})
        assert told(rig)[first].startswith("it was not delivered within 7 days: ")
        assert reason in told(rig)[first]
        assert rig.states()[2] == "queued"
        rooms.always(None)
        rooms.version = None
        rig.account_limits.trust(rig.tokens.remember(ALICE))
        rig.breaker.limiter.open()
        for caller in (ALICE, BOB):
            rig.account_limits.limiter(account_of(caller.user_id)).open()
    await rig.database.run(lambda connection: connection.execute(update(tables.lanes).values(lease_until=0)))
    rig.worker.wake()
    await until(lambda: rooms.bodies() == ["young"])
    assert young not in told(rig)


async def test_event_that_nothing_holds_and_no_lane_knows_dies_too(rig: Rig) -> None:
    await put(rig, "never claimed", accepted_at=now_ms() - 8 * DAY)
    async with running(rig):
        await until(lambda: told(rig))
    assert told(rig)["never claimed"] == "it was not delivered within 7 days: its turn did not come"


async def test_days_are_a_setting(rig: Rig) -> None:
    await put(rig, "old", accepted_at=now_ms() - 2 * DAY)
    async with running(rig, keep_queued_days=3):
        await asyncio.sleep(0.1)
        assert rig.states() == ["queued"]
    async with running(rig, keep_queued_days=1):
        await until(lambda: rig.states() == ["dead"])


async def test_event_that_is_on_its_way_is_sent_and_not_dead(rig: Rig) -> None:
    """Its 200 comes in after it became too old: that counts."""
    answered, callers = asyncio.Event(), FakeCallers()
    rig.rooms.then(after(answered))
    await rig.accept("a")
    await rig.accept("b")
    await until(lambda: rig.lane() and rig.worker.lanes()["sending"])
    await aged(rig, 8)
    async with running(rig, callers):
        await rounds(rig, callers, 10)
        assert rig.states() == ["queued", "queued"]
        answered.set()
        await rig.settled()
    assert rig.states()[0] == "sent"
    assert rig.rooms.bodies()[0] == "a"


async def test_caller_who_waits_hears_of_it(rig: Rig) -> None:
    rig.rooms.always(slow(600_000))
    waiting = asyncio.ensure_future(rig.send("a"))
    await until(lambda: rig.rooms.sends and rig.states())
    await aged(rig, 8)
    async with running(rig):
        outcome = await soon(waiting)
    assert outcome.state == "dead"
    assert outcome.error["status"] == 504
    assert rig.backpressure.queued == 0


async def test_lane_of_another_replica_is_left_to_it(rig: Rig) -> None:
    """It may be sending at this moment; each replica does this for what it holds."""
    callers = FakeCallers()
    await put(rig, "theirs", accepted_at=now_ms() - 8 * DAY)
    lane = rig.pending("a").row
    held = {
        "lane": lane.lane,
        "account": lane.account,
        "owner": "other",
        "fence": 3,
        "lease_until": now_ms() + HOUR,
        "sent_with": "",
    }
    await rig.database.run(lambda connection: connection.execute(insert(tables.lanes), [held]))
    async with running(rig, callers):
        await rounds(rig, callers, 10)
        assert rig.states() == ["queued"]
        long_ago = {"lease_until": now_ms() - 2 * HOUR}
        await rig.worker.stop()  # no worker takes it over, as with an account that is paused
        await rig.database.run(lambda connection: connection.execute(update(tables.lanes).values(**long_ago)))
        await until(lambda: told(rig))
    assert told(rig)["theirs"].endswith("it may be in the room all the same")


async def test_outcome_that_the_store_has_not_taken_so_far_is_not_overwritten(rig: Rig) -> None:
    callers = FakeCallers()
    await put(rig, "sent already", accepted_at=now_ms() - 8 * DAY)
    rig.write_queue.unwritten.add("sent already")
    async with running(rig, callers):
        await rounds(rig, callers, 10)
        assert rig.states() == ["queued"]


async def test_many_go_in_pieces_and_lanes_that_are_young_stay(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowbridge.store.abandoned.LOOK_LANES", 3)
    monkeypatch.setattr("flowbridge.store.abandoned.EVENTS", 2)
    await rig.worker.stop()
    for number in range(10):
        for age in (8, 9 if number % 2 else 1):
            pending = rig.pending("a", f"!room-{number}:hs")
            values = {**pending.values(), "accepted_at": now_ms() - age * DAY}
            await rig.database.run(
                lambda connection, row=values: connection.execute(insert(tables.outbox), [row])  # type: ignore[misc]
            )
    await rig.backpressure.refresh()
    async with running(rig):
        await until(lambda: rig.states().count("dead") == 15)
    assert rig.states().count("queued") == 5
