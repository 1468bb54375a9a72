"""Room keys out of one client and into the other, by the file."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import delete

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.encryption import key_file, room_keys, setup
from flowbridge.encryption.key_file import RoomKey
from flowbridge.encryption.olm import CryptoError, InboundGroup, OutboundGroup
from flowbridge.store.accounts import account_of
from flowbridge.store.tables import crypto_room_keys
from tests.conftest import MakeAccount
from tests.integration.encryption.bot import Bot, sqlite
from tests.integration.encryption.test_device import login
from tests.integration.encryption.test_rooms import another, joined
from tests.patience import PATIENCE
from tests.peer import Peer


async def exported(device: Bot) -> list[RoomKey]:
    account = account_of(device.account.user_id)
    return await room_keys.exported(device.database, device.keeper.seal, account)


async def test_client_reads_with_keys_of_the_bridge_s_file(
    device: Bot, synapse: LocalSynapse, make_account: MakeAccount
) -> None:
    room = await device.room()
    event_id = await device.send(room, "before you were here")
    text = key_file.write(await exported(device), "two words", rounds=100_000)
    async with another(synapse, make_account()) as late:
        await joined(late, room)
        assert (await asyncio.to_thread(late.read, event_id, patience=2.0))["failure"]
        await asyncio.to_thread(late.ask, "imported_file", text=text, passphrase="two words")
        found = await asyncio.to_thread(late.read, event_id)
    assert found["content"]["body"] == "before you were here"


async def test_bridge_reads_with_keys_of_a_client_s_file_and_verifies_nobody(
    device: Bot, synapse: LocalSynapse, make_account: MakeAccount
) -> None:
    room = await device.room()
    async with another(synapse, make_account()) as talker:
        await joined(talker, room)
        event_id = await asyncio.to_thread(talker.send, room, {"msgtype": "m.text", "body": "of another database"})
        assert (await device.read(room, event_id)).verified
        told = await asyncio.to_thread(talker.ask, "exported_file", passphrase="two words")
    await device.database.run(lambda connection: connection.execute(delete(crypto_room_keys)))
    device.machine.inbound._keys.clear()
    with pytest.raises(CryptoError, match="has not come"):
        await device.read(room, event_id)
    taken, wrong = await room_keys.imported(device.machine.device, key_file.read(told["text"], "two words"))
    assert (taken > 0, wrong) == (True, [])
    found = await device.read(room, event_id)
    assert found.event["content"]["body"] == "of another database"
    assert (found.verified, found.device_id) == (False, "")


async def test_forged_key_in_a_file_takes_nothing_from_the_one_that_was_shared(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "mine"})
    assert (await device.read(room, event_id)).verified
    (key,) = [key for key in await exported(device) if key.room_id == room]
    forged = {**key.told(), "sender_claimed_keys": {"ed25519": "x"}}
    other = InboundGroup.from_key(OutboundGroup().key)
    taken, wrong = await room_keys.imported(
        device.machine.device, [forged, {**forged, "session_key": other.export()}, 7]
    )
    assert (taken, len(wrong)) == (1, 2)
    device.machine.inbound._keys.clear()
    assert (await device.read(room, event_id)).verified


async def test_bridge_reads_what_is_in_the_account_s_key_backup(
    synapse: LocalSynapse, bot: Account, make_account: MakeAccount, tmp_path: Path, secret: str
) -> None:
    """Another client of the account was there before, and has backed the room's key up."""
    async with another(synapse, bot) as before, another(synapse, make_account()) as talker:
        recovery_key = (await asyncio.to_thread(before.ask, "storage", passphrase=""))["recovery_key"]
        async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
            room = await device.room()
        await joined(talker, room)
        event_id = await asyncio.to_thread(talker.send, room, {"msgtype": "m.text", "body": "long ago"})
        assert (await asyncio.to_thread(before.read, event_id))["content"]["body"] == "long ago"
        async with asyncio.timeout(PATIENCE):
            while not (await device.call("GET", "room_keys/version"))["count"]:
                await asyncio.to_thread(before.ask, "whoami")
    (tmp_path / "new").mkdir()
    moved = await login(synapse, bot)
    async with Bot(synapse, moved, sqlite(tmp_path / "new"), secret).running() as device:
        event, machine = await device.event(room, event_id), device.machine
        with pytest.raises(CryptoError, match="has not come"):
            await machine.decrypt(room, event, restore=True)
        await setup.recover(machine.device, device.keeper.server, recovery_key)
        assert recovery_key not in (tmp_path / "new" / "flowbridge.db").read_bytes().decode("latin-1")
        with pytest.raises(CryptoError, match="has not come"):
            await machine.decrypt(room, event)
        found = await machine.decrypt(room, event, restore=True)
        assert (found.event["content"]["body"], found.verified) == ("long ago", False)
        assert (await machine.decrypt(room, event)).event == found.event  # from the store
