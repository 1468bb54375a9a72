"""The library behind our interface: what goes round, and what is refused as a CryptoError whatever it is."""

import contextlib
import secrets
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.encryption import olm, unpadded
from flowbridge.encryption.olm import Account, CryptoError, InboundGroup, OlmMessage, OutboundGroup, Session

KEY = b"k" * 32


def channel() -> tuple[Account, Session, Account, Session]:
    """Alice and Bob, who have a session with each other."""
    alice, bob = Account(), Account()
    bob.generate_one_time_keys(1)
    (key,) = bob.one_time_keys.values()
    hers = alice.outbound(bob.curve25519, key)
    his, said = bob.inbound(alice.curve25519, hers.encrypt(b"hello"))
    assert said == b"hello"
    return alice, hers, bob, his


def test_what_one_device_encrypts_the_other_reads_both_ways() -> None:
    _, hers, _, his = channel()
    assert hers.decrypt(his.encrypt(b"and you")) == b"and you"
    assert his.decrypt(hers.encrypt(b"well")) == b"well"
    assert hers.id == his.id


def test_a_message_is_read_once() -> None:
    _, hers, _, his = channel()
    message = hers.encrypt(b"once")
    his.decrypt(message)
    with pytest.raises(CryptoError, match="cannot be decrypted"):
        his.decrypt(message)


def test_a_one_time_key_begins_one_session() -> None:
    alice, bob = Account(), Account()
    bob.generate_one_time_keys(1)
    (key,) = bob.one_time_keys.values()
    first = alice.outbound(bob.curve25519, key).encrypt(b"first")
    bob.inbound(alice.curve25519, first)
    with pytest.raises(CryptoError, match="unknown one-time key"):
        bob.inbound(alice.curve25519, alice.outbound(bob.curve25519, key).encrypt(b"second"))


def test_a_message_that_cannot_be_read_leaves_the_session_as_it_was() -> None:
    _, hers, _, his = channel()
    good = hers.encrypt(b"good")
    with pytest.raises(CryptoError):
        his.decrypt(OlmMessage(good.type, unpadded.encode(secrets.token_bytes(120))))
    assert his.decrypt(good) == b"good"


def test_a_session_goes_on_from_its_pickle() -> None:
    _, hers, _, his = channel()
    kept = Session.from_pickle(his.pickle(KEY), KEY)
    assert kept.decrypt(hers.encrypt(b"still here")) == b"still here"


def test_a_pre_key_message_is_known_by_its_session() -> None:
    alice, bob = Account(), Account()
    bob.generate_one_time_keys(2)
    one, other = bob.one_time_keys.values()
    first, second = alice.outbound(bob.curve25519, one), alice.outbound(bob.curve25519, other)
    his, _ = bob.inbound(alice.curve25519, first.encrypt(b"1"))
    assert his.begins_with(first.encrypt(b"2"))
    assert not his.begins_with(second.encrypt(b"3"))


def test_keys_wait_until_they_are_published() -> None:
    account = Account()
    assert (account.one_time_keys, account.fallback_key) == ({}, {})
    account.generate_one_time_keys(3)
    account.generate_fallback_key()
    kept = Account.from_pickle(account.pickle(KEY), KEY)
    assert kept.one_time_keys == account.one_time_keys
    assert len(kept.one_time_keys) == 3
    assert kept.fallback_key == account.fallback_key
    kept.mark_published()
    assert (kept.one_time_keys, kept.fallback_key) == ({}, {})


def test_a_room_is_read_from_where_its_key_was_shared() -> None:
    room = OutboundGroup()
    before = room.encrypt(b"before")
    reader = InboundGroup.from_key(room.key)
    assert (reader.id, reader.first_index) == (room.id, 1)
    message = reader.decrypt(room.encrypt(b"after"))
    assert message == (b"after", 1)
    with pytest.raises(CryptoError, match="index"):
        reader.decrypt(before)


def test_an_exported_room_key_reads_as_much_as_it_did() -> None:
    room = OutboundGroup()
    reader = InboundGroup.from_key(room.key)
    message = room.encrypt(b"kept")
    copy = InboundGroup.from_export(reader.export())
    again = InboundGroup.from_pickle(copy.pickle(KEY), KEY)
    assert again.decrypt(message) == reader.decrypt(message) == (b"kept", 0)


def test_a_room_goes_on_from_its_pickle_with_the_same_ciphertexts() -> None:
    room = OutboundGroup()
    room.encrypt(b"0")
    kept = OutboundGroup.from_pickle(room.pickle(KEY), KEY)
    assert (kept.id, kept.index) == (room.id, room.index)
    assert kept.encrypt(b"1") == room.encrypt(b"1")


def test_signatures_are_checked() -> None:
    account = Account()
    signature = account.sign(b"this")
    assert olm.is_signed_by(account.ed25519, b"this", signature)
    assert not olm.is_signed_by(account.ed25519, b"that", signature)
    assert not olm.is_signed_by(Account().ed25519, b"this", signature)


PICKLES: list[Callable[[str, bytes], object]] = [
    *(Account.from_pickle, Session.from_pickle, OutboundGroup.from_pickle, InboundGroup.from_pickle)
]


@pytest.mark.parametrize("read", PICKLES)
def test_pickles_are_unreadable_with_another_key(read: Callable[[str, bytes], object]) -> None:
    _, session, account, _ = channel()
    room = OutboundGroup()
    for pickle in (each.pickle(KEY) for each in (account, session, room, InboundGroup.from_key(room.key))):
        with pytest.raises(CryptoError, match="secret key"):
            read(pickle, b"x" * 32)


ANY = st.text() | st.binary().map(unpadded.encode) | st.sampled_from([OutboundGroup().key, Account().curve25519])


@given(ANY, ANY, st.integers())
def test_whatever_comes_in_is_refused_in_our_words(text: str, other: str, number: int) -> None:
    account, session, room = Account(), channel()[1], InboundGroup.from_key(OutboundGroup().key)
    attempts: list[Callable[[], object]] = [
        lambda: session.decrypt(OlmMessage(number, text)),
        lambda: session.begins_with(OlmMessage(0, text)),
        lambda: account.inbound(other, OlmMessage(0, text)),
        lambda: account.outbound(text, other),
        lambda: room.decrypt(text),
        lambda: InboundGroup.from_key(text),
        lambda: InboundGroup.from_export(text),
        lambda: olm.Backup(text.encode("utf-8", "replace")),
        lambda: Account.from_pickle(text, KEY),
    ]
    for attempt in attempts:
        with contextlib.suppress(CryptoError):
            attempt()
    olm.is_signed_by(text, b"", other)
