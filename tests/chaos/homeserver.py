"""One scripted, faulty homeserver: `python -m tests.chaos.homeserver --port N --log FILE`.

It speaks what a bridge calls, dedupes as Synapse does, and goes wrong on demand. SIGUSR1: it forgets the transactions
it remembers. SIGUSR2: a proxy in front answers 404 in HTML to everything, until the next SIGUSR2. A run steers it by
GET /_judge/stats, POST /_judge/faults (JSON), POST /_judge/forget, POST /_judge/logout?token=T (from then on it is
unknown) and POST /_judge/down?seconds=N (nobody listens).
"""

import argparse
import asyncio
import json
import math
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import httptools
import uvloop

from tests.chaos.faults import Fault, Faults, Limiter
from tests.chaos.rooms import Device, Rooms, device_of, sum_of

CLOSED = "!closed"  # prefix of the ids of rooms that have no members
HTML = b"<html><head><title>404 Not Found</title></head><body><h1>404 Not Found</h1>nginx</body></html>"

FAILURE = {"errcode": "M_UNKNOWN", "error": "Internal server error"}
POISON = "poison"  # an event with this key in its content gets a 500 each time


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    token: str
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def room(self) -> str:
        """Where it wants to send, as it stands in the path; empty for all but sends."""
        for way in ("/send/", "/state/"):
            if self.method == "PUT" and way in self.path:
                return self.path.partition(way)[0]
        return ""

    def query(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.target).query).get(name, [None])[0]

    def json(self) -> dict[str, Any]:
        """The body's object. Raises Refused."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            raise Refused(400, "M_NOT_JSON", "not JSON") from None
        if not isinstance(found, dict):
            raise Refused(400, "M_BAD_JSON", "not an object")
        return found


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    kind: str = "application/json"
    retry_after: int | None = None

    def wire(self) -> bytes:
        extra = "" if self.retry_after is None else f"Retry-After: {self.retry_after}\r\n"
        head = f"HTTP/1.1 {self.status} -\r\nContent-Type: {self.kind}\r\nContent-Length: {len(self.body)}\r\n{extra}"
        return head.encode() + b"\r\n" + self.body


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, errcode: str, error: str, *, wait: float = 0.0) -> None:
        super().__init__(error)
        body: dict[str, Any] = {"errcode": errcode, "error": error}
        if wait:
            body["retry_after_ms"] = math.ceil(wait * 1000)
        self.reply = _json(body, status, math.ceil(wait) if wait else None)


def _json(body: dict[str, Any], status: int = 200, retry_after: int | None = None) -> Reply:
    return Reply(status, json.dumps(body).encode(), retry_after=retry_after)


class Doors:
    """Who is sending into which room just now: each bridge has a port of its own.

    Two at once in one room (`overlaps`) is what a lease forbids. No member sees it as long as the memory works.
    """

    def __init__(self) -> None:
        self.overlaps = 0
        self._inside: dict[str, list[int]] = {}

    def enter(self, room: str, port: int) -> None:
        inside = self._inside.setdefault(room, [])
        self.overlaps += any(other != port for other in inside)
        inside.append(port)

    def leave(self, room: str, port: int) -> None:
        self._inside[room].remove(port)


class Homeserver:
    """What a request gets. `rate` 0: no rate limit."""

    def __init__(self, rooms: Rooms, faults: Faults, *, seed: int = 0, rate: float = 0.0, burst: int = 10) -> None:
        self.rooms = rooms
        self.faults = faults
        self.doors = Doors()
        self.requests = 0
        self.ended: set[str] = set()  # tokens that were logged out
        self.given: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._rate, self._burst = rate, burst
        self._limiters: dict[str, Limiter] = {}

    def stats(self) -> dict[str, Any]:
        limits = {
            user: {"allowed": one.allowed, "pauses": one.pauses, "early": one.early, "worst": one.worst}
            for user, one in self._limiters.items()
        }
        return {
            "requests": self.requests,
            "events": self.rooms.count,
            "repeats": self.rooms.repeats,
            "stale": self.rooms.stale,
            "overlaps": self.doors.overlaps,
            "given": dict(self.given),
            "unknown": dict(self.unknown),
            "limits": limits,
        }

    def reply(self, request: Request, now: float) -> tuple[Reply | None, Fault | None]:
        """The answer (None: hang up) and what went wrong with it."""
        self.requests += 1
        if self.faults.html:
            self.given["html 404"] += 1
            return Reply(404, HTML, "text/html"), None
        if self.faults.broken:
            self.given["500 to everything"] += 1
            return _json(FAILURE, 500), None
        fault = self.faults.draw(self._chance)
        if fault is not None:
            self.given[fault.name.lower()] += 1
        early = self._early(fault)
        if early is not None or fault is Fault.DROPPED:
            return early, fault
        try:
            answer = self._answer(request, now)
        except Refused as refused:
            answer = refused.reply
        if fault is Fault.FAILED_LATE:
            return _json(FAILURE, 500), fault
        return (None if fault is Fault.LOST else answer), fault

    def _early(self, fault: Fault | None) -> Reply | None:
        """The answer of a fault that keeps the request from being looked at."""
        if fault is Fault.LIMITED:
            wait = self._chance.uniform(0.2, 1.0) * self.faults.retry_after_ms
            body = {"errcode": "M_LIMIT_EXCEEDED", "error": "Too Many Requests", "retry_after_ms": math.ceil(wait)}
            return _json(body, 429)
        if fault is Fault.FAILED:
            return _json(FAILURE, 500)
        return None

    def _answer(self, request: Request, now: float) -> Reply:
        parts = [unquote(part) for part in request.path.split("/")[1:]]
        if (request.method, parts) == ("POST", ["_matrix", "media", "v3", "upload"]):
            return _json({"content_uri": f"mxc://chaos.test/{sum_of(request.body)}"})
        if parts[:2] != ["_matrix", "client"]:
            raise self._unrecognized(request)
        if parts[2:] == ["versions"]:
            return _json({"versions": ["v1.1", "v1.11"]})
        who = device_of(request.token)
        if who is None or request.token in self.ended:
            self.given["401"] += 1
            code = "M_UNKNOWN_TOKEN" if request.token else "M_MISSING_TOKEN"
            raise Refused(401, code, "Invalid access token passed.")
        return self._call(request, parts[3:], who, now)

    def _call(self, request: Request, parts: list[str], who: Device, now: float) -> Reply:
        if parts[:1] == ["rooms"] and parts[1].startswith(CLOSED):
            raise Refused(403, "M_FORBIDDEN", "User not in room")
        match (request.method, *parts):
            case ("PUT", "rooms", room, "send", kind, txn_id):
                return self._send(request, who, room, kind, txn_id, now)
            case ("PUT", "rooms", room, "state", kind, *key):
                return _sent(self.rooms.put_state(who, room, kind, "/".join(key), request.json()))
            case ("GET", "rooms", room, "state", kind, *key):
                return self._state(who, room, kind, "/".join(key))
            case ("GET", "rooms", room, "messages"):
                return self._messages(request, who, room)
            case ("GET", "account", "whoami"):
                device = {"device_id": who.device} if who.device else {}
                return _json({"user_id": who.user, "is_guest": False, **device})
            case ("POST", "join", room) | ("POST", "rooms", room, "join"):
                return _json({"room_id": room.replace("#", "!", 1)})
            case ("GET", "media", "config"):
                return _json({"m.upload.size": 50_000_000})
            case ("POST", "user_directory", "search"):  # tells what came (fuzzer.py)
                return _json({"results": [], "limited": False, "sha256": sum_of(request.body)})
            case ("GET", "directory", "room", alias):
                return _json({"room_id": alias.replace("#", "!", 1), "servers": ["chaos.test"]})
            case _:
                raise self._unrecognized(request)

    def _send(self, request: Request, who: Device, room: str, kind: str, txn_id: str, now: float) -> Reply:
        if self._rate:
            limiter = self._limiters.setdefault(who.user, Limiter(self._rate, self._burst))
            if wait := limiter.wait(now):
                raise Refused(429, "M_LIMIT_EXCEEDED", "Too Many Requests", wait=wait)
        content = request.json()
        if POISON in content:
            self.given["500 to a poisoned event"] += 1
            raise Refused(500, FAILURE["errcode"], FAILURE["error"])
        return _sent(self.rooms.send(who, room, kind, txn_id, content))

    def _state(self, who: Device, room: str, kind: str, key: str) -> Reply:
        found = self.rooms.state(room, kind, key)
        if found is None and kind == "m.room.member" and key == who.user:
            found = {"membership": "join"}
        if found is None:
            raise Refused(404, "M_NOT_FOUND", "Event not found.")
        return _json(found)

    def _messages(self, request: Request, who: Device, room: str) -> Reply:
        limit = int(request.query("limit") or 10)
        back = request.query("dir") != "f"
        return _json(self.rooms.messages(who, room, request.query("from"), limit, back=back))

    def _unrecognized(self, request: Request) -> Refused:
        self.unknown[f"{request.method} {request.path}"[:120]] += 1
        return Refused(404, "M_UNRECOGNIZED", "Unrecognized request")


def _sent(event_id: str) -> Reply:
    return _json({"event_id": event_id})


class Listener:
    """The homeserver on its ports: it can be away for a while."""

    def __init__(self, homeserver: Homeserver, ports: list[int]) -> None:
        self.homeserver = homeserver
        self.open: set[Connection] = set()
        self._ports = ports
        self._servers: list[asyncio.Server] = []
        self._back: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for port in self._ports:
            made = await loop.create_server(partial(Connection, self, port), "127.0.0.1", port, backlog=1024)
            self._servers.append(made)

    def steer(self, request: Request) -> Reply:
        """The requests of a run's own, to which nothing goes wrong."""
        homeserver = self.homeserver
        match (request.method, request.path):
            case ("GET", "/_judge/stats"):
                return _json(homeserver.stats())
            case ("POST", "/_judge/faults"):
                try:
                    return _json(homeserver.faults.change(request.json()))
                except ValueError as error:
                    return _json({"error": str(error)}, 400)
            case ("POST", "/_judge/forget"):
                homeserver.rooms.forget()
                return _json({})
            case ("POST", "/_judge/logout"):
                homeserver.ended.add(request.query("token") or "")
                return _json({})
            case ("POST", "/_judge/down"):
                self._back = asyncio.get_running_loop().create_task(self._away(float(request.query("seconds") or 1)))
                return _json({})
            case _:
                return _json({"error": "no such command"}, 404)

    async def _away(self, seconds: float) -> None:
        await asyncio.sleep(0.01)  # so that the answer to this command gets through
        while self._servers:
            self._servers.pop().close()
        for connection in list(self.open):
            connection.transport.abort()
        await asyncio.sleep(seconds)
        await self.listen()


class Connection(asyncio.Protocol):
    """One connection: answers one request at a time, after the latency that is set."""

    transport: asyncio.Transport

    def __init__(self, listener: Listener, port: int) -> None:
        self._listener = listener
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._token, self._body = b"", "", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such
        self._listener.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.open.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.abort()

    # httptools

    def on_message_begin(self) -> None:
        self._url, self._token, self._body = b"", "", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._token = value.decode("latin-1").removeprefix("Bearer ")

    def on_body(self, chunk: bytes) -> None:
        self._body += chunk

    def on_message_complete(self) -> None:
        request = Request(self._parser.get_method().decode(), self._url.decode("latin-1"), self._token, self._body)
        if request.target.startswith("/_judge/"):
            self._write(self._listener.steer(request).wire())
            return
        if request.room:
            self._listener.homeserver.doors.enter(request.room, self._port)
        if latency := self._listener.homeserver.faults.latency_ms:
            # Stored only then, and stored also when the asker is gone by then: so is a real homeserver.
            self._loop.call_later(latency / 1000, self._serve, request)
        else:
            self._serve(request)

    def _serve(self, request: Request) -> None:
        homeserver = self._listener.homeserver
        if request.room:
            homeserver.doors.leave(request.room, self._port)
        reply, fault = homeserver.reply(request, self._loop.time())
        if reply is None:
            self.transport.abort()
        elif fault is Fault.DRIPPED:
            self._drip(reply.wire())
        else:
            self._write(reply.wire())

    def _drip(self, data: bytes) -> None:
        if data and not self.transport.is_closing():
            self._write(data[:1])
            self._loop.call_later(1.0, self._drip, data[1:])

    def _write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)


async def run(listener: Listener) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    homeserver = listener.homeserver
    commands: dict[signal.Signals, Callable[[], object]] = {
        signal.SIGUSR1: homeserver.rooms.forget,
        signal.SIGUSR2: lambda: homeserver.faults.change({"html": not homeserver.faults.html}),
        signal.SIGTERM: stop.set,
        signal.SIGINT: stop.set,
    }
    for number, command in commands.items():
        loop.add_signal_handler(number, command)
    await listener.listen()
    await stop.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.homeserver", description=__doc__)
    parser.add_argument(
        "--port", type=int, nargs="+", required=True, help="one for each bridge, so that it can tell them apart"
    )
    parser.add_argument("--log", type=Path, required=True, help="one line of JSON for each event, appended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remember-seconds", type=float, default=1800, help="how long a txnId is remembered")
    parser.add_argument("--rate", type=float, default=0, help="sends/s allowed to each user; 0: any number")
    parser.add_argument("--burst", type=int, default=10, help="sends allowed at once under --rate")
    for name in ("p429", "p500", "plost", "pdrop", "pdrip", "latency-ms"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--retry-after-ms", type=int, default=200, help="the most that a 429 of --p429 names")
    return parser.parse_args()


def main() -> None:
    options = _options()
    faults = Faults(**{one.name: vars(options)[one.name] for one in fields(Faults) if one.name in vars(options)})
    with options.log.open("ab", buffering=0) as log:
        rooms = Rooms(log, options.remember_seconds)
        homeserver = Homeserver(rooms, faults, seed=options.seed, rate=options.rate, burst=options.burst)
        uvloop.run(run(Listener(homeserver, options.port)))


if __name__ == "__main__":
    main()
