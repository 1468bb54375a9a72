"""Room state on a real Synapse: set by `/send/`, set and read by `/state/`."""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account
from tests.integration.conftest import Room


def test_state_type_sent_as_a_message_becomes_state(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(f"{room.path}/send/m.room.name", json={"name": "Operations"})
    assert answer.status_code == 200
    assert room.state("m.room.name") == {"name": "Operations"}
    assert room.event(answer.json()["event_id"])["state_key"] == ""


def test_pinned_events_sent_as_a_message_take_effect(bridge: httpx.Client, room: Room) -> None:
    bridge.post(f"{room.path}/send/m.room.pinned_events", json={"pinned": ["$someevent:example.org"]})
    assert room.state("m.room.pinned_events") == {"pinned": ["$someevent:example.org"]}


def test_flow_message_for_a_topic_sends_its_payload(bridge: httpx.Client, room: Room) -> None:
    body = {"payload": {"topic": "on call: Ada"}, "topic": "mqtt/topic", "_msgid": "1", "qos": 0}
    bridge.post(f"{room.path}/send/m.room.topic", json=body)
    assert room.state("m.room.topic") == {"topic": "on call: Ada"}


def test_state_key_of_a_whole_event_is_used(bridge: httpx.Client, room: Room, friend: Account) -> None:
    body = {"type": "m.room.member", "state_key": friend.user_id, "content": {"membership": "invite"}}
    assert bridge.post(f"{room.path}/send/m.room.member", json=body).status_code == 200
    assert room.state("m.room.member", friend.user_id)["membership"] == "invite"


def test_member_without_a_user_is_refused(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(f"{room.path}/send/m.room.member", json={"membership": "invite"})
    assert answer.json()["flowbridge"]["problems"][0]["pointer"] == "/state_key"


@pytest.mark.parametrize("surface", ["", "/_matrix/client/v3", "/_matrix/client/r0", "/_matrix/client/api/v1"])
@pytest.mark.parametrize("suffix", ["", "/"], ids=["bare", "trailing-slash"])
def test_state_is_set_and_read(bridge: httpx.Client, room: Room, surface: str, suffix: str) -> None:
    path = f"{surface}{room.path}/state/m.room.topic{suffix}"
    assert bridge.put(path, json={"topic": path}).status_code == 200
    assert bridge.get(path).json() == {"topic": path}
    assert bridge.get(f"{path}?format=event").json()["content"] == {"topic": path}


def test_state_key_with_a_slash_survives(bridge: httpx.Client, room: Room) -> None:
    path = f"{room.path}/state/org.example.thing/{quote('a/b c', safe='')}"
    assert bridge.put(path, json={"on": True}).status_code == 200
    assert room.state("org.example.thing", "a/b c") == {"on": True}
    assert bridge.get(path).json() == {"on": True}


def test_setting_what_is_already_set_answers_the_same_event(bridge: httpx.Client, room: Room) -> None:
    path = f"{room.path}/state/m.room.name"
    first, second = (bridge.put(path, json={"name": "Same"}).json()["event_id"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("event_type", "content"),
    [("m.room.name", {"name": ""}), ("m.room.topic", {"topic": ""}), ("m.room.pinned_events", {"pinned": []})],
)
def test_state_that_an_empty_object_does_not_clear(
    bridge: httpx.Client, room: Room, event_type: str, content: dict[str, Any]
) -> None:
    path = f"{room.path}/state/{event_type}"
    assert bridge.put(path, json={}).status_code == 400
    assert bridge.put(path, json=content).status_code == 200


@pytest.mark.parametrize("event_type", ["m.room.avatar", "m.room.canonical_alias", "m.room.image_pack"])
def test_empty_object_clears_state_by_put_only(bridge: httpx.Client, room: Room, event_type: str) -> None:
    assert bridge.put(f"{room.path}/state/{event_type}", json={}).status_code == 200
    assert room.state(event_type) == {}


def test_avatar_needs_its_url_by_send(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.post(f"{room.path}/send/m.room.avatar", json={})
    assert answer.json()["flowbridge"]["problems"][0]["pointer"] == "/url"


def test_message_type_is_refused_as_state(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.put(f"{room.path}/state/m.room.message", json={"msgtype": "m.text", "body": "x"})
    assert answer.status_code == 400
    assert "/send/" in answer.json()["error"]


def test_power_levels_and_tombstone(bridge: httpx.Client, new_room: Callable[..., Room], owner: Account) -> None:
    room = new_room(room_version="10")
    levels = {"users": {owner.user_id: 100}, "events_default": 0, "ban": 50}
    assert bridge.post(f"{room.path}/send/m.room.power_levels", json=levels).status_code == 200
    tombstone = {"body": "moved", "replacement_room": "!elsewhere:localhost"}
    assert bridge.post(f"{room.path}/send/m.room.tombstone", json=tombstone).status_code == 200
    assert room.state("m.room.tombstone") == tombstone


def test_reading_state_that_is_not_there_is_the_homeservers_404(bridge: httpx.Client, room: Room) -> None:
    answer = bridge.get(f"{room.path}/state/org.example.none")
    assert (answer.status_code, answer.json()["errcode"]) == (404, "M_NOT_FOUND")
