"""Offers to upgrade a connection, and where a request ends: no byte of a body is changed, lost or taken for a request.

llhttp stops behind a head that offers to upgrade (Java's HTTP client offers h2c with its first request).
"""

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flowbridge.web.protocol import Protocol
from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Answer, Bridge, post
from tests.upstream import PATIENCE

# Each line of it has been taken for a header, or for the end of one.
TRICKY = (
    b"5 packages to\nupgrade: now\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    b"POST /validate/m.room.message HTTP/1.1\r\n\r\nthe end"
)
TEXT = TRICKY.decode()
MESSAGE = json.dumps({**HELLO, "body": TEXT, "a\nupgrade: b": "\r\nupgrade: c"}).encode()
OFFERS = {
    "none": [],
    "h2c": ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB"],
    "keep-alive": ["connection: keep-alive, Upgrade, HTTP2-Settings", "upgrade: h2c", "HTTP2-Settings: "],
    "websocket": ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"],
    "several": ["Upgrade: h2c", "Upgrade: websocket, TLS/1.0", "Connection: x", "Connection: upgrade", "Upgrade:"],
    "proxy": ["Proxy-Connection: Upgrade", "Upgrade: foo/2"],
}
VALIDATE = "/validate/m.room.message"
PLAIN = "Content-Type: text/plain"
MEDIA = "/_matrix/media/v3/upload"
SEARCH = "/_matrix/client/v3/user_directory/search"
TOKEN = "Authorization: Bearer upgrader"
STORED = scripted.answer({"content_uri": "mxc://upstream/1", "results": []})
Check = Callable[[Bridge, Answer], None]


def stores(request: scripted.Request) -> scripted.Behaviour | None:
    """Takes files, and whatever else is posted."""
    return STORED if request.method == "POST" else None


def validated(_: Bridge, answer: Answer) -> None:
    assert answer.status == 200, answer
    assert answer.json()["content"]["body"] == TEXT


def sent(bridge: Bridge, answer: Answer) -> None:
    assert answer.status == 200, answer
    (event,) = bridge.upstream.events
    assert event.json() == json.loads(MESSAGE)
    forget(bridge)


def arrived(body: bytes) -> Check:
    def check(bridge: Bridge, answer: Answer) -> None:
        assert answer.status == 200, answer
        (request,) = bridge.upstream.events
        assert request.body == body
        assert not {"upgrade", "connection"} & dict(request.headers).keys()
        forget(bridge)

    return check


def forget(bridge: Bridge) -> None:
    """The upstream's requests so far; what it answers stays."""
    bridge.upstream.reset()
    bridge.upstream.script(stores)


READERS: dict[str, tuple[str, bytes, list[str], Check]] = {
    "validate": (VALIDATE, TRICKY, [PLAIN], validated),
    "send": (SEND, MESSAGE, [TOKEN], sent),
    "media": ("/media?filename=a.txt", TRICKY, [TOKEN, PLAIN], arrived(TRICKY)),
    "streamed": (MEDIA, TRICKY, [TOKEN, PLAIN], arrived(TRICKY)),
    "passed-on": (SEARCH, MESSAGE, [TOKEN], arrived(MESSAGE)),
}


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets in what a connection says at which a TCP segment ends for the bridge."""
    ends: list[int] = []
    whole = Protocol.data_received

    def in_pieces(self: Any, data: bytes) -> None:
        began = getattr(self, "_said", 0)
        self._said = began + len(data)
        inside = [end - began for end in ends if began < end < self._said]
        for start, end in zip([0, *inside], [*inside, len(data)], strict=True):
            if not self.transport.is_closing():
                whole(self, data[start:end])

    monkeypatch.setattr(Protocol, "data_received", in_pieces)
    return ends


@pytest.fixture(autouse=True)
def _taken(upstream: scripted.Upstream) -> None:
    upstream.script(stores)


def ask(bridge: Bridge, reader: str, offer: str, segments: list[int], ends: list[int], *extra: str) -> None:
    target, body, headers, check = READERS[reader]
    segments[:] = ends
    with bridge.connect() as client:
        client.send(post(target, body, *headers, *OFFERS[offer], *extra))
        check(bridge, client.answer())
        assert client.send(post("/healthz", method="GET")).answer().status == 200


def head_of(reader: str, offer: str) -> int:
    target, body, headers, _ = READERS[reader]
    return len(post(target, body, *headers, *OFFERS[offer])) - len(body)


def test_body_behind_a_segment_that_ends_in_the_blank_line_is_not_touched(bridge: Bridge) -> None:
    """The smallest input of issue 11: each `\\nupgrade:` of the body grew by two bytes."""
    body = b"5 packages to\nupgrade: now\nthe end"
    request = post(VALIDATE, body, PLAIN)
    at = len(request) - len(body) - 2
    with bridge.connect() as client:
        client.send(request[:at])
        assert not client.is_closed(0.1)  # both segments together would be no test, and no failure
        answer = client.send(request[at:]).answer()
        assert answer.json()["content"]["body"] == body.decode()
        assert client.send(post("/healthz", method="GET")).answer().status == 200


@pytest.mark.parametrize("offer", ["none", "h2c"])
@pytest.mark.parametrize("reader", READERS)
def test_request_split_at_any_byte_is_read_as_a_whole(
    bridge: Bridge, reader: str, offer: str, segments: list[int]
) -> None:
    target, body, headers, _ = READERS[reader]
    for end in range(1, len(post(target, body, *headers, *OFFERS[offer]))):
        ask(bridge, reader, offer, segments, [end])


@pytest.mark.parametrize("offer", OFFERS)
def test_request_split_twice_around_the_blank_line_is_read_as_a_whole(
    bridge: Bridge, offer: str, segments: list[int]
) -> None:
    blank = head_of("validate", offer)
    near = range(blank - 6, blank + 16)
    for first in near:
        for second in range(first + 1, near.stop):
            ask(bridge, "validate", offer, segments, [first, second])


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("reader", READERS)
def test_request_that_comes_byte_by_byte_is_read_as_a_whole(
    bridge: Bridge, reader: str, offer: str, segments: list[int]
) -> None:
    ask(bridge, reader, offer, segments, list(range(2_000)))


@pytest.mark.parametrize("offers", [("h2c", "none"), ("none", "h2c"), ("several", "websocket"), ("h2c", "h2c")])
def test_pipelined_requests_split_at_any_byte_are_answered_one_by_one(
    bridge: Bridge, offers: tuple[str, str], segments: list[int]
) -> None:
    requests = [post(VALIDATE, TRICKY + b"%d" % n, PLAIN, *OFFERS[offer]) for n, offer in enumerate(offers)]
    last = post("/healthz", method="GET")
    data = b"".join([*requests, last])
    for end in range(1, len(data)):
        segments[:] = [end]
        with bridge.connect() as client:
            client.send(data)
            for n in range(len(requests)):
                assert client.answer().json()["content"]["body"] == f"{TEXT}{n}"
            assert client.answer().json()["status"] == "ok"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_offer_without_a_body_is_an_ordinary_request(bridge: Bridge, method: str, offer: str) -> None:
    with bridge.connect() as client:
        for _ in range(3):
            client.send(f"{method} /healthz HTTP/1.1\r\nHost: bridge\r\n".encode())
            client.send("".join(f"{line}\r\n" for line in OFFERS[offer]).encode() + b"\r\n")
            assert client.answer().status == (200 if method == "GET" else 405)


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunk", [1, 7, 1_000])
def test_chunked_body_with_trailers_is_read(bridge: Bridge, chunk: int, offer: str, segments: list[int]) -> None:
    pieces = [TRICKY[at : at + chunk] for at in range(0, len(TRICKY), chunk)]
    body = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    body += b"0\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nX-Sum: 1\r\n\r\n"
    request = post(VALIDATE, b"", PLAIN, "Transfer-Encoding: chunked", *OFFERS[offer]) + body
    for end in (0, *range(len(request) - 60, len(request))):
        segments[:] = [end]
        with bridge.connect() as client:
            validated(bridge, client.send(request).answer())
            assert client.send(post("/healthz", method="GET")).answer().status == 200


@pytest.mark.parametrize("trailer", [f"X-API-Key: {KEY}", "Authorization: Bearer trailing", "Content-Encoding: gzip"])
def test_trailer_is_no_header(bridge: Bridge, trailer: str) -> None:
    """RFC 9110 §6.5.1: a proxy in front has looked at the headers alone."""
    body = b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(MESSAGE), MESSAGE, trailer.encode())
    request = post(SEND, b"", "Transfer-Encoding: chunked", "Authorization: Basic x")
    answer = bridge.ask(request + body)
    assert (answer.status, answer.json()["errcode"]) == (401, "M_MISSING_TOKEN")
    request = post(SEND, b"", "Transfer-Encoding: chunked", TOKEN)
    sent(bridge, bridge.ask(request + body))


@pytest.mark.parametrize(
    "flood", [b"0\r\nX-Flood: " + b"x" * 300_000, b"0\r\n" + b"X: 1\r\n" * 50_000, b"1;" + b"x" * 300_000]
)
def test_flood_of_trailers_is_cut_off(bridge: Bridge, flood: bytes) -> None:
    """They would be kept in memory, whatever their size: nothing counted them."""
    with bridge.connect() as client:
        client.send(post(VALIDATE, b"", "Transfer-Encoding: chunked"))
        client.try_to_send(flood)
        assert client.answer().status == 431
        assert client.rest(PATIENCE) == b""


@pytest.mark.parametrize("offer", OFFERS)
def test_http_1_0_is_answered_and_hung_up_on(bridge: Bridge, offer: str) -> None:
    request = post(VALIDATE, TRICKY, PLAIN, "Expect: 100-continue", *OFFERS[offer]).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with bridge.connect() as client:
        said = client.send(request).rest(PATIENCE)
    assert said is not None
    assert said.startswith(b"HTTP/1.1 200 "), said  # no 100: RFC 9110 §10.1.1
    assert json.loads(said.partition(b"\r\n\r\n")[2])["content"]["body"] == TEXT


@pytest.mark.parametrize("offer", OFFERS)
def test_body_behind_an_offer_is_asked_for(bridge: Bridge, offer: str) -> None:
    request = post(VALIDATE, b"", PLAIN, "Expect: 100-continue", *OFFERS[offer], f"Content-Length: {len(TRICKY)}")
    with bridge.connect() as client:
        client.send(request)
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        validated(bridge, client.send(TRICKY).answer())
        assert client.send(post("/healthz", method="GET")).answer().status == 200


@pytest.mark.parametrize("offer", ["none", "h2c"])
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Content-Length: 4\r\nContent-Length: 0",
        b"Content-Length: 4, 4",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity",
    ],
)
def test_ambiguous_length_behind_an_offer_is_refused(bridge: Bridge, framing: bytes, offer: str) -> None:
    head = f"POST {SEND} HTTP/1.1\r\nHost: bridge\r\n{TOKEN}\r\n".encode()
    head += "".join(f"{line}\r\n" for line in OFFERS[offer]).encode()
    with bridge.connect() as client:
        client.send(head + framing + b"\r\n\r\n" + b"0\r\n\r\n" + post(SEND, MESSAGE))
        said = client.rest(PATIENCE)
    assert said is not None
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"content-length: ") == 1
    assert bridge.upstream.events == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"CONNECT bridge:80 HTTP/1.1\r\nHost: bridge\r\n\r\n", id="connect"),
        pytest.param(b"CONNECT bridge HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", id="connect-with-a-body"),
        pytest.param(b"CONNECT /healthz HTTP/1.1\r\n\r\n", id="connect-to-a-path"),
        pytest.param(b"GET http://bridge HTTP/1.1\r\n\r\n", id="no-path"),
    ],
)
@pytest.mark.parametrize("used", [False, True], ids=["first", "second"])
def test_request_for_a_proxy_is_refused_without_a_traceback(
    bridge: Bridge, caplog: pytest.LogCaptureFixture, data: bytes, used: bool
) -> None:
    with bridge.connect() as client:
        if used:
            client.send(post("/healthz", method="GET")).answer()
        answer = client.send(data + b"more").answer()
        assert answer.status == 400
        assert answer.json()["errcode"] in ("M_UNKNOWN", "M_UNRECOGNIZED")
        assert client.is_closed()
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_garbage_behind_two_pipelined_requests_changes_neither_answer(bridge: Bridge) -> None:
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$once"})), at="/send/")
    with bridge.connect() as client:
        client.send(post(SEND, MESSAGE) + post(VALIDATE, TRICKY, PLAIN) + b"garbage\r\n\r\n")
        bridge.upstream.wait_for_events(1)
        assert not client.is_closed(0.2), "hung up before the answer"
        go.set()
        assert client.answer().json() == {"event_id": "$once"}
        validated(bridge, client.answer())
        assert client.answer().status == 400
        assert client.is_closed()


def test_broken_body_of_a_second_request_does_not_answer_the_first(bridge: Bridge) -> None:
    """It was a 400, for an event that is in its room: the caller would send it again."""
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$once"})), at="/send/")
    with bridge.connect() as client:
        client.send(post(SEND, MESSAGE) + post(VALIDATE, b"", "Transfer-Encoding: chunked") + b"no chunk\r\n")
        bridge.upstream.wait_for_events(1)
        go.set()
        assert client.answer().json() == {"event_id": "$once"}
        assert client.answer().status == 400
        assert client.is_closed()
