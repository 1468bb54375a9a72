"""Files of encrypted rooms: AES-CTR, and a hash of what the homeserver has ("Sending encrypted attachments").

Who reads the event has the key in its `file`. Nothing here needs the library of Olm and Megolm.
"""

import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from flowbridge.encryption import unpadded

VERSION = "v2"
KEY_BYTES = 32
IV_BYTES = 16  # of which the last 8 count the blocks: they begin at 0, so that no two files share a block of the stream
PIECE = 64 * 1024  # bytes that are worked on at once: some 50 µs

_MXC = re.compile(r"mxc://[^/\s]{1,255}/[A-Za-z0-9_-]{1,255}")
_TO_PLAIN = str.maketrans("-_", "+/")
Json = dict[str, Any]


class BadFile(Exception):
    """What an event says of its file cannot be used; the text says why."""


class Encryption:
    """Encrypts one file."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(KEY_BYTES)
        self._iv = secrets.token_bytes(IV_BYTES - 8) + bytes(8)
        self._hash = hashlib.sha256()

    async def of(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same number of bytes."""
        encryptor = Cipher(AES(self._key), CTR(self._iv)).encryptor()
        async for data in body:
            for start in range(0, len(data), PIECE):
                piece = encryptor.update(data[start : start + PIECE])
                self._hash.update(piece)
                yield piece

    def described(self, uri: str) -> Json:
        """`file` of the event, once all of it is read."""
        key = unpadded.encode(self._key, urlsafe=True)
        return {
            "url": uri,
            "v": VERSION,
            "key": {"kty": "oct", "alg": "A256CTR", "ext": True, "key_ops": ["encrypt", "decrypt"], "k": key},
            "iv": unpadded.encode(self._iv),
            "hashes": {"sha256": unpadded.encode(self._hash.digest())},
        }


@dataclass(frozen=True, slots=True)
class EncryptedFile:
    """A file as an event has it."""

    uri: str
    key: bytes
    iv: bytes
    sha256: bytes

    @classmethod
    def of(cls, file: object) -> Self:
        """From an event's `file`, which anybody may have written. Raises BadFile."""
        if not isinstance(file, Mapping):
            raise BadFile("the event has no encrypted file")
        if file.get("v") != VERSION:
            raise BadFile(f"its file is not of version {VERSION}")
        jwk, hashes, uri = file.get("key"), file.get("hashes"), file.get("url")
        if not isinstance(jwk, Mapping) or (jwk.get("kty"), jwk.get("alg")) != ("oct", "A256CTR"):
            raise BadFile("its key is not one for A256CTR")
        if not isinstance(uri, str) or not _MXC.fullmatch(uri):
            raise BadFile("its url is no mxc:// address")
        sha256 = hashes.get("sha256") if isinstance(hashes, Mapping) else None
        return cls(
            uri,
            _bytes(jwk.get("k"), KEY_BYTES, "key"),
            _bytes(file.get("iv"), IV_BYTES, "iv"),
            _bytes(sha256, hashlib.sha256().digest_size, "hash"),
        )

    async def decrypted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What the file was before. The last piece comes once the hash is known to be right. Raises BadFile."""
        decryptor, digest, last = Cipher(AES(self.key), CTR(self.iv)).decryptor(), hashlib.sha256(), b""
        async for data in body:
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                digest.update(piece)
                if last:
                    yield decryptor.update(last)
                last = piece
        if not hmac.compare_digest(digest.digest(), self.sha256):
            raise BadFile("the file is not the one that was sent: its hash is another one")
        if last:
            yield decryptor.update(last)


def _bytes(text: object, length: int, what: str) -> bytes:
    """Base64 of either alphabet, padded or not, as clients write them."""
    if isinstance(text, str) and len(text) <= 2 * length:
        with contextlib.suppress(ValueError):
            found = unpadded.decode(text.translate(_TO_PLAIN))
            if len(found) == length:
                return found
    raise BadFile(f"its {what} is not {length} bytes of Base64")
