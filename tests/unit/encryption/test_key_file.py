"""The file of room keys: read, written, and refused in one line."""

import base64
import hmac
import json
from typing import Any

import pytest
from hypothesis import given

from flowbridge.encryption import key_file
from flowbridge.encryption.key_file import RoomKey
from flowbridge.encryption.olm import CryptoError, InboundGroup, OutboundGroup
from tests.unit.encryption.json_values import TEXTS, VALUES

# Of Element Web's own tests (MegolmExportEncryption-test): "plain" under "password".
CLIENT_S = """-----BEGIN MEGOLM SESSION DATA-----
AXNhbHRzYWx0c2FsdHNhbHSIiIiIiIiIiIiIiIiIiIiIAAAACmIRUW2OjZ3L2l6j9h0lHlV3M2dx
cissyYBxjsfsAndErh065A8=
-----END MEGOLM SESSION DATA-----"""


def room_key() -> RoomKey:
    return RoomKey("!r:hs", "sender key", "claimed", InboundGroup.from_key(OutboundGroup().key))


def sealed(plain: bytes, rounds: int = 1) -> str:
    """A file that holds anything."""
    head = b"\x01" + bytes(32) + rounds.to_bytes(4, "big")
    aes, mac_key = key_file._keys("password", head, rounds)
    body = head + key_file._aes(aes, bytes(16), plain)
    text = base64.b64encode(body + hmac.digest(mac_key, body, "sha256")).decode()
    return f"{key_file._BEGIN}\n{text}\n{key_file._END}\n"


def test_file_that_was_written_is_read() -> None:
    key = room_key()
    text = key_file.write([key], "password", rounds=1_000)
    (value,) = key_file.read(f"a line before\r\n{text}and after", "password")
    found = key_file.room_key(value)
    assert (found.told(), found.group.id) == (key.told(), key.group.id)
    assert key.group.id not in text


def test_keys_are_stretched_as_long_as_the_specification_asks() -> None:
    assert key_file.ROUNDS >= 100_000
    raw = base64.b64decode("".join(key_file.write([], "p").splitlines()[1:-1]))
    assert int.from_bytes(raw[33:37], "big") == key_file.ROUNDS


def test_another_client_s_file_is_read_as_it_means_it() -> None:
    """Its MAC fits the passphrase; what is inside is "plain", which is no list of keys."""
    with pytest.raises(CryptoError, match="no list"):
        key_file.read(CLIENT_S, "password")
    with pytest.raises(CryptoError, match="passphrase is wrong"):
        key_file.read(CLIENT_S, "Password")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a file of room keys"),
        (CLIENT_S.partition("-----END")[0], "not a file of room keys"),
        (CLIENT_S.replace("AXNh", "A*Nh"), "not base64"),
        (CLIENT_S.replace("AXNh", "AnNh"), "another version"),
        (f"{key_file._BEGIN}\nAQ==\n{key_file._END}", "cut off"),
        (CLIENT_S.replace("AAAACm", "//////"), "rounds"),
        (CLIENT_S.replace("ErhO", "ErhP").replace("Erh0", "Erh1"), "damaged"),
        (sealed(b"["), "no list"),
        (sealed(b"[" * 100_000), "no list"),
        (sealed(b"\xff"), "no list"),
        (sealed(json.dumps([0] * 200_001).encode()), "200001 room keys"),
    ],
    ids=range(11),
)
def test_file_that_is_none_is_refused(text: str, why: str) -> None:
    with pytest.raises(CryptoError, match=why):
        key_file.read(text, "password")


@given(VALUES, TEXTS)
def test_nothing_in_a_file_breaks_the_reader(value: Any, text: str) -> None:
    right = room_key().told()
    for each in (value, text, {**right, "session_id": "another"}, *({**right, name: value} for name in right)):
        try:
            found = key_file.room_key(each)
        except CryptoError:
            continue
        assert found.group.id == right["session_id"]
