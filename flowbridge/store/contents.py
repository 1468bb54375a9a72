"""What events say is encrypted in the store, with the secret key, unless their room is known to be plain.

AES-256-GCM under a key of the process' own, which is derived from the secret key and a random salt: so the nonce can
be a counter, and never comes twice, however many events there are. It takes some 3 µs, Fernet would take 30. A text is
bound to its delivery: moved to another row, it is not read there.
"""

import binascii
import hmac
import secrets
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Connection, func
from sqlalchemy.sql import ColumnElement

BLANK = ""  # in the place of a content that is not kept any more: no JSON
OTHER_KEY = "it was written down with another FLOWBRIDGE_SECRET_KEY"

_PREFIX = "aesgcm1:"  # no content begins so: it is a JSON object
_SALT, _NONCE = 16, 12  # bytes


class Contents:
    """`unlock` gives it the secret key; without, nothing can be encrypted, and what is stays so. For any thread."""

    def __init__(self) -> None:
        self._secret: Callable[[], str | None] = lambda: None
        self._salt = b""
        self._numbers = count()
        self._key = lru_cache(1)(self._first_key)
        self._cipher = lru_cache(64)(self._first_cipher)  # of this process, and of those whose events it reads
        self._marking = lru_cache(1)(lambda: self._derived(b"", b"marks"))

    def unlock(self, secret: str | Callable[[], str | None]) -> None:
        """`secret`: FLOWBRIDGE_SECRET_KEY, or what finds it when it is needed."""
        self._secret = secret if callable(secret) else lambda: secret
        self._salt = secrets.token_bytes(_SALT)

    def seal(self, text: str, delivery: str) -> str:
        nonce = next(self._numbers).to_bytes(_NONCE, "big")
        cipher = self._cipher(self._salt)
        sealed = self._salt + nonce + cipher.encrypt(nonce, text.encode(), delivery.encode())
        return _PREFIX + binascii.b2a_base64(sealed, newline=False).decode()

    def open(self, text: str, delivery: str) -> str:
        """What was sealed; as it is what was not, or cannot be read: see `is_sealed`."""
        if not is_sealed(text):
            return text
        try:
            sealed = binascii.a2b_base64(text[len(_PREFIX) :])
            salt, nonce, rest = sealed[:_SALT], sealed[_SALT : _SALT + _NONCE], sealed[_SALT + _NONCE :]
            return self._cipher(salt).decrypt(nonce, rest, delivery.encode()).decode()
        except (ValueError, InvalidTag):  # no key, another one, or another row's
            return text

    def opened(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the outbox as it was accepted, in place. `is_sealed`: how the store has it."""
        row["is_sealed"] = is_sealed(row["content"])
        if row["is_sealed"]:
            for name in ("content", "request"):
                if row.get(name) is not None:
                    row[name] = self.open(row[name], row["delivery"])
        return row

    def mark(self, *parts: bytes) -> str:
        """Tells equal texts, but not which: the hash of a short one could be guessed by who has the database alone."""
        return hmac.digest(self._marking(), b"\0".join(parts), "sha256").hex()

    def _first_key(self) -> bytes:
        secret = self._secret()
        if secret is None:
            raise ValueError("there is no FLOWBRIDGE_SECRET_KEY")
        return binascii.a2b_base64(secret.translate(str.maketrans("-_", "+/")))

    def _first_cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(self._derived(salt, b"contents"))

    def _derived(self, salt: bytes, use: bytes) -> bytes:
        return HKDF(SHA256(), 32, salt=salt or None, info=b"flowbridge: " + use).derive(self._key())


def is_sealed(text: str) -> bool:
    """Whether a content is encrypted; after `Contents.open`: with another secret key."""
    return text.startswith(_PREFIX)


def are_sealed(column: ColumnElement[str]) -> ColumnElement[bool]:
    """The same of a column."""
    return func.substr(column, 1, len(_PREFIX)) == _PREFIX


def is_readable(content: bytes | str) -> bool:
    """Whether this is the JSON of a content: neither blank nor encrypted."""
    return content[:1] in ("{", b"{")


LOCKED = Contents()


def of(connection: Connection) -> Contents:
    """Those of the database that this connection is to."""
    found: Contents = connection.get_execution_options().get("contents", LOCKED)
    return found
