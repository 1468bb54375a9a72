"""Requests to hooks: contract §6."""

import asyncio
import contextlib
import gzip
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from flowbridge.hooks.receiving import Receiving
from flowbridge.web.routes import webhooks
from tests import upstream as scripted
from tests.http.conftest import KEY, ROOM, Answer, Bridge, RawClient, post
from tests.http.hooked import GITHUB, PATH, SECRET, alert, basic, hook, hooked, path_of, signed, tell, told
from tests.http.test_attachments import Files
from tests.patience import PATIENCE, until
from tests.processes import family_cpu_seconds
from tests.upstream import Rooms, Upstream

pytestmark = pytest.mark.usefixtures("way")

PAYLOADS = Path(__file__).parents[1] / "payloads"
MIB = 1024 * 1024
FORM = "Content-Type: application/x-www-form-urlencoded"
GZIP = "Content-Encoding: gzip"


@pytest.fixture(scope="module")
def shared_hooked(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with hooked(shared_upstream, tmp_path_factory.mktemp("hooked"), wrong_keys_per_minute=100_000) as bridge:
        yield bridge


@pytest.fixture
def bridge(shared_hooked: Bridge, upstream: Upstream, rooms: Rooms) -> Iterator[Bridge]:
    yield shared_hooked
    upstream.reset()
    shared_hooked.clear()


def unique(**more: Any) -> dict[str, Any]:
    """A message that no test has sent yet: the same again within a minute would be a repeat."""
    return {"text": f"message {secrets.token_hex(4)}", **more}


def taken(answer: Answer) -> str:
    """The delivery of what a hook has taken."""
    assert answer.status == 200, answer
    found = answer.json()
    assert found["ok"] is True
    assert found["delivery_id"] == answer.headers["flowbridge-delivery"]
    return str(found["delivery_id"])


def content(bridge: Bridge, answer: Answer) -> dict[str, Any]:
    """What the room shows of it, once it is there."""
    found: dict[str, Any] = bridge.wait_until(taken(answer), "sent")["event"]["content"]
    return found


def notes(bridge: Bridge, delivery: str) -> list[str]:
    return [entry["note"] for entry in bridge.delivery(delivery)["history"] if "note" in entry]


def recorded(name: str) -> bytes:
    return (PAYLOADS / f"{name}.json").read_bytes()


# who may


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_message_is_in_the_room(bridge: Bridge, rooms: Rooms, method: str) -> None:
    said = unique()
    answer = tell(bridge, said, method=method)
    assert answer.json() == {"ok": True, "delivery_id": taken(answer)}
    assert content(bridge, answer) == {"msgtype": "m.text", "body": said["text"], "m.mentions": {}}
    assert [event.content["body"] for event in rooms.events] == [said["text"]]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        pytest.param(PATH, [], id="path"),
        pytest.param(f"/hooks/any/{quote(SECRET[:3])}%{ord(SECRET[3]):x}{SECRET[4:]}", [], id="encoded"),
        pytest.param("/hooks/any", [f"Authorization: Bearer {SECRET}"], id="bearer"),
        pytest.param("/hooks/any", [basic(SECRET)], id="basic"),
        pytest.param("/hooks/any", [f"X-Gitlab-Token: {SECRET}"], id="gitlab"),
        pytest.param(f"{PATH}?wait=true", [], id="query"),
        pytest.param(f"/webhook/{SECRET}", [], id="matrix-hookshot"),
        pytest.param(f"/api/v1/matrix/hook/{SECRET}", [], id="appservice-webhooks"),
    ],
)
def test_token_is_taken_in_each_of_its_places(bridge: Bridge, path: str, headers: list[str]) -> None:
    said = unique()
    assert content(bridge, tell(bridge, said, *headers, path=path))["body"] == said["text"]


def test_signature_is_made_of_the_bytes_as_they_came(bridge: Bridge) -> None:
    body = json.dumps(unique(n=1.0), indent=3).encode()
    content(bridge, tell(bridge, body, signed(body), path="/hooks/signed"))
    form = b"payload=" + quote(json.dumps(unique())).encode()
    type_ = "Content-Type: application/x-www-form-urlencoded"
    content(bridge, tell(bridge, form, type_, signed(form), path="/hooks/signed"))
    assert tell(bridge, body + b" ", signed(body), path="/hooks/signed").status == 401
    assert tell(bridge, body, f"Authorization: Bearer {GITHUB}", path=f"/hooks/signed/{GITHUB}").status == 401


def test_unknown_hook_and_wrong_secret_get_one_answer(bridge: Bridge, rooms: Rooms) -> None:
    asked = [
        ("/hooks/any", ["X-Nothing: x"]),
        ("/hooks/any/fh_wrong", []),
        ("/hooks/any", ["Authorization: Bearer fh_wrong"]),
        ("/hooks/any", ["Authorization: Basic !"]),
        ("/hooks/signed", []),
        ("/hooks/signed", ["X-Hub-Signature-256: sha256=x"]),
        ("/hooks/signed/fh_wrong", []),
        ("/hooks/unknown", []),
        ("/hooks/unknown/fh_wrong", []),
        (f"/hooks/unknown/{SECRET}", []),
        ("/hooks/..%2F..", []),
        ("/webhook/fh_wrong", []),
        ("/services/T0/B0/fh_wrong", []),
        ("/api/webhooks/1/fh_wrong", []),
        (f"/webhook/{GITHUB}", []),  # it signs, and is no token
    ]
    answers = [tell(bridge, unique(), *headers, path=path) for path, headers in asked]
    assert {(answer.status, answer.body) for answer in answers} == {
        (
            401,
            b'{"errcode":"M_UNKNOWN_TOKEN","error":"there is no such hook, or its secret or signature is wrong"}',
        )
    }
    assert not rooms.events
    found = bridge.ask(post("/deliveries?state=refused&limit=200", b"", f"X-API-Key: {KEY}", method="GET")).json()
    assert any(each["error"]["error"].startswith("there is no such hook") for each in found["deliveries"])
    assert "fh_wrong" not in json.dumps(found)


def test_refusals_take_the_same_time(bridge: Bridge) -> None:
    """The processor's, of many: what one takes depends on what else the machine does."""
    body = b"x" * 300_000
    header = f"X-Hub-Signature-256: sha256={'0' * 64}"

    def seconds(path: str) -> float:
        began = time.process_time()
        for _ in range(12):
            assert tell(bridge, body, header, path=path).status == 401
        return time.process_time() - began

    paths = ("/hooks/any/fh_wrong", "/hooks/signed", "/hooks/unknown", "/webhook/fh_wrong")
    rounds: list[dict[str, float]] = []
    for at_least in range(40):  # in turns: what the machine does changes, and the least of a busy one comes late
        rounds.append({path: seconds(path) for path in paths})
        least = {path: min(each[path] for each in rounds) for path in paths}
        if at_least >= 7 and max(least.values()) < 1.7 * min(least.values()):
            return
    raise AssertionError(least)


def test_address_that_guesses_is_slowed_down_and_its_neighbours_are_not(upstream: Upstream, tmp_path: Path) -> None:
    with hooked(upstream, tmp_path, wrong_keys_per_minute=5) as bridge:
        statuses = [tell(bridge, unique(), path=f"/hooks/any/fh_guess-{number}").status for number in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        assert tell(bridge, unique(), path="/hooks/unknown/fh_guess").status == 429
        taken(tell(bridge, unique()))


def test_sender_with_a_wrong_secret_does_not_take_what_its_address_has_for_others(
    upstream: Upstream, tmp_path: Path
) -> None:
    with hooked(upstream, tmp_path, wrong_keys_per_minute=5) as bridge:
        for _ in range(8):
            body = json.dumps(unique()).encode()
            assert tell(bridge, body, signed(body, "a wrong one"), path="/hooks/signed").status in (401, 429)
        key = "X-API-Key: fb_a-key-that-nobody-knows-of-32-characters-at-least"
        assert bridge.ask(post("/whoami", b"", key, "Authorization: Basic x", method="GET")).status == 401


@pytest.mark.parametrize("path", [PATH, f"/webhook/{SECRET}", f"/services/T/B/{SECRET}", f"/api/webhooks/1/{SECRET}"])
def test_address_of_a_hook_says_what_it_is(bridge: Bridge, path: str) -> None:
    for method in ("GET", "HEAD"):
        answer = bridge.ask(told(b"", path=path, method=method), method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST, PUT, OPTIONS")
    assert (
        "what it is told by POST appears in a Matrix room"
        in bridge.ask(told(b"", path=path, method="GET")).json()["error"]
    )
    answer = bridge.ask(told(b"", "WebHook-Request-Origin: events.example.org", path=path, method="OPTIONS"), "OPTIONS")
    assert (answer.status, answer.headers["webhook-allowed-origin"]) == (200, "events.example.org")
    assert answer.headers["webhook-allowed-rate"] == "*"
    assert "POST" in answer.headers["allow"]


# bodies


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(b'{"text": "hi"}', [], id="json-without-a-type"),
        pytest.param(
            b'{"text": "hi"}', ["Content-Type: application/x-www-form-urlencoded"], id="json-as-curl-sends-it"
        ),
        pytest.param(b"hi", ["Content-Type: application/x-www-form-urlencoded"], id="curl -d"),
        pytest.param(b"hi\n", [], id="text"),
        pytest.param(b'"hi"', [], id="string"),
        pytest.param(b"text=hi", ["Content-Type: application/x-www-form-urlencoded"], id="form"),
        pytest.param(
            b"payload=%7B%22text%22%3A%22hi%22%7D", ["Content-Type: application/x-www-form-urlencoded"], id="payload"
        ),
        pytest.param(
            b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\n{"text": "hi"}\r\n--b--\r\n',
            ["Content-Type: multipart/form-data; boundary=b"],
            id="multipart",
        ),
        pytest.param(gzip.compress(b'{"text": "hi"}'), ["Content-Encoding: gzip"], id="gzip"),
    ],
)
def test_each_form_of_a_body_is_a_message(bridge: Bridge, body: bytes, headers: list[str]) -> None:
    # Each in an own minute: the clock is not ours, so the hook is another one each time.
    assert content(bridge, tell(bridge, body, *headers, path=path_of("forgetful")))["body"] == "hi"


@pytest.mark.parametrize(
    ("body", "headers", "status", "error"),
    [
        (b"", [], 400, "the body is empty: there is nothing to say"),
        (b" \n", [], 400, "the body is empty: there is nothing to say"),
        (b'{"text": "a"', [], 400, "the body is not valid JSON: Expecting ',' delimiter at line 1 column 13"),
        (b"[1,", [], 400, "the body is not valid JSON: Expecting value at line 1 column 4"),
        (b"[" * 65 + b"]" * 65, [], 400, "the body is nested more than 64 levels deep"),
        (b"[" * 100_000, [], 400, "the body is nested more than 64 levels deep"),
        (b"<a/>", ["Content-Type: text/xml"], 415, "XML is not read here"),
        (b"x", ["Content-Encoding: br"], 415, "Content-Encoding 'br' is not read"),
        (b"xyz", [GZIP], 400, "the body is not gzip"),
        (
            gzip.compress(b" " * 50 * MIB),
            ["Content-Encoding: gzip"],
            413,
            "longer than 1048576 bytes when it is unpacked",
        ),
        (b"x" * (MIB + 1), [], 413, "longer than 1048576 bytes, which FLOWBRIDGE_MAX_HOOK_BYTES allows"),
    ],
    ids=lambda value: None if isinstance(value, int | str) else "",
)
def test_body_that_can_never_be_taken_is_refused(
    bridge: Bridge, rooms: Rooms, body: bytes, headers: list[str], status: int, error: str
) -> None:
    answer = tell(bridge, body, *headers)
    assert answer.status == status
    assert error in answer.json()["error"]
    assert not rooms.events


def test_body_of_the_largest_size_is_taken(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    with hooked(upstream, tmp_path, max_hook_bytes=3 * MIB) as bridge:
        body = json.dumps({"text": "hi", "more": ["x" * 1_000] * 2_800}).encode()
        assert content(bridge, tell(bridge, body))["body"] == "hi"
        answer = tell(bridge, b"x" * (3 * MIB + 1))
        assert answer.json()["error"].startswith("the body is longer than 3145728 bytes")


def test_large_bodies_of_nobody_do_not_keep_those_of_senders_out(bridge: Bridge) -> None:
    body = json.dumps(unique(more="x" * 700_000)).encode()
    head = told(body, path="/hooks/unknown").removesuffix(body)
    with bridge.connect() as first, bridge.connect() as second:
        for client in (first, second):
            client.send(head + body[:600_000])
        taken(tell(bridge, body))


def test_large_bodies_of_many_strangers_keep_out_none_that_has_a_token(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TURN_SECONDS", 0.1)
    body = json.dumps(unique(more="x" * 700_000)).encode()
    head = told(body, path="/hooks/unknown").removesuffix(body)
    with contextlib.ExitStack() as stack:
        for number in range(2, 8):
            client = stack.enter_context(RawClient(bridge.url, f"127.0.0.{number}"))
            client.send(head + body[:600_000])
        until(lambda: tell(bridge, body, path="/hooks/unknown").status == 503)
        taken(tell(bridge, body))


def test_bodies_of_strangers_are_bounded_together(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory: there may be 4,096 connections, and each could hold 512 KiB before its secret is looked at."""
    monkeypatch.setattr(webhooks, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(webhooks, "MAX_OF_STRANGERS", 2)
    body = json.dumps(unique(more="x" * 200_000)).encode()
    head = told(body, path="/hooks/signed").removesuffix(body)
    with hooked(upstream, tmp_path) as bridge, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(bridge.connect()).send(head + body[:150_000])
        until(lambda: tell(bridge, body, path="/hooks/signed").status == 503)
        assert tell(bridge, unique(), path="/hooks/signed").status == 401
        taken(tell(bridge, body))


def test_bodies_that_are_large_once_they_are_unpacked_take_places(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, Counter[str]()
    receive = Receiving.receive

    async def counted(*arguments: Any) -> Any:
        nonlocal now
        now += 1
        most["at once"] = max(most["at once"], now)
        try:
            await asyncio.sleep(0.05)
            return await receive(*arguments)
        finally:
            now -= 1

    monkeypatch.setattr(Receiving, "receive", counted)
    for size, expected in ((1_000, range(2, 9)), (600_000, range(1, 2))):
        most.clear()
        bodies = [gzip.compress(json.dumps(unique(more="x" * size)).encode()) for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            for answer in threads.map(lambda body: tell(bridge, body, "Content-Encoding: gzip"), bodies):
                taken(answer)
        assert most["at once"] in expected


def test_what_a_source_makes_of_its_senders_bodies_is_in_the_room(bridge: Bridge) -> None:
    found = content(bridge, tell(bridge, recorded("grafana/firing-12")))
    assert "<strong>" in found["formatted_body"]
    body = recorded("github/push-new-branch")
    answer = tell(bridge, body, "X-GitHub-Event: push", "X-GitHub-Delivery: 1", signed(body), path="/hooks/signed")
    assert "Codertocat" in content(bridge, answer)["body"]


# answers


def test_sender_that_wants_a_202_gets_one(bridge: Bridge) -> None:
    answer = tell(bridge, unique(), "Prefer: respond-async")
    delivery = answer.json()["delivery_id"]
    assert (answer.status, answer.headers["location"]) == (202, f"/deliveries/{delivery}")
    assert answer.headers["preference-applied"] == "respond-async"


def test_answer_does_not_wait_for_the_homeserver(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.silence, at="/send/")
    delivery = taken(tell(bridge, unique()))
    assert bridge.delivery(delivery)["status"] == "queued"


def test_room_that_refuses_is_no_concern_of_the_sender(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.matrix_error(403, "M_FORBIDDEN", "no"), at="/send/")
    delivery = taken(tell(bridge, unique()))
    ending = time.monotonic() + PATIENCE
    while not bridge.delivery(delivery)["attempts"]:
        assert time.monotonic() < ending
        time.sleep(0.01)
    assert bridge.delivery(delivery)["status"] in ("queued", "dead")


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        pytest.param(f"/services/T0/B0/{SECRET}", {"text": "a <https://x.example|b>"}, 200, b"ok", id="slack"),
        pytest.param(f"/services/{SECRET}", {"text": "c"}, 200, b"ok", id="slack-shorter"),
        pytest.param(path_of("chatty"), {"text": "d"}, 200, b"ok", id="slack-by-its-source"),
        pytest.param(f"/api/webhooks/123/{SECRET}", {"content": "e"}, 204, b"", id="discord"),
        pytest.param(f"/api/webhooks/123/{SECRET}/slack", {"text": "f"}, 200, b"ok", id="discord-as-slack"),
        pytest.param(path_of("discord"), {"content": "g"}, 204, b"", id="discord-by-its-source"),
    ],
)
def test_other_tools_senders_get_what_they_know(
    bridge: Bridge, rooms: Rooms, path: str, body: dict[str, str], status: int, text: bytes
) -> None:
    body = {name: f"{said} {secrets.token_hex(4)}" for name, said in body.items()}  # in either way another one
    with bridge.connect() as client:
        client.send(told(body, path=path))
        head = client.head()
    assert head.split(" ")[1] == str(status)
    if status == 200:
        answer = tell(bridge, body, path=path)
        assert (answer.body, answer.headers["idempotent-replayed"]) == (text, "true")
        assert answer.headers["content-type"].startswith("text/plain")
    bridge.wait_until_idle()
    assert len(rooms.events) == 1


@pytest.mark.parametrize("path", [f"/services/T0/B0/{SECRET}", f"/api/webhooks/1/{SECRET}"])
@pytest.mark.parametrize("body", [{"text": None}, {"other": "x"}, []])
def test_chat_body_in_which_nothing_is_recognised_is_refused(bridge: Bridge, path: str, body: Any) -> None:
    answer = tell(bridge, body, path=path)
    assert answer.status == 400, answer
    assert answer.json()["error"].startswith("the body ")


def test_what_is_nothing_to_say_is_answered_with_what_was_done(bridge: Bridge, rooms: Rooms) -> None:
    body = recorded("github/ping")
    answer = tell(bridge, body, "X-GitHub-Event: ping", signed(body), path="/hooks/signed")
    assert answer.status == 200
    assert answer.json()["ok"] is True
    assert "ping" in answer.json()["done"]
    opened = tell(bridge, recorded("github/issues-opened"), "X-GitHub-Event: issues", path=path_of("picky"))
    assert opened.json()["ok"] is True
    assert "ignore" in opened.json()["done"]
    opened = tell(bridge, recorded("github/pull-request-opened"), "X-GitHub-Event: pull_request", path=path_of("picky"))
    assert "ignore" in opened.json()["done"]
    bridge.wait_until_idle()
    assert not rooms.events


# what a message can have


def test_message_has_what_it_can_and_its_sender_hears_what_it_cannot(bridge: Bridge) -> None:
    said = unique(
        title="T", msgtype="m.shout", mentions=["@al:hs"], reply_to="nobody", attachments=[{"url": "ftp://x"}]
    )
    answer = tell(bridge, said)
    found = content(bridge, answer)
    assert (found["msgtype"], found["body"]) == ("m.text", f"T\n{said['text']}")
    assert found["m.mentions"] == {}
    assert [each.split(" ")[0] for each in answer.json()["warnings"]] == ["attachments/0/url"]
    history = notes(bridge, taken(answer))
    assert history[:1] == answer.json()["warnings"]
    assert history[1].startswith("sent without what it cannot have: message: there is no delivery nobody of yours")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("any", {}),
        ("on-call", {}),
        ("closed", {}),
        ("open", {"user_ids": ["@bo:hs"], "room": True}),
    ],
)
def test_body_pings_only_where_the_owner_lets_it(bridge: Bridge, name: str, expected: dict[str, Any]) -> None:
    said = unique(mentions=["@bo:hs", "@room", "nobody", 3])
    said["text"] += " @room @bo:hs"
    assert content(bridge, tell(bridge, said, path=path_of(name) if name != "any" else PATH))["m.mentions"] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("on-call", {"user_ids": ["@al:hs"], "room": True}), ("closed", {}), ("open", {"user_ids": ["@al:hs"]})],
)
def test_what_begins_to_fire_pings_whom_the_owner_named(bridge: Bridge, name: str, expected: dict[str, Any]) -> None:
    group = secrets.token_hex(4)
    fired = content(bridge, tell(bridge, alert(group, groupKey=group), path=path_of(name)))
    assert fired["m.mentions"] == expected
    ended = content(bridge, tell(bridge, alert(group, groupKey=group, status="resolved"), path=path_of(name)))
    assert ended["m.relates_to"]["rel_type"] == "m.replace"
    assert ended["m.new_content"]["m.mentions"] == ended["m.mentions"] == {}


# templates


def test_own_template_makes_the_message(bridge: Bridge) -> None:
    found = content(bridge, tell(bridge, {"what": secrets.token_hex(4), "state": "<down>"}, path=path_of("own")))
    assert found["formatted_body"].endswith("</strong> is &lt;down&gt;")


def test_template_that_fails_loses_nothing(bridge: Bridge) -> None:
    what = secrets.token_hex(4)
    answer = tell(bridge, {"what": what}, path=path_of("failing"))
    assert what in content(bridge, answer)["body"]
    assert "the template failed, and a summary was sent" in answer.json()["warnings"][0].lower()
    assert notes(bridge, taken(answer)) == answer.json()["warnings"]
    asked = post("/hooks/failing", b"", f"X-API-Key: {KEY}", "Authorization: Basic x", method="GET")
    ending = time.monotonic() + PATIENCE
    while "summary was sent" not in json.dumps(bridge.ask(asked).json()):
        assert time.monotonic() < ending
        time.sleep(0.05)


BOMB = (
    "{% if payload.is_bomb %}{% set a = namespace(x=[1]) %}{% for i in range(40) %}"
    "{% set a.x = a.x + a.x %}{% endfor %}{% endif %}{{ payload.what }}"
)


def test_template_that_never_ends_delays_one_request_and_loses_none(
    upstream: Upstream, rooms: Rooms, tmp_path: Path
) -> None:
    with hooked(upstream, tmp_path, hook("bomb", template={"text": BOMB})) as bridge:
        tell(bridge, unique())  # the process is there

        def bombed(number: int) -> float:
            began = time.monotonic()
            answer = tell(bridge, {"what": f"thing {number}", "is_bomb": 1}, path=path_of("bomb"))
            assert answer.json()["warnings"], answer
            assert f"thing {number}" in content(bridge, answer)["body"]
            return time.monotonic() - began

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(bombed, range(8)))
        assert min(bombed(number) for number in range(8, 14)) < 1.0  # it is not tried each time
        assert len({event.content["body"] for event in rooms.events}) == 15


LOOP = (
    "{% if payload.is_bomb %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{{ payload.what }}"
)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processor time is read from Linux's /proc")
@pytest.mark.parametrize(
    ("template", "why"), [(BOMB, "more than a second, or too much memory"), (LOOP, "too many steps")]
)
def test_summary_instead_of_a_template_that_never_ends_takes_a_bounded_processor_time(
    template: str, why: str, upstream: Upstream, rooms: Rooms, tmp_path: Path
) -> None:
    with hooked(upstream, tmp_path, hook("bomb", template={"text": template})) as bridge:
        tell(bridge, unique(), path=path_of("bomb"))  # the process is there
        before = family_cpu_seconds(os.getpid())
        for number in range(5):
            name = "text" if number % 2 else "what"  # also where the source would have needed no template
            answer = tell(bridge, {name: f"thing {number}", "is_bomb": 1}, path=path_of("bomb"))
            assert f"thing {number}" in content(bridge, answer)["body"]
            assert answer.json()["warnings"][0].startswith("the template failed")
            assert why in answer.json()["warnings"][0]
        # The first one's second, another process in the place of the one that it ended, and our own part of it.
        assert family_cpu_seconds(os.getpid()) - before < 5


# repeats


def test_same_body_within_a_minute_is_a_repeat(bridge: Bridge, rooms: Rooms) -> None:
    said = unique()
    answers = [tell(bridge, said) for _ in range(3)]
    assert len({taken(answer) for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", "true"]
    taken(tell(bridge, said, path=path_of("open")))  # another hook
    bridge.wait_until_idle()
    assert len(rooms.events) == 2


def test_same_body_is_a_repeat_across_the_turn_of_a_minute_and_not_after_one(
    bridge: Bridge, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, now = unique(), 1_800_000_000_000 - 1_800_000_000_000 % 60_000
    ends = {"now": now + 59_000}
    monkeypatch.setattr("flowbridge.store.clock.now_ms", lambda: ends["now"])
    first = taken(tell(bridge, said))
    ends["now"] = now + 61_000
    assert taken(tell(bridge, said)) == first
    ends["now"] = now + 118_000
    assert taken(tell(bridge, said)) == first
    ends["now"] = now + 180_500
    assert taken(tell(bridge, said)) != first


def test_delivery_id_of_the_sender_tells_a_repeat(bridge: Bridge, rooms: Rooms) -> None:
    body, id_ = recorded("github/issues-opened"), secrets.token_hex(8)
    headers = ["X-GitHub-Event: issues", f"X-GitHub-Delivery: {id_}"]
    first = tell(bridge, body, *headers)
    again = tell(bridge, body.replace(b"opened", b"closed"), *headers)
    assert taken(again) == taken(first)
    assert again.headers["idempotent-replayed"] == "true"
    headers[1] += "-2"
    assert taken(tell(bridge, body, *headers)) != taken(first)


def test_repeats_at_once_are_one_message(bridge: Bridge, rooms: Rooms) -> None:
    said = unique()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: taken(tell(bridge, said)), range(24)))
    assert len(set(found)) == 1
    bridge.wait_until_idle()
    assert len(rooms.events) == 1


# our own trouble


def test_bridge_without_an_account_asks_to_come_again(upstream: Upstream, tmp_path: Path) -> None:
    with hooked(upstream, tmp_path, access_token=None) as bridge:
        answer = tell(bridge, unique())
        assert (answer.status, answer.headers["retry-after"]) == (503, "60")
        assert answer.json()["error"] == "the bridge has no account to send with: set ACCESS_TOKEN"


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.hang_up, id="away"),
        pytest.param(scripted.matrix_error(404, "M_NOT_FOUND", "no such alias"), id="unknown"),
        pytest.param(scripted.matrix_error(403, "M_FORBIDDEN", "not invited"), id="forbidden"),
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow down"), id="slow"),
    ],
)
def test_alias_that_leads_nowhere_is_our_trouble(bridge: Bridge, upstream: Upstream, behaviour: Any) -> None:
    upstream.always(behaviour, at="alias")
    answer = tell(bridge, unique(), path=path_of("elsewhere"))
    assert answer.status == 503, answer
    assert int(answer.headers["retry-after"]) >= 1


def test_full_store_is_our_trouble(upstream: Upstream, tmp_path: Path) -> None:
    upstream.always(scripted.silence, at="/send/")
    with hooked(upstream, tmp_path, max_queued_per_room=2, request_seconds=2.0) as bridge:
        answers = [tell(bridge, unique()) for _ in range(6)]
        assert {answer.status for answer in answers} == {200, 503}
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)


# files


def test_file_that_does_not_come_is_sent_as_its_address(bridge: Bridge, upstream: Upstream, rooms: Rooms) -> None:
    began = time.monotonic()
    url = "https://files.invalid/a.png"
    answer = tell(bridge, unique(attachments=[{"url": url, "filename": "a.png"}]))
    assert time.monotonic() - began < PATIENCE
    delivery = taken(answer)
    bridge.wait_until_idle()
    assert [event.content["body"] for event in rooms.events][1:] == [f"a.png could not be attached\n{url}"]
    assert "a.png could not be attached" in notes(bridge, delivery)[0]


def test_file_in_the_body_is_uploaded(bridge: Bridge, upstream: Upstream) -> None:
    files = Files()
    upstream.script(files)
    said = unique(attachments=[{"data": "aGVsbG8=", "filename": "a.txt"}])
    files.refusal = scripted.hang_up
    answer = tell(bridge, said)
    assert answer.status == 503, answer
    assert "retry-after" in answer.headers
    assert not files.events
    files.refusal = None
    delivery = taken(tell(bridge, said))
    bridge.wait_until_idle()
    assert [event.content["msgtype"] for event in files.events] == ["m.text", "m.file"]
    again = tell(bridge, said)
    assert taken(again) == delivery
    assert again.headers["idempotent-replayed"] == "true"
    assert len(files.uploads) == 1


def test_file_that_the_homeserver_never_takes_does_not_keep_the_text_back(bridge: Bridge, upstream: Upstream) -> None:
    files = Files()
    files.refusal = scripted.matrix_error(403, "M_FORBIDDEN", "no files here")
    upstream.script(files)
    answer = tell(bridge, unique(attachments=[{"data": "aGVsbG8=", "filename": "a.txt"}]))
    assert notes(bridge, taken(answer)) == ["a.txt could not be attached: no files here"]
    bridge.wait_until_idle()
    assert [event.content["body"] for event in files.events][1:] == ["a.txt could not be attached"]


# what is kept


def test_last_requests_are_kept_for_the_owner_without_secrets(bridge: Bridge) -> None:
    marker = secrets.token_hex(8)
    headers = [f"Authorization: Bearer {SECRET}", "X-My-Token: canary", "Cookie: canary", "X-GitHub-Event: none"]
    tell(bridge, {"what": marker}, *headers, path="/hooks/any")
    tell(bridge, b'{"broken": ' + marker.encode(), *headers, path="/hooks/any")
    tell(bridge, {"what": marker}, path=path_of("forgetful"))

    def ask(path: str) -> dict[str, Any]:
        asked = post(path, b"", f"X-API-Key: {KEY}", "Authorization: Basic x", method="GET")
        return dict(bridge.ask(asked).json())

    listed = ask("/hooks/any/requests")["requests"][:2]
    assert "is not valid JSON" in listed[0]["error"]
    assert listed[1]["delivery_id"]
    shown = [ask(f"/hooks/any/requests/{each['id']}") for each in listed]
    assert all(marker in json.dumps(each) for each in shown)
    assert all("X-GitHub-Event".lower() in json.dumps(each) for each in shown)
    assert "canary" not in json.dumps(shown)
    assert SECRET not in json.dumps(shown)
    assert ask("/hooks/forgetful/requests")["requests"] == []


def test_sender_that_goes_away_leaves_nothing_behind(bridge: Bridge) -> None:
    said = json.dumps(unique()).encode()
    ends = threading.Event()
    with bridge.connect() as client:
        client.send(told(said).removesuffix(said) + said[:5])
        ends.set()
    taken(tell(bridge, said))


def test_hook_acts_as_the_bot_in_its_room_alone(bridge: Bridge, upstream: Upstream) -> None:
    delivery = taken(tell(bridge, unique()))
    found = bridge.wait_until(delivery, "sent")
    assert found["room_id"] == ROOM
    assert found["hook"] == "any"
