"""Behind a real Caddy and a real nginx, whose connections many callers share: each answer is to its own request."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Bridge, RawClient, post
from tests.node import missing
from tests.processes import free_port, serving
from tests.upstream import PATIENCE

FLUSH = 4_096  # bytes: Go's HTTP client, and so Caddy, writes what it has of a request whenever it has so many
CADDYFILE = """
{
    admin off
    auto_https off
    log {
        output discard
    }
}
http://:%(port)d {
    bind 127.0.0.1
    reverse_proxy %(bridge)s
}
"""
NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    client_max_body_size 100m;
    large_client_header_buffers 4 32k;
    upstream bridge {
        server %(bridge)s;
        keepalive 4;
    }
    server {
        listen 127.0.0.1:%(port)d;
        proxy_http_version 1.1;
        location / {
            proxy_pass http://bridge;
            proxy_request_buffering off;
            %(headers)s
        }
    }
}
"""
PLAIN = 'proxy_set_header Connection "";'
# As guides for WebSockets have it: every request offers an upgrade, also those that do not want any.
OFFERS = 'proxy_set_header Upgrade "websocket"; proxy_set_header Connection "upgrade";'
BODY = b"5 packages to\nupgrade: now\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nupgrade: then\nthe end"
VALIDATE = "/validate/m.room.message"


@contextmanager
def running(command: list[str], url: str, folder: Path) -> Iterator[str]:
    """A proxy that answers at this URL, until the context ends."""
    with (folder / "proxy.log").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env={"HOME": str(folder)})
    try:
        ending = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "proxy.log").read_text()
                assert time.monotonic() < ending, "the proxy does not answer"
                time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        missing(f"{name} is not installed (Debian's {package}), so that the bridge is NOT TESTED behind it")
    assert found
    return found


@contextmanager
def front(kind: str, bridge: Bridge, folder: Path) -> Iterator[str]:
    port = free_port()
    values = {"port": port, "bridge": bridge.url.removeprefix("http://")}
    if kind == "caddy":
        (folder / "Caddyfile").write_text(CADDYFILE % values)
        command = [program("caddy", "caddy"), "run", "--config", "Caddyfile"]
    else:
        headers = OFFERS if kind == "nginx-offers" else PLAIN
        (folder / "nginx.conf").write_text(NGINX % {**values, "headers": headers})
        command = [program("nginx", "nginx-light"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    with running(command, f"http://127.0.0.1:{port}", folder) as url:
        yield url


@pytest.fixture(scope="module", params=["caddy", "nginx", "nginx-offers"])
def proxy(
    request: pytest.FixtureRequest, shared_bridge: Bridge, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with front(request.param, shared_bridge, tmp_path_factory.mktemp(request.param)) as url:
        yield url


def check_others(url: str) -> None:
    """Another caller's request, on a connection of the proxy's that was used before."""
    with RawClient(url) as other:
        answer = other.send(post("/healthz", method="GET")).answer()
    assert (answer.status, answer.json()["status"]) == (200, "ok")


@pytest.mark.parametrize("offer", [[], ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AA"]])
def test_bodies_arrive_whole_through_a_proxy(bridge: Bridge, proxy: str, offer: list[str]) -> None:
    stored = scripted.answer({"content_uri": "mxc://upstream/1", "results": []})
    bridge.upstream.script(lambda request: stored if request.method == "POST" else None)
    content = {**HELLO, "body": BODY.decode(), "a\nupgrade: b": "c"}
    document, size = json.dumps(content).encode(), 0
    file = BODY * 3_000
    plain = "Content-Type: text/plain"
    for target, body in (
        (SEND, document),
        ("/media?filename=a.txt", file),
        ("/_matrix/media/v3/upload", file),
        ("/_matrix/client/v3/user_directory/search", document),
    ):
        with RawClient(proxy) as client:
            answer = client.send(post(target, body, plain, *offer)).answer()
        assert answer.status == 200, answer
        sent = bridge.upstream.events[-1].body
        assert json.loads(sent) == content if target == SEND else sent == body
        size += len(sent)
        check_others(proxy)
    with RawClient(proxy) as client:
        answer = client.send(post(VALIDATE, BODY, plain, *offer)).answer()
    assert answer.json()["content"]["body"] == BODY.decode()
    check_others(proxy)


def head_at(padding: int) -> bytes:
    """A request whose head, as Caddy passes it on, grows with `padding`."""
    return post(VALIDATE, BODY, "Content-Type: text/plain", "X-Padding: " + "x" * padding, "Authorization: Basic x")


def test_head_that_ends_where_caddy_flushes_smuggles_nothing(upstream: scripted.Upstream, tmp_path: Path) -> None:
    """The attack of issue 11: the bytes by which a body grew became the beginning of another caller's request.

    One in 20 of these found the old bridge, in a process of its own, between the two segments.
    """
    folder = tmp_path / "measured"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        measured = Bridge(f"http://127.0.0.1:{listener.getsockname()[1]}", upstream)
        with front("caddy", measured, folder) as url, RawClient(url) as client:
            client.send(head_at(1_000))
            accepted, _ = listener.accept()
            data = b""
            while b"the end" not in data:
                data += accepted.recv(65_536)
            accepted.close()
    length = data.index(b"\r\n\r\n") + 4
    serve = serving(cwd=tmp_path, BASE_URL=upstream.url, ACCESS_TOKEN="bot", FLOWBRIDGE_API_KEYS=KEY)
    with serve as (bridge, _), front("caddy", Bridge(bridge, upstream), tmp_path) as url:
        for number in range(120):
            padding = 1_000 + FLUSH - length + 1 + number % 3
            with RawClient(url) as attacker:
                answer = attacker.send(head_at(padding)).answer()
            assert answer.json()["content"]["body"] == BODY.decode(), number
            with RawClient(url) as victim:
                answer = victim.send(post("/whoami", b"", f"X-API-Key: {KEY}", method="GET")).answer()
            assert answer.status == 200, (number, answer)
