"""Requests that come before the one ahead of them is answered: what they may take, and what ends with their caller."""

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowbridge import metrics
from flowbridge.models.timing import Timing
from flowbridge.web import pipelining
from flowbridge.web.protocol import Protocol
from tests import upstream as scripted
from tests.http.conftest import HELLO, SEND, Bridge, RawClient, Timed, post, running
from tests.patience import PATIENCE, until
from tests.processes import resident_bytes, serving

pytestmark = pytest.mark.usefixtures("way")

BODY = json.dumps(HELLO).encode()
VALIDATE = "/validate/m.room.message"
PLAIN = "Content-Type: text/plain"
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: bridge\r\n\r\n"
SYNC = b"GET /_matrix/client/v3/sync?timeout=3600000 HTTP/1.1\r\nHost: bridge\r\nAuthorization: Bearer poller\r\n\r\n"
LIVE = b"GET /live HTTP/1.1\r\nHost: bridge\r\nAuthorization: Bearer listener\r\n\r\n"
LONG = pipelining.MAX_BEHIND * 3 // 2  # more than is read behind a request; the rest fits into the system's buffer
# What a caller may have said behind a request when it hangs up.
BEHIND = {
    "nothing": b"",
    "half-a-head": b"GET /heal",
    "a-request": HEALTHZ,
    "half-a-body": post(SEND, b"{", "Content-Length: 1000"),
    "a-body-that-is-asked-for": post(SEND, b"", "Expect: 100-continue", "Content-Length: 1000"),
    "a-long-body": post(VALIDATE, b"x" * LONG, PLAIN),
    "many-requests": HEALTHZ * (LONG // len(HEALTHZ)),
}


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge whose connections are this test's, and which notices soon that a caller has hung up."""
    timing = Timing(hang_up_poll_seconds=0.1)
    with scripted.Upstream() as upstream, running(upstream, tmp_path, timing=timing) as bridge:
        yield bridge


def no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    found = [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert not found, [record.getMessage() for record in found]


def beginning(request: scripted.Request) -> scripted.Behaviour | None:
    """A homeserver where nothing has happened since a listener began."""
    if "/sync" not in request.target:
        return None
    return scripted.silence if "since=" in request.target else scripted.answer({"next_batch": "s1"})


def listeners() -> float:
    """The open live streams of all bridges in this process."""
    (line,) = re.findall(rb"^flowbridge_live_listeners (.+)$", metrics.render(), re.MULTILINE)
    return float(line)


# What they may take


def test_flood_of_pipelined_requests_takes_no_memory(upstream: scripted.Upstream, tmp_path: Path) -> None:
    """A segment holds 2,000 of them, and each answer let one more segment in: 1.3 GB in six seconds."""
    stopping = threading.Event()

    def flood(client: RawClient) -> None:
        while not stopping.is_set() and client.try_to_send(HEALTHZ * 2_000):
            pass

    with serving(cwd=tmp_path, BASE_URL=upstream.url) as (url, process), RawClient(url) as hog, RawClient(url) as other:
        assert other.send(HEALTHZ).answer().status == 200
        before = resident_bytes(process.pid)
        flooding = threading.Thread(target=flood, args=(hog,))
        flooding.start()
        try:
            for _ in range(100):  # as time goes by for the bridge
                assert other.send(HEALTHZ).answer().status == 200
            grown = resident_bytes(process.pid) - before
        finally:
            stopping.set()
            hog.end()
            flooding.join()
    assert grown < 48 * 1024 * 1024


def test_requests_behind_one_at_work_are_not_begun(bridge: Bridge, go: threading.Event, most: Counter[str]) -> None:
    """Sends among them: their order is the caller's, and what has not begun when it hangs up is not half done."""
    bridge.upstream.always(scripted.when(go, scripted.answer({"event_id": "$one"})), at="/send/")
    number = 4 * LONG // 1_000
    behind = post("/healthz", b"", f"X-Padding: {'x' * 900}", method="GET") * number + post(SEND, BODY)
    with bridge.connect() as client:
        client.send(post(SEND, BODY) + behind[:LONG])
        bridge.upstream.wait_for_events(1)
        sending = threading.Thread(target=client.send, args=(behind[LONG:],))
        sending.start()
        go.set()
        assert client.answer().json() == {"event_id": "$one"}
        assert {client.answer().status for _ in range(number)} == {200}
        assert client.answer().json() == {"event_id": "$one"}
        sending.join()
        assert client.send(HEALTHZ).answer().status == 200
    assert most["at work"] == 1


def test_long_pipelined_bodies_are_read_as_they_were_sent(bridge: Bridge, most: Counter[str]) -> None:
    """Of either framing, with what ends a head inside; more than is kept of them, so that reading pauses."""
    texts = [("\r\n\r\n", "x", "GET / HTTP/1.1\r\n\r\n", "a\n")[n % 4] * 2_000 + f"{n}." for n in range(60)]
    said = b""
    for n, text in enumerate(texts):
        body = b"t" + text.encode()
        if n % 3:
            said += post(VALIDATE, body, PLAIN) + b"\r\n" * (n % 4)  # RFC 9112 §2.2: blank lines before a request
        else:
            pieces = [body[at : at + 5_000] for at in range(0, len(body), 5_000)]
            said += post(VALIDATE, b"", PLAIN, "Transfer-Encoding: chunked")
            said += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Sum: 1\r\n\r\n"
    with bridge.connect() as client:
        sending = threading.Thread(target=client.send, args=(said,))
        sending.start()
        answers = [client.answer() for _ in texts]
        sending.join()
    assert [answer.json()["content"]["body"] for answer in answers] == [f"t{text}" for text in texts]
    assert most["at work"] == 1


@pytest.mark.parametrize("headers", [["Authorization: Basic x"], [f"Content-Length: {10**7}"]], ids=["401", "413"])
def test_requests_behind_a_body_that_nobody_reads_are_answered(
    bridge: Bridge, most: Counter[str], headers: list[str]
) -> None:
    body = b"\r\n\r\nGET / HTTP/1.1\r\n\r\n" * 1_000
    if any("Length" in header for header in headers):
        body = body.ljust(10**7)
    with bridge.connect() as client:
        sending = threading.Thread(target=client.send, args=(post(SEND, body, *headers) + HEALTHZ * 100,))
        sending.start()
        assert client.answer().status in (401, 413)
        assert [client.answer().status for _ in range(100)] == [200] * 100
        sending.join()
    assert most["at work"] == 1
    assert bridge.upstream.events == []


def test_connection_with_requests_to_read_is_no_idle_one(
    upstream: scripted.Upstream, timed: Timed, go: threading.Event
) -> None:
    """Nor does the time for an idle one run while a second request is at work."""
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$one"})), at="/send/")
    with timed(keep_alive_seconds=1).connect() as client:
        client.send(HEALTHZ + post(SEND, BODY))
        assert client.answer().status == 200
        upstream.wait_for_events(1)
        assert not client.is_closed(1.5)
        go.set()
        assert client.answer().json() == {"event_id": "$one"}
        assert client.is_closed()


def test_connection_that_takes_no_answer_is_evicted(fresh: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was closed behind the rest of its answer: it stayed, and was not counted."""
    made: list[Protocol] = []
    lost: list[Protocol] = []
    begin, end = Protocol.connection_made, Protocol.connection_lost

    def begun(self: Protocol, transport: Any) -> None:
        begin(self, transport)
        made.append(self)

    def ended(self: Protocol, exc: Exception | None) -> None:
        lost.append(self)
        end(self, exc)

    monkeypatch.setattr(Protocol, "connection_made", begun)
    monkeypatch.setattr(Protocol, "connection_lost", ended)
    with fresh.connect() as client:
        until(lambda: made)
        (hog,) = made
        asked = 0

        def are_answered() -> bool:
            return hog.server_state.total_requests == asked

        while not hog.transport.get_write_buffer_size():
            client.send(b"GET /openapi.json HTTP/1.1\r\nHost: bridge\r\n\r\n")
            asked += 1
            until(are_answered)
        hog.loop.call_soon_threadsafe(hog.evict)
        until(lambda: lost)


# What ends with their caller


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("together", [True, False], ids=["in-one-segment", "in-two"])
def test_long_poll_ends_with_its_caller_whatever_is_behind_it(
    fresh: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, behind: str, together: bool
) -> None:
    fresh.upstream.always(scripted.silence, at="/sync")
    with fresh.connect() as client:
        if together:
            client.send(SYNC + BEHIND[behind])
            fresh.upstream.wait_for_requests(1)
        else:
            client.send(SYNC)
            fresh.upstream.wait_for_requests(1)
            client.send(BEHIND[behind])
    fresh.upstream.wait_for_open(0)
    assert fresh.upstream.events == []
    no_traceback(caplog)


@pytest.mark.parametrize("behind", BEHIND)
def test_live_stream_ends_with_its_caller_whatever_is_behind_it(
    fresh: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, behind: str
) -> None:
    """It kept its place until the next keep-alive failed, with a traceback in the log."""
    fresh.upstream.script(beginning)
    before = listeners()
    with fresh.connect() as client:
        assert client.send(LIVE + BEHIND[behind]).head().startswith("HTTP/1.1 200 ")
        assert listeners() == before + 1
    until(lambda: listeners() == before)
    no_traceback(caplog)


def test_request_at_work_when_the_bridge_stops_is_the_last_one(
    upstream: scripted.Upstream, tmp_path: Path, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer says so: RFC 9112 §9.6. What is behind it was not begun, and the caller may repeat it."""
    stop = Protocol.shutdown

    def stopped(self: Protocol) -> None:
        stop(self)
        go.set()

    monkeypatch.setattr(Protocol, "shutdown", stopped)
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$one"})), at="/send/")
    with running(upstream, tmp_path) as bridge:
        client = bridge.connect()
        client.send(post(SEND, BODY) + HEALTHZ + post(SEND, BODY))
        upstream.wait_for_events(1)
    with client:
        answer = client.answer()
        assert (answer.json(), answer.headers["connection"]) == ({"event_id": "$one"}, "close")
        assert client.rest(PATIENCE) == b""
    assert len(upstream.events) == 1
