"""What is told to a client whose bytes are no request: an address that is not encoded, and TLS."""

import logging
import ssl
from pathlib import Path

import httpx
import pytest

from tests.http.conftest import ROOM, Bridge, RawClient, running
from tests.upstream import Upstream

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
SPEAKS_HTTP = (
    "this port speaks http://, and the client https://: use http://, or put a proxy with TLS before flowbridge"
)
NONE = "this is not an HTTP/1.1 request"


def told(bridge: Bridge, data: bytes) -> str:
    with RawClient(bridge.url) as client:
        answer = client.send(data).answer()
        assert (answer.status, answer.json()["errcode"]) == (400, "M_UNKNOWN")
        assert answer.headers["connection"] == "close"
        return str(answer.json()["error"])


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "target", ["/whoami?q=%s", "/rooms/#%s:hs/send/m.room.message", "/_matrix/x/%s", "http://hs/%s"]
)
@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("\u00fc".encode(), "percent-encode the address: \u00fc in it is written %C3%BC"),
        ("\u65e5\u672c".encode(), "percent-encode the address: \u65e5\u672c in it is written %E6%97%A5%E6%9C%AC"),
        ("\U0001f600".encode(), "percent-encode the address: \U0001f600 in it is written %F0%9F%98%80"),
        (b"\xfc", "percent-encode the address, as UTF-8: \u00e9 is written %C3%A9"),
        ("\u202e".encode(), "percent-encode the address: a control character in it is written %E2%80%AE"),
        (b"a b", "percent-encode the address: a space in it is written %20"),
        (b"a\x01b", "percent-encode the address: a control character in it is written %01"),
    ],
)
def test_address_that_is_not_encoded_says_how_it_is_written(
    bridge: Bridge, method: str, target: str, raw: bytes, says: str
) -> None:
    line = f"{method} ".encode() + target.encode() % raw + b" HTTP/1.1\r\nHost: bridge\r\n\r\n"
    assert told(bridge, line) == says


def test_long_raw_address_is_shown_in_part(bridge: Bridge) -> None:
    said = told(bridge, b"GET /whoami?q=" + "\u65e5".encode() * 9_000 + b" HTTP/1.1\r\n\r\n")
    assert said == "percent-encode the address: " + "\u65e5" * 8 + " in it is written " + "%E6%97%A5" * 8


def test_only_what_is_sent_encoded_is_the_same_address(bridge: Bridge) -> None:
    """What is told works: the same address, encoded, reaches its endpoint."""
    path = f"/rooms/{ROOM}/state/org.example.t%C3%BCr"
    answer = httpx.get(f"{bridge.url}{path}", trust_env=False)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"hello my friend\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2 \xfc\r\n",
        b"GET /whoami HTTP/1.1\r\nA\xfc: b\r\n\r\n",
        b"GET /whoami HTTP/1.1\r\nX: \xfc\r\nB ad: 1\r\n\r\n",
        b"\x80\x2e\x01\x00\x02",
    ],
)
def test_other_bytes_are_no_request(bridge: Bridge, data: bytes) -> None:
    assert told(bridge, data) == NONE


def test_second_request_of_a_connection_is_told_it_too(bridge: Bridge) -> None:
    with RawClient(bridge.url) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: b\r\n\r\n" + "GET /\u00fc HTTP/1.1\r\n\r\n".encode())
        assert client.answer().status == 200
        assert client.answer().json()["error"].endswith("%C3%BC")


def test_tls_is_named_in_the_answer_and_once_a_minute_in_the_log(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[dict[str, object]]:
        return [vars(record)["fields"] for record in caplog.records if record.msg == "tls_on_http_port"]

    with caplog.at_level(logging.WARNING, "flowbridge"), running(upstream, tmp_path) as bridge:
        for _ in range(5):
            assert told(bridge, HELLO) == SPEAKS_HTTP
        with pytest.raises(httpx.ConnectError, match=r"(?i)wrong.version.number|record layer"):
            httpx.get(bridge.url.replace("http://", "https://"), verify=ssl.create_default_context(), trust_env=False)
        (line,) = lines()
    assert (line["client"], line["refused"]) == ("127.0.0.1", 1)
    assert "put a proxy with a certificate before it" in str(line["hint"])


def test_tls_in_the_middle_of_a_request_is_none(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient(bridge.url) as client:
        client.send(b"GET /whoami HTTP/1.1\r\n")
        assert client.send(HELLO).answer().json()["error"] == NONE
    assert not [record for record in caplog.records if record.msg == "tls_on_http_port"]
