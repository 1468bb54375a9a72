"""flowbridge.services.acceptance: what kind of event it is, what is checked, and what is written down of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.pending import Outcome
from flowbridge.delivery.write_queue import _Batch
from flowbridge.errors import BadContent, BadRequest, Conflict, Forbidden, MatrixError, TooLarge
from flowbridge.events import canonical_json, size
from flowbridge.homeserver.pool import Answer
from flowbridge.models import ApiKey, Event, Payload, Surface
from flowbridge.services import acceptance
from flowbridge.services.acceptance import How, Receipt
from flowbridge.settings import Settings
from flowbridge.store.tables import outbox
from tests.patience import PATIENCE

CORE = Core(Settings.model_construct(base_url="http://127.0.0.1:1"))  # without a store: it is never opened
CATALOGUE = CORE.catalogue
STATE_TYPES = [name for name, entry in CATALOGUE.items() if entry.kind == "state"]
NOT_CLEARED = {"m.room.name", "m.room.topic", "m.room.pinned_events"}
STATE_KEYS = {
    "m.room.member": "@a:hs",
    "m.space.child": "!a:hs",
    "m.space.parent": "!a:hs",
    "m.room.third_party_invite": "t",
}
TEXT = {"msgtype": "m.text", "body": "hi"}
ROOM = "!a:hs"
ALIAS = "#flow:hs"
ALICE = Credential("alice")
FLOW = How("flow")
KEYED = How("flow", "key")

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeHomeserver:
    """Takes everything, and remembers it; `refusal` is what it says of joins. Sends are answered after `go`."""

    def __init__(self) -> None:
        self.joins: list[tuple[str, str]] = []
        self.sends: list[tuple[str, Event, str]] = []
        self.refusal: MatrixError | None = None
        self.go: asyncio.Future[None] | None = None
        self.asked = asyncio.Event()  # a send waits for `go`

    async def whoami(self, token: str) -> tuple[str, str | None]:
        user, _, device = token.partition("-")
        return f"@{user}:hs", device or None

    async def join(self, token: str, room_or_alias: str) -> str:
        self.joins.append((token, room_or_alias))
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        return f"!room{len(self.joins)}:hs"

    async def resolve(self, token: str, alias: str) -> str:
        return f"!room{len(self.joins) + 1}:hs"

    async def is_encrypted(self, token: str, room_id: str, query: str = "") -> bool:
        return False

    async def send(self, token: str, event: Event, txn_id: str) -> Answer:
        self.sends.append((token, event, txn_id))
        number = len(self.sends)
        if self.go is not None:
            self.asked.set()
            await self.go
        return Answer(200, (), b'{"event_id": "$event%d"}' % number)

    def close(self) -> None:
        pass


async def check(event_type: str, content: Any, state_key: str | None = None, *, as_state: bool = False) -> Event:
    return await CORE.acceptance.check(ROOM, event_type, Payload(content, state_key), as_state=as_state)


async def pointers(event_type: str, content: Any, state_key: str | None = None, *, as_state: bool = False) -> list[str]:
    with pytest.raises(BadContent) as caught:
        await check(event_type, content, state_key, as_state=as_state)
    return [problem.pointer for problem in caught.value.problems]


# kinds and state keys


async def test_message_is_an_event_with_canonical_content_and_no_state_key() -> None:
    event = await check("m.room.message", {"msgtype": "m.text", "body": "é", "a": {"c": 1, "b": []}})
    assert event == Event(ROOM, "m.room.message", '{"a":{"b":[],"c":1},"body":"é","msgtype":"m.text"}'.encode(), None)


@pytest.mark.parametrize("event_type", STATE_TYPES)
async def test_catalogued_state_type_by_send_is_state(event_type: str) -> None:
    content = CATALOGUE.examples(event_type)[0]["content"]
    key = STATE_KEYS.get(event_type)
    assert (await check(event_type, content, key)).state_key == (key or "")
    assert (await check(event_type, content, key, as_state=True)).state_key == (key or "")


async def test_unknown_type_is_a_message_unless_body_or_path_say_state() -> None:
    assert (await check("org.example.reading", {"a": 1})).state_key is None
    assert (await check("org.example.reading", {"a": 1}, "")).state_key == ""
    assert (await check("org.example.reading", {"a": 1}, "cellar")).state_key == "cellar"
    assert (await check("org.example.reading", {}, as_state=True)).state_key == ""


@pytest.mark.parametrize("state_key", ["", "x"])
async def test_message_type_with_a_state_key_is_refused(state_key: str) -> None:
    assert await pointers("m.room.message", TEXT, state_key) == ["/state_key"]


async def test_message_type_sent_as_state_is_refused_and_told_the_other_way() -> None:
    with pytest.raises(BadContent, match="/send/"):
        await check("m.room.message", TEXT, as_state=True)


@pytest.mark.parametrize("as_state", [False, True])
@pytest.mark.parametrize("state_key", [None, "", "alice", "!a:hs"])
async def test_member_needs_a_user_id_as_state_key(state_key: str | None, *, as_state: bool) -> None:
    assert await pointers("m.room.member", {"membership": "invite"}, state_key, as_state=as_state) == ["/state_key"]


async def test_state_with_one_place_takes_no_other_state_key() -> None:
    assert await pointers("m.room.name", {"name": "x"}, "y") == ["/state_key"]


async def test_problems_of_content_and_state_key_are_told_together() -> None:
    assert sorted(await pointers("m.room.member", {"membership": "gone"}, "alice")) == ["/membership", "/state_key"]
    assert sorted(await pointers("m.room.message", {}, "x")) == ["/body", "/msgtype", "/state_key"]


@pytest.mark.parametrize("state_key", ["a\nb", "\0", "..", "x" * 256, "é" * 128, "\ud800"])
async def test_state_key_that_may_not_stand_in_a_path_is_refused(state_key: str) -> None:
    with pytest.raises(BadRequest, match="state key"):
        await check("org.example.reading", {}, state_key)


# clearing


@pytest.mark.parametrize("event_type", STATE_TYPES)
async def test_empty_object_clears_every_state_but_three(event_type: str) -> None:
    key = STATE_KEYS.get(event_type, "")
    if event_type in NOT_CLEARED:
        assert len(await pointers(event_type, {}, key, as_state=True)) == 1
    else:
        assert (await check(event_type, {}, key, as_state=True)).content == b"{}"


@pytest.mark.parametrize("event_type", [name for name in STATE_TYPES if CATALOGUE.required(name)])
async def test_empty_object_by_send_is_held_to_the_schema(event_type: str) -> None:
    assert await pointers(event_type, {}, STATE_KEYS.get(event_type)) != []


async def test_clearing_still_needs_the_right_state_key() -> None:
    assert await pointers("m.space.child", {}, "", as_state=True) == ["/state_key"]


@pytest.mark.parametrize(
    ("event_type", "content"),
    [("m.room.name", {"name": ""}), ("m.room.topic", {"topic": ""}), ("m.room.pinned_events", {"pinned": []})],
)
async def test_the_three_are_cleared_by_an_empty_value(event_type: str, content: Any) -> None:
    await check(event_type, content)
    await check(event_type, content, as_state=True)


# sizes and shapes


@pytest.mark.parametrize("event_type", ["m.room.message", "org.example.reading"])
async def test_trial_takes_what_fits_into_the_event_and_refuses_one_byte_more(event_type: str) -> None:
    limit = size.largest(event_type, None, "", "")
    content = TEXT | {"body": "x" * (limit - len(canonical_json.write(TEXT | {"body": ""})))}
    assert len((await tried(event_type, content)).content) == limit
    with pytest.raises(TooLarge, match=f"is {limit + 1} bytes .* has room for {limit}:") as caught:
        await tried(event_type, content | {"body": content["body"] + "x"})
    assert (caught.value.status, caught.value.errcode) == (413, "M_TOO_LARGE")


async def test_bytes_count_and_not_characters() -> None:
    await tried("m.room.message", TEXT | {"body": "x" * 40_000})
    with pytest.raises(TooLarge):
        await tried("m.room.message", TEXT | {"body": "é" * 40_000})


async def tried(event_type: str, content: Any) -> Event:
    return await CORE.acceptance.check("", event_type, Payload(content), as_state=False)


async def test_large_content_is_checked_too() -> None:
    assert await pointers("m.room.message", {"msgtype": "m.text", "body": 1, "x": "y" * 20_000}) == ["/body"]


PROSE = "Build 4711 passed in 3:12, on all of them. It took no longer than the last one did before\n"


@pytest.mark.parametrize(
    ("body", "is_large"),
    [
        (TEXT | {"body": PROSE * 180}, False),
        (TEXT | {"body": PROSE * 700}, False),
        (TEXT | {"body": PROSE * 760}, True),  # more than an event may have
        (TEXT | {"x": {f"key{number}": number for number in range(1_100)}}, False),
        (TEXT | {"x": {f"key{number}": number for number in range(1_300)}}, True),
        (TEXT | {"x": [[]] * 5_000}, True),
    ],
)
async def test_large_body_is_read_at_once_if_it_is_mostly_text(
    body: Any, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[object] = []
    aside = CORE.acceptance.aside

    async def noted(work: Callable[..., Any], *arguments: Any) -> Any:
        handed_over.append(work)
        return await aside(work, *arguments)

    monkeypatch.setattr(CORE.acceptance, "aside", noted)
    found = await CORE.acceptance.receive(json.dumps(body).encode(), "application/json", "m.room.message", "flow")
    assert found.content == body
    if len(json.dumps(body)) < 65_000:
        await CORE.acceptance.check("", "m.room.message", found, as_state=False)
    assert bool(handed_over) == is_large


async def test_large_form_is_read_in_a_thread() -> None:
    assert acceptance.is_large(b"a=" + b"%41" * 6_000)
    assert not acceptance.is_large(b"a=" + b"A" * 18_000)


@pytest.mark.parametrize("content", [None, 1, "text", [TEXT]])
@pytest.mark.parametrize("event_type", ["m.room.message", "org.example.reading"])
async def test_content_that_is_no_object_is_refused(event_type: str, content: Any) -> None:
    assert await pointers(event_type, content) == [""]


def test_read_knows_the_keys_of_the_type() -> None:
    flow = b'{"payload": {"topic": "Door"}, "topic": "sensors", "_msgid": "a.1"}'
    assert CORE.acceptance.read(flow, "", "m.room.topic", "flow") == Payload({"topic": "Door"})


# accepting


@pytest.fixture
def homeserver(monkeypatch: pytest.MonkeyPatch) -> FakeHomeserver:
    found = FakeHomeserver()
    monkeypatch.setattr("flowbridge.bridge.Homeserver", lambda *_, **__: found)
    return found


@asynccontextmanager
async def running(folder: Path, **values: Any) -> AsyncIterator[Core]:
    store = SecretStr(f"sqlite:///{folder}/x.db")
    settings = {"access_token": SecretStr("bot"), "database_url": store, "encrypted_rooms": "refuse", **values}
    core = Core(Settings.model_construct(base_url="http://127.0.0.1:1", **settings))
    async with core.running():
        yield core


@pytest.fixture
async def core(homeserver: FakeHomeserver, tmp_path: Path) -> AsyncIterator[Core]:
    async with running(tmp_path) as core:
        yield core


async def accept(
    core: Core,
    content: Any = TEXT,
    *,
    by: Credential = ALICE,
    room: str = ROOM,
    type_: str = "m.room.message",
    how: How = FLOW,
) -> Receipt:
    event = await core.acceptance.check(room, type_, Payload(content), as_state=False)
    return await core.acceptance.accept(by, event, how)


async def send(core: Core, content: Any = TEXT, **values: Any) -> str:
    """The id of the event."""
    outcome = await core.worker.wait((await accept(core, content, **values)).pending, PATIENCE)
    assert outcome is not None
    assert outcome.event_id is not None
    return outcome.event_id


async def rows(core: Core) -> list[dict[str, Any]]:
    """All that is in the store, once it is there."""
    found = await core.database.run(
        lambda connection: connection.execute(select(outbox).order_by(outbox.c.id)).mappings().all()
    )
    return [dict(row) for row in found]


async def test_event_is_sent_as_its_caller_and_not_under_the_callers_key(
    core: Core, homeserver: FakeHomeserver
) -> None:
    receipt = await accept(core, how=replace(FLOW, key="a/b"))
    assert receipt.caller.user_id == "@alice:hs"
    assert not receipt.replayed
    assert await core.worker.wait(receipt.pending, PATIENCE) == Outcome("sent", "$event1")
    ((token, event, txn_id),) = homeserver.sends
    assert (token, event) == ("alice", await check("m.room.message", TEXT))
    assert txn_id == receipt.pending.row.delivery
    assert homeserver.joins == []


async def test_deliveries_have_names_of_their_own(core: Core, homeserver: FakeHomeserver, tmp_path: Path) -> None:
    await asyncio.gather(*(send(core) for _ in range(50)))
    other = tmp_path / "other"
    other.mkdir()
    async with running(other) as second:
        await asyncio.gather(*(send(second) for _ in range(50)))
    names = {txn_id for _, _, txn_id in homeserver.sends}
    assert len(names) == 100
    assert min(len(name) for name in names) >= 16


async def test_what_came_is_kept_where_it_is_not_what_is_sent(core: Core) -> None:
    for body in (b'{"payload": "caf\xc3\xa9"}', b'{"body":"hi","msgtype":"m.text"}', b"\xff\0"):
        await send(core, how=replace(FLOW, request=body))
    assert [row["request"] for row in await rows(core)] == ['{"payload": "café"}', None, "\ufffd\ufffd"]


async def test_row_says_whose_event_it_is(core: Core) -> None:
    key = ApiKey("the-key")
    await send(core, by=Credential(None, key))
    await send(core, by=Credential("alice-PHONE"))
    by_key, by_token = await rows(core)
    assert (by_key["api_key"], by_token["api_key"]) == ("the-key", None)
    assert by_key["account"] != by_token["account"]
    assert {row["lane"] for row in (by_key, by_token)} == {f"{row['account']}|{ROOM}" for row in (by_key, by_token)}


async def test_nothing_is_asked_of_the_homeserver_for_a_key_that_is_not_for_this(
    core: Core, homeserver: FakeHomeserver
) -> None:
    for key in (ApiKey("k", rooms=("!other:hs",)), ApiKey("k", event_types=("m.room.name",))):
        with pytest.raises(Forbidden):
            await accept(core, by=Credential(None, key), room=ALIAS if not key.rooms else ROOM)
    assert homeserver.joins == []
    assert await rows(core) == []


async def test_nothing_is_asked_of_the_homeserver_for_a_wrong_payload(core: Core, homeserver: FakeHomeserver) -> None:
    with pytest.raises(BadContent):
        await accept(core, {}, room=ALIAS)
    assert homeserver.joins == []


async def test_the_sender_counts_towards_the_size_once_it_is_known(core: Core) -> None:
    limit = size.largest("m.room.message", None, ROOM, "@alice:hs")
    content = TEXT | {"body": "x" * (limit - len(canonical_json.write(TEXT | {"body": ""})))}
    await accept(core, content)
    with pytest.raises(TooLarge, match=f"has room for {limit}:"):
        await accept(core, content | {"body": content["body"] + "x"})
    assert len(await rows(core)) == 1


# keys


async def test_same_key_and_content_is_the_same_delivery(core: Core, homeserver: FakeHomeserver) -> None:
    first = await accept(core, how=KEYED)
    await core.worker.wait(first.pending, PATIENCE)
    second = await accept(core, how=KEYED)
    assert (first.replayed, second.replayed) == (False, True)
    assert second.pending.row.delivery == first.pending.row.delivery
    assert await core.worker.wait(second.pending, PATIENCE) == Outcome("sent", "$event1")
    assert len(homeserver.sends) == 1


async def test_content_is_the_same_however_it_was_written(core: Core) -> None:
    first = await send(core, {"msgtype": "m.text", "body": "hi"}, how=replace(KEYED, request=b"hi"))
    assert await send(core, {"body": "hi", "msgtype": "m.text"}, how=replace(KEYED, request=b'"hi"')) == first


async def test_same_key_with_other_content_is_a_conflict_on_the_flow_surface(
    core: Core, homeserver: FakeHomeserver, caplog: pytest.LogCaptureFixture
) -> None:
    await send(core, how=KEYED)
    with pytest.raises(Conflict, match="Idempotency-Key") as caught:
        await accept(core, TEXT | {"body": "canary"}, how=KEYED)
    assert caught.value.status == 422
    assert len(homeserver.sends) == 1
    assert len(await rows(core)) == 1
    (line,) = [record.fields for record in caplog.records if record.msg == "key_reused"]  # type: ignore[attr-defined]
    assert {len(line["was"]), len(line["now"])} == {64}
    assert line["was"] != line["now"]
    assert "canary" not in json.dumps(line)


@pytest.mark.parametrize("policy", ["send", "replay"])
async def test_same_key_with_other_content_is_a_new_event_on_the_matrix_surface_unless_a_setting_says_no(
    homeserver: FakeHomeserver, tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    other = TEXT | {"body": "canary"}
    async with running(tmp_path, reused_txn_id=policy) as core:
        how = replace(KEYED, surface="matrix")
        found = [await send(core, content, how=how) for content in (TEXT, other, TEXT, other)]
    lines = [record.fields for record in caplog.records if record.msg == "txn_id_reused"]  # type: ignore[attr-defined]
    if policy == "replay":
        assert found == ["$event1"] * 4
        assert lines == []
    else:
        assert found == ["$event1", "$event2", "$event1", "$event2"]
        assert lines
        assert "canary" not in json.dumps(lines)


@pytest.mark.parametrize(
    "other",
    [
        {"by": Credential("bob")},
        {"by": Credential("alice-PHONE")},
        {"by": Credential(None, ApiKey("one"))},
        {"room": "!b:hs"},
        {"type_": "m.sticker.of.ours"},
        {"how": How("matrix", "key")},
        {"how": How("flow", "Key")},
        {"how": How("flow")},
    ],
    ids=["user", "device", "api-key", "room", "type", "surface", "key", "no-key"],
)
async def test_key_counts_for_one_sender_room_and_type(core: Core, other: dict[str, Any]) -> None:
    assert await send(core, how=KEYED) == "$event1"
    assert await send(core, **{"how": KEYED, **other}) == "$event2"
    assert await send(core, how=KEYED) == "$event1"


async def test_keys_of_two_api_keys_do_not_collide(core: Core, homeserver: FakeHomeserver) -> None:
    for name in ("one", "two", "one"):
        await send(core, how=KEYED, by=Credential(None, ApiKey(name)))
    assert len(homeserver.sends) == 2


async def test_key_that_is_known_is_not_sent_even_when_its_turn_comes_in_the_moment_of_the_commit(
    core: Core, homeserver: FakeHomeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _Batch.done

    def answered_just_then(batch: _Batch, commit: "asyncio.Future[None]") -> None:
        if homeserver.go is not None and not homeserver.go.done():
            homeserver.go.set_result(None)  # the room's next event is that with the key
        done(batch, commit)

    monkeypatch.setattr(_Batch, "done", answered_just_then)
    assert await send(core, how=KEYED) == "$event1"
    await rows(core)  # what is written from here on is one group
    homeserver.go = asyncio.get_running_loop().create_future()
    under_way = await accept(core, TEXT | {"body": "under way"})
    await homeserver.asked.wait()
    assert (await accept(core, how=KEYED)).replayed
    assert await core.worker.wait(under_way.pending, PATIENCE) == Outcome("sent", "$event2")
    assert await send(core, TEXT | {"body": "the next"}) == "$event3"


async def test_state_key_is_content(core: Core) -> None:
    async def put(state_key: str) -> Receipt:
        event = await check("org.example.reading", {"a": 1}, state_key)
        return await core.acceptance.accept(ALICE, event, KEYED)

    await put("cellar")
    assert (await put("cellar")).replayed
    with pytest.raises(Conflict):
        await put("attic")


async def test_event_goes_to_the_room_that_its_alias_leads_to(core: Core, homeserver: FakeHomeserver) -> None:
    for by in (ALICE, Credential(None, ApiKey("two", rooms=("!room2:hs",)))):
        await send(core, by=by, room=ALIAS)
    assert homeserver.joins == [("alice", ALIAS), ("bot", ALIAS)]
    assert [event.room for _, event, _ in homeserver.sends] == ["!room1:hs", "!room2:hs"]
    with pytest.raises(Forbidden):
        await send(core, by=Credential(None, ApiKey("four", rooms=("!room4:hs",))), room=ALIAS)
    assert len(homeserver.joins) == 2


def test_delivery_id_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 64 began with a dash, and `flowbridge deliveries show -W5…` was "no such option"."""
    monkeypatch.setattr("secrets.token_urlsafe", lambda _: "-W5GzTbpH9FZVhf-")
    ids = acceptance._ids()
    assert [next(ids), next(ids)] == ["_W5GzTbpH9FZVhf_1", "_W5GzTbpH9FZVhf_2"]


# where contents are kept encrypted

AT_REST: dict[str, Any] = {"encrypted_rooms": "encrypt", "access_token": None}


def hashes(core: Core) -> list[tuple[str, str]]:
    with core.database.engine.connect().execution_options(reads=True) as connection:
        return [tuple(row) for row in connection.execute(select(outbox.c.idem, outbox.c.fingerprint))]


@pytest.mark.parametrize("surface", ["flow", "matrix"])
async def test_no_hash_in_the_store_tells_a_short_text(
    homeserver: FakeHomeserver, tmp_path: Path, surface: Surface
) -> None:
    how = How(surface, "key")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    async with running(tmp_path / "a", **AT_REST) as core, running(tmp_path / "b", **AT_REST) as other:
        await send(core, how=how)
        await send(other, how=how)  # the same text under another secret key
        ((idem, fingerprint),), ((idem_2, fingerprint_2),) = hashes(core), hashes(other)
        assert fingerprint != fingerprint_2
        assert (idem != idem_2) == (surface == "matrix")
        assert fingerprint != acceptance._digest(canonical_json.write(TEXT), b"")


@pytest.mark.parametrize("surface", ["flow", "matrix"])
@pytest.mark.parametrize(("before", "after"), [({}, AT_REST), (AT_REST, AT_REST)], ids=["upgrade", "restart"])
async def test_repeat_is_one_also_after_contents_began_to_be_encrypted(
    homeserver: FakeHomeserver, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], surface: Surface
) -> None:
    how = How(surface, "key")
    async with running(tmp_path, **before) as core:
        first = await send(core, how=how)
    async with running(tmp_path, **after) as core:
        assert await send(core, how=how) == first
        if surface == "flow":
            with pytest.raises(Conflict):
                await accept(core, TEXT | {"body": "canary"}, how=how)
        else:
            assert await send(core, TEXT | {"body": "canary"}, how=how) != first
        assert await send(core, how=how) == first


async def test_repeat_on_the_flow_surface_is_one_after_contents_ceased_to_be_encrypted(
    homeserver: FakeHomeserver, tmp_path: Path
) -> None:
    async with running(tmp_path, **AT_REST) as core:
        first = await send(core, how=KEYED)
    async with running(tmp_path) as core:
        assert await send(core, how=KEYED) == first


async def test_events_of_rooms_known_to_be_plain_are_kept_in_clear(homeserver: FakeHomeserver, tmp_path: Path) -> None:
    async with running(tmp_path, **AT_REST) as core:
        assert (await accept(core)).pending.row.is_sealed, "nothing is known of the room"
        await send(core)  # then it is
        assert not (await accept(core)).pending.row.is_sealed
        assert (await accept(core, room="!other:hs")).pending.row.is_sealed
        reaction = {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$x", "key": "👍"}}
        assert not (await accept(core, reaction, room="!third:hs", type_="m.reaction")).pending.row.is_sealed
