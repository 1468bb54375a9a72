"""The device: made, signed by itself, recovered, and held by one process at a time."""

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.encryption import setup
from flowbridge.encryption.key_server import ProofNeeded
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.own_device import LeaseLost
from flowbridge.errors import BadGateway, MatrixError
from flowbridge.store import crypto, tables
from flowbridge.store.accounts import account_of
from tests.conftest import MakeAccount
from tests.integration.encryption.bot import Bot, sqlite
from tests.integration.encryption.test_rooms import another, body, joined
from tests.patience import PATIENCE, until
from tests.peer import Peer


async def login(synapse: LocalSynapse, account: Account) -> Account:
    """The same account on another device."""
    request = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": account.user_id},
        "password": account.password,
    }
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = (await client.post(f"{synapse.url}/_matrix/client/v3/login", json=request)).raise_for_status().json()
    return Account(account.user_id, answer["access_token"], answer["device_id"], account.password)


async def one_time_keys(device: Bot) -> int:
    """How many the homeserver has of it."""
    counts = (await device.call("POST", "keys/upload", {}))["one_time_key_counts"]
    return int(counts.get("signed_curve25519", 0))


async def claim_all(device: Bot) -> None:
    request = {device.account.user_id: {device.account.device_id: "signed_curve25519"}}
    for _ in range(60):
        await device.call("POST", "keys/claim", {"one_time_keys": request})


# made, and signed


async def test_device_signs_itself_at_its_first_start(device: Bot, peer: Peer) -> None:
    report = device.keeper.status.report
    assert report is not None
    assert (report.standing, report.has_storage) == ("signed", True)
    assert len(device.shown) == 1
    whose = {"user_id": device.account.user_id, "device_id": device.account.device_id}
    await joined(peer, await device.room())
    assert (await asyncio.to_thread(peer.ask, "identity", user_id=device.account.user_id))["known"]
    assert (await asyncio.to_thread(peer.ask, "trust", **whose))["signed"]


async def test_second_start_is_the_same_device_and_shows_nothing(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str
) -> None:
    found = []
    for _ in range(2):
        async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
            assert device.keeper.status.report is not None
            found.append((device.keeper.status.report, len(device.shown)))
    assert found == [(found[0][0], 1), (found[0][0], 0)]


async def test_start_that_was_cut_short_goes_on_with_the_same_keys(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-signing keys are kept before they are published, and published before they are in secret storage."""
    first = Bot(synapse, bot, sqlite(tmp_path), secret)

    async def fails(*_: object) -> None:
        raise BadGateway("the connection was reset")

    monkeypatch.setattr(first.keeper.server, "set_account_data", fails)
    async with first.open(), contextlib.AsyncExitStack() as stack:
        machine = await stack.enter_async_context(first.keeper.holding())
        await machine.sync()
        with pytest.raises(MatrixError, match="reset"):
            await first.keeper._own(machine)
        seeds = machine.device.secrets["cross_signing"]
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        assert device.machine.device.secrets["cross_signing"] == seeds
        report = device.keeper.status.report
        assert report is not None
        assert (report.standing, report.has_storage, len(device.shown)) == ("signed", True, 1)


async def test_token_whose_device_has_another_client_s_keys_is_not_used(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str
) -> None:
    async with another(synapse, bot) as client:
        taken = Account(bot.user_id, client.me["access_token"], client.me["device_id"], bot.password)
        device = Bot(synapse, taken, sqlite(tmp_path), secret)
        async with device.open():
            with pytest.raises(CryptoError, match="keys of another client"):
                async with device.keeper.holding():
                    pass


async def test_another_device_of_the_account_reads_on_and_is_signed_at_once(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str, peer: Peer
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        room = await device.room()
        await joined(peer, room)
        event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "before"})
        await device.read(room, event_id)
    moved = await login(synapse, bot)
    async with Bot(synapse, moved, sqlite(tmp_path), secret).running() as device:
        report = device.keeper.status.report
        assert report is not None
        assert (report.standing, report.device_id, device.shown) == ("signed", moved.device_id, [])
        assert (await device.read(room, event_id)).event["content"]["body"] == "before"
        assert await body(peer, await device.send(room, "after")) == "after"


async def test_one_time_keys_are_kept_stocked(device: Bot, peer: Peer) -> None:
    assert await one_time_keys(device) == 25
    await claim_all(device)
    async with asyncio.timeout(PATIENCE):
        while await one_time_keys(device) < 25:
            await device.machine.fresh(0.0)
    await device.machine.fresh(0.0)
    room = await device.room()
    await joined(peer, room)
    event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "by a new session"})
    assert (await device.read(room, event_id)).verified


async def test_device_that_was_away_is_reached_by_its_fallback_key(
    synapse: LocalSynapse, make_account: MakeAccount, bot: Account, tmp_path: Path, secret: str
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        room = await device.room()
    await claim_all(device)
    async with another(synapse, make_account()) as client:
        await joined(client, room)
        event_id = await asyncio.to_thread(client.send, room, {"msgtype": "m.text", "body": "while you were away"})
        async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
            assert (await device.read(room, event_id)).event["content"]["body"] == "while you were away"


async def test_device_whose_messages_cannot_be_read_any_more_gets_another_session(device: Bot, peer: Peer) -> None:
    """As after a restored backup: the sessions of before are gone, and the peer goes on with them."""
    room = await device.room()
    await joined(peer, room)
    await body(peer, await device.send(room, "hello"))
    await device.read(room, await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "one"}))

    def lose(connection: Any) -> None:
        connection.execute(tables.crypto_sessions.delete())

    await device.database.run(lose)
    await asyncio.to_thread(peer.ask, "discard", room=room)
    await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "lost"})
    async with asyncio.timeout(PATIENCE):
        while True:
            await asyncio.to_thread(peer.ask, "discard", room=room)
            event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "found"})
            with contextlib.suppress(CryptoError):
                assert (await device.read(room, event_id)).event["content"]["body"] == "found"
                break


# recovery


async def test_recovery_key_signs_another_client_of_the_account(device: Bot, synapse: LocalSynapse) -> None:
    (recovery_key,) = device.shown
    async with another(synapse, device.account, signed=False) as client:
        found = await asyncio.to_thread(client.ask, "recover", recovery_key=recovery_key)
        assert found["in_storage"]
        assert all(found["private"].values())
        own = {"user_id": client.me["user_id"], "device_id": client.me["device_id"]}
        await asyncio.to_thread(until, lambda: client.ask("trust", **own)["signed"])


@pytest.mark.parametrize("passphrase", ["", "correct horse battery staple"], ids=["by key", "by passphrase"])
async def test_account_of_another_client_is_joined_by_its_recovery_key(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str, passphrase: str
) -> None:
    async with another(synapse, bot) as client:
        made = await asyncio.to_thread(client.ask, "storage", passphrase=passphrase)
        async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
            report = device.keeper.status.report
            assert report is not None
            assert (report.standing, device.shown) == ("foreign", [])
            for wrong in ("not it", "EsTc LW2K PGiF wKEA 3As5 g5c4 BXwk qeeJ ZJV8 Q9fu gUMN UE4d"):
                with pytest.raises(CryptoError):
                    await setup.recover(device.machine.device, device.keeper.server, wrong)
            found = await setup.recover(device.machine.device, device.keeper.server, passphrase or made["recovery_key"])
            assert "m.cross_signing.self_signing" in found
            assert (await setup.report(device.machine.device, device.keeper.server)).standing == "signed"


async def test_identity_is_replaced_only_when_that_is_asked_for(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str
) -> None:
    async with another(synapse, bot), Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        own, server = device.machine.device, device.keeper.server
        with pytest.raises(CryptoError, match="another client"):
            await setup.cross_sign(own, server, show=device.shown.append)
        with pytest.raises(ProofNeeded):
            await setup.cross_sign(own, server, show=device.shown.append, reset=True)
        assert (await setup.report(own, server)).standing == "foreign"
        await setup.cross_sign(own, server, show=device.shown.append, reset=True, password=bot.password)
        assert (await setup.report(own, server)).standing == "signed"
        assert len(device.shown) == 1


# one holder


async def test_device_moves_when_its_holder_dies(
    synapse: LocalSynapse, bot: Account, database_url: str, secret: str, peer: Peer
) -> None:
    """Two replicas on one database. On SQLite they are one after the other."""
    first = Bot(synapse, bot, database_url, secret, owner="one", alone=False, lease_seconds=1.5)
    async with first.open(), first.keeper.holding() as held:
        await held.sync()
        room = await first.room()
        await joined(peer, room)
        made = await held.encrypt(room, "m.room.message", {"msgtype": "m.text", "body": "by one"}, "delivery")
        assert made is not None
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__qualname__", "") == "Keeper._renew":
                task.cancel()  # it hangs
        second = Bot(synapse, bot, database_url, secret, owner="two", alone=False)
        if database_url.startswith("sqlite"):  # a file belongs to one process
            second.database = second.keeper._database = first.database
        async with contextlib.nullcontext() if first.database.is_sqlite else second.open():
            running = asyncio.ensure_future(second.keeper.run())
            await second.held()
            assert second.machine.device.account.ed25519 == held.device.account.ed25519
            assert await second.machine.encrypt(room, "m.room.message", {"body": "other"}, "delivery") == made
            assert await body(peer, await second.send(room, "by two")) == "by two"
            with pytest.raises(LeaseLost):
                await held.encrypt(room, "m.room.message", {"msgtype": "m.text", "body": "late"}, "late")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_holder_lends_the_device_to_a_command(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        command = Bot(synapse, bot, sqlite(tmp_path), secret, owner="command", alone=False, command=True)
        account = account_of(bot.user_id)
        async with command.open(shared=True):
            with pytest.raises(LeaseLost):
                async with command.keeper.holding():
                    pass
            async with command.keeper.borrowing() as machine:
                assert device.keeper.machine is None
                assert machine.device.account.ed25519
            assert not await device.database.read(partial(crypto.is_asked_for, account=account))
            await device.held()


async def test_another_secret_key_is_told_and_nothing_is_lost(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running():
        pass
    wrong = Bot(synapse, bot, sqlite(tmp_path), Fernet.generate_key().decode())
    async with wrong.open():
        with pytest.raises(CryptoError, match="this secret key"):
            async with wrong.keeper.holding():
                pass
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        assert device.keeper.status.report is not None
        assert device.keeper.status.report.standing == "signed"
