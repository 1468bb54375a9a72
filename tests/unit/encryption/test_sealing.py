import pytest
from cryptography.fernet import Fernet

from flowbridge.encryption.olm import Account, CryptoError
from flowbridge.encryption.sealing import Seal


def test_what_is_sealed_is_read_with_the_same_secret_key_alone() -> None:
    secret = Fernet.generate_key().decode()
    seal = Seal(secret)
    sealed = seal.close({"seed": "precious"})
    assert "precious" not in sealed
    assert Seal(secret).open(sealed) == {"seed": "precious"}
    with pytest.raises(CryptoError, match="FLOWBRIDGE_SECRET_KEY"):
        Seal(Fernet.generate_key().decode()).open(sealed)


def test_pickles_have_a_key_of_their_own_made_of_the_secret_key() -> None:
    secret = Fernet.generate_key().decode()
    pickle = Account().pickle(Seal(secret).pickle_key)
    Account.from_pickle(pickle, Seal(secret).pickle_key)
    with pytest.raises(CryptoError, match="secret key"):
        Account.from_pickle(pickle, Seal(Fernet.generate_key().decode()).pickle_key)
