"""A device of the bridge, as the process that holds its lease has it.

Its keys are in memory, all else is read from the store where it is needed. What moves a ratchet happens under `lock`,
and is committed before it has an effect outside: after a crash the store and the world agree, or the store is behind
by what never left.
"""

import asyncio
from typing import Any

from flowbridge.encryption import signatures
from flowbridge.encryption.cross_signing import CrossSigning
from flowbridge.encryption.identities import ALGORITHMS
from flowbridge.encryption.olm import Account, CryptoError
from flowbridge.encryption.sealing import Seal
from flowbridge.errors import Unavailable
from flowbridge.store import Database, StoreUnavailable, crypto
from flowbridge.store.crypto import Changes, DeviceLease, StoredDevice


class LeaseLost(Unavailable):
    """Another process acts as this device by now."""

    def __init__(self) -> None:
        super().__init__("another replica of the bridge holds this device")


class OwnDevice:
    """`secrets`: JSON that is the device's own, private keys among it. Raises CryptoError under another secret key."""

    def __init__(self, database: Database, seal: Seal, lease: DeviceLease, stored: StoredDevice) -> None:
        self.database = database
        self.seal = seal
        self.lease = lease
        self.user_id = stored.user_id
        self.device_id = stored.device_id
        self.account = Account.from_pickle(stored.pickle, seal.pickle_key)
        self.secrets: dict[str, Any] = seal.open(stored.sealed)
        self.since = stored.since or ""
        self.lock = asyncio.Lock()
        self.lost = asyncio.Event()
        self._published: dict[str, Any] | None = None

    @property
    def is_lost(self) -> bool:
        return self.lost.is_set()

    @property
    def account_id(self) -> str:
        return self.lease.account

    @property
    def cross_signing(self) -> CrossSigning | None:
        """The account's private cross-signing keys, as far as this device has them."""
        seeds = self.secrets.get("cross_signing")
        return CrossSigning.from_seeds(self.user_id, seeds) if seeds else None

    def keys(self) -> dict[str, Any]:
        """Its public keys, signed by itself and, where that is possible, as the account's."""
        name = self.device_id
        keys = {
            "user_id": self.user_id,
            "device_id": name,
            "algorithms": ALGORITHMS,
            "keys": {f"curve25519:{name}": self.account.curve25519, f"ed25519:{name}": self.account.ed25519},
        }
        signed = signatures.add(keys, self.user_id, name, self.account.sign(signatures.signed_part(keys)))
        cross_signing = self.cross_signing
        if cross_signing is not None and "self_signing" in cross_signing.keys:
            signed = cross_signing.sign_device(signed)
        return signed

    def published(self) -> dict[str, Any]:
        """As `keys`, kept: they change with the account's cross-signing keys only."""
        if self._published is None:
            self._published = self.keys()
        return self._published

    def signed_key(self, key: str, *, fallback: bool = False) -> dict[str, Any]:
        """A one-time key as it is published."""
        value = {"key": key, **({"fallback": True} if fallback else {})}
        signature = self.account.sign(signatures.signed_part(value))
        return signatures.add(value, self.user_id, self.device_id, signature)

    def note_account(self, changes: Changes) -> None:
        """The device's own keys have changed."""
        changes.pickle = self.account.pickle(self.seal.pickle_key)

    def note_secrets(self, changes: Changes) -> None:
        changes.sealed = self.seal.close(self.secrets)
        self._published = None

    async def commit(self, changes: Changes) -> None:
        """Write a step. Raises LeaseLost, StoreUnavailable; then what is in memory is what the store has."""
        if self.is_lost:
            raise LeaseLost
        try:
            written = await self.database.run(lambda connection: crypto.write(connection, self.lease, changes))
        except BaseException:
            if changes.pickle is not None or changes.sealed is not None:
                await self._reload()
            raise
        if not written:
            self.lost.set()
            raise LeaseLost
        if changes.since is not None:
            self.since = changes.since

    async def _reload(self) -> None:
        """After a commit of which it is not known whether it was done."""
        try:
            stored = await self.database.read(lambda connection: crypto.device(connection, self.account_id))
            if stored is not None:
                self.account = Account.from_pickle(stored.pickle, self.seal.pickle_key)
                self.secrets = self.seal.open(stored.sealed)
                self.since = stored.since or ""
                return
        except (StoreUnavailable, CryptoError):
            pass
        self.lost.set()  # whoever claims it next reads it from the store
