"""The usual request to a hook is answered without ASGI: as in the ordinary way, byte for byte."""

import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowbridge.hooks.receiving import Receiving
from flowbridge.rendering.processes import Rendering
from flowbridge.web.usual_hook import UsualHook, UsualHooks
from tests.http.conftest import Answer, Bridge
from tests.http.hooked import PATH, SECRET, alert, basic, hooked, path_of, signed, told
from tests.patience import until
from tests.upstream import Rooms, Upstream

PUSH = (Path(__file__).parents[1] / "payloads" / "github" / "push-new-branch.json").read_bytes()
BEARER = f"Authorization: Bearer {SECRET}"
BARE = "/hooks/any"
FORM = "Content-Type: application/x-www-form-urlencoded"
FLOOD = b"[" * 1_000  # is nested too deeply

Usual = Callable[[], int]  # how many requests took the short way
Lines = Callable[[], list[dict[str, Any]]]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def shared_hooked(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with hooked(shared_upstream, tmp_path_factory.mktemp("hooked"), wrong_keys_per_minute=100_000) as bridge:
        yield bridge


@pytest.fixture
def bridge(shared_hooked: Bridge, upstream: Upstream, rooms: Rooms) -> Iterator[Bridge]:
    yield shared_hooked
    upstream.reset()
    shared_hooked.clear()


@pytest.fixture
def usual(monkeypatch: Patch) -> Usual:
    take, taken = UsualHooks.take, []

    def counted(*args: Any) -> Any:
        hook = take(*args)
        taken.extend([1] if hook is not None else [])
        return hook

    monkeypatch.setattr(UsualHooks, "take", counted)
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
    return answer.status, list(headers), headers, re.sub(delivery.encode(), b"DELIVERY", answer.body)


def unique(body: bytes) -> bytes:
    """Another body each time: the same again would be a repeat."""
    return body.replace(b"UNIQUE", secrets.token_hex(4).encode())


ALERT = json.dumps(alert("UNIQUE")).encode()

# Each with the status that it gets.
USUAL: dict[str, tuple[int, str, str, bytes, list[str]]] = {
    "an alert": (200, "POST", BARE, ALERT, [BEARER]),
    "basic": (200, "POST", BARE, ALERT, [basic(SECRET)]),
    "a token in the path": (200, "POST", PATH, ALERT, []),
    "by PUT": (200, "PUT", PATH, ALERT, []),
    "a push with a signature": (200, "POST", "/hooks/signed", PUSH, ["X-GitHub-Event: push", signed(PUSH)]),
    "a text": (200, "POST", BARE, b"just text UNIQUE", [BEARER, "Content-Type: text/plain"]),
    "a form": (200, "POST", BARE, b"payload=%7B%22text%22%3A%22UNIQUE%22%7D", [BEARER, FORM]),
    "Slack's": (200, "POST", path_of("chatty"), b'{"text": "hi UNIQUE"}', []),
    "a template of its own": (200, "POST", path_of("own"), b'{"what": "UNIQUE", "state": "up"}', []),
    "a template that fails": (200, "POST", path_of("failing"), b'{"what": "UNIQUE"}', []),
    "what is ignored": (
        200,
        "POST",
        path_of("picky"),
        b'{"action": "opened", "issue": {}}',
        ["X-GitHub-Event: issues"],
    ),
    "an alias": (200, "POST", path_of("elsewhere"), ALERT, []),
    "without keep-alive": (200, "POST", BARE, ALERT, [BEARER, "Connection: close"]),
    "what is not JSON": (400, "POST", BARE, b'{"msgtype"', [BEARER]),
    "what is nested too deeply": (400, "POST", BARE, FLOOD, [BEARER]),
    "an empty body": (400, "POST", BARE, b" ", [BEARER]),
    "XML": (415, "POST", BARE, b"<?xml version='1.0'?><a/>", [BEARER]),
}

UNUSUAL: dict[str, tuple[int, str, str, bytes, list[str]]] = {
    "a wrong token": (401, "POST", BARE, ALERT, ["Authorization: Bearer fh_wrong"]),
    "no token": (401, "POST", BARE, ALERT, []),
    "an unknown hook": (401, "POST", "/hooks/unknown", ALERT, [BEARER]),
    "a wrong signature": (401, "POST", "/hooks/signed", PUSH, ["X-GitHub-Event: push", signed(b"")]),
    "a preference": (202, "POST", BARE, ALERT, [BEARER, "Prefer: respond-async"]),
    "a header twice": (200, "POST", BARE, ALERT, [BEARER, "X-Any: 1", "X-Any: 2"]),
    "a query": (200, "POST", f"{PATH}?a=b", ALERT, []),
    "a page of another origin": (200, "POST", BARE, ALERT, [BEARER, "Origin: https://example.org"]),
    "PUT without a token": (403, "PUT", BARE, ALERT, [BEARER]),
    "its administration": (403, "POST", "/hooks/any/rotate", b"{}", [BEARER]),
    "an encoded path": (200, "POST", PATH.replace("any", "%61ny"), ALERT, []),
    "a large body": (200, "POST", BARE, b'{"text": "UNIQUE%s"}' % (b"x" * 70_000), [BEARER]),
    "a compressed body": (400, "POST", BARE, ALERT, [BEARER, "Content-Encoding: gzip"]),
    "another tool's path": (200, "POST", f"/webhook/{SECRET}", ALERT, []),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_request_is_answered_and_sent_as_in_the_ordinary_way(
    bridge: Bridge, rooms: Rooms, upstream: Upstream, usual: Usual, lines: Lines, monkeypatch: Patch, name: str
) -> None:
    status, method, path, body, headers = USUAL[name]

    def ask() -> tuple[Any, ...]:
        before, taken, delivery_id = len(lines()), usual(), f"X-GitHub-Delivery: {secrets.token_hex(8)}"
        answer = bridge.ask(told(unique(body), *headers, delivery_id, path=path, method=method), method)
        assert answer.status == status
        delivery = answer.headers.get("flowbridge-delivery")
        content = bridge.wait_until(delivery, "sent")["event"]["content"] if delivery else {}
        until(lambda: any(line["status"] == status and line["path"].startswith("/hooks/") for line in lines()[before:]))
        line = next(line for line in lines()[before:] if line["path"].startswith("/hooks/"))
        same = [(key, value) for key, value in line.items() if key not in ("ms", "delivery")]
        return usual() - taken, shown(answer), sorted(content), same

    short = ask()
    monkeypatch.setattr(UsualHooks, "take", lambda *_: None)
    ordinary = ask()
    assert short[1:] == ordinary[1:]
    assert (short[0], ordinary[0]) == (1, 0)
    assert SECRET not in str(lines())


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_takes_the_ordinary_way_once(
    bridge: Bridge, rooms: Rooms, usual: Usual, lines: Lines, name: str
) -> None:
    status, method, path, body, headers = UNUSUAL[name]
    assert bridge.ask(told(unique(ALERT), BEARER, path=BARE)).status == 200
    taken = usual()
    answer = bridge.ask(told(unique(body), *headers, path=path, method=method), method)
    assert (answer.status, usual()) == (status, taken)
    assert SECRET not in str(lines())


def test_repeat_is_told_as_one(bridge: Bridge, rooms: Rooms, usual: Usual) -> None:
    asked, taken = told(unique(ALERT), BEARER, path=BARE), usual()
    first, again = bridge.ask(asked), bridge.ask(asked)
    assert again.headers["idempotent-replayed"] == "true"
    assert first.headers["flowbridge-delivery"] == again.headers["flowbridge-delivery"]
    assert usual() == taken + 2


def test_request_that_cannot_be_rendered_is_refused_once(
    bridge: Bridge, rooms: Rooms, usual: Usual, monkeypatch: Patch
) -> None:
    """The ordinary way would have it rendered once more, for a second of processor time."""
    rendered, render = [], Rendering.webhook

    async def counted(*args: Any) -> Any:
        rendered.append(args)
        return await render(*args)

    monkeypatch.setattr(Rendering, "webhook", counted)
    taken = usual()
    assert bridge.ask(told(FLOOD, BEARER, path=BARE)).status == 400
    assert (len(rendered), usual()) == (1, taken + 1)


def test_fault_of_ours_is_a_500_on_a_connection_that_serves_on(
    bridge: Bridge, rooms: Rooms, usual: Usual, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    asked = told(unique(ALERT), BEARER, path=BARE)
    taken = usual()
    with bridge.connect() as sender:
        with monkeypatch.context() as patch:
            patch.setattr(Receiving, "receive", fail)
            assert sender.send(asked).answer().status == 500
        assert sender.send(asked).answer().status == 200
    assert [record.msg for record in caplog.records if record.exc_info] == ["internal_error"]
    assert usual() == taken + 2


def test_fault_after_a_request_was_accepted_ends_the_connection(
    bridge: Bridge, rooms: Rooms, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the short way")

    asked = told(unique(ALERT), BEARER, path=BARE)
    with bridge.connect() as sender, monkeypatch.context() as patch:
        patch.setattr(UsualHook, "_answer", fail)
        assert sender.send(asked).is_closed()
    assert bridge.ask(asked).headers["idempotent-replayed"] == "true"
    assert [record.msg for record in caplog.records if record.exc_info] == ["internal_error"]
