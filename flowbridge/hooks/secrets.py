"""The secrets of hooks: which are good enough, and how they are kept.

A token is found by its SHA-256, and nothing else of it is kept. A text that makes signatures is needed itself, so it is
kept encrypted with the bridge's secret key.
"""

import base64
import binascii
import secrets as randoms

from cryptography.fernet import Fernet, InvalidToken

from flowbridge.hooks.known import PREFIX, Secret
from flowbridge.models.hooks import TOKEN
from flowbridge.store.hooks import NewSecret, StoredSecret, digest

MIN_CHARACTERS = 16
MAX_CHARACTERS = 1_000
STANDARD = "standard-webhooks"
STANDARD_PREFIX = "whsec_"
GITLAB = "gitlab"  # sends its secret as it is, or, where that is of the other form, signs by Standard Webhooks

_BYTES = 32
_STANDARD_BYTES = range(24, 65)  # of a key (Standard Webhooks 1.0, "Signature scheme")


def new(scheme: str) -> str:
    """A secret with 256 random bits. The libraries of Standard Webhooks take no other form than theirs."""
    if scheme == STANDARD:
        return STANDARD_PREFIX + base64.b64encode(randoms.token_bytes(_BYTES)).decode()
    return PREFIX + randoms.token_urlsafe(_BYTES)


def problem(secret: str, scheme: str) -> str:
    """Why a given secret cannot be taken, as the rest of a sentence; "" when it can. It is not in it."""
    if scheme == STANDARD or (scheme == GITLAB and secret.startswith(STANDARD_PREFIX)):
        return "" if _is_standard(secret) else "must be whsec_ and the base64 of 24 to 64 bytes"
    if not all("!" <= character <= "~" for character in secret):
        return "must be visible ASCII, without spaces"
    if len(secret) < MIN_CHARACTERS:
        return f"must have at least {MIN_CHARACTERS} characters, so that it cannot be guessed; without one, one is made"
    if len(secret) > MAX_CHARACTERS:
        return f"must have at most {MAX_CHARACTERS} characters"
    return ""


def sealed(secret: str, scheme: str, fernet: Fernet) -> NewSecret:
    """As the store keeps it."""
    if scheme == TOKEN:
        return NewSecret(digest(secret).hex())
    # A digest of a text that people chose could be guessed; and two hooks may have one secret, of one sender.
    return NewSecret(randoms.token_hex(_BYTES), fernet.encrypt(secret.encode()).decode())


def opened(stored: StoredSecret, fernet: Fernet) -> Secret | None:
    """As a request needs it; None when it was written with another secret key."""
    if stored.sealed is None:
        return Secret(bytes.fromhex(stored.hash))
    try:
        return plain(fernet.decrypt(stored.sealed.encode()).decode())
    except InvalidToken:
        return None


def plain(secret: str) -> Secret:
    return Secret(digest(secret), secret)


def _is_standard(secret: str) -> bool:
    if not secret.startswith(STANDARD_PREFIX) or len(secret) > MAX_CHARACTERS:
        return False
    try:
        return len(base64.b64decode(secret.removeprefix(STANDARD_PREFIX), validate=True)) in _STANDARD_BYTES
    except (binascii.Error, ValueError):
        return False
