"""What becomes of requests that are under way when the bridge is told to stop, and of answers without a body."""

import json
import threading
from pathlib import Path

import pytest

from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Bridge, RawClient, post, running
from tests.upstream import PATIENCE, Upstream

BODY = json.dumps(HELLO).encode()


def no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        pytest.param(SEND, 503, id="send"),
        pytest.param("/validate/m.room.message", 503, id="validate"),
        pytest.param("/media?filename=a", None, id="media"),
        pytest.param("/_matrix/media/v3/upload", None, id="streamed"),
        pytest.param("/_matrix/client/v3/user_directory/search", None, id="passed-on"),
    ],
)
def test_upload_that_does_not_end_is_told_that_the_bridge_stops(
    upstream: Upstream,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    target: str,
    status: int | None,
) -> None:
    with running(upstream, tmp_path, timing=Timing(stop_seconds=1)) as bridge:
        client = RawClient(bridge.url)
        client.send(
            post(target, BODY, f"X-API-Key: {KEY}", f"Content-Length: {len(BODY) + 100}", "Expect: 100-continue")
        )
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    with client:
        if status is None:
            said = client.rest(PATIENCE)
            assert said is not None
            assert said == b"" or said.startswith(b"HTTP/1.1 503 ")
        else:
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert answer.headers["retry-after"]
    assert upstream.events == []
    no_traceback(caplog)


def test_download_that_does_not_end_is_cut_without_a_traceback(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stall = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nthe beginning"

    def behave(connection: scripted.Connection) -> None:
        connection.send(head)
        assert stall.wait(PATIENCE)

    upstream.always(behave, at="/download/")
    try:
        with running(upstream, tmp_path, timing=Timing(stop_seconds=1)) as bridge:
            client = RawClient(bridge.url)
            client.send(post("/media/upstream/1", b"", f"X-API-Key: {KEY}", "Authorization: Basic x", method="GET"))
            assert b"HTTP/1.1 200 " in client.read_until(b"the beginning")
        with client:
            assert client.is_closed()
    finally:
        stall.set()
    no_traceback(caplog)


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize(
    "target", ["/_matrix/client/v3/sync", "/_matrix/client/v1/media/download/upstream/1", "/media/upstream/1"]
)
def test_answer_without_a_body_that_names_a_length_is_passed_on(
    bridge: Bridge, caplog: pytest.LogCaptureFixture, target: str, status: int
) -> None:
    """RFC 9110 §8.6: a 304 may say how long the body would have been."""
    nothing = b'HTTP/1.1 %d Nothing\r\nETag: "1"\r\nContent-Length: 5\r\n\r\n' % status
    bridge.upstream.script(lambda request: None if "/whoami" in request.target else scripted.raw(nothing))
    with bridge.connect() as client:
        for _ in range(2):
            client.send(post(target, b"", 'If-None-Match: "1"', method="GET"))
            head = client.read_until(b"\r\n\r\n").lower()
            assert head.startswith(b"http/1.1 %d " % status)
            assert b'etag: "1"' in head
            assert b"content-length" not in head
    no_traceback(caplog)
