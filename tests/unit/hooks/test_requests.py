"""flowbridge.hooks.requests: what is kept of requests, and that nobody waits for it."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from flowbridge.hooks import requests as module
from flowbridge.hooks.requests import MAX_BODY, Request, Requests
from flowbridge.models.hooks import Hook
from flowbridge.store import Database, StoreUnavailable, hooks

FERNET = Fernet(Fernet.generate_key())
HOOK = Hook("ci", "!room:hs", keep_requests=3)
CANARY = "canary-of-31-visible-characters"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    database.start()
    yield database
    await database.stop()


@pytest.fixture
def requests(database: Database) -> Requests:
    found = Requests(database)
    found.open(FERNET)
    return found


async def test_request_comes_back_as_it_was(requests: Requests) -> None:
    requests.note(HOOK, Request({"X-Event": "push"}, '{"a": "é"}', outcome={"delivery_id": "d"}))
    (found,) = await requests.of("ci")
    assert (found.headers, found.body, found.is_text) == ({"x-event": "push"}, '{"a": "é"}', False)
    assert (found.size, found.is_cut, found.outcome) == (11, False, {"delivery_id": "d"})
    assert found.received_at > 0
    assert await requests.one("ci", found.id) == found
    for wrong in ("0", "-1", "x", "", "٣", "9" * 30):
        assert await requests.one("ci", wrong) is None
    assert await requests.one("other", found.id) is None


async def test_last_ones_are_kept_and_no_more(requests: Requests) -> None:
    for number in range(5):
        requests.note(HOOK, Request({}, str(number)))
    assert [found.body for found in await requests.of("ci")] == ["4", "3", "2"]
    requests.note(HOOK, Request({}, "5"))
    assert [found.body for found in await requests.of("ci")] == ["5", "4", "3"]
    requests.note(Hook("ci", "!room:hs", keep_requests=0), Request({}, "6"))
    assert [found.body for found in await requests.of("ci")] == ["5", "4", "3"]


async def test_what_is_kept_is_encrypted_and_has_no_proof_of_its_sender(database: Database, requests: Requests) -> None:
    given = {
        "Authorization": f"Bearer {CANARY}",
        "Cookie": CANARY,
        "X-Gitlab-Token": CANARY,
        "X-Api-Key": CANARY,
        "a": "b",
    }
    requests.note(HOOK, Request(given, f"the body {CANARY}"))
    (found,) = await requests.of("ci")
    assert found.headers == {"a": "b"}
    assert CANARY in found.body
    with database.reading() as connection:
        assert CANARY not in str(hooks.requests(connection, "ci"))


async def test_long_body_and_headers_are_cut(requests: Requests) -> None:
    requests.note(HOOK, Request({"a": "x" * 8_000, "b": "y" * 8_000}, "é" * MAX_BODY))
    (found,) = await requests.of("ci")
    assert len(found.body.encode()) == MAX_BODY
    assert (found.size, found.is_cut) == (2 * MAX_BODY, True)
    assert list(found.headers) == ["a"]


async def test_lone_surrogates_are_no_trouble(requests: Requests) -> None:
    requests.note(HOOK, Request({}, "a \ud800 b"))
    assert [found.body for found in await requests.of("ci")] == ["a ? b"]


async def test_memory_is_bounded_while_the_store_does_not_take_them(database: Database, requests: Requests) -> None:
    small = Requests(database, max_waiting=3 * module.MAX_HEADERS)
    small.open(FERNET)
    for name in "abcdef":
        small.note(Hook(name, "!room:hs"), Request({}, "x"))
    await small.flush()
    kept = [name for name in "abcdef" if await small.of(name)]
    assert kept == ["a", "b"]
    small.note(HOOK, Request({}, "y"))
    assert [found.body for found in await small.of("ci")] == ["y"]


async def test_store_that_takes_nothing_loses_them_and_says_so(
    database: Database, requests: Requests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    caplog.set_level(logging.WARNING)
    with monkeypatch.context() as patched:
        patched.setattr(database, "run", run)
        requests.note(HOOK, Request({}, "lost"))
        await requests.flush()
    assert [record.msg for record in caplog.records] == ["hook_requests_lost"]
    assert await requests.of("ci") == []


async def test_request_of_another_secret_key_is_left_out(database: Database, requests: Requests) -> None:
    requests.note(HOOK, Request({}, "old"))
    await requests.flush()
    other = Requests(database)
    other.open(Fernet(Fernet.generate_key()))
    other.note(HOOK, Request({}, "new"))
    assert [found.body for found in await other.of("ci")] == ["new"]
