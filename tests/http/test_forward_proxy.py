"""The homeserver behind a forward proxy: a real tinyproxy and a real microsocks, and what a broken one answers."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from flowbridge.homeserver import Locator, tls_context
from flowbridge.homeserver.connection import NoAnswer
from flowbridge.homeserver.pool import Pool
from flowbridge.models.proxy import Proxy
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests import upstream as scripted
from tests.http.conftest import BOT_TOKEN, HELLO, KEY, SEND, Authority
from tests.http.test_front import program, running
from tests.processes import free_port
from tests.processes import serving as serving_process
from tests.upstream import PATIENCE, Rooms, Upstream

TINYPROXY = """
Port %(port)d
Listen 127.0.0.1
MaxClients 20
LogLevel Info
LogFile "tinyproxy.log"
%(more)s
"""
OK = scripted.answer({"event_id": "$1"})
SECRET = "pa:ss@word"
ENCODED = "pa%3Ass%40word"


@contextmanager
def tinyproxy(folder: Path, more: str = "") -> Iterator[int]:
    port = free_port()
    (folder / "tinyproxy.conf").write_text(TINYPROXY % {"port": port, "more": more})
    command = [program("tinyproxy", "tinyproxy"), "-d", "-c", "tinyproxy.conf"]
    with running(command, f"http://127.0.0.1:{port}", folder):
        yield port


@contextmanager
def microsocks(folder: Path, *arguments: str) -> Iterator[int]:
    port = free_port()
    command = [program("microsocks", "microsocks"), "-i", "127.0.0.1", "-p", str(port), *arguments]
    with running(command, f"http://127.0.0.1:{port}", folder):
        yield port


@contextmanager
def answering(*pieces: bytes, tls: ssl.SSLContext | None = None, then: str = "") -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that answers every request so, in pieces. `then`: host:port to carry the connection to. Its requests."""
    came: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def carry(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65_536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            with _wrapped(connection, tls) as caller:
                try:
                    came.append(caller.recv(65_536))
                    for piece in pieces:
                        caller.sendall(piece)
                        stopped.wait(0.05)
                    if then:
                        host, _, port = then.rpartition(":")
                        with socket.create_connection((host, int(port))) as far:
                            threading.Thread(target=carry, args=(far, caller), daemon=True).start()
                            carry(caller, far)
                except OSError:
                    pass

    stopped = threading.Event()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1], came
    finally:
        stopped.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def _wrapped(connection: socket.socket, tls: ssl.SSLContext | None) -> socket.socket:
    return tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) if tls else connection


async def ask(address: str, proxy: str, ca_file: Path | None = None, deadline: float = PATIENCE) -> int:
    tls = tls_context(ca_file)
    with closing(Pool(Locator(address, tls, proxy=Proxy.parse(proxy)), tls, most=1)) as pool:
        answer = await pool.exchange("PUT", "/_matrix/x", b"x: 1\r\n", b"{}", deadline=deadline, limit=65_536)
        again = await pool.exchange("PUT", "/_matrix/x", b"x: 1\r\n", b"{}", deadline=deadline, limit=65_536)
    assert (again.status, again.body) == (answer.status, b'{"event_id": "$1"}')
    return answer.status


async def complaint(address: str, proxy: str, deadline: float = PATIENCE) -> str:
    with pytest.raises(NoAnswer) as caught:
        await ask(address, proxy, deadline=deadline)
    assert not caught.value.sent
    assert SECRET not in str(caught.value)
    assert ENCODED not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture(params=["http", "https"])
def homeserver(request: pytest.FixtureRequest, authority: Authority) -> Iterator[tuple[Upstream, str, Path | None]]:
    ca_file, tls = authority("homeserver") if request.param == "https" else (None, None)
    with Upstream(lambda _: OK, tls) as upstream:
        yield upstream, f"{request.param}://127.0.0.1:{upstream.port}", ca_file


Homeserver = tuple[Upstream, str, Path | None]


async def test_tinyproxy_carries_what_is_asked_on_one_kept_connection(homeserver: Homeserver, tmp_path: Path) -> None:
    upstream, address, ca_file = homeserver
    with tinyproxy(tmp_path) as port:
        assert await ask(address, f"http://127.0.0.1:{port}", ca_file) == 200
        assert upstream.accepted == 1
        assert f"CONNECT 127.0.0.1:{upstream.port}" in (tmp_path / "tinyproxy.log").read_text()


async def test_tinyproxy_wants_a_password_and_gets_it(homeserver: Homeserver, tmp_path: Path) -> None:
    upstream, address, ca_file = homeserver
    with tinyproxy(tmp_path, "BasicAuth bridge password") as port:
        assert await ask(address, f"http://bridge:password@127.0.0.1:{port}", ca_file) == 200
        said = await complaint(address, f"http://127.0.0.1:{port}")
        assert f"the proxy http://127.0.0.1:{port} does not connect to {address}: it answers 407" in said
        assert said.endswith("and wants user:password@ in FLOWBRIDGE_PROXY")
        said = await complaint(address, f"http://bridge:{ENCODED}@127.0.0.1:{port}")
        assert "does not take the user and password that are in FLOWBRIDGE_PROXY" in said
        assert upstream.accepted == 1


async def test_tinyproxy_that_cannot_connect_is_named(tmp_path: Path) -> None:
    nowhere = free_port()
    with tinyproxy(tmp_path) as port:
        said = await complaint(f"https://127.0.0.1:{nowhere}", f"http://127.0.0.1:{port}")
    start = f"the proxy http://127.0.0.1:{port} does not connect to https://127.0.0.1:{nowhere}: it answers 50"
    assert said.startswith(start)


@pytest.mark.parametrize("with_password", [False, True])
async def test_microsocks_carries_it_too(homeserver: Homeserver, tmp_path: Path, *, with_password: bool) -> None:
    upstream, address, ca_file = homeserver
    with microsocks(tmp_path, *(["-u", "bridge", "-P", SECRET] if with_password else [])) as port:
        user = f"bridge:{ENCODED}@" if with_password else ""
        assert await ask(address, f"socks5h://{user}127.0.0.1:{port}", ca_file) == 200
        assert upstream.accepted == 1
        if with_password:
            said = await complaint(address, f"socks5://127.0.0.1:{port}")
            assert said.startswith(f"the proxy socks5://127.0.0.1:{port} does not connect to {address}: ")
        said = await complaint(f"http://127.0.0.1:{free_port()}", f"socks5://{user}127.0.0.1:{port}")
        assert said.startswith(f"the proxy socks5://127.0.0.1:{port} does not connect to http://127.0.0.1:")


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
async def test_proxy_that_is_away_is_named(scheme: str) -> None:
    proxy = f"127.0.0.1:{free_port()}"
    said = await complaint("https://hs.example.org", f"{scheme}://u:{ENCODED}@{proxy}")
    assert said.startswith(f"cannot connect to the proxy {scheme}://{proxy} (FLOWBRIDGE_PROXY): ")


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ((b"HTTP/1.1 502 Bad Gateway\r\n\r\n",), "it answers 502 Bad Gateway"),
        ((b"HTTP/1.0 403 \x1b[31mno\x00\r\nA: b\r\n\r\n<html>",), "it answers 403 ?[31mno?"),
        ((b"HTTP/1.1 407 Authenticate\r\n\r\n",), "does not take the user and password that are in FLOWBRIDGE_PROXY"),
        ((b"HTTP/1.1 200 OK\r\n\r\nhello",), "it says something before it was asked"),
        ((b"SSH-2.0-OpenSSH\r\n\r\n",), "its answer is not HTTP/1.1"),
        ((b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 5_000), "its answer has no end"),
        ((b"HTTP/1.1 200 OK\r\n",), "it closes the connection"),
        ((), "it closes the connection"),
    ],
)
async def test_answer_of_a_broken_proxy_is_told(pieces: tuple[bytes, ...], says: str) -> None:
    with answering(*pieces) as (port, _):
        said = await complaint("https://hs.example.org", f"http://u:{ENCODED}@127.0.0.1:{port}")
    assert said.startswith(f"the proxy http://127.0.0.1:{port} does not connect to https://hs.example.org: ")
    assert says in said


async def test_silent_proxy_is_named_when_the_time_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = await complaint("https://hs.example.org", proxy, deadline=0.3)
    assert said == f"the proxy {proxy} does not connect to https://hs.example.org in time"


async def test_answer_in_pieces_through_a_proxy_that_speaks_tls(
    homeserver: Homeserver, authority: Authority, tmp_path: Path
) -> None:
    """TLS to the homeserver inside of TLS to the proxy."""
    upstream, address, ca_file = homeserver
    proxy_file, tls = authority("proxy")
    both = tmp_path / "authorities.pem"
    both.write_text(proxy_file.read_text() + (ca_file.read_text() if ca_file else ""))
    pieces = (b"HTTP/1.0 2", b"00 Connection established\r\nProxy-Agent: x\r", b"\n\r\n")
    with answering(*pieces, tls=tls, then=f"127.0.0.1:{upstream.port}") as (port, came):
        assert await ask(address, f"https://bridge:{ENCODED}@127.0.0.1:{port}", both) == 200
        assert came[0].startswith(f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\nHost: 127.0.0.1:".encode())
        assert b"\r\nProxy-Authorization: Basic YnJpZGdlOnBhOnNzQHdvcmQ=\r\n\r\n" in came[0]
        said = await complaint(address, f"https://127.0.0.1:{port}")  # its authority is not named
    assert said.startswith(f"TLS with the proxy https://127.0.0.1:{port} fails: ")


async def test_failures_behind_a_proxy_take_no_place_of_the_pool(authority: Authority, tmp_path: Path) -> None:
    """A handshake that fails in the tunnel was counted as two connections that ended."""
    ca_file, tls = authority("homeserver")
    with Upstream(lambda _: OK, tls) as upstream, tinyproxy(tmp_path) as port:
        unknown = tls_context(None)
        proxy = Proxy.parse(f"http://127.0.0.1:{port}")
        pool = Pool(Locator(f"https://127.0.0.1:{upstream.port}", unknown, proxy=proxy), unknown, most=1)
        for _ in range(3):
            with pytest.raises(NoAnswer, match=rf"TLS with https://127.0.0.1:{upstream.port} fails: "):
                await pool.exchange("PUT", "/_matrix/x", b"", b"{}", deadline=PATIENCE, limit=65_536)
            await asyncio.sleep(0.05)  # the end of the connection is told later
            assert len(pool) == 0
        unknown.load_verify_locations(ca_file)
        answer = await pool.exchange("PUT", "/_matrix/x", b"", b"{}", deadline=PATIENCE, limit=65_536)
        assert (answer.status, len(pool)) == (200, 1)
        pool.close()


async def test_well_known_is_asked_through_it_too(authority: Authority, tmp_path: Path) -> None:
    ca_file, tls = authority("host")
    announced = scripted.answer({"m.homeserver": {"base_url": "https://matrix.example.org"}})
    with Upstream(lambda _: announced, tls) as upstream, tinyproxy(tmp_path) as port:
        proxy = Proxy.parse(f"http://127.0.0.1:{port}")
        locator = Locator(f"127.0.0.1:{upstream.port}", tls_context(ca_file), proxy=proxy)
        assert str(await locator.address()) == "https://matrix.example.org"
        assert f"CONNECT 127.0.0.1:{upstream.port}" in (tmp_path / "tinyproxy.log").read_text()


def test_bridge_sends_and_passes_through_by_its_proxy(authority: Authority, tmp_path: Path) -> None:
    ca_file, tls = authority("homeserver")
    with Upstream(Rooms(), tls) as upstream, tinyproxy(tmp_path, "BasicAuth bridge password") as port:
        settings = Settings.load(
            base_url=f"https://127.0.0.1:{upstream.port}",
            access_token=BOT_TOKEN,
            api_keys=KEY,
            ca_file=ca_file,
            proxy=f"http://bridge:password@127.0.0.1:{port}",
            encrypted_rooms="allow",
            database_url=f"sqlite:///{tmp_path}/flowbridge.db",
        )
        with background(settings) as url, httpx.Client(base_url=url, trust_env=False) as caller:
            headers = {"X-API-Key": KEY}
            assert caller.post(SEND, json=HELLO, headers=headers).status_code == 200
            answer = caller.get("/_matrix/client/v3/pushrules", headers={"Authorization": "Bearer someone"})
            assert answer.status_code < 500
        asked = (tmp_path / "tinyproxy.log").read_text().count(f"CONNECT 127.0.0.1:{upstream.port}")
        assert asked >= upstream.accepted > 1


def test_serve_says_which_proxy_it_uses_and_never_its_password(tmp_path: Path) -> None:
    log, proxy = tmp_path / "log", f"127.0.0.1:{free_port()}"
    settings = {"BASE_URL": "https://hs.example.org", "FLOWBRIDGE_PROXY": f"http://bridge:{ENCODED}@{proxy}"}
    with serving_process(log=log, cwd=tmp_path, **settings, ACCESS_TOKEN="t", HTTPS_PROXY="http://x:1") as (url, _):
        ready = httpx.get(f"{url}/readyz", trust_env=False).text
        assert f"cannot connect to the proxy http://{proxy} (FLOWBRIDGE_PROXY)" in ready
    said = log.read_text()
    assert f"proxy=http://{proxy} " in said
    assert "proxy_not_used" not in said
    for secret in (SECRET, ENCODED, "bridge:"):
        assert secret not in said
        assert secret not in ready


def test_proxy_of_the_environment_is_named_as_not_used(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"BASE_URL": "https://hs.example.org", "https_proxy": "http://u:secret@127.0.0.1:1"}
    with serving_process(log=log, cwd=tmp_path, **settings):
        pass
    assert "proxy_not_used name=https_proxy" in log.read_text()
    assert "secret" not in log.read_text()
