"""`POST /rooms/{roomId}/messages`, reactions and redactions: contract §5."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.models import ApiKey
from flowbridge.store import Database, api_keys
from tests import upstream as scripted
from tests.http.conftest import ROOM, Bridge, as_caller, new_token, running
from tests.http.sends import ASYNC, KEYED, check_queued, first, held, is_replayed, lines, repeated
from tests.processes import REPOSITORY
from tests.upstream import Behaviour, Request, Rooms, Upstream, user_of

MESSAGES = f"/rooms/{ROOM}/messages"
REACTIONS = f"/rooms/{ROOM}/reactions"
REDACTIONS = f"/rooms/{ROOM}/redactions"
MXC = "mxc://upstream/abc"
BOMB = "![" * 8_000 + "[a](" * 50


def said(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["delivery_id"] == answer.headers["flowbridge-delivery"]
    assert found["event_id"] == found["events"][0]
    return found


def contents(rooms: Rooms) -> list[dict[str, Any]]:
    return [event.content for event in rooms.events]


def problems(answer: httpx.Response) -> dict[str, str]:
    assert answer.json()["errcode"] == "M_BAD_JSON"
    return {each["pointer"]: each["message"] for each in answer.json()["flowbridge"]["problems"]}


# forms of a body


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    ("body", "type_"),
    [
        pytest.param(b"backup done", "application/x-www-form-urlencoded", id="curl -d"),
        pytest.param(b"backup done\n", "", id="curl -T -"),
        pytest.param(b'{"text": "backup done"}', "application/json", id="json"),
        pytest.param(b'{"payload": "backup done", "topic": "x"}', "application/json", id="flow-message"),
        pytest.param(b'{"payload": {"text": "backup done"}}', "", id="flow-message-of-an-object"),
        pytest.param(b'"backup done"', "application/json", id="string"),
        pytest.param(b"text=backup+done", "application/x-www-form-urlencoded", id="form"),
        pytest.param(
            b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nbackup done\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            id="curl -F",
        ),
    ],
)
def test_each_form_of_a_body_is_a_message(
    caller: httpx.Client, rooms: Rooms, method: str, body: bytes, type_: str
) -> None:
    headers = {"Content-Type": type_} if type_ else {}
    answer = said(caller.request(method, MESSAGES, content=body, headers=headers))
    assert contents(rooms) == [{"msgtype": "m.text", "body": "backup done", "m.mentions": {}}]
    assert answer["events"] == ["$1"]
    assert "flowbridge" not in answer


def test_query_says_what_a_text_is(caller: httpx.Client, rooms: Rooms) -> None:
    query = {"format": "markdown", "title": "T", "msgtype": "m.notice", "mentions": "@al:hs,@room", "key": "k"}
    said(caller.post(MESSAGES, params=query, content="**hi** @al:hs"))
    assert contents(rooms) == [
        {
            "msgtype": "m.notice",
            "body": "T\n**hi** @al:hs",
            "format": "org.matrix.custom.html",
            "formatted_body": "<strong>T</strong><br><strong>hi</strong> "
            '<a href="https://matrix.to/#/@al:hs">@al:hs</a>',
            "m.mentions": {"user_ids": ["@al:hs"], "room": True},
        }
    ]


def test_html_is_cut_and_has_a_readable_body(caller: httpx.Client, rooms: Rooms) -> None:
    said(caller.post(MESSAGES, json={"html": "<ul><li onclick=x>a</ul><script>x</script><a href=javascript:x>b</a>"}))
    (content,) = contents(rooms)
    assert content["formatted_body"] == "<ul><li>a</li></ul><a>b</a>"
    assert content["body"] == "- a\n\nb"


@pytest.mark.parametrize(
    ("query", "body", "status", "sentence"),
    [
        ("", {"text": "a", "markdwon": "b"}, 400, "message: is unknown here: did you mean markdown? at /markdwon"),
        ("", {"text": "a", "html": "b"}, 400, "message: is one too many: there is text already, and a message has one"),
        ("", {"text": "a", "key": "x" * 10_000}, 400, "message: must be at most 255 bytes, without control characters"),
        ("?colour=red", {"text": "a"}, 400, "colour: unknown here; known are access_token, edit, format, key, "),
        ("?format=rtf", {"text": "a"}, 400, "format: must be text, markdown or html, not 'rtf'"),
        ("", {"markdown": "a" * 16_385}, 413, "markdown: it is 16385 bytes long, and at most 16384 are rendered: send"),
        ("", {"html": "a" * 32_769}, 413, "html: it is 32769 bytes long, and at most 32768 are rendered: send it as"),
        ("", {"text": "a" * 65_000}, 413, "the content is 650"),
        ("", {"text": "a" * 33_000, "edit": "$e"}, 413, "the content is 66"),
        ("", {"text": "a" * 33_000, "key": "k"}, 413, "the content is 66"),
        ("", {"html": "<b>" * 101}, 400, "render: has more than 100 tags open at a time at /html"),
        ("", {"html": "<script>x</script>"}, 400, "render: holds nothing that a room could show at /html"),
        ("", {"text": "a", "attachments": [{"url": "x"}]}, 400, "message: is no address of a file on the web"),
        ("", {"text": "a", "thread": "no such"}, 400, "message: is no target: give an event id ($…), the id of a"),
        (
            "",
            {"text": "a", "thread": "NoSuchDelivery"},
            404,
            "message: there is no delivery NoSuchDelivery of yours: it",
        ),
    ],
)
def test_bad_message_is_refused(
    caller: httpx.Client, upstream: Upstream, query: str, body: Any, status: int, sentence: str
) -> None:
    answer = caller.post(f"{MESSAGES}{query}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].startswith(sentence)
    assert "flowbridge-delivery" not in answer.headers
    assert upstream.events == []


def test_every_problem_is_told_at_once(caller: httpx.Client) -> None:
    body = {"text": 5, "mentions": ["alice"], "msgtype": "m.image", "nonsense": True}
    assert set(problems(caller.post(MESSAGES, json=body))) == {"/text", "/mentions/0", "/msgtype", "/nonsense"}


@pytest.mark.parametrize("room", ["@nobody", "@:hs", "@a:", "nonsense"])
def test_what_is_no_room_is_refused(caller: httpx.Client, room: str) -> None:
    answer = caller.post(f"/rooms/{room}/messages", json={"text": "a"})
    assert answer.status_code == 400
    assert "is not a " in answer.json()["error"]


def test_history_is_still_read_below_the_same_path(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.script(
        lambda request: scripted.answer({"chunk": [], "start": "t"}) if "/messages" in request.path else None
    )
    assert caller.get(MESSAGES).json()["chunk"] == []


def test_no_credential_is_a_401(bridge: Bridge) -> None:
    for path in (MESSAGES, REACTIONS, REDACTIONS):
        assert bridge.post(path, b'{"text": "x"}', "Authorization: Basic x").status == 401


@pytest.mark.parametrize(
    ("path", "event_type"),
    [(MESSAGES, "m.room.message"), (REACTIONS, "m.reaction"), (REDACTIONS, "m.room.redaction")],
)
def test_refused_call_is_in_the_delivery_log(caller: httpx.Client, path: str, event_type: str) -> None:
    said(caller.post(MESSAGES, json={"text": "x"}))  # from here on it is known whose token it is
    assert caller.post(path, json={"nonsense": 1}).status_code == 400
    (entry,) = caller.get("/deliveries?state=refused").json()["deliveries"]
    assert (entry["event_type"], entry["room_id"]) == (event_type, ROOM)
    assert "is unknown here" in entry["error"]["error"]


# several events


def attached(number: int = 2, **more: Any) -> dict[str, Any]:
    files = [{"content_uri": MXC, "filename": f"{at}.png"} for at in range(number)]
    return {"text": "see", "attachments": files, **more}


def test_attachments_follow_the_text(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    answer = said(caller.post(MESSAGES, json=attached(thread="$root")))
    assert rooms.bodies == ["see", "0.png", "1.png"]
    assert answer["events"] == ["$1", "$2", "$3"]
    assert {content["m.relates_to"]["event_id"] for content in contents(rooms)} == {"$root"}
    assert contents(rooms)[1]["info"] == {"mimetype": "image/png"}
    for number in (1, 2):
        assert bridge.wait_until(f"{answer['delivery_id']}.{number}", "sent")


def test_one_key_covers_the_whole_message(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    answers = [caller.post(MESSAGES, json=attached(), headers=KEYED) for _ in range(2)]
    bridge.wait_until(f"{answers[0].json()['delivery_id']}.2", "sent")
    answers.append(caller.post(MESSAGES, json=attached(), headers=KEYED))
    assert [is_replayed(answer) for answer in answers] == [False, True, True]
    assert [said(answer) for answer in answers] == [said(answers[0])] * 3
    assert len(rooms.events) == 3
    for other in (attached(1), attached(3), attached(text="other"), attached(key="k")):
        answer = caller.post(MESSAGES, json=other, headers=KEYED)
        assert answer.status_code == 422
        assert "Idempotency-Key" in answer.json()["error"]
    assert len(rooms.events) == 3


def test_same_key_ten_times_at_once_is_one_message(bridge: Bridge, rooms: Rooms) -> None:
    token = new_token()

    def send(_: int) -> httpx.Response:
        with as_caller(bridge, token) as client:
            return client.post(MESSAGES, json=attached(), headers=KEYED)

    with ThreadPoolExecutor(10) as callers:
        answers = list(callers.map(send, range(10)))
    assert {json.dumps(said(answer)) for answer in answers} == {json.dumps(said(answers[0]))}
    assert sorted(map(is_replayed, answers)) == [False] + [True] * 9
    assert rooms.bodies == ["see", "0.png", "1.png"]


def test_queued_message_is_a_202_and_comes(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    delivery = check_queued(caller.post(MESSAGES, json=attached(), headers=ASYNC))
    assert caller.get(f"/deliveries/{delivery}.2").json()["status"] == "queued"
    go.set()
    bridge.wait_until(f"{delivery}.2", "sent")
    assert rooms.bodies == ["see", "0.png", "1.png"]


def test_message_of_which_nothing_is_sent_is_an_error(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.script(lambda r: scripted.matrix_error(403, "M_FORBIDDEN", "no") if r.method == "PUT" else None)
    answer = caller.post(MESSAGES, json=attached())
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")


def test_message_of_which_a_part_is_sent_is_no_error(caller: httpx.Client, upstream: Upstream, rooms: Rooms) -> None:
    def script(request: Request) -> Behaviour | None:
        if request.method == "PUT" and b'"0.png"' in request.body:
            return scripted.matrix_error(413, "M_TOO_LARGE", "too large")
        return rooms(request)

    upstream.script(script)
    answer = caller.post(MESSAGES, json=attached())
    assert answer.status_code == 200
    assert answer.json()["events"] == ["$1", "$2"]
    (failed,) = answer.json()["flowbridge"]["failed"]
    assert failed["errcode"] == "M_TOO_LARGE"
    assert failed["delivery_id"] == f"{answer.json()['delivery_id']}.1"
    assert rooms.bodies == ["see", "1.png"]


# targets


def test_targets_are_event_ids_deliveries_and_keys(caller: httpx.Client, rooms: Rooms) -> None:
    sent = said(caller.post(MESSAGES, json={"text": "first", "key": "build 17"}))
    for target in (sent["event_id"], sent["delivery_id"], "key:build 17"):
        for name in ("reply_to", "thread", "edit"):
            said(caller.post(MESSAGES, json={"text": name, name: target}))
    relations = [content["m.relates_to"] for content in contents(rooms)[1:]]
    assert relations[:3] == [
        {"m.in_reply_to": {"event_id": "$1"}},
        {"rel_type": "m.thread", "event_id": "$1", "is_falling_back": True, "m.in_reply_to": {"event_id": "$1"}},
        {"rel_type": "m.replace", "event_id": "$1"},
    ]
    assert relations[3:] == relations[:3] * 2


def test_target_that_is_queued_is_found_when_its_turn_comes(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    queued = check_queued(caller.post(MESSAGES, json={"text": "first", "key": "k"}, headers=ASYNC))
    others = [
        check_queued(caller.post(MESSAGES, json={"text": "reply", "reply_to": queued}, headers=ASYNC)),
        check_queued(caller.post(MESSAGES, json={"text": "second", "key": "k"}, headers=ASYNC)),
        check_queued(caller.post(REACTIONS, json={"target": queued, "key": "👍"}, headers=ASYNC)),
        check_queued(caller.post(REDACTIONS, json={"target": "key:k", "reason": "old"}, headers=ASYNC)),
    ]
    go.set()
    for delivery in others:
        bridge.wait_until(delivery, "sent")
    assert [content.get("m.relates_to") for content in contents(rooms)[1:4]] == [
        {"m.in_reply_to": {"event_id": "$1"}},
        {"rel_type": "m.replace", "event_id": "$1"},
        {"rel_type": "m.annotation", "event_id": "$1", "key": "👍"},
    ]
    redact = next(request for request in upstream.requests if "/redact/" in request.path)
    assert redact.parts[6] == "$1"
    assert redact.json() == {"reason": "old"}


def test_unknown_key_makes_a_new_message_and_the_answer_says_so(
    bridge: Bridge, caller: httpx.Client, rooms: Rooms
) -> None:
    answer = said(caller.post(MESSAGES, json={"text": "x", "reply_to": "key:nothing"}, headers=KEYED))
    note = "reply_to: key:nothing is not known: sent as a new message"
    assert answer["flowbridge"] == {"notes": [note]}
    assert "m.relates_to" not in contents(rooms)[0]
    bridge.wait_until(answer["delivery_id"], "sent")
    history = caller.get(f"/deliveries/{answer['delivery_id']}").json()["history"]
    assert [entry["note"] for entry in history if "note" in entry] == [note]
    again = caller.post(MESSAGES, json={"text": "x", "reply_to": "key:nothing"}, headers=KEYED)
    assert said(again) == answer


def test_reaction_to_an_unknown_key_is_a_404(caller: httpx.Client, rooms: Rooms) -> None:
    for path, body in ((REACTIONS, {"target": "key:nothing", "key": "👍"}), (REDACTIONS, {"target": "key:nothing"})):
        answer = caller.post(path, json=body)
        assert (answer.status_code, answer.json()["errcode"]) == (404, "M_NOT_FOUND")
        assert answer.json()["error"] == "target: key:nothing is not known"
    assert rooms.events == []


def test_delivery_of_another_room_or_caller_is_refused(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    sent = said(caller.post(MESSAGES, json={"text": "first"}))["delivery_id"]
    for path, body, pointer in (
        ("messages", {"text": "x", "reply_to": sent}, "/reply_to"),
        ("reactions", {"target": sent, "key": "👍"}, "/target"),
    ):
        answer = caller.post(f"/rooms/!elsewhere:upstream/{path}", json=body)
        assert answer.status_code == 400
        assert problems(answer) == {pointer: f"is a delivery to another room, {ROOM}"}
    with as_caller(bridge) as other:
        answer = other.post(MESSAGES, json={"text": "x", "edit": sent})
        assert answer.status_code == 404
        assert answer.json()["errcode"] == "M_NOT_FOUND"
    assert len(rooms.events) == 1


def test_reaction_and_redaction_say_what_is_wrong(caller: httpx.Client) -> None:
    answer = caller.post(REACTIONS, json={"key": "👍", "emoji": "x"})
    assert problems(answer) == {
        "/emoji": "is unknown here: known are target, key",
        "/target": "is required: give an event id ($…), the id of a delivery, or key:NAME",
    }
    assert caller.post(REDACTIONS, content=b"x").status_code == 400
    assert caller.post(f"{REDACTIONS}?txn=1", json={"target": "$e"}).status_code == 400


def test_event_that_is_not_there_and_an_edit_of_somebody_elses_are_refused(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    asked: list[str] = []

    def script(request: Request) -> Behaviour | None:
        if "event" not in request.parts:
            return rooms(request)
        asked.append(request.parts[-1])
        if request.parts[-1] == "$gone":
            return scripted.matrix_error(404, "M_NOT_FOUND", "Event not found.")
        return scripted.answer({"sender": "@bob:upstream", "type": "m.room.message"})

    upstream.script(script)
    refused = caller.post(MESSAGES, json={"text": "a", "edit": "$bobs", "thread": None})
    assert problems(refused) == {
        "/edit": "$bobs is a message of @bob:upstream, and only its sender can edit it: answer it by reply_to or thread"
    }
    (absent,) = {
        message
        for path, body in (
            (MESSAGES, {"text": "a", "reply_to": "$gone"}),
            (MESSAGES, {"text": "a", "thread": "$gone"}),
            (MESSAGES, {"text": "a", "edit": "$gone"}),
            (REACTIONS, {"target": "$gone", "key": "👍"}),
            (REDACTIONS, {"target": "$gone"}),
        )
        for message in problems(caller.post(path, json=body)).values()
    }
    assert absent.startswith("there is no event $gone in this room, or @")
    assert rooms.events == []
    for body in ({"text": "a", "reply_to": "$bobs"}, {"text": "a", "thread": "$bobs"}):
        said(caller.post(MESSAGES, json=body))
    said(caller.post(REACTIONS, json={"target": "$bobs", "key": "👍"}))
    assert asked.count("$bobs") == 1  # events do not change their senders


@pytest.mark.parametrize("trouble", [scripted.matrix_error(502, "M_UNKNOWN", "away"), scripted.answer([1])])
def test_target_that_the_homeserver_cannot_tell_about_stops_nothing(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, trouble: Behaviour
) -> None:
    upstream.script(lambda request: trouble if "event" in request.parts else rooms(request))
    said(caller.post(MESSAGES, json={"text": "a", "edit": "$e"}))


def test_redaction_of_an_event_id(caller: httpx.Client, upstream: Upstream, rooms: Rooms) -> None:
    said(caller.post(REDACTIONS, json={"target": "$e/x", "reason": "why"}, headers=KEYED))
    assert is_replayed(caller.post(REDACTIONS, json={"target": "$e/x", "reason": "why"}, headers=KEYED))
    (event,) = rooms.events
    assert (event.type, event.content) == ("m.room.redaction", {"reason": "why"})


# keys


def test_keys_count_for_one_caller_and_room(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    body = {"text": "x", "key": "k"}
    with as_caller(bridge) as other:
        answers = [
            caller.post(MESSAGES, json=body),
            other.post(MESSAGES, json=body),
            caller.post("/rooms/!elsewhere:upstream/messages", json=body),
            caller.post(MESSAGES, json=body),
        ]
    assert all(answer.status_code == 200 for answer in answers)
    assert [content.get("m.relates_to", {}).get("event_id") for content in contents(rooms)] == [None, None, None, "$1"]


def test_keys_of_two_api_keys_are_two(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    with scoped(upstream, tmp_path, one=ApiKey("one"), two=ApiKey("two"), all=ApiKey("all", admin=True)) as bridge:
        for key in ("fb_one", "fb_two"):
            answer = bridge.post(MESSAGES, b'{"text": "x", "key": "k"}', f"X-API-Key: {key}")
            assert answer.status == 200
        sent = answer.json()["delivery_id"]
        body = json.dumps({"text": "x", "edit": sent}).encode()
        assert bridge.post(MESSAGES, body, "X-API-Key: fb_one").status == 404  # the other key's delivery
        assert bridge.post(MESSAGES, body, "X-API-Key: fb_two").status == 200
        assert bridge.post(MESSAGES, body, "X-API-Key: fb_all").status == 200
    assert [content.get("m.relates_to", {}).get("event_id") for content in contents(rooms)] == [None, None, "$2", "$2"]


# encryption, and texts that are too long


def test_message_into_an_encrypted_room_is_refused(caller: httpx.Client, upstream: Upstream, rooms: Rooms) -> None:
    def script(request: Request) -> Behaviour | None:
        if "/state/m.room.encryption" in request.path:
            return scripted.answer({"algorithm": "m.megolm.v1.aes-sha2"})
        return rooms(request)

    upstream.script(script)
    room = "/rooms/!encrypted-of-messages:upstream"  # others were found plain, which counts for a while
    answer = caller.post(f"{room}/messages", json={"markdown": "*x*"})
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert "encrypted" in answer.json()["error"]
    assert said(caller.post(f"{room}/reactions", json={"target": "$e", "key": "👍"}))
    assert [event.type for event in rooms.events] == ["m.reaction"]


@pytest.mark.parametrize(
    ("body", "filename"),
    [
        ({"text": "line\n" * 20_000}, "message.txt"),
        ({"markdown": "- *x*\n" * 5_000}, "message.md"),
        ({"html": "<p>x</p>" * 5_000}, "message.txt"),
    ],
)
def test_text_that_is_too_long_becomes_a_file(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, body: dict[str, str], filename: str
) -> None:
    uploads: list[bytes] = []

    def script(request: Request) -> Behaviour | None:
        if request.path.endswith("/upload"):
            uploads.append(request.body)
            return scripted.answer({"content_uri": MXC})
        return rooms(request)

    upstream.script(script)
    (source,) = body.values()
    answer = said(caller.post(MESSAGES, json={**body, "overflow": "file"}))
    assert len(answer["events"]) == 2
    cut, file = contents(rooms)
    assert "… (cut here: the file below has all of it)" in cut["body"]
    assert len(json.dumps(cut)) < 20_000
    assert (file["filename"], file["url"], file["info"]["size"]) == (filename, MXC, len(source))
    assert uploads == [source.encode()]


def test_short_text_with_overflow_stays_a_text(caller: httpx.Client, rooms: Rooms) -> None:
    said(caller.post(MESSAGES, json={"markdown": "*x*", "overflow": "file"}))
    assert rooms.bodies == ["*x*"]


def test_long_edit_has_no_file(caller: httpx.Client, rooms: Rooms) -> None:
    answer = caller.post(MESSAGES, json={"text": "x" * 40_000, "edit": "$e", "overflow": "file"})
    assert answer.status_code == 413
    assert rooms.events == []


def test_file_that_cannot_be_uploaded_is_a_refusal(caller: httpx.Client, upstream: Upstream, rooms: Rooms) -> None:
    refused = scripted.matrix_error(403, "M_FORBIDDEN", "no uploads")
    upstream.script(lambda request: refused if request.path.endswith("/upload") else rooms(request))
    answer = caller.post(MESSAGES, json={"text": "x" * 90_000, "overflow": "file"})
    assert answer.status_code == 403
    assert rooms.events == []


# API keys


@contextmanager
def scoped(upstream: Upstream, folder: Path, **keys: ApiKey) -> Iterator[Bridge]:
    """A bridge with these API keys, by their secrets without the `fb_`."""
    database = Database(f"sqlite:///{folder}/flowbridge.db")
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        for name, key in keys.items():
            api_keys.add(connection, key, f"fb_{name}")
    database.engine.dispose()
    with running(upstream, folder, api_keys=()) as bridge:
        yield bridge


def test_scope_of_a_key_holds(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    narrow = ApiKey("narrow", rooms=(ROOM,), event_types=("m.room.message",))
    with scoped(upstream, tmp_path, narrow=narrow) as bridge:
        key = "X-API-Key: fb_narrow"
        assert bridge.post(MESSAGES, b"hi", key).status == 200
        assert bridge.post("/rooms/!elsewhere:upstream/messages", b"hi", key).status == 403
        assert bridge.post(REACTIONS, b'{"target": "$e", "key": "x"}', key).status == 403
        assert bridge.post(REDACTIONS, b'{"target": "$e"}', key).status == 403
    assert len(rooms.events) == 1


# direct rooms


class Direct:
    """The account data and the rooms of a homeserver."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.direct: dict[str, Any] = {"@other:hs": ["!theirs:hs"]}
        self.left: set[str] = set()
        self.made = 0
        self.away = False
        self.lost = False

    def __call__(self, request: Request) -> Behaviour | None:
        if self.away and not request.path.endswith("/versions"):
            return scripted.hang_up
        if "/account_data/m.direct" in request.path:
            if request.method == "PUT":
                if self.lost:
                    return scripted.hang_up
                self.direct = request.json()
            return scripted.answer(self.direct)
        if request.path.endswith("/createRoom"):
            assert request.json() == {"is_direct": True, "preset": "trusted_private_chat", "invite": ["@al:hs"]}
            self.made += 1
            return scripted.answer({"room_id": f"!direct{self.made}:hs"})
        if "/state/m.room.member/" in request.path and request.parts[4] in self.left:
            return scripted.answer({"membership": "leave"})
        return self.rooms(request)


@pytest.fixture
def direct(upstream: Upstream, rooms: Rooms) -> Direct:
    found = Direct(rooms)
    upstream.script(found)
    return found


def test_message_to_a_user_goes_to_the_direct_room_that_there_is(caller: httpx.Client, direct: Direct) -> None:
    direct.direct["@al:hs"] = ["!old:hs", "!left:hs"]
    direct.left = {"!left:hs"}
    said(caller.post("/rooms/@al:hs/messages", json={"text": "hi"}))
    assert [event.room for event in direct.rooms.events] == ["!old:hs"]
    assert direct.made == 0


def test_direct_room_is_made_once_and_written_down(bridge: Bridge, direct: Direct) -> None:
    token = new_token()

    def send(_: int) -> None:
        with as_caller(bridge, token) as client:
            said(client.post("/rooms/%40al%3Ahs/messages", json={"text": "hi"}))

    with ThreadPoolExecutor(5) as callers:
        list(callers.map(send, range(5)))
    assert direct.made == 1
    assert {event.room for event in direct.rooms.events} == {"!direct1:hs"}
    assert direct.direct == {"@other:hs": ["!theirs:hs"], "@al:hs": ["!direct1:hs"]}


def test_direct_room_that_could_not_be_written_down_is_not_made_twice(
    upstream: Upstream, direct: Direct, tmp_path: Path
) -> None:
    direct.lost = True
    token = new_token()
    with running(upstream, tmp_path) as bridge, as_caller(bridge, token) as client:
        client.post("/rooms/@al:hs/messages", json={"text": "hi"})
        bridge.clear()
        direct.lost = False
        answer = repeated(
            lambda: client.post("/rooms/@al:hs/messages", json={"text": "hi"}), lambda a: a.status_code == 200
        )
        said(answer)
    assert direct.made == 1
    assert direct.direct["@al:hs"] == ["!direct1:hs"]


def test_direct_room_is_known_while_the_homeserver_is_away(upstream: Upstream, direct: Direct, tmp_path: Path) -> None:
    token = new_token()
    with running(upstream, tmp_path) as bridge, as_caller(bridge, token) as client:
        said(client.post("/rooms/@al:hs/messages", json={"text": "hi"}))
    direct.away = True
    with running(upstream, tmp_path) as bridge, as_caller(bridge, token) as client:
        check_queued(client.post("/rooms/@al:hs/messages", json={"text": "hi"}, headers=ASYNC))
        answer = client.post("/rooms/@bo:hs/messages", json={"text": "hi"}, headers=ASYNC)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


def test_account_has_no_direct_room_with_itself(caller: httpx.Client) -> None:
    user = user_of(caller.headers["Authorization"].removeprefix("Bearer "))
    answer = caller.post(f"/rooms/{user}/messages", json={"text": "hi"})
    assert answer.status_code == 400
    assert "is this account itself" in answer.json()["error"]


def test_key_for_some_rooms_makes_no_direct_room(upstream: Upstream, direct: Direct, tmp_path: Path) -> None:
    with scoped(upstream, tmp_path, narrow=ApiKey("narrow", rooms=(ROOM,))) as bridge:
        key = "X-API-Key: fb_narrow"
        answer = bridge.post("/rooms/@al:hs/messages", b"hi", key)
        assert answer.status == 403
        assert "makes none" in answer.json()["error"]
        direct.direct["@al:hs"] = [ROOM]
        assert bridge.post("/rooms/@al:hs/messages", b"hi", key).status == 200
        direct.direct["@bo:hs"] = ["!theirs:hs"]  # there is one, and the key is not for it
        assert bridge.post("/rooms/@bo:hs/messages", b"hi", key).status == 403
    assert direct.made == 0


# bombs


def test_bomb_is_the_senders_fault_and_plain_sends_go_on(bridge: Bridge, rooms: Rooms) -> None:
    slow = "[" * 5_000 + "|a" * 2_000  # whatever it does to the libraries, it ends within their limits
    with as_caller(bridge) as mallory, as_caller(bridge) as alice, ThreadPoolExecutor(8) as threads:
        bombs = [threads.submit(mallory.post, MESSAGES, json={"markdown": text}) for text in [BOMB, slow] * 4]
        sent = 0
        while not all(bomb.done() for bomb in bombs):
            said(alice.post(MESSAGES, json={"text": "plain"}))
            sent += 1
        assert {bomb.result().status_code for bomb in bombs} <= {200, 400, 413}
    assert sent > 0


PAGE = (REPOSITORY / "docs" / "messages.md").read_text()
EXAMPLES = re.findall(r"/messages (?:\\\n +)?-d '(\{.*?\})'\n", PAGE, re.DOTALL)


def test_examples_of_the_documentation_are_messages(caller: httpx.Client, rooms: Rooms) -> None:
    """All but that of a file on the web; with a real homeserver: tests/acceptance/test_messages_page.py."""
    examples = [example for example in EXAMPLES if '"url"' not in example]
    assert len(examples) == len(EXAMPLES) - 1 >= 9
    for example in examples:
        said(caller.post(MESSAGES, content=example))
    assert ["m.replace" in str(content) for content in contents(rooms)].count(True) == 1


def test_nothing_is_rendered_for_a_token_that_nobody_knows(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised access token.")
    upstream.script(lambda request: unknown if request.path.endswith("/whoami") else None)
    with running(upstream, tmp_path) as bridge, as_caller(bridge) as client:
        for body in ({"markdown": "*x*"}, {"html": "<b>x</b>"}):
            answer = client.post(MESSAGES, json=body)
            assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert not lines(caplog, "render_process")


def test_dead_reaction_is_sent_by_a_replay_once_its_target_is(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    upstream.script(first(scripted.matrix_error(403, "M_FORBIDDEN", "no"), then=rooms))
    dead = [
        caller.post(MESSAGES, json={"text": "x", "key": "k"}),
        caller.post(REACTIONS, json={"target": "key:k", "key": "👍"}),
    ]
    assert [answer.status_code for answer in dead] == [403, 404]
    assert dead[1].json()["error"] == "target: key:k was not sent"
    for answer in dead:
        delivery = answer.headers["flowbridge-delivery"]
        bridge.wait_until(delivery, "dead")
        assert caller.post(f"/deliveries/{delivery}/replay").status_code in (200, 202)
        bridge.wait_until(delivery, "sent")
    assert contents(rooms)[1] == {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$1", "key": "👍"}}
