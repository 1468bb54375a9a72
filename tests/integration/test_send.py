"""Sending to a real Synapse: every shape, both surfaces, each way to name a room."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account
from flowbridge.events import built_in, size
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import KEY, Room

HELLO = {"msgtype": "m.text", "body": "hello"}
# Memberships are other people's: test_state.py and the demo send them.
EXAMPLES = sorted(p for p in (built_in() / "examples").glob("*.json") if not p.name.startswith("m.room.member"))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(HELLO, id="content"),
        pytest.param({"payload": HELLO, "topic": "t", "_msgid": "m"}, id="flow-message"),
        pytest.param({"payload": "hello", "topic": "t", "req": {}}, id="flow-message-of-a-string"),
        pytest.param({"type": "m.room.message", "content": HELLO, "event_id": "$x"}, id="whole-event"),
        pytest.param("hello", id="bare-string"),
    ],
)
def test_each_body_shape_reaches_the_room(bridge: httpx.Client, room: Room, body: Any) -> None:
    answer = bridge.post(f"{room.path}/send/m.room.message", json=body)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["event_id"]
    seen = room.event(answer.json()["event_id"])
    assert seen["content"] == HELLO
    assert seen["sender"] == room.owner.user_id


def test_plain_text_becomes_a_message(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(
        f"{room.path}/send/m.room.message", content="Grüße, 100 %".encode(), headers={"Content-Type": "text/plain"}
    )
    assert room.event(answer.json()["event_id"])["content"] == {"msgtype": "m.text", "body": "Grüße, 100 %"}


def test_json_that_curl_labels_as_a_form_is_read(bridge: httpx.Client, room: Room) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = bridge.post(f"{room.path}/send/m.room.message", content=json.dumps(HELLO), headers=headers)
    assert room.event(answer.json()["event_id"])["content"] == HELLO


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_of_the_catalogue_is_accepted_by_the_homeserver(
    bridge: httpx.Client, room: Room, path: Path
) -> None:
    event = json.loads(path.read_bytes())
    state_key = event.get("state_key")
    if event["type"] == "m.room.redaction":
        event["content"]["redacts"] = _send(bridge, room, HELLO)
    if event["type"] == "m.room.canonical_alias":
        event["content"] = {"alias": "", "alt_aliases": []}  # an alias must exist on the homeserver
    if relation := event["content"].get("m.relates_to"):
        for related in (relation, relation.get("m.in_reply_to", {})):
            related |= {"event_id": _send(bridge, room, HELLO)} if "event_id" in related else {}
    if event["type"] in ("m.space.child", "m.space.parent"):
        state_key = room.id
    body = {**event, **({} if state_key is None else {"state_key": state_key})}
    answer = bridge.post(f"{room.path}/send/{event['type']}", json=body)
    assert answer.status_code == 200, answer.text
    seen = room.event(answer.json()["event_id"])
    assert seen["type"] == event["type"]
    assert seen.get("state_key") == state_key
    if event["type"] != "m.room.redaction":
        assert seen["content"] == event["content"]


@pytest.mark.parametrize("dialect", ["v3", "r0", "api/v1", "unstable"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_matrix_surface_sends_in_every_dialect(bridge: httpx.Client, room: Room, dialect: str, method: str) -> None:
    suffix = "/txn-1" if method == "PUT" else ""
    path = f"/_matrix/client/{dialect}{room.path}/send/m.room.message{suffix}"
    answer = bridge.request(method, path, json=HELLO)
    assert room.event(answer.json()["event_id"])["content"] == HELLO


def test_same_transaction_id_sends_once(bridge: httpx.Client, room: Room) -> None:
    path = f"/_matrix/client/v3{room.path}/send/m.room.message/ab%2Fcd"
    first, second = (bridge.put(path, json=HELLO) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["flowbridge-delivery"] == first.headers["flowbridge-delivery"]
    assert ["idempotent-replayed" in answer.headers for answer in (first, second)] == [False, True]
    (event,) = room.messages()
    assert event["event_id"] == first.json()["event_id"]
    assert event["unsigned"]["transaction_id"] != "ab/cd", "homeservers differ in what they make of it"


def test_bare_string_is_no_body_of_the_matrix_surface(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(f"/_matrix/client/v3{room.path}/send/m.room.message", json="hello")
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_BAD_JSON")


@pytest.mark.parametrize("raw", ["{id}", "%21{opaque}"], ids=["raw", "encoded"])
def test_room_without_a_domain(bridge: httpx.Client, room: Room, raw: str) -> None:
    assert ":" not in room.id, "room version 12 is the homeserver's default"
    path = raw.format(id=room.id, opaque=room.id[1:])
    assert bridge.post(f"/rooms/{path}/send/m.room.message", json=HELLO).status_code == 200


@pytest.mark.parametrize("safe", ["", "!:"], ids=["encoded", "raw"])
def test_room_with_a_domain(bridge: httpx.Client, new_room: Callable[..., Room], safe: str) -> None:
    room = new_room(room_version="10")
    assert room.id.endswith(":localhost")
    answer = bridge.post(f"/rooms/{quote(room.id, safe=safe)}/send/m.room.message", json=HELLO)
    assert answer.status_code == 200


def test_alias_is_joined_once_and_sent_to(
    bridge_url: str, new_room: Callable[..., Room], make_account: MakeAccount
) -> None:
    room = new_room(room_alias_name="to/be-joined", preset="public_chat")
    stranger = make_account()
    alias = quote("#to/be-joined:localhost", safe="")
    with httpx.Client(base_url=bridge_url, trust_env=False) as client:
        client.params = client.params.set("access_token", stranger.access_token)
        for _ in range(2):
            answer = client.post(f"/rooms/{alias}/send/m.room.message", json=HELLO)
            assert answer.status_code == 200, answer.text
    assert room.event(answer.json()["event_id"])["sender"] == stranger.user_id


def test_unknown_alias_is_the_homeservers_404(bridge: httpx.Client) -> None:
    answer = bridge.post("/rooms/%23nowhere:localhost/send/m.room.message", json=HELLO)
    assert (answer.status_code, answer.json()["errcode"]) == (404, "M_NOT_FOUND")


def test_api_key_sends_as_the_bot(anyone: httpx.Client, room: Room) -> None:
    for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        answer = anyone.post(f"{room.path}/send/m.room.message", json=HELLO, headers=headers)
        assert room.event(answer.json()["event_id"])["sender"] == room.owner.user_id


def test_unknown_token_is_the_homeservers_401(anyone: httpx.Client, room: Room) -> None:
    answer = anyone.post(f"{room.path}/send/m.room.message?access_token=syt_wrong", json=HELLO)
    assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")


def test_room_of_others_is_the_homeservers_403(anyone: httpx.Client, room: Room, friend: Account) -> None:
    answer = anyone.post(f"{room.path}/send/m.room.message?access_token={friend.access_token}", json=HELLO)
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")


def test_wrong_payload_names_every_problem_and_sends_nothing(bridge: httpx.Client, room: Room) -> None:
    body = {"msgtype": "m.image", "body": 7, "info": {"size": "big"}, "url": "https://example.org/cat.png"}
    answer = bridge.post(f"{room.path}/send/m.room.message", json=body)
    assert answer.status_code == 400
    assert answer.json()["errcode"] == "M_BAD_JSON"
    problems = answer.json()["flowbridge"]["problems"]
    assert [(problem["pointer"], problem["schema"]) for problem in problems] == [
        ("/body", "m.room.message$m.image"),
        ("/info/size", "m.room.message$m.image"),
        ("/url", "m.room.message$m.image"),
    ]


def test_unknown_event_type_is_sent_under_the_general_rules(bridge: httpx.Client, room: Room) -> None:
    good = bridge.post(f"{room.path}/send/org.example.alert", json={"severity": 3, "payload": {"x": 1}})
    assert room.event(good.json()["event_id"])["content"] == {"severity": 3, "payload": {"x": 1}}
    bad = bridge.post(f"{room.path}/send/org.example.alert", json={"severity": 2.5})
    assert bad.json()["flowbridge"]["problems"][0]["pointer"] == "/severity"


@pytest.mark.parametrize("version", ["6", "11", "12"])
def test_limit_of_the_content_is_close_to_the_homeservers_own(
    bridge: httpx.Client, room: Room, make_room: MakeRoom, version: str
) -> None:
    """A message of this limit fits, and the homeserver itself refuses one that is longer by ten references."""
    made = make_room(room.owner, room_version=version)
    path = f"/rooms/{quote(made, safe='')}/send/m.room.message"
    limit = size.largest("m.room.message", None, made, room.owner.user_id)
    frame = len(json.dumps({"msgtype": "m.text", "body": ""}, separators=(",", ":")))
    largest = {"msgtype": "m.text", "body": "x" * (limit - frame)}
    sent = bridge.post(path, json=largest)
    assert sent.status_code == 200, sent.text
    answer = bridge.post(path, json={**largest, "body": largest["body"] + "x"})
    assert (answer.status_code, answer.json()["errcode"]) == (413, "M_TOO_LARGE")
    assert f"has room for {limit}:" in answer.json()["error"]
    direct = room.direct.put(
        f"/_matrix/client/v3{path}/too-long",
        json={**largest, "body": largest["body"] + "x" * 500},
        headers={"Authorization": f"Bearer {room.owner.access_token}"},
    )
    assert (direct.status_code, direct.json()["error"]) == (413, "event too large")


def test_largest_state_fits_when_it_replaces_another(bridge: httpx.Client, room: Room) -> None:
    limit = size.largest("org.example.note", "k", room.id, room.owner.user_id)
    for letter in "ab":
        content = {"text": letter * (limit - len('{"text":""}'))}
        answer = bridge.put(f"{room.path}/state/org.example.note/k", json=content)
        assert answer.status_code == 200, answer.text


def test_keys_beside_a_payload_are_named_and_have_no_effect(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(
        f"{room.path}/send/m.room.message", json={"payload": "done", "msgtype": "m.notice", "format": "markdown"}
    )
    assert answer.json()["flowbridge"] == {"ignored": ["msgtype", "format"]}
    assert room.event(answer.json()["event_id"])["content"] == {"msgtype": "m.text", "body": "done"}


def _send(bridge: httpx.Client, room: Room, content: dict[str, Any]) -> str:
    return str(bridge.post(f"{room.path}/send/m.room.message", json=content).json()["event_id"])
