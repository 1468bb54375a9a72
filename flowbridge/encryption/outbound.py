"""Encrypting for rooms: who gets the key of a room's session, when another one begins, and each message once.

Of a room one message at a time. A message's ciphertext and the step of the ratchet are one commit, before it is sent:
a retry, also after a crash, finds the same bytes.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from flowbridge import log, metrics
from flowbridge.encryption import complaints
from flowbridge.encryption.channels import TURN, Channels
from flowbridge.encryption.identities import MEGOLM, Device, UserKeys
from flowbridge.encryption.key_server import SEND_DEVICES
from flowbridge.encryption.olm import InboundGroup, OutboundGroup
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.peers import Peers
from flowbridge.encryption.rooms import Room, Rooms
from flowbridge.errors import Forbidden, TooLarge
from flowbridge.events import canonical_json
from flowbridge.homeserver.sync import Json
from flowbridge.limits.cache import Cache
from flowbridge.store import clock, crypto
from flowbridge.store.crypto import Changes, StoredOutbound, StoredRoomKey

MAX_HOLDERS = 200_000  # of keys of rooms' sessions, in memory: some 250 bytes each
SESSION_HOLDERS = 40  # as many as a session itself takes
KEPT_AFTER = 10  # batches of devices in the middle of sharing, since all holders are written each time
# An event may have 65,536 bytes with all that servers add; Base64 makes 4 bytes of 3.
MAX_CIPHERTEXT = 64_300
RETRY_UNREACHED_MS = 300_000


class Holder(NamedTuple):
    """A device that has the key, and the key by which it was sent: a device id is not proof of the same device."""

    user_id: str
    device_id: str
    curve25519: str


@dataclass(slots=True)
class _Session:
    """A room's session. `checked`: for which state of room and devices it is known that all have its key."""

    group: OutboundGroup
    shared: set[Holder]
    messages: int
    created_at: int
    checked: tuple[int, int] | None = None
    retry_at: int | None = None  # ms: a device could not be reached


class Outbound:
    def __init__(self, device: OwnDevice, channels: Channels, peers: Peers, rooms: Rooms) -> None:
        self._device = device
        self._channels = channels
        self._peers = peers
        self._rooms = rooms
        self._sessions: Cache[str, _Session] = Cache(MAX_HOLDERS)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def encrypt(self, room_id: str, type_: str, content: Json, delivery: str) -> bytes | None:
        """The content of the m.room.encrypted that this event is sent as; None in a room that is not encrypted.

        The same for the same delivery, whenever it is asked for. Raises MatrixError (Forbidden where the room is
        encrypted in a way that is not known here, TooLarge), StoreUnavailable, LeaseLost.
        """
        lock = self._locks.setdefault(room_id, asyncio.Lock())
        async with lock:
            room = await self._rooms.get(room_id)
            if room is None:
                return None
            if not room.is_understood:
                raise Forbidden(f"the room is encrypted by {room.settings.get('algorithm')}, which is not known here")
            session = await self._ready(room_id, room)
            try:
                return await self._step(room_id, session, type_, content, delivery)
            except BaseException:
                self._sessions.pop(room_id)  # its ratchet may be before that of the store, or behind it
                raise

    async def _step(self, room_id: str, session: _Session, type_: str, content: Json, delivery: str) -> bytes:
        """Encrypt, and commit that; or what it was encrypted to before: then a step of the ratchet is left out."""
        plain = canonical_json.write({"type": type_, "content": _inside(content), "room_id": room_id})
        sealed = {
            "algorithm": MEGOLM,
            "ciphertext": session.group.encrypt(plain),
            "device_id": self._device.device_id,
            "sender_key": self._device.account.curve25519,
            "session_id": session.group.id,
            **_outside(content),
        }
        ciphertext = canonical_json.write(sealed)
        if len(ciphertext) > MAX_CIPHERTEXT:
            most = MAX_CIPHERTEXT * 3 // 4 - 400
            raise TooLarge(
                f"the room is encrypted, which makes of {len(plain)} bytes an event that is too large: at most about "
                f"{most} bytes fit"
            )
        session.messages += 1
        changes = Changes(outbound=[self._kept(room_id, session)], ciphertext=(delivery, ciphertext.decode()))
        await self._device.commit(changes)
        if changes.existing is not None:
            return changes.existing.encode()
        metrics.count(metrics.encrypted)
        return ciphertext

    # the session, and who has its key

    async def _ready(self, room_id: str, room: Room) -> _Session:
        """The room's session, of which all who should have it have the key."""
        session = self._sessions.get(room_id) or await self._stored(room_id)
        now = clock.now_ms()
        if session is not None and _is_old(session, room, now):
            session = None
        due = session is not None and session.retry_at is not None and session.retry_at <= now
        if session is not None and session.checked == (room.number, self._peers.version) and not due:
            return session
        version = self._peers.version
        holders = await self._holders(await self._peers.of(room.readers))
        if session is None or session.shared - holders.keys():  # somebody must not read on
            session = await self._new(room_id)
        missing = {holder: device for holder, device in holders.items() if holder not in session.shared}
        if missing:
            await self._share(room_id, session, missing)
        if self._peers.version == version:
            session.checked = (room.number, version)
        return self._sessions.put(room_id, session, weight=SESSION_HOLDERS + len(session.shared))

    async def _holders(self, users: Mapping[str, UserKeys]) -> dict[Holder, Device]:
        """The devices that are to have the key. Never one that is listed under our device's name, or with its key."""
        own, found = self._device, dict[Holder, Device]()
        for number, user in enumerate(users.values()):
            for device in user.devices.values():
                is_own = device.user_id == own.user_id and device.device_id == own.device_id
                if device.curve25519 == own.account.curve25519 or is_own:
                    if not is_own or device.ed25519 != own.account.ed25519:
                        complaints.warn("device_claims_ours", user=device.user_id, device=device.device_id)
                elif device.reads:
                    found[Holder(device.user_id, device.device_id, device.curve25519)] = device
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
        return found

    async def _share(self, room_id: str, session: _Session, missing: Mapping[Holder, Device]) -> None:
        content = {
            "algorithm": MEGOLM,
            "room_id": room_id,
            "session_id": session.group.id,
            "session_key": session.group.key,
        }
        unreached, holders = 0, list(missing)
        try:
            for number, start in enumerate(range(0, len(holders), SEND_DEVICES), 1):
                batch = holders[start : start + SEND_DEVICES]
                async with self._device.lock:
                    sent = await self._channels.send("m.room_key", {missing[holder]: content for holder in batch})
                failed = {Holder(device.user_id, device.device_id, device.curve25519) for device in sent}
                session.shared |= set(batch) - failed
                unreached += len(failed)
                metrics.devices_unreached.inc(len(failed))
                if number % KEPT_AFTER == 0:
                    await self._keep_holders(room_id, session)
        finally:  # what was reached stays so, also when another batch failed
            await self._keep_holders(room_id, session)
        session.retry_at = clock.now_ms() + RETRY_UNREACHED_MS if unreached else None
        log.info("room_key_shared", room=room_id, devices=len(missing) - unreached, unreached=unreached)

    async def _keep_holders(self, room_id: str, session: _Session) -> None:
        kept = await asyncio.to_thread(self._kept, room_id, session, shared=True)
        await self._device.commit(Changes(outbound=[kept]))

    async def _new(self, room_id: str) -> _Session:
        """Another session, kept before anyone has its key; we can read what we write ourselves, too."""
        group, own = OutboundGroup(), self._device
        session = _Session(group, set(), 0, clock.now_ms())
        about = {"user_id": own.user_id, "ed25519": own.account.ed25519, "source": "own"}
        inbound = InboundGroup.from_key(group.key)
        key = StoredRoomKey(
            room_id,
            group.id,
            own.account.curve25519,
            inbound.pickle(own.seal.pickle_key),
            own.seal.close(about),
            inbound.first_index,
            session.created_at,
        )
        await own.commit(Changes(outbound=[self._kept(room_id, session, shared=True)], room_keys=[key]))
        metrics.count(metrics.crypto_sessions, "room")
        return session

    async def _stored(self, room_id: str) -> _Session | None:
        own = self._device
        stored = await own.database.read(lambda connection: crypto.outbound(connection, own.account_id, room_id))
        if stored is None:
            return None
        group = OutboundGroup.from_pickle(stored.pickle, own.seal.pickle_key)
        assert stored.shared is not None
        shared = {Holder(*each) for each in own.seal.open(stored.shared)}
        return _Session(group, shared, stored.messages, stored.created_at)

    def _kept(self, room_id: str, session: _Session, *, shared: bool = False) -> StoredOutbound:
        """`shared`: with who has its key, some 100 bytes of each device."""
        own = self._device
        pickle = session.group.pickle(own.seal.pickle_key)
        holders = own.seal.close(sorted(session.shared)) if shared else None
        return StoredOutbound(room_id, session.group.id, pickle, holders, session.messages, session.created_at)


def _is_old(session: _Session, room: Room, now: int) -> bool:
    return session.messages >= room.rotation.messages or now - session.created_at >= room.rotation.period_ms


def _outside(content: Json) -> dict[str, Any]:
    """What servers have to see: which event this one belongs to."""
    relation = content.get("m.relates_to")
    return {} if relation is None else {"m.relates_to": relation}


def _inside(content: Json) -> Json:
    return {name: value for name, value in content.items() if name != "m.relates_to"}
