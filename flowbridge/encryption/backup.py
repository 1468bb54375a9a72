"""The account's key backup, which its clients fill (m.megolm_backup.v1.curve25519-aes-sha2): read, key by key.

The bridge reads it once it knows the backup's private key, which `device recover` takes out of secret storage. A key is
fetched when an event cannot be read without it; never the whole backup, which may hold years of other rooms.

Whoever knows the public key can put keys there, the homeserver among them (its MAC authenticates nothing): what is read
with them is never `verified`.
"""

import asyncio
import json
import time
from typing import Any

from flowbridge import log
from flowbridge.encryption import key_file, room_keys, unpadded
from flowbridge.encryption.identities import is_id
from flowbridge.encryption.key_server import KeyServer
from flowbridge.encryption.olm import Backup, CryptoError
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.errors import MatrixError
from flowbridge.homeserver.sync import Json, section
from flowbridge.limits.cache import Cache
from flowbridge.store.crypto import Changes

ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
PAUSE_SECONDS = 0.1  # between two questions: a page of old events may need a hundred keys
MAX_WAITING = 30  # readers that wait for their turn; the next ones do without, and find it when they read again
AGAIN_SECONDS = 300.0  # after which a key is looked for again that was not there; likewise the backup
MAX_MISSING = 10_000
MAX_VERSION = 64  # characters


class KeyBackup:
    def __init__(self, device: OwnDevice, server: KeyServer) -> None:
        self._device = device
        self._server = server
        self._missing: Cache[tuple[str, str], bool] = Cache(MAX_MISSING, AGAIN_SECONDS)
        self._version: Cache[str, str] = Cache(1, AGAIN_SECONDS)  # by the public key; "": none that is ours
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._asked_at = -1e9

    async def fetch(self, room_id: str, session_id: str) -> bool:
        """Take a room key out of the backup; False where it is not there. Raises StoreUnavailable, LeaseLost."""
        place = (room_id, session_id)
        if not self._device.secrets.get("backup_key") or place in self._missing or self._waiting >= MAX_WAITING:
            return False
        self._waiting += 1
        try:
            async with self._turn:
                if place in self._missing:
                    return False
                await asyncio.sleep(max(0.0, self._asked_at + PAUSE_SECONDS - time.monotonic()))
                self._asked_at = time.monotonic()
                self._missing.put(place, True)  # also of a key that is taken: it is in the store then
                return await self._fetch(room_id, session_id)
        finally:
            self._waiting -= 1

    async def _fetch(self, room_id: str, session_id: str) -> bool:
        own = self._device
        try:
            backup = Backup(_raw(own.secrets["backup_key"]))
            version = await self._current(backup)
            answer = await self._server.backed_up(room_id, session_id, version) if version else None
            if answer is None:
                return False
            key = key_file.room_key({**_opened(backup, answer), "room_id": room_id, "session_id": session_id})
        except (CryptoError, MatrixError) as error:
            log.warning("backup_not_read", room=room_id, reason=error)
            return False
        async with own.lock:
            await own.commit(Changes(room_keys=[room_keys.claimed(own, key)]))
        return True

    async def _current(self, backup: Backup) -> str:
        """The version of the account's backup; "" unless it is of this key."""
        known = self._version.get(backup.public_key)
        if known is not None:
            return known
        told = await self._server.backup_version() or {}
        version, public = told.get("version"), section(told, "auth_data").get("public_key")
        fits = (
            told.get("algorithm") == ALGORITHM and isinstance(public, str) and public.rstrip("=") == backup.public_key
        )
        if not fits or not is_id(version) or len(version) > MAX_VERSION:
            log.warning("backup_not_read", reason="the account has no key backup with the key that is known here")
            version = ""
        return self._version.put(backup.public_key, version)


def _raw(text: Any) -> bytes:
    try:
        return unpadded.decode(text)
    except ValueError:
        raise CryptoError("the backup's key is not one") from None


def _opened(backup: Backup, answer: Json) -> Json:
    data = section(answer, "session_data")
    parts = [data.get(name) for name in ("ciphertext", "mac", "ephemeral")]
    if not all(isinstance(part, str) for part in parts):
        raise CryptoError("a backed-up room key is malformed")
    plain = backup.decrypt(*map(str, parts))
    try:
        value = json.loads(plain)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CryptoError("a backed-up room key is malformed")
    return value
