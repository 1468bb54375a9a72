"""What passes through to the homeserver, where a real one does not do what is asked: faults, and headers of its own."""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection

from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.store import Database, api_keys
from flowbridge.web.routes import passthrough
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    KEY,
    SEND,
    TLS,
    Answer,
    Authority,
    Bridge,
    Timed,
    as_caller,
    new_token,
    post,
    running,
)
from tests.http.sends import UNKNOWN_TOKEN, lines
from tests.http.test_bounds import BODY
from tests.http.test_errors import check_error
from tests.patience import until
from tests.upstream import PATIENCE, Behaviour, Request, Upstream

ANY = "/_matrix/client/v3/capabilities"
SYNC = "/_matrix/client/v3/sync?timeout=30000"
UPLOAD = "/_matrix/media/v3/upload"
CORS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, POST, PUT, DELETE, OPTIONS",
    "access-control-allow-headers": "X-Requested-With, Content-Type, Authorization",
}


def seen(upstream: Upstream) -> Request:
    """The one request that came, besides the question whose token it is that brings a long body."""
    (request,) = (request for request in upstream.requests if not request.target.endswith("/whoami"))
    return request


def passing(value: Any) -> Callable[[Request], Behaviour | None]:
    """A homeserver that answers this to all but that question."""
    return lambda request: None if request.target.endswith("/whoami") else scripted.answer(value)


def error_of(answer: Answer, status: int, errcode: str) -> str:
    assert (answer.status, answer.json()["errcode"]) == (status, errcode)
    return str(answer.json()["error"])


def check_cors(answer: httpx.Response) -> None:
    """They are there, each once."""
    for name, value in CORS.items():
        assert answer.headers.get_list(name) == [value]


# What goes up, and what comes down


def test_headers_of_the_hop_and_secrets_of_the_caller_do_not_go_up(bridge: Bridge) -> None:
    bridge.upstream.always(scripted.answer({}))
    token = new_token()
    hop = [
        "Connection: close, X-Mine",
        "X-Mine: 1",
        "Keep-Alive: 5",
        "TE: trailers",
        "Proxy-Authorization: Basic x",
        "Cookie: a=b",
        "X-Forwarded-For: 1.2.3.4",
        "Forwarded: for=1.2.3.4",
        f"Referer: /?access_token={token}",
        "Expect: 100-continue",
    ]
    target = f"/_matrix/client/api/v1/a%2Fb/?x=%2F&access_token={token}&membership="
    assert bridge.post(target, b"{}", *hop, "Authorization: Basic x", "X-Kept: 1").status == 200
    request = seen(bridge.upstream)
    assert request.target == "/_matrix/client/v3/a%2Fb/?x=%2F"
    assert dict(request.headers) == {
        "host": bridge.upstream.url.removeprefix("http://"),
        "x-kept": "1",
        "authorization": f"Bearer {token}",
        "content-length": "2",
    }
    assert request.body == b"{}"


def test_headers_of_the_hop_and_cookies_do_not_come_down(bridge: Bridge) -> None:
    headers = ["Connection: X-Mine", "X-Mine: 1", "Set-Cookie: a=b", "Proxy-Authenticate: x", "X-Kept: 1", "Date: x"]
    headers += [
        "Keep-Alive: timeout=5, max=1",
        "Access-Control-Allow-Origin: https://only.me",
        "Access-Control-Expose-Headers: ETag",
    ]
    bridge.upstream.always(scripted.answer({}, 200, *headers))
    with as_caller(bridge) as caller:
        answer = caller.get(ANY)
    assert set(answer.headers) == {
        *CORS,
        "access-control-expose-headers",
        "content-length",
        "content-type",
        "date",
        "keep-alive",
        "x-kept",
    }
    assert answer.headers.get_list("keep-alive") == ["timeout=75"]  # the bridge's own
    assert answer.headers.get_list("date") != ["x"]
    check_cors(answer)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_body_of_a_get_is_ignored(bridge: Bridge, method: str) -> None:
    bridge.upstream.always(scripted.answer({}))
    assert bridge.post(ANY, b"{}", method=method).status == 200
    request = seen(bridge.upstream)
    assert (request.method, request.body, request.header("content-length")) == (method, b"", "")


def test_encoded_answer_comes_as_it_is(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.raw(scripted.encoded(200, b"\x1f\x8bnot gzip at all", "Content-Encoding: gzip")))
    with caller.stream("GET", ANY) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert b"".join(answer.iter_raw()) == b"\x1f\x8bnot gzip at all"


def test_redirect_is_the_callers_to_follow(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.redirect("https://idp.example/?x"))
    answer = caller.get("/_matrix/client/v3/login/sso/redirect")
    assert (answer.status_code, answer.headers["location"]) == (302, "https://idp.example/?x")
    assert len(upstream.requests) == 1


# Who may


@pytest.mark.parametrize("token", ["%00", "%ff", "a%20b", "%C3%A4", "fb_unknown"])
def test_token_that_cannot_be_one_does_not_reach_the_homeserver(bridge: Bridge, token: str) -> None:
    answer = bridge.post(f"{ANY}?access_token={token}", b"", "Authorization: Basic x", method="GET")
    assert (answer.status, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    answer = bridge.ask(post(ANY, b"", "Authorization: Bearer \xe4", method="GET"))
    assert (answer.status, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert bridge.upstream.requests == []


def test_request_without_a_token_passes(bridge: Bridge) -> None:
    bridge.upstream.always(scripted.answer({"flows": []}))
    assert bridge.post("/_matrix/client/v3/other", b"", "Authorization: Basic x", method="GET").status == 200
    assert seen(bridge.upstream).header("authorization") == ""


@pytest.mark.parametrize("header", [f"X-API-Key: {KEY}", f"Authorization: Bearer {KEY}"])
def test_key_asks_as_the_bot(bridge: Bridge, header: str) -> None:
    bridge.upstream.always(scripted.answer({}), at=ANY)
    assert bridge.post(ANY, b"", header, "X-Other: 1", method="GET").status == 200
    (request,) = [request for request in bridge.upstream.requests if request.target == ANY]
    assert request.header("authorization") == f"Bearer {BOT_TOKEN}"
    assert not any("fb_" in value for _, value in request.headers)


def test_refused_bot_is_not_the_callers_fault(bridge: Bridge) -> None:
    bridge.upstream.always(scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised"), at=ANY)
    answer = bridge.post(ANY, b"", f"X-API-Key: {KEY}", method="GET")
    assert answer.status == 502
    assert "own account" in answer.json()["error"]


def test_refused_token_is_forgotten_and_an_interactive_step_is_not_a_refusal(bridge: Bridge) -> None:
    send = "/_matrix/client/v3/rooms/!room:upstream/send/m.room.message"
    with as_caller(bridge) as caller:

        def times_asked() -> int:
            assert (
                caller.put(f"{send}/{secrets.token_hex(4)}", json={"msgtype": "m.text", "body": "x"}).status_code == 200
            )
            return sum(request.target.endswith("/whoami") for request in bridge.upstream.requests)

        assert times_asked() == 1
        flows = scripted.answer({"flows": [], "session": "s"}, 401)
        bridge.upstream.always(flows, at="/v3/delete_devices")
        answer = caller.post("/_matrix/client/v3/delete_devices", json={})
        assert (answer.status_code, answer.json()) == (401, {"flows": [], "session": "s"})
        assert times_asked() == 1
        bridge.upstream.always(scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "x", soft_logout=True), at=ANY)
        answer = caller.get(ANY)
        assert check_error(answer, 401, "M_UNKNOWN_TOKEN")["soft_logout"] is True
        assert times_asked() == 2


DEACTIVATE = "/_matrix/client/v3/account/deactivate"  # ends tokens
ASYNC = "Prefer: respond-async"


def away(request: Request, gone: Behaviour, *wrong: str) -> Behaviour | None:
    """A homeserver that can say of no token whose it is, but of wrong ones, and does this at what ends tokens."""
    if request.target == DEACTIVATE:
        return gone
    return UNKNOWN_TOKEN if request.header("authorization") in wrong else scripted.html(503)


def deactivate(bridge: Bridge, gone: Behaviour, header: str, caplog: pytest.LogCaptureFixture) -> None:
    """Ask for it and hear nothing, or go away before; until the bridge is done with it."""

    def is_done() -> bool:
        found = lines(caplog, "request")
        return any(line["path"] == DEACTIVATE and line["status"] in (499, 502) for line in found)

    with caplog.at_level(logging.INFO), bridge.connect() as client:
        client.send(post(DEACTIVATE, b"{}", header))
        ending = time.monotonic() + PATIENCE
        while not any(request.target == DEACTIVATE for request in bridge.upstream.requests):
            assert time.monotonic() < ending
            time.sleep(0.01)
        if gone is not scripted.silence:
            assert client.answer().status == 502
        client.end()
    with caplog.at_level(logging.INFO):
        until(is_done)


GONE = pytest.mark.parametrize("gone", [scripted.silence, scripted.hang_up], ids=["caller leaves", "no answer"])


@GONE
@pytest.mark.parametrize("who", ["nobody", "wrong", "unknown"])
def test_request_of_nobody_that_would_end_tokens_ends_none(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: Behaviour, who: str
) -> None:
    """One of them, without a token, and no caller was known any more while the homeserver was away."""
    alice, other = (f"Bearer {new_token()}" for _ in range(2))
    with running(upstream, tmp_path) as bridge:
        assert bridge.post(SEND, BODY, f"Authorization: {alice}").status == 200
        upstream.script(lambda request: away(request, gone, *[other] if who == "wrong" else []))
        deactivate(bridge, gone, "Authorization: Basic x" if who == "nobody" else f"Authorization: {other}", caplog)
        for _ in range(2):
            assert bridge.post(SEND, BODY, f"Authorization: {alice}", ASYNC).status == 202


@GONE
def test_tokens_of_a_caller_who_may_have_ended_them_are_asked_for_again(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: Behaviour
) -> None:
    alice, bob = (f"Authorization: Bearer {new_token()}" for _ in range(2))
    with running(upstream, tmp_path) as bridge:
        for header in (alice, bob):
            assert bridge.post(SEND, BODY, header).status == 200
        upstream.script(lambda request: away(request, gone))
        deactivate(bridge, gone, alice, caplog)
        assert bridge.post(SEND, BODY, alice, ASYNC).status == 503
        assert bridge.post(SEND, BODY, bob, ASYNC).status == 202
        upstream.script(None)
        assert bridge.post(SEND, BODY, alice).status == 200


def test_request_that_never_reached_the_homeserver_ends_no_tokens(tmp_path: Path) -> None:
    alice = f"Authorization: Bearer {new_token()}"
    with Upstream() as upstream, running(upstream, tmp_path) as bridge:
        assert bridge.post(SEND, BODY, alice).status == 200
        upstream.refuse()
        upstream.drop()
        assert bridge.post(DEACTIVATE, b"{}", alice).status == 502
        assert bridge.post(SEND, BODY, alice, ASYNC).status == 202


# Faults


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        pytest.param(scripted.hang_up, 502, id="hangs-up"),
        pytest.param(scripted.raw(b"\0\0\0\0"), 502, id="garbage"),
        pytest.param(scripted.html(502), 502, id="a-proxys-page"),
        pytest.param(scripted.html(404), 502, id="a-web-servers-page"),
        pytest.param(scripted.answer({}, 999), 502, id="status-999"),
    ],
)
def test_fault_is_a_matrix_error(
    caller: httpx.Client, upstream: Upstream, behaviour: scripted.Behaviour, status: int
) -> None:
    upstream.always(behaviour)
    answer = caller.get(ANY)
    check_error(answer, status, "M_UNKNOWN")
    check_cors(answer)


def test_silence_is_a_matrix_error(timed: Timed, upstream: Upstream) -> None:
    upstream.always(scripted.silence)
    with as_caller(timed(answer_silence_seconds=0.2)) as caller:
        answer = caller.get(ANY)
    check_error(answer, 504, "M_UNKNOWN")
    check_cors(answer)


def test_error_of_the_homeserver_passes(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Slow", "Retry-After: 2", retry_after_ms=1_500))
    answer = caller.get(ANY)
    assert check_error(answer, 429, "M_LIMIT_EXCEEDED")["retry_after_ms"] == 1_500
    assert answer.headers["retry-after"] == "2"


def test_homeserver_that_is_away_is_a_502(tmp_path: Path) -> None:
    with Upstream() as upstream:
        upstream.refuse()
        with running(upstream, tmp_path) as bridge, as_caller(bridge) as caller:
            check_error(caller.get(ANY), 502, "M_UNKNOWN")
            upstream.listen()
            upstream.always(scripted.answer({}))
            assert caller.get(ANY).status_code == 200


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.chunked([b"x" * 1_000], complete=False), id="chunked"),
        pytest.param(
            scripted.then_close(scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nx")), id="length"
        ),
    ],
)
def test_answer_that_breaks_off_is_cut_for_the_caller_too(
    caller: httpx.Client, upstream: Upstream, caplog: pytest.LogCaptureFixture, behaviour: scripted.Behaviour
) -> None:
    upstream.always(behaviour)
    with caplog.at_level(logging.INFO), pytest.raises(httpx.RemoteProtocolError):
        caller.get(f"{ANY}?access_token=canary")
    (record,) = [record for record in caplog.records if record.getMessage() == "answer_cut"]
    assert record.__dict__["fields"] == {
        "path": ANY,
        "reason": "in the middle of an answer: the homeserver closed the connection",
    }
    assert not any(record.exc_info or record.name != "flowbridge" for record in caplog.records if record.levelno >= 30)
    upstream.always(scripted.answer({}))
    assert caller.get(ANY).status_code == 200


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge that has no connection to its homeserver yet."""
    with Upstream() as upstream, running(upstream, tmp_path) as bridge:
        yield bridge


def test_callers_departure_ends_the_long_poll_at_once(fresh: Bridge) -> None:
    fresh.upstream.always(scripted.silence, at="/sync")
    with fresh.connect() as client:
        client.send(post(SYNC, b"", method="GET"))
        fresh.upstream.wait_for_requests(1)
    fresh.upstream.wait_for_open(0)


def test_callers_departure_in_the_middle_of_an_upload_ends_it(fresh: Bridge) -> None:
    with fresh.connect() as client:
        client.send(post(UPLOAD, b"x" * 200_000, "Content-Length: 1000000"))
        fresh.upstream.wait_for_open(1)
    fresh.upstream.wait_for_open(0)
    assert fresh.upstream.requests == [], "it never became a whole one"


def test_caller_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    with (
        Upstream() as upstream,
        running(upstream, tmp_path, timing=Timing(answer_stall_seconds=0.2)) as bridge,
        bridge.connect() as client,
    ):
        upstream.always(scripted.raw(scripted.encoded(200, b"x" * 30_000_000)))
        client.send(post(ANY, b"", method="GET"))
        upstream.wait_for_requests(1)
        upstream.wait_for_open(0)
        assert client.rest(PATIENCE) is not None


def test_long_poll_may_last_longer_than_any_other_request(timed: Timed) -> None:
    bridge = timed(answer_silence_seconds=0.1)
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"next_batch": "s1"})), at="/sync")
    with bridge.connect() as client:
        client.send(post(SYNC, b"", method="GET"))
        assert not client.is_closed(0.5)
        go.set()
        assert client.answer().json() == {"next_batch": "s1"}


def test_stopping_bridge_ends_long_polls_at_once(tmp_path: Path) -> None:
    with Upstream() as upstream:
        upstream.always(scripted.silence, at="/sync")
        with running(upstream, tmp_path) as bridge:
            client = bridge.connect()
            client.send(post(SYNC, b"", method="GET"))
            upstream.wait_for_requests(1)
        with client:
            answer = client.answer()
    assert (answer.status, answer.json()["error"]) == (503, "the bridge stops")
    assert answer.headers["retry-after"] == "1"


@contextmanager
def store_of(folder: Path) -> Iterator[Connection]:
    """The store beside its bridge, as `flowbridge keys` has it."""
    database = Database(f"sqlite:///{folder}/flowbridge.db")
    database.open(shared=True)
    with database.engine.begin() as connection:
        yield connection
    database.engine.dispose()


def add_key(folder: Path) -> ApiKey:
    """KEY, for everything."""
    key = ApiKey(api_keys.new_id(), admin=True)
    with store_of(folder) as connection:
        api_keys.add(connection, key, KEY)
    return key


def revoke(folder: Path, key: ApiKey) -> None:
    with store_of(folder) as connection:
        api_keys.revoke(connection, key.id)


def test_key_that_is_revoked_ends_its_long_poll(tmp_path: Path) -> None:
    """It went on for as long as it had asked for."""
    with Upstream() as upstream, running(upstream, tmp_path, api_keys=()) as bridge, ExitStack() as stack:
        upstream.always(scripted.silence, at="/sync")
        key = add_key(tmp_path)
        by_key, by_token = (stack.enter_context(bridge.connect()) for _ in range(2))
        by_key.send(post(SYNC, b"", f"Authorization: Bearer {KEY}", method="GET"))
        by_token.send(post(SYNC, b"", method="GET"))
        until(lambda: sum("/sync" in request.target for request in upstream.requests) == 2)
        revoke(tmp_path, key)
        answer = by_key.answer()
        assert "revoked" in error_of(answer, 401, "M_UNKNOWN_TOKEN")
        assert not by_token.has_answer()


def test_key_that_is_revoked_ends_an_answer_in_its_middle(tmp_path: Path) -> None:
    with Upstream() as upstream, running(upstream, tmp_path, api_keys=()) as bridge, bridge.connect() as client:
        key = add_key(tmp_path)
        upstream.always(scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"), at=ANY)
        client.send(post(ANY, b"", f"Authorization: Bearer {KEY}", method="GET"))
        assert client.head().startswith("HTTP/1.1 200 ")
        revoke(tmp_path, key)
        assert client.rest(PATIENCE) == b"abc"


# Bodies


def test_upload_that_lasts_arrives_as_long_as_bytes_move(timed: Timed) -> None:
    bridge = timed(body_seconds=2.0)
    bridge.upstream.always(scripted.answer({"content_uri": "mxc://a/b"}))
    pause = threading.Event()
    with bridge.connect() as client:
        client.send(post(UPLOAD, b"", f"Content-Length: {10 * 100_000}"))
        for _ in range(10):
            client.send(b"x" * 100_000)
            pause.wait(0.25)
        assert client.answer().status == 200
    assert len(seen(bridge.upstream).body) == 1_000_000


def test_upload_that_drips_is_a_408(tmp_path: Path) -> None:
    with Upstream() as upstream, running(upstream, tmp_path, timing=Timing(body_seconds=0.3)) as bridge:
        with bridge.connect() as client:
            client.send(post(UPLOAD, b"x", "Content-Length: 1000000"))
            assert client.answer().status == 408
        upstream.wait_for_open(0)


@pytest.mark.parametrize("body", [b'{"a":1e400}', b'{"reason":"\\ud800"}'])
def test_json_that_makes_a_homeserver_fail_does_not_reach_it(
    caller: httpx.Client, upstream: Upstream, body: bytes
) -> None:
    check_error(caller.post("/_matrix/client/v3/other", content=body), 400, "M_NOT_JSON")
    padded = b" " * 600_000 + body
    for content in (body, iter([body[:5], body[5:]]), padded, iter([padded, b" "])):
        check_error(caller.post("/_matrix/client/v3/other", content=content), 400, "M_NOT_JSON")
    for encoding in ("identity", "gzip"):
        headers = {"Content-Encoding": encoding}
        check_error(caller.post("/_matrix/client/v3/other", content=body, headers=headers), 400, "M_NOT_JSON")
    assert [request for request in upstream.requests if "/whoami" not in request.target] == []
    upstream.always(scripted.answer({"content_uri": "mxc://a/b"}))
    assert caller.post(UPLOAD, content=body).status_code == 200
    assert seen(upstream).body == body


@pytest.mark.parametrize("is_chunked", [True, False])
def test_json_longer_than_any_homeserver_takes_is_a_413(
    caller: httpx.Client, upstream: Upstream, *, is_chunked: bool
) -> None:
    size = passthrough.MAX_JSON_BYTES + 1
    content = iter([b"x" * 1_000_000] * (size // 1_000_000 + 1)) if is_chunked else b"x" * size
    check_error(caller.post("/_matrix/client/v3/other", content=content), 413, "M_TOO_LARGE")
    assert [request for request in upstream.requests if "/whoami" not in request.target] == []


def test_long_bodies_of_one_caller_have_so_many_places_and_give_them_back(bridge: Bridge, upstream: Upstream) -> None:
    """64 of one caller, without a token, kept every other caller out."""
    upstream.script(passing({}))
    path, padding = "/_matrix/client/v3/other", b" " * 600_000
    hog = f"Authorization: Bearer {new_token()}"
    with ExitStack() as stack:
        begun = post(path, padding, hog, f"Content-Length: {len(padding) + 2}")
        clients = [stack.enter_context(bridge.connect()).send(begun) for _ in range(passthrough.MAX_LONG_OF_ONE)]
        ending = time.monotonic() + PATIENCE
        while (answer := bridge.post(path, padding + b"{}", hog)).status == 200:  # until all of them are held
            assert time.monotonic() < ending
            for at, client in enumerate(clients):
                if client.has_answer():  # this very request had the last place
                    clients[at] = stack.enter_context(bridge.connect()).send(begun)
        assert "8 of the 64 long bodies" in error_of(answer, 429, "M_LIMIT_EXCEEDED")
        assert bridge.post(path, padding + b"{}").status == 200
        for client in clients:
            assert client.send(b"{}").answer().status == 200
    for _ in range(passthrough.MAX_LONG_OF_ONE + 1):
        assert bridge.post(path, padding + b"{}", hog).status == 200
        error_of(bridge.post(path, padding + b"[1e400]", hog), 400, "M_NOT_JSON")


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("token", ["", "wrong"])
def test_long_body_without_a_good_token_is_refused(
    bridge: Bridge, upstream: Upstream, token: str, *, is_chunked: bool
) -> None:
    upstream.script(lambda request: UNKNOWN_TOKEN if request.target.endswith("/whoami") else scripted.answer({}))
    body = b"x" * (passthrough.MAX_GUEST_BYTES + 1)
    header = f"Authorization: Bearer {new_token()}" if token else "Authorization: Basic x"
    if is_chunked:
        request = post("/_matrix/client/v3/other", b"", header, "Transfer-Encoding: chunked")
        answer = bridge.ask(request + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    else:
        answer = bridge.post("/_matrix/client/v3/other", body, header)
    error_of(answer, 401, "M_UNKNOWN_TOKEN" if token else "M_MISSING_TOKEN")
    assert [request for request in upstream.requests if "/other" in request.target] == []


def test_long_body_of_another_server_passes(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.answer({}))
    body = b" " * 700_000 + b"{}"
    path = "/_matrix/federation/v1/send/1"
    assert bridge.post(path, body, "Authorization: X-Matrix origin=a", method="PUT").status == 200
    assert seen(upstream).body == body


def test_refusal_without_a_word_gets_one(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.raw(b"HTTP/1.1 415 Unsupported Media Type\r\nContent-Length: 0\r\n\r\n"))
    check_error(caller.post("/_matrix/client/v3/other", content=b"{}"), 415, "M_UNKNOWN")


def test_what_is_no_text_does_not_reach_the_homeserver(caller: httpx.Client, upstream: Upstream) -> None:
    check_error(caller.get("/_matrix/client/v1/media/download/%ff/%ff"), 400, "M_INVALID_PARAM")
    headers = {"Content-Type": b"text/html\xff"}
    check_error(caller.post(UPLOAD, content=b"x", headers=headers), 400, "M_INVALID_PARAM")  # type: ignore[arg-type]
    assert upstream.requests == []


@pytest.mark.parametrize("size", [0, 5, 500_000, 600_000, 2_000_000])
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("path", ["/_matrix/client/v3/other", UPLOAD])
def test_body_of_any_length_arrives_whole(
    caller: httpx.Client, upstream: Upstream, size: int, path: str, *, is_chunked: bool
) -> None:
    upstream.script(passing({}))
    body = secrets.token_bytes(size)
    sent = iter([body[at : at + 70_000] for at in range(0, size, 70_000)]) if is_chunked else body
    assert caller.post(path, content=sent).status_code == 200
    assert seen(upstream).body == body


DECOYS = [
    "X-Transfer-Encoding: chunked",
    "X-A: transfer-encoding: chunked",
    "Content-Type: image/png; a=transfer-encoding: chunked",
    "X-Content-Length: 3",
    "X-A: b, content-length: 3",
    "Connection: content-length, transfer-encoding",
]


@pytest.mark.parametrize("decoy", DECOYS)
@pytest.mark.parametrize(
    ("path", "size"),
    [(UPLOAD, 30), ("/_matrix/client/v3/other", 600_000), ("/media", 30)],
    ids=["upload", "long-json", "flow"],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_header_that_contains_a_framing_changes_no_body(
    bridge: Bridge, upstream: Upstream, path: str, size: int, decoy: str, *, is_chunked: bool
) -> None:
    """By `X-A: transfer-encoding: chunked` a body became two requests, the second one of the caller's choice."""
    body = secrets.token_bytes(size)
    upstream.script(lambda request: scripted.answer({"content_uri": "mxc://a/b"}) if request.method == "POST" else None)
    headers = [decoy] if decoy.startswith("Content-Type") else [decoy, "Content-Type: image/png"]
    if is_chunked:
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
        answer = bridge.ask(post(path, b"", *headers, "Transfer-Encoding: chunked") + chunks)
    else:
        answer = bridge.post(path, body, *headers)
    assert answer.status == 200
    (request,) = [request for request in upstream.requests if request.method == "POST"]
    assert request.body == body
    framing = [pair for pair in request.headers if pair[0] in ("content-length", "transfer-encoding")]
    is_streamed = path == UPLOAD and is_chunked
    assert framing == [("transfer-encoding", "chunked") if is_streamed else ("content-length", str(size))]


def test_bodies_pass_over_tls(authority: Authority, tmp_path: Path) -> None:
    certificate, context = authority("127.0.0.1")
    body = secrets.token_bytes(3_000_000)
    with Upstream(tls=context) as upstream, running(upstream, tmp_path, ca_file=certificate) as bridge:
        upstream.always(scripted.raw(scripted.encoded(200, body)))
        with as_caller(bridge) as caller:
            assert caller.post(UPLOAD, content=body).content == body
        assert seen(upstream).body == body
    with Upstream(tls=context) as upstream, running(upstream, tmp_path) as bridge, as_caller(bridge) as caller:
        assert "TLS" in check_error(caller.get(ANY), 502, "M_UNKNOWN")["error"]
        assert upstream.requests == []


# Web pages


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/_matrix/client/versions"),
        ("PUT", "/_matrix/client/v3/rooms/!room:upstream/send/m.room.message/1"),
        ("GET", "/_matrix/client/v3/rooms/nonsense/state/m.room.name"),
        ("GET", "/_matrix/no/such/path"),
        ("GET", "/.well-known/matrix/client"),
        ("GET", "/.well-known/matrix/nothing"),
        ("POST", "/.well-known/matrix/client"),
    ],
)
def test_web_page_may_read_every_answer(caller: httpx.Client, method: str, path: str) -> None:
    check_cors(caller.request(method, path, headers={"Origin": "https://app.example"}))


@pytest.mark.parametrize(
    "path", [ANY, "/_matrix/client/v3/rooms/!r/send/x/1", "/_matrix/x", "/.well-known/matrix/client"]
)
def test_preflight_is_answered_here(bridge: Bridge, path: str) -> None:
    with httpx.Client(base_url=bridge.url, trust_env=False, verify=TLS) as page:
        answer = page.options(path, headers={"Access-Control-Request-Method": "PUT", "Origin": "https://app.example"})
    assert (answer.status_code, answer.content) == (204, b"")
    check_cors(answer)
    assert bridge.upstream.requests == []


def test_flow_surface_is_not_for_web_pages(caller: httpx.Client) -> None:
    assert not any(name.startswith("access-control") for name in caller.get("/healthz").headers)


# Discovery


def test_well_known_names_the_bridge_as_the_request_does(bridge: Bridge) -> None:
    for host in ("bridge.example:8443", "[::1]:80", "localhost"):
        head = f"GET /.well-known/matrix/client HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Host: evil\r\n\r\n"
        answer = bridge.ask(head.encode())
        assert answer.json() == {"m.homeserver": {"base_url": f"http://{host}"}}
    for host in ("a b", "x/y", "<script>", ""):
        answer = bridge.ask(f"GET /.well-known/matrix/client HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.json() == {"m.homeserver": {"base_url": bridge.url}}


def test_well_known_names_the_public_url(upstream: Upstream, tmp_path: Path) -> None:
    with running(upstream, tmp_path, public_url="https://bridge.example/x") as bridge, as_caller(bridge) as caller:
        answer = caller.get("/.well-known/matrix/client")
    assert json.loads(answer.content) == {"m.homeserver": {"base_url": "https://bridge.example/x"}}
