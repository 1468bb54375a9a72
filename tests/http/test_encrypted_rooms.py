"""Contract §4, 15: plain text never gets into an encrypted room by accident."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import (
    HELLO,
    SEND,
    Bridge,
    as_caller,
    new_token,
    running,
)
from tests.http.sends import BROKEN, MATRIX, SURFACES, check_queued, event_id
from tests.upstream import Behaviour, Rooms, Upstream

ENCRYPTED = scripted.answer({"algorithm": "m.megolm.v1.aes-sha2"})


def encrypted(rooms: Rooms, behaviour: Behaviour = ENCRYPTED) -> scripted.Script:
    return lambda request: (
        behaviour if "/state/m.room.encryption" in request.target and request.method == "GET" else rooms(request)
    )


@pytest.fixture
def fresh_room() -> str:
    """One that the bridge has not looked at yet."""
    return f"/rooms/!{new_token()}:upstream"


@SURFACES
def test_plain_text_is_refused_at_once_in_an_encrypted_room(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, fresh_room: str, prefix: str
) -> None:
    upstream.script(encrypted(rooms))
    answer = caller.post(f"{prefix}{fresh_room}/send/m.room.message", json=HELLO)
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert "is encrypted" in answer.json()["error"]
    assert "FLOWBRIDGE_ENCRYPTED_ROOMS=allow" in answer.json()["error"]
    bridge.wait_until(answer.headers["flowbridge-delivery"], "dead")
    assert rooms.events == []


def test_what_is_never_plain_text_passes_into_an_encrypted_room(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, fresh_room: str
) -> None:
    upstream.script(encrypted(rooms))
    relation = {"rel_type": "m.annotation", "event_id": "$x", "key": "👍"}
    for type_, content in {
        "m.reaction": {"m.relates_to": relation},
        "m.room.topic": {"topic": "t"},
        "m.room.redaction": {"redacts": "$x"},
        "m.room.encrypted": {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "c", "session_id": "s"},
    }.items():
        assert caller.post(f"{fresh_room}/send/{type_}", json=content).status_code == 200, type_
    assert caller.put(f"{fresh_room}/state/org.example.reading", json={"a": 1}).status_code == 200
    assert len(rooms.events) == 5


@pytest.mark.parametrize(
    "behaviour",
    [
        BROKEN,
        scripted.html(404),
        scripted.hang_up,
        scripted.matrix_error(404, "M_UNRECOGNIZED", "Unrecognized request"),
    ],
    ids=["500", "html", "hangs-up", "unrecognized"],
)
def test_room_of_which_nobody_can_tell_is_not_plain(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, rooms: Rooms, fresh_room: str, behaviour: Behaviour
) -> None:
    upstream.script(encrypted(rooms, behaviour))
    delivery = check_queued(hasty_caller.post(f"{fresh_room}/send/m.room.message", json=HELLO))
    answer = hasty_caller.post(f"{MATRIX}{fresh_room}/send/m.room.message", json=HELLO)
    assert answer.status_code in (429, 502)
    assert rooms.events == []
    upstream.script(rooms)
    hasty.wait_until(delivery, "sent")
    assert len(rooms.events) == 1


def test_setting_lets_plain_text_into_encrypted_rooms(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    upstream.script(encrypted(rooms))
    with running(upstream, tmp_path, encrypted_rooms="allow") as bridge, as_caller(bridge) as caller:
        assert event_id(caller.post(SEND, json=HELLO)) == "$1"
    assert not any("encryption" in request.target for request in upstream.requests)


@pytest.mark.parametrize("setting", ["refuse", "allow"])
def test_rooms_say_which_are_encrypted_and_what_becomes_of_plain_text_there(
    upstream: Upstream, tmp_path: Path, setting: str
) -> None:
    state = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
    joined: dict[str, Any] = {"!secret": {"state": {"events": [state]}}, "!open": {}}
    upstream.always(scripted.answer({"next_batch": "s1", "rooms": {"join": joined}}), at="/sync")
    with running(upstream, tmp_path, encrypted_rooms=setting) as bridge, as_caller(bridge) as caller:
        answer = caller.get("/rooms")
    assert answer.json()["rooms"] == [{"room_id": "!open"}, {"room_id": "!secret", "encrypted": True}]
    assert answer.json()["encrypted_rooms"] == setting
