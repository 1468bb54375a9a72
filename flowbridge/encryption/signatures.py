"""Signed JSON (specification, appendix "Signing JSON"): keys are Ed25519, in unpadded base64."""

import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowbridge.encryption import olm, unpadded
from flowbridge.events import canonical_json

SEED_BYTES = 32
_UNSIGNED = ("signatures", "unsigned")


class SigningKey:
    """A key that signs other keys: its `seed` is what is kept, and put into secret storage."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = unpadded.encode(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> "SigningKey":
        return cls(secrets.token_bytes(SEED_BYTES))

    def sign(self, message: bytes) -> str:
        return unpadded.encode(self._key.sign(message))


def signed_part(value: Mapping[str, Any]) -> bytes:
    """What a signature of this object is of. Raises UnicodeEncodeError for a lone surrogate."""
    return canonical_json.write({name: each for name, each in value.items() if name not in _UNSIGNED})


def add(value: Mapping[str, Any], user_id: str, key_id: str, signature: str) -> dict[str, Any]:
    """The object with one more signature. `key_id`: the device's, or the public key itself."""
    mine = {**value.get("signatures", {})}
    mine[user_id] = {**mine.get(user_id, {}), f"ed25519:{key_id}": signature}
    return {**value, "signatures": mine}


def is_signed(value: Any, user_id: str, key_id: str, ed25519: str) -> bool:
    """Whether this key signed the object; also False for an object that is made so as not to be one."""
    try:
        signature = value["signatures"][user_id][f"ed25519:{key_id}"]
        message = signed_part(value)
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
        return False
    return isinstance(signature, str) and olm.is_signed_by(ed25519, message, signature)
