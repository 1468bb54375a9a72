"""flowbridge.limits.lookups: what was made a moment ago is found, and a flood of guesses is one read a second."""

import asyncio
import time
from collections.abc import Callable

import pytest

from flowbridge.errors import Unavailable
from flowbridge.limits.lookups import LookUps
from flowbridge.models.timing import Timing
from tests.unit import Clock


class Stored:
    """What another process makes, and what is known of it here."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.known: set[str] = set()
        self.reads = 0
        self.is_away = False
        self.begun = asyncio.Event()

    async def read(self) -> bool:
        self.reads += 1
        self.begun.set()
        found = set(self.there)
        await asyncio.sleep(0)
        if self.is_away:
            raise Unavailable("away")
        self.known = found
        return True


def make(stored: Stored, clock: Callable[[], float] = time.monotonic, seconds: float = 0.1) -> LookUps:
    return LookUps(
        stored.read, "unread", "it cannot be looked up", timing=Timing(clock=clock, key_lookup_seconds=seconds)
    )


async def test_what_was_made_after_the_last_look_is_found_by_the_next() -> None:
    stored = Stored()
    lookups = make(stored)
    await lookups.look()
    stored.there.add("new")
    asked = time.monotonic()
    await lookups.look()
    assert not stored.known, "there was a look just before"
    await lookups.since(asked)
    assert stored.known == {"new"}


async def test_a_read_that_began_before_says_nothing_of_what_was_made_meanwhile() -> None:
    stored = Stored()
    lookups = make(stored)
    reading = asyncio.ensure_future(lookups.look())
    await stored.begun.wait()
    stored.there.add("new")
    await lookups.since(time.monotonic())
    assert stored.known == {"new"}
    await reading


async def test_a_flood_of_guesses_waits_for_one_read_together() -> None:
    stored = Stored()
    lookups = make(stored, seconds=0.2)
    began = time.monotonic()
    for _ in range(3):
        await asyncio.gather(*(lookups.since(time.monotonic()) for _ in range(500)))
    assert stored.reads == 3
    assert time.monotonic() - began >= 0.4


async def test_what_was_read_since_is_waited_for_no_longer() -> None:
    stored, clock = Stored(), Clock()
    lookups = make(stored, clock)
    await lookups.look()
    await lookups.since(clock.now)
    assert stored.reads == 1


async def test_a_store_that_is_away_is_said_at_once() -> None:
    stored, clock = Stored(), Clock()
    stored.is_away = True
    lookups = make(stored, clock)
    with pytest.raises(Unavailable, match="it cannot be looked up"):
        await lookups.since(clock.now)
    stored.is_away = False
    clock.now += 1
    await lookups.since(clock.now)
    lookups.check()
