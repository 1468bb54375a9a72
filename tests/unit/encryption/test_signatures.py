"""Signed JSON, by the specification's own examples (appendix "Signing JSON", "Cryptographic test vectors")."""

from hypothesis import given

from flowbridge.encryption import signatures, unpadded
from flowbridge.encryption.olm import Account
from flowbridge.encryption.signatures import SigningKey
from tests.unit.encryption.json_values import TEXTS, VALUES

SEED = unpadded.decode("YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1")


def test_the_specification_s_examples_have_its_signatures() -> None:
    key = SigningKey(SEED)
    assert key.public == "XGX0JRS2Af3be3knz2fBiRbApjm2Dh61gXDJA8kcJNI"
    nothing = key.sign(signatures.signed_part({}))
    assert nothing == "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ"
    some = key.sign(signatures.signed_part({"one": 1, "two": "Two"}))
    assert some == "KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw"


def test_a_signature_is_of_all_but_signatures_and_what_is_unsigned() -> None:
    account = Account()
    value = {"a": 1, "unsigned": {"name": "x"}, "signatures": {"@b:hs": {"ed25519:B": "y"}}}
    signed = signatures.add(value, "@a:hs", "A", account.sign(signatures.signed_part(value)))
    assert signed["signatures"]["@b:hs"] == {"ed25519:B": "y"}
    assert signatures.is_signed(signed, "@a:hs", "A", account.ed25519)
    assert signatures.is_signed({**signed, "unsigned": {}}, "@a:hs", "A", account.ed25519)
    assert not signatures.is_signed({**signed, "a": 2}, "@a:hs", "A", account.ed25519)
    assert not signatures.is_signed(signed, "@a:hs", "A", Account().ed25519)
    assert not signatures.is_signed(signed, "@b:hs", "B", account.ed25519)


@given(VALUES, TEXTS)
def test_nothing_that_is_made_so_as_not_to_be_signed_is(value: object, name: str) -> None:
    assert not signatures.is_signed(value, name, name, Account().ed25519)
    assert not signatures.is_signed({"x": value, "signatures": {name: {f"ed25519:{name}": "A" * 86}}}, name, name, name)
