"""Running bridges in front of a scripted upstream, and a raw socket to them."""

import json
import secrets
import select
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.web.connections import MAX_CONNECTIONS
from flowbridge.web.protocol import Protocol
from flowbridge.web.server import background
from flowbridge.web.usual_hook import UsualHooks
from flowbridge.web.usual_send import UsualSends
from tests.upstream import PATIENCE, Rooms, Upstream

KEY = "fb_http-tests-of-32-characters-and-some-more"
BOT_TOKEN = "bot-token"
REQUEST_SECONDS = 20.0  # for one attempt upstream: longer than any test needs
LEASE_SECONDS = 10 * PATIENCE  # the worker also polls by itself, three times in a lease: no test waits for that
SHORT_REQUEST_SECONDS = 2.0  # the same, where it is meant to run out
WAIT_SECONDS = PATIENCE  # for an event to be in its room: longer than any test needs
HASTE_SECONDS = 0.3  # the same, where it is meant to run out
PATIENT = {"Prefer": f"wait={WAIT_SECONDS:.0f}"}  # to a hasty bridge, where it must not run out
QUICK = Timing(first_pause=0.05)  # before the second attempt
ROOM = "!room:upstream"
SEND = f"/rooms/{ROOM}/send/m.room.message"
HELLO = {"msgtype": "m.text", "body": "hello"}
Authority = Callable[[str], tuple[Path, ssl.SSLContext]]

TLS = ssl.create_default_context()  # httpx would make one for each client, in 50 ms


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """A connection to the bridge that can send any bytes. `source`: the address that it comes from."""

    def __init__(self, url: str, source: str = "127.0.0.1") -> None:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        self._socket = socket.create_connection((address.hostname, address.port), PATIENCE, (source, 0))
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> Self:
        self._socket.sendall(data)
        return self

    def try_to_send(self, data: bytes) -> bool:
        """Whether the connection still accepted it."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def has_answer(self) -> bool:
        """Whether the bridge has begun to answer."""
        return bool(self._buffer or select.select([self._socket], [], [], 0)[0])

    def end(self) -> Self:
        """Close our direction: nothing more will come."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def answer(self, method: str = "") -> Answer:
        """The next answer, without interim ones. `method`: a HEAD is answered without a body."""
        while True:
            head = self.read_until(b"\r\n\r\n").decode("latin-1")
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

    def head(self) -> str:
        """The status line and headers of the next answer, for one that has neither a length nor a body."""
        return self.read_until(b"\r\n\r\n").decode("latin-1")

    def rest(self, seconds: float) -> bytes | None:
        """All that the bridge still sends before it hangs up; None when it has not hung up by then."""
        self._socket.settimeout(seconds)
        try:
            while self._fill():
                pass
        except TimeoutError:
            return None
        except OSError:
            pass  # the connection was reset
        return self._buffer

    def is_closed(self, seconds: float = PATIENCE) -> bool:
        """Whether the bridge hangs up, without another byte, in this time."""
        self._socket.settimeout(seconds)
        try:
            return not self._fill() and not self._buffer
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)

    def is_silent(self, seconds: float) -> bool:
        """Whether the bridge neither sends anything nor hangs up in this time."""
        self._socket.settimeout(seconds)
        try:
            self._fill()
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)
        return False

    def read_until(self, end: bytes) -> bytes:
        """What the bridge says before `end`; what comes behind is kept for the next look."""
        while end not in self._buffer:
            assert self._fill(), f"the bridge hung up; it had sent {self._buffer!r}"
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
        """Send this on a new connection; the first answer."""
        with self.connect() as client:
            return client.send(data).answer(method)

    def delivery(self, id_: str) -> dict[str, Any]:
        """All that the bridge knows about a delivery."""
        return dict(self._operate("GET", f"/deliveries/{id_}").json())

    def wait_until(self, id_: str, status: str) -> dict[str, Any]:
        """The delivery, once it has this status."""
        ending = time.monotonic() + PATIENCE
        while (found := self.delivery(id_))["status"] != status:
            assert time.monotonic() < ending, found
            time.sleep(0.01)
        return found

    def queued(self) -> list[str]:
        """The deliveries in flight."""
        page = self._operate("GET", "/deliveries?state=queued&limit=200").json()
        return [delivery["delivery_id"] for delivery in page["deliveries"]]

    def wait_until_idle(self) -> None:
        """Until nothing is in flight."""
        ending = time.monotonic() + PATIENCE
        while queued := self.queued():
            assert time.monotonic() < ending, queued
            time.sleep(0.02)

    def clear(self) -> None:
        """Give up what is queued, or wait until it is sent."""
        ending = time.monotonic() + PATIENCE
        while queued := self.queued():
            assert time.monotonic() < ending, queued
            for delivery in queued:
                if self._operate("DELETE", f"/deliveries/{delivery}").status == 409:
                    self.upstream.drop()

    def _operate(self, method: str, target: str) -> Answer:
        """With a key that may do everything."""
        return self.ask(post(target, b"", f"X-API-Key: {KEY}", "Authorization: Basic x", method=method))

    def post(self, target: str = SEND, body: bytes = b"", *headers: str, method: str = "POST") -> Answer:
        return self.ask(post(target, body, *headers, method=method), method)


def post(target: str = SEND, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    """A request as it goes over the wire, with a token that no test has used yet unless one is given."""
    lines = [f"{method} {target} HTTP/1.1", "Host: bridge", *headers]
    names = {header.partition(":")[0].lower() for header in headers}
    if "authorization" not in names:
        lines.append(f"Authorization: Bearer {new_token()}")
    if not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def new_token() -> str:
    return f"token-{secrets.token_hex(8)}"


def settings_for(url: str, folder: Path, **values: Any) -> Settings:
    """Settings that ignore the environment; the store is in this folder."""
    defaults = {
        "access_token": SecretStr(BOT_TOKEN),
        "api_keys": (SecretStr(KEY),),
        "database_url": SecretStr(f"sqlite:///{folder}/flowbridge.db"),
        "wait_seconds": WAIT_SECONDS,
        "request_seconds": REQUEST_SECONDS,
        "lease_seconds": LEASE_SECONDS,
        "encrypted_rooms": "refuse",
    }
    return Settings.model_construct(base_url=url, **{**defaults, **values})


# The bridge asks the scripted homeserver nothing of its own accord.
STILL = Timing(invitation_seconds=1_000_000.0)


@contextmanager
def running(
    upstream: Upstream,
    folder: Path,
    *,
    timing: Timing | None = None,
    readiness_seconds: float = 0.0,
    invitation_seconds: float = STILL.invitation_seconds,
    max_connections: int = MAX_CONNECTIONS,
    **values: Any,
) -> Iterator[Bridge]:
    """A bridge of its own, on what an earlier one left in this folder. `values`: settings.

    `readiness_seconds`: none, so that no test hears what the homeserver said to the one before. `invitation_seconds`:
    so many that the bridge asks the scripted homeserver nothing of its own accord.
    """
    timing = replace(timing or Timing(), readiness_seconds=readiness_seconds, invitation_seconds=invitation_seconds)
    settings = settings_for(upstream.url, folder, **values)
    with background(settings, timing=timing, max_connections=max_connections) as url:
        yield Bridge(url, upstream)


# Not for the whole session: other tests change constants and clocks of modules, which a bridge that runs beside them in
# this process would go by, too.
@pytest.fixture(scope="package")
def shared_upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="package")
def shared_bridge(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with running(shared_upstream, tmp_path_factory.mktemp("patient")) as bridge:
        yield bridge


@pytest.fixture(scope="package")
def shared_hasty_bridge(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    folder = tmp_path_factory.mktemp("hasty")
    with running(shared_upstream, folder, wait_seconds=HASTE_SECONDS, timing=QUICK) as bridge:
        yield bridge


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    """Healthy, remembering only this test's requests."""
    shared_upstream.reset()
    yield shared_upstream
    shared_upstream.reset()


@pytest.fixture(params=["usual", "ordinary"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what holds in both ways that a send, or a request to a hook, may take (web/usual.py)."""
    if request.param == "ordinary":
        for takes in (UsualSends, UsualHooks):
            monkeypatch.setattr(takes, "take", lambda *_: None)


@pytest.fixture
def rooms(upstream: Upstream) -> Rooms:
    """The rooms of the upstream, which keeps what it is sent."""
    found = Rooms()
    upstream.script(found)
    return found


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """For `scripted.when(go, …)`; set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """`most["at work"]`: the most requests of one connection that were in flight at a time."""
    found: Counter[str] = Counter()
    begin, end = Protocol.on_headers_complete, Protocol.on_response_complete

    def begun(self: Any) -> None:
        self.at_work = getattr(self, "at_work", 0) + 1
        found["at work"] = max(found["at work"], self.at_work)
        begin(self)

    def ended(self: Any) -> None:
        self.at_work -= 1
        end(self)

    monkeypatch.setattr(Protocol, "on_headers_complete", begun)
    monkeypatch.setattr(Protocol, "on_response_complete", ended)
    return found


@pytest.fixture
def bridge(shared_bridge: Bridge, upstream: Upstream) -> Iterator[Bridge]:
    yield from _lent(shared_bridge)


Timed = Callable[..., Bridge]


@pytest.fixture
def timed(upstream: Upstream, tmp_path: Path) -> Iterator[Timed]:
    """`timed(head_seconds=1.0)`: a bridge of this test's own with these durations, fields of `Timing`."""
    with ExitStack() as stack:
        yield lambda **durations: stack.enter_context(running(upstream, tmp_path, timing=Timing(**durations)))


@pytest.fixture
def hasty(shared_hasty_bridge: Bridge, upstream: Upstream) -> Iterator[Bridge]:
    """For what does not recover: it does not wait for long, and retries soon."""
    yield from _lent(shared_hasty_bridge)


@pytest.fixture
def impatient(upstream: Upstream, tmp_path: Path) -> Iterator[Bridge]:
    """For a homeserver that does not answer: it also gives up an attempt soon."""
    seconds: dict[str, Any] = {"wait_seconds": HASTE_SECONDS, "request_seconds": SHORT_REQUEST_SECONDS}
    with running(upstream, tmp_path, timing=QUICK, **seconds) as bridge:
        yield from _lent(bridge)


def _lent(bridge: Bridge) -> Iterator[Bridge]:
    yield bridge
    bridge.upstream.reset()
    bridge.clear()


@pytest.fixture
def quick_caller(upstream: Upstream, tmp_path: Path) -> Iterator[httpx.Client]:
    """A caller of a bridge that tries again soon, and learns of a new token soon."""
    timing = replace(QUICK, token_pause=HASTE_SECONDS)
    with running(upstream, tmp_path, timing=timing) as bridge, as_caller(bridge) as client:
        yield client


@pytest.fixture
def caller(bridge: Bridge) -> Iterator[httpx.Client]:
    """A caller with a token of its own, which the bridge has not seen before."""
    with as_caller(bridge) as client:
        yield client


@pytest.fixture
def hasty_caller(hasty: Bridge) -> Iterator[httpx.Client]:
    """The same, of the hasty bridge."""
    with as_caller(hasty) as client:
        yield client


def as_caller(bridge: Bridge, token: str = "") -> httpx.Client:
    headers = {"Authorization": f"Bearer {token or new_token()}"}
    patience = PATIENCE + WAIT_SECONDS
    return httpx.Client(base_url=bridge.url, headers=headers, trust_env=False, timeout=patience, verify=TLS)


Elapsed = Callable[[], float]


@pytest.fixture
def elapsed() -> Elapsed:
    """`elapsed()`: the seconds since the test began."""
    started = time.monotonic()
    return lambda: time.monotonic() - started


@pytest.fixture
def worked() -> Elapsed:
    """`worked()`: the processor seconds that the bridge, and all of this process, used since the test began.

    Tests of speed use this: the clock depends on the load of the machine.
    """
    started = time.process_time()
    return lambda: time.process_time() - started


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """`authority(name)`: a private authority's file, and the TLS of a server at 127.0.0.1 that it vouches for."""

    def make(name: str) -> tuple[Path, ssl.SSLContext]:
        where = tmp_path_factory.mktemp(name)
        certificate, key = where / "certificate.pem", where / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return certificate, context

    return make
