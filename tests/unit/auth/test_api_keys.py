"""flowbridge.auth.api_keys: which key it is, and how seldom the store is asked."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from flowbridge.auth.api_keys import ApiKeys
from flowbridge.errors import Unavailable
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database, StoreUnavailable
from flowbridge.store import api_keys as keys
from tests.unit import Clock

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("nothing_set")

MEGABYTE = 1024 * 1024
STRANGE = ["", "fb_", "fb_é\xff\x00", "fb_\ud800", "fb_😀", " fb_x", "FB_x", "fb_" + "x" * MEGABYTE, "x" * MEGABYTE]


class CountedDatabase(Database):
    """Counts what is read; `gate` holds it back, `broken` makes it fail."""

    reads = 0
    broken: StoreUnavailable | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.arrivals: asyncio.Queue[int] = asyncio.Queue()
        self.departures: asyncio.Queue[int] = asyncio.Queue()
        self.writes = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, work: Callable[[Connection], T]) -> T:
        self.reads += 1
        self.arrivals.put_nowait(self.reads)
        await self.gate.wait()
        if self.broken:
            raise self.broken
        found = await super().read(work)
        self.departures.put_nowait(self.reads)
        return found

    def run(self, work: Callable[[Connection], T], **how: Any) -> "asyncio.Future[T]":
        self.writes += 1
        return super().run(work, **how)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[CountedDatabase]:
    database = CountedDatabase(f"sqlite:///{tmp_path}/keys.db")
    database.open()
    database.start()
    yield database
    await database.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(
    database: Database, *, clock: Callable[[], float] = time.monotonic, timing: Timing = Timing(), **values: Any
) -> ApiKeys:
    return ApiKeys(Settings.load(**values), database, timing=replace(timing, clock=clock))


def add(database: Database, id_: str, **scopes: Any) -> str:
    """A key in the store, as `flowbridge keys create` would make it."""
    secret = keys.new_secret()
    with database.engine.begin() as connection:
        keys.add(connection, ApiKey(id_, **scopes), secret)
    return secret


def revoke(database: Database, id_: str) -> None:
    with database.engine.begin() as connection:
        keys.revoke(connection, id_)


# which key it is


async def test_key_of_the_store_is_found_with_its_scopes(database: CountedDatabase) -> None:
    one = add(database, "one", name="Backup", rooms=("!a:hs",), event_types=("m.room.*",), admin=True)
    two = add(database, "two")
    ring = make(database)
    await ring.refresh()
    assert await ring.find(one) == ApiKey("one", "Backup", ("!a:hs",), ("m.room.*",), admin=True)
    assert await ring.find(two) == ApiKey("two")
    assert database.reads == 1


async def test_key_made_just_now_is_found_at_once(database: CountedDatabase, clock: Clock) -> None:
    ring = make(database, clock=clock)
    await ring.refresh()
    secret = add(database, "new")
    assert await ring.find(secret) == ApiKey("new")


async def test_those_who_come_while_the_store_is_read_wait_for_it(database: CountedDatabase, clock: Clock) -> None:
    ring = make(database, clock=clock)
    one, two = add(database, "one"), add(database, "two")
    database.gate.clear()
    waiting = asyncio.gather(ring.find(one), ring.find(two), ring.find("fb_wrong"))
    await database.arrivals.get()
    database.gate.set()
    assert list(await waiting) == [ApiKey("one"), ApiKey("two"), None]
    assert database.reads == 1


async def test_store_was_read_once_that_has_come_to_an_end(database: CountedDatabase) -> None:
    """A refresh that was begun before says nothing of a key that was made since, and it may end first."""
    ring = make(database)
    database.gate.clear()
    refreshing = asyncio.ensure_future(ring.refresh())
    await asyncio.sleep(0)
    moment = time.monotonic()
    looking = asyncio.ensure_future(ring.find("fb_new"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert database.reads == 2
    assert not ring.was_read_since(moment)
    database.gate.set()
    await asyncio.gather(refreshing, looking)
    assert ring.was_read_since(moment)


async def test_revoked_key_is_refused_after_the_next_refresh(database: CountedDatabase) -> None:
    ring = make(database)
    secret = add(database, "one")
    await ring.refresh()
    revoke(database, "one")
    assert await ring.find(secret)
    await ring.refresh()
    assert await ring.find(secret) is None


@pytest.mark.parametrize("secret", STRANGE, ids=lambda secret: f"{len(secret)}-{secret[:6]!a}")
async def test_strange_key_is_just_a_wrong_one(database: CountedDatabase, secret: str) -> None:
    add(database, "one")
    assert await make(database).find(secret) is None
    assert await make(database, api_keys="fb_key-of-32-characters-and-some-more").find(secret) is None


async def test_keys_of_the_settings_count_instead_of_stored_ones(database: CountedDatabase) -> None:
    stored = add(database, "one")
    one, two = (f"fb_{name}{'-' * 32}" for name in ("one", "two"))
    ring = make(database, api_keys=f"{one},{two}")
    await ring.refresh()
    found = [await ring.find(secret) for secret in (one, two, "fb_three", stored)]
    assert found[2:] == [None, None]
    assert found[0] == ApiKey(f"fixed-{keys.digest(one).hex()[:8]}", admin=True)
    assert found[1] != found[0]
    assert database.reads == 0


async def test_store_that_is_not_open_has_no_keys(tmp_path: Path) -> None:
    ring = make(Database(f"sqlite:///{tmp_path}/never.db"))
    await ring.refresh()
    assert await ring.find("fb_x") is None


async def test_a_key_is_found_by_its_digest_however_many_there_are(database: CountedDatabase) -> None:
    """Whose time says nothing of the keys: no one can choose a guess by the digest that it will have."""
    first = add(database, "first")
    with database.engine.begin() as connection:
        for number in range(200):
            keys.add(connection, ApiKey(str(number)), f"fb_{number}")
    ring = make(database)
    await ring.refresh()
    for secret in (first, "fb_7", "fb_wrong"):
        assert calls(lambda secret=secret: ring.known(secret)) < 20  # type: ignore[misc]


def calls(work: Callable[[], object]) -> int:
    """How many functions it calls, those that are written in C among them."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


async def test_keys_are_read_again_only_when_there_are_others(
    database: CountedDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    valid = keys.valid

    def reading(connection: Connection) -> list[tuple[bytes, ApiKey]]:
        found = valid(connection)
        read.append(len(found))
        return found

    monkeypatch.setattr(keys, "valid", reading)
    ring = make(database)
    for change in (lambda: add(database, "one"), lambda: add(database, "two"), lambda: revoke(database, "one")):
        change()
        for _ in range(3):
            await ring.refresh()
    assert read == [1, 2, 1]
    assert database.reads == 9


# attackers, and a store that is away


async def test_flood_of_unknown_keys_is_one_query_a_second(database: CountedDatabase, clock: Clock) -> None:
    ring = make(database, clock=clock)
    for second in range(1, 4):
        assert not any([await ring.find(f"fb_{second}-{number}") for number in range(200)])
        assert not any(await asyncio.gather(*(ring.find(f"fb_{number}") for number in range(200))))
        assert database.reads == second
        clock.now += 1.0


async def test_flood_does_not_keep_a_new_key_out_for_long(database: CountedDatabase, clock: Clock) -> None:
    ring = make(database, clock=clock)
    await ring.find("fb_wrong")
    secret = add(database, "new")
    assert await ring.find(secret) is None
    await ring.refresh()
    assert await ring.find(secret) == ApiKey("new")


async def test_what_is_no_key_costs_no_query(database: CountedDatabase) -> None:
    assert await make(database).find("unprefixed") is None
    assert database.reads == 0


async def test_store_that_is_away_keeps_what_was_known(
    database: CountedDatabase, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    secret = add(database, "one")
    ring = make(database, clock=clock)
    await ring.refresh()
    database.broken = StoreUnavailable("locked")
    for _ in range(3):
        await ring.refresh()
        assert await ring.find(secret) == ApiKey("one")
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await ring.find("fb_wrong")
            assert caught.value.status == 503
        clock.now += 1.5
    assert [record.msg for record in caplog.records].count("keys_unread") == 1
    database.broken = None
    assert await ring.find("fb_wrong") is None


async def test_store_that_hangs_is_not_waited_for_long(database: CountedDatabase, clock: Clock) -> None:
    ring = make(database, clock=clock, timing=Timing(key_patience_seconds=0.01))
    database.gate.clear()
    for _ in range(3):
        with pytest.raises(Unavailable):
            await ring.find("fb_wrong")
        clock.now += 1.5
    assert database.reads == 1
    database.gate.set()
    await database.departures.get()
    assert await ring.find("fb_wrong") is None


async def test_no_key_gets_into_the_log(database: CountedDatabase, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = add(database, "one")
    clock = Clock()
    ring = make(database, clock=clock)
    await ring.find(secret)
    await ring.find("fb_canary")
    database.broken = StoreUnavailable("locked")
    clock.now += 2
    with pytest.raises(Unavailable) as caught:
        await ring.find("fb_canary")
    said = caplog.text + str(caught.value) + "".join(str(vars(record)) for record in caplog.records)
    assert "keys_unread" in said
    assert secret not in said
    assert "canary" not in said


# last use


async def test_use_is_noted_to_the_minute(database: CountedDatabase, clock: Clock) -> None:
    one, _ = add(database, "one"), add(database, "two")
    ring = make(database, clock=clock)

    async def used() -> list[bool]:
        await database.run(lambda _: None)  # what was queued before is written then
        return [entry.used_at is not None for entry in await database.read(keys.every)]

    await ring.find(one)
    await ring.refresh()
    assert await used() == [True, False]
    await database.run(lambda connection: keys.note_use(connection, {"one": 2**53}))
    clock.now += 59
    await ring.find(one)
    noted = database.writes
    await ring.refresh()
    assert database.writes == noted
    clock.now += 2
    await ring.refresh()
    assert database.writes == noted + 1
    await used()
    assert (await database.read(keys.every))[0].used_at == 2**53, "an earlier use does not count any more"
