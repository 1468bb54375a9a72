"""flowbridge.auth.tokens: whose token it is, what is kept of it, and that no queued event is left without one."""

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from flowbridge.auth import tokens as module
from flowbridge.auth.tokens import KEEP_SECONDS, NOTE_SECONDS, cipher
from flowbridge.models import Caller
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import StoreUnavailable, accounts, tables
from flowbridge.store.clock import now_ms
from tests.worker import ALICE, BOB, KEY, SERVICE, Rooms, Worker, refuse_connection, soon, until

NEW = replace(ALICE, token="new")

MakeWorker = Callable[..., Worker]


@pytest.fixture
def make(tmp_path: Path) -> MakeWorker:
    rooms = Rooms()
    return lambda **how: Worker(f"sqlite:///{tmp_path}/flowbridge.db", rooms, **how)


def kept(worker: Worker, caller: Caller = ALICE) -> Any:
    """The row of an account's newest token."""
    account = accounts.account_of(caller.user_id)
    with worker.database.engine.connect().execution_options(reads=True) as connection:
        query = select(tables.accounts.c.user_id, tables.tokens).join(
            tables.tokens, tables.tokens.c.account == tables.accounts.c.account
        )
        newest = query.where(tables.accounts.c.account == account).order_by(tables.tokens.c.seen_at.desc())
        return connection.execute(newest).first()


async def written(worker: Worker) -> None:
    await worker.database.run(lambda connection: None)


# the cipher


@pytest.mark.usefixtures("nothing_set")
def test_key_is_made_once_beside_the_database_and_closed_to_others(tmp_path: Path) -> None:
    settings = Settings.load(database_url=f"sqlite:///{tmp_path}/flowbridge.db")
    secret = cipher(settings).encrypt(b"token")
    path = tmp_path / "flowbridge.db.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cipher(settings).decrypt(secret) == b"token"


@pytest.mark.usefixtures("nothing_set")
def test_key_that_another_process_makes_at_the_same_time_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.load(database_url=f"sqlite:///{tmp_path}/flowbridge.db")
    path = tmp_path / "flowbridge.db.key"
    link = os.link

    def late(made: str, to: Path) -> None:
        path.write_bytes(KEY)
        link(made, to)

    monkeypatch.setattr(os, "link", late)
    assert Fernet(KEY).decrypt(cipher(settings).encrypt(b"token")) == b"token"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("nothing_set")
def test_key_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match="No space left on device"):
        cipher(Settings.load(database_url=f"sqlite:///{tmp_path}/flowbridge.db"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_set")
def test_key_of_the_settings_is_used_and_no_file_made(tmp_path: Path) -> None:
    settings = Settings.load(database_url=f"sqlite:///{tmp_path}/flowbridge.db", secret_key=KEY.decode())
    assert Fernet(KEY).decrypt(cipher(settings).encrypt(b"token")) == b"token"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize("content", ["", "short", "x" * 44])
def test_key_that_is_none_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "flowbridge.db.key").write_text(content)
    with pytest.raises(SettingsError, match="FLOWBRIDGE_SECRET_KEY"):
        cipher(Settings.load(database_url=f"sqlite:///{tmp_path}/flowbridge.db"))


# what is known


async def test_token_is_kept_encrypted_and_found_by_a_hash(make: MakeWorker) -> None:
    async with make() as worker:
        worker.tokens.remember(ALICE)
        await written(worker)
        row = kept(worker)
        assert (row.user_id, row.device_id) == (ALICE.user_id, ALICE.device_id)
        assert ALICE.token not in (row.token, row.token_hash)
        assert Fernet(KEY).decrypt(row.token.encode()) == ALICE.token.encode()
        assert await worker.tokens.identity(ALICE.token) == (ALICE.user_id, ALICE.device_id)
        assert await worker.tokens.identity("unknown") is None


async def test_account_is_a_user_whatever_device_it_uses(make: MakeWorker) -> None:
    async with make() as worker:
        names = {worker.tokens.remember(caller) for caller in (ALICE, NEW, BOB, replace(ALICE, device_id="DESK"))}
        assert len(names) == 2
        account = worker.tokens.remember(replace(SERVICE, token="s"))
        assert await worker.tokens.of(account) == (SERVICE.user_id, None, "s")


async def test_token_is_known_after_a_restart(make: MakeWorker) -> None:
    async with make() as worker:
        account = worker.tokens.remember(ALICE)
        await worker.crash()
    async with make() as worker:
        found = await asyncio.gather(*[worker.tokens.of(account) for _ in range(5)])
        assert found == [(ALICE.user_id, ALICE.device_id, ALICE.token)] * 5
        assert await worker.tokens.of("nobody") is None


async def test_newer_token_takes_the_place_of_the_older_and_that_is_told(make: MakeWorker) -> None:
    told: list[str] = []
    async with make() as worker:
        worker.tokens.on_change = lambda account, again: told.append(account)
        account = worker.tokens.remember(ALICE)
        for _ in range(3):
            worker.tokens.remember(NEW)
        await written(worker)
        assert told == [account, account]
        assert await worker.tokens.identity("alice") is None
        assert await worker.tokens.identity("new") == (ALICE.user_id, ALICE.device_id)


async def test_token_that_comes_while_the_store_is_read_is_not_replaced_by_the_older_one(make: MakeWorker) -> None:
    async with make() as worker:
        account = worker.tokens.remember(ALICE)
        await written(worker)
        worker.tokens.forget(account)
        with worker.busy_writer():
            reading = asyncio.ensure_future(worker.tokens.of(account))
            for _ in range(3):
                await asyncio.sleep(0)  # until the store has been asked
            worker.tokens.remember(NEW)
        assert await soon(reading) == (ALICE.user_id, ALICE.device_id, "new")
        assert await worker.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "new")


async def test_forgotten_token_is_read_anew(make: MakeWorker) -> None:
    async with make() as worker:
        account = worker.tokens.remember(ALICE)
        await written(worker)
        newer = Fernet(KEY).encrypt(b"of another process").decode()
        await worker.database.run(lambda connection: connection.execute(update(tables.tokens).values(token=newer)))
        assert await worker.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "alice")
        worker.tokens.forget(account)
        assert await worker.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "of another process")


async def test_token_of_another_key_is_none(make: MakeWorker) -> None:
    async with make() as worker:
        account = worker.tokens.remember(ALICE)
        await written(worker)
        worker.tokens.forget(account)
        worker.tokens.unlock(Fernet(Fernet.generate_key()))
        assert await worker.tokens.of(account) is None


async def test_store_that_cannot_be_read_is_told_and_asked_again(
    make: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as worker:
        account = worker.tokens.remember(ALICE)
        await written(worker)
        worker.tokens.forget(account)
        work = accounts.tokens_of

        def fail(*_: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(accounts, "tokens_of", fail)
        with pytest.raises(StoreUnavailable):
            await worker.tokens.of(account)
        monkeypatch.setattr(accounts, "tokens_of", work)
        assert await worker.tokens.of(account) is not None
        assert worker.tokens._reading == {}


async def test_memory_is_bounded(make: MakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN", 10)
    async with make() as worker:
        names = [worker.tokens.remember(Caller(f"@{number}:hs", "D", f"t{number}")) for number in range(50)]
        for name in names:
            found = await worker.tokens.of(name)
            assert found is not None
        assert len(worker.tokens._known) <= 10
        assert len(worker.tokens._noted) <= 10


# a token stays for as long as an event may need it


class Clock:
    """Stands in for `time`: as many seconds later as one says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("since_boot", [1.0, 100_000.0])
async def test_account_that_is_in_use_is_noted_again_from_time_to_time(
    make: MakeWorker, monkeypatch: pytest.MonkeyPatch, since_boot: float
) -> None:
    assert NOTE_SECONDS <= KEEP_SECONDS / 2  # between two notes no token may be dropped
    clock = Clock()
    clock.now = since_boot
    monkeypatch.setattr(module, "time", clock)
    async with make() as worker:
        told: list[str] = []
        worker.tokens.remember(ALICE)
        worker.tokens.on_change = lambda account, again: told.append(account)
        await written(worker)
        await worker.database.run(lambda connection: connection.execute(update(tables.tokens).values(seen_at=1)))
        clock.now += NOTE_SECONDS - 1
        worker.tokens.remember(ALICE)
        await written(worker)
        assert kept(worker).seen_at == 1
        clock.now += 2
        worker.tokens.remember(ALICE)
        await written(worker)
        assert kept(worker).seen_at > now_ms() - 60_000
        assert told == []  # it is no other token


async def test_account_read_from_the_store_is_noted_when_it_is_used(
    make: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the machine has just been started, and its clock has hardly begun."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    async with make() as worker:
        worker.tokens.remember(ALICE)
        await worker.crash()
    async with make() as worker:
        await worker.database.run(lambda connection: connection.execute(update(tables.tokens).values(seen_at=1)))
        await worker.tokens.of(worker_account())
        worker.tokens.remember(ALICE)
        await written(worker)
        assert kept(worker).seen_at > 1


def worker_account() -> str:
    return accounts.account_of(ALICE.user_id)


async def test_event_accepted_long_after_the_first_is_delivered_by_the_next_process(
    make: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token of the first had been dropped, and the process went on from memory."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    async with make() as worker:
        rooms = worker.rooms
        await worker.send("a")
        await worker.settled()
        clock.now += KEEP_SECONDS + 1
        dropped = await worker.database.run(lambda connection: accounts.drop_idle_tokens(connection, now_ms() + 1_000))
        assert dropped == 1
        rooms.always(refuse_connection)
        await worker.accept("b")
        await worker.crash()
    rooms.always(None)
    async with make() as worker:
        await worker.settled()
        assert rooms.bodies() == ["a", "b"]


async def test_token_is_written_before_the_event_that_needs_it(make: MakeWorker) -> None:
    async with make() as worker:
        worker.rooms.always(refuse_connection)
        with worker.busy_writer():
            ticket = worker.offer("a", waits=False)
        await soon(ticket.committed)
        assert kept(worker).token
        await until(lambda: worker.states() == ["queued"])
        await worker.crash()
