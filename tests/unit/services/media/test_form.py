"""flowbridge.services.media.form: a message as a form with files."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from flowbridge.errors import BadRequest, MatrixError, TooLarge
from flowbridge.homeserver.spool import Spool
from flowbridge.services.media import form
from flowbridge.services.media.attachment import Label

TYPE = "multipart/form-data; boundary=b"
FIELDS = "the fields of the form are longer than 524288 bytes"
PICTURE = bytes(range(256)) * 40


def multipart(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    lines = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + value + b"\r\n"
        for head, value in parts
    )
    return lines + end


FORM = multipart(
    ('name="text"', "Grüße\r\nan alle".encode()),
    ('name="file"; filename="a.png"\r\nContent-Type: image/png', PICTURE),
    ('name="key"', b""),
    ('name="file"; filename="b.txt"', b"b"),
)


class Disk:
    """Where files go; how many are there."""

    def __init__(self) -> None:
        self.made: list[Spool] = []
        self.open = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Spool]:
        spool = Spool()
        self.made.append(spool)
        self.open += 1
        try:
            yield spool
        finally:
            self.open -= 1
            spool.close()


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("size", [1, 7, 100, 1_000_000])
async def test_fields_and_files_are_read_in_pieces_of_any_size(size: int) -> None:
    disk = Disk()
    async with form.read(pieces(FORM, size), TYPE, disk, 100_000) as found:
        assert found.fields == [("text", "Grüße\r\nan alle"), ("key", "")]
        assert [file.label for file in found.files] == [Label("a.png", "image/png"), Label("b.txt")]
        assert [await file.spool.read() for file in found.files] == [PICTURE, b"b"]
        assert found.files[0].sha256 == hashlib.sha256(PICTURE).hexdigest()
        assert disk.open == 2
    assert disk.open == 0


async def test_field_for_a_file_that_nobody_chose_is_absent() -> None:
    body = multipart(('name="text"', b"x"), ('name="file"; filename=""', b""))
    async with form.read(pieces(body, 50), TYPE, Disk(), 100) as found:
        assert (found.fields, found.files) == ([("text", "x")], [])


@pytest.mark.parametrize(
    ("body", "content_type", "sentence"),
    [
        (multipart(('name="file"; filename="a.png"', b"")), TYPE, "message: a.png is empty at /attachments/0"),
        (FORM[:-10], TYPE, "the body is not multipart/form-data: it ends before its last boundary"),
        (b"x", "multipart/form-data", "Content-Type: multipart/form-data without a boundary"),
        (b"x", TYPE, "the body is not multipart/form-data: "),
        (multipart(*[('name="text"', b"x")] * 51), TYPE, "the form holds more than 50 parts"),
        (multipart(*[('name="f"; filename="a"', b"x")] * 21), TYPE, "the form holds more than 20 files"),
        (
            multipart(('name="file"; filename="a"\r\nContent-Type: nonsense', b"x")),
            TYPE,
            "the part's Content-Type: not a",
        ),
    ],
)
async def test_form_that_is_wrong_is_refused_and_leaves_nothing_on_the_disk(
    body: bytes, content_type: str, sentence: str
) -> None:
    disk = Disk()
    with pytest.raises(BadRequest) as caught:
        async with form.read(pieces(body, 64), content_type, disk, 1_000_000):
            pass
    assert caught.value.error.startswith(sentence)
    assert disk.open == 0


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (('name="file"; filename="a.png"', b"x" * 1_001), "a.png: the file is larger than 1000 bytes"),
        (('name="text"', b"x" * form.FIELD_BYTES), FIELDS),
        (
            ('name="text"\r\nX-Long: ' + "x" * form.FIELD_BYTES, b""),
            FIELDS,
        ),
    ],
)
async def test_what_is_too_large_is_refused_before_its_end(part: tuple[str, bytes], sentence: str) -> None:
    disk, read = Disk(), 0
    endless = multipart(part, part, part)

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        async for piece in pieces(endless, 500):
            read += len(piece)
            yield piece

    with pytest.raises(MatrixError) as caught:
        async with form.read(counted(), TYPE, disk, 1_000):
            pass
    assert isinstance(caught.value, TooLarge | BadRequest)
    if isinstance(caught.value, TooLarge):
        assert caught.value.error == sentence
    assert read < len(endless)
    assert disk.open == 0
