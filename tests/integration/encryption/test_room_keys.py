"""Room keys out of one client and into the other, by the file."""

import asyncio

import pytest
from sqlalchemy import delete

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.encryption import key_file, room_keys
from flowbridge.encryption.key_file import RoomKey
from flowbridge.encryption.olm import CryptoError, InboundGroup, OutboundGroup
from flowbridge.store.accounts import account_of
from flowbridge.store.tables import crypto_room_keys
from tests.conftest import MakeAccount
from tests.integration.encryption.bot import Bot
from tests.integration.encryption.test_rooms import another, joined
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
