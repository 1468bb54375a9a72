"""The file that clients export room keys to, and import them from (specification, "Key export format"). Pure."""

import base64
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from flowbridge.encryption.identities import MAX_ID, MEGOLM, is_id
from flowbridge.encryption.olm import CryptoError, InboundGroup

ROUNDS = 500_000  # as clients write it; the specification asks for 100,000 at least
MAX_ROUNDS = 10_000_000  # four seconds
MAX_BYTES = 64 << 20  # of a file: some 90,000 keys
MAX_KEYS = 200_000

_BEGIN = "-----BEGIN MEGOLM SESSION DATA-----"
_END = "-----END MEGOLM SESSION DATA-----"
_VERSION = b"\x01"
_HEAD, _MAC = 1 + 16 + 16 + 4, 32
_LINE = 76


@dataclass(frozen=True, slots=True)
class RoomKey:
    """A room key with what is said of whose it is; nothing proves that. `sender_key`: of the device that made it."""

    room_id: str
    sender_key: str
    ed25519: str
    group: InboundGroup

    def told(self) -> dict[str, Any]:
        return {
            "algorithm": MEGOLM,
            "forwarding_curve25519_key_chain": [],
            "room_id": self.room_id,
            "sender_key": self.sender_key,
            "sender_claimed_keys": {"ed25519": self.ed25519},
            "session_id": self.group.id,
            "session_key": self.group.export(),
        }


def room_key(value: Any) -> RoomKey:
    """An exported session, from a file or a backup. Raises CryptoError, which says what is wrong."""
    if not isinstance(value, dict) or value.get("algorithm") != MEGOLM:
        raise CryptoError("it is no Megolm key")
    room_id, sender_key, session_id = (value.get(name) for name in ("room_id", "sender_key", "session_id"))
    claimed = value.get("sender_claimed_keys")
    ed25519 = claimed.get("ed25519") if isinstance(claimed, dict) else None
    if not is_id(room_id) or not room_id.startswith("!"):
        raise CryptoError("it names no room")
    if not is_id(sender_key) or len(sender_key) >= MAX_ID:
        raise CryptoError("it names no device")
    text = value.get("session_key")
    if not isinstance(text, str):
        raise CryptoError("it holds no key")
    group = InboundGroup.from_export(text)
    if group.id != session_id:
        raise CryptoError("the key is not of the session that it names")
    return RoomKey(room_id, sender_key, ed25519 if is_id(ed25519) else "", group)


def write(keys: Sequence[RoomKey], passphrase: str, *, rounds: int = ROUNDS) -> str:
    """The file's text."""
    iv = bytearray(secrets.token_bytes(16))
    iv[8] &= 0x7F  # bit 63 is 0: some platforms' counter has 64 bits
    head = _VERSION + secrets.token_bytes(16) + bytes(iv) + rounds.to_bytes(4, "big")
    aes, mac_key = _keys(passphrase, head, rounds)
    body = head + _aes(aes, bytes(iv), json.dumps([key.told() for key in keys], separators=(",", ":")).encode())
    text = base64.b64encode(body + hmac.digest(mac_key, body, "sha256")).decode()
    lines = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    return "\n".join([_BEGIN, *lines, _END, ""])


def read(text: str, passphrase: str) -> list[Any]:
    """The sessions in a file, each to be read by `room_key`. Raises CryptoError, which says what is wrong."""
    _, begin, rest = text.partition(_BEGIN)
    inside, end, _ = rest.partition(_END)
    if not begin or not end:
        raise CryptoError("it is not a file of room keys")
    try:
        raw = base64.b64decode("".join(inside.split()), validate=True)
    except ValueError:
        raise CryptoError("the file of room keys is damaged: it is not base64") from None
    if len(raw) < _HEAD + _MAC or not raw.startswith(_VERSION):
        raise CryptoError("the file of room keys is cut off, or of another version")
    body, mac = raw[:-_MAC], raw[-_MAC:]
    rounds = int.from_bytes(body[_HEAD - 4 : _HEAD], "big")
    if not 0 < rounds <= MAX_ROUNDS:
        raise CryptoError(f"the file of room keys asks for {rounds} rounds")
    aes, mac_key = _keys(passphrase, body, rounds)
    if not hmac.compare_digest(hmac.digest(mac_key, body, "sha256"), mac):
        raise CryptoError("the passphrase is wrong, or the file of room keys is damaged")
    try:
        found = json.loads(_aes(aes, body[17:33], body[_HEAD:]))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise CryptoError("the file holds no list of room keys")
    if len(found) > MAX_KEYS:
        raise CryptoError(f"the file holds {len(found)} room keys, of which {MAX_KEYS} could be taken")
    return found


def _keys(passphrase: str, head: bytes, rounds: int) -> tuple[bytes, bytes]:
    both = PBKDF2HMAC(SHA512(), 64, head[1:17], rounds).derive(passphrase.encode())
    return both[:32], both[32:]


def _aes(key: bytes, iv: bytes, text: bytes) -> bytes:
    cipher = Cipher(AES(key), CTR(iv)).encryptor()
    return cipher.update(text) + cipher.finalize()
