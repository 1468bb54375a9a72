"""Suspects: events that the homeserver answers 5xx to again and again, while it takes others.

Such an event would hold up its lane for a week, and becomes a dead letter after minutes. An outage must not look like
that, so only what tells the two apart counts:

- tries that the homeserver itself answered with a Matrix error (no timeout, no page of a proxy), if an event of another
  lane was sent since the previous try. During a total outage no try counts;
- at least TRIES of them, over the seconds of FLOWBRIDGE_SET_ASIDE_SECONDS;
- most events sent meanwhile were sent at their first try, which they are not where a homeserver fails at random;
- a look-up has not found the event: a 5xx may come after it was stored.

Sent events are read from the store, so that the judgement survives restarts and spans replicas. The lane's next event
has to fail for twice as long, since the fault may be the room's.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from flowbridge.errors import HomeserverError
from flowbridge.homeserver.answers import Verdict
from flowbridge.models.timing import Timing
from flowbridge.store import Database, outbox

TRIES = 5
PASSES = 3  # events sent meanwhile, at least
SHARE = 0.75  # of them at their first try
RECENT = 200  # sent events that are read
MAX_FACTOR = 4
MAX_REPEATS = 10_000  # lanes that are remembered


@dataclass(frozen=True, slots=True)
class Suspicion:
    """`times`: tries that count; `since`: when the first of them began (ms); `counts`: whether this one does.

    `is_due`: set it aside once it was looked for and not found, and then failed in a try that counts.
    """

    times: int = 0
    since: int = 0
    is_due: bool = False
    counts: bool = False

    def entry(self) -> list[int]:
        """As the event's history stores it."""
        return [self.times, self.since, int(self.is_due)]


class Suspects:
    """`seconds`: for how long an event has to fail; 0: none is set aside. For one event loop."""

    def __init__(self, database: Database, seconds: float, *, timing: Timing = Timing()) -> None:
        self._database = database
        self._seconds = seconds
        self._recent_seconds = timing.recent_seconds
        self._factors: dict[str, int] = {}  # by lane whose last event was set aside
        self._recent: list[tuple[int, int]] = []  # when events were sent (ms), the newest first, and their attempts
        self._read_at = 0.0  # monotonic
        self._reading = asyncio.Lock()

    async def weigh(self, lane: str, history: Sequence[Mapping[str, Any]], started: float, found: Verdict) -> Suspicion:
        """Judge one more try, which began at `started`."""
        if not self._seconds or not is_failure(found):
            return Suspicion()
        before = last_failure(history)
        if before is None:
            return Suspicion()
        times, since, was_due = before["failed"]
        recent = await self._sent()
        if not recent or recent[0][0] <= before["at"] + before["ms"]:
            return Suspicion(times, since, bool(was_due))
        times, since = times + 1, since or int(started * 1000)
        seconds = self._seconds * self._factors.get(lane, 1)
        is_due = times >= TRIES and started - since / 1000 >= seconds and _pass_at_once(recent, since)
        return Suspicion(times, since, is_due, counts=True)

    def set_aside(self, lane: str) -> None:
        if len(self._factors) >= MAX_REPEATS:
            del self._factors[next(iter(self._factors))]
        self._factors[lane] = min(2 * self._factors.get(lane, 1), MAX_FACTOR)

    def passed(self, lane: str) -> None:
        """An event of the lane was sent."""
        if self._factors:
            self._factors.pop(lane, None)

    async def _sent(self) -> list[tuple[int, int]]:
        """The events sent last; none if the store cannot be read."""
        async with self._reading:
            if time.monotonic() - self._read_at >= self._recent_seconds:
                try:
                    self._recent = await self._database.read(lambda connection: outbox.sent_last(connection, RECENT))
                except Exception:  # no evidence against the event
                    self._recent = []
                self._read_at = time.monotonic()
            return self._recent


def is_failure(found: Verdict) -> bool:
    """Whether the homeserver itself failed at the send, not at a question before it: a 5xx with a Matrix error."""
    error = found.error
    return found.kind == "again" and isinstance(error, HomeserverError) and error.status >= 500 and error.sent


def must_be_looked_for(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the next attempt has to look for the event first: if it is not in its room, it may be set aside."""
    before = last_failure(history)
    return before is not None and bool(before["failed"][2])


def last_failure(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last try that the homeserver failed at, since the last replay."""
    since = takewhile(lambda entry: "replayed" not in entry, reversed(history))
    return next((entry for entry in since if "failed" in entry), None)


def _pass_at_once(recent: Sequence[tuple[int, int]], since: int) -> bool:
    attempts = [tried for sent_at, tried in recent if sent_at > since]
    return len(attempts) >= PASSES and sum(tried <= 1 for tried in attempts) >= SHARE * len(attempts)
