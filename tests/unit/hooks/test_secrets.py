"""flowbridge.hooks.secrets: which are good enough, and how they are kept."""

import base64

import pytest
from cryptography.fernet import Fernet

from flowbridge.hooks import secrets
from flowbridge.models.hooks import SCHEMES
from flowbridge.store.hooks import StoredSecret, digest

FERNET = Fernet(Fernet.generate_key())


def whsec(number: int) -> str:
    return f"whsec_{base64.b64encode(bytes(number)).decode()}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_secret_is_good_enough_and_comes_back(scheme: str) -> None:
    secret = secrets.new(scheme)
    assert secrets.problem(secret, scheme) == ""
    assert secret.startswith("whsec_" if scheme == "standard-webhooks" else "fh_")
    assert secrets.new(scheme) != secret
    kept = secrets.sealed(secret, scheme, FERNET)
    assert secret not in f"{kept.hash}{kept.sealed}"
    opened = secrets.opened(StoredSecret("ci", kept.hash, kept.sealed, 0, None), FERNET)
    assert opened is not None
    assert opened.digest == digest(secret)
    assert opened.text == ("" if scheme == "token" else secret)


def test_secret_of_another_key_is_none() -> None:
    kept = secrets.sealed("a" * 20, "github", Fernet(Fernet.generate_key()))
    assert secrets.opened(StoredSecret("ci", kept.hash, kept.sealed, 0, None), FERNET) is None


def test_text_that_signs_has_no_digest_in_the_store() -> None:
    """People choose it, and it could be guessed; two hooks may have one."""
    first, second = (secrets.sealed("a" * 20, "github", FERNET) for _ in range(2))
    assert digest("a" * 20).hex() != first.hash != second.hash


@pytest.mark.parametrize(
    ("secret", "scheme", "good"),
    [
        ("a" * 16, "token", True),
        ("a" * 15, "token", False),
        ("a" * 1_000, "hmac", True),
        ("a" * 1_001, "hmac", False),
        ("a" * 16 + "é", "hmac", False),
        ("a" * 16 + "\n", "token", False),
        ("a" * 16 + "\x7f", "token", False),
        ("a" * 8 + " " + "a" * 8, "github", False),
        (whsec(24), "standard-webhooks", True),
        (whsec(64), "standard-webhooks", True),
        (whsec(23), "standard-webhooks", False),
        (whsec(65), "standard-webhooks", False),
        ("whsec_" + "!" * 40, "standard-webhooks", False),
        ("whsec_é", "standard-webhooks", False),
        (base64.b64encode(bytes(32)).decode(), "standard-webhooks", False),
        ("a" * 16, "gitlab", True),
        (whsec(32), "gitlab", True),
        ("whsec_not-base64-at-all", "gitlab", False),
    ],
)
def test_given_secret_is_checked(secret: str, scheme: str, good: bool) -> None:
    wrong = secrets.problem(secret, scheme)
    assert (wrong == "") is good
    assert secret not in wrong
