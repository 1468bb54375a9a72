"""Files of messages on their way to the homeserver, before the message is accepted.

From a URL, from the message itself, from a form, or a text that is too long for an event. For an encrypted room they
are encrypted on their way: the homeserver gets neither name nor type.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flowbridge.encryption.attachments import Encryption
from flowbridge.errors import BadContent, MatrixError, Problem, TooLarge
from flowbridge.events.message import RULE, Attachment
from flowbridge.homeserver.spool import Spool
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller
from flowbridge.services.media import attachment, content
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.files import Media, Upload

if TYPE_CHECKING:
    from flowbridge.outbound.fetch import Fetched, Fetcher

MAX_FETCHES = 32  # at a time: each holds two connections, and up to 256 KiB
MAX_FETCHES_OF_ONE = 4
TURN_SECONDS = 30.0

Encrypts = Callable[[Caller, str], Awaitable[bool]]  # for a caller, in a room


class Transfer:
    """Brings files to the homeserver. `most_bytes`: of one file, where the homeserver allows more.

    `encrypts`: whether what a caller says in a room will be encrypted; it raises Forbidden where it will be refused.

    Methods raise BadContent with a pointer, TooLarge, TooMany, and the homeserver's errors. `make` is called for the
    first file from a URL: it takes modules that most bridges never need.
    """

    def __init__(
        self, media: Media, make: "Callable[[], Fetcher]", encrypts: Encrypts, *, most_bytes: int | None = None
    ) -> None:
        self._media = media
        self._encrypts = encrypts
        self._make = make
        self._fetcher: Fetcher | None = None
        self._most_bytes = most_bytes
        self._fetches = Limiter("files that are being fetched", MAX_FETCHES, MAX_FETCHES_OF_ONE)

    async def bring(self, caller: Caller, room_id: str, file: Attachment, pointer: str) -> Attachment:
        """The file as the homeserver has it then. `pointer`: to the attachment in the caller's body."""
        if file.is_here:
            return file
        store = partial(self._store, caller, encrypted=await self._encrypts(caller, room_id))
        label = Label(file.filename, file.mimetype)
        if file.url:
            found = await self._from_url(caller, store, file.url, label, f"{pointer}/url")
        elif isinstance(file.data, Spool):
            found = await self._from_spool(caller, store, file.data, label, pointer)
        elif isinstance(file.data, bytes):
            found = await store(_once(file.data), len(file.data), label)
            found = replace(found, info={"size": len(file.data)})
        else:
            found = await self._from_data(caller, store, file.data, label, f"{pointer}/data")
        mimetype = attachment.essence(found.label.media_type)
        kept = Attachment(found.uri, found.label.filename, mimetype, file.caption, found.info, file=found.file)
        return kept.named

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()

    async def most(self, caller: Caller) -> int:
        """How many bytes a file of this caller may have."""
        largest = await self._media.largest(caller)
        return largest if self._most_bytes is None else min(largest, self._most_bytes)

    async def _from_url(self, caller: Caller, store: "_Store", url: str, label: Label, pointer: str) -> "_Stored":
        """Fetch a file, and upload it meanwhile."""
        from flowbridge.outbound.fetch import FileTooLarge, NotFetched

        if self._fetcher is None:
            self._fetcher = self._make()
        most = await self.most(caller)
        async with self._fetches.turn(peer.who(), TURN_SECONDS):
            try:
                async with self._fetcher.open(url, most) as fetched:
                    body = _Counted(fetched.body)
                    label = label.or_else(_label(fetched))
                    found = await self._put(store, body, fetched.length, label, pointer)
            except FileTooLarge as error:
                raise _too_large(pointer, str(error)) from None
            except NotFetched as error:
                raise BadContent([Problem(pointer, str(error), RULE)]) from None
        return await _known(found, body.size)

    async def _from_data(self, caller: Caller, store: "_Store", data: Any, label: Label, pointer: str) -> "_Stored":
        """Upload what a message holds: base64, a `data:` URL, or a Node-RED Buffer."""
        found = await asyncio.to_thread(attachment.decode, data, pointer)
        await self._check(caller, len(found.data), pointer)
        label = label.or_else(found.label)
        stored = await self._put(store, _once(found.data), len(found.data), label, pointer)
        return await _known(stored, len(found.data))

    async def _from_spool(self, caller: Caller, store: "_Store", spool: Spool, label: Label, pointer: str) -> "_Stored":
        """Upload a file of a form."""
        await self._check(caller, spool.size, pointer)
        return await _known(await self._put(store, spool.chunks(), spool.size, label, pointer), spool.size)

    async def _check(self, caller: Caller, size: int, pointer: str) -> None:
        most = await self.most(caller)
        if size > most:
            raise _too_large(pointer, f"is larger than {most} bytes, which is the most that may be uploaded")

    async def _put(
        self, store: "_Store", body: AsyncIterator[bytes], length: int | None, label: Label, pointer: str
    ) -> "_Stored":
        """Upload it, unless its first bytes contradict its type.

        The type of a file that nobody has named is what its first bytes show.
        """
        head = b""
        async for piece in body:
            head += piece
            if len(head) >= content.HEAD_BYTES:
                break
        if not head:
            raise BadContent([Problem(pointer, "is empty", RULE)])
        if not label.content_type and label.media_type == attachment.UNKNOWN:
            label = Label(label.filename, content.media_type(head))
        if reason := content.contradiction(head, label.media_type):
            raise BadContent([Problem(pointer, reason, RULE)])
        return replace(await store(_chain(head, body), length, label), head=head)

    async def _store(
        self, caller: Caller, body: AsyncIterator[bytes], length: int | None, label: Label, *, encrypted: bool
    ) -> "_Stored":
        if not encrypted:
            return _Stored(await self._media.store(caller, Upload(body, length, label)), label)
        encryption = Encryption()
        uri = await self._media.store(caller, Upload(encryption.of(body), length, Label("", attachment.UNKNOWN)))
        return _Stored(uri, label, file=encryption.described(uri))


@dataclass(frozen=True, slots=True)
class _Stored:
    """`label`: its name and type; `head`: its first bytes; `info`: what is known of it; `file`: see Attachment."""

    uri: str
    label: Label
    head: bytes = b""
    info: Mapping[str, int] = field(default_factory=dict)
    file: Mapping[str, Any] | None = None


_Store = Callable[[AsyncIterator[bytes], int | None, Label], Awaitable[_Stored]]


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


def _label(fetched: "Fetched") -> Label:
    """What the server says, as far as that can be a name and a type."""
    name = kind = ""
    try:
        name = attachment.filename(fetched.filename[:200])
        kind = attachment.content_type(fetched.content_type)
    except MatrixError:
        pass
    return Label(name, "" if attachment.essence(kind) == attachment.UNKNOWN else kind)


def _too_large(pointer: str, message: str) -> TooLarge:
    problems = [{"pointer": pointer, "message": message, "schema": RULE}]
    return TooLarge(f"{pointer}: {message}", flowbridge={"problems": problems})


async def _known(stored: _Stored, size: int) -> _Stored:
    return replace(stored, info=await asyncio.to_thread(content.info, stored.head, size))


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for data in rest:
        yield data


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
