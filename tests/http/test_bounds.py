"""What a hostile or clumsy caller may cost: sizes, times, and bytes that must not reach the homeserver."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest

from flowbridge.events import size
from flowbridge.web import endpoint
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    HELLO,
    KEY,
    ROOM,
    SEND,
    Answer,
    Bridge,
    Elapsed,
    RawClient,
    Timed,
    new_token,
    post,
    running,
)
from tests.patience import PATIENCE
from tests.processes import cpu_seconds, serving

SOON = 0.3  # what the deadlines are set to, where they are meant to pass
SHORT = 1.0  # the same, where something has to come before
BODY = json.dumps(HELLO).encode()
MATRIX = "/_matrix/client/v3"


def check_error(answer: Answer, status: int, errcode: str | None = None) -> dict[str, Any]:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert isinstance(found["error"], str)
    assert errcode is None or found["errcode"] == errcode
    assert "detail" not in found
    return dict(found)


def sent(bridge: Bridge) -> list[str]:
    """The targets of what would have put something into a room."""
    return [request.target for request in bridge.upstream.events]


def message(size: int) -> bytes:
    """A message whose canonical content has this many bytes."""
    empty = len(b'{"body":"","msgtype":"m.text"}')
    return json.dumps({"body": "x" * (size - empty), "msgtype": "m.text"}).encode()


# Sizes


@pytest.mark.parametrize("target", [SEND, f"{MATRIX}{SEND}", "/validate/m.room.message"])
def test_body_over_the_limit_is_refused_before_it_is_read(bridge: Bridge, target: str) -> None:
    head = post(target, b"", f"Content-Length: {endpoint.MAX_BODY_BYTES + 1}")
    check_error(bridge.ask(head), 413, "M_TOO_LARGE")
    assert bridge.upstream.requests == []


@pytest.mark.parametrize("how", ["with-a-length", "chunked"])
def test_body_over_the_limit_is_refused_while_it_is_read(bridge: Bridge, how: str) -> None:
    body = b" " * (endpoint.MAX_BODY_BYTES + 1)
    if how == "chunked":
        pieces = [body[at : at + 60_000] for at in range(0, len(body), 60_000)]
        data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        request = post(SEND, b"", "Transfer-Encoding: chunked") + data
    else:
        request = post(SEND, body)
    check_error(bridge.ask(request), 413, "M_TOO_LARGE")
    assert bridge.upstream.requests == []


def test_body_of_the_limit_is_read(bridge: Bridge) -> None:
    body = BODY + b" " * (endpoint.MAX_BODY_BYTES - len(BODY))
    assert bridge.post(SEND, body).status == 200


@pytest.mark.parametrize("length", ["9" * 30, "99999999999999999999999"])
def test_absurd_length_is_a_4xx(bridge: Bridge, length: str) -> None:
    assert bridge.ask(post(SEND, b"", f"Content-Length: {length}")).status in (400, 413)


def test_content_over_the_limit_is_refused(bridge: Bridge) -> None:
    answer = bridge.post(SEND, message(65_000))
    check_error(answer, 413, "M_TOO_LARGE")
    limit = size.largest("m.room.message", None, ROOM, scripted.user_of(BOT_TOKEN))
    assert answer.json()["error"] == (
        f"the content is 65000 bytes of canonical JSON, and this event has room for {limit}: Matrix allows 65536 with "
        "its room, sender and signature. Send a long text as a file, or in parts"
    )
    assert bridge.upstream.events == []


def test_content_of_the_limit_is_sent(bridge: Bridge) -> None:
    limit = size.largest("m.room.message", None, ROOM, scripted.user_of(BOT_TOKEN))
    assert bridge.post(SEND, message(limit)).status == 200
    assert len(bridge.upstream.events[0].body) == limit


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "x-unknown"])
def test_compressed_body_is_refused(bridge: Bridge, coding: str) -> None:
    check_error(bridge.post(SEND, b"\x1f\x8b\x08", f"Content-Encoding: {coding}"), 415)
    assert bridge.upstream.requests == []


@pytest.mark.parametrize("shape", ["one-long-header", "many-headers", "a-long-path"])
def test_flood_of_headers_is_refused(bridge: Bridge, shape: str) -> None:
    flood = {
        "one-long-header": b"GET /healthz HTTP/1.1\r\nX-Flood: " + b"x" * 70_000,
        "many-headers": b"GET /healthz HTTP/1.1\r\n" + b"X-Flood: 1\r\n" * 6_000,
        "a-long-path": b"GET /" + b"x" * 70_000,
    }[shape]
    with bridge.connect() as client:
        client.send(flood)
        check_error(client.answer(), 431, "M_TOO_LARGE")
        assert client.is_closed()


def test_flood_of_headers_on_a_used_connection_is_refused(bridge: Bridge) -> None:
    with bridge.connect() as client:
        assert client.send(post("/healthz", method="GET")).answer().status == 200
        client.send(b"GET /healthz HTTP/1.1\r\nX-Flood: " + b"x" * 70_000)
        check_error(client.answer(), 431, "M_TOO_LARGE")


def test_large_body_and_the_next_request_together_are_no_flood_of_headers(bridge: Bridge) -> None:
    with bridge.connect() as client:
        client.send(post(SEND, message(61_000) + b" " * 300_000) + b"GET /healthz HTTP/1.1\r\n")
        assert client.answer().status == 200
        client.send(b"Host: bridge\r\n\r\n")
        assert client.answer().status == 200


# Times


def test_headers_that_do_not_come_are_a_408(timed: Timed, elapsed: Elapsed) -> None:
    bridge = timed(head_seconds=SOON)
    started = elapsed()
    with bridge.connect() as client:
        client.send(b"POST " + SEND.encode() + b" HTTP/1.1\r\nHost: bridge\r\nX-Slow: ")
        check_error(client.answer(), 408)
        assert client.is_closed()
    assert elapsed() - started > SOON * 0.9


def test_dripping_headers_are_cut_off(timed: Timed, elapsed: Elapsed) -> None:
    bridge = timed(head_seconds=SOON)
    with bridge.connect() as client:
        tick = threading.Event()
        while client.try_to_send(b"X"):
            assert elapsed() < PATIENCE
            tick.wait(0.02)


def test_connection_that_says_nothing_is_ended(timed: Timed) -> None:
    bridge = timed(head_seconds=SOON)
    with bridge.connect() as client:
        check_error(client.answer(), 408)
        assert client.is_closed()


def test_slow_headers_of_a_second_request_are_cut_off_too(timed: Timed) -> None:
    bridge = timed(head_seconds=SHORT)
    with bridge.connect() as client:
        assert client.send(post("/healthz", method="GET")).answer().status == 200
        client.send(b"GET /heal")
        check_error(client.answer(), 408)
        assert client.is_closed()


def test_slow_body_is_a_408(timed: Timed, elapsed: Elapsed) -> None:
    bridge = timed(body_seconds=SOON)
    started = elapsed()
    with bridge.connect() as client:
        client.send(post(SEND, b'{"msg', "Content-Length: 100"))
        check_error(client.answer(), 408)
    assert elapsed() - started > SOON * 0.9
    assert bridge.upstream.requests == []


def test_dripping_body_is_cut_off(timed: Timed) -> None:
    bridge = timed(body_seconds=SOON)
    answered = threading.Event()
    with bridge.connect() as client:
        client.send(post(SEND, b"", "Content-Length: 100000"))

        def drip() -> None:
            while not answered.wait(0.02) and client.try_to_send(b" "):
                pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            check_error(client.answer(), 408)
        finally:
            answered.set()
            dripping.join()


def test_body_slower_than_the_headers_may_be_is_read(timed: Timed) -> None:
    bridge = timed(head_seconds=SHORT)
    with bridge.connect() as client:
        client.send(post(SEND, BODY[:5], f"Content-Length: {len(BODY)}"))
        assert not client.is_closed(SHORT * 1.5)
        assert client.send(BODY[5:]).answer().status == 200


def test_answer_slower_than_the_headers_may_be_arrives(timed: Timed) -> None:
    bridge = timed(head_seconds=SHORT)
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
    with bridge.connect() as client:
        client.send(post(SEND, BODY))
        assert not client.is_closed(SHORT * 1.5)
        go.set()
        assert client.answer().json() == {"event_id": "$late"}


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"\r\n", id="an-empty-line-behind-the-request"),
        pytest.param(b"G", id="a-letter"),
    ],
)
def test_used_connection_is_not_held_open_by_a_few_bytes(timed: Timed, rest: bytes) -> None:
    bridge = timed(head_seconds=SHORT)
    with bridge.connect() as client:
        assert client.send(post("/healthz", method="GET")).answer().status == 200
        client.send(rest)
        said = client.rest(PATIENCE)  # uvicorn's own limit for an idle connection is 5 s
    assert said is not None, "still open"
    assert said == b"" or said.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param(["Authorization: Basic x"], 401, id="no-token"),
        pytest.param([], 413, id="too-large"),
    ],
)
def test_body_of_an_answered_request_cannot_hold_the_connection_open(
    timed: Timed, headers: list[str], status: int
) -> None:
    bridge = timed(body_seconds=SHORT, head_seconds=SHORT)
    with bridge.connect() as client:
        client.send(post(SEND, b"x", *headers, f"Content-Length: {10**9}"))
        check_error(client.answer(), status)
        client.try_to_send(b"x")  # the one byte that stops uvicorn's clock
        assert client.rest(PATIENCE) == b""


# Numbers


def healthz(client: RawClient) -> int:
    return client.send(post("/healthz", method="GET")).answer().status


def busy(stack: ExitStack, bridge: Bridge, number: int) -> list[RawClient]:
    """So many connections on which a request has begun."""
    clients = [stack.enter_context(bridge.connect()) for _ in range(number)]
    for client in clients:
        assert healthz(client) == 200
        client.send(b"GET /hea")
    return clients


MOST = 6  # connections to the next one


@pytest.fixture
def narrow_bridge(upstream: scripted.Upstream, tmp_path: Path) -> Iterator[Bridge]:
    """Few connections, of which one address may have all, as a proxy may."""
    with running(upstream, tmp_path, max_connections=MOST, trusted_proxies=(ip_network("127.0.0.1"),)) as bridge:
        yield bridge


def test_connection_too_many_is_a_503(narrow_bridge: Bridge) -> None:
    with ExitStack() as stack:
        clients = busy(stack, narrow_bridge, MOST)
        refused = stack.enter_context(narrow_bridge.connect())
        answer = refused.answer()
        check_error(answer, 503, "M_LIMIT_EXCEEDED")
        assert answer.headers["retry-after"] == "2"
        assert refused.is_closed()
        assert clients[0].send(b"lthz HTTP/1.1\r\nHost: bridge\r\n\r\n").answer().status == 200


def test_idle_connection_makes_room_for_a_new_one(narrow_bridge: Bridge) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(narrow_bridge.connect()) for _ in range(3)]
        for client in idle:
            assert healthz(client) == 200
        clients = busy(stack, narrow_bridge, MOST - 3)
        assert healthz(idle[0]) == 200  # so the second one has been idle for longest
        assert healthz(stack.enter_context(narrow_bridge.connect())) == 200
        assert idle[1].is_closed()
        assert healthz(idle[0]) == healthz(idle[2]) == 200
        for client in clients:
            assert client.send(b"lthz HTTP/1.1\r\nHost: bridge\r\n\r\n").answer().status == 200


def test_answer_that_takes_long_is_no_idle_connection(narrow_bridge: Bridge) -> None:
    go = threading.Event()
    narrow_bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
    with ExitStack() as stack:
        clients = [stack.enter_context(narrow_bridge.connect()) for _ in range(MOST)]
        for client in clients:
            client.send(post(SEND, BODY))
        narrow_bridge.upstream.wait_for_events(MOST)
        assert stack.enter_context(narrow_bridge.connect()).answer().status == 503
        go.set()
        assert [client.answer().status for client in clients] == [200] * MOST


def test_address_with_its_share_of_connections_leaves_the_others(
    upstream: scripted.Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        own_bridge = stack.enter_context(running(upstream, tmp_path, max_connections=8))
        busy(stack, own_bridge, 4)
        for _ in range(2):
            refused = stack.enter_context(own_bridge.connect())
            assert "127.0.0.1" in check_error(refused.answer(), 503, "M_LIMIT_EXCEEDED")["error"]
        other = stack.enter_context(RawClient(own_bridge.url, source="127.0.0.2"))
        assert healthz(other) == 200
    lines = [record for record in caplog.records if record.msg == "connections_refused"]
    (line,) = lines  # not one for each
    assert vars(line)["fields"]["client"] == "127.0.0.1"
    assert vars(line)["fields"]["of_client"] == 4


# Bytes that are not quite HTTP


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="ssh"),
        pytest.param(b"GET\r\n\r\n", id="no-path"),
        pytest.param(b"GET /healthz HTTP/9.9\r\n\r\n", id="http-9"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="http-2"),
        pytest.param(b"BREW /healthz HTTP/1.1\r\n\r\n", id="unknown-method"),
        pytest.param(b"GET /heal\x00thz HTTP/1.1\r\n\r\n", id="zero-in-the-path"),
        pytest.param("GET /schemas/ä HTTP/1.1\r\n\r\n".encode(), id="utf-8-in-the-path"),
        pytest.param(b"GET http://bridge HTTP/1.1\r\n\r\n", id="no-path-behind-the-host"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nNo colon\r\n\r\n", id="header-without-a-colon"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nA: \x00\r\n\r\n", id="zero-in-a-header"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nContent-Length: -1\r\n\r\n", id="negative-length"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", id="length-is-no-number"),
        pytest.param(b"CONNECT bridge:80 HTTP/1.1\r\n\r\n", id="connect"),
    ],
)
def test_what_is_not_http_is_a_400(bridge: Bridge, data: bytes) -> None:
    with bridge.connect() as client:
        answer = client.send(data).answer()
        assert answer.status in (400, 404, 405)
        check_error(answer, answer.status)
    assert bridge.ask(post("/healthz", method="GET")).status == 200
    assert bridge.upstream.requests == []


SMUGGLED = post(SEND, json.dumps({**HELLO, "body": "smuggled"}).encode(), method="PUT")
TARGET = SEND.encode()
HEAD = b"POST " + TARGET + b" HTTP/1.1\r\nHost: bridge\r\nAuthorization: Bearer smuggler\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED, id="cl-te"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED, id="te-cl"),
        pytest.param(b"Content-Length: %d\r\nContent-Length: 0\r\n\r\n%b" % (len(BODY), BODY), id="cl-cl"),
        pytest.param(b"Content-Length: %d, 0\r\n\r\n%b" % (len(BODY), BODY), id="cl-list"),
        pytest.param(b"Content-Length: +%d\r\n\r\n%b" % (len(BODY), BODY), id="cl-plus"),
        pytest.param(b"Content-Length : %d\r\n\r\n%b" % (len(BODY), BODY), id="space-before-colon"),
        pytest.param(b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED, id="te-not-last"),
        pytest.param(b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED, id="te-unknown"),
        pytest.param(b"Transfer-Encoding:\x0bchunked\r\n\r\n" + CHUNKED, id="te-vertical-tab"),
        pytest.param(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED, id="te-te"),
        pytest.param(b"X: a\r\n Content-Length: 5\r\nContent-Length: 0\r\n\r\n", id="obs-fold"),
        pytest.param(b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKED, id="obs-fold-te"),
        pytest.param(b"X: a\nContent-Length: 0\r\n\r\n", id="bare-lf"),
        pytest.param(b"X: a\rContent-Length: 0\r\n\r\n", id="bare-cr"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED.replace(b"\r\n", b"\n"), id="bare-lf-chunks"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", id="chunk-0x"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", id="chunk-negative"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n{}", id="chunk-huge"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n2;a=\n\r\n{}\r\n0\r\n\r\n", id="chunk-extension"),
    ],
)
def test_ambiguous_length_never_smuggles_a_request(bridge: Bridge, data: bytes) -> None:
    """One reading of the bytes is a request with another one in its body: that one must not be sent besides it."""
    with bridge.connect() as client:
        client.try_to_send(HEAD + data)
        client.try_to_send(SMUGGLED)
        answers = read_all(client)
    assert answers, "an answer, or what else?"
    assert all("application/json" in answer.headers["content-type"] for answer in answers)
    # Either the bytes were refused, with all that is behind them; or they are one plain request, and the next.
    if answers[0].status == 400 and answers[0].headers.get("connection") == "close":
        assert len(answers) == 1
        assert sent(bridge) == []
    else:
        assert len(answers) == 2
        assert len(sent(bridge)) == sum(answer.status == 200 for answer in answers)
        assert len([request for request in bridge.upstream.events if b"smuggled" in request.body]) <= 1


def read_all(client: RawClient) -> list[Answer]:
    """Every answer until the bridge hangs up, or until two have come."""
    answers: list[Answer] = []
    while len(answers) < 2:
        try:
            answers.append(client.answer())
        except (OSError, AssertionError):
            break
    return answers


def test_request_inside_a_body_is_a_body(bridge: Bridge) -> None:
    with bridge.connect() as client:
        assert client.send(post(SEND, SMUGGLED)).answer().status == 200  # a text, whatever it looks like
        assert client.send(post("/healthz", method="GET")).answer().status == 200
    (target,) = sent(bridge)
    assert target.startswith(f"{MATRIX}/rooms/%21room%3Aupstream/send/m.room.message/")
    assert json.loads(bridge.upstream.requests[-1].body)["body"] == SMUGGLED.decode()


def test_bytes_behind_a_request_do_not_change_its_answer(bridge: Bridge) -> None:
    """The event is on its way: whoever is told 400 would send it again."""
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$once"})), at="/send/")
    with bridge.connect() as client:
        client.send(post(SEND, BODY))
        bridge.upstream.wait_for_events(1)
        client.send(b"no request\r\n\r\n")
        assert not client.is_closed(SOON), "hung up before the answer"
        go.set()
        assert client.answer().json() == {"event_id": "$once"}


def test_slow_second_head_does_not_change_the_answer_to_the_first(timed: Timed) -> None:
    bridge = timed(head_seconds=SHORT)
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$once"})), at="/send/")
    with bridge.connect() as client:
        client.send(post(SEND, BODY) + b"GET /heal")
        bridge.upstream.wait_for_events(1)
        assert not client.is_closed(SHORT * 1.5), "hung up before the answer"
        go.set()
        assert client.answer().json() == {"event_id": "$once"}


def test_pipelined_requests_are_answered_in_order(bridge: Bridge) -> None:
    bridge.upstream.script(
        lambda request: (
            scripted.answer({"event_id": f"${request.json()['body']}"}) if "/send/" in request.target else None
        )
    )
    with bridge.connect() as client:
        bodies = [json.dumps({**HELLO, "body": str(number)}).encode() for number in range(20)]
        requests = [post(SEND, body) for body in bodies]
        requests[5] = post("/nothing", method="GET")
        requests[6] = post(SEND, b"{}")
        client.send(b"".join(requests))
        answers = [client.answer() for _ in requests]
    for number, answer in enumerate(answers):
        if number == 5:
            check_error(answer, 404)
        elif number == 6:
            check_error(answer, 400)
        else:
            assert answer.json() == {"event_id": f"${number}"}
    assert len(sent(bridge)) == 18


def test_body_that_waits_for_100_continue_is_asked_for(bridge: Bridge) -> None:
    with bridge.connect() as client:
        client.send(post(SEND, b"", "Expect: 100-continue", f"Content-Length: {len(BODY)}"))
        assert client.send(BODY).answer().status == 200


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_offer_to_upgrade_is_ignored_and_the_request_is_served(bridge: Bridge, upgrade: str) -> None:
    """Java's HTTP client offers h2c with its first request, unless it is told not to."""
    offer = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAEAAEAAAAIAAAAB"]
    with bridge.connect() as client:
        assert client.send(post(SEND, BODY, *offer)).answer().status == 200
        assert client.send(post(SEND, BODY)).answer().status == 200


def test_caller_who_hangs_up_does_no_harm(bridge: Bridge) -> None:
    with bridge.connect() as client:
        client.send(post(SEND, b"{", "Content-Length: 100"))
    assert bridge.ask(post("/healthz", method="GET")).status == 200
    assert sent(bridge) == []


# Paths

ROUTES = {
    "room": "/rooms/{}/send/m.room.message",
    "type": f"/rooms/{ROOM}/send/{{}}",
    "txnId": f"/rooms/{ROOM}/send/m.room.message/{{}}",
    "state-type": f"/rooms/{ROOM}/state/{{}}",
    "state-key": f"/rooms/{ROOM}/state/m.room.name/{{}}",
}
TRICKS = [
    "..",
    ".",
    "%2e%2e",
    "%2E",
    "%00",
    "a%00b",
    "%0d%0aX:1",
    "%0a",
    "%ff",
    "%c3%28",
    "%ed%a0%80",
    "%7f",
    "x" * 256,
]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick[:12])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_path_trick_is_a_400_and_nothing_goes_upstream(bridge: Bridge, prefix: str, route: str, trick: str) -> None:
    answer = bridge.post(prefix + ROUTES[route].format(trick), BODY, method="PUT")
    check_error(answer, 400, "M_INVALID_PARAM")
    if "state" in route:
        check_error(bridge.post(prefix + ROUTES[route].format(trick), method="GET"), 400, "M_INVALID_PARAM")
    assert bridge.upstream.requests == []


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/rooms//send/m.room.message", 400),
        ("/rooms/!/send/m.room.message", 400),
        ("/rooms/room:upstream/send/m.room.message", 400),
        ("/rooms/@alice:upstream/send/m.room.message", 400),
        ("/rooms/!a%2Fb/send/m.room.message", 400),
        ("/rooms/!a%2F..%2F..%2Fadmin/send/m.room.message", 400),
        ("/rooms/%23alias/send/m.room.message", 400),
        ("/rooms/%23:upstream/send/m.room.message", 400),
        (f"/rooms/{ROOM}/send/", 400),
        (f"/rooms/{ROOM}/send/m%2Froom", 400),
        (f"/rooms/{ROOM}/../../admin", 404),
        ("/../../etc/passwd", 404),
        ("/schemas/..%2F..%2Fpyproject", 404),
        ("/schemas/components/..%2Fm.room.name", 404),
        ("/docs/..%2F__init__.py", 404),
        ("/docs/%2e%2e%2f__init__.py", 404),
    ],
)
def test_malformed_path_is_a_4xx_and_nothing_goes_upstream(bridge: Bridge, target: str, status: int) -> None:
    method = "POST" if target.startswith("/rooms") else "GET"
    check_error(bridge.post(target, BODY if method == "POST" else b"", method=method), status)
    assert bridge.upstream.requests == []


SEGMENTS = {
    "ab%2Fcd": "ab%2Fcd",
    "ab%252Fcd": "ab%252Fcd",
    "a%3Fb%23c": "a%3Fb%23c",
    "a%20b": "a%20b",
    "a+b": "a%2Bb",
    "$1:b": "%241%3Ab",
    "%C3%A4": "%C3%A4",
    "..%2F..%2Fx": "..%2F..%2Fx",
    "100%": "100%25",
}


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("room", [ROOM, quote(ROOM, safe="")], ids=["raw-room", "encoded-room"])
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_segment_arrives_upstream_as_it_was_meant(bridge: Bridge, prefix: str, room: str, segment: str) -> None:
    target = f"{prefix}/rooms/{room}/state/org.example.reading/{segment}"
    assert bridge.post(target, BODY, method="PUT").status == 200
    arrives = SEGMENTS[segment]
    assert sent(bridge) == [f"{MATRIX}/rooms/%21room%3Aupstream/state/org.example.reading/{arrives}"]


@pytest.mark.parametrize("slashes", ["//", "///"])
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_path_after_a_base_url_that_ends_with_a_slash_is_read_as_meant(
    bridge: Bridge, prefix: str, slashes: str
) -> None:
    target = f"{prefix}{SEND}/{slashes.count('/')}".replace("/", slashes, 1)
    assert bridge.post(target, BODY, method="PUT").status == 200
    assert len(sent(bridge)) == 1
    bridge.post(f"{slashes[1:]}{MATRIX}/pushers/set", b"{}")
    assert bridge.upstream.requests[-1].target == f"{MATRIX}/pushers/set"


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_slash_behind_the_event_type_is_no_transaction_id(bridge: Bridge, method: str) -> None:
    answers = [bridge.post(f"{SEND}/", BODY, method=method) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert len(sent(bridge)) == 2


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_transaction_id_is_known_again_however_it_is_encoded(bridge: Bridge, prefix: str, segment: str) -> None:
    """It says what is the same event to the bridge, and stays there: homeservers differ in what they make of it."""
    token = f"Authorization: Bearer {new_token()}"
    encoded = "".join(f"%{byte:02x}" for byte in unquote_to_bytes(segment))
    answers = [bridge.post(f"{prefix}{SEND}/{name}", BODY, token, method="PUT") for name in (segment, encoded, segment)]
    assert [answer.status for answer in answers] == [200] * 3
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, True, True]
    (target,) = sent(bridge)
    assert not target.endswith(f"/{SEGMENTS[segment]}")
    assert bridge.post(f"{prefix}{SEND}/{encoded}x", BODY, token, method="PUT").status == 200
    assert len(sent(bridge)) == 2


def test_raw_and_encoded_alias_are_joined_once(bridge: Bridge) -> None:
    for alias in ("%23alias:upstream", "%23alias%3Aupstream"):
        assert bridge.post(f"/rooms/{alias}/send/m.room.message", BODY, "Authorization: Bearer joiner").status == 200
    join, *sends = sent(bridge)
    assert join == f"{MATRIX}/join/%23alias%3Aupstream"
    assert len(sends) == 2
    assert all(send.startswith(f"{MATRIX}/rooms/%21joined%3Aupstream/send/m.room.message/") for send in sends)


def test_state_key_arrives_encoded(bridge: Bridge) -> None:
    user = "@bob:upstream"
    body = json.dumps({"membership": "invite"}).encode()
    assert bridge.post(f"/rooms/{ROOM}/state/m.room.member/{user}", body, method="PUT").status == 200
    assert sent(bridge) == [f"/_matrix/client/v3/rooms/%21room%3Aupstream/state/m.room.member/{quote(user, safe='')}"]


# Tokens


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer tök",
        "Authorization: Bearer %00 x",
        "Authorization: Bearer a b",
        "Authorization: Bearer a\tb",
        f"Authorization: Bearer {'x' * 4_097}",
        "Authorization: Bearer \xff",
        "X-API-Key: \xff\xfe",
        "X-API-Key: fb_tök",
        "Authorization: Bearer fb_\xff",
    ],
)
def test_token_that_cannot_be_one_is_a_401_and_nothing_goes_upstream(bridge: Bridge, header: str) -> None:
    check_error(bridge.post(SEND, BODY, header), 401, "M_UNKNOWN_TOKEN")
    check_error(bridge.post(f"/rooms/{ROOM}/state/m.room.name", b"", header, method="GET"), 401, "M_UNKNOWN_TOKEN")
    assert bridge.upstream.requests == []


@pytest.mark.parametrize("token", ["%00", "%ff", "a%20b", "%0d%0aX-Injected:1", "t%C3%B6k", "%ed%a0%80", "fb_%ff"])
def test_token_in_the_query_that_cannot_be_one_is_a_401(bridge: Bridge, token: str) -> None:
    check_error(bridge.post(f"{SEND}?access_token={token}", BODY, "Authorization: Basic x"), 401, "M_UNKNOWN_TOKEN")
    assert bridge.upstream.requests == []


# Content

BAD_CONTENT = {
    "NaN": (b'{"msgtype":"m.text","body":"x","n":NaN}', ["/n"]),
    "Infinity": (b'{"msgtype":"m.text","body":"x","n":[-Infinity]}', ["/n/0"]),
    "1e400": (b'{"msgtype":"m.text","body":"x","n":1e400}', ["/n"]),
    "float": (b'{"msgtype":"m.text","body":"x","n":{"a/b":1.5}}', ["/n/a~1b"]),
    "2^60": (b'{"msgtype":"m.text","body":"x","n":1152921504606846976}', ["/n"]),
    "2^53": (b'{"msgtype":"m.text","body":"x","n":9007199254740992}', ["/n"]),
    "-2^53": (b'{"msgtype":"m.text","body":"x","n":-9007199254740992}', ["/n"]),
    "many digits": (b'{"msgtype":"m.text","body":"x","n":' + b"9" * 100_000 + b"}", ["/n"]),
    "surrogate": (b'{"msgtype":"m.text","body":"\\ud800"}', ["/body"]),
    "surrogate in a key": (b'{"msgtype":"m.text","body":"x","\\uDC00":1}', ["/?"]),
    "reversed pair": (b'{"msgtype":"m.text","body":"\\udc00\\ud800"}', ["/body"]),
    "duplicate": (b'{"msgtype":"m.text","body":"x","body":"y"}', ["/body"]),
    "duplicate by escape": (b'{"msgtype":"m.text","body":"x","b\\u006fdy":"y"}', ["/body"]),
    "deep duplicate": (b'{"msgtype":"m.text","body":"x","a":[{"b":1,"b":2}]}', ["/a/0/b"]),
    "depth": (b'{"msgtype":"m.text","body":"x","a":' + b"[" * 100 + b"]" * 100 + b"}", [""]),
    "depth bomb": (b"[" * 500_000, [""]),
    "object bomb": (b'{"a":' * 100_000, [""]),
    "several": (b'{"msgtype":"m.text","body":"x","a":1.5,"b":NaN,"c":2e9}', ["/a", "/b", "/c"]),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
@pytest.mark.parametrize("target", [SEND, f"{MATRIX}{SEND}", "/validate/m.room.message"], ids=["flow", "matrix", "try"])
def test_bad_content_is_a_400_that_points_at_it(bridge: Bridge, target: str, name: str, worked: Elapsed) -> None:
    body, pointers = BAD_CONTENT[name]
    found = check_error(bridge.post(target, body), 400, "M_BAD_JSON")
    assert [problem["pointer"] for problem in found["flowbridge"]["problems"]] == pointers
    assert worked() < 1
    assert bridge.upstream.requests == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'"' + b"x" * 500_000, id="string-without-an-end"),
        pytest.param(b'{"a":"' + b"\\" * 500_000, id="backslashes"),
        pytest.param(b'"\\u' * 100_000, id="half-escapes"),
        pytest.param(b"{" + b'"a":1,' * 70_000, id="object-without-an-end"),
        pytest.param(b'{"msgtype":"m.text","body":"x","a":[' + b"1.5," * 120_000 + b"1]}", id="many-floats"),
        pytest.param(b'{"msgtype":"m.text","body":"x","a":[' + b"{}," * 20_000 + b"{}]}", id="many-objects"),
        pytest.param(b'{"a":1,' * 60 + b'"a":1' + b"}" * 60, id="nested-garbage"),
        pytest.param(json.dumps({"msgtype": "m.text", "body": "x", "a": ["\x00"] * 80_000}).encode(), id="zeros"),
        pytest.param(
            b'{"msgtype":"m.text","body":"x","m.mentions":{"user_ids":[' + b'"@a:b",' * 7_000 + b'"@a:b"]}}',
            id="unique",
        ),
    ],
)
def test_expensive_body_is_answered_within_a_second(bridge: Bridge, body: bytes, worked: Elapsed) -> None:
    """Of a caller that is known: others have 15 % of the processor together, and may wait for the tests before."""
    token = f"Authorization: Bearer {new_token()}"
    assert bridge.post("/whoami", b"", token, method="GET").status == 200
    before = worked()
    answer = bridge.post(SEND, body, token)
    assert answer.status in (200, 400, 413)
    assert worked() - before < 1
    assert len(sent(bridge)) == (answer.status == 200)


def test_many_hostile_bodies_do_not_stop_healthz(upstream: scripted.Upstream, tmp_path: Path) -> None:
    """In a process of its own, so that the callers' work does not count: by the processor time that goes by until its
    answer, since the clock tells how busy the machine is."""
    bodies = [
        b"[" * 500_000,
        b'{"a":"' + b"\\" * 500_000,
        b'{"msgtype":"m.text","body":"x","a":[' + b"1.5," * 120_000 + b"1]}",
        b'{"msgtype":"m.text","body":"x","a":[' + b"[]," * 150_000 + b"1]}",
        b'{"msgtype":"m.text","body":"' + b"\\u00e4" * 80_000 + b'"}',
    ]
    slowest = 0.0
    with serving(cwd=tmp_path, BASE_URL=upstream.url) as (url, process), ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(50))
        watcher = stack.enter_context(RawClient(url))
        clients = [stack.enter_context(RawClient(url)) for _ in range(50)]
        tokens = [f"Authorization: Bearer {new_token()}" for _ in clients]
        for client, token in zip(clients, tokens, strict=True):  # what is not known has 15 % of the processor together
            assert client.send(post("/whoami", b"", token, method="GET")).answer().status == 200
        requests = [post(SEND, bodies[number % len(bodies)], token) for number, token in enumerate(tokens)]
        sending = [
            threading.Thread(target=client.try_to_send, args=(request,))
            for client, request in zip(clients, requests, strict=True)
        ]
        for thread in sending:
            thread.start()
        answers = [pool.submit(client.answer) for client in clients]
        while not all(answer.done() for answer in answers):
            asked = cpu_seconds(process.pid)
            assert watcher.send(post("/healthz", method="GET")).answer().status == 200
            slowest = max(slowest, cpu_seconds(process.pid) - asked)
        for thread in sending:
            thread.join()
        assert {answer.result().status for answer in answers} <= {400, 413}
    assert slowest < 0.5
    assert upstream.events == []


@pytest.mark.parametrize("blanks", [" ", "\t", "  \t "])
@pytest.mark.parametrize(
    "header",
    [f"X-API-Key: {KEY}", f"Authorization: Bearer {KEY}", "Content-Encoding: identity"],
)
def test_blanks_at_the_end_of_a_header_do_not_count(bridge: Bridge, header: str, blanks: str) -> None:
    """RFC 9110 §5.5."""
    answer = bridge.post(SEND, BODY, header + blanks)
    assert answer.status == 200, answer


def test_blanks_at_the_end_of_a_key_or_preference_do_not_count(bridge: Bridge) -> None:
    token = f"Authorization: Bearer {new_token()}"
    answers = [bridge.post(SEND, BODY, f"Idempotency-Key: one{blanks}", token) for blanks in ("", " ", "\t")]
    assert [answer.status for answer in answers] == [200] * 3
    assert len(sent(bridge)) == 1
    answer = bridge.post(SEND, BODY, "Prefer: respond-async ", token)
    assert (answer.status, answer.headers["preference-applied"]) == (202, "respond-async")
    body = b"just text"
    assert bridge.post("/validate/m.room.message", body, "Content-Type: text/plain \t").status == 200
