"""flowbridge.services.deliveries: who sees which deliveries, pages of them, replays and deletions; on each engine."""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, update

from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery.waiting import Waiting
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.errors import (
    BadGateway,
    BadRequest,
    Forbidden,
    MatrixError,
    NotFound,
    Unauthorized,
    Unavailable,
    WrongState,
)
from flowbridge.models import ApiKey, Caller
from flowbridge.services import deliveries as service
from flowbridge.services import delivery_views
from flowbridge.services.deliveries import Deliveries, Viewer
from flowbridge.services.delivery_views import deliveries, detail, moment, states, summary
from flowbridge.services.replays import Replays
from flowbridge.store import Database, accounts, clock, delivery_log, outbox, refused
from flowbridge.store.delivery_log import Selection, TooSlow
from flowbridge.store.tables import outbox as events
from tests.integration.store import events as rows
from tests.integration.store.test_database import busy
from tests.integration.store.test_refused import call
from tests.patience import PATIENCE

T = TypeVar("T")

ROOM = "!room:hs"
ADMIN, ONE, TWO = ApiKey("root", admin=True), ApiKey("one"), ApiKey("two")
BOT = accounts.account_of("@bot:hs")
ALICE = accounts.account_of("@alice:hs")
DEAD: dict[str, Any] = {"state": "dead", "settled_at": 2_000, "error": '{"status": 403, "errcode": "M_FORBIDDEN"}'}


class FakeCallers:
    """Knows tokens like `alice/PHONE`, and nothing while the homeserver is away."""

    is_away = False

    async def identify(self, credential: Credential) -> Caller:
        if credential.key is not None:
            assert any(room[0] == "#" for room in credential.key.rooms), "no homeserver is asked for a key"
            return Caller("@bot:hs", "BRIDGE", "bot", bot=True, key=credential.key)
        if self.is_away or credential.token is None:
            raise Unauthorized("nobody can tell")
        name, _, device = credential.token.partition("/")
        return Caller(f"@{name}:hs", device, credential.token)


class FakeTokens:
    def remember(self, caller: Caller) -> str:
        return accounts.account_of(caller.user_id)


class FakeAliases:
    """Knows where each alias leads, or that nobody can tell."""

    def __init__(self) -> None:
        self.leads: dict[str, str | MatrixError] = {}

    async def scope(self, caller: Caller, key: ApiKey, *, strict: bool) -> frozenset[str]:
        assert strict
        found = [self.leads.get(room, room) for room in key.rooms]
        for trouble in found:
            if isinstance(trouble, MatrixError):
                raise trouble
        return frozenset(str(room) for room in found)


class FakeReplays:
    """Says of a state event what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.trouble: MatrixError | None = None
        self.asked: list[tuple[str, Caller | None]] = []

    async def check(self, row: Mapping[str, Any], caller: Caller | None) -> None:
        self.asked.append((row["delivery"], caller))
        if self.trouble is not None:
            raise self.trouble


async def nothing() -> None:
    """What happens while nothing happens."""


@dataclass
class Worker:
    """What the delivery log asks of the worker. `meanwhile` happens while it is asked to cancel."""

    cancels: bool = False
    meanwhile: Callable[[], Awaitable[None]] = nothing
    asked: list[str] = field(default_factory=list)
    woken: list[str] = field(default_factory=list)

    async def cancel(self, delivery: str) -> bool:
        self.asked.append(delivery)
        await self.meanwhile()
        return self.cancels

    def wake(self, lane: str) -> None:
        self.woken.append(lane)


@dataclass
class Log:
    """The delivery log over a real database."""

    database: Database
    callers: FakeCallers
    worker: Worker
    deliveries: Deliveries
    aliases: FakeAliases = field(default_factory=FakeAliases)
    replays: FakeReplays = field(default_factory=FakeReplays)

    async def put(self, *names: str, account: str = BOT, **values: Any) -> None:
        new = [rows.event(name, f"{account}|{values.get('room_id', ROOM)}", **values) for name in names]
        assert await self.database.run(lambda connection: outbox.insert_rows(connection, new)) == set()

    async def row(self, name: str) -> dict[str, Any] | None:
        return await self.database.run(lambda connection: delivery_log.get(connection, name))

    async def viewer(self, of: ApiKey | str) -> Viewer:
        return await self.deliveries.viewer(Credential(of) if isinstance(of, str) else Credential(None, of))

    async def seen(self, by: ApiKey | str, selection: Selection = Selection(), limit: int = 50) -> list[str]:  # noqa: B008
        page = await self.deliveries.page(await self.viewer(by), selection, limit)
        return [one["delivery_id"] for one in page["deliveries"]]


@pytest.fixture
async def database(empty_url: str) -> AsyncIterator[Database]:
    """At work."""
    database = Database(empty_url)
    database.open()
    database.start()
    yield database
    await database.stop()


Make = Callable[..., Awaitable[Log]]


@pytest.fixture
async def log(make: Make) -> Log:
    return await make()


@pytest.fixture
def make(database: Database) -> Make:
    """`await make(span=1)`: a log whose `Deliveries` has this parameter."""
    return partial(_make, database)


async def _make(database: Database, **values: Any) -> Log:
    callers, worker, aliases, replays = FakeCallers(), Worker(), FakeAliases(), FakeReplays()
    deliveries = Deliveries(
        database,
        cast("Callers", callers),
        cast("Tokens", FakeTokens()),
        cast("RoomAccess", aliases),
        cast("Replays", replays),
        cancel=worker.cancel,
        wake=worker.wake,
        **values,
    )
    users = [(ALICE, "@alice:hs", "PHONE"), (ALICE, "@alice:hs", "DESK"), (BOT, "@bot:hs", "BRIDGE")]

    def know(connection: Connection) -> None:
        for account, user_id, device_id in users:
            whose = {"account": account, "user_id": user_id, "device_id": device_id}
            hash_ = accounts.token_hash(user_id + device_id)
            accounts.remember(connection, {**whose, "token": None, "token_hash": hash_, "seen_at": 1})

    await database.run(know)
    return Log(database, callers, worker, deliveries, aliases, replays)


# who sees what


async def test_everybody_sees_their_own_and_admins_all(log: Log) -> None:
    await log.put("by-one", api_key="one")
    await log.put("by-two", api_key="two")
    await log.put("by-phone", account=ALICE)
    await log.put("by-desk", account=ALICE)
    assert await log.seen(ADMIN) == ["by-desk", "by-phone", "by-two", "by-one"]
    assert await log.seen(ONE) == ["by-one"]
    assert await log.seen(TWO) == ["by-two"]
    assert await log.seen("alice/PHONE") == ["by-desk", "by-phone"]
    assert await log.seen("alice/NEW") == ["by-desk", "by-phone"]
    assert await log.seen("bob/PHONE") == []
    assert await log.seen("bot/BRIDGE") == ["by-two", "by-one"]


async def test_selection_cannot_widen_what_is_seen(log: Log) -> None:
    await log.put("by-two", api_key="two")
    assert await log.seen(ONE, Selection(whose=delivery_log.Whose(api_key="two"))) == []
    assert await log.seen(ONE, Selection(whose=delivery_log.ALL)) == []


async def test_named_ones_are_shown_to_those_who_may_see_them(log: Log) -> None:
    for name in ("first", "second", "third"):
        await log.put(name, api_key="one")
    await log.put("by-two", api_key="two")
    assert await log.seen(ONE, Selection(names=("first", "third", "by-two", "never-was"))) == ["third", "first"]


async def test_keys_see_their_own_while_the_homeserver_is_away(log: Log) -> None:
    await log.put("by-one", api_key="one")
    log.callers.is_away = True
    assert await log.seen(ONE) == ["by-one"]
    with pytest.raises(Unauthorized):
        await log.seen("alice/PHONE")


@pytest.mark.parametrize("what", ["get", "replay", "remove"])
async def test_somebody_elses_is_as_unknown_as_what_never_was(log: Log, what: str) -> None:
    await log.put("by-two", api_key="two", **DEAD)
    said = set()
    for viewer in (await log.viewer(ONE), await log.viewer("alice/PHONE")):
        for name in ("by-two", "never-was"):
            with pytest.raises(NotFound) as caught:
                await getattr(log.deliveries, what)(viewer, name)
            said.add(str(caught.value.body()))
    assert len(said) == 1
    row = await log.row("by-two")
    assert row is not None
    assert row["state"] == "dead"
    assert log.worker.asked == []
    assert log.worker.woken == []


@pytest.mark.parametrize("what", ["get", "replay", "remove"])
@pytest.mark.parametrize(
    "name", ["", "a b", "é", "a\0b", "x" * 129, "a/b", "a\n", "' OR 1=1 --", "\ud800", "٣", "%00", "a?b"]
)
async def test_what_can_be_no_delivery_is_unknown(log: Log, what: str, name: str) -> None:
    with pytest.raises(NotFound):
        await getattr(log.deliveries, what)(await log.viewer(ADMIN), name)


# pages


async def pages(log: Log, limit: int, selection: Selection = Selection()) -> list[list[str]]:  # noqa: B008
    viewer, cursor, found = await log.viewer(ADMIN), "", []
    while True:
        page = await log.deliveries.page(viewer, selection, limit, cursor)
        found.append([one["delivery_id"] for one in page["deliveries"]])
        if "next" not in page:
            return found
        cursor = page["next"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (2, [["e", "d"], ["c", "b"], ["a"]]),
        (4, [["e", "d", "c", "b"], ["a"]]),
        (5, [["e", "d", "c", "b", "a"]]),
        (6, [["e", "d", "c", "b", "a"]]),
    ],
)
async def test_pages_follow_each_other_and_the_last_has_no_next(
    log: Log, limit: int, expected: list[list[str]]
) -> None:
    await log.put("a", "b", "c", "d", "e")
    assert await pages(log, limit) == expected


async def test_empty_log_is_one_empty_page(log: Log) -> None:
    assert await log.deliveries.page(await log.viewer(ADMIN), Selection(), 50) == {"deliveries": []}


@pytest.mark.parametrize("span", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 2, 50])
async def test_rare_ones_are_found_among_many_others(make: Make, span: int, limit: int) -> None:
    log = await make(span=span)
    for number in range(3):
        await log.put(f"rare-{number}", event_type="rare")
        await log.put(*(f"common-{number}-{other}" for other in range(9)))
    found = await pages(log, limit, Selection(event_type="rare"))
    assert [name for page in found for name in page] == ["rare-2", "rare-1", "rare-0"]


async def test_rows_that_come_between_pages_change_nothing(log: Log) -> None:
    await log.put("a", "b", "c", "d")
    viewer = await log.viewer(ADMIN)
    first = await log.deliveries.page(viewer, Selection(), 2)
    await log.put("e", "f")
    second = await log.deliveries.page(viewer, Selection(), 2, first["next"])
    assert [one["delivery_id"] for one in (*first["deliveries"], *second["deliveries"])] == ["d", "c", "b", "a"]
    assert "next" not in second


async def test_cursor_of_an_admin_opens_nothing_to_another(log: Log) -> None:
    await log.put("a", "b", "c", api_key="two")
    cursor = (await log.deliveries.page(await log.viewer(ADMIN), Selection(), 1))["next"]
    assert await log.deliveries.page(await log.viewer(ONE), Selection(), 1, cursor) == {"deliveries": []}


@pytest.mark.parametrize(
    "cursor",
    ["x", "A" * 10, "A" * 12, "AAAAAAAAAA=", "AAAAAAAAA\n", "AAAAAAAAAA\n", "//////////8", "__________8", "1 OR 1=1 --",
     "é" * 11, "\0" * 11, "٣" * 11, "-1", "A" * 100_000],
)  # fmt: skip
async def test_cursor_that_is_none_is_refused_by_name(log: Log, cursor: str) -> None:
    with pytest.raises(BadRequest, match=r"^cursor: "):
        await log.deliveries.page(await log.viewer(ADMIN), Selection(), 1, cursor)


@pytest.mark.parametrize("id_", [0, 1, 2**31, 2**63 - 1])
async def test_forged_cursor_only_says_where_to_go_on(log: Log, id_: int) -> None:
    await log.put("a", api_key="two")
    cursor = base64.urlsafe_b64encode(id_.to_bytes(8, "big")).decode().rstrip("=")
    assert await log.deliveries.page(await log.viewer(ONE), Selection(), 1, cursor) == {"deliveries": []}


async def test_one_long_search_lets_others_read_in_between(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    log = await make(span=1, quick_seconds=0.0, search_seconds=float("inf"))
    await log.put(*(f"n-{number}" for number in range(200)))
    order: list[str] = []
    begun = asyncio.Event()
    read = log.database.read

    async def noted(work: Callable[[Connection], T]) -> T:
        order.append("log")
        begun.set()
        return await read(work)

    monkeypatch.setattr(log.database, "read", noted)

    async def other() -> None:
        await begun.wait()
        await read(lambda connection: connection.exec_driver_sql("SELECT 1"))
        order.append("other")

    await asyncio.gather(log.seen(ADMIN, Selection(event_type="none")), other())
    assert order.index("other") < 20
    assert order.count("log") >= 200


# one delivery


async def test_get_shows_what_the_writer_is_about_to_write(log: Log) -> None:
    event = rows.event("fresh", f"{BOT}|{ROOM}")
    writing = log.database.run(lambda connection: outbox.insert_rows(connection, [event]), lingers=True)
    found = await log.deliveries.get(await log.viewer(ADMIN), "fresh")
    assert found["delivery_id"] == "fresh"
    assert writing.done()


# replays


async def test_replay_queues_it_anew_wakes_the_worker_and_is_audited(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    await log.put("a", api_key="one", txn_id="old", **DEAD)
    with caplog.at_level("INFO", "flowbridge"):
        await log.deliveries.replay(await log.viewer(ONE), "a")
    row = await log.row("a")
    assert row is not None
    assert row["state"] == "queued"
    assert re.fullmatch(r"[\w-]{22}", row["txn_id"])
    assert json.loads(row["history"])[-1]["replayed"]["by"] == "key:one"
    assert log.worker.woken == [row["lane"]]
    said = [(r.msg, r.fields) for r in caplog.records if r.msg == "delivery_replayed"]  # type: ignore[attr-defined]
    assert said == [("delivery_replayed", {"delivery": "a", "by": "key:one"})]


async def test_each_replay_has_another_txn_id(log: Log) -> None:
    await log.put("a", "b", api_key="one", **DEAD)
    for name in ("a", "b"):
        await log.deliveries.replay(await log.viewer(ADMIN), name)
    found = {row["txn_id"] for name in ("a", "b") if (row := await log.row(name))}
    assert len(found) == 2


async def test_queued_one_is_not_replayed(log: Log) -> None:
    await log.put("a", txn_id="old", api_key="one")
    with pytest.raises(WrongState) as caught:
        await log.deliveries.replay(await log.viewer(ADMIN), "a")
    assert (caught.value.status, caught.value.errcode) == (409, "M_BAD_STATE")
    row = await log.row("a")
    assert row is not None
    assert row["txn_id"] == "old"
    assert log.worker.woken == []


async def test_user_replays_from_any_device(log: Log) -> None:
    await log.put("a", account=ALICE, **DEAD)
    await log.deliveries.replay(await log.viewer("alice/DESK"), "a")
    row = await log.row("a")
    assert row is not None
    assert (row["account"], row["lane"], row["user_id"]) == (ALICE, f"{ALICE}|{ROOM}", "@alice:hs")


async def test_key_made_for_a_user_replays_with_the_account_that_sent_it(log: Log) -> None:
    await log.put("a", account=ALICE, **DEAD)
    await log.deliveries.replay(await log.viewer(ApiKey("for-alice", users=("@alice:hs",))), "a")
    row = await log.row("a")
    assert row is not None
    assert row["account"] == ALICE


@pytest.mark.parametrize("key", [ADMIN, ApiKey("for-bob", admin=True, users=("@bob:hs",))])
async def test_key_that_is_not_made_for_a_user_replays_nothing_of_that_user(log: Log, key: ApiKey) -> None:
    await log.put("a", account=ALICE, **DEAD)
    with pytest.raises(Forbidden, match="@alice:hs"):
        await log.deliveries.replay(await log.viewer(key), "a")
    row = await log.row("a")
    assert row is not None
    assert row["state"] == "dead"
    assert log.worker.woken == []


async def test_admin_without_limits_deletes_what_users_sent_and_a_limited_one_does_not(log: Log) -> None:
    for name in ("settled", "queued"):
        await log.put(name, account=ALICE, **(DEAD if name == "settled" else {}))
        limited = ApiKey("k", rooms=(ROOM,), admin=True), ApiKey("k", event_types=("m.room.message",), admin=True)
        for key in limited:
            with pytest.raises(Forbidden, match="@alice:hs"):
                await log.deliveries.remove(await log.viewer(key), name)
        assert log.worker.asked == []
    for_alice = ApiKey("k", rooms=(ROOM,), admin=True, users=("@alice:hs",))
    await log.deliveries.remove(await log.viewer(for_alice), "settled")
    log.worker.cancels = True
    await log.deliveries.remove(await log.viewer(ADMIN), "queued")
    assert log.worker.asked == ["queued"]


@pytest.mark.parametrize("what", ["get", "replay", "remove"])
async def test_admin_of_a_room_knows_nothing_of_others(log: Log, what: str) -> None:
    await log.put("there", api_key="two", room_id="!other:hs", **DEAD)
    await log.put("typed", api_key="two", event_type="m.room.messages", **DEAD)
    for key, name in (
        (ApiKey("k", rooms=(ROOM,), admin=True), "there"),
        (ApiKey("k", event_types=("m.room.message",), admin=True), "typed"),
        (ApiKey("k", event_types=("M.ROOM.*", "m.room.message.*"), admin=True), "typed"),
        (ApiKey("k", rooms=("#ops:hs",), admin=True), "there"),
    ):
        log.aliases.leads = {"#ops:hs": ROOM}
        with pytest.raises(NotFound):
            await getattr(log.deliveries, what)(await log.viewer(key), name)
    assert log.worker.asked == []
    assert log.worker.woken == []


async def test_admins_list_is_cut_to_its_rooms_and_types(log: Log) -> None:
    await log.put("a", api_key="one")
    await log.put("b", account=ALICE, event_type="m.room.topic", state_key="")
    await log.put("c", api_key="one", room_id="!other:hs")
    log.aliases.leads = {"#ops:hs": ROOM}
    assert await log.seen(ApiKey("k", rooms=(ROOM,), admin=True)) == ["b", "a"]
    assert await log.seen(ApiKey("k", rooms=("#ops:hs",), admin=True)) == ["b", "a"]
    assert await log.seen(ApiKey("k", event_types=("m.room.t*",), admin=True)) == ["b"]
    assert await log.seen(ApiKey("k", rooms=("!none:hs",), admin=True)) == []
    assert await log.seen(ApiKey("k", users=("@alice:hs",))) == ["b"]
    assert await log.seen(ApiKey("k", users=("@alice:hs",), event_types=("m.room.message",))) == []
    assert await log.seen(ApiKey("one", users=("@alice:hs",), rooms=(ROOM,))) == ["c", "b", "a"]


async def test_admin_of_an_alias_hears_when_nobody_can_tell_where_it_leads(log: Log) -> None:
    log.aliases.leads = {"#ops:hs": BadGateway("the homeserver is away")}
    with pytest.raises(Unavailable) as caught:
        await log.viewer(ApiKey("k", rooms=("#ops:hs",), admin=True))
    assert "Retry-After" in caught.value.headers()


async def test_key_replays_nothing_in_a_room_that_its_alias_has_left(log: Log) -> None:
    await log.put("a", api_key="k", **DEAD)
    key = ApiKey("k", rooms=("#ops:hs",))
    log.aliases.leads = {"#ops:hs": "!new:hs"}
    assert await log.seen(key) == ["a"]
    with pytest.raises(Forbidden):
        await log.deliveries.replay(await log.viewer(key), "a")
    log.aliases.leads = {"#ops:hs": ROOM}
    await log.deliveries.replay(await log.viewer(key), "a")
    row = await log.row("a")
    assert row is not None
    assert row["state"] == "queued"


async def test_replay_of_state_asks_what_it_would_overwrite_unless_told_not_to(log: Log) -> None:
    await log.put("message", api_key="one", **DEAD)
    await log.put("topic", api_key="one", event_type="m.room.topic", state_key="", **DEAD)
    log.replays.trouble = WrongState("it was set since")
    await log.deliveries.replay(await log.viewer(ONE), "message")
    with pytest.raises(WrongState, match="since"):
        await log.deliveries.replay(await log.viewer(ONE), "topic")
    assert log.replays.asked == [("topic", None)]
    await log.deliveries.replay(await log.viewer(ONE), "topic", overwrite=True)
    assert log.replays.asked == [("topic", None)]
    row = await log.row("topic")
    assert row is not None
    assert row["state"] == "queued"


async def test_users_new_device_is_in_the_store_before_its_replay(database: Database) -> None:
    """Else whoever carries it, after a crash, would look for a token that is not there."""
    tokens = Tokens(database, WriteQueue(database).remember)
    tokens.unlock(Fernet(Fernet.generate_key()))
    worker = Worker()
    aliases, replays = cast("RoomAccess", FakeAliases()), cast("Replays", FakeReplays())
    callers = cast("Callers", FakeCallers())
    deliveries = Deliveries(database, callers, tokens, aliases, replays, cancel=worker.cancel, wake=worker.wake)
    log = Log(database, FakeCallers(), worker, deliveries)
    tokens.remember(Caller("@alice:hs", "PHONE", "alice/PHONE"))
    await log.put("a", account=ALICE, **DEAD)
    await deliveries.replay(await log.viewer("alice/DESK"), "a")
    found = await database.read(lambda connection: accounts.tokens_of(connection, ALICE))
    assert [token.device_id for token in found] == ["DESK", "PHONE"]


async def test_reading_of_one_delivery_waits_for_its_turn_and_not_for_the_writer(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that asks for many replays, which are refused, must not stop what others have accepted."""
    await log.put("queued", api_key="one")
    await log.put("topic", api_key="one", event_type="m.room.topic", state_key="", **DEAD)
    log.replays.trouble = WrongState("it was set since")
    viewer, at_once, most = await log.viewer(ONE), 0, 0
    read = log.database.read

    async def watched(work: Callable[[Connection], Any]) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await read(work)
        finally:
            at_once -= 1

    monkeypatch.setattr(log.database, "read", watched)
    async with busy(log.database), asyncio.timeout(PATIENCE / 2):
        refused = await asyncio.gather(
            *(log.deliveries.replay(viewer, "topic") for _ in range(8)), return_exceptions=True
        )
        await log.deliveries.get(viewer, "queued")
    assert [type(error) for error in refused] == [WrongState] * 8
    assert most == 1


# deletions


async def test_settled_one_is_deleted(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    await log.put("a", **DEAD)
    with caplog.at_level("INFO", "flowbridge"):
        await log.deliveries.remove(await log.viewer(ADMIN), "a")
    assert await log.row("a") is None
    assert log.worker.asked == []
    said = [(r.msg, r.fields) for r in caplog.records if r.msg == "delivery_deleted"]  # type: ignore[attr-defined]
    assert said == [("delivery_deleted", {"delivery": "a", "by": "key:root"})]


async def test_queued_one_is_deleted_when_the_worker_gives_it_up(log: Log) -> None:
    await log.put("a")
    log.worker.cancels = True
    await log.deliveries.remove(await log.viewer(ADMIN), "a")
    assert log.worker.asked == ["a"]


async def test_queued_one_that_is_on_its_way_stays(log: Log) -> None:
    await log.put("a")
    with pytest.raises(WrongState) as caught:
        await log.deliveries.remove(await log.viewer(ADMIN), "a")
    assert caught.value.status == 409
    assert await log.row("a") is not None


async def test_one_that_is_settled_meanwhile_is_deleted(log: Log) -> None:
    await log.put("a")

    def settle(connection: Connection) -> None:
        connection.execute(update(events).values(state="sent"))

    log.worker.meanwhile = lambda: log.database.run(settle)
    await log.deliveries.remove(await log.viewer(ADMIN), "a")
    assert await log.row("a") is None


# as it is shown


def full_row(**values: Any) -> dict[str, Any]:
    return {**rows.event("d", f"{BOT}|{ROOM}"), "id": 7, "user_id": "@bot:hs", "accepted_at": 0, **values}


def test_summary_leaves_out_what_there_is_not() -> None:
    assert summary(full_row()) == {
        "delivery_id": "d",
        "status": "queued",
        "room_id": ROOM,
        "event_type": "m.room.message",
        "attempts": 0,
        "accepted_at": "1970-01-01T00:00:00.000Z",
        "user_id": "@bot:hs",
    }


def test_summary_shows_what_there_is() -> None:
    error = {"status": 403, "errcode": "M_FORBIDDEN", "error": "no"}
    row = full_row(
        state="dead", state_key="", error=json.dumps(error), api_key="one", settled_at=1_795_000_000_001, attempts=2
    )
    found = summary(row)
    assert (found["state_key"], found["error"], found["api_key"], found["attempts"]) == ("", error, "one", 2)
    assert found["settled_at"] == "2026-11-18T11:06:40.001Z"
    assert summary(full_row(state="sent", event_id="$e"))["event_id"] == "$e"


@pytest.mark.parametrize("ms", [0, 1, 999, 1_795_000_000_001, 1_795_000_000_999, 253_402_300_799_999])
def test_times_are_exact_to_the_millisecond(ms: int) -> None:
    shown = summary(full_row(accepted_at=ms))["accepted_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown)
    assert moment(shown, "x") == ms


def test_detail_shows_request_event_and_every_attempt() -> None:
    history = [
        {"at": 1_000, "ms": 12, "status": 502, "errcode": "M_UNKNOWN", "error": "cannot connect"},
        {"at": 2_000, "ms": 3, "status": 403, "errcode": "M_FORBIDDEN", "error": "no"},
        {"at": 3_000, "replayed": {"by": "cli:root", "state": "dead", "txn_id": "old", "accepted_at": 500}},
        {"at": 4_000, "ms": 5, "status": 200},
    ]
    row = full_row(
        content='{"body":"<b>é</b>"}', request='"é"', state_key="k", history=json.dumps(history), txn_id="new"
    )
    found = detail(row)
    assert found.items() >= summary(row).items()
    assert found["request"] == '"é"'
    assert found["event"] == {"type": "m.room.message", "state_key": "k", "content": {"body": "<b>é</b>"}}
    assert found["txn_id"] == "new"
    assert found["history"] == [
        {"time": "1970-01-01T00:00:01.000Z", "milliseconds": 12, "status": 502, "errcode": "M_UNKNOWN",
         "error": "cannot connect"},
        {"time": "1970-01-01T00:00:02.000Z", "milliseconds": 3, "status": 403, "errcode": "M_FORBIDDEN", "error": "no"},
        {"time": "1970-01-01T00:00:03.000Z", "replayed": {
            "by": "cli:root", "status": "dead", "txn_id": "old", "accepted_at": "1970-01-01T00:00:00.500Z"}},
        {"time": "1970-01-01T00:00:04.000Z", "milliseconds": 5, "status": 200},
    ]  # fmt: skip


def test_request_that_was_the_content_itself_is_shown_too() -> None:
    assert detail(full_row(content='{"a":1}', request=None))["request"] == '{"a":1}'
    assert detail(full_row(content='{"a":1}', request=""))["request"] == ""


# parameters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" , ,", ()),
        ("dead", ("dead",)),
        ("dead,sent", ("dead", "sent")),
        (" dead , dead,,queued ", ("dead", "queued")),
    ],
)
def test_states_stand_between_commas(text: str, expected: tuple[str, ...]) -> None:
    assert states(text, "state") == expected


@pytest.mark.parametrize("text", ["alive", "DEAD", "dead;sent", "dead\0", "' OR 1=1 --", "dead,x", "%", "\udcff"])
def test_other_states_are_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^state: ") as caught:
        states(text, "state")
    assert (caught.value.status, caught.value.errcode) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), (" , ,", ()), ("a", ("a",)), (" b , a,,b ", ("b", "a")), ("x" * 128, ("x" * 128,))]
)
def test_deliveries_stand_between_commas(text: str, expected: tuple[str, ...]) -> None:
    assert deliveries(text, "id") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a b", "id: 'a b' is not the id of a delivery"),
        ("a,\0", "id: '\\x00' is not the id of a delivery"),
        ("x" * 129, f"id: '{'x' * 80}' is not the id of a delivery"),
        (",".join(map(str, range(101))), "id: at most 100 deliveries can be named, not 101"),
    ],
)
def test_what_names_no_deliveries_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        deliveries(text, "id")
    assert caught.value.error == sentence


NOON = 1_795_348_800_000


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T12:00:00Z",
        "2026-11-22T12:00:00",
        "2026-11-22T12:00",
        "2026-11-22 12:00:00",
        "2026-11-22T12:00:00.000+00:00",
        "2026-11-22T14:00:00+02:00",
        "2026-11-22T14:00:00 02:00",
        "2026-11-22T07:30:00-04:30",
        " 2026-11-22T12:00:00Z ",
        "20261122T120000Z",
    ],
)
def test_times_are_iso_8601_and_utc_without_an_offset(text: str) -> None:
    assert moment(text, "since") == NOON


def test_day_is_its_beginning() -> None:
    assert moment("2026-11-22", "since") == NOON - 12 * 3_600_000


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "1969-12-31"])
def test_times_far_away_are_numbers_that_a_database_takes(text: str) -> None:
    assert abs(moment(text, "since")) < 2**62


@pytest.mark.parametrize(
    "text",
    ["", "now", "yesterday", "1795348800000", "2026-13-01", "2026-02-30T00:00:00Z", "٢٠٢٦-11-22T12:00",
     "2026-11-22T12:00:00+99:00", "2026-11-22T25:00:00Z", "2026-11-22\0", "'; DROP TABLE outbox; --", "\udcff",
     "1" * 100_000, "-2026-11-22", "T", " T "],
)  # fmt: skip
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^since: ") as caught:
        moment(text, "since")
    assert len(caught.value.error) < 1_000


@given(st.text())
def test_no_text_is_more_than_refused(text: str) -> None:
    for read in (moment, states):
        with contextlib.suppress(BadRequest):
            read(text, "x")


# searches, and what is among events


async def test_search_ends_after_some_seconds_and_goes_on_with_the_next_page(make: Make) -> None:
    log = await make(span=5, search_seconds=0.0)
    await log.put("rare", event_type="rare")
    await log.put(*(f"common-{number}" for number in range(23)))
    found = await pages(log, 50, Selection(event_type="rare"))
    assert found == [[], [], [], [], ["rare"]]


async def test_search_for_a_text_reads_little_at_a_time_and_leaves_time_to_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await make(span=1_000, text_span=4, quick_seconds=0.0)
    monkeypatch.setattr(service, "SLOW_SECONDS", float("inf"))
    monkeypatch.setattr(service, "READ_SECONDS", PATIENCE)
    await log.put("found", content='{"body": "needle"}')
    await log.put(*(f"hay-{number}" for number in range(20)))
    spans: list[int | None] = []
    page = delivery_log.page

    def counted(*arguments: Any, **values: Any) -> Any:
        spans.append(values["span"])
        return page(*arguments, **values)

    monkeypatch.setattr(delivery_log, "page", counted)
    assert await log.seen(ADMIN, Selection(text="Needle")) == ["found"]
    assert spans == [4] * 6
    spans.clear()
    assert await log.seen(ADMIN, Selection(event_type="none")) == []
    assert spans == [1_000]


async def test_slow_read_is_followed_by_a_smaller_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    log = await make(text_span=8, quick_seconds=0.0)
    await log.put(*(f"hay-{number}" for number in range(20)))
    monkeypatch.setattr(service, "SLOW_SECONDS", -1.0)
    monkeypatch.setattr(service, "READ_SECONDS", PATIENCE)
    spans: list[int | None] = []
    page = delivery_log.page

    def counted(*arguments: Any, **values: Any) -> Any:
        spans.append(values["span"])
        return page(*arguments, **values)

    monkeypatch.setattr(delivery_log, "page", counted)
    monkeypatch.setattr(asyncio, "sleep", nothing_for)
    assert await log.seen(ADMIN, Selection(text="needle")) == []
    assert spans[:4] == [8, 4, 2, 1]


async def nothing_for(seconds: float) -> None: ...


async def test_refused_calls_are_written_before_the_first_page_alone(make: Make) -> None:
    flushed = 0

    async def flush() -> None:
        nonlocal flushed
        flushed += 1

    log = await make(flush_refused=flush)
    await log.put("a", "b")
    await pages(log, 1)
    assert flushed == 1


async def test_calls_behind_what_was_not_searched_are_for_the_next_page(make: Make) -> None:
    log = await make(span=2, search_seconds=0.0)
    for number in range(3):
        calls = [call(f"{number}", event_type="rare")]
        await log.database.run(partial(refused.write, new=calls, again=[]))
        await log.put(f"rare-{number}", event_type="rare")
        await log.put(*(f"common-{number}-{other}" for other in range(4)))
    found = [name for page in await pages(log, 50, Selection(event_type="rare")) for name in page]
    assert found == ["rare-2", "refused-2", "rare-1", "refused-1", "rare-0", "refused-0"]


async def test_queued_events_of_a_page_say_what_they_wait_for(make: Make) -> None:
    def waiting(row: Mapping[str, Any], place: delivery_log.Standing) -> Waiting:
        return Waiting(f"{row['delivery']} in {row['account']} behind {place.before}", 0, place.first)

    log = await make(waiting=waiting)
    await log.put("a", "b")
    await log.put("sent", state="sent", event_id="$e", settled_at=1)
    page = (await log.deliveries.page(await log.viewer(ADMIN), Selection(), 50))["deliveries"]
    assert [one.get("waiting") for one in page] == [
        None,
        {"reason": f"b in {BOT} behind 1", "until": "1970-01-01T00:00:00.000Z", "behind": "a"},
        {"reason": f"a in {BOT} behind 0", "until": "1970-01-01T00:00:00.000Z", "behind": "a"},
    ]
    assert (await log.deliveries.get(await log.viewer(ADMIN), "b"))["waiting"] == page[1]["waiting"]


@pytest.mark.parametrize("state", ["sent", "dead"])
async def test_content_that_is_not_kept_is_left_out_and_cannot_be_replayed(log: Log, state: str) -> None:
    await log.put("a", content="", state=state, settled_at=1, api_key="root")
    viewer = await log.viewer(ADMIN)
    shown = await log.deliveries.get(viewer, "a")
    assert not shown.keys() & {"event", "request"}
    with pytest.raises(WrongState, match="its content is not kept any more"):
        await log.deliveries.replay(viewer, "a")
    assert log.worker.woken == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1764500000", 1_764_500_000_000),
        ("1764500000123", 1_764_500_000_123),
        (" 2026-11-22T10:00:00Z", 1_795_341_600_000),
    ],
)
def test_since_is_a_time_or_a_timestamp(text: str, expected: int) -> None:
    assert delivery_views.since(text, "since") == expected


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2h", 7_200), ("7d", 604_800), ("1w", 604_800)])
def test_since_is_an_age(text: str, seconds: int) -> None:
    assert abs(delivery_views.since(text, "since") - (clock.now_ms() - seconds * 1000)) < 60_000


@pytest.mark.parametrize("text", ["", "h", "2", "-2h", "2 h", "٣d", "12345678901", "9" * 30, "2h7d", "\ud800"])
def test_since_that_is_none_of_these_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^since: .* is not a time: .*like 2h or 7d"):
        delivery_views.since(text, "since")


async def test_read_of_contents_that_takes_too_long_is_tried_with_fewer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await make(text_span=200, quick_seconds=0.0)
    content = json.dumps({"body": "a" * 60_000})
    await log.put("found", content='{"body": "needle"}')
    await log.put(*(f"hay-{number}" for number in range(60)), content=content)
    monkeypatch.setattr(service, "READ_SECONDS", -1.0)  # whatever it is
    monkeypatch.setattr(delivery_log, "STEPS", 1)
    if not log.database.is_sqlite:
        monkeypatch.setattr(service, "at_most", never)
    spans: list[int | None] = []
    page = delivery_log.page

    def counted(*arguments: Any, **values: Any) -> Any:
        spans.append(values["span"])
        return page(*arguments, **values)

    monkeypatch.setattr(delivery_log, "page", counted)
    assert await log.seen(ADMIN, Selection(text="Needle")) == ["found"]
    assert spans[:4] == [200, 25, 3, 1]
    assert len(spans) == 3 + 61


@contextlib.contextmanager
def never(seconds: float, connection: Connection) -> Iterator[None]:
    yield
    raise TooSlow
