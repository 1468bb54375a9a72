"""Contract §1, "Errors": whatever goes wrong, the answer is a Matrix error with the right status."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.callers import Callers
from flowbridge.serve import background
from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, ROOM, SEND, WAIT_SECONDS, Bridge, Elapsed, post, settings_for
from tests.upstream import Behaviour, Upstream

STATE = f"/rooms/{ROOM}/state/m.room.name"
WHOAMI = "/_matrix/client/v3/account/whoami"


def check_error(answer: httpx.Response, status: int, errcode: str) -> dict[str, Any]:
    """The answer's body, when it is this Matrix error and nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["errcode"] == errcode
    assert isinstance(found["error"], str)
    assert found["error"]
    assert "detail" not in found
    assert "Traceback" not in answer.text
    assert "<html" not in answer.text
    return dict(found)


def targets(upstream: Upstream) -> list[str]:
    return [request.target for request in upstream.requests]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/healthz/",
        "/healthz/more",
        "/rooms",
        "/rooms/",
        f"/rooms/{ROOM}/send",
        f"/rooms/{ROOM}/send/m.room.message/1/2",
        "/rooms/%2F/nothing",
        "/" + "a/" * 2_000,
        "/schemas/components/image_info.json/more",
        "/_matrix",
        "/_matrix/client/v2/rooms",
        f"/_matrix/client/v9/rooms/{quote(ROOM)}/send/m.room.message",
        "/redoc",
        "/nothing?access_token=x",
    ],
)
def test_unknown_path_is_a_404(caller: httpx.Client, upstream: Upstream, method: str, path: str) -> None:
    check_error(caller.request(method, path), 404, "M_UNRECOGNIZED")
    assert upstream.requests == []


@pytest.mark.parametrize("path", ["//healthz", f"//rooms/{ROOM}/send/m.room.message", "//", "/schemas/components"])
def test_path_that_is_nearly_known_is_a_404(bridge: Bridge, path: str) -> None:
    answer = bridge.post(path, json.dumps(HELLO).encode(), method="GET")
    assert answer.headers["content-type"] == "application/json"
    assert answer.status == 404
    assert answer.json()["errcode"] in ("M_UNRECOGNIZED", "M_NOT_FOUND")
    assert bridge.upstream.requests == []


@pytest.mark.parametrize("path", ["/nothing", "//", "/a/b/c/d/e/f", f"/rooms/{quote(ROOM)}/send"])
def test_head_of_an_unknown_path_is_a_404_without_a_body(bridge: Bridge, path: str) -> None:
    with bridge.connect() as client:
        first = client.send(post(path, method="HEAD")).answer("HEAD")
        second = client.send(post("/healthz", method="GET")).answer()
    assert (first.status, first.headers["content-type"]) == (404, "application/json")
    assert second.status == 200


@pytest.mark.parametrize(
    "target",
    [
        f"/rooms%2F{ROOM}/send/m.room.message",
        f"/rooms/{ROOM}%2Fsend%2Fm.room.message",
        f"/rooms/{ROOM}/send%2Fm.room.message",
        f"/_matrix%2Fclient%2Fv3%2Frooms%2F{ROOM}%2Fsend%2Fm.room.message%2F1",
        "/validate%2Fm.room.message",
    ],
)
def test_encoded_slash_is_no_path_separator(bridge: Bridge, target: str) -> None:
    answer = bridge.post(target, json.dumps(HELLO).encode(), method="PUT")
    assert answer.headers["content-type"] == "application/json"
    assert answer.status == 404
    assert answer.json()["errcode"] == "M_UNRECOGNIZED"
    assert bridge.upstream.requests == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", SEND, {"POST", "PUT"}),
        ("HEAD", SEND, {"POST", "PUT"}),
        ("DELETE", f"{SEND}/1", {"POST", "PUT"}),
        ("PATCH", f"/_matrix/client/v3{SEND}/1", {"POST", "PUT"}),
        ("POST", STATE, {"GET", "HEAD", "PUT"}),
        ("DELETE", f"/_matrix/client/r0{STATE}/", {"GET", "HEAD", "PUT"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("DELETE", "/schemas", {"GET", "HEAD"}),
        ("GET", "/validate/m.room.message", {"POST"}),
        ("PUT", "/openapi.json", {"GET", "HEAD"}),
        ("OPTIONS", "/readyz", {"GET", "HEAD"}),
    ],
)
def test_wrong_method_is_a_405_that_names_the_right_ones(
    caller: httpx.Client, upstream: Upstream, method: str, path: str, allowed: set[str]
) -> None:
    answer = caller.request(method, path)
    assert set(answer.headers["allow"].split(", ")) == allowed
    if method == "HEAD":
        assert answer.status_code == 405
    else:
        check_error(answer, 405, "M_UNRECOGNIZED")
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("status", "errcode"),
    [(400, "M_BAD_JSON"), (403, "M_FORBIDDEN"), (404, "M_NOT_FOUND"), (413, "M_TOO_LARGE"), (500, "M_UNKNOWN")],
)
@pytest.mark.parametrize("prefix", ["", "/_matrix/client/v3"], ids=["flow", "matrix"])
def test_homeservers_own_error_passes(
    caller: httpx.Client, upstream: Upstream, prefix: str, status: int, errcode: str
) -> None:
    upstream.always(scripted.matrix_error(status, errcode, "its own text", room_version="12"), at="/send/")
    found = check_error(caller.post(prefix + SEND, json=HELLO), status, errcode)
    assert found == {"errcode": errcode, "error": "its own text", "room_version": "12"}
    upstream.always(scripted.matrix_error(status, errcode, "its own text"), at="/state/")
    check_error(caller.get(prefix + STATE), status, errcode)
    check_error(caller.put(prefix + STATE, json={"name": "n"}), status, errcode)


@pytest.mark.parametrize(
    ("behaviour", "pause_ms", "header"),
    [
        pytest.param(
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms=1_234), 1_234, "2", id="in-the-body"
        ),
        pytest.param(
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", "Retry-After: 7"), 7_000, "7", id="as-a-header"
        ),
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow"), 500, "1", id="not-said"),
        pytest.param(scripted.raw(scripted.encoded(429, b"slow down", "Retry-After: 3")), 3_000, "3", id="by-a-proxy"),
        pytest.param(
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms="soon"), 500, "1", id="a-word"
        ),
        pytest.param(
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms=10**30), 600_000, "600", id="for-ever"
        ),
    ],
)
def test_rate_limit_passes_with_its_pause(
    caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, pause_ms: int, header: str
) -> None:
    upstream.always(behaviour, at="/send/")
    answer = caller.post(SEND, json=HELLO)
    assert check_error(answer, 429, "M_LIMIT_EXCEEDED")["retry_after_ms"] == pause_ms
    assert answer.headers["retry-after"] == header


@pytest.mark.parametrize("status", [200, 201, 204, 304, 404, 500, 502, 503])
def test_html_from_upstream_is_a_502(caller: httpx.Client, upstream: Upstream, status: int) -> None:
    upstream.always(scripted.html(status), at="/send/")
    check_error(caller.post(SEND, json=HELLO), 502, "M_UNKNOWN")


@pytest.mark.parametrize("path", [STATE, "/_matrix/client/versions", f"/_matrix/client/v3{STATE}/"])
def test_html_with_a_200_is_a_502_for_reads_too(caller: httpx.Client, upstream: Upstream, path: str) -> None:
    caller.post(SEND, json=HELLO)  # the token is known from here on
    upstream.always(scripted.html(200))
    check_error(caller.get(path), 502, "M_UNKNOWN")


def test_bridge_is_not_ready_when_html_answers_for_the_homeserver(caller: httpx.Client, upstream: Upstream) -> None:
    assert caller.get("/readyz").status_code == 200
    upstream.always(scripted.html(200), at="/versions")
    check_error(caller.get("/readyz"), 503, "M_UNKNOWN")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(caller: httpx.Client, upstream: Upstream, status: int) -> None:
    upstream.always(scripted.redirect(f"{upstream.url}/elsewhere", status), at="/send/")
    check_error(caller.post(SEND, json=HELLO), 502, "M_UNKNOWN")
    assert len(upstream.events) == 1
    assert "/elsewhere" not in targets(upstream)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.hang_up, id="hangs-up"),
        pytest.param(scripted.raw(b"\0" * 64), id="no-http"),
        pytest.param(
            scripted.then_close(scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")), id="breaks-off"
        ),
        pytest.param(scripted.raw(scripted.encoded(200, b"x" * 1_000_000)), id="a-megabyte"),
        pytest.param(scripted.raw(scripted.encoded(200, b"{", "Content-Type: application/json")), id="half-json"),
        pytest.param(scripted.answer([]), id="a-list"),
        pytest.param(scripted.answer(None), id="null"),
        pytest.param(scripted.answer({}), id="no-event-id"),
        pytest.param(scripted.answer({"event_id": 1}), id="event-id-is-a-number"),
        pytest.param(scripted.answer({"event_id": ""}), id="event-id-is-empty"),
        pytest.param(scripted.answer({"errcode": "M_X"}), id="error-with-a-200"),
        pytest.param(scripted.answer({"errcode": 3, "error": "x"}, 403), id="errcode-is-a-number"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 302), id="error-with-a-302"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 600), id="status-600"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 999), id="status-999"),
        pytest.param(scripted.raw(scripted.encoded(403, b"[" * 60_000)), id="deep-json"),
    ],
)
def test_nonsense_from_upstream_is_a_502(caller: httpx.Client, upstream: Upstream, behaviour: Behaviour) -> None:
    upstream.always(behaviour, at="/send/")
    check_error(caller.post(SEND, json=HELLO), 502, "M_UNKNOWN")
    upstream.script(None)
    assert caller.post(SEND, json=HELLO).json() == {"event_id": "$event"}


@pytest.mark.parametrize(
    "extra",
    [
        {"retry_after_ms": 10**400},
        {"retry_after_ms": -5},
        {"retry_after_ms": True},
        {"retry_after_ms": None},
        {"text": "\ud800"},
        {"self": 1, "status": 2, "errors": 3},
        {"nested": json.loads("[" * 500 + "]" * 500)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_odd_extras_of_an_error_still_give_a_json_answer(
    caller: httpx.Client, upstream: Upstream, extra: dict[str, Any]
) -> None:
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": "no", **extra}, 403), at="/send/")
    answer = caller.post(SEND, json=HELLO)
    check_error(answer, 403, "M_FORBIDDEN")
    assert int(answer.headers.get("retry-after", "0")) >= 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_is_no_json_is_not_passed_on(caller: httpx.Client, upstream: Upstream, number: float) -> None:
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": "no", "number": number}, 403), at="/send/")
    answer = caller.post(SEND, json=HELLO)
    assert answer.status_code in (403, 502)  # the rest of the error, or an answer that no homeserver gives
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text


def test_error_text_that_is_no_text_gives_way_to_the_errcode(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": {"a": 1}}, 403), at="/send/")
    assert check_error(caller.post(SEND, json=HELLO), 403, "M_FORBIDDEN")["error"] == "M_FORBIDDEN"


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_dead_upstream_is_a_502_at_once(dead_port: int, elapsed: Elapsed) -> None:
    with (
        background(settings_for(f"http://127.0.0.1:{dead_port}")) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer t"}, trust_env=False) as caller,
    ):
        for path in (SEND, f"/_matrix/client/v3{SEND}"):
            check_error(caller.post(path, json=HELLO), 502, "M_UNKNOWN")
        check_error(caller.get(STATE), 502, "M_UNKNOWN")
        check_error(caller.get("/_matrix/client/versions"), 502, "M_UNKNOWN")
        check_error(caller.get("/readyz"), 503, "M_UNKNOWN")
        assert caller.get("/healthz").status_code == 200
        assert caller.post("/validate/m.room.message", json=HELLO).status_code == 200
        assert elapsed() < 6


def test_upstream_that_dies_and_comes_back_needs_no_restart(caller: httpx.Client, upstream: Upstream) -> None:
    assert caller.post(SEND, json=HELLO).status_code == 200
    upstream.always(scripted.hang_up)
    check_error(caller.post(SEND, json=HELLO), 502, "M_UNKNOWN")
    upstream.script(None)
    assert caller.post(SEND, json=HELLO).status_code == 200


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.silence, id="silent"),
        pytest.param(scripted.drip(b"HTTP/1.1 200 OK\r\n\r\n", 0.1), id="dripping"),
    ],
)
@pytest.mark.parametrize("at", ["/whoami", "/send/"])
def test_silent_upstream_is_a_504_within_the_wait(
    caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, at: str, elapsed: Elapsed
) -> None:
    upstream.always(behaviour, at=at)
    check_error(caller.post(SEND, json=HELLO), 504, "M_UNKNOWN")
    assert elapsed() < WAIT_SECONDS + 1
    assert len(upstream.events) == (at == "/send/")


def test_silent_upstream_does_not_hold_up_others(bridge: Bridge, caller: httpx.Client, elapsed: Elapsed) -> None:
    bridge.upstream.always(scripted.silence, at="/send/")
    with bridge.connect() as other:
        other.send(post(SEND, json.dumps(HELLO).encode()))
        bridge.upstream.wait_for_requests(2)
        assert caller.get(STATE).status_code == 200
        assert caller.get("/healthz").status_code == 200
        assert elapsed() < WAIT_SECONDS
        assert other.answer().status == 504


def test_path_of_any_length_makes_a_short_line(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flowbridge"):
        assert bridge.ask(post("/" + "x" * 30_000, method="GET")).status == 404
        assert bridge.ask(post("/healthz", method="GET")).status == 200  # the first line is written by now
    assert max(len(str(getattr(record, "fields", ""))) for record in caplog.records) < 2_000


UNKNOWN_TOKEN = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Access token has expired", soft_logout=True)


def test_whoami_of_a_token_is_asked_once(caller: httpx.Client, upstream: Upstream) -> None:
    for _ in range(5):
        assert caller.post(SEND, json=HELLO).status_code == 200
    assert targets(upstream).count(WHOAMI) == 1


def test_whoami_that_is_asked_by_many_at_once_is_asked_once(bridge: Bridge) -> None:
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"user_id": "@a:b"})), at="/whoami")
    request = post(SEND, json.dumps(HELLO).encode(), "Authorization: Bearer asked-by-many")
    clients = [bridge.connect().send(request) for _ in range(10)]
    try:
        bridge.upstream.wait_for_requests(1)
        go.set()
        assert [client.answer().status for client in clients] == [200] * 10
    finally:
        for client in clients:
            client.__exit__()
    assert targets(bridge.upstream).count(WHOAMI) == 1


@pytest.mark.parametrize("at", ["/whoami", "/send/", "/state/"])
def test_401_for_a_callers_token_passes_and_is_asked_again(caller: httpx.Client, upstream: Upstream, at: str) -> None:
    def call() -> httpx.Response:
        return caller.get(STATE) if at == "/state/" else caller.post(SEND, json=HELLO)

    if at != "/whoami":
        assert call().status_code == 200
    upstream.always(UNKNOWN_TOKEN, at=at)
    asked = targets(upstream).count(WHOAMI)
    for _ in range(2):
        found = check_error(call(), 401, "M_UNKNOWN_TOKEN")
        assert found["error"] == "Access token has expired"
        assert found["soft_logout"] is True
    upstream.script(None)
    assert call().status_code == 200
    assert targets(upstream).count(WHOAMI) == asked + (3 if at == "/whoami" else 2)


@pytest.mark.parametrize("at", ["/whoami", "/send/", "/state/"])
def test_401_for_the_bot_is_a_502(upstream: Upstream, at: str) -> None:
    headers = {"X-API-Key": KEY}
    with (
        background(settings_for(upstream.url)) as url,
        httpx.Client(base_url=url, headers=headers, trust_env=False) as caller,
    ):
        upstream.always(UNKNOWN_TOKEN, at=at)
        answer = caller.get(STATE) if at == "/state/" else caller.post(SEND, json=HELLO)
        found = check_error(answer, 502, "M_UNKNOWN")
        assert "own account" in found["error"]
        assert "soft_logout" not in found
        upstream.script(None)
        assert caller.post(SEND, json=HELLO).status_code == 200


def test_403_for_the_bot_in_a_room_passes(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.matrix_error(403, "M_FORBIDDEN", "not in the room"), at="/send/")
    answer = bridge.post(SEND, json.dumps(HELLO).encode(), f"X-API-Key: {KEY}")
    assert (answer.status, answer.json()["error"]) == (403, "not in the room")


@pytest.mark.parametrize(
    ("headers", "errcode"),
    [
        ({}, "M_MISSING_TOKEN"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "M_MISSING_TOKEN"),
        ({"Authorization": "Bearer"}, "M_MISSING_TOKEN"),
        ({"Authorization": "Bearer fb_unknown"}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": "fb_unknown"}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": KEY[:-1]}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": KEY + "x"}, "M_UNKNOWN_TOKEN"),
    ],
)
def test_no_token_or_an_unknown_key_is_a_401(bridge: Bridge, headers: dict[str, str], errcode: str) -> None:
    for path in (SEND, f"/_matrix/client/v3{SEND}"):
        check_error(httpx.post(bridge.url + path, json=HELLO, headers=headers, trust_env=False), 401, errcode)
    assert bridge.upstream.requests == []


def test_mistake_of_ours_is_a_500_that_tells_nothing(caller: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("secret innards")

    monkeypatch.setattr(Callers, "credential", broken)
    answer = caller.post(SEND, json=HELLO)
    check_error(answer, 500, "M_UNKNOWN")
    assert "secret innards" not in answer.text
    assert "RuntimeError" not in answer.text


@pytest.mark.parametrize(
    ("body", "headers", "status", "errcode"),
    [
        (b"", {}, 400, "M_NOT_JSON"),
        (b"{", {}, 400, "M_NOT_JSON"),
        (b"\xff", {}, 400, "M_NOT_JSON"),
        (b"[]", {}, 400, "M_BAD_JSON"),
        (b"{}", {}, 400, "M_BAD_JSON"),
        (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "M_NOT_JSON"),
        (b"<a/>", {"Content-Type": "application/xml"}, 415, "M_NOT_JSON"),
        (b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "M_NOT_JSON"),
        (b"hi", {"Content-Type": "text/plain; charset=utf-16"}, 415, "M_NOT_JSON"),
        (b"\xff", {"Content-Type": "text/plain"}, 400, "M_NOT_JSON"),
    ],
)
def test_body_that_is_no_event_is_a_4xx(
    caller: httpx.Client, upstream: Upstream, body: bytes, headers: dict[str, str], status: int, errcode: str
) -> None:
    check_error(caller.post(SEND, content=body, headers=headers), status, errcode)
    assert upstream.requests == []
