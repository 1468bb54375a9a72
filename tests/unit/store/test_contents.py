"""flowbridge.store.contents: what events say, encrypted in the store."""

import secrets
from concurrent.futures import ThreadPoolExecutor

from cryptography.fernet import Fernet

from flowbridge.store.contents import Contents, is_readable, is_sealed

TEXT = '{"body":"Grüße","msgtype":"m.text"}'


def unlocked(secret: str | None = None) -> Contents:
    contents = Contents()
    contents.unlock(secret or Fernet.generate_key().decode())
    return contents


def test_what_was_sealed_is_opened_by_any_process_with_the_key_and_for_the_same_delivery_alone() -> None:
    secret = Fernet.generate_key().decode()
    sealed = unlocked(secret).seal(TEXT, "one")
    assert is_sealed(sealed)
    assert "msgtype" not in sealed
    assert unlocked(secret).open(sealed, "one") == TEXT
    assert unlocked(secret).open(sealed, "two") == sealed, "a row moved to another place is not read there"
    assert unlocked().open(sealed, "one") == sealed
    assert Contents().open(sealed, "one") == sealed


def test_broken_texts_stay_as_they_are() -> None:
    contents = unlocked()
    sealed = contents.seal(TEXT, "one")
    for text in (sealed[:-8], sealed[:20], "aesgcm1:", "aesgcm1:é", "aesgcm1:=", sealed[:-4] + "AAAA", "", TEXT):
        assert contents.open(text, "one") == text
    assert [is_readable(text) for text in (TEXT, TEXT.encode(), "", b"", sealed)] == [True, True, False, False, False]


def test_equal_texts_are_sealed_differently_also_from_many_threads() -> None:
    contents = unlocked()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: contents.seal(TEXT, "one"), range(2_000)))
    assert len({text[:46] for text in found}) == 2_000, "no nonce comes twice under a key"
    assert {contents.open(text, "one") for text in found} == {TEXT}


def test_mark_tells_equal_texts_and_cannot_be_made_without_the_key() -> None:
    secret = Fernet.generate_key().decode()
    one, other = unlocked(secret), unlocked(secret)
    assert one.mark(b"yes", b"") == other.mark(b"yes", b"")
    assert len({one.mark(b"yes"), one.mark(b"no"), unlocked().mark(b"yes")}) == 3


def test_request_is_opened_with_its_content_and_left_alone_without() -> None:
    contents, odd = unlocked(), f"aesgcm1:{secrets.token_hex(4)}"
    row = {"delivery": "one", "content": contents.seal(TEXT, "one"), "request": contents.seal(odd, "one")}
    assert contents.opened(row) == {"delivery": "one", "content": TEXT, "request": odd, "is_sealed": True}
    plain = {"delivery": "one", "content": TEXT, "request": odd}
    assert contents.opened(dict(plain)) == {**plain, "is_sealed": False}
