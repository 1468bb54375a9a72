"""The room keys of a device, given out and taken in as a whole: what is taken in says nothing of who made it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from flowbridge.encryption import key_file
from flowbridge.encryption.key_file import RoomKey
from flowbridge.encryption.olm import CryptoError, InboundGroup
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.sealing import Seal
from flowbridge.store import Database, clock, crypto
from flowbridge.store.crypto import Changes, StoredRoomKey

CLAIMED = "?"  # before the device's key: a claim never takes the place of what that device shared itself
PIECE = 200  # keys of one commit

Place = tuple[str, str]  # a room and a session


async def exported(database: Database, seal: Seal, account: str) -> list[RoomKey]:
    """All of an account. Raises CryptoError under another secret key."""
    found: list[RoomKey] = []
    after = ("", "", "")
    while rows := await database.read(partial(crypto.all_room_keys, account=account, after=after, limit=PIECE)):
        after = rows[-1][:3]
        for row in rows:
            group = InboundGroup.from_pickle(row.pickle, seal.pickle_key)
            sender_key = row.peer.removeprefix(CLAIMED)
            found.append(RoomKey(row.room_id, sender_key, seal.open(row.sealed)["ed25519"], group))
    return found


async def imported(device: OwnDevice, values: Sequence[Any]) -> tuple[int, list[str]]:
    """Keep exported sessions; returns how many there were, and what is wrong with others. Raises MatrixError."""
    taken, wrong = 0, list[str]()
    for piece in _pieces(values):
        changes = Changes()
        for value in piece:
            try:
                changes.room_keys.append(claimed(device, key_file.room_key(value)))
            except CryptoError as error:
                wrong.append(str(error))
        async with device.lock:
            await device.commit(changes)
        taken += len(changes.room_keys)
    return taken, wrong


def claimed(device: OwnDevice, key: RoomKey) -> StoredRoomKey:
    about = {"user_id": "", "ed25519": key.ed25519, "source": "imported"}
    pickle, sealed = key.group.pickle(device.seal.pickle_key), device.seal.close(about)
    peer = f"{CLAIMED}{key.sender_key}"
    return StoredRoomKey(key.room_id, key.group.id, peer, pickle, sealed, key.group.first_index, clock.now_ms())


def _pieces(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + PIECE] for start in range(0, len(values), PIECE))
