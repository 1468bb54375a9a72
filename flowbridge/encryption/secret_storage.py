"""Secret storage: secrets in the account data, under a key that a person keeps (specification, 11.12). Pure."""

import base64
import hmac
import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from flowbridge.encryption import unpadded
from flowbridge.encryption.olm import CryptoError

ALGORITHM = "m.secret_storage.v1.aes-hmac-sha2"
DEFAULT_KEY = "m.secret_storage.default_key"
KEY_BYTES = 32
MAX_ITERATIONS = 10_000_000  # of a passphrase's key: clients use 500,000, which takes 0.2 s

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PREFIX = b"\x8b\x01"


def key_type(key_id: str) -> str:
    """The account data that describes a key."""
    return f"m.secret_storage.key.{key_id}"


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def recovery_key(key: bytes) -> str:
    """A key as people keep it: Base58 in groups of four, with a parity byte."""
    raw = _PREFIX + key
    parity = 0
    for byte in raw:
        parity ^= byte
    number = int.from_bytes(raw + bytes([parity]), "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def read_recovery_key(text: str) -> bytes:
    """Raises CryptoError for a text that is not one, or has a slip of the pen."""
    number = 0
    for character in "".join(text.split()):
        if character not in _ALPHABET:
            raise CryptoError(f"a recovery key holds no {character!r}")
        number = number * 58 + _ALPHABET.index(character)
        if number >= 1 << 8 * (len(_PREFIX) + KEY_BYTES + 1):
            raise CryptoError("the recovery key is too long")
    raw = number.to_bytes(len(_PREFIX) + KEY_BYTES + 1, "big")
    parity = 0
    for byte in raw:
        parity ^= byte
    if parity or not raw.startswith(_PREFIX):
        raise CryptoError("it is not a recovery key, or has a typing error")
    return raw[len(_PREFIX) : -1]


def describe(key: bytes) -> dict[str, Any]:
    """The account data of a key: by its `mac` a key can be checked before it is used."""
    iv = _new_iv()
    sealed = _encrypt(key, "", bytes(KEY_BYTES), iv)
    return {"algorithm": ALGORITHM, "name": "flowbridge", "iv": sealed["iv"], "mac": sealed["mac"]}


def fits(key: bytes, description: Mapping[str, Any]) -> bool:
    """Whether this is the key that was described. A description without a check fits every key."""
    if description.get("algorithm") != ALGORITHM:
        return False
    iv, mac = description.get("iv"), description.get("mac")
    if not isinstance(iv, str) or not isinstance(mac, str):
        return True
    try:
        expected = _encrypt(key, "", bytes(KEY_BYTES), unpadded.decode(iv))["mac"]
    except ValueError:
        return False
    return hmac.compare_digest(expected.rstrip("=").encode(), mac.rstrip("=").encode())


def key_of_passphrase(passphrase: str, description: Mapping[str, Any]) -> bytes:
    """The key that a passphrase stands for. Raises CryptoError where it stands for none."""
    how = description.get("passphrase")
    if not isinstance(how, dict) or how.get("algorithm") != "m.pbkdf2":
        raise CryptoError("there is no passphrase, only a recovery key")
    salt, iterations, bits = how.get("salt"), how.get("iterations"), how.get("bits", 8 * KEY_BYTES)
    if not isinstance(salt, str) or not isinstance(iterations, int) or bits != 8 * KEY_BYTES:
        raise CryptoError("what is said of the passphrase cannot be used")
    if not 0 < iterations <= MAX_ITERATIONS:
        raise CryptoError(f"the passphrase asks for {iterations} iterations")
    return PBKDF2HMAC(SHA512(), KEY_BYTES, salt.encode(), iterations).derive(passphrase.encode())


def encrypt(key: bytes, name: str, secret: str) -> dict[str, str]:
    """A secret as it stands under `encrypted`, by the id of its key."""
    return _encrypt(key, name, secret.encode(), _new_iv())


def decrypt(key: bytes, name: str, sealed: Any) -> str:
    """Raises CryptoError when it was encrypted with another key, under another name, or was changed."""
    try:
        iv, mac, ciphertext = (unpadded.decode(sealed[part]) for part in ("iv", "mac", "ciphertext"))
        aes, mac_key = _keys(key, name)
        if not hmac.compare_digest(hmac.digest(mac_key, ciphertext, "sha256"), mac):
            raise CryptoError(f"{name} was encrypted with another key")
        return _aes(aes, iv, ciphertext).decode()
    except (KeyError, TypeError, ValueError) as error:
        raise CryptoError(f"{name} cannot be read: {error}") from None


def _encrypt(key: bytes, name: str, plain: bytes, iv: bytes) -> dict[str, str]:
    aes, mac_key = _keys(key, name)
    ciphertext = _aes(aes, iv, plain)
    parts = {"iv": iv, "ciphertext": ciphertext, "mac": hmac.digest(mac_key, ciphertext, "sha256")}
    return {part: base64.b64encode(value).decode() for part, value in parts.items()}


def _keys(key: bytes, name: str) -> tuple[bytes, bytes]:
    both = HKDF(SHA256(), 2 * KEY_BYTES, salt=bytes(32), info=name.encode()).derive(key)
    return both[:KEY_BYTES], both[KEY_BYTES:]


def _aes(key: bytes, iv: bytes, text: bytes) -> bytes:
    cipher = Cipher(AES(key), CTR(iv)).encryptor()
    return cipher.update(text) + cipher.finalize()


def _new_iv() -> bytes:
    """Bit 63 is 0, as the specification asks: some platforms' counter has 64 bits."""
    iv = bytearray(secrets.token_bytes(16))
    iv[8] &= 0x7F
    return bytes(iv)
