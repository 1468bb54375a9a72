"""Secret storage; test_device.py shows that matrix-js-sdk's is the same."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.encryption import secret_storage
from flowbridge.encryption.olm import CryptoError

# Of the tests of matrix-js-sdk and of matrix-rust-sdk.
KEY = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
RECOVERY_KEY = "EsTc LW2K PGiF wKEA 3As5 g5c4 BXwk qeeJ ZJV8 Q9fu gUMN UE4d"


def test_a_recovery_key_is_written_as_clients_write_it() -> None:
    assert secret_storage.recovery_key(KEY) == RECOVERY_KEY
    assert secret_storage.read_recovery_key(RECOVERY_KEY.replace(" ", "")) == KEY


@given(st.binary(min_size=32, max_size=32))
def test_every_recovery_key_is_read_back(key: bytes) -> None:
    assert secret_storage.read_recovery_key(secret_storage.recovery_key(key)) == key


def test_nearly_every_typing_error_is_noticed() -> None:
    """The parity is one byte, so that one in 256 passes it; then the key does not fit the account's secret storage."""
    text, passed = RECOVERY_KEY.replace(" ", ""), 0
    others = [
        text[:place] + character + text[place + 1 :]
        for place in range(len(text))
        for character in secret_storage._ALPHABET
        if text[place] != character
    ]
    for other in others:
        with contextlib.suppress(CryptoError):
            assert secret_storage.read_recovery_key(other) != KEY
            passed += 1
    assert passed < len(others) / 100


@pytest.mark.parametrize("text", ["", "0OIl", "EsTc", RECOVERY_KEY + "1", "1" * 48, "z" * 5_000, "ß"])
def test_what_is_no_recovery_key_is_refused(text: str) -> None:
    with pytest.raises(CryptoError):
        secret_storage.read_recovery_key(text)


def test_a_secret_is_read_with_its_key_under_its_name() -> None:
    key = secret_storage.new_key()
    sealed = secret_storage.encrypt(key, "m.cross_signing.master", "the secret")
    assert secret_storage.decrypt(key, "m.cross_signing.master", sealed) == "the secret"
    assert "the secret" not in str(sealed)
    for wrong, name in [(secret_storage.new_key(), "m.cross_signing.master"), (key, "m.cross_signing.self_signing")]:
        with pytest.raises(CryptoError, match="another key"):
            secret_storage.decrypt(wrong, name, sealed)


@pytest.mark.parametrize(
    "sealed", [None, {}, [], {"iv": 1, "mac": 2, "ciphertext": 3}, {"iv": "A", "mac": "", "ciphertext": ""}]
)
def test_what_is_no_secret_is_refused(sealed: object) -> None:
    with pytest.raises(CryptoError):
        secret_storage.decrypt(KEY, "x", sealed)


def test_a_key_is_known_by_its_description() -> None:
    key = secret_storage.new_key()
    description = secret_storage.describe(key)
    assert secret_storage.fits(key, description)
    assert not secret_storage.fits(secret_storage.new_key(), description)
    assert not secret_storage.fits(key, {**description, "algorithm": "other"})
    assert not secret_storage.fits(key, {**description, "mac": "é"})


def test_a_passphrase_that_would_take_for_ever_is_refused() -> None:
    how = {"algorithm": "m.pbkdf2", "salt": "s", "iterations": 10**12}
    with pytest.raises(CryptoError, match="iterations"):
        secret_storage.key_of_passphrase("x", {"passphrase": how})
    with pytest.raises(CryptoError, match="no passphrase"):
        secret_storage.key_of_passphrase("x", {})
