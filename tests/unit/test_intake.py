"""flowbridge.intake: what kind of event it is, what is checked, and where it goes."""

import asyncio
from typing import Any, cast

import pytest

from flowbridge import intake
from flowbridge.callers import Callers, Credential
from flowbridge.catalogue import Catalogue
from flowbridge.errors import BadContent, BadGateway, BadRequest, HomeserverError, MatrixError, TooLarge
from flowbridge.homeserver import Homeserver
from flowbridge.intake import MAX_CONTENT_BYTES, Intake
from flowbridge.models import Event, Payload
from flowbridge.settings import Settings
from tests.unit import Clock

CATALOGUE = Catalogue.load()
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

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeHomeserver:
    """Takes everything, and remembers it; `broken` makes the sends fail."""

    def __init__(self) -> None:
        self.joins: list[tuple[str, str]] = []
        self.sends: list[tuple[str, Event, str, str]] = []
        self.broken: MatrixError | None = None

    async def whoami(self, token: str) -> tuple[str, str | None]:
        return f"@{token}:hs", None

    async def join(self, token: str, room_or_alias: str) -> str:
        self.joins.append((token, room_or_alias))
        await asyncio.sleep(0)
        return f"!room{len(self.joins)}:hs"

    async def send(self, token: str, event: Event, room_id: str, txn_id: str) -> str:
        self.sends.append((token, event, room_id, txn_id))
        if self.broken:
            raise self.broken
        return f"$event{len(self.sends)}"


def make(homeserver: FakeHomeserver | None = None) -> Intake:
    found = cast("Homeserver", homeserver or FakeHomeserver())
    return Intake(CATALOGUE, Callers(Settings.load(access_token="bot"), found), found)


async def check(event_type: str, content: Any, state_key: str | None = None, *, as_state: bool = False) -> Event:
    return await make().check(ROOM, event_type, Payload(content, state_key), as_state=as_state)


async def pointers(event_type: str, content: Any, state_key: str | None = None, *, as_state: bool = False) -> list[str]:
    with pytest.raises(BadContent) as caught:
        await check(event_type, content, state_key, as_state=as_state)
    return [problem.pointer for problem in caught.value.problems]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(intake, "time", clock)
    return clock


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
async def test_62000_bytes_are_taken_and_one_more_refused(event_type: str) -> None:
    frame = len((await check(event_type, TEXT | {"body": ""})).content)
    content = TEXT | {"body": "x" * (MAX_CONTENT_BYTES - frame)}
    assert len((await check(event_type, content)).content) == 62_000
    with pytest.raises(TooLarge, match="62001") as caught:
        await check(event_type, content | {"body": content["body"] + "x"})
    assert (caught.value.status, caught.value.errcode) == (413, "M_TOO_LARGE")


async def test_bytes_count_and_not_characters() -> None:
    await check("m.room.message", TEXT | {"body": "x" * 40_000})
    with pytest.raises(TooLarge):
        await check("m.room.message", TEXT | {"body": "é" * 40_000})


async def test_large_content_is_checked_too() -> None:
    assert await pointers("m.room.message", {"msgtype": "m.text", "body": 1, "x": "y" * 20_000}) == ["/body"]


@pytest.mark.parametrize("content", [None, 1, "text", [TEXT]])
@pytest.mark.parametrize("event_type", ["m.room.message", "org.example.reading"])
async def test_content_that_is_no_object_is_refused(event_type: str, content: Any) -> None:
    assert await pointers(event_type, content) == [""]


async def test_nothing_is_asked_of_the_homeserver_for_a_wrong_payload() -> None:
    homeserver = FakeHomeserver()
    with pytest.raises(BadContent):
        await make(homeserver).check(ALIAS, "m.room.message", Payload({}), as_state=False)
    assert (homeserver.joins, homeserver.sends) == ([], [])


def test_read_knows_the_keys_of_the_type() -> None:
    flow = b'{"payload": {"topic": "Door"}, "topic": "sensors", "_msgid": "a.1"}'
    assert make().read(flow, "", "m.room.topic", "flow") == Payload({"topic": "Door"})


# sending


async def test_event_is_sent_as_the_caller_with_its_transaction_id() -> None:
    homeserver = FakeHomeserver()
    event = await check("m.room.message", TEXT)
    caller, event_id = await make(homeserver).accept(ALICE, event, "a/b")
    assert (caller.user_id, event_id) == ("@alice:hs", "$event1")
    assert homeserver.sends == [("alice", event, ROOM, "a/b")]
    assert homeserver.joins == []


async def test_send_without_a_transaction_id_gets_a_new_one_each_time() -> None:
    homeserver = FakeHomeserver()
    event = await check("m.room.message", TEXT)
    for _ in range(2):
        await make(homeserver).accept(ALICE, event, None)
    first, second = (txn_id for _, _, _, txn_id in homeserver.sends)
    assert len(first) >= 16
    assert first != second


async def test_callers_refused_token_is_asked_for_again() -> None:
    homeserver = FakeHomeserver()
    homeserver.broken = HomeserverError("Unknown", errcode="M_UNKNOWN_TOKEN", status=401)
    event = await check("m.room.message", TEXT)
    with pytest.raises(HomeserverError):
        await make(homeserver).accept(ALICE, event, None)
    with pytest.raises(BadGateway):
        await make(homeserver).accept(Credential(None), event, None)


# aliases


async def to_alias(bridge: Intake, credential: Credential = ALICE) -> None:
    event = await bridge.check(ALIAS, "m.room.message", Payload(TEXT), as_state=False)
    await bridge.accept(credential, event, None)


async def test_alias_is_joined_once_and_kept_for_10_minutes(clock: Clock) -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver)
    await to_alias(bridge)
    clock.now += 599
    await to_alias(bridge)
    assert homeserver.joins == [("alice", ALIAS)]
    assert [room_id for _, _, room_id, _ in homeserver.sends] == ["!room1:hs", "!room1:hs"]
    clock.now += 2
    await to_alias(bridge)
    assert len(homeserver.joins) == 2
    assert homeserver.sends[-1][2] == "!room2:hs"


async def test_alias_is_joined_by_each_caller_once() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver)
    for token in ("alice", "bob", "alice", "bob"):
        await to_alias(bridge, Credential(token))
    assert homeserver.joins == [("alice", ALIAS), ("bob", ALIAS)]


async def test_50_concurrent_sends_to_an_alias_join_once() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver)
    await asyncio.gather(*(to_alias(bridge) for _ in range(50)))
    assert len(homeserver.joins) == 1
    assert len(homeserver.sends) == 50


async def test_alias_is_dropped_after_an_error() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver)
    await to_alias(bridge)
    homeserver.broken = HomeserverError("not in room", errcode="M_FORBIDDEN", status=403)
    with pytest.raises(HomeserverError):
        await to_alias(bridge)
    homeserver.broken = None
    await to_alias(bridge)
    assert len(homeserver.joins) == 2
    assert homeserver.sends[-1][2] == "!room2:hs"


async def test_oldest_alias_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_ALIASES", 1)
    homeserver = FakeHomeserver()
    bridge = make(homeserver)
    for token in ("alice", "bob", "alice"):
        await to_alias(bridge, Credential(token))
    assert len(homeserver.joins) == 3
