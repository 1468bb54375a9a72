"""The faulty homeserver of a run: `python -m tests.chaos.faulty_homeserver --port N --log FILE`.

An upstream (`tests/upstream.py`) that serves what a bridge calls, dedupes as Synapse does, and fails by chance or on
demand. SIGUSR1: it forgets the transactions it remembers. SIGUSR2: a proxy in front answers 404 in HTML to everything,
until the next SIGUSR2. A run steers it by GET /_judge/stats, POST /_judge/faults (JSON), POST /_judge/forget,
POST /_judge/logout?token=T (from then on it is unknown) and POST /_judge/down?seconds=N (nothing listens).
"""

import argparse
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.faults import Fault, Faults, Limiter
from tests.chaos.rooms import Content, Device, Rooms, device_of, sum_of
from tests.upstream import Behaviour, Connection, Request, Upstream, drip, encoded, hang_up, raw

CLOSED = "!closed"  # prefix of the ids of rooms that have no members
HTML = b"<html><head><title>404 Not Found</title></head><body><h1>404 Not Found</h1>nginx</body></html>"

FAILURE = {"errcode": "M_UNKNOWN", "error": "Internal server error"}
POISON = "poison"  # an event with this key in its content gets a 500 each time


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, errcode: str, error: str, *, wait: float = 0.0) -> None:
        super().__init__(error)
        body: Content = {"errcode": errcode, "error": error}
        headers = []
        if wait:
            body["retry_after_ms"] = math.ceil(wait * 1000)
            headers.append(f"Retry-After: {math.ceil(wait)}")
        self.reply = _json(body, status, *headers)


def _json(body: Content, status: int = 200, *headers: str) -> bytes:
    return encoded(status, json.dumps(body).encode(), "Content-Type: application/json", *headers)


class Doors:
    """The bridges that are sending into a room at the moment: each bridge has a port of its own.

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


class FaultyHomeserver(Upstream):
    """`rate` 0: no rate limit."""

    def __init__(
        self,
        rooms: Rooms,
        faults: Faults,
        *,
        ports: Sequence[int] = (0,),
        seed: int = 0,
        rate: float = 0.0,
        burst: int = 10,
    ) -> None:
        super().__init__(self._behave, ports=ports, keep=False)
        self.rooms = rooms
        self.faults = faults
        self.doors = Doors()
        self.asked = 0
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
            "requests": self.asked,
            "events": len(self.rooms.events),
            "repeats": self.rooms.repeats,
            "stale": self.rooms.stale,
            "overlaps": self.doors.overlaps,
            "given": dict(self.given),
            "unknown": dict(self.unknown),
            "limits": limits,
        }

    def serve(self) -> None:
        """Until SIGTERM or SIGINT."""
        commands: dict[int, Callable[[], object]] = {
            signal.SIGUSR1: self.rooms.forget,
            signal.SIGUSR2: lambda: self.faults.change({"html": not self.faults.html}),
        }
        known = {*commands, signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, known)  # before there are threads, which inherit it
        with self:
            while (number := signal.sigwait(known)) in commands:
                with self._changed:
                    commands[number]()

    def _behave(self, request: Request) -> Behaviour:
        if request.target.startswith("/_judge/"):
            return self._steer(request)
        room = _room_of(request)
        if room:
            self.doors.enter(room, request.port)
        if not self.faults.latency_ms:
            return self._served(request, room)

        def late(connection: Connection) -> None:
            # Stored only then, and stored even if the client is gone by then: a real homeserver does the same.
            connection.stopping.wait(self.faults.latency_ms / 1000)
            with self._changed:
                behaviour = self._served(request, room)
            behaviour(connection)

        return late

    def _served(self, request: Request, room: str) -> Behaviour:
        if room:
            self.doors.leave(room, request.port)
        reply, fault = self._reply(request)
        if reply is None:
            return hang_up
        return drip(reply) if fault is Fault.DRIPPED else raw(reply)

    def _steer(self, request: Request) -> Behaviour:
        """The requests of a run's own, which never fail."""
        done: Content = {}
        match (request.method, request.path):
            case ("GET", "/_judge/stats"):
                done = self.stats()
            case ("POST", "/_judge/faults"):
                try:
                    done = self.faults.change(_content(request))
                except ValueError as error:
                    return raw(_json({"error": str(error)}, 400))
            case ("POST", "/_judge/forget"):
                self.rooms.forget()
            case ("POST", "/_judge/logout"):
                self.ended.add(request.query("token") or "")
            case ("POST", "/_judge/down"):
                return partial(self._go, float(request.query("seconds") or 1))
            case _:
                return raw(_json({"error": "no such command"}, 404))
        return raw(_json(done))

    def _go(self, seconds: float, connection: Connection) -> None:
        connection.send(_json({}))
        self.go_away(seconds)

    def _reply(self, request: Request) -> tuple[bytes | None, Fault | None]:
        """The answer (None: hang up) and what goes wrong with it."""
        self.asked += 1
        if self.faults.html:
            self.given["html 404"] += 1
            return encoded(404, HTML, "Content-Type: text/html"), None
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
            answer = self._answer(request)
        except Refused as refused:
            answer = refused.reply
        if fault is Fault.FAILED_LATE:
            return _json(FAILURE, 500), fault
        return (None if fault is Fault.LOST else answer), fault

    def _early(self, fault: Fault | None) -> bytes | None:
        """The answer of a fault that keeps the request from being processed."""
        if fault is Fault.LIMITED:
            wait = self._chance.uniform(0.2, 1.0) * self.faults.retry_after_ms
            body = {"errcode": "M_LIMIT_EXCEEDED", "error": "Too Many Requests", "retry_after_ms": math.ceil(wait)}
            return _json(body, 429)
        if fault is Fault.FAILED:
            return _json(FAILURE, 500)
        return None

    def _answer(self, request: Request) -> bytes:
        parts = request.parts
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
        return self._call(request, parts[3:], who)

    def _call(self, request: Request, parts: list[str], who: Device) -> bytes:
        if parts[:1] == ["rooms"] and parts[1].startswith(CLOSED):
            raise Refused(403, "M_FORBIDDEN", "User not in room")
        match (request.method, *parts):
            case ("PUT", "rooms", room, "send", kind, txn_id):
                return self._send(request, who, room, kind, txn_id)
            case ("PUT", "rooms", room, "state", kind, *key):
                return _sent(self.rooms.put_state(who, room, kind, "/".join(key), _content(request)))
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
            case ("POST", "user_directory", "search"):  # shows what arrived (fuzzer.py)
                return _json({"results": [], "limited": False, "sha256": sum_of(request.body)})
            case ("GET", "directory", "room", alias):
                return _json({"room_id": alias.replace("#", "!", 1), "servers": ["chaos.test"]})
            case _:
                raise self._unrecognized(request)

    def _send(self, request: Request, who: Device, room: str, kind: str, txn_id: str) -> bytes:
        if self._rate:
            limiter = self._limiters.setdefault(who.user, Limiter(self._rate, self._burst))
            if wait := limiter.wait(time.monotonic()):
                raise Refused(429, "M_LIMIT_EXCEEDED", "Too Many Requests", wait=wait)
        content = _content(request)
        if POISON in content:
            self.given["500 to a poisoned event"] += 1
            raise Refused(500, FAILURE["errcode"], FAILURE["error"])
        return _sent(self.rooms.send(who, room, kind, txn_id, content))

    def _state(self, who: Device, room: str, kind: str, key: str) -> bytes:
        found = self.rooms.state(room, kind, key)
        if found is None and kind == "m.room.member" and key == who.user:
            found = {"membership": "join"}
        if found is None:
            raise Refused(404, "M_NOT_FOUND", "Event not found.")
        return _json(found)

    def _messages(self, request: Request, who: Device, room: str) -> bytes:
        limit = int(request.query("limit") or 10)
        back = request.query("dir") != "f"
        return _json(self.rooms.messages(who, room, request.query("from"), limit, back=back))

    def _unrecognized(self, request: Request) -> Refused:
        self.unknown[f"{request.method} {request.path}"[:120]] += 1
        return Refused(404, "M_UNRECOGNIZED", "Unrecognized request")


def _sent(event_id: str) -> bytes:
    return _json({"event_id": event_id})


def _room_of(request: Request) -> str:
    """Where it wants to send, as the path has it; empty for all but sends."""
    for way in ("/send/", "/state/"):
        if request.method == "PUT" and way in request.path:
            return request.path.partition(way)[0]
    return ""


def _content(request: Request) -> Content:
    """The body's object. Raises Refused."""
    try:
        found = json.loads(request.body or b"{}")
    except ValueError:
        raise Refused(400, "M_NOT_JSON", "not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "M_BAD_JSON", "not an object")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.faulty_homeserver", description=__doc__)
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
        FaultyHomeserver(
            rooms, faults, ports=options.port, seed=options.seed, rate=options.rate, burst=options.burst
        ).serve()


if __name__ == "__main__":
    main()
