"""A verification, step by step, against another side that keeps to the rules, or does not."""

import hashlib
from typing import Any

import pytest
import vodozemac
from hypothesis import given, settings

from flowbridge.encryption import emoji, unpadded
from flowbridge.encryption.sas import Party, Verification
from flowbridge.events import canonical_json
from tests.unit.encryption.json_values import TEXTS, VALUES

BOT = Party("@bot:hs", "BRIDGE", {"ed25519:BRIDGE": "bridge key", "ed25519:MB": "MB"})
ALICE = Party("@alice:hs", "PHONE", {"ed25519:PHONE": "phone key", "ed25519:MA": "MA"})
START: dict[str, Any] = {
    "from_device": "PHONE",
    "method": "m.sas.v1",
    "key_agreement_protocols": ["curve25519-hkdf-sha256", "curve25519"],
    "hashes": ["sha256"],
    "message_authentication_codes": ["hkdf-hmac-sha256.v2", "hkdf-hmac-sha256"],
    "short_authentication_string": ["decimal", "emoji"],
    "transaction_id": "T",
}


class Client:
    """Alice's, written from the specification on vodozemac alone."""

    def __init__(self, keys: Any = ALICE.keys) -> None:
        self.sas = vodozemac.Sas()
        self.public = self.sas.public_key.to_base64()
        self.keys = keys

    def agree(self, theirs: str) -> None:
        self.theirs = theirs
        self.secret = self.sas.diffie_hellman(vodozemac.Curve25519PublicKey.from_base64(theirs))

    @property
    def emoji(self) -> list[int]:
        info = f"MATRIX_KEY_VERIFICATION_SAS|@alice:hs|PHONE|{self.public}|@bot:hs|BRIDGE|{self.theirs}|T"
        return list(self.secret.bytes(info).emoji_indices)

    def mac(self, transaction: str = "T") -> dict[str, Any]:
        info = f"MATRIX_KEY_VERIFICATION_MAC@alice:hsPHONE@bot:hsBRIDGE{transaction}"
        macs = {name: self.secret.calculate_mac(key, info + name) for name, key in self.keys.items()}
        return {"mac": macs, "keys": self.secret.calculate_mac(",".join(sorted(macs)), f"{info}KEY_IDS")}


def keyed(client: Client) -> Verification:
    """Up to the emoji."""
    verification = Verification(BOT, ALICE, "T")
    ((kind, accept),) = verification.take("start", START)
    assert kind == "accept"
    ((kind, key),) = verification.take("key", {"key": client.public})
    assert kind == "key"
    commitment = hashlib.sha256(key["key"].encode() + canonical_json.write(START)).digest()
    assert accept["commitment"] == unpadded.encode(commitment)
    client.agree(key["key"])
    return verification


def codes(steps: Any) -> list[str]:
    return [content.get("code", kind) for kind, content in steps]


def test_both_see_the_same_emoji_and_prove_their_keys() -> None:
    client = Client()
    verification = keyed(client)
    assert verification.shown == emoji.named(client.emoji)
    (_, mine), *rest = verification.confirm(matches=True)
    assert rest == []
    info = "MATRIX_KEY_VERIFICATION_MAC@bot:hsBRIDGE@alice:hsPHONET"
    client.secret.verify_mac("bridge key", f"{info}ed25519:BRIDGE", mine["mac"]["ed25519:BRIDGE"])
    client.secret.verify_mac("MB", f"{info}ed25519:MB", mine["mac"]["ed25519:MB"])
    client.secret.verify_mac("ed25519:BRIDGE,ed25519:MB", f"{info}KEY_IDS", mine["keys"])
    assert codes(verification.take("mac", client.mac())) == ["done"]
    assert verification.trusted == set(ALICE.keys)


def test_macs_that_come_first_wait_for_the_person() -> None:
    client = Client()
    verification = keyed(client)
    assert verification.take("mac", client.mac()) == []
    assert not verification.succeeded
    assert codes(verification.confirm(matches=True)) == ["mac", "done"]
    assert verification.succeeded


def test_person_who_says_no_ends_it_for_good() -> None:
    client = Client()
    verification = keyed(client)
    assert codes(verification.confirm(matches=False)) == ["m.mismatched_sas"]
    assert verification.take("mac", client.mac()) == []
    assert verification.confirm(matches=True) == []
    assert not verification.succeeded


@pytest.mark.parametrize(
    ("keys", "transaction"),
    [
        ({**ALICE.keys, "ed25519:PHONE": "another key"}, "T"),
        ({**ALICE.keys, "ed25519:MA": "another key"}, "T"),
        ({"ed25519:MA": "MA"}, "T"),
        (ALICE.keys, "another verification"),
    ],
    ids=["device", "master", "no device", "replayed"],
)
def test_keys_that_are_not_proved_are_not_trusted(keys: Any, transaction: str) -> None:
    client = Client(keys)
    verification = keyed(client)
    verification.confirm(matches=True)
    assert codes(verification.take("mac", client.mac(transaction))) == ["m.key_mismatch"]
    assert (verification.succeeded, verification.trusted) == (False, frozenset())


def test_key_id_that_was_taken_out_or_put_in_is_noticed() -> None:
    client = Client()
    verification = keyed(client)
    verification.confirm(matches=True)
    said = client.mac()
    del said["mac"]["ed25519:MA"]
    assert codes(verification.take("mac", said)) == ["m.key_mismatch"]


def test_somebody_in_between_gives_other_emoji_or_other_macs() -> None:
    client, attacker = Client(), Client()
    verification = keyed(attacker)
    other = keyed(client)
    assert verification.shown != other.shown
    verification.confirm(matches=True)
    assert codes(verification.take("mac", client.mac())) == ["m.key_mismatch"]


def test_step_that_is_delivered_twice_does_nothing_the_second_time() -> None:
    client = Client()
    verification = keyed(client)
    assert verification.take("start", dict(START)) == []
    assert verification.take("key", {"key": client.public}) == []
    assert not verification.is_over


def test_second_start_or_key_that_differs_ends_it() -> None:
    client = Client()
    assert codes(keyed(client).take("key", {"key": client.public[::-1]})) == ["m.unexpected_message"]
    client = Client()
    assert codes(keyed(client).take("start", {**START, "hashes": ["sha256", "x"]})) == ["m.unexpected_message"]


@pytest.mark.parametrize("kind", ["key", "mac", "done", "accept", "ready", "unheard-of"])
def test_step_out_of_order_ends_it(kind: str) -> None:
    verification = Verification(BOT, ALICE, "T")
    assert codes(verification.take(kind, {"key": Client().public})) == ["m.unexpected_message"]
    assert verification.is_over


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "m.reciprocate.v1"}, "m.unknown_method"),
        ({"key_agreement_protocols": ["curve25519"]}, "m.unknown_method"),
        ({"hashes": "sha256"}, "m.unknown_method"),
        ({"message_authentication_codes": ["hkdf-hmac-sha256"]}, "m.unknown_method"),
        ({"short_authentication_string": ["decimal"]}, "m.unknown_method"),
        ({"from_device": "ANOTHER"}, "m.unexpected_message"),
    ],
)
def test_start_that_does_not_fit_ends_it(change: dict[str, Any], code: str) -> None:
    assert codes(Verification(BOT, ALICE, "T").take("start", {**START, **change})) == [code]


@pytest.mark.parametrize("key", ["", "A" * 43, "A" * 44, "A" * 65, "é" * 43, 7, None])
def test_key_that_is_none_ends_it(key: Any) -> None:
    """`A…`: the point of low order, with which any secret would be known."""
    verification = Verification(BOT, ALICE, "T")
    verification.take("start", START)
    assert codes(verification.take("key", {"key": key})) == ["m.invalid_message"]
    assert verification.shown == ()


def test_it_ends_when_its_time_is_over() -> None:
    verification = Verification(BOT, ALICE, "T")
    assert verification.expire() == []
    verification.ends_at = 0.0
    assert codes(verification.expire()) == ["m.timeout"]
    assert verification.expire() == []


def test_there_are_64_emoji() -> None:
    assert len(set(emoji.TABLE)) == 64
    assert (emoji.TABLE[0].name, emoji.TABLE[36].name, emoji.TABLE[63].name) == ("Dog", "Thumbs Up", "Pin")


@settings(max_examples=25)
@given(VALUES, TEXTS)
def test_no_content_breaks_a_step_or_proves_anything(value: Any, text: str) -> None:
    for kind in ("start", "key", "mac", "done", "cancel", text):
        for content in (
            value if isinstance(value, dict) else {},
            dict.fromkeys((*START, "key", "mac", "keys", "code"), value),
            {**START, "mac": {"ed25519:PHONE": value}, "keys": text, "key": value, "code": value},
        ):
            for state in ("asked", "keyed"):
                verification = keyed(Client()) if state == "keyed" else Verification(BOT, ALICE, "T")
                verification.confirm(matches=True)
                verification.take(kind, content)
                assert not verification.succeeded
