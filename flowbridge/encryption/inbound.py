"""Room keys that come in, and what is decrypted with them.

That an event decrypts proves that its author had the room's key, and no more. Whose it is follows from the key: who
shared it, and whether the homeserver's list has that device, with that key, under the event's sender.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowbridge import metrics
from flowbridge.encryption import complaints
from flowbridge.encryption.channels import Received
from flowbridge.encryption.identities import MAX_ID, MEGOLM, Device, is_id
from flowbridge.encryption.olm import CryptoError, GroupMessage, InboundGroup
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.peers import Peers
from flowbridge.homeserver.sync import Json, section
from flowbridge.limits.cache import Cache
from flowbridge.store import clock, crypto
from flowbridge.store.crypto import Changes, Index, StoredRoomKey

MAX_KEYS = 2_000  # room keys in memory
MAX_INDEXES = 50_000

Source = Literal["own", "shared", "imported"]
WITHHELD = {
    "m.unverified": "its sender shares keys with verified devices only",
    "m.blacklisted": "its sender has blocked this device",
    "m.unauthorised": "its sender does not let this device read it",
    "m.unavailable": "its sender has no key of it any more",
    "m.no_olm": "its sender could not reach this device",
}


class Undecryptable(CryptoError):
    """An event that cannot be read; `waits`: its key may still come. `kind`: see metrics.undecryptable."""

    def __init__(self, reason: str, kind: str, *, waits: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.waits = waits


@dataclass(frozen=True, slots=True)
class Decrypted:
    """`event`: as it was before it was encrypted. `device_id`: "" where the homeserver lists no such device.

    `verified`: the sender's own device, signed by the sender's cross-signing keys, made the key.
    """

    event: Json
    device_id: str
    verified: bool


@dataclass(frozen=True, slots=True)
class _Key:
    group: InboundGroup
    peer: str
    user_id: str
    ed25519: str
    source: Source


class Inbound:
    def __init__(self, device: OwnDevice, peers: Peers) -> None:
        self._device = device
        self._peers = peers
        self._keys: Cache[tuple[str, str], tuple[_Key, ...]] = Cache(MAX_KEYS)
        self._indexes: Cache[tuple[str, int], str] = Cache(MAX_INDEXES)
        self._withheld: Cache[tuple[str, str], str] = Cache(MAX_KEYS)

    # keys

    def take(self, received: Sequence[Received], changes: Changes) -> set[tuple[str, str]]:
        """Room keys among what devices sent; returns the rooms and sessions that they are of."""
        found = set()
        for message in received:
            if message.type != "m.room_key":
                continue
            try:
                key = self._of(message)
            except CryptoError as error:
                metrics.count(metrics.to_device_dropped, "room_key")
                complaints.warn("room_key_not_taken", sender=message.sender[:MAX_ID], reason=error)
                continue
            changes.room_keys.append(key)
            found.add((key.room_id, key.session_id))
        return found

    def taken(self, keys: set[tuple[str, str]]) -> None:
        """They are in the store."""
        for key in keys:
            self._keys.pop(key)
            self._withheld.pop(key)

    def withheld(self, events: Sequence[Json]) -> None:
        """Devices say why they share no key. Anyone may say so: it is only shown."""
        for event in events:
            content = section(event, "content")
            room_id, session_id, code = (content.get(name) for name in ("room_id", "session_id", "code"))
            if event.get("type") == "m.room_key.withheld" and is_id(room_id) and is_id(session_id):
                self._withheld.put((room_id, session_id), WITHHELD.get(str(code), "its sender shares no key of it"))

    def _of(self, message: Received) -> StoredRoomKey:
        content = message.content
        room_id, session_id, text = (content.get(name) for name in ("room_id", "session_id", "session_key"))
        if content.get("algorithm") != MEGOLM or not all(isinstance(each, str) for each in (room_id, session_id, text)):
            raise CryptoError("it is no Megolm key")
        group = InboundGroup.from_key(str(text))
        if group.id != session_id:
            raise CryptoError("the key is not of the session that it names")
        if not is_id(room_id) or not room_id.startswith("!"):
            raise CryptoError("it names no room")
        about = {"user_id": message.sender, "ed25519": message.ed25519, "source": "shared"}
        return self.kept(room_id, group, message.curve25519, about)

    def kept(self, room_id: str, group: InboundGroup, peer: str, about: Json) -> StoredRoomKey:
        own = self._device
        pickle, sealed = group.pickle(own.seal.pickle_key), own.seal.close(about)
        return StoredRoomKey(room_id, group.id, peer, pickle, sealed, group.first_index, clock.now_ms())

    # events

    async def decrypt(self, room_id: str, event: Json) -> Decrypted:
        """Read an m.room.encrypted. Raises Undecryptable, StoreUnavailable, MatrixError."""
        content, sender = section(event, "content"), event.get("sender")
        session_id, ciphertext = content.get("session_id"), content.get("ciphertext")
        if content.get("algorithm") != MEGOLM:
            raise Undecryptable("it is encrypted by an algorithm that is not known here", "algorithm")
        if not is_id(session_id) or not isinstance(ciphertext, str) or not is_id(sender):
            raise Undecryptable("it is malformed", "malformed")
        keys = await self._get(room_id, session_id)
        if not keys:
            why = self._withheld.get((room_id, session_id))
            raise Undecryptable(why or "its room key has not come", "withheld" if why else "no_key", waits=True)
        key, message = _read(keys, sender, ciphertext)
        await self._check_index(session_id, message.number, event)
        plain = _plain(message.plaintext, room_id)
        device = await self._author(key, sender)
        return Decrypted(
            {**event, "type": plain["type"], "content": _whole(plain["content"], content)},
            device.device_id if device else "",
            device is not None and device.signed and key.source != "imported",
        )

    async def _get(self, room_id: str, session_id: str) -> tuple[_Key, ...]:
        known = self._keys.get((room_id, session_id))
        if known is not None:
            return known
        own = self._device
        stored = await own.database.read(
            lambda connection: crypto.room_keys(connection, own.account_id, room_id, session_id)
        )
        found = []
        for row in stored:
            about = own.seal.open(row.sealed)
            group = InboundGroup.from_pickle(row.pickle, own.seal.pickle_key)
            found.append(_Key(group, row.peer, about["user_id"], about["ed25519"], about["source"]))
        return self._keys.put((room_id, session_id), tuple(found)) if found else ()

    async def _check_index(self, session_id: str, index: int, event: Json) -> None:
        """A message of a session is one event: else the homeserver shows it a second time."""
        mark = _mark(event)
        place = (session_id, index)
        own = self._device
        known = self._indexes.get(place)
        if known is None:
            known = await own.database.read(
                lambda connection: crypto.index_mark(connection, own.account_id, session_id, index)
            )
        if known is None:
            await own.commit(Changes(indexes=[Index(session_id, index, mark)]))
        elif known != mark:
            raise Undecryptable("it repeats a message that was another event", "replayed")
        self._indexes.put(place, mark)

    async def _author(self, key: _Key, sender: str) -> Device | None:
        """The sender's device that made the key; None when the key is not the sender's, as far as the list goes."""
        if key.user_id != sender:
            return None
        if sender == self._device.user_id and key.peer == self._device.account.curve25519:
            own = self._device
            signed = own.cross_signing is not None
            return Device(own.user_id, own.device_id, own.account.curve25519, own.account.ed25519, signed)
        user = (await self._peers.of([sender])).get(sender)
        device = user.by_key(key.peer) if user else None
        return device if device is not None and device.ed25519 == key.ed25519 else None


def _read(keys: Sequence[_Key], sender: str, ciphertext: str) -> tuple[_Key, GroupMessage]:
    """A room key can be shared on by any of its readers, and imported: the sender's own counts, where it reads this.

    Raises Undecryptable.
    """
    failure: Undecryptable | None = None
    for key in sorted(keys, key=lambda key: key.user_id != sender or key.source == "imported"):
        try:
            return key, key.group.decrypt(ciphertext)
        except CryptoError as error:
            waits = "index" in str(error) and key.group.first_index > 0  # a key from further back may come
            failure = failure or Undecryptable(str(error), "no_key" if waits else "failed", waits=waits)
    assert failure is not None
    raise failure


def _plain(plaintext: bytes, room_id: str) -> Json:
    try:
        value: Any = json.loads(plaintext)
    except (ValueError, RecursionError):
        value = None
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("type"), str)
        or not isinstance(value.get("content"), dict)
    ):
        raise Undecryptable("what was encrypted is no event", "malformed")
    if value.get("room_id") != room_id:
        raise Undecryptable("it was encrypted for another room", "malformed")
    return value


def _whole(content: Json, outside: Json) -> Json:
    """With the relation that stands outside, for servers: that one counts where there are two."""
    relation = outside.get("m.relates_to")
    return content if relation is None else {**content, "m.relates_to": relation}


def _mark(event: Json) -> str:
    text = f"{event.get('event_id')} {event.get('origin_server_ts')}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
