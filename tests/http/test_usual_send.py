"""The usual send is answered by callbacks: as in the ordinary way, byte for byte, and only where it is usual."""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from flowbridge.models.timing import Timing
from flowbridge.rendering.processes import Rendering
from flowbridge.web import usual_send
from flowbridge.web.usual_send import UsualSends
from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, PATIENT, ROOM, SEND, Answer, Bridge, new_token, running
from tests.http.sends import MATRIX, text
from tests.patience import PATIENCE, until
from tests.upstream import Rooms, Upstream

BODY = json.dumps(HELLO).encode()
SAY = f"/rooms/{ROOM}/messages"
TOPIC = f"/rooms/{ROOM}/send/m.room.topic"
ENCODED = "/rooms/%21room%3Aupstream/send/m.room.message"

PATIENT_LINES = [f"{name}: {value}" for name, value in PATIENT.items()]

Usual = Callable[[], int]  # how many requests took the short way
Lines = Callable[[], list[dict[str, Any]]]
Patch = pytest.MonkeyPatch


@pytest.fixture
def usual(monkeypatch: Patch) -> Usual:
    take, taken = UsualSends.take, []

    def counted(*args: Any) -> Any:
        send = take(*args)
        taken.extend([1] if send is not None else [])
        return send

    monkeypatch.setattr(UsualSends, "take", counted)
    return lambda: len(taken)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    with caplog.at_level(logging.INFO, "flowbridge"):
        yield lambda: [vars(record)["fields"] for record in caplog.records if record.msg == "request"]


def shown(answer: Answer) -> tuple[Any, ...]:
    """An answer without what no two have in common."""
    delivery = answer.headers.get("flowbridge-delivery", "none")
    headers = {name: value.replace(delivery, "DELIVERY") for name, value in answer.headers.items() if name != "date"}
    headers["content-length"] = "about " + str(len(answer.body) // 10)
    body = re.sub(rb'"\$\d+"', b'"$N"', answer.body.replace(delivery.encode(), b"DELIVERY"))
    if answer.status == 202:
        body = body.replace(b'"sent"', b'"queued"')  # whichever came first
    return answer.status, list(headers), headers, body


USUAL: dict[str, tuple[str, str, bytes, list[str]]] = {
    "content": ("POST", SEND, BODY, []),
    "by PUT": ("PUT", SEND, BODY, []),
    "an encoded path": ("POST", ENCODED, BODY, []),
    "a flow message": ("POST", SEND, b'{"payload": "hi", "topic": "x", "_msgid": "1"}', []),
    "a flow message with ignored keys": (
        "POST",
        SEND,
        b'{"payload": {"msgtype": "m.text", "body": "x"}, "body": 1}',
        [],
    ),
    "a text": ("POST", SEND, b"just text", ["Content-Type: text/plain"]),
    "curl's label": ("POST", SEND, b"just text", ["Content-Type: application/x-www-form-urlencoded"]),
    "a state event": ("POST", TOPIC, b'{"topic": "t"}', []),
    "an own type": ("POST", f"/rooms/{ROOM}/send/org.example.alert", b'{"a": [1, {"\\u00e9": null}]}', []),
    "respond-async": ("POST", SEND, BODY, ["Prefer: respond-async"]),
    "a wait": ("POST", SEND, BODY, ["Prefer: wait=30"]),
    "HTTP/1.1 without keep-alive": ("POST", SEND, BODY, ["Connection: close"]),
    "a message": ("POST", SAY, b'{"text": "hi"}', []),
    "a message by PUT": (
        "PUT",
        SAY,
        b'{"text": "hi", "title": "t", "mentions": ["@al:hs"], "msgtype": "m.notice"}',
        [],
    ),
    "a message in a flow message": ("POST", SAY, b'{"payload": {"text": "hi"}, "topic": "x"}', []),
    "a message that is a text": ("POST", SAY, b"just text", ["Content-Type: text/plain"]),
    "a message by a form": ("POST", SAY, b"text=hi&title=t", ["Content-Type: application/x-www-form-urlencoded"]),
    "Markdown": ("POST", SAY, b'{"markdown": "*hi* @al:hs", "title": "T", "mentions": ["@al:hs"]}', []),
    "HTML": ("POST", SAY, b'{"html": "<b onclick=x>hi</b><script>"}', []),
    "Markdown that is not waited for": ("POST", SAY, b'{"markdown": "*hi*"}', ["Prefer: respond-async"]),
    "a message that is not waited for": ("POST", SAY, b'{"text": "hi"}', ["Prefer: respond-async"]),
    "an API key": ("POST", SEND, BODY, [f"X-API-Key: {KEY}"]),
}


def request(method: str, target: str, body: bytes, headers: list[str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: bridge", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("name", USUAL)
def test_usual_send_is_answered_and_passed_on_as_in_the_ordinary_way(
    bridge: Bridge, rooms: Rooms, upstream: Upstream, usual: Usual, lines: Lines, monkeypatch: Patch, name: str
) -> None:
    method, target, body, headers = USUAL[name]
    if not any(KEY in header for header in headers):
        headers = [*headers, f"Authorization: Bearer {new_token()}"]
    asked = request(method, target, body, headers)
    assert bridge.ask(request("POST", TOPIC, b'{"topic": "of a caller that is known"}', headers[-1:])).status == 200

    def ask() -> tuple[Any, ...]:
        before, taken = len(upstream.events), usual()
        answer = bridge.ask(asked)
        delivery = answer.headers["flowbridge-delivery"]
        bridge.wait_until(delivery, "sent")
        (event,) = upstream.events[before:]
        path = event.path.rpartition("/")[0] if "/send/" in event.path else event.path
        until(lambda: any(line.get("delivery") == delivery for line in lines()))
        (line,) = (line for line in lines() if line.get("delivery") == delivery)
        same = [(key, value) for key, value in line.items() if key not in ("ms", "delivery")]
        return usual() - taken, shown(answer), (event.method, path, event.token, event.body), same

    short = ask()
    monkeypatch.setattr(UsualSends, "take", lambda *_: None)
    ordinary = ask()
    assert short[1:] == ordinary[1:]
    assert (short[0], ordinary[0]) == (1, 0)


TOKEN = "a-token-that-is-known"
BEARER = f"Authorization: Bearer {TOKEN}"

# Each with the status that it gets.
UNUSUAL: dict[str, tuple[int, str, str, bytes, list[str]]] = {
    "an unknown token": (200, "POST", SEND, BODY, ["Authorization: Bearer unknown-until-now"]),
    "no token": (401, "POST", SEND, BODY, []),
    "a key that is not known": (401, "POST", SEND, BODY, ["X-API-Key: fb_unknown"]),
    "two credentials": (200, "POST", SEND, BODY, [BEARER, f"X-API-Key: {KEY}"]),
    "a token in the query": (200, "POST", f"{SEND}?access_token={TOKEN}", BODY, []),
    "a txnId": (200, "PUT", f"{SEND}/txn", BODY, [BEARER]),
    "an Idempotency-Key": (200, "POST", SEND, BODY, [BEARER, "Idempotency-Key: the key"]),
    "the Matrix surface": (200, "PUT", f"{MATRIX}{SEND}/txn", BODY, [BEARER]),
    "state": (200, "PUT", f"/rooms/{ROOM}/state/m.room.topic", b'{"topic": "t"}', [BEARER]),
    "another method": (405, "PATCH", SEND, BODY, [BEARER]),
    "a large body": (200, "POST", SEND, json.dumps(text("x" * 20_000)).encode(), [BEARER]),
    "a compressed body": (415, "POST", SEND, BODY, [BEARER, "Content-Encoding: gzip"]),
    "a header twice": (200, "POST", SEND, BODY, [BEARER, "Prefer: wait=30", "Prefer: wait=20"]),
    "what is not JSON": (400, "POST", SEND, b'{"msgtype"', [BEARER]),
    "a wrong content": (400, "POST", SEND, b'{"msgtype": "m.text"}', [BEARER]),
    "a key twice": (400, "POST", SEND, b'{"msgtype": "m.text", "body": "", "body": ""}', [BEARER]),
    "an unknown type of Matrix": (400, "POST", f"/rooms/{ROOM}/send/m.room.massage", BODY, [BEARER]),
    "a room that is none": (400, "POST", "/rooms/room/send/m.room.message", BODY, [BEARER]),
    "a path with braces": (400, "POST", "/rooms/{roomId}/send/m.room.message", BODY, [BEARER]),
    "a slash too many": (200, "POST", f"{SEND}/", BODY, [BEARER]),
    "two slashes in front": (200, "POST", f"/{SEND}", BODY, [BEARER]),
    "a page of another origin": (200, "POST", SEND, BODY, [BEARER, "Origin: https://example.org"]),
    "an offer to upgrade": (200, "POST", SEND, BODY, [BEARER, "Connection: upgrade", "Upgrade: h2c"]),
    "Markdown that is too long": (413, "POST", SAY, b'{"markdown": "%s"}' % (b"x" * 16_000 + b"\\n" * 400), [BEARER]),
    "Markdown with a key": (200, "POST", SAY, b'{"markdown": "*hi*", "key": "k"}', [BEARER]),
    "a message with a key": (200, "POST", SAY, b'{"text": "hi", "key": "k"}', [BEARER]),
    "a message in a thread": (404, "POST", SAY, b'{"text": "hi", "thread": "no-delivery"}', [BEARER]),
    "a message that may be cut": (200, "POST", SAY, b'{"text": "hi", "overflow": "file"}', [BEARER]),
    "a message with a query": (200, "POST", f"{SAY}?title=t", b"hi", [BEARER]),
    "a wrong message": (400, "POST", SAY, b'{"text": "hi", "txet": ""}', [BEARER]),
    "an empty message": (400, "POST", SAY, b"", [BEARER]),
    "another user who joins": (
        400,
        "POST",
        f"/rooms/{ROOM}/send/m.room.member",
        b'{"type": "m.room.member", "state_key": "@other:upstream", "content": {"membership": "join"}}',
        [BEARER],
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_takes_the_ordinary_way_once(
    bridge: Bridge, rooms: Rooms, upstream: Upstream, usual: Usual, name: str
) -> None:
    status, method, target, body, headers = UNUSUAL[name]
    assert bridge.ask(request("POST", TOPIC, b'{"topic": "of a caller that is known"}', [BEARER])).status == 200
    before, taken = len(upstream.events), usual()
    assert bridge.ask(request(method, target, body, headers)).status == status
    assert usual() == taken
    assert len(upstream.events) == before + (status == 200)


def test_body_that_comes_later_takes_the_ordinary_way(bridge: Bridge, rooms: Rooms, usual: Usual) -> None:
    whole = request("POST", SEND, BODY, [BEARER])
    with bridge.connect() as caller:
        assert caller.send(whole).answer().status == 200
        taken = usual()
        for cut in (len(whole) - 1, len(whole) - len(BODY), 20):
            caller.send(whole[:cut])
            assert caller.is_silent(0.05)
            assert caller.send(whole[cut:]).answer().status == 200
            assert usual() - taken == (cut == 20)  # a head in two pieces is whole in the end
    assert rooms.bodies == ["hello"] * 4


@pytest.mark.parametrize(("target", "body"), [(SEND, BODY), (SAY, b"hi")])
def test_refusal_of_a_usual_send_is_told_in_the_ordinary_way(
    bridge: Bridge, upstream: Upstream, usual: Usual, lines: Lines, target: str, body: bytes
) -> None:
    asked = request("POST", target, body, [BEARER])
    assert bridge.ask(request("POST", TOPIC, b'{"topic": "of a caller that is known"}', [BEARER])).status == 200
    taken = usual()
    upstream.always(scripted.matrix_error(413, "M_TOO_LARGE", "too large"), at="/send/")
    with bridge.connect() as caller:  # the connection serves on
        for _ in range(2):
            answer = caller.send(asked).answer()
            assert (answer.status, answer.json()["errcode"]) == (413, "M_TOO_LARGE")
            assert bridge.delivery(answer.headers["flowbridge-delivery"])["status"] == "dead"
    assert usual() == taken + 2
    until(lambda: [line["status"] for line in lines() if line["path"] == target].count(413) == 2)
    if target == SEND:
        assert next(line["errcode"] for line in lines() if line["status"] == 413) == "M_TOO_LARGE"


def test_text_that_cannot_be_rendered_is_refused_once(
    bridge: Bridge, upstream: Upstream, usual: Usual, lines: Lines, monkeypatch: Patch
) -> None:
    """As in the ordinary way; that would have it rendered once more, for a second of processor time."""
    asked = request("POST", SAY, b'{"html": "' + b"<i>" * 3_000 + b'"}', [BEARER])
    assert bridge.ask(request("POST", SEND, BODY, [BEARER])).status == 200
    rendered, render = [], Rendering.render

    async def counted(*args: Any) -> Any:
        rendered.append(args)
        return await render(*args)

    monkeypatch.setattr(Rendering, "render", counted)

    def ask() -> tuple[Any, ...]:
        before, taken = len(lines()), usual()
        answer = bridge.ask(asked)
        until(lambda: len(lines()) > before)
        line = {key: value for key, value in lines()[-1].items() if key != "ms"}
        return usual() - taken, answer.status, answer.json(), line

    short = ask()
    assert len(rendered) == 1
    monkeypatch.setattr(UsualSends, "take", lambda *_: None)
    ordinary = ask()
    assert short[1:] == ordinary[1:]
    assert (short[0], ordinary[0], short[1]) == (1, 0, 400)
    assert len(upstream.events) == 1


def test_usual_send_that_takes_too_long_is_a_202(hasty: Bridge, upstream: Upstream, usual: Usual, go: Event) -> None:
    asked = request("POST", SEND, BODY, [BEARER])
    assert hasty.ask(request("POST", SEND, BODY, [BEARER, *PATIENT_LINES])).status == 200
    taken = usual()
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
    answer = hasty.ask(asked)
    assert (answer.status, answer.json()["status"], usual()) == (202, "queued", taken + 1)
    go.set()
    assert hasty.wait_until(answer.headers["flowbridge-delivery"], "sent")["event_id"] == "$late"


def test_caller_of_a_usual_send_that_hangs_up_loses_nothing(
    bridge: Bridge, upstream: Upstream, usual: Usual, go: Event, lines: Lines
) -> None:
    asked = request("POST", SEND, BODY, [BEARER])
    assert bridge.ask(asked).status == 200
    taken = usual()
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
    with bridge.connect() as caller:
        caller.send(asked)
        upstream.wait_for_events(2)
    go.set()
    until(lambda: len([line for line in lines() if line["path"] == SEND]) == 2)
    assert usual() == taken + 1
    assert bridge.ask(asked).json() == {"event_id": "$late"}


def test_bridge_that_stops_answers_its_usual_sends(upstream: Upstream, tmp_path: Path, usual: Usual, go: Event) -> None:
    asked = request("POST", SEND, BODY, [BEARER])
    with ExitStack() as stack, ExitStack() as callers:
        bridge = stack.enter_context(running(upstream, tmp_path, timing=Timing(stop_seconds=2)))
        caller = callers.enter_context(bridge.connect())
        assert caller.send(asked).answer().status == 200
        upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
        caller.send(asked)
        upstream.wait_for_events(2)
        stopping = threading.Thread(target=stack.pop_all().close)
        stopping.start()
        answer = caller.answer()
        assert (answer.status, answer.headers["connection"]) == (202, "close")
        go.set()
        stopping.join(PATIENCE)
    assert usual() == 1


def test_fault_before_an_event_is_accepted_is_left_to_the_ordinary_way(
    bridge: Bridge, rooms: Rooms, usual: Usual, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of the short way")

    asked = request("POST", SEND, BODY, [BEARER])
    assert bridge.ask(asked).status == 200
    taken = usual()
    monkeypatch.setattr(usual_send, "UsualSend", fail)
    assert bridge.ask(asked).status == 200
    assert (usual(), rooms.bodies) == (taken, ["hello"] * 2)
    assert [record.msg for record in caplog.records if record.exc_info] == ["internal_error"]


def test_fault_after_an_event_was_accepted_ends_the_connection(
    bridge: Bridge, rooms: Rooms, usual: Usual, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the short way")

    asked = request("POST", SEND, BODY, [BEARER])
    assert bridge.ask(asked).status == 200
    monkeypatch.setattr(usual_send.UsualSend, "_answer", fail)
    with bridge.connect() as caller:
        assert caller.send(asked).is_closed()
    monkeypatch.undo()
    assert rooms.bodies == ["hello"] * 2
    assert [record.msg for record in caplog.records if record.exc_info] == ["internal_error"]
    assert bridge.ask(asked).status == 200


def test_line_names_the_client_behind_a_proxy(upstream: Upstream, tmp_path: Path, usual: Usual, lines: Lines) -> None:
    asked = request("POST", SEND, BODY, [BEARER, "X-Forwarded-For: 192.0.2.1, 192.0.2.7"])
    with running(upstream, tmp_path, trusted_proxies=(ip_network("127.0.0.1"),)) as bridge:
        for number in (1, 2):
            assert bridge.ask(asked).status == 200
            until(lambda number=number: len(lines()) == number)  # type: ignore[misc]
    assert [line["client"] for line in lines()] == ["192.0.2.7"] * 2
    assert usual() == 1
