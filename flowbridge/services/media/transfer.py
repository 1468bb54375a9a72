"""Files of messages: from a URL, or from the message itself, to the homeserver, before the message is accepted."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from flowbridge.errors import BadContent, MatrixError, Problem, TooLarge
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller
from flowbridge.outbound.fetch import Fetched, Fetcher, FileTooLarge, NotFetched
from flowbridge.services.media import attachment, content
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.files import Media, Upload

MAX_FETCHES = 32  # at a time: each holds two connections, and up to 256 KiB
MAX_FETCHES_OF_ONE = 4
TURN_SECONDS = 30.0
RULE = "message"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that the homeserver has. `info`: size in bytes and, of a picture, width and height."""

    content_uri: str
    label: Label
    info: Mapping[str, int]


class Transfer:
    """Brings files to the homeserver. `most_bytes`: of one file, where the homeserver allows more."""

    def __init__(self, media: Media, fetcher: Fetcher, *, most_bytes: int | None = None) -> None:
        self._media = media
        self._fetcher = fetcher
        self._most_bytes = most_bytes
        self._fetches = Limiter("files that are being fetched", MAX_FETCHES, MAX_FETCHES_OF_ONE)

    async def from_url(self, caller: Caller, url: str, label: Label, pointer: str) -> Stored:
        """Fetch a file and upload it meanwhile. `pointer`: to the URL in the caller's body.

        Raises BadContent for a URL that gives no such file, TooLarge, TooMany, and the homeserver's errors.
        """
        most = await self._most(caller)
        async with self._fetches.turn(peer.who(), TURN_SECONDS):
            try:
                async with self._fetcher.open(url, most) as fetched:
                    return await self._streamed(caller, fetched, label, pointer)
            except FileTooLarge as error:
                raise TooLarge(f"{pointer}: {error}", flowbridge=_problems(pointer, str(error))) from None
            except NotFetched as error:
                raise BadContent([Problem(pointer, str(error), RULE)]) from None

    async def from_data(self, caller: Caller, data: Any, label: Label, pointer: str) -> Stored:
        """Upload what a message holds: base64, a `data:` URL, or a Node-RED Buffer. Raises as `from_url` does."""
        found = await asyncio.to_thread(attachment.decode, data, pointer)
        most = await self._most(caller)
        if len(found.data) > most:
            message = f"is larger than {most} bytes, which is the most that may be uploaded"
            raise TooLarge(f"{pointer}: {message}", flowbridge=_problems(pointer, message))
        label = label.or_else(found.label)
        uri, head = await self._put(caller, _once(found.data), len(found.data), label, pointer)
        return await self._described(uri, label, head, len(found.data))

    async def _streamed(self, caller: Caller, fetched: Fetched, label: Label, pointer: str) -> Stored:
        label = label.or_else(_label(fetched))
        counted = _Counted(fetched.body)
        uri, head = await self._put(caller, counted, fetched.length, label, pointer)
        return await self._described(uri, label, head, counted.size)

    async def _put(
        self, caller: Caller, body: AsyncIterator[bytes], length: int | None, label: Label, pointer: str
    ) -> tuple[str, bytes]:
        """Upload it, unless its first bytes contradict its type. Its address, and these bytes."""
        head = b""
        async for piece in body:
            head += piece
            if len(head) >= content.HEAD_BYTES:
                break
        if not head:
            raise BadContent([Problem(pointer, "is empty", RULE)])
        if reason := content.contradiction(head, label.media_type):
            raise BadContent([Problem(pointer, reason, RULE)])
        return await self._media.store(caller, Upload(_chain(head, body), length, label)), head

    async def _described(self, uri: str, label: Label, head: bytes, size: int) -> Stored:
        info = await asyncio.to_thread(content.info, head, size)
        return Stored(uri, Label(label.filename, label.media_type), info)

    async def _most(self, caller: Caller) -> int:
        largest = await self._media.largest(caller)
        return largest if self._most_bytes is None else min(largest, self._most_bytes)


class _Counted:
    """A body, and how long it was."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self.size = 0

    def __aiter__(self) -> "AsyncIterator[bytes]":
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._body)
        self.size += len(piece)
        return piece


def _label(fetched: Fetched) -> Label:
    """What the server says, as far as that can be a name and a type."""
    name = kind = ""
    try:
        name = attachment.filename(fetched.filename[:200])
        kind = attachment.content_type(fetched.content_type)
    except MatrixError:
        pass
    return Label(name, "" if attachment.essence(kind) == attachment.UNKNOWN else kind)


def _problems(pointer: str, message: str) -> dict[str, Any]:
    return {"problems": [{"pointer": pointer, "message": message, "schema": RULE}]}


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for data in rest:
        yield data


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
