"""flowbridge.encryption.attachments: what other clients encrypt, and what nobody should."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.encryption import unpadded
from flowbridge.encryption.attachments import PIECE, BadFile, EncryptedFile, Encryption

# Of matrix-encrypt-attachment, which matrix-js-sdk's clients use: a counter that is full, and "Hello, World".
KEY = "__________________________________________8"
VECTORS = [
    (b"", "/////////////////////w", b""),
    (unpadded.decode("5xJZTt5cQicm+9f4"), "//////////8AAAAAAAAAAA", b"Hello, World"),
]


def described(**other: Any) -> dict[str, Any]:
    return {
        "v": "v2",
        "url": "mxc://hs/abc",
        "key": {"kty": "oct", "alg": "A256CTR", "ext": True, "key_ops": ["encrypt", "decrypt"], "k": KEY},
        "iv": "//////////8AAAAAAAAAAA",
        "hashes": {"sha256": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"},
        **other,
    }


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for each in data:
        yield each


async def whole(body: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in body])


@pytest.mark.parametrize(("encrypted", "iv", "plain"), VECTORS, ids=["empty", "hello"])
async def test_what_another_client_encrypted_is_read(encrypted: bytes, iv: str, plain: bytes) -> None:
    sha256 = unpadded.encode(hashlib.sha256(encrypted).digest())
    file = EncryptedFile.of(described(iv=iv, hashes={"sha256": sha256}))
    assert await whole(file.decrypted(pieces(encrypted))) == plain


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
async def test_comes_back_as_it_was_however_it_was_cut(data: bytes, cut: int) -> None:
    encryption = Encryption()
    encrypted = await whole(encryption.of(pieces(data[:cut], data[cut:])))
    assert len(encrypted) == len(data)
    file = EncryptedFile.of(encryption.described("mxc://hs/abc"))
    assert await whole(file.decrypted(pieces(encrypted[cut:][:0], encrypted))) == data


async def test_large_pieces_are_worked_on_in_small_ones() -> None:
    encryption, data = Encryption(), bytes(3 * PIECE + 1)
    encrypted = [piece async for piece in encryption.of(pieces(data))]
    assert max(map(len, encrypted)) == PIECE
    file = EncryptedFile.of(encryption.described("mxc://hs/abc"))
    found = [piece async for piece in file.decrypted(pieces(b"".join(encrypted)))]
    assert (max(map(len, found)), b"".join(found)) == (PIECE, data)


async def test_no_two_files_have_the_same_key_or_stream() -> None:
    found = []
    for _ in range(2):
        encryption = Encryption()
        found.append((await whole(encryption.of(pieces(bytes(64)))), encryption.described("")["key"]["k"]))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("change", ["flip", "cut", "longer"])
async def test_last_piece_of_a_file_that_was_changed_is_never_given(change: str) -> None:
    encryption, data = Encryption(), bytes(range(256)) * 1_000
    encrypted = bytearray(await whole(encryption.of(pieces(data))))
    if change == "flip":
        encrypted[0] ^= 1
    elif change == "cut":
        del encrypted[-1:]
    else:
        encrypted += b"x"
    found = list[bytes]()

    async def read() -> None:
        file = EncryptedFile.of(encryption.described("mxc://hs/abc"))
        async for piece in file.decrypted(pieces(bytes(encrypted))):
            found.append(piece)

    with pytest.raises(BadFile, match="its hash is another one"):
        await read()
    assert len(b"".join(found)) < len(data)


async def test_short_file_that_was_changed_gives_nothing() -> None:
    encryption = Encryption()
    encrypted = await whole(encryption.of(pieces(b"hello")))
    found = EncryptedFile.of(encryption.described("mxc://hs/abc")).decrypted(pieces(encrypted + b"!"))
    with pytest.raises(BadFile):
        await anext(found)


HOSTILE: list[tuple[Any, str]] = [
    (None, "has no encrypted file"),
    ([], "has no encrypted file"),
    (described(v="v1"), "not of version v2"),
    (described(v=2), "not of version v2"),
    (described(key=None), "not one for A256CTR"),
    (described(key={"kty": "oct", "alg": "A128CTR", "k": KEY}), "not one for A256CTR"),
    (described(key={"kty": "oct", "alg": "A256CTR", "k": KEY[:-4]}), "its key is not 32 bytes"),
    (described(key={"kty": "oct", "alg": "A256CTR", "k": 7}), "its key is not 32 bytes"),
    (described(key={"kty": "oct", "alg": "A256CTR", "k": "ü" * 43}), "its key is not 32 bytes"),
    (described(iv="AAAA"), "its iv is not 16 bytes"),
    (described(iv="A" * 1_000_000), "its iv is not 16 bytes"),
    (described(hashes=None), "its hash is not 32 bytes"),
    (described(hashes={"md5": "AAAA"}), "its hash is not 32 bytes"),
    (described(url="https://evil.example/a"), "no mxc:// address"),
    (described(url="mxc://hs/../../secret"), "no mxc:// address"),
    (described(url=None), "no mxc:// address"),
]


@pytest.mark.parametrize(("file", "why"), HOSTILE)
def test_hostile_description_is_refused_with_the_reason(file: Any, why: str) -> None:
    with pytest.raises(BadFile, match=why):
        EncryptedFile.of(file)
