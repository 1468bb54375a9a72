"""Who called: the address and the key of a request, in the log and for the homeserver, also behind proxies."""

import json
import logging
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Bridge, RawClient, new_token, post, running
from tests.processes import free_port, run, serving
from tests.upstream import PATIENCE, Upstream

pytestmark = pytest.mark.usefixtures("way")

BODY = json.dumps(HELLO).encode()
FORWARDED = "X-Forwarded-For: 203.0.113.9, 192.0.2.1"
CLIENT = "/_matrix/client/v3"


@pytest.fixture
def proxied(upstream: Upstream, tmp_path: Path) -> Iterator[Bridge]:
    """A bridge that believes 127.0.0.1, and not 127.0.0.2."""
    with running(upstream, tmp_path, trusted_proxies=(ip_network("127.0.0.1"),)) as bridge:
        yield bridge


@pytest.fixture(autouse=True)
def _informed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "flowbridge"):
        yield


def lines(caplog: pytest.LogCaptureFixture, number: int) -> list[dict[str, Any]]:
    """The lines of so many requests; each is written when the answer has gone out.

    That of the last look whether the test before left something queued may come only now.
    """

    def written() -> list[dict[str, Any]]:
        fields = [vars(record)["fields"] for record in caplog.records if record.msg == "request"]
        return [line for line in fields if line["path"] != "/deliveries"]

    ending = time.monotonic() + PATIENCE
    while len(found := written()) < number:
        assert time.monotonic() < ending, found
        time.sleep(0.01)
    assert len(found) == number
    return found


@pytest.mark.parametrize(
    "headers", [[f"X-API-Key: {KEY}"], [f"Authorization: Bearer {KEY}"]], ids=["api-key", "bearer"]
)
def test_line_names_the_client_and_the_key(
    bridge: Bridge, caplog: pytest.LogCaptureFixture, headers: list[str]
) -> None:
    assert bridge.post(SEND, BODY, *headers, FORWARDED).status == 200
    (line,) = lines(caplog, 1)
    assert line["client"] == "127.0.0.1"
    assert line["key"]
    assert KEY not in str(line)
    assert {"user", "delivery"} <= line.keys()


@pytest.mark.parametrize("target", ["/rooms", "/nothing", "/_matrix/client/v3/sync", SEND])
def test_line_of_a_matrix_token_names_no_key(bridge: Bridge, caplog: pytest.LogCaptureFixture, target: str) -> None:
    bridge.post(target, BODY, method="POST" if target == SEND else "GET")
    (line,) = lines(caplog, 1)
    assert "key" not in line
    assert line["client"] == "127.0.0.1"


def test_key_is_in_the_line_of_a_refusal_and_of_what_passes_through(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    assert bridge.post(SEND, b"{}", f"X-API-Key: {KEY}").status == 400
    bridge.post(f"{CLIENT}/sync", b"", f"X-API-Key: {KEY}", method="GET")
    assert bridge.post(SEND, BODY, "X-API-Key: fb_wrong").status == 401
    by_status = {line["status"]: line for line in lines(caplog, 3)}  # what passes through may be written last
    assert by_status[400]["key"] == by_status[404]["key"]
    assert "key" not in by_status[401]


def test_client_behind_a_proxy_is_the_one_that_it_names(proxied: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    proxied.post("/healthz", b"", FORWARDED, method="GET")
    proxied.post("/healthz", b"", "X-Forwarded-For: what?", method="GET")
    with RawClient(proxied.url, source="127.0.0.2") as stranger:
        stranger.send(post("/healthz", b"", FORWARDED, method="GET")).answer()
    assert [line["client"] for line in lines(caplog, 3)] == ["192.0.2.1", "127.0.0.1", "127.0.0.2"]


CALLS = {
    "login": ("POST", "/login", {"type": "m.login.password", "user": "a", "password": "b"}),
    "matrix-login": ("POST", f"{CLIENT}/login", {"type": "m.login.password", "user": "a", "password": "b"}),
    "register": ("POST", "/register", {"user_id": "a"}),
    "matrix-register": ("POST", f"{CLIENT}/register", {"username": "a"}),
    "passed-on": ("POST", f"{CLIENT}/user_directory/search", {"search_term": "a"}),
    "read": ("GET", f"{CLIENT}/sync", None),
}


def told(upstream: Upstream) -> list[list[tuple[str, str]]]:
    """What each request said of whom it is for."""
    return [[pair for pair in request.headers if "forwarded" in pair[0]] for request in upstream.requests]


@pytest.mark.parametrize("call", CALLS)
def test_homeserver_hears_the_client_behind_a_proxy_and_nothing_else(proxied: Bridge, call: str) -> None:
    method, path, body = CALLS[call]
    data = json.dumps(body).encode() if body else b""
    proxied.upstream.always(scripted.answer({"user_id": "@a:upstream", "access_token": "x"}))
    proxied.post(path, data, FORWARDED, "X-Forwarded-Proto: https", "X-Forwarded-Host: x", method=method)
    with RawClient(proxied.url, source="127.0.0.2") as stranger:
        stranger.send(post(path, data, FORWARDED, "X-Forwarded-Proto: https", method=method)).answer()
    asked = [request for request in proxied.upstream.requests if "whoami" not in request.target]
    found = [[pair for pair in request.headers if "forwarded" in pair[0]] for request in asked]
    assert found == [
        [("x-forwarded-for", "192.0.2.1"), ("x-forwarded-proto", "https")],
        [("x-forwarded-for", "127.0.0.2"), ("x-forwarded-proto", "http")],
    ]


@pytest.mark.parametrize("call", CALLS)
def test_homeserver_hears_nothing_without_the_setting(bridge: Bridge, call: str) -> None:
    method, path, body = CALLS[call]
    bridge.upstream.always(scripted.answer({"user_id": "@a:upstream", "access_token": "x"}))
    bridge.post(path, json.dumps(body).encode() if body else b"", FORWARDED, method=method)
    assert bridge.upstream.requests
    assert not any(told(bridge.upstream))


def test_send_of_the_worker_names_no_client(proxied: Bridge) -> None:
    """It would be the caller whose request woke the lane."""
    token = f"Authorization: Bearer {new_token()}"
    assert proxied.post(SEND, BODY, FORWARDED, token).status == 200
    assert not any("x-forwarded-for" in dict(request.headers) for request in proxied.upstream.events)


def test_operations_have_a_port_of_their_own(upstream: Upstream, tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    settings = {"BASE_URL": upstream.url, "FLOWBRIDGE_OPERATIONS_PORT": str(port)}
    with serving(cwd=tmp_path, log=log, **settings) as (url, _), httpx.Client(trust_env=False) as client:
        apart = f"http://127.0.0.1:{port}"
        assert client.get(f"{apart}/metrics").text.startswith("# HELP")
        assert client.get(f"{apart}/readyz").json()["ready"] is True
        for base in (apart, url):
            assert client.get(f"{base}/healthz").status_code == 200
        # A proxy in front may pass on any Host: the port that a request comes to is what counts.
        for path in ("/metrics", "/readyz"):
            answer = client.get(f"{url}{path}", headers={"Host": f"127.0.0.1:{port}", "X-Forwarded-Port": str(port)})
            assert (answer.status_code, answer.json()["errcode"]) == (404, "M_UNRECOGNIZED")
            assert client.options(f"{url}{path}").status_code == 404
        for path in ("/docs", "/deliveries", "/schemas", f"{CLIENT}/sync", "/_matrix/client/versions", "/login"):
            assert client.get(f"{apart}{path}").status_code == 404
        assert client.get(f"{url}/_matrix/client/versions").status_code == 200
        assert client.post(f"{apart}{SEND}", json=HELLO, headers={"Authorization": "Bearer x"}).status_code == 404
    assert upstream.events == []
    assert f"operations=http://127.0.0.1:{port}" in log.read_text()


def test_operations_port_that_is_taken_is_one_line(upstream: Upstream, tmp_path: Path) -> None:
    taken = str(upstream.port)
    settings = {"BASE_URL": upstream.url, "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{tmp_path}/a.db"}
    done = run("serve", "--port", "0", FLOWBRIDGE_OPERATIONS_PORT=taken, **settings)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"FLOWBRIDGE_OPERATIONS_PORT: cannot listen on 127.0.0.1 port {taken}: Address already in use"
    )
