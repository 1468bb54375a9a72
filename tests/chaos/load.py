"""The load: numbered events, each repeated under its own key until it has an answer, room by room in order."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Literal
from urllib.parse import quote

from tests.chaos import stories
from tests.chaos.client import Answer, Client, NoAnswer

Mode = Literal["async", "wait", "mixed"]
Kind = Literal["keyed", "fire", "state", "matrix", "hook"]

PAUSE_SECONDS = 0.05  # between two tries of one event
MAX_PAUSE_SECONDS = 1.0
# Keys count for user, device, room and type (contract, "Waiting"): so the same one stands over events of both types and
# in all rooms, where a homeserver that was given it as a txnId would take the second for a repeat of the first.
TYPES = ("m.room.message", "chaos.test.note")
STATE_TYPE = "chaos.test.state"  # no transaction id protects it: what is sent again late sets the room back
ANSWER_SECONDS = 15.0  # longer than the 10 s that a bridge waits by default
TOLD_TWICE = 0.3  # of the events of a hook: by the other member of an HA pair, too
REPEATED = frozenset({408, 425, 429})  # and every 5xx: anything else is the bridge's last word


@dataclass(frozen=True)
class Plan:
    """What to send. `rate`: events/s in all, 0 for as fast as the answers come.

    `fire`: further rooms whose events have no key and are never repeated: what has no answer may be there or not, what
    has a 503 must not.
    `states`: further rooms that get state events. `matrix`: further rooms that a Matrix client sends to, by PUT and
    transaction id. `hooks`: further rooms whose hooks are told stories. `headers`: the callers; the rooms take turns.
    `real`: ids of rooms that there are; else names are made up.
    """

    urls: tuple[str, ...]
    headers: tuple[dict[str, str], ...]
    rooms: int = 32
    fire: int = 0
    states: int = 0
    matrix: int = 0
    hooks: int = 0
    mode: Mode = "mixed"
    rate: float = 0.0
    name: str = "run"
    seed: int = 0
    real: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rooms in all."""
        return len(self.kinds())

    def kinds(self) -> list[Kind]:
        """Of the rooms, in their order."""
        counts: dict[Kind, int] = {
            "keyed": self.rooms,
            "fire": self.fire,
            "state": self.states,
            "matrix": self.matrix,
            "hook": self.hooks,
        }
        return [kind for kind, count in counts.items() for _ in range(count)]

    def room_ids(self) -> list[str]:
        """They bear the run's name: a database may hold what an earlier run left."""
        return list(self.real) or [f"!{self.name}-{index:03d}:chaos.test" for index in range(self.size)]

    def hook_rooms(self) -> list[str]:
        return [room for room, kind in zip(self.room_ids(), self.kinds(), strict=False) if kind == "hook"]


@dataclass
class Load:
    """Sends while `run` runs.

    `refused`: what the bridge would not take, by status; `answers`: how often each status came, and whether it said
    when to come again, apart for the Matrix surface; `under_way`: the events without an answer yet, with what their
    last try met.
    """

    plan: Plan
    log: RawIOBase
    accepted: int = 0
    tries: int = 0
    under_way: dict[str, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Returns some time after `stop`, when every event under way has an answer."""
        chance = random.Random(self.plan.seed)
        async with asyncio.TaskGroup() as group:
            for index, (room, kind) in enumerate(zip(self.plan.room_ids(), self.plan.kinds(), strict=False)):
                sender = _Sender(self, index, room, kind, random.Random(chance.random()))
                group.create_task(sender.run())

    def stop(self) -> None:
        """No new events."""
        self.stopping.set()

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share of the accepted requests had their answer."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def accept(self, room: str, n: int, answer: Answer, ms: float) -> None:
        self.note(room, n, answer, ms)
        self.accepted += 1
        self.milliseconds.append(ms)

    def note(self, room: str, n: int, answer: Answer, ms: float) -> None:
        """For the judgement."""
        event_id = answer.json().get("event_id") if answer.status == 200 else None
        line = {"room": room, "n": n, "status": answer.status, "event_id": event_id, "at": time.time(), "ms": ms}
        self.log.write(json.dumps(line).encode() + b"\n")


class _Sender:
    """One room: n + 1 goes out when n has its answer. Stays with a bridge until that fails."""

    def __init__(self, load: Load, index: int, room: str, kind: Kind, chance: random.Random) -> None:
        plan = load.plan
        self._load = load
        self._room = room
        self._chance = chance
        self._kind = kind
        self._headers = {"Content-Type": "application/json", **plan.headers[index % len(plan.headers)]}
        self._clients = [Client(url) for url in plan.urls]
        self._at = index % len(self._clients)
        self._every = plan.size / plan.rate if plan.rate else 0.0
        self._due = self._every * chance.random()

    async def run(self) -> None:
        began = time.monotonic()
        try:
            for n in self._numbers():
                if self._every:
                    await self._until(began + self._due)
                    self._due += self._every
                if self._load.stopping.is_set():
                    return
                await self._send(n)
        finally:
            for client in self._clients:
                client.close()

    def _numbers(self) -> Iterator[int]:
        n = 0
        while not self._load.stopping.is_set():
            yield n
            n += 1

    async def _until(self, due: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._load.stopping.wait(), max(0.0, due - time.monotonic()))

    async def _send(self, n: int) -> None:
        if self._kind == "hook":
            await self._tell(n)
            return
        content = {"msgtype": "m.text", "body": f"{self._room}#{n}", "n": n}
        key = f"{self._load.plan.name}-{n if self._kind == 'state' else n // len(TYPES)}"
        headers = self._headers | self._prefer()
        if self._kind in ("keyed", "state"):
            headers["Idempotency-Key"] = key
        request = (*self._target(n, key), json.dumps(content).encode(), headers)
        while not await self._try(n, *request) and self._kind != "fire":
            pass
        self._load.under_way.pop(f"{self._room}#{n}", None)

    async def _tell(self, n: int) -> None:
        """An event of a story, as Alertmanagers tell it: each until it is heard, or, with a bad connection, both."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {stories.secret_of(self._room)}"}
        target = f"/hooks/{stories.hook_of(self._room)}"
        while not await self._try(n, "POST", target, stories.body(self._room, n), headers):
            pass
        self._load.under_way.pop(f"{self._room}#{n}", None)
        if self._chance.random() < TOLD_TWICE:
            with suppress(NoAnswer):
                client = self._clients[self._at]
                await client.ask("POST", target, stories.body(self._room, n, 1), headers, seconds=ANSWER_SECONDS)

    def _target(self, n: int, key: str) -> tuple[str, str]:
        room, event_type = f"/rooms/{quote(self._room, safe='')}", TYPES[n % len(TYPES)]
        if self._kind == "state":
            return "PUT", f"{room}/state/{STATE_TYPE}"
        if self._kind == "matrix":
            return "PUT", f"/_matrix/client/v3{room}/send/{event_type}/{key}"
        return "POST", f"{room}/send/{event_type}"

    def _prefer(self) -> dict[str, str]:
        mode = self._load.plan.mode
        chosen = mode == "async" or (mode == "mixed" and self._chance.random() < 0.5)
        return {"Prefer": "respond-async"} if chosen else {}

    async def _try(self, n: int, method: str, target: str, body: bytes, headers: dict[str, str]) -> bool:
        """Whether the event needs no further try."""
        self._load.tries += 1
        began = time.monotonic()
        try:
            client = self._clients[self._at]
            answer = await client.ask(method, target, body, headers, seconds=ANSWER_SECONDS)
        except NoAnswer as error:
            self._load.under_way[f"{self._room}#{n}"] = str(error)
            self._at = (self._at + 1) % len(self._clients)
            await asyncio.sleep(PAUSE_SECONDS)
            return False
        self._load.answers[self._shown(answer)] += 1
        if answer.status in (200, 202):
            self._load.accept(self._room, n, answer, (time.monotonic() - began) * 1000)
            return True
        if answer.status < 500 and answer.status not in REPEATED:
            self._load.refused[f"{answer.status} {answer.body[:120].decode(errors='replace')}"] += 1
            return True
        if answer.status == 503 and self._kind == "fire":
            self._load.note(self._room, n, answer, (time.monotonic() - began) * 1000)
        self._load.under_way[f"{self._room}#{n}"] = f"{answer.status} {answer.body[:120].decode(errors='replace')}"
        self._at = (self._at + 1) % len(self._clients)
        await asyncio.sleep(_pause(answer))
        return False

    def _shown(self, answer: Answer) -> str:
        surface = "Matrix " if self._kind == "matrix" else ""
        return f"{surface}{answer.status}{' + Retry-After' * ('retry-after' in answer.headers)}"


def _pause(answer: Answer) -> float:
    """What the answer asks for, but not so long that the load dries up."""
    asked = answer.headers.get("retry-after", "")
    seconds = float(asked) if asked.isdigit() else PAUSE_SECONDS
    return min(max(seconds, PAUSE_SECONDS), MAX_PAUSE_SECONDS)
