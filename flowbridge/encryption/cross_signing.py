"""The account's own cross-signing keys: they say, of a device, that it is the account's (specification, 11.11.3.2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flowbridge.encryption import signatures, unpadded
from flowbridge.encryption.identities import Identity
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.signatures import SEED_BYTES, SigningKey

USAGES = ("master", "self_signing", "user_signing")


def secret_name(usage: str) -> str:
    """As secret storage calls it."""
    return f"m.cross_signing.{usage}"


@dataclass(frozen=True, slots=True)
class CrossSigning:
    """The private keys. With the self-signing key alone devices can be signed, too."""

    user_id: str
    keys: Mapping[str, SigningKey]  # by usage

    @classmethod
    def generate(cls, user_id: str) -> Self:
        return cls(user_id, {usage: SigningKey.generate() for usage in USAGES})

    @classmethod
    def from_seeds(cls, user_id: str, seeds: Mapping[str, str]) -> Self:
        """`seeds`: unpadded base64, by usage. Raises CryptoError."""
        keys = {}
        for usage, text in seeds.items():
            try:
                seed = unpadded.decode(text)
            except ValueError:
                seed = b""
            if usage not in USAGES or len(seed) != SEED_BYTES:
                raise CryptoError(f"the {usage} key of cross-signing is not one")
            keys[usage] = SigningKey(seed)
        return cls(user_id, keys)

    def seeds(self) -> dict[str, str]:
        return {usage: unpadded.encode(key.seed) for usage, key in self.keys.items()}

    @property
    def identity(self) -> Identity:
        """The public keys of a whole set."""
        return Identity(**{usage: self.keys[usage].public for usage in USAGES})

    def matches(self, published: Identity | None) -> bool:
        """Whether these are the keys that the account has published, as far as they are here."""
        return published is not None and all(
            key.public == getattr(published, usage) for usage, key in self.keys.items()
        )

    def upload(self, device_id: str, sign_as_device: Callable[[bytes], str]) -> dict[str, Any]:
        """The body of /keys/device_signing/upload. The device signs the master key, as clients expect it of one."""
        public = {usage: self._public(usage) for usage in USAGES}
        master = self.keys["master"]
        for usage in ("self_signing", "user_signing"):
            signature = master.sign(signatures.signed_part(public[usage]))
            public[usage] = signatures.add(public[usage], self.user_id, master.public, signature)
        by_device = sign_as_device(signatures.signed_part(public["master"]))
        public["master"] = signatures.add(public["master"], self.user_id, device_id, by_device)
        return {f"{usage}_key": key for usage, key in public.items()}

    def sign_device(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """A device's keys with the signature of the self-signing key."""
        key = self.keys["self_signing"]
        return signatures.add(keys, self.user_id, key.public, key.sign(signatures.signed_part(keys)))

    def _public(self, usage: str) -> dict[str, Any]:
        public = self.keys[usage].public
        return {"user_id": self.user_id, "usage": [usage], "keys": {f"ed25519:{public}": public}}
