"""flowbridge.auth.tokens: whose token it is, what is kept of it, and that no queued event is left without one."""

import asyncio
import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from flowbridge.auth.tokens import cipher
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import StoreUnavailable, accounts, tables
from flowbridge.store.clock import now_ms
from tests.rig import ALICE, BOB, KEY, SERVICE, MakeRig, Rig, Rooms, refuse_connection, soon, until
from tests.unit import Clock

NEW = replace(ALICE, token="new")
KEEP_SECONDS = Timing().token_idle_seconds
NOTE_SECONDS = KEEP_SECONDS / 2  # between two notes no token may be dropped


@pytest.fixture
def make(tmp_path: Path) -> MakeRig:
    rooms = Rooms()
    return MakeRig(f"sqlite:///{tmp_path}/flowbridge.db", rooms)


def kept(rig: Rig, caller: Caller = ALICE) -> Any:
    """The row of an account's newest token."""
    account = accounts.account_of(caller.user_id)
    with rig.database.engine.connect().execution_options(reads=True) as connection:
        query = select(tables.accounts.c.user_id, tables.tokens).join(
            tables.tokens, tables.tokens.c.account == tables.accounts.c.account
        )
        newest = query.where(tables.accounts.c.account == account).order_by(tables.tokens.c.seen_at.desc())
        return connection.execute(newest).first()


async def written(rig: Rig) -> None:
    await rig.database.run(lambda connection: None)


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


async def test_token_is_kept_encrypted_and_found_by_a_hash(make: MakeRig) -> None:
    async with make() as rig:
        rig.tokens.remember(ALICE)
        await written(rig)
        row = kept(rig)
        assert (row.user_id, row.device_id) == (ALICE.user_id, ALICE.device_id)
        assert ALICE.token not in (row.token, row.token_hash)
        assert Fernet(KEY).decrypt(row.token.encode()) == ALICE.token.encode()
        assert await rig.tokens.identity(ALICE.token) == (ALICE.user_id, ALICE.device_id)
        assert await rig.tokens.identity("unknown") is None


async def test_account_is_a_user_whatever_device_it_uses(make: MakeRig) -> None:
    async with make() as rig:
        names = {rig.tokens.remember(caller) for caller in (ALICE, NEW, BOB, replace(ALICE, device_id="DESK"))}
        assert len(names) == 2
        account = rig.tokens.remember(replace(SERVICE, token="s"))
        assert await rig.tokens.of(account) == (SERVICE.user_id, None, "s")


async def test_token_is_known_after_a_restart(make: MakeRig) -> None:
    async with make() as rig:
        account = rig.tokens.remember(ALICE)
        await rig.crash()
    async with make() as rig:
        found = await asyncio.gather(*[rig.tokens.of(account) for _ in range(5)])
        assert found == [(ALICE.user_id, ALICE.device_id, ALICE.token)] * 5
        assert await rig.tokens.of("nobody") is None


async def test_newer_token_takes_the_place_of_the_older_and_that_is_told(make: MakeRig) -> None:
    told: list[str] = []
    async with make() as rig:
        rig.tokens.on_change = lambda account, again: told.append(account)
        account = rig.tokens.remember(ALICE)
        for _ in range(3):
            rig.tokens.remember(NEW)
        await written(rig)
        assert told == [account, account]
        assert await rig.tokens.identity("alice") is None
        assert await rig.tokens.identity("new") == (ALICE.user_id, ALICE.device_id)


async def test_token_that_comes_while_the_store_is_read_is_not_replaced_by_the_older_one(make: MakeRig) -> None:
    async with make() as rig:
        account = rig.tokens.remember(ALICE)
        await written(rig)
        rig.tokens.forget(account)
        with rig.busy_writer():
            reading = asyncio.ensure_future(rig.tokens.of(account))
            for _ in range(3):
                await asyncio.sleep(0)  # until the store has been asked
            rig.tokens.remember(NEW)
        assert await soon(reading) == (ALICE.user_id, ALICE.device_id, "new")
        assert await rig.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "new")


async def test_forgotten_token_is_read_anew(make: MakeRig) -> None:
    async with make() as rig:
        account = rig.tokens.remember(ALICE)
        await written(rig)
        newer = Fernet(KEY).encrypt(b"of another process").decode()
        await rig.database.run(lambda connection: connection.execute(update(tables.tokens).values(token=newer)))
        assert await rig.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "alice")
        rig.tokens.forget(account)
        assert await rig.tokens.of(account) == (ALICE.user_id, ALICE.device_id, "of another process")


async def test_token_of_another_key_is_none(make: MakeRig) -> None:
    async with make() as rig:
        account = rig.tokens.remember(ALICE)
        await written(rig)
        rig.tokens.forget(account)
        rig.tokens.unlock(Fernet(Fernet.generate_key()))
        assert await rig.tokens.of(account) is None


async def test_store_that_cannot_be_read_is_told_and_asked_again(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as rig:
        account = rig.tokens.remember(ALICE)
        await written(rig)
        rig.tokens.forget(account)
        work = accounts.tokens_of

        def fail(*_: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(accounts, "tokens_of", fail)
        with pytest.raises(StoreUnavailable):
            await rig.tokens.of(account)
        monkeypatch.setattr(accounts, "tokens_of", work)
        assert await rig.tokens.of(account) is not None


async def test_memory_is_bounded(make: MakeRig) -> None:
    async with make(max_known=10) as rig:
        names = [rig.tokens.remember(Caller(f"@{number}:hs", "D", f"t{number}")) for number in range(50)]
        for name in names:
            found = await rig.tokens.of(name)
            assert found is not None
        assert sum(rig.tokens.knows(name) for name in names) <= 10


# a token stays for as long as an event may need it


@pytest.mark.parametrize("since_boot", [1.0, 100_000.0])
async def test_account_that_is_in_use_is_noted_again_from_time_to_time(make: MakeRig, since_boot: float) -> None:
    clock = Clock()
    clock.now = since_boot
    async with make(clock=clock) as rig:
        told: list[str] = []
        rig.tokens.remember(ALICE)
        rig.tokens.on_change = lambda account, again: told.append(account)
        await written(rig)
        await rig.database.run(lambda connection: connection.execute(update(tables.tokens).values(seen_at=1)))
        clock.now += NOTE_SECONDS - 1
        rig.tokens.remember(ALICE)
        await written(rig)
        assert kept(rig).seen_at == 1
        clock.now += 2
        rig.tokens.remember(ALICE)
        await written(rig)
        assert kept(rig).seen_at > now_ms() - 60_000
        assert told == []  # it is no other token


async def test_account_read_from_the_store_is_noted_when_it_is_used(make: MakeRig) -> None:
    """Also when the machine has just been started, and its clock has hardly begun."""
    clock = Clock()
    clock.now = 0.0
    async with make(clock=clock) as rig:
        rig.tokens.remember(ALICE)
        await rig.crash()
    async with make(clock=clock) as rig:
        await rig.database.run(lambda connection: connection.execute(update(tables.tokens).values(seen_at=1)))
        await rig.tokens.of(worker_account())
        rig.tokens.remember(ALICE)
        await written(rig)
        assert kept(rig).seen_at > 1


def worker_account() -> str:
    return accounts.account_of(ALICE.user_id)


async def test_event_accepted_long_after_the_first_is_delivered_by_the_next_process(make: MakeRig) -> None:
    """The token of the first had been dropped, and the process went on from memory."""
    clock = Clock()
    async with make(clock=clock) as rig:
        rooms = rig.rooms
        await rig.send("a")
        await rig.settled()
        clock.now += KEEP_SECONDS + 1
        dropped = await rig.database.run(lambda connection: accounts.drop_idle_tokens(connection, now_ms() + 1_000))
        assert dropped == 1
        rooms.always(refuse_connection)
        await rig.accept("b")
        await rig.crash()
    rooms.always(None)
    async with make() as rig:
        await rig.settled()
        assert rooms.bodies() == ["a", "b"]


async def test_token_is_written_before_the_event_that_needs_it(make: MakeRig) -> None:
    async with make() as rig:
        rig.rooms.always(refuse_connection)
        with rig.busy_writer():
            pending = rig.offer("a", waits=False)
        await soon(pending.committed)
        assert kept(rig).token
        await until(lambda: rig.states() == ["queued"])
        await rig.crash()
