"""What a homeserver tells of other users' devices, and how little of it is taken."""

from typing import Any

import pytest
from hypothesis import given

from flowbridge.encryption import signatures
from flowbridge.encryption.cross_signing import CrossSigning
from flowbridge.encryption.identities import ALGORITHMS, MAX_DEVICES, UserKeys, of_answer
from flowbridge.encryption.olm import Account
from tests.unit.encryption.json_values import TEXTS, VALUES

ALICE = "@alice:hs"
Json = dict[str, Any]


class Alice:
    """A user with cross-signing keys and one device, which they signed."""

    def __init__(self) -> None:
        self.account = Account()
        self.signing = CrossSigning.generate(ALICE)

    def device(self, device_id: str = "PHONE", *, signed: bool = True, account: Account | None = None) -> Json:
        account = account or self.account
        names = {f"curve25519:{device_id}": account.curve25519, f"ed25519:{device_id}": account.ed25519}
        keys: Json = {"user_id": ALICE, "device_id": device_id, "algorithms": ALGORITHMS, "keys": names}
        keys = signatures.add(keys, ALICE, device_id, account.sign(signatures.signed_part(keys)))
        return self.signing.sign_device(keys) if signed else keys

    def answer(self, *devices: Json) -> Json:
        uploaded = self.signing.upload("PHONE", self.account.sign)
        keys = {f"{name}s": {ALICE: key} for name, key in uploaded.items()}
        return {"device_keys": {ALICE: {each["device_id"]: each for each in devices}}, **keys}


def test_a_device_counts_as_signed_when_its_owner_s_keys_signed_it() -> None:
    alice = Alice()
    other = alice.device("DESK", signed=False, account=Account())
    user, wrong = of_answer(alice.answer(alice.device(), other), ALICE)
    assert not wrong
    assert {name: device.signed for name, device in user.devices.items()} == {"PHONE": True, "DESK": False}
    assert user.identity == alice.signing.identity
    assert user.by_key(alice.account.curve25519) == user.devices["PHONE"]


def test_keys_are_kept_as_they_were_found() -> None:
    alice = Alice()
    user, _ = of_answer(alice.answer(alice.device()), ALICE)
    assert UserKeys.from_kept(ALICE, user.kept()) == user
    nobody, _ = of_answer({}, ALICE)
    assert UserKeys.from_kept(ALICE, nobody.kept()) == nobody == UserKeys(ALICE, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"user_id": "@mallory:hs"}, "not of this user"),
        ({"device_id": "OTHER"}, "not of this user"),
        ({"keys": {}}, "names no keys"),
        ({"algorithms": []}, "did not sign"),
        ({"signatures": {}}, "did not sign"),
        ({"keys": {"ed25519:PHONE": Account().ed25519, "curve25519:PHONE": "A" * 43}}, "did not sign"),
    ],
)
def test_a_device_that_was_changed_on_its_way_is_not_taken(change: Json, why: str) -> None:
    alice = Alice()
    answer = alice.answer(alice.device())
    answer["device_keys"][ALICE]["PHONE"] |= change
    user, (wrong,) = of_answer(answer, ALICE)
    assert user.devices == {}
    assert why in wrong


def test_a_device_never_changes_its_keys() -> None:
    alice = Alice()
    before, _ = of_answer(alice.answer(alice.device()), ALICE)
    alice.account = Account()
    after, (wrong,) = of_answer(alice.answer(alice.device()), ALICE, before)
    assert "other keys" in wrong
    assert after.devices["PHONE"].ed25519 == before.devices["PHONE"].ed25519
    assert not after.devices["PHONE"].signed


def test_two_devices_never_have_one_key() -> None:
    alice = Alice()
    user, (wrong,) = of_answer(alice.answer(alice.device(), alice.device("TWIN")), ALICE)
    assert list(user.devices) == ["PHONE"]
    assert "the same key" in wrong


def test_a_self_signing_key_that_the_master_key_did_not_sign_signs_nothing() -> None:
    alice, mallory = Alice(), CrossSigning.generate(ALICE)
    answer = alice.answer(mallory.sign_device(alice.device(signed=False)))
    answer["self_signing_keys"][ALICE] = mallory.upload("PHONE", alice.account.sign)["self_signing_key"]
    user, wrong = of_answer(answer, ALICE)
    assert not user.devices["PHONE"].signed
    assert user.identity is not None
    assert user.identity.self_signing == ""
    assert any("not signed by its master key" in each for each in wrong)


def test_a_signature_for_another_user_counts_for_nothing() -> None:
    alice, mallory = Alice(), CrossSigning.generate("@mallory:hs")
    answer = alice.answer(mallory.sign_device(alice.device(signed=False)))
    user, _ = of_answer(answer, ALICE)
    assert not user.devices["PHONE"].signed


def test_devices_are_bounded() -> None:
    answer: Json = {"device_keys": {ALICE: {str(number): {} for number in range(MAX_DEVICES + 1)}}}
    user, wrong = of_answer(answer, ALICE)
    assert user.devices == {}
    assert "of which" in wrong[0]


@given(VALUES, TEXTS)
def test_no_answer_breaks_the_reader(value: object, name: str) -> None:
    for answer in (
        value,
        {"device_keys": value, "master_keys": value},
        {"device_keys": {name: value}, "master_keys": {name: value}, "self_signing_keys": {name: value}},
        {"device_keys": {name: {name: value}}},
        {"device_keys": {name: {name: {"user_id": name, "device_id": name, "keys": value, "signatures": value}}}},
    ):
        user, _ = of_answer(answer, name)
        assert user.devices == {}
