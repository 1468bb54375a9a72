"""Olm channels: encrypted messages to other devices and from them. Called under the lock of the device."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowbridge import log, metrics
from flowbridge.encryption import complaints, signatures
from flowbridge.encryption.identities import OLM, Device, is_id
from flowbridge.encryption.key_server import CLAIM_DEVICES, SEND_DEVICES, KeyServer
from flowbridge.encryption.olm import PRE_KEY, CryptoError, OlmMessage, Session
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.events import canonical_json
from flowbridge.homeserver.sync import Json, section
from flowbridge.limits.cache import Cache
from flowbridge.store import clock, crypto
from flowbridge.store.crypto import Changes, StoredSession

TURN = 10  # devices that are encrypted for before other tasks have their turn: some 10 ms
NO_KEY_SECONDS = 300.0  # after which a device is asked again that had no one-time key
MAX_SEEN = 10_000
AT_ONCE = 500  # messages that are read together: of a flood only so many are in memory twice

Unreached = list[Device]


@dataclass(frozen=True, slots=True)
class Received:
    """What a device sent us. `ed25519`: what it says its own key is; proved only where the homeserver's list agrees."""

    sender: str
    curve25519: str
    ed25519: str
    type: str
    content: Json


@dataclass(slots=True)
class Reading:
    """The messages of a sync, read. `wedged`: (user, Curve25519 key) of devices whose sessions do not work any more."""

    received: list[Received] = field(default_factory=list)
    wedged: set[tuple[str, str]] = field(default_factory=set)


class Channels:
    def __init__(self, device: OwnDevice, server: KeyServer) -> None:
        self._device = device
        self._server = server
        self._no_key: Cache[tuple[str, str], bool] = Cache(MAX_SEEN, NO_KEY_SECONDS)
        self._seen: Cache[bytes, bool] = Cache(MAX_SEEN)

    # to other devices

    async def send(self, type_: str, contents: Mapping[Device, Json], *, anew: bool = False) -> Unreached:
        """Send each device its content; returns those that cannot be reached, having no one-time key.

        Raises MatrixError, StoreUnavailable: then some may have got theirs. `anew`: by new sessions.
        """
        unreached: Unreached = []
        devices = list(contents)
        for start in range(0, len(devices), SEND_DEVICES):
            batch = devices[start : start + SEND_DEVICES]
            sessions = {} if anew else await self._sessions(batch)
            missing = [device for device in batch if device.curve25519 not in sessions]
            sessions |= await self._begin(missing)
            changes, messages = Changes(), dict[str, dict[str, Json]]()
            for number, device in enumerate(batch):
                session, used_at = sessions.get(device.curve25519, (None, 0))
                if session is None:
                    unreached.append(device)
                    continue
                content = self._encrypt(session, device, type_, contents[device])
                messages.setdefault(device.user_id, {})[device.device_id] = content
                changes.sessions.append(self._kept(device.curve25519, session, used_at))
                if number % TURN == TURN - 1:
                    await asyncio.sleep(0)
            if messages:
                await self._device.commit(changes)
                await self._server.send_to_device("m.room.encrypted", messages)
        return unreached

    async def _sessions(self, devices: Sequence[Device]) -> dict[str, tuple[Session, int]]:
        """The session with each device that was used last, and when that was."""
        account, peers = self._device.account_id, {device.curve25519 for device in devices}
        stored = await self._device.database.read(lambda connection: crypto.sessions(connection, account, peers))
        found: dict[str, tuple[Session, int]] = {}
        for row in stored:
            if row.peer not in found:
                found[row.peer] = (Session.from_pickle(row.pickle, self._device.seal.pickle_key), row.used_at)
        return found

    async def _begin(self, devices: Iterable[Device]) -> dict[str, tuple[Session, int]]:
        """New sessions, with those of these devices that have a one-time key that is theirs."""
        wanted = [device for device in devices if (device.user_id, device.device_id) not in self._no_key]
        found: dict[str, tuple[Session, int]] = {}
        for start in range(0, len(wanted), CLAIM_DEVICES):
            batch = wanted[start : start + CLAIM_DEVICES]
            names: dict[str, list[str]] = {}
            for device in batch:
                names.setdefault(device.user_id, []).append(device.device_id)
            claimed = await self._server.claim(names)
            for number, device in enumerate(batch):
                try:
                    key = _one_time_key(section(claimed, device.user_id, device.device_id), device)
                    found[device.curve25519] = (self._device.account.outbound(device.curve25519, key), clock.now_ms())
                    metrics.count(metrics.crypto_sessions, "device")
                except CryptoError as error:
                    log.info("device_unreached", user=device.user_id, device=device.device_id, reason=error)
                    self._no_key.put((device.user_id, device.device_id), True)
                if number % TURN == TURN - 1:
                    await asyncio.sleep(0)
        return found

    def _encrypt(self, session: Session, device: Device, type_: str, content: Json) -> Json:
        own = self._device
        payload = {
            "type": type_,
            "content": content,
            "sender": own.user_id,
            "sender_device": own.device_id,
            "keys": {"ed25519": own.account.ed25519},
            "sender_device_keys": own.published(),
            "recipient": device.user_id,
            "recipient_keys": {"ed25519": device.ed25519},
        }
        message = session.encrypt(canonical_json.write(payload))
        return {
            "algorithm": OLM,
            "sender_key": own.account.curve25519,
            "ciphertext": {device.curve25519: {"type": message.type, "body": message.body}},
            "org.matrix.msgid": secrets.token_hex(16),
        }

    def _kept(self, peer: str, session: Session, used_at: int) -> StoredSession:
        return StoredSession(peer, session.id, session.pickle(self._device.seal.pickle_key), used_at)

    # from other devices

    async def read(self, events: Sequence[Json], changes: Changes) -> Reading:
        """Decrypt what there is for this device among a sync's to-device events; the sessions go into `changes`.

        What cannot be read is dropped with a line in the log: it may come from anyone.
        """
        reading, sessions, used = Reading(), dict[str, list[Session]](), dict[str, StoredSession]()
        for start in range(0, len(events), AT_ONCE):
            await self._read_some(events[start : start + AT_ONCE], start, sessions, used, reading, changes)
            await asyncio.sleep(0)
        changes.sessions += used.values()
        return reading

    async def _read_some(
        self,
        events: Sequence[Json],
        first: int,
        sessions: dict[str, list[Session]],
        used: dict[str, StoredSession],
        reading: Reading,
        changes: Changes,
    ) -> None:
        """`first`: the number of the first event. `sessions`: by peer, as the events before have left them."""
        own = self._device
        messages = [message for event in events if (message := _message(event, own.account.curve25519))]
        peers = {message.peer for message in messages} - sessions.keys()
        if peers:
            stored = await own.database.read(lambda connection: crypto.sessions(connection, own.account_id, peers))
            for row in stored:
                sessions.setdefault(row.peer, []).append(Session.from_pickle(row.pickle, own.seal.pickle_key))
        for number, message in enumerate(messages, first):
            if message.digest in self._seen:  # another sync of the device brought it, too
                continue
            try:
                session, plaintext = self._decrypt(sessions, message, changes)
                received = self._checked(plaintext, message)
            except CryptoError as error:
                metrics.count(metrics.to_device_dropped, "unreadable")
                complaints.warn("to_device_unreadable", sender=message.sender[:255], reason=error)
                if len(reading.wedged) < MAX_SEEN:
                    reading.wedged.add((message.sender, message.peer))
            else:
                used[session.id] = self._kept(message.peer, session, clock.now_ms() + number)
                self._seen.put(message.digest, True)
                if received is not None:
                    reading.received.append(received)
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)

    def _decrypt(
        self, sessions: dict[str, list[Session]], message: "_Message", changes: Changes
    ) -> tuple[Session, bytes]:
        """With the session that the message belongs to, or a new one, which uses one of our one-time keys up."""
        begins = message.olm.type == PRE_KEY
        failure = CryptoError("there is no Olm session with this device")
        for session in sessions.get(message.peer, ()):
            if begins and not session.begins_with(message.olm):
                continue
            try:
                return session, session.decrypt(message.olm)
            except CryptoError as error:
                failure = error
                if begins:  # its one-time key is gone: another session cannot be begun with it
                    raise
        if not begins:
            raise failure
        session, plaintext = self._device.account.inbound(message.peer, message.olm)
        self._device.note_account(changes)
        sessions.setdefault(message.peer, []).insert(0, session)
        metrics.count(metrics.crypto_sessions, "device")
        return session, plaintext

    def _checked(self, plaintext: bytes, message: "_Message") -> Received | None:
        """What the message says, when it was meant for this device and is from whom the homeserver says it is.

        Otherwise somebody sent on what was meant for another one. None: that is logged.
        """
        own = self._device
        try:
            value = json.loads(plaintext)
        except (ValueError, RecursionError):
            value = None
        keys = section(value, "keys")
        meant = (
            section(value, "recipient_keys").get("ed25519") == own.account.ed25519
            and value.get("recipient") == own.user_id
            and value.get("sender") == message.sender
        )
        if not meant or not isinstance(value.get("type"), str) or not isinstance(keys.get("ed25519"), str):
            metrics.count(metrics.to_device_dropped, "not_meant")
            complaints.warn(
                "to_device_not_taken", sender=message.sender[:255], reason="it was not meant for this device"
            )
            return None
        return Received(message.sender, message.peer, keys["ed25519"], value["type"], section(value, "content"))


@dataclass(frozen=True, slots=True)
class _Message:
    sender: str
    peer: str  # Curve25519 key
    olm: OlmMessage
    digest: bytes


def _message(event: Json, own_key: str) -> _Message | None:
    """An Olm message for this key; None for any other event."""
    content = section(event, "content")
    mine = section(content, "ciphertext", own_key)
    sender, peer, type_, body = event.get("sender"), content.get("sender_key"), mine.get("type"), mine.get("body")
    if event.get("type") != "m.room.encrypted" or content.get("algorithm") != OLM:
        return None
    if not is_id(sender) or not is_id(peer) or not isinstance(body, str) or type(type_) is not int:
        return None
    digest = hashlib.sha256(f"{peer} {body}".encode("utf-8", "replace")).digest()
    return _Message(sender, peer, OlmMessage(type_, body), digest)


def _one_time_key(claimed: Mapping[str, Any], device: Device) -> str:
    """The key that was claimed of a device. Raises CryptoError unless the device signed it."""
    for name, value in claimed.items():
        if not name.startswith("signed_curve25519:") or not isinstance(value, dict):
            continue
        if not isinstance(value.get("key"), str):
            continue
        if not signatures.is_signed(value, device.user_id, device.device_id, device.ed25519):
            raise CryptoError("its one-time key is not signed by the device")
        return str(value["key"])
    raise CryptoError("it has no one-time key left")
