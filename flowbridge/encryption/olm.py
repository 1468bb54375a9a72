"""Olm and Megolm, the two ratchets, as the rest of the room sees them: text in, text out, one error.

vodozemac is used directly, not by way of matrix-nio's `Olm` machine (0.26), which was read for this. That machine keeps
all devices and sessions in memory and saves them one by one, so that no ratchet's step can be committed together with
its ciphertext; it marks a session as shared before the homeserver has taken the keys; it rotates by constants of its
own instead of the room's settings; it has no cross-signing, so that "verified" is a local flag; and it takes an
event's `sender` as given when its device is unknown. What would remain of it is what vodozemac does itself, for 28 more
packages. vodozemac has none that it needs, is the library under matrix-js-sdk's Rust crypto, and was audited (2022).

Nothing of what comes in is trusted: whatever the library refuses is a CryptoError here.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Self

import vodozemac

from flowbridge.encryption import unpadded

PICKLE_KEY_BYTES = 32
PRE_KEY = 0  # the type of an Olm message that begins a session


class CryptoError(Exception):
    """A message, key or session that cannot be used; the text says why, without secrets."""


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """vodozemac's errors are ValueErrors; its bindings raise TypeError or OverflowError for another kind of input."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise CryptoError(f"{what}: {error}") from None


class OlmMessage(NamedTuple):
    """`type`: PRE_KEY, or 1. `body`: unpadded base64."""

    type: int
    body: str


class Session:
    """An Olm session with one other device. Every call moves its ratchet: pickle it before the outcome leaves."""

    def __init__(self, session: vodozemac.Session) -> None:
        self._session = session

    @classmethod
    def from_pickle(cls, pickle: str, key: bytes) -> Self:
        with _refused("an Olm session cannot be read with this secret key"):
            return cls(vodozemac.Session.from_pickle(pickle, key))

    @property
    def id(self) -> str:
        return self._session.session_id

    def pickle(self, key: bytes) -> str:
        return self._session.pickle(key)

    def encrypt(self, plaintext: bytes) -> OlmMessage:
        with _refused("this Olm session cannot encrypt"):
            type_, body = self._session.encrypt(plaintext).to_parts()
        return OlmMessage(type_, unpadded.encode(body))

    def decrypt(self, message: OlmMessage) -> bytes:
        """Raises CryptoError; then the ratchet has not moved."""
        with _refused("an Olm message cannot be decrypted"):
            return self._session.decrypt(
                vodozemac.AnyOlmMessage.from_parts(message.type, unpadded.decode(message.body))
            )

    def begins_with(self, message: OlmMessage) -> bool:
        """Whether this is the session that a pre-key message began."""
        with _refused("an Olm message cannot be read"):
            return self._session.session_matches(_pre_key(message))


class Account:
    """A device's own keys. What changes it is only safe once its pickle is on the disk."""

    def __init__(self, account: vodozemac.Account | None = None) -> None:
        self._account = account or vodozemac.Account()
        self.ed25519 = self._account.ed25519_key.to_base64()
        self.curve25519 = self._account.curve25519_key.to_base64()

    @classmethod
    def from_pickle(cls, pickle: str, key: bytes) -> Self:
        with _refused("the device's keys cannot be read with this secret key"):
            return cls(vodozemac.Account.from_pickle(pickle, key))

    def pickle(self, key: bytes) -> str:
        return self._account.pickle(key)

    def sign(self, message: bytes) -> str:
        return self._account.sign(message).to_base64()

    @property
    def most_one_time_keys(self) -> int:
        """How many it can answer for; the homeserver should have half as many."""
        return self._account.max_number_of_one_time_keys

    def generate_one_time_keys(self, count: int) -> None:
        self._account.generate_one_time_keys(count)

    def generate_fallback_key(self) -> None:
        """Another one; the one before it still answers until the next."""
        self._account.generate_fallback_key()  # type: ignore[attr-defined]  # its stubs of 0.10 lack it

    @property
    def one_time_keys(self) -> dict[str, str]:
        """Those that are not published yet, by key id."""
        return {name: key.to_base64() for name, key in self._account.one_time_keys.items()}

    @property
    def fallback_key(self) -> dict[str, str]:
        """The one that is not published yet, by key id; {} when there is none."""
        keys = self._account.fallback_key  # type: ignore[attr-defined]  # likewise
        return {name: key.to_base64() for name, key in keys.items()}

    def mark_published(self) -> None:
        self._account.mark_keys_as_published()

    def outbound(self, identity_key: str, one_time_key: str) -> Session:
        """A new session with a device, begun with a one-time key of its."""
        with _refused("a key of another device cannot be used"):
            identity = vodozemac.Curve25519PublicKey.from_base64(identity_key)
            one_time = vodozemac.Curve25519PublicKey.from_base64(one_time_key)
            return Session(self._account.create_outbound_session(identity, one_time))

    def inbound(self, identity_key: str, message: OlmMessage) -> tuple[Session, bytes]:
        """The session that a pre-key message begins, and what it says. It uses a one-time key up."""
        with _refused("an Olm message does not begin a session"):
            identity = vodozemac.Curve25519PublicKey.from_base64(identity_key)
            session, plaintext = self._account.create_inbound_session(identity, _pre_key(message))
        return Session(session), plaintext


class OutboundGroup:
    """A Megolm session of ours: encrypts for a room."""

    def __init__(self, session: vodozemac.GroupSession | None = None) -> None:
        self._session = session or vodozemac.GroupSession()

    @classmethod
    def from_pickle(cls, pickle: str, key: bytes) -> Self:
        with _refused("a room's session cannot be read with this secret key"):
            return cls(vodozemac.GroupSession.from_pickle(pickle, key))

    def pickle(self, key: bytes) -> str:
        return self._session.pickle(key)

    @property
    def id(self) -> str:
        return self._session.session_id

    @property
    def index(self) -> int:
        """Of the next message; the session key that is shared reads from there on."""
        return self._session.message_index

    @property
    def key(self) -> str:
        """What others are given."""
        return self._session.session_key.to_base64()

    def encrypt(self, plaintext: bytes) -> str:
        return self._session.encrypt(plaintext).to_base64()


class GroupMessage(NamedTuple):
    plaintext: bytes
    number: int  # of the message in its session, from 0


class InboundGroup:
    """A Megolm session of a device: decrypts what it sent to a room. Nothing that is decrypted changes it."""

    def __init__(self, session: vodozemac.InboundGroupSession) -> None:
        self._session = session

    @classmethod
    def from_key(cls, key: str) -> Self:
        """From what a device shares itself. Signed by the session, so nobody can have changed it on its way."""
        with _refused("a room key cannot be used"):
            return cls(vodozemac.InboundGroupSession(vodozemac.SessionKey(key)))

    @classmethod
    def from_export(cls, key: str) -> Self:
        """From a key file, a backup, or another device: nothing proves that the session's device made it."""
        with _refused("an exported room key cannot be used"):
            return cls(vodozemac.InboundGroupSession.import_session(vodozemac.ExportedSessionKey(key)))

    @classmethod
    def from_pickle(cls, pickle: str, key: bytes) -> Self:
        with _refused("a room key cannot be read with this secret key"):
            return cls(vodozemac.InboundGroupSession.from_pickle(pickle, key))

    def pickle(self, key: bytes) -> str:
        return self._session.pickle(key)

    @property
    def id(self) -> str:
        return self._session.session_id

    @property
    def first_index(self) -> int:
        return self._session.first_known_index

    def export(self) -> str:
        exported = self._session.export_at(self._session.first_known_index)
        assert exported is not None
        return exported.to_base64()

    def decrypt(self, ciphertext: str) -> GroupMessage:
        with _refused("the message cannot be decrypted with its room key"):
            found = self._session.decrypt(vodozemac.MegolmMessage.from_base64(ciphertext))
        return GroupMessage(found.plaintext, found.message_index)


class Backup:
    """Reads a key backup (m.megolm_backup.v1.curve25519-aes-sha2)."""

    def __init__(self, private_key: bytes) -> None:
        with _refused("the backup's key cannot be used"):
            self._key = vodozemac.PkDecryption.from_key(vodozemac.Curve25519SecretKey.from_bytes(private_key))
        self.public_key = self._key.public_key.to_base64()

    def decrypt(self, ciphertext: str, mac: str, ephemeral: str) -> bytes:
        with _refused("a backed-up room key cannot be decrypted"):
            return self._key.decrypt(vodozemac.Message.from_base64(ciphertext, mac, ephemeral))


class SharedSecret:
    """What both sides of a verification have in common, unless somebody stands between them."""

    def __init__(self, secret: vodozemac.EstablishedSas) -> None:
        self._secret = secret

    def emoji(self, info: str) -> tuple[int, ...]:
        """Seven numbers of emoji."""
        return tuple(self._secret.bytes(info).emoji_indices)

    def mac(self, text: str, info: str) -> str:
        """By hkdf-hmac-sha256.v2."""
        return self._secret.calculate_mac(text, info)

    def is_mac(self, text: str, info: str, mac: str) -> bool:
        try:
            self._secret.verify_mac(text, info, mac)
        except (ValueError, TypeError):
            return False
        return True


class KeyAgreement:
    """One side's key of an interactive verification (curve25519-hkdf-sha256), for one verification."""

    def __init__(self) -> None:
        self._sas = vodozemac.Sas()
        self.public = self._sas.public_key.to_base64()

    def agree(self, theirs: str) -> SharedSecret:
        """With the other side's key; once."""
        with _refused("the key of a verification cannot be used"):
            return SharedSecret(self._sas.diffie_hellman(vodozemac.Curve25519PublicKey.from_base64(theirs)))


def is_signed_by(ed25519: str, message: bytes, signature: str) -> bool:
    """Whether a key made this signature; also False where either is none."""
    try:
        key = vodozemac.Ed25519PublicKey.from_base64(ed25519)
        key.verify_signature(message, vodozemac.Ed25519Signature.from_base64(signature))
    except (ValueError, TypeError):
        return False
    return True


def _pre_key(message: OlmMessage) -> vodozemac.PreKeyMessage:
    if message.type != PRE_KEY:
        raise CryptoError("the Olm message begins no session")
    return vodozemac.PreKeyMessage.from_base64(message.body)
