"""flowbridge.services.media.transfer: files of messages on their way to the homeserver."""

import asyncio
import base64
import io
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
from PIL import Image

from flowbridge.encryption.attachments import EncryptedFile
from flowbridge.errors import BadContent, TooLarge, Unavailable
from flowbridge.events.message import Attachment
from flowbridge.homeserver.spool import Spool
from flowbridge.models import Caller
from flowbridge.outbound.destination import Allowed
from flowbridge.outbound.fetch import Fetcher
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.files import Media, Upload
from flowbridge.services.media.transfer import Transfer

CALLER = Caller("@a:hs", None, "token")
AT = "/attachments/0"
ROOM = "!r:hs"


@dataclass
class FakeMedia:
    """A homeserver's media. `away`: it cannot be reached."""

    most: int = 1_000_000
    away: bool = False
    files: list[tuple[Label, int | None, bytes]] = field(default_factory=list)

    async def largest(self, _: Caller) -> int:
        return self.most

    async def store(self, _: Caller, file: Upload) -> str:
        if self.away:
            raise Unavailable("the homeserver is away")
        self.files.append((file.label, file.length, b"".join([piece async for piece in file.body])))
        return f"mxc://hs/{len(self.files)}"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    return file.getvalue()


@asynccontextmanager
async def web(head: str, body: bytes) -> AsyncIterator[str]:
    """The address of a server that gives each request this answer."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def transferring(media: FakeMedia, *, encrypted: bool = False, **options: Any) -> AsyncIterator[Transfer]:
    async def encrypts(_: Caller, room: str) -> bool:
        assert room == ROOM
        return encrypted

    make = partial(Fetcher, ssl.create_default_context(), Allowed(["127.0.0.1"]))
    transfer = Transfer(cast("Media", media), make, encrypts, **options)
    yield transfer
    await transfer.close()


async def fetched(media: FakeMedia, head: str, body: bytes, path: str = "/cat.png", **labels: Any) -> Attachment:
    async with web(head, body) as url, transferring(media) as transfer:
        return await transfer.bring(CALLER, ROOM, Attachment(url=url + path, **labels), AT)


async def test_picture_from_a_url_is_uploaded_with_its_name_type_and_size() -> None:
    media, picture = FakeMedia(), png()
    found = await fetched(media, f"Content-Type: image/png\r\nContent-Length: {len(picture)}", picture)
    info = {"size": len(picture), "w": 40, "h": 30}
    assert found == Attachment("mxc://hs/1", "cat.png", "image/png", info=info)
    assert media.files == [(Label("cat.png", "image/png"), len(picture), picture)]


async def test_what_the_caller_says_wins_over_what_the_server_says() -> None:
    head = "Content-Type: text/plain\r\nContent-Length: 3"
    found = await fetched(FakeMedia(), head, b"a,b", filename="t.csv", mimetype="text/csv", caption="T")
    assert (found.filename, found.mimetype, found.caption) == ("t.csv", "text/csv", "T")


async def test_server_that_does_not_know_the_type_leaves_it_to_the_name() -> None:
    found = await fetched(
        FakeMedia(), "Content-Type: application/octet-stream\r\nContent-Length: 3", b"a,b", path="/t.csv"
    )
    assert (found.filename, found.mimetype) == ("t.csv", "text/csv")


async def test_server_with_a_malformed_type_or_name_is_taken_without() -> None:
    head = "Content-Type: nonsense\r\nContent-Length: 1\r\nContent-Disposition: attachment; filename=.."
    found = await fetched(FakeMedia(), head, b"x", path="/")
    assert (found.filename, found.mimetype) == ("file.bin", "application/octet-stream")


async def test_long_file_streams_through_with_its_first_bytes() -> None:
    media, data = FakeMedia(), bytes(range(256)) * 3_000
    found = await fetched(media, f"Content-Length: {len(data)}", data, path="/x.bin")
    assert media.files[0][2] == data
    assert found.info == {"size": len(data)}


async def test_file_of_unknown_length_has_its_size_in_the_end() -> None:
    media = FakeMedia()
    found = await fetched(media, "Content-Type: text/plain", b"until the end")
    assert (media.files[0][1], found.info) == (None, {"size": 13})


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ("Content-Type: image/png\r\nContent-Length: 14", b"<html>login...", "is not image/png but a web page"),
        ("Content-Length: 0", b"", "is empty"),
        ("Content-Length: 9", b"short", "broke off"),
    ],
)
async def test_url_that_gives_no_such_file_is_a_problem_at_its_pointer(head: str, body: bytes, message: str) -> None:
    media = FakeMedia()
    with pytest.raises(BadContent) as caught:
        await fetched(media, head, body)
    (problem,) = caught.value.problems
    assert problem.pointer == f"{AT}/url"
    assert message in problem.message
    assert media.files == []


async def test_file_that_is_too_large_is_a_413_with_the_pointer() -> None:
    with pytest.raises(TooLarge) as caught:
        await fetched(FakeMedia(most=10), "Content-Length: 11", b"x" * 11)
    assert caught.value.error == f"{AT}/url: is larger than 10 bytes, which is the most that may be uploaded"
    assert caught.value.extra["flowbridge"]["problems"][0]["pointer"] == f"{AT}/url"
    async with transferring(FakeMedia(), most_bytes=2) as transfer:
        with pytest.raises(TooLarge, match="larger than 2 bytes"):
            await transfer.bring(CALLER, ROOM, Attachment(data="AAAA"), AT)


async def test_homeserver_that_is_away_is_its_own_error() -> None:
    with pytest.raises(Unavailable):
        await fetched(FakeMedia(away=True), "Content-Length: 1", b"x", path="/x.bin")


@pytest.mark.parametrize(
    "data",
    [
        base64.b64encode(png()).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(png()).decode(),
        {"type": "Buffer", "data": list(png())},
    ],
    ids=["base64", "data-url", "buffer"],
)
async def test_file_in_the_message_is_uploaded(data: Any) -> None:
    media = FakeMedia()
    async with transferring(media) as transfer:
        found = await transfer.bring(CALLER, ROOM, Attachment(data=data, filename="cat.png"), AT)
    assert found == Attachment("mxc://hs/1", "cat.png", "image/png", info={"size": len(png()), "w": 40, "h": 30})
    assert media.files[0][2] == png()


@pytest.mark.parametrize(
    ("data", "pointer", "message"),
    [
        ("not base64!", "", "is not base64"),
        ("data:image/png;base64", "", "is a data: URL without a comma"),
        ({"type": "Buffer", "data": [1, 256]}, "/data/1", "must be an integer from 0 to 255"),
        ({"type": "Buffer", "data": [1, "x"]}, "/data/1", "must be an integer from 0 to 255"),
        ({"type": "Buffer"}, "", "must be base64, a data: URL, or a Node-RED Buffer"),
        (7, "", "must be base64, a data: URL, or a Node-RED Buffer"),
        ("", "", "is empty"),
    ],
)
async def test_data_that_is_no_file_is_a_problem_at_its_pointer(data: Any, pointer: str, message: str) -> None:
    media = FakeMedia()
    async with transferring(media) as transfer:
        with pytest.raises(BadContent) as caught:
            await transfer.bring(CALLER, ROOM, Attachment(data=data), AT)
    (problem,) = caught.value.problems
    assert (problem.pointer, problem.message) == (f"{AT}/data{pointer}", message)
    assert media.files == []


async def test_file_of_a_form_is_uploaded() -> None:
    media, spool = FakeMedia(), Spool()
    await spool.write(png())
    async with transferring(media) as transfer:
        found = await transfer.bring(CALLER, ROOM, Attachment(data=spool, filename="cat.png"), AT)
    spool.close()
    assert found.info == {"size": len(png()), "w": 40, "h": 30}
    assert media.files == [(Label("cat.png"), len(png()), png())]


@pytest.mark.parametrize(("filename", "named"), [("", "file.png"), ("cat", "cat")])
async def test_picture_without_a_type_is_known_by_its_first_bytes(filename: str, named: str) -> None:
    data = base64.b64encode(png()).decode()
    async with transferring(FakeMedia()) as transfer:
        found = await transfer.bring(CALLER, ROOM, Attachment(data=data, filename=filename), AT)
    assert (found.filename, found.mimetype) == (named, "image/png")


async def test_file_that_the_homeserver_has_is_left_alone() -> None:
    media, file = FakeMedia(), Attachment("mxc://hs/x", "a", "text/plain")
    async with transferring(media) as transfer:
        assert await transfer.bring(CALLER, ROOM, file, AT) is file
    assert media.files == []


async def test_file_for_an_encrypted_room_leaves_neither_its_bytes_nor_its_name_with_the_homeserver() -> None:
    media, picture = FakeMedia(), png()
    head = f"Content-Type: image/png\r\nContent-Length: {len(picture)}"
    async with web(head, picture) as url, transferring(media, encrypted=True) as transfer:
        found = await transfer.bring(CALLER, ROOM, Attachment(url=f"{url}/secret.png"), AT)
    ((label, length, uploaded),) = media.files
    assert (label, length) == (Label("", "application/octet-stream"), len(picture))
    assert uploaded[:8] != picture[:8]
    assert (found.filename, found.mimetype, found.info) == (
        "secret.png",
        "image/png",
        {"size": len(picture), "w": 40, "h": 30},
    )
    file = EncryptedFile.of(found.file)
    assert file.uri == found.content_uri == "mxc://hs/1"
    assert b"".join([piece async for piece in file.decrypted(once(uploaded))]) == picture


@pytest.mark.parametrize("data", ["aGVsbG8=", b"hello"], ids=["base64", "text"])
async def test_every_way_of_a_file_is_encrypted(data: Any) -> None:
    media = FakeMedia()
    async with transferring(media, encrypted=True) as transfer:
        found = await transfer.bring(CALLER, ROOM, Attachment(data=data, filename="a.txt"), AT)
    file = EncryptedFile.of(found.file)
    assert media.files[0][2] != b"hello"
    assert b"".join([piece async for piece in file.decrypted(once(media.files[0][2]))]) == b"hello"


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data
