"""flowbridge.hooks.registry: which hook a request is for, and how seldom the store is asked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from flowbridge.errors import Unavailable
from flowbridge.hooks import secrets
from flowbridge.hooks.known import Secret
from flowbridge.hooks.registry import Registry
from flowbridge.models.hooks import Hook, Verification
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import Database, StoreUnavailable, clock, hooks
from tests.unit import Clock
from tests.unit.auth.test_api_keys import CountedDatabase

pytestmark = pytest.mark.usefixtures("nothing_set")

FERNET = Fernet(Fernet.generate_key())
BARE = Verification()
GITHUB = Verification("github")
TOKEN, OTHER = "fh_" + "t" * 43, "fh_" + "o" * 43
AWAY = StoreUnavailable("the store cannot be read: away")

Make = Callable[..., Registry]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[CountedDatabase]:
    database = CountedDatabase(f"sqlite:///{tmp_path}/hooks.db")
    database.open()
    database.start()
    yield database
    await database.stop()


@pytest.fixture
def ticks() -> Clock:
    return Clock()


@pytest.fixture
def make(database: Database, ticks: Clock, tmp_path: Path) -> Make:
    def make(file: str | None = None, *, fernet: Fernet = FERNET) -> Registry:
        values: dict[str, Any] = {}
        if file is not None:
            (tmp_path / "hooks.yaml").write_text(file)
            values["hooks_file"] = tmp_path / "hooks.yaml"
        registry = Registry(Settings.load(**values), database, timing=replace(Timing(), clock=ticks))
        registry.open(fernet)
        return registry

    return make


def add(database: Database, name: str, secret: str = TOKEN, verification: Verification = BARE) -> Hook:
    hook = Hook(name, "!room:hs", verification=verification)
    with database.engine.begin() as connection:
        kept = secrets.sealed(secret, verification.scheme, FERNET)
        assert hooks.add(connection, hook, kept, clock.now_ms()) == "added"
    return hook


def rotate(database: Database, name: str, secret: str, until: int, scheme: str = "token") -> None:
    with database.engine.begin() as connection:
        assert hooks.rotate(connection, name, secrets.sealed(secret, scheme, FERNET), clock.now_ms(), until)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    return [(record.msg, getattr(record, "fields", {})) for record in caplog.records]


async def test_hook_of_the_store_is_found_by_name_and_by_token(database: CountedDatabase, make: Make) -> None:
    hook = add(database, "ci")
    registry = make()
    await registry.refresh()
    known = await registry.find("ci")
    assert known is not None
    assert (known.hook, known.secrets) == (hook, (Secret(hooks.digest(TOKEN)),))
    assert await registry.find_by_token(TOKEN) == known
    assert database.reads == 1


async def test_secret_that_signs_is_known_itself_and_is_no_token(database: CountedDatabase, make: Make) -> None:
    add(database, "gh", "a secret-that_signs", GITHUB)
    registry = make()
    await registry.refresh()
    known = await registry.find("gh")
    assert known is not None
    assert [secret.text for secret in known.secrets] == ["a secret-that_signs"]
    assert await registry.find_by_token("a secret-that_signs") is None


async def test_two_hooks_may_sign_with_one_secret(database: CountedDatabase, make: Make) -> None:
    add(database, "one", TOKEN, GITHUB)
    add(database, "two", TOKEN, GITHUB)
    registry = make()
    await registry.refresh()
    assert [(await registry.find(name)).secrets[0].text for name in ("one", "two")] == [TOKEN, TOKEN]  # type: ignore[union-attr]


async def test_hook_made_just_now_is_found_at_once(database: CountedDatabase, make: Make) -> None:
    registry = make()
    await registry.refresh()
    hook = add(database, "ci")
    known = await registry.find("ci")
    assert known is not None
    assert known.hook == hook


async def test_store_is_read_once_a_second_for_all_unknown_hooks_and_wrong_secrets(
    database: CountedDatabase, make: Make, ticks: Clock
) -> None:
    add(database, "ci")
    registry = make()
    await registry.refresh()
    before = database.reads
    for number in range(20):
        assert await registry.find(f"unknown{number}") is None
        assert await registry.find_by_token(f"fh_{number}") is None
        await registry.since(ticks.now)
        assert await registry.find("ci") is not None
    assert database.reads == before + 1
    ticks.now += 1.1
    await registry.since(ticks.now)
    assert database.reads == before + 2


async def test_newer_secret_is_known_when_one_was_wrong(database: CountedDatabase, make: Make, ticks: Clock) -> None:
    add(database, "ci")
    registry = make()
    await registry.refresh()
    rotate(database, "ci", OTHER, clock.now_ms() + 60_000)
    ticks.now += 0.1
    await registry.since(ticks.now)
    known = await registry.find("ci")
    assert known is not None
    assert [secret.digest for secret in known.secrets] == [hooks.digest(OTHER), hooks.digest(TOKEN)]


async def test_old_secret_ends_at_its_time_although_the_store_is_away(
    database: CountedDatabase, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(database, "ci")
    until = clock.now_ms() + 60_000
    rotate(database, "ci", OTHER, until)
    registry = make()
    await registry.refresh()
    database.broken = AWAY
    assert await registry.find_by_token(TOKEN) is not None
    monkeypatch.setattr(clock, "now_ms", lambda: until)
    assert await registry.find_by_token(TOKEN) is None
    assert await registry.find_by_token(OTHER) is not None


async def test_store_that_is_away_keeps_known_hooks_and_knows_no_others(
    database: CountedDatabase, make: Make, ticks: Clock
) -> None:
    add(database, "ci")
    registry = make()
    await registry.refresh()
    database.broken = AWAY
    await registry.refresh()
    assert await registry.find("ci") is not None
    ticks.now += 0.1
    with pytest.raises(Unavailable, match="cannot be looked up"):  # a wrong secret, too: it may be a new one
        await registry.since(ticks.now)
    assert await registry.find("ci") is not None
    with pytest.raises(Unavailable, match="cannot be looked up"):
        await registry.find("other")
    with pytest.raises(Unavailable, match="cannot be looked up"):
        await registry.find_by_token(OTHER)
    database.broken = None
    ticks.now += 1.1
    assert await registry.find("other") is None


async def test_changed_and_deleted_hooks_are_known_after_a_refresh(database: CountedDatabase, make: Make) -> None:
    add(database, "ci")
    add(database, "old", OTHER)
    registry = make()
    await registry.refresh()
    with database.engine.begin() as connection:
        hooks.replace(connection, Hook("ci", "!other:hs"), 1)
        hooks.remove(connection, "old")
    await registry.refresh()
    known = await registry.find("ci")
    assert known is not None
    assert known.hook.room == "!other:hs"
    assert await registry.find("old") is None
    assert await registry.find_by_token(OTHER) is None


async def test_another_secret_key_is_said_and_is_no_wrong_secret(
    database: CountedDatabase, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    add(database, "gh", "s" * 20, GITHUB)
    add(database, "ci")
    registry = make(fernet=Fernet(Fernet.generate_key()))
    for _ in range(3):
        await registry.refresh()
    with pytest.raises(Unavailable, match="cannot check its senders"):
        await registry.find("gh")
    assert await registry.find_by_token(TOKEN) is not None  # a token needs no key
    told = [fields for action, fields in lines(caplog) if action == "hook_secret_unreadable"]
    assert len(told) == 1
    assert told[0]["hook"] == "gh"
    assert "FLOWBRIDGE_SECRET_KEY is not the one" in told[0]["hint"]


# hooks.yaml


FILE = f"""
- name: ci
  room: "!file:hs"
  verification: {{secret: {OTHER}}}
- name: own
  room: "#room:hs"
"""


async def test_hook_of_the_file_counts_and_the_log_says_so(
    database: CountedDatabase, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    add(database, "ci")
    registry = make(FILE)
    for _ in range(3):
        await registry.refresh()
    known = await registry.find("ci")
    assert known is not None
    assert (known.hook.room, known.hook.is_fixed) == ("!file:hs", True)
    assert await registry.find_by_token(OTHER) == known
    assert await registry.find_by_token(TOKEN) is None
    hidden = [fields for action, fields in lines(caplog) if action == "hook_hidden"]
    assert hidden == [{"hook": "ci", "hint": "hooks.yaml has a hook of this name, which counts"}]


async def test_hook_of_the_file_without_a_secret_has_one_of_the_store(
    database: CountedDatabase, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make(FILE)
    await registry.refresh()
    known = await registry.find("own")
    assert known is not None
    assert known.secrets == ()
    without = [fields for action, fields in lines(caplog) if action == "hook_without_secret"]
    assert without == [{"hook": "own", "hint": "`flowbridge hooks rotate own` makes one"}]
    rotate(database, "own", TOKEN, 0)
    await registry.refresh()
    assert (await registry.find_by_token(TOKEN)) is not None


async def test_file_is_read_again_and_a_bad_one_keeps_the_old(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make(FILE)
    path = tmp_path / "hooks.yaml"
    path.write_text("- name: Wrong Name\n  room: '!r:hs'\n")
    with pytest.raises(SettingsError, match="/0/name must be 1 to 64") as refused:
        registry.load()
    registry.keep(refused.value)
    assert "/0/name" in registry.trouble
    assert registry.hook("ci") is not None
    assert "hooks_file_refused" in caplog.text
    path.write_text("- name: new\n  room: '!r:hs'\n")
    registry.take(registry.load())
    assert registry.trouble == ""
    assert (registry.hook("ci"), registry.hook("new")) == (None, Hook("new", "!r:hs", is_fixed=True))


def test_bad_file_at_the_start_is_one_line(make: Make) -> None:
    with pytest.raises(SettingsError, match=r"FLOWBRIDGE_HOOKS_FILE: .*hooks.yaml: /0/room is required"):
        make("- name: x\n")


# what is noted


async def test_use_is_written_to_the_minute(database: CountedDatabase, make: Make, ticks: Clock) -> None:
    add(database, "ci")
    registry = make()
    await registry.refresh()
    for _ in range(10):
        registry.note_use("ci")
        registry.note_use("deleted")
        await registry.flush()
    assert database.writes == 1
    ticks.now += 61
    await registry.flush()
    assert database.writes == 2
    with database.reading() as connection:
        assert hooks.states(connection).keys() == {"ci"}
        assert hooks.state(connection, "ci").used_at is not None


async def test_failure_is_told_until_it_works_again(database: CountedDatabase, make: Make) -> None:
    add(database, "ci")
    registry, replica = make(), make()
    await registry.refresh()
    registry.note_failure("ci", "no such filter")
    assert registry.failing == {"ci": "no such filter"}
    await registry.flush()
    await replica.refresh()
    assert replica.failing == {"ci": "no such filter"}
    replica.note_failure("ci", "")
    await replica.flush()
    await registry.refresh()
    await replica.refresh()
    assert (registry.failing, replica.failing) == ({}, {})
    before = database.writes
    for _ in range(5):
        registry.note_failure("ci", "")
        await registry.flush()
    assert database.writes == before  # a template that works costs no write


async def test_what_is_asked_at_once_reads_once(database: CountedDatabase, make: Make) -> None:
    registry = make()
    database.gate.clear()
    waiting = asyncio.gather(*(registry.find(f"n{number}") for number in range(10)))
    await database.arrivals.get()
    database.gate.set()
    assert await waiting == [None] * 10
    assert database.reads == 1


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
