"""Contract §1, "Waiting": what the same key, or the same txnId, does twice."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from tests import upstream as scripted
from tests.http.conftest import (
    HASTE_SECONDS,
    HELLO,
    QUICK,
    ROOM,
    SEND,
    Answer,
    Bridge,
    as_caller,
    new_token,
    running,
)
from tests.http.sends import (
    ASYNC,
    BROKEN,
    ELSEWHERE,
    KEYED,
    MATRIX,
    NOW,
    STATE,
    check_queued,
    event_id,
    first,
    held,
    is_replayed,
    lines,
    text,
)
from tests.upstream import Rooms, Upstream


def by_header(caller: httpx.Client, content: Any = HELLO, path: str = SEND, **headers: str) -> httpx.Response:
    return caller.post(path, json=content, headers={**KEYED, **headers})


def by_path(caller: httpx.Client, content: Any = HELLO, path: str = SEND, **headers: str) -> httpx.Response:
    return caller.put(f"{path}/the%20key", json=content, headers=headers)


def by_state(caller: httpx.Client, content: Any = HELLO, path: str = SEND, **headers: str) -> httpx.Response:
    room = path.split("/")[2]
    return caller.put(f"/rooms/{room}/state/org.example.reading/x", json=content, headers={**KEYED, **headers})


Keyed = Callable[..., httpx.Response]
EACH_WAY = pytest.mark.parametrize("keyed", [by_header, by_path, by_state])


@EACH_WAY
def test_same_key_and_content_is_the_same_event(
    bridge: Bridge, caller: httpx.Client, rooms: Rooms, keyed: Keyed
) -> None:
    answers = [keyed(caller), keyed(caller)]
    bridge.wait_until(answers[0].headers["flowbridge-delivery"], "sent")  # from here on the store says so
    answers.append(keyed(caller))
    assert [event_id(answer) for answer in answers] == ["$1"] * 3
    assert [is_replayed(answer) for answer in answers] == [False, True, True]
    assert len({answer.headers["flowbridge-delivery"] for answer in answers}) == 1
    assert len(rooms.events) == 1


@EACH_WAY
def test_same_key_with_other_content_is_a_422_and_nothing_is_sent(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, keyed: Keyed, caplog: pytest.LogCaptureFixture
) -> None:
    sent = keyed(caller, text("canary of the first"))
    answer = keyed(caller, text("canary of the second"))
    assert answer.status_code == 422
    assert answer.json()["errcode"] == "M_INVALID_PARAM"
    assert "Idempotency-Key" in answer.json()["error"]
    assert "location" not in answer.headers
    assert "flowbridge-delivery" not in answer.headers
    assert len(upstream.events) == 1
    (line,) = lines(caplog, "key_reused")
    assert line["delivery"] == sent.headers["flowbridge-delivery"]
    assert [len(line[name]) for name in ("was", "now")] == [64, 64]
    assert line["was"] != line["now"]
    assert not any("canary" in str(getattr(record, "fields", "")) for record in caplog.records)
    assert event_id(keyed(caller, text("canary of the first"))) == "$1"


def test_header_is_the_key_where_the_path_has_one_too(caller: httpx.Client, rooms: Rooms) -> None:
    for txn_id in ("1", "2"):
        answer = caller.put(f"{SEND}/{txn_id}", json=HELLO, headers=KEYED)
    assert is_replayed(answer)
    assert not is_replayed(caller.put(f"{SEND}/2", json=HELLO))
    assert len(rooms.events) == 2


def test_written_otherwise_is_the_same_content(bridge: Bridge, rooms: Rooms) -> None:
    token = f"Authorization: Bearer {new_token()}"
    bodies = [
        b'{"msgtype":"m.text","body":"hi"}',
        b'{ "body": "h\\u0069", "msgtype": "m.text" }',
        b'{"payload": "hi"}',
        b'"hi"',
    ]
    answers = [bridge.post(SEND, body, token, "Idempotency-Key: k") for body in bodies]
    assert [answer.json() for answer in answers] == [{"event_id": "$1"}] * 4


@pytest.mark.parametrize("same", [True, False], ids=["same-content", "other-content"])
def test_same_key_twenty_times_at_once_is_one_event(bridge: Bridge, rooms: Rooms, same: bool) -> None:
    token = new_token()

    def send(number: int) -> Answer:
        body = json.dumps(text("same" if same else str(number))).encode()
        return bridge.post(SEND, body, f"Authorization: Bearer {token}", "Idempotency-Key: k")

    with ThreadPoolExecutor(20) as callers:
        answers = list(callers.map(send, range(20)))
    good = [answer for answer in answers if answer.status == 200]
    assert {answer.body for answer in good} == {b'{"event_id":"$1"}'}
    assert sum("idempotent-replayed" not in answer.headers for answer in good) == 1
    assert len(rooms.events) == 1
    assert len(good) == (20 if same else 1)
    assert all(answer.status in (200, 422) for answer in answers)


def test_key_of_what_is_still_under_way_waits_with_it(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    delivery = check_queued(by_header(caller, **ASYNC))
    for headers in (ASYNC, NOW):
        again = by_header(caller, **headers)
        assert check_queued(again) == delivery
        assert is_replayed(again)
    threading.Timer(0.1, go.set).start()
    last = by_header(caller)
    assert (event_id(last), last.headers["flowbridge-delivery"], is_replayed(last)) == ("$1", delivery, True)
    settled = by_header(caller, **ASYNC)
    assert (settled.status_code, settled.json()) == (202, {"delivery_id": delivery, "status": "sent"})
    assert len(rooms.events) == 1


def test_key_of_a_dead_delivery_gets_the_same_error_again(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    upstream.script(first(scripted.matrix_error(403, "M_FORBIDDEN", "its own text", more=1), then=rooms))
    answers = [by_header(caller), by_header(caller)]
    bridge.wait_until(answers[0].headers["flowbridge-delivery"], "dead")  # from here on the store says so
    answers += [by_header(caller), by_header(caller)]
    assert [answer.status_code for answer in answers] == [403] * 4
    assert all(answer.json() == {"errcode": "M_FORBIDDEN", "error": "its own text", "more": 1} for answer in answers)
    assert len({answer.headers["flowbridge-delivery"] for answer in answers}) == 1
    assert [is_replayed(answer) for answer in answers] == [False, True, True, True]
    assert by_header(caller, text("other")).status_code == 422
    assert by_header(caller, **ASYNC).json()["status"] == "dead"
    assert len(upstream.events) == 1


def test_key_counts_for_one_caller_room_and_type(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    reading = f"/rooms/{ROOM}/send/org.example.reading"
    with as_caller(bridge) as other:
        answers = [
            by_header(caller),
            by_header(other),
            by_header(caller, path=ELSEWHERE),
            by_header(caller, path=reading),
            caller.put(f"{MATRIX}{SEND}/the%20key", json=HELLO),
        ]
    assert [event_id(answer) for answer in answers] == ["$1", "$2", "$3", "$4", "$5"]
    assert not any(is_replayed(answer) for answer in answers)


def test_keys_of_two_api_keys_do_not_collide(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    """They act as the same account, for callers who know nothing of each other."""
    keys = ("fb_one", "fb_two")
    with running(upstream, tmp_path, api_keys=tuple(SecretStr(key) for key in keys)) as bridge:
        body = json.dumps(HELLO).encode()
        answers = [
            bridge.post(target, body, f"X-API-Key: {key}", *headers, method=method)
            for key in (*keys, *keys)
            for method, target, headers in (
                ("POST", SEND, ["Idempotency-Key: k"]),
                ("PUT", f"{MATRIX}{SEND}/k", []),
            )
        ]
    assert [answer.json()["event_id"] for answer in answers] == ["$1", "$2", "$3", "$4"] * 2
    assert len(rooms.events) == 4


def test_key_is_known_after_a_restart(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    token = new_token()
    with running(upstream, tmp_path) as bridge, as_caller(bridge, token) as caller:
        sent = by_header(caller)
        assert event_id(sent) == "$1"
        assert event_id(caller.put(f"{MATRIX}{SEND}/txn", json=HELLO)) == "$2"
    with running(upstream, tmp_path) as bridge, as_caller(bridge, token) as caller:
        again = by_header(caller)
        assert (event_id(again), is_replayed(again)) == ("$1", True)
        assert again.headers["flowbridge-delivery"] == sent.headers["flowbridge-delivery"]
        assert event_id(caller.put(f"{MATRIX}{SEND}/txn", json=HELLO)) == "$2"
        assert by_header(caller, text("other")).status_code == 422
    assert len(rooms.events) == 2


def test_key_of_what_is_queued_is_known_after_a_restart(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    token = new_token()
    upstream.always(BROKEN, at="/send/")
    with (
        running(upstream, tmp_path, wait_seconds=HASTE_SECONDS, timing=QUICK) as bridge,
        as_caller(bridge, token) as caller,
    ):
        delivery = check_queued(by_header(caller))
    with running(upstream, tmp_path, timing=QUICK) as bridge, as_caller(bridge, token) as caller:
        again = by_header(caller, **NOW)
        assert check_queued(again) == delivery
        assert is_replayed(again)
        upstream.script(rooms)
        last = by_header(caller)
        assert (event_id(last), last.headers["flowbridge-delivery"]) == ("$1", delivery)
    assert len(rooms.events) == 1


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("", False),
        (" ", False),
        ("x" * 256, False),
        ("é" * 128, False),
        ("a\tb", False),
        ("a\x7fb", False),
        ("a\x85b", False),
        ("x" * 255, True),
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', True),
        ("a/b?c#d %2F", True),
        ("é", True),
    ],
    ids=["empty", "blank", "long", "long-in-utf-8", "tab", "delete", "c1", "longest", "quoted", "signs", "latin"],
)
def test_malformed_key_is_a_400_and_nothing_is_accepted(bridge: Bridge, rooms: Rooms, key: str, good: bool) -> None:
    token = new_token()
    body = json.dumps(HELLO).encode()
    for method, target in (("POST", SEND), ("PUT", STATE)):
        content = body if target == SEND else b'{"topic": "x"}'
        answer = bridge.post(
            target, content, f"Authorization: Bearer {token}", f"Idempotency-Key: {key}", method=method
        )
        assert answer.status == (200 if good else 400)
        if not good:
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["errcode"].startswith("M_")
            assert "flowbridge-delivery" not in answer.headers
    assert len(rooms.events) == (2 if good else 0)
    with as_caller(bridge, token) as caller:
        assert len(caller.get("/deliveries").json()["deliveries"]) == len(rooms.events)


def test_two_different_keys_are_a_400_and_the_same_one_twice_is_one(bridge: Bridge, rooms: Rooms) -> None:
    body = json.dumps(HELLO).encode()
    for second, status in (("two", 400), ("one", 200)):
        lines = ("Authorization: Bearer x", "Idempotency-Key: one", f"Idempotency-Key: {second}")
        answer = bridge.post(SEND, body, *lines)
        assert answer.status == status
    assert len(rooms.events) == 1


def test_idempotency_key_means_nothing_on_the_matrix_surface(caller: httpx.Client, rooms: Rooms) -> None:
    for headers in (KEYED, KEYED, {"Idempotency-Key": "x" * 300}):
        assert not is_replayed(caller.post(MATRIX + SEND, json=HELLO, headers=headers))
    assert len(rooms.events) == 3


def test_same_txn_id_with_other_content_is_a_new_event_on_the_matrix_surface(
    caller: httpx.Client, rooms: Rooms, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"{MATRIX}{SEND}/1"
    picture = {"msgtype": "m.image", "body": "canary.png", "url": "mxc://upstream/canary"}
    answers = [
        caller.put(path, json=content) for content in (picture, picture, text("canary"), text("canary"), picture)
    ]
    assert [event_id(answer) for answer in answers] == ["$1", "$1", "$2", "$2", "$1"]
    assert [is_replayed(answer) for answer in answers] == [False, True, False, True, True]
    assert len(rooms.events) == 2
    line, *_ = lines(caplog, "txn_id_reused")
    assert [len(line[name]) for name in ("was", "now")] == [64, 64]
    assert not any("canary" in str(getattr(record, "fields", "")) for record in caplog.records)


def test_setting_makes_the_same_txn_id_the_same_event_whatever_it_holds(
    upstream: Upstream, rooms: Rooms, tmp_path: Path
) -> None:
    with running(upstream, tmp_path, reused_txn_id="replay") as bridge, as_caller(bridge) as caller:
        for content in (text("first"), text("second")):
            assert event_id(caller.put(f"{MATRIX}{SEND}/1", json=content)) == "$1"
        assert event_id(caller.put(f"{SEND}/1", json=text("first"))) == "$2"
        assert caller.put(f"{SEND}/1", json=text("second")).status_code == 422
    assert rooms.bodies == ["first", "first"]
