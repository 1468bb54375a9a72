"""Messages in a real Synapse: what it makes of their relations, and what its own clients see."""

import io
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from flowbridge.cli.demo.synapse import Account
from tests.conftest import MakeAccount
from tests.integration.conftest import KEY, Room
from tests.patience import PATIENCE


def say(bridge: httpx.Client, room: Room, body: Any, what: str = "messages") -> dict[str, Any]:
    answer = bridge.post(f"{room.path}/{what}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def relations(room: Room, event_id: str, rel_type: str) -> list[str]:
    """What the homeserver knows to be related to an event."""
    answer = room.direct.get(
        f"/_matrix/client/v1{room.path}/relations/{event_id}/{rel_type}",
        headers={"Authorization": f"Bearer {room.owner.access_token}"},
    )
    return [event["event_id"] for event in answer.raise_for_status().json()["chunk"]]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_text_of_curl_is_a_message(bridge: httpx.Client, room: Room, method: str) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = bridge.request(method, f"{room.path}/messages", content="backup done, 100 %", headers=headers)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["event_id", "events", "delivery_id"]
    content = room.event(answer.json()["event_id"])["content"]
    assert content == {"msgtype": "m.text", "body": "backup done, 100 %", "m.mentions": {}}


def test_markdown_and_html_are_shown(bridge: httpx.Client, room: Room) -> None:
    markdown = say(bridge, room, {"markdown": "**done**: `x`\n\n- a", "title": "Backup", "mentions": ["@room"]})
    content = room.event(markdown["event_id"])["content"]
    assert content["formatted_body"] == (
        "<p><strong>Backup</strong></p><p><strong>done</strong>: <code>x</code></p>\n<ul>\n<li>a</li>\n</ul>"
    )
    assert content["m.mentions"] == {"room": True}
    html = say(bridge, room, {"html": "<p>a</p><script>b</script>", "msgtype": "m.notice"})
    content = room.event(html["event_id"])["content"]
    assert (content["msgtype"], content["body"], content["formatted_body"]) == ("m.notice", "a", "<p>a</p>")


def test_mention_pings_and_text_does_not(bridge: httpx.Client, room: Room, make_account: MakeAccount) -> None:
    other = make_account()
    headers = {"Authorization": f"Bearer {other.access_token}"}
    bridge.post(f"{room.path}/invite", json={"user_id": other.user_id}).raise_for_status()
    room.direct.post(f"/_matrix/client/v3/join/{room.id}", headers=headers, json={}).raise_for_status()
    say(bridge, room, {"text": f"{other.user_id} and @room are only named"})
    say(bridge, room, {"text": f"{other.user_id} is pinged", "mentions": [other.user_id]})

    def highlights() -> list[str]:
        answer = room.direct.get("/_matrix/client/v3/notifications?only=highlight", headers=headers)
        found = answer.raise_for_status().json()["notifications"]
        return [each["event"]["content"]["body"] for each in found]

    deadline = time.monotonic() + PATIENCE
    while not highlights():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert highlights() == [f"{other.user_id} is pinged"]


@pytest.mark.parametrize("by", ["event", "delivery", "key"])
def test_edit_thread_and_reply_are_what_the_homeserver_takes_them_for(
    bridge: httpx.Client, room: Room, by: str
) -> None:
    first = say(bridge, room, {"text": "first", "key": "build 1"})
    target = {"event": first["event_id"], "delivery": first["delivery_id"], "key": "key:build 1"}[by]
    edit = say(bridge, room, {"markdown": "*second*", "edit": target})
    assert relations(room, first["event_id"], "m.replace") == [edit["event_id"]]
    threaded = say(bridge, room, {"text": "in the thread", "thread": target})
    again = say(bridge, room, {"text": "in it, too", "thread": threaded["delivery_id"], "reply_to": target})
    assert relations(room, first["event_id"], "m.thread") == [again["event_id"], threaded["event_id"]]
    reply = say(bridge, room, {"text": "reply", "reply_to": target})
    relation = room.event(reply["event_id"])["content"]["m.relates_to"]
    assert relation == {"m.in_reply_to": {"event_id": first["event_id"]}}
    shown = room.event(first["event_id"])
    assert shown["unsigned"]["m.relations"]["m.replace"]["content"]["m.new_content"]["body"] == "*second*"


def test_message_of_another_room_and_somebody_elses_are_no_targets(
    bridge: httpx.Client, room: Room, new_room: Callable[..., Room], make_account: MakeAccount
) -> None:
    elsewhere = say(bridge, new_room(), {"text": "elsewhere"})["event_id"]
    other = make_account()
    bridge.post(f"{room.path}/invite", json={"user_id": other.user_id}).raise_for_status()
    headers = {"Authorization": f"Bearer {other.access_token}"}
    bridge.post(f"{room.path}/join", headers=headers).raise_for_status()
    theirs = httpx.post(
        f"{bridge.base_url}{room.path}/messages", content="mine", headers=headers, trust_env=False
    ).json()["event_id"]
    for body in (
        {"text": "a", "thread": elsewhere},
        {"text": "a", "reply_to": elsewhere},
        {"text": "a", "edit": theirs},
    ):
        answer = bridge.post(f"{room.path}/messages", json=body)
        assert answer.status_code == 400, answer.text
    assert f"is a message of {other.user_id}" in answer.json()["error"]
    assert room.bodies() == ["mine"]
    say(bridge, room, {"text": "answer", "reply_to": theirs})


def test_key_updates_its_first_message(bridge: httpx.Client, room: Room) -> None:
    events = [say(bridge, room, {"text": f"{done} %", "key": "upload"})["event_id"] for done in (0, 50, 100)]
    newest = room.event(events[0])["unsigned"]["m.relations"]["m.replace"]
    assert (newest["event_id"], newest["content"]["m.new_content"]["body"]) == (events[2], "100 %")


def test_reaction_and_redaction(bridge: httpx.Client, room: Room) -> None:
    first = say(bridge, room, {"text": "first", "key": "k"})
    reaction = say(bridge, room, {"target": "key:k", "key": "✅"}, "reactions")
    assert relations(room, first["event_id"], "m.annotation") == [reaction["event_id"]]
    say(bridge, room, {"target": first["delivery_id"], "reason": "wrong room"}, "redactions")
    gone = room.event(first["event_id"])
    assert gone["content"] == {}
    assert gone["unsigned"]["redacted_because"]["content"]["reason"] == "wrong room"


def test_uploaded_files_follow_their_text(bridge: httpx.Client, room: Room) -> None:
    uri = bridge.post("/media?filename=cat.png", content=b"\x89PNG...", headers={"Content-Type": "image/png"}).json()
    files = [{**uri, "filename": "cat.png", "caption": "a cat"}, {**uri, "mimetype": "audio/ogg"}]
    answer = say(bridge, room, {"text": "see", "attachments": files})
    contents = [room.event(event_id)["content"] for event_id in answer["events"]]
    assert [content["msgtype"] for content in contents] == ["m.text", "m.image", "m.audio"]
    assert (contents[1]["body"], contents[1]["filename"]) == ("a cat", "cat.png")


def test_long_text_becomes_a_file(bridge: httpx.Client, room: Room) -> None:
    answer = say(bridge, room, {"text": "line\n" * 20_000, "overflow": "file"})
    file = room.event(answer["events"][1])["content"]
    assert file["info"] == {"mimetype": "text/plain", "size": 100_000}
    server, media_id = file["url"].removeprefix("mxc://").split("/")
    data = bridge.get(f"/media/{server}/{media_id}")
    assert data.content == b"line\n" * 20_000


def test_direct_room_is_made_once_and_is_one_for_clients(
    bridge: httpx.Client, owner: Account, synapse: Any, make_account: MakeAccount, new_room: Callable[..., Room]
) -> None:
    other = make_account()
    path = f"/rooms/{other.user_id}/messages"
    answers = [bridge.post(path, json={"text": "hi"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    headers = {"Authorization": f"Bearer {owner.access_token}"}
    with httpx.Client(base_url=synapse.url, headers=headers, trust_env=False) as direct:
        named = direct.get(f"/_matrix/client/v3/user/{owner.user_id}/account_data/m.direct").json()
        (room_id,) = named[other.user_id]
        for answer in answers:
            direct.get(f"/_matrix/client/v3/rooms/{room_id}/event/{answer.json()['event_id']}").raise_for_status()
    invited = httpx.get(
        f"{synapse.url}/_matrix/client/v3/sync",
        headers={"Authorization": f"Bearer {other.access_token}"},
        trust_env=False,
    ).json()["rooms"]["invite"]
    assert list(invited) == [room_id]


def test_api_key_says_it_as_the_bot(bridge_url: str, room: Room) -> None:
    answer = httpx.post(
        f"{bridge_url}{room.path}/messages", content="hi", headers={"X-API-Key": KEY}, trust_env=False, timeout=30
    )
    assert room.event(answer.json()["event_id"])["sender"] == room.owner.user_id


def test_files_of_a_form_are_in_the_room_and_can_be_downloaded(bridge: httpx.Client, room: Room) -> None:
    file = io.BytesIO()
    Image.new("RGB", (320, 200), "teal").save(file, "JPEG")
    given = [("file", ("yard.jpg", file.getvalue(), "image/jpeg")), ("file", ("log.txt", b"x" * 700_000, "text/plain"))]
    answer = bridge.post(f"{room.path}/messages", data={"text": "the yard"}, files=given)
    assert answer.status_code == 200, answer.text
    text, picture, log = (room.event(event_id)["content"] for event_id in answer.json()["events"])
    assert text["body"] == "the yard"
    assert (picture["msgtype"], picture["info"]["w"], picture["info"]["h"]) == ("m.image", 320, 200)
    assert (log["msgtype"], log["info"]["size"]) == ("m.file", 700_000)
    for event, sent in ((picture, file.getvalue()), (log, b"x" * 700_000)):
        path = event["url"].removeprefix("mxc://")
        found = room.direct.get(
            f"/_matrix/client/v1/media/download/{path}", headers={"Authorization": f"Bearer {room.owner.access_token}"}
        )
        assert found.content == sent
