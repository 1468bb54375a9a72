"""Rooms on a real Synapse: made, joined, left; by id and alias; and what bad input gets."""

import itertools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.http.conftest import RawClient
from tests.integration.conftest import KEY, Room, make_key, store_in
from tests.integration.test_accounts import bearer, check_error

PREFIXES = ["", *(f"/_matrix/client/{name}" for name in ("api/v1", "r0", "v1", "v3", "unstable"))]
EMPTY = [b"", b"{}", b"null", b" \n"]
NewRoom = Callable[..., Room]


@pytest.fixture
def alias() -> str:
    return f"room-{secrets.token_hex(6)}"


@pytest.fixture
def guest(bridge_url: str, friend: Account) -> Iterator[httpx.Client]:
    """Somebody else, at the bridge."""
    with httpx.Client(base_url=bridge_url, headers=bearer(friend.access_token), trust_env=False) as client:
        yield client


def membership(room: Room, user: Account) -> str:
    return str(room.state("m.room.member", user.user_id)["membership"])


def members(room: Room, user: Account) -> list[str]:
    """The events of a user's membership, the oldest first."""
    headers = bearer(room.owner.access_token)
    page = room.direct.get(f"/_matrix/client/v3{room.path}/messages?dir=f&limit=500", headers=headers).json()
    return [event["event_id"] for event in page["chunk"] if event.get("state_key") == user.user_id]


@pytest.mark.parametrize("path", ["/rooms", *(f"{prefix}/createRoom" for prefix in PREFIXES)])
def test_room_with_an_alias_is_made(bridge: httpx.Client, path: str, alias: str) -> None:
    found = bridge.post(path, json={"room_alias_name": alias, "name": "Operations"}).raise_for_status().json()
    assert found["room_alias"] == f"#{alias}:localhost"
    name = bridge.get(f"/rooms/{quote(found['room_id'])}/state/m.room.name").json()
    assert name == {"name": "Operations"}


@pytest.mark.parametrize("path", ["/rooms", "/_matrix/client/api/v1/createRoom"])
@pytest.mark.parametrize("body", [*EMPTY, b'{"room_alias_name": null}'])
def test_room_without_an_alias_is_made(bridge: httpx.Client, path: str, body: bytes) -> None:
    found = bridge.post(path, content=body, headers={"Content-Type": "text/html"}).raise_for_status().json()
    assert list(found) == ["room_id"]


def test_taken_alias_is_told(bridge: httpx.Client, alias: str) -> None:
    assert bridge.post("/rooms", json={"room_alias_name": alias}).status_code == 200
    check_error(bridge.post("/rooms", json={"room_alias_name": alias}), 400, "M_ROOM_IN_USE")


@pytest.mark.parametrize("name", ["a b", "#a", "a:b", "x" * 300, "#a:localhost", "🙂" * 100])
def test_alias_that_cannot_be_is_no_5xx(bridge: httpx.Client, name: str) -> None:
    answer = bridge.post("/rooms", json={"room_alias_name": name})
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(("prefix", "body"), list(zip(PREFIXES, itertools.cycle(EMPTY), strict=False)))
def test_invited_user_joins_and_leaves(
    bridge: httpx.Client, guest: httpx.Client, friend: Account, room: Room, prefix: str, body: bytes
) -> None:
    path = f"{prefix}{room.path}"
    assert bridge.post(f"{path}/invite", json={"user_id": friend.user_id}).json() == {}
    assert membership(room, friend) == "invite"
    assert guest.post(f"{path}/join", content=body).json() == {"room_id": room.id}
    assert membership(room, friend) == "join"
    assert guest.post(f"{path}/leave", content=body).json() == {}
    assert membership(room, friend) == "leave"


@pytest.mark.parametrize("prefix", ["", "/_matrix/client/v3"])
def test_user_is_kicked_banned_and_let_in_again(
    bridge: httpx.Client, new_room: NewRoom, guest: httpx.Client, friend: Account, prefix: str
) -> None:
    room = new_room(preset="public_chat")
    path = f"{prefix}{room.path}"
    assert guest.post(f"{path}/join").status_code == 200
    for action, then in (("kick", "leave"), ("ban", "ban"), ("unban", "leave")):
        answer = bridge.post(f"{path}/{action}", json={"user_id": friend.user_id, "reason": "a test"})
        assert answer.json() == {}
        assert membership(room, friend) == then
    assert room.state("m.room.member", friend.user_id)["reason"] == "a test"


PLACES = ["{}/join/{}", "{}/rooms/{}/join"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("place", PLACES, ids=["join", "rooms"])
def test_room_is_joined_by_its_alias_and_joining_twice_does_nothing(
    new_room: NewRoom, guest: httpx.Client, friend: Account, alias: str, prefix: str, place: str
) -> None:
    room = new_room(preset="public_chat", room_alias_name=alias)
    for name in (f"%23{alias}%3Alocalhost", f"%23{alias}:localhost", quote(room.id, safe=""), room.id):
        answer = guest.post(place.format(prefix, name), content=b"null")
        assert answer.json() == {"room_id": room.id}, answer.text
    assert len(members(room, friend)) == 1


@pytest.mark.parametrize("place", PLACES, ids=["join", "rooms"])
def test_alias_may_arrive_raw(bridge_url: str, new_room: NewRoom, friend: Account, alias: str, place: str) -> None:
    room = new_room(preset="public_chat", room_alias_name=alias)
    target = place.format("/_matrix/client/v3", f"#{alias}:localhost")
    query = f"?access_token={friend.access_token}"
    with RawClient(bridge_url) as client:
        client.send(f"POST {target}{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        answer = client.answer()
    assert (answer.status, answer.json()) == (200, {"room_id": room.id})


def test_alias_with_a_slash_is_joined(new_room: NewRoom, guest: httpx.Client, alias: str) -> None:
    room = new_room(preset="public_chat", room_alias_name=f"{alias}/b")
    assert guest.post(f"/join/%23{alias}%2Fb:localhost").json() == {"room_id": room.id}


def test_room_is_left_and_invited_to_by_its_alias(
    bridge: httpx.Client, new_room: NewRoom, guest: httpx.Client, friend: Account, alias: str
) -> None:
    room = new_room(room_alias_name=alias)
    path = f"/rooms/%23{alias}:localhost"
    assert bridge.post(f"{path}/invite", json={"user_id": friend.user_id}).json() == {}
    assert guest.post(f"{path}/join").json() == {"room_id": room.id}
    assert guest.post(f"{path}/leave").json() == {}
    assert membership(room, friend) == "leave"


def test_room_with_a_domain_is_joined(new_room: NewRoom, guest: httpx.Client) -> None:
    room = new_room(room_version="10", preset="public_chat")
    assert guest.post(f"/join/{quote(room.id, safe='')}?server_name=localhost&via=").json() == {"room_id": room.id}
    assert guest.post(f"{room.path}/join").json() == {"room_id": room.id}


@pytest.mark.parametrize("place", PLACES, ids=["join", "rooms"])
@pytest.mark.parametrize("prefix", ["", "/_matrix/client/api/v1", "/_matrix/client/v3"])
def test_errors_of_a_join_are_the_homeservers(
    guest: httpx.Client, anyone: httpx.Client, room: Room, prefix: str, place: str
) -> None:
    closed = place.format(prefix, quote(room.id, safe=""))
    check_error(guest.post(closed), 403, "M_FORBIDDEN")
    check_error(guest.post(place.format(prefix, "%23nowhere:localhost")), 404, "M_NOT_FOUND")
    nowhere = guest.post(place.format(prefix, "!nowhere:localhost"))
    assert nowhere.status_code in (403, 404)
    check_error(guest.post(place.format(prefix, "nowhere")), 400, "M_INVALID_PARAM")
    check_error(anyone.post(closed), 401, "M_MISSING_TOKEN")
    check_error(anyone.post(f"{closed}?access_token=syt_wrong"), 401, "M_UNKNOWN_TOKEN")


@pytest.mark.parametrize("action", ["invite", "kick", "ban", "unban"])
def test_errors_of_the_others_are_the_homeservers(
    bridge: httpx.Client, guest: httpx.Client, friend: Account, room: Room, action: str
) -> None:
    check_error(guest.post(f"{room.path}/{action}", json={"user_id": "@x:localhost"}), 403, "M_FORBIDDEN")
    assert bridge.post(f"{room.path}/{action}").json()["errcode"] == "M_MISSING_PARAM"
    for user in ("x", "", "@", "@x", "x:localhost", "@a b:localhost", "@x:localhost@y"):
        answer = bridge.post(f"{room.path}/{action}", json={"user_id": user})
        assert answer.status_code in (200, 400, 403, 404), (user, answer.text)
    check_error(bridge.post(f"{room.path}/{action}", json={"user_id": 5}), 400, "M_BAD_JSON")
    check_error(guest.post(f"/rooms/%23nowhere:localhost/{action}", json={"user_id": "@x:hs"}), 404, "M_NOT_FOUND")


HOSTILE: dict[str, Any] = {
    "fraction": '{"a": 1.5}',
    "infinity": '{"a": 1e400}',
    "surrogate": '{"reason": "\\ud800"}',
    "nul": '{"reason": "\\u0000"}',
    "nul-in-a-name": '{"a": [{"b\\u0000": 1}]}',
    "list": "[]",
    "string": '"x"',
    "not-json": "{",
    "not-utf8": b"\xff",
    "deep": "[" * 1000,
    "duplicate": '{"a": 1, "a": 2}',
    "number-as-text": '{"reason": 5, "name": 5}',
    "text-as-object": '{"third_party_signed": "x", "creation_content": "x"}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_body_is_a_400(bridge: httpx.Client, room: Room, body: str | bytes) -> None:
    for path in ("/rooms", "/createRoom", f"/join/{room.id}", f"{room.path}/invite", f"{room.path}/leave"):
        answer = bridge.post(path, content=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["errcode"] in ("M_BAD_JSON", "M_NOT_JSON")


ODD: list[dict[str, Any]] = [
    {"invite": "x"},
    {"invite": [5]},
    {"invite": ["x"]},
    {"invite_3pid": [{}]},
    {"invite_3pid": [5]},
    {"initial_state": [{}]},
    {"initial_state": [5]},
    {"initial_state": [{"type": 5, "content": {}}]},
    {"initial_state": [{"type": "m.room.name", "content": 5}]},
    {"initial_state": [{"type": "m.room.name", "content": {}, "state_key": 5}]},
    {"initial_state": [{"type": "m.room.power_levels", "content": {"users": 5}}]},
    {"initial_state": [{"type": "m.room.join_rules", "content": {"join_rule": 5}}]},
    {"initial_state": [{"type": "m.room.create", "content": {}}]},
    {"initial_state": [{"type": "m.room.member", "content": {}}]},
    {"initial_state": [{"type": "m.room.member", "content": {"membership": []}}]},
    {"creation_content": {"type": 5}},
    {"creation_content": {"m.federate": "x"}},
    {"creation_content": {"predecessor": 5}},
    {"creation_content": {"additional_creators": 5}},
    {"creation_content": {"additional_creators": [5]}},
    {"creation_content": {"room_version": 5}},
    {"power_level_content_override": {"users": 5}},
    {"power_level_content_override": {"events": 5}},
    {"power_level_content_override": {"users": {"x": "y"}}},
    {"power_level_content_override": {"ban": []}},
    {"power_level_content_override": {"ban": "x"}},
    {"preset": "x"},
    {"visibility": "x"},
    {"room_version": "x"},
    {"room_version": ""},
    {"room_alias_name": ""},
    {"is_direct": 5},
    {"topic": {}},
    {"third_party_signed": {}},
    {"name": "x" * 100_000},
]


@pytest.mark.parametrize("body", ODD, ids=[str(body)[:60] for body in ODD])
def test_odd_wishes_for_a_room_are_no_5xx(bridge: httpx.Client, body: dict[str, Any]) -> None:
    answer = bridge.post("/createRoom", json=body)
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"third_party_signed": {}},
        {"third_party_signed": {"mxid": 5, "token": 5, "signatures": 5}},
        {"medium": "email", "address": "a@b"},
        {"third_party_signed": {"sender": "@a:hs", "mxid": "@b:hs", "token": "t", "signatures": {}}},
        {"third_party_signed": {"sender": "x", "mxid": "x", "token": "x", "signatures": {"x": 5}}},
        {"medium": "email", "address": "a@b", "id_server": 5, "id_access_token": "x"},
        {"reason": "x" * 100_000},
        {"membership": 5, "displayname": 5, "avatar_url": []},
    ],
)
@pytest.mark.parametrize("action", ["join", "invite", "leave"])
def test_odd_memberships_are_no_5xx(bridge: httpx.Client, room: Room, action: str, body: dict[str, Any]) -> None:
    for path in (f"{room.path}/{action}", f"/join/{room.id}"):
        answer = bridge.post(path, json=body)
        assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "query", ["via=%00", "via=%ff", "server_name=%ED%A0%80", "via=a&via=b", "server_name=" + "x" * 300]
)
def test_odd_servers_to_join_by_are_no_5xx(bridge: httpx.Client, room: Room, query: str) -> None:
    answer = bridge.post(f"/join/{room.id}?{query}")
    assert answer.status_code in (200, 400), answer.text


def test_key_acts_as_the_bot(anyone: httpx.Client, owner: Account, friend: Account, alias: str) -> None:
    headers = {"X-API-Key": KEY}
    made = anyone.post("/rooms", json={"room_alias_name": alias}, headers=headers).json()
    path = f"/rooms/%23{alias}:localhost"
    assert anyone.post(f"{path}/invite", json={"user_id": friend.user_id}, headers=headers).json() == {}
    state = f"/rooms/{quote(made['room_id'])}/state/m.room.member/{friend.user_id}?format=event"
    assert anyone.get(state, headers=headers).json()["sender"] == owner.user_id


@pytest.mark.parametrize("room_scope", ["id", "alias"])
def test_key_of_a_room_is_for_that_room_alone(
    synapse: LocalSynapse, make_account: MakeAccount, new_room: NewRoom, tmp_path: Path, alias: str, room_scope: str
) -> None:
    """By its id or by its alias, whichever the scope and the request name."""
    bot = make_account()
    room = new_room(preset="public_chat", room_alias_name=alias)
    other = new_room(preset="public_chat")
    name = f"#{alias}:localhost"
    settings = Settings.load(base_url=synapse.url, access_token=bot.access_token, database_url=store_in(tmp_path))
    headers = {"X-API-Key": make_key(tmp_path, ApiKey("one-room", rooms=(room.id if room_scope == "id" else name,)))}
    with background(settings) as url, httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        assert client.post(f"/join/{quote(name)}").json() == {"room_id": room.id}
        for path in (room.path, f"/rooms/{quote(name)}"):
            sent = client.post(f"{path}/send/m.room.message", json="hi")
            assert sent.status_code == 200, sent.text
            for what in ("members", "messages", "state", "state/m.room.create", "initialSync"):
                assert client.get(f"{path}/{what}").status_code == 200, what
            assert client.head(f"{path}/live").status_code == 200
        assert client.post(f"{room.path}/leave").json() == {}
        for action in ("join", "leave", "send/m.room.message"):
            check_error(
                client.post(f"{other.path}/{action}", json={"msgtype": "m.text", "body": "x"}), 403, "M_FORBIDDEN"
            )
        for what in ("members", "messages", "state", "state/m.room.create", "initialSync", "live"):
            check_error(client.get(f"{other.path}/{what}"), 403, "M_FORBIDDEN")
        for path in ("/rooms", "/createRoom", "/logout", "/register", "/login"):
            check_error(client.post(path), 403, "M_FORBIDDEN")
        assert client.get("/whoami").json()["user_id"] == bot.user_id


@pytest.mark.parametrize("by_alias", [False, True])
@pytest.mark.parametrize("prefix", ["", "/_matrix/client/v3"])
def test_key_for_messages_in_a_room_may_join_that_room(
    synapse: LocalSynapse, make_account: MakeAccount, new_room: NewRoom, tmp_path: Path, prefix: str, *, by_alias: bool
) -> None:
    """README's recipe for a key; Apprise joins before it sends."""
    bot, alias = make_account(), f"ops-{secrets.token_hex(4)}"
    room, other = new_room(preset="public_chat", room_alias_name=alias), new_room(preset="public_chat")
    name = quote(f"#{alias}:localhost" if by_alias else room.id, safe="")
    settings = Settings.load(base_url=synapse.url, access_token=bot.access_token, database_url=store_in(tmp_path))
    key = make_key(tmp_path, ApiKey("one", rooms=(room.id,), event_types=("m.room.message",)))
    with (
        background(settings) as url,
        httpx.Client(base_url=url, headers={"X-API-Key": key}, trust_env=False) as caller,
    ):
        for path in (f"/join/{name}", f"/rooms/{name}/join"):
            assert caller.post(f"{prefix}{path}", json={}).json() == {"room_id": room.id}
        assert caller.post(
            f"{prefix}/rooms/{name}/send/m.room.message", json={"msgtype": "m.text", "body": "hi"}
        ).json()
        assert room.bodies() == ["hi"]
        refused = [
            caller.post(f"{prefix}/join/{other.id}", json={}),
            caller.post(f"{prefix}{other.path}/join", json={}),
            caller.get(f"{prefix}{other.path}/messages"),
            caller.get(f"{prefix}{room.path}/messages"),
            caller.post(f"{prefix}{room.path}/leave", json={}),
            caller.post(f"{prefix}{room.path}/invite", json={"user_id": "@x:localhost"}),
        ]
        assert {(answer.status_code, answer.json()["errcode"]) for answer in refused} == {(403, "M_FORBIDDEN")}
        assert f"this API key is not for this room: it is for {room.id}" in refused[0].json()["error"]
