"""One interactive verification by emoji, as the device that is asked (specification, "Short Authentication String").

Pure: what the other device says goes in, what it is to be told comes out. The other device asks and starts; the bridge
never does, so that two starts never cross. Every step is taken once and in order. A step that comes again, word for
word, was delivered twice, and does nothing; another one in its place ends the verification.

Everything that is compared is bound to both users, both devices and the transaction: a step of another verification
never fits.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flowbridge.encryption import emoji, unpadded
from flowbridge.encryption.emoji import Emoji
from flowbridge.encryption.olm import CryptoError, KeyAgreement, SharedSecret
from flowbridge.events import canonical_json

Json = dict[str, Any]
PREFIX = "m.key.verification."
METHOD = "m.sas.v1"
AGREEMENT = "curve25519-hkdf-sha256"
HASH = "sha256"
MAC = "hkdf-hmac-sha256.v2"
SHOWN = "emoji"
LASTS_SECONDS = 600.0  # from the request on: the specification's ten minutes
MAX_KEY = 64  # characters of a Curve25519 key; it has 43
MAX_KEYS = 20  # that one `mac` may speak of

State = Literal["asked", "started", "keyed", "compared", "ended"]
REASONS = {
    "m.user": "it was cancelled",
    "m.timeout": "it took too long",
    "m.unknown_transaction": "there is no such verification",
    "m.unknown_method": "no method is known to both devices",
    "m.unexpected_message": "a step came out of order",
    "m.key_mismatch": "the keys are not those that the homeserver lists",
    "m.mismatched_sas": "the emoji do not match",
    "m.invalid_message": "a message was malformed",
}


class Refused(Exception):
    """The verification ends here; `code` is what the other device is told."""

    def __init__(self, code: str) -> None:
        super().__init__(REASONS[code])
        self.code = code


@dataclass(frozen=True, slots=True)
class Party:
    """One side. `keys`: its Ed25519 keys by id, the device's own and, where it has one, its user's master key."""

    user_id: str
    device_id: str
    keys: Mapping[str, str]


Step = tuple[str, Json]  # a type without its prefix, and a content without its transaction


@dataclass
class Verification:
    """`shown`: the emoji, once both keys are there. `trusted`: ids of the other side's keys that were proved, when it
    went well. `trouble`: why it ended otherwise.
    """

    mine: Party
    theirs: Party
    transaction: str
    state: State = "asked"
    shown: tuple[Emoji, ...] = ()
    trusted: frozenset[str] = frozenset()
    trouble: str = ""
    ends_at: float = field(default_factory=lambda: time.monotonic() + LASTS_SECONDS)
    _agreement: KeyAgreement = field(default_factory=KeyAgreement)
    _secret: SharedSecret | None = None
    _mac: Json | None = None
    _confirmed: bool = False
    _taken: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.state == "ended"

    @property
    def succeeded(self) -> bool:
        return bool(self.trusted)

    def ready(self) -> Step:
        """The answer to the request."""
        return "ready", {"from_device": self.mine.device_id, "methods": [METHOD]}

    def take(self, kind: str, content: Json) -> list[Step]:
        """A step of the other device; returns what it is to be told."""
        if self.is_over:
            return []
        if kind == "cancel":
            code = content.get("code")
            why = REASONS.get(code) if isinstance(code, str) else None
            self._end(f"the other side: {why or 'it was cancelled'}")
            return []
        steps = {"start": self._started, "key": self._keyed, "mac": self._compared, "done": self._done}
        try:
            digest = _digest(content)
            if self._taken.get(kind) == digest:
                return []
            if kind not in steps or kind in self._taken:
                raise Refused("m.unexpected_message")
            self._taken[kind] = digest
            return steps[kind](content)
        except Refused as refusal:
            return [self.cancel(refusal.code)]

    def confirm(self, *, matches: bool) -> list[Step]:
        """What a person says of the emoji."""
        if self.is_over or not self.shown or self._confirmed:
            return []
        if not matches:
            return [self.cancel("m.mismatched_sas")]
        self._confirmed = True
        ids = ",".join(sorted(self.mine.keys))
        macs = {name: self._mac_of(key, name) for name, key in self.mine.keys.items()}
        said: Step = ("mac", {"mac": macs, "keys": self._mac_of(ids, "KEY_IDS")})
        try:
            return [said, *self._finish()]
        except Refused as refusal:
            return [said, self.cancel(refusal.code)]

    def cancel(self, code: str) -> Step:
        self._end(REASONS[code])
        return "cancel", {"code": code, "reason": REASONS[code]}

    def expire(self) -> list[Step]:
        """The cancellation, when its time is over."""
        return [self.cancel("m.timeout")] if not self.is_over and time.monotonic() >= self.ends_at else []

    def _end(self, why: str) -> None:
        self.state, self.trouble = "ended", why

    # steps

    def _started(self, content: Json) -> list[Step]:
        if self.state != "asked" or content.get("from_device") != self.theirs.device_id:
            raise Refused("m.unexpected_message")
        offered = {
            "key_agreement_protocols": AGREEMENT,
            "hashes": HASH,
            "message_authentication_codes": MAC,
            "short_authentication_string": SHOWN,
        }
        if content.get("method") != METHOD:
            raise Refused("m.unknown_method")
        for name, wanted in offered.items():
            values = content.get(name)
            if not isinstance(values, list) or wanted not in values:
                raise Refused("m.unknown_method")
        commitment = hashlib.sha256(self._agreement.public.encode() + canonical_json.write(content)).digest()
        self.state = "started"
        return [
            (
                "accept",
                {
                    "method": METHOD,
                    "commitment": unpadded.encode(commitment),
                    "hash": HASH,
                    "key_agreement_protocol": AGREEMENT,
                    "message_authentication_code": MAC,
                    "short_authentication_string": [SHOWN],
                },
            )
        ]

    def _keyed(self, content: Json) -> list[Step]:
        key = content.get("key")
        if self.state != "started":
            raise Refused("m.unexpected_message")
        if not isinstance(key, str) or not key.isascii() or len(key) > MAX_KEY:
            raise Refused("m.invalid_message")
        try:
            self._secret = self._agreement.agree(key)
        except CryptoError:
            raise Refused("m.invalid_message") from None
        starter = f"{self.theirs.user_id}|{self.theirs.device_id}|{key}"
        accepter = f"{self.mine.user_id}|{self.mine.device_id}|{self._agreement.public}"
        info = f"MATRIX_KEY_VERIFICATION_SAS|{starter}|{accepter}|{self.transaction}"
        self.shown = emoji.named(self._secret.emoji(info))
        self.state = "keyed"
        return [("key", {"key": self._agreement.public})]

    def _compared(self, content: Json) -> list[Step]:
        """The other side's MACs; they count once a person has said that the emoji match."""
        if self.state != "keyed":
            raise Refused("m.unexpected_message")
        self._mac, self.state = content, "compared"
        return self._finish()

    def _finish(self) -> list[Step]:
        if not self._confirmed or self._mac is None:
            return []
        self.trusted = self._proved(self._mac)
        self.state = "ended"
        return [("done", {})]

    def _done(self, _: Json) -> list[Step]:
        """Before our own: nothing that it could be an end of."""
        raise Refused("m.unexpected_message")

    # MACs

    def _proved(self, content: Json) -> frozenset[str]:
        """Ids of keys that are listed by the homeserver and were named, the device's among them. Raises Refused."""
        macs, keys = content.get("mac"), content.get("keys")
        if not isinstance(macs, dict) or not isinstance(keys, str) or not 0 < len(macs) <= MAX_KEYS:
            raise Refused("m.invalid_message")
        if not self._is_mac(",".join(sorted(macs)), "KEY_IDS", keys):
            raise Refused("m.key_mismatch")
        proved = set()
        for name, key in self.theirs.keys.items():
            if name not in macs:
                continue
            if not isinstance(macs[name], str) or not self._is_mac(key, name, macs[name]):
                raise Refused("m.key_mismatch")
            proved.add(name)
        if f"ed25519:{self.theirs.device_id}" not in proved:
            raise Refused("m.key_mismatch")
        return frozenset(proved)

    def _mac_of(self, text: str, key_id: str) -> str:
        assert self._secret is not None
        return self._secret.mac(text, _info(self.mine, self.theirs, self.transaction, key_id))

    def _is_mac(self, text: str, key_id: str, mac: str) -> bool:
        assert self._secret is not None
        return self._secret.is_mac(text, _info(self.theirs, self.mine, self.transaction, key_id), mac)


def _info(sender: Party, receiver: Party, transaction: str, key_id: str) -> str:
    return (
        f"MATRIX_KEY_VERIFICATION_MAC{sender.user_id}{sender.device_id}{receiver.user_id}{receiver.device_id}"
        f"{transaction}{key_id}"
    )


def _digest(content: Json) -> bytes:
    try:
        return hashlib.sha256(canonical_json.write(content)).digest()
    except (ValueError, TypeError, RecursionError):
        raise Refused("m.invalid_message") from None
