"""Contents to which a real Synapse answers 500 each time are refused before they hold up a room; redactions arrive."""

import json
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.integration.conftest import Room

ALERT = "com.example.alert"


# type, state key or None, content, and where the mistake is; Synapse 1.163 answers 500 to each.
POISON: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "mention of null": (ALERT, None, {"m.mentions": {"user_ids": [None]}}, "/m.mentions/user_ids/0"),
    "mention of a number": (ALERT, None, {"m.mentions": {"user_ids": ["@a:b", 1]}}, "/m.mentions/user_ids/1"),
    "mention of an object": (ALERT, None, {"m.mentions": {"user_ids": [{}]}}, "/m.mentions/user_ids/0"),
    "mention in a state": (ALERT, "", {"m.mentions": {"user_ids": [None]}}, "/m.mentions/user_ids/0"),
    "mention in a sticker": (
        "m.sticker",
        None,
        {"body": "b", "info": {}, "url": "mxc://a/b", "m.mentions": {"user_ids": [[]]}},
        "/m.mentions/user_ids/0",
    ),
    "labels, a number": (ALERT, None, {"org.matrix.labels": -1}, "/org.matrix.labels"),
    "labels, one twice": (ALERT, None, {"org.matrix.labels": ["a", "a"]}, "/org.matrix.labels"),
    "labels, an array": (ALERT, None, {"org.matrix.labels": [[]]}, "/org.matrix.labels/0"),
    "redacts, an array": (ALERT, None, {"redacts": ["$x"]}, "/redacts"),
    "redacts, an object": ("m.room.message", None, {"msgtype": "m.text", "body": "", "redacts": {"a": 1}}, "/redacts"),
    "aliases, null": ("m.room.aliases", "localhost", {"aliases": None}, "/aliases"),
    "aliases, of null": ("m.room.aliases", "localhost", {"aliases": [None]}, "/aliases/0"),
    "join of another user": ("m.room.member", "@ada:flow.example", {"membership": "join"}, "/membership"),
}

# Wrong by the specification; Synapse takes some of it, and other homeservers, bridges and clients stumble over it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mentions, null": ({"m.mentions": None}, "/m.mentions"),
    "mentions, an array": ({"m.mentions": []}, "/m.mentions"),
    "mention of no user id": ({"m.mentions": {"user_ids": ["alice"]}}, "/m.mentions/user_ids/0"),
    "mention of all, a number": ({"m.mentions": {"room": 1}}, "/m.mentions/room"),
    "relation, a string": ({"m.relates_to": "$x"}, "/m.relates_to"),
    "relation type, null": ({"m.relates_to": {"rel_type": None, "event_id": "$x"}}, "/m.relates_to/rel_type"),
    "relation to a number": ({"m.relates_to": {"rel_type": "m.thread", "event_id": 1}}, "/m.relates_to/event_id"),
    "relation to nothing": ({"m.relates_to": {"rel_type": "m.thread"}}, "/m.relates_to/event_id"),
    "reply, a string": ({"m.relates_to": {"m.in_reply_to": "$x"}}, "/m.relates_to/m.in_reply_to"),
    "reply to nothing": ({"m.relates_to": {"m.in_reply_to": {}}}, "/m.relates_to/m.in_reply_to/event_id"),
    "annotation with a number": (
        {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$x", "key": 1}},
        "/m.relates_to/key",
    ),
}

RIGHT: dict[str, dict[str, Any]] = {
    "no mention": {"m.mentions": {}},
    "mentions": {"m.mentions": {"user_ids": ["@a:b", "@Old Name!:b:8448"], "room": False, "x.extra": [None]}},
    "no relation": {"m.relates_to": {}},
    "relation": {"m.relates_to": {"rel_type": "x.y", "event_id": "$x", "x.extra": None}},
    "reply": {"m.relates_to": {"m.in_reply_to": {"event_id": "$x"}, "is_falling_back": True}},
    "labels": {"org.matrix.labels": ["a", "b"]},
    "redacts, a string": {"redacts": "yes"},
    "edit": {"m.new_content": {"body": "b"}, "m.relates_to": {"rel_type": "m.replace", "event_id": "$x"}},
}


def way(room: Room, event_type: str, state_key: str | None) -> str:
    if state_key is None:
        return f"{room.path}/send/{event_type}/{secrets.token_hex(8)}"
    return f"{room.path}/state/{event_type}/{quote(state_key, safe='')}"


def pointers(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 400, answer.text
    assert answer.json()["errcode"] == "M_BAD_JSON"
    return [problem["pointer"] for problem in answer.json()["flowbridge"]["problems"]]


@pytest.mark.parametrize("name", POISON)
def test_what_synapse_answers_500_to_is_a_400_with_a_pointer(
    bridge: httpx.Client, new_room: Callable[..., Room], name: str
) -> None:
    event_type, state_key, content, pointer = POISON[name]
    room = new_room(preset="public_chat")
    direct = room.direct.put(
        f"/_matrix/client/v3{way(room, event_type, state_key)}",
        json=content,
        headers={"Authorization": f"Bearer {room.owner.access_token}"},
        timeout=30,
    )
    assert direct.status_code == 500, "Synapse has learnt to answer this"
    answer = bridge.put(way(room, event_type, state_key), json=content, headers={"Prefer": "respond-async"})
    assert pointers(answer) == [pointer]
    assert bridge.post(f"{room.path}/send/m.room.message", json={"msgtype": "m.text", "body": "on"}).status_code == 200


@pytest.mark.parametrize("name", WRONG)
def test_mentions_and_relations_are_checked_in_every_event_type(bridge: httpx.Client, room: Room, name: str) -> None:
    content, pointer = WRONG[name]
    assert pointers(bridge.post(f"{room.path}/send/{ALERT}", json=content)) == [pointer]
    assert pointers(bridge.put(f"{room.path}/state/{ALERT}", json=content)) == [pointer]
    assert pointers(bridge.post(f"/validate/{ALERT}", json=content)) == [pointer]
    text = {"msgtype": "m.text", "body": "b", **content}
    assert pointers(bridge.post(f"{room.path}/send/m.room.message", json=text)) == [pointer]


@pytest.mark.parametrize("name", RIGHT)
def test_what_clients_send_passes_in_every_event_type(bridge: httpx.Client, room: Room, name: str) -> None:
    text = {"msgtype": "m.text", "body": "b"}
    known = bridge.post(f"{room.path}/send/m.room.message", json=text).json()["event_id"]
    content = json.loads(json.dumps(RIGHT[name]).replace("$x", known))
    sent = bridge.post(f"{room.path}/send/{ALERT}", json=content)
    assert room.event(sent.raise_for_status().json()["event_id"])["content"] == content
    assert bridge.put(f"{room.path}/state/{ALERT}", json=content).status_code == 200
    assert bridge.post(f"{room.path}/send/m.room.message", json={**text, **content}).status_code == 200


@pytest.mark.parametrize("version", ["1", "10", "11", "12"])
def test_redaction_that_is_sent_as_an_event_redacts_once(
    bridge: httpx.Client, new_room: Callable[..., Room], version: str
) -> None:
    room = new_room(room_version=version)
    said = bridge.post(f"{room.path}/send/m.room.message", json={"msgtype": "m.text", "body": "spam"})
    target = said.json()["event_id"]
    content = {"redacts": target, "reason": "spam", "com.example.note": "by hand"}
    key = {"Idempotency-Key": "once"}
    answers = [bridge.post(f"{room.path}/send/m.room.redaction", json=content, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert "idempotent-replayed" in answers[1].headers
    (event_id,) = {answer.json()["event_id"] for answer in answers}
    redaction = room.event(event_id)
    assert redaction["type"] == "m.room.redaction"
    assert redaction["content"]["reason"] == "spam"
    assert redaction["content"]["com.example.note"] == "by hand"
    assert target in (redaction.get("redacts"), redaction["content"].get("redacts"))
    assert room.event(target)["content"] == {}
    assert bridge.post(f"{room.path}/send/m.room.message", json={"msgtype": "m.text", "body": "on"}).status_code == 200


def test_redaction_keeps_its_place_among_sends(bridge: httpx.Client, room: Room) -> None:
    said = bridge.post(f"{room.path}/send/m.room.message", json={"msgtype": "m.text", "body": "one"})
    whole = {"type": "m.room.redaction", "redacts": said.json()["event_id"], "content": {"reason": "order"}}
    later = {"Prefer": "respond-async"}
    bridge.post(f"{room.path}/send/m.room.redaction", json=whole, headers=later).raise_for_status()
    last = bridge.post(f"{room.path}/send/m.room.message", json={"msgtype": "m.text", "body": "two"})
    assert room.event(said.json()["event_id"])["content"] == {}
    assert last.status_code == 200
    assert (
        bridge.put(
            f"/_matrix/client/v3{room.path}/send/m.room.redaction/a%2Fb", json={"redacts": said.json()["event_id"]}
        )
        .json()["event_id"]
        .startswith("$")
    )


@pytest.mark.parametrize("redacts", [None, "", "first", "$", ["$first"], "$a\nb", "$" + "a" * 255])
def test_redaction_of_nothing_is_a_400(bridge: httpx.Client, room: Room, redacts: object) -> None:
    answer = bridge.post(f"{room.path}/send/m.room.redaction", json={"redacts": redacts, "reason": "spam"})
    assert pointers(answer) == ["/redacts"]
    assert pointers(bridge.post(f"{room.path}/send/m.room.redaction", json={"reason": "spam"})) == ["/redacts"]
