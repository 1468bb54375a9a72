"""A running bridge in front of a scripted upstream, and a raw socket to it."""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from flowbridge.serve import background
from flowbridge.settings import Settings
from tests.upstream import PATIENCE, Upstream

KEY = "fb_http-tests"
BOT_TOKEN = "bot-token"
WAIT_SECONDS = 1.0
ROOM = "!room:upstream"
SEND = f"/rooms/{ROOM}/send/m.room.message"
HELLO = {"msgtype": "m.text", "body": "hello"}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """A connection to the bridge on which anything may be said."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        self._socket = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> Self:
        self._socket.sendall(data)
        return self

    def try_to_send(self, data: bytes) -> bool:
        """Whether the connection still took it."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def end(self) -> Self:
        """Say that nothing more will come."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def answer(self, method: str = "") -> Answer:
        """The next answer, without interim ones. `method`: a HEAD is answered without a body."""
        while True:
            head = self._until(b"\r\n\r\n").decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            status = int(first.split(" ")[1])
            if status >= 200:
                break
        assert "transfer-encoding" not in headers, "every answer of the bridge has a length"
        length = 0 if method == "HEAD" else int(headers["content-length"])
        while len(self._buffer) < length:
            assert self._fill(), "the bridge hung up in the middle of an answer"
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Answer(status, headers, body)

    def rest(self, seconds: float) -> bytes | None:
        """All that the bridge still says before it hangs up; None when it has not by then."""
        self._socket.settimeout(seconds)
        try:
            while self._fill():
                pass
        except TimeoutError:
            return None
        except OSError:
            pass  # hung up on, and not gently
        return self._buffer

    def is_closed(self, seconds: float = PATIENCE) -> bool:
        """Whether the bridge hangs up, without another word, in this time."""
        self._socket.settimeout(seconds)
        try:
            return not self._fill() and not self._buffer
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            assert self._fill(), f"the bridge hung up; it had said {self._buffer!r}"
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def _fill(self) -> bool:
        data = self._socket.recv(65_536)
        self._buffer += data
        return bool(data)


@dataclass(frozen=True, slots=True)
class Bridge:
    """A running bridge, and the homeserver that it talks to."""

    url: str
    upstream: Upstream

    def connect(self) -> RawClient:
        return RawClient(self.url)

    def ask(self, data: bytes, method: str = "") -> Answer:
        """Say this on a new connection; the first answer."""
        with self.connect() as client:
            return client.send(data).answer(method)

    def post(self, target: str = SEND, body: bytes = b"", *headers: str, method: str = "POST") -> Answer:
        return self.ask(post(target, body, *headers, method=method), method)


def post(target: str = SEND, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    """A request as it goes over the wire, with a token that no test has used yet unless it brings its own."""
    lines = [f"{method} {target} HTTP/1.1", "Host: bridge", *headers]
    names = {header.partition(":")[0].lower() for header in headers}
    if "authorization" not in names:
        lines.append(f"Authorization: Bearer {new_token()}")
    if not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def new_token() -> str:
    return f"token-{secrets.token_hex(8)}"


def settings_for(url: str, **values: Any) -> Settings:
    """Settings that no environment changes."""
    defaults = {
        "access_token": SecretStr(BOT_TOKEN),
        "api_keys": (SecretStr(KEY),),
        "wait_seconds": WAIT_SECONDS,
    }
    return Settings.model_construct(base_url=url, **{**defaults, **values})


@pytest.fixture(scope="session")
def shared_bridge() -> Iterator[Bridge]:
    with Upstream() as upstream, background(settings_for(upstream.url)) as url:
        yield Bridge(url, upstream)


@pytest.fixture
def bridge(shared_bridge: Bridge) -> Iterator[Bridge]:
    """With an upstream in good health that remembers only this test's requests."""
    shared_bridge.upstream.reset()
    yield shared_bridge
    shared_bridge.upstream.reset()


@pytest.fixture
def upstream(bridge: Bridge) -> Upstream:
    return bridge.upstream


@pytest.fixture
def caller(bridge: Bridge) -> Iterator[httpx.Client]:
    """A caller with a token of its own, which the bridge has not seen before."""
    headers = {"Authorization": f"Bearer {new_token()}"}
    with httpx.Client(base_url=bridge.url, headers=headers, trust_env=False, timeout=PATIENCE) as client:
        yield client


Elapsed = Callable[[], float]


@pytest.fixture
def elapsed() -> Elapsed:
    """`elapsed()`: the seconds since the test began."""
    started = time.monotonic()
    return lambda: time.monotonic() - started
