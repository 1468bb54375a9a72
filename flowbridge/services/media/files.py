"""Files: up to the homeserver in any shape, and down again through its authenticated endpoints.

A file of known length streams through. One of unknown length (chunked, in a form, in JSON) is spooled to the disk
first: Synapse takes no upload without a Content-Length. Memory grows with neither.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, urlencode

from flowbridge.auth.callers import Callers, Credential
from flowbridge.errors import BadGateway, BadRequest, Errcode, HomeserverError, MatrixError, TooLarge
from flowbridge.homeserver import Homeserver, Relay, answers
from flowbridge.homeserver.proxy_rules import Headers
from flowbridge.homeserver.relay import Relayed
from flowbridge.homeserver.spool import Spool
from flowbridge.limits import peer
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller
from flowbridge.services.media import attachment, content
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.multipart import Multipart

Kind = Literal["download", "thumbnail"]

AUTHENTICATED = "/_matrix/client/v1/media"
LEGACY = "/_matrix/media/v3"
KEEP_SECONDS = 300.0  # for which a homeserver's upload limit is cached
MAX_KEPT = 10_000
UNKNOWN = -1
SPOOL_BYTES = 100 * 1024 * 1024  # at most, when the homeserver names no limit
FORM_BYTES = 1024 * 1024  # for what a form holds beside its file
JSON_BYTES = 32 * 1024 * 1024  # for a file inside JSON: it is in memory as a whole
ANSWER_BYTES = 64 * 1024  # of an answer that is not a file
MAX_SPOOLS = 64  # files of unknown length on the disk at a time
MAX_SPOOLS_OF_ONE = 8
MAX_JSON = 2  # files inside JSON in memory at a time

_JSON_LABELS = frozenset({attachment.JSON, "application/x-www-form-urlencoded", ""})


@dataclass(frozen=True, slots=True)
class Upload:
    """A file on its way up. `length`: bytes of the body, None when unknown; `label`: of the request."""

    body: AsyncIterator[bytes]
    length: int | None
    label: Label


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that the homeserver has. `uri`: `mxc://…`; `label`: it was stored with; `head`: its first bytes."""

    uri: str
    label: Label
    size: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file, or a thumbnail of it, to be fetched; `filename` may be empty. `headers`: of the request."""

    kind: Kind
    server: str
    media_id: str
    filename: str
    query: Mapping[str, str]
    method: str = "GET"
    headers: Headers = field(default_factory=list)

    def target(self, base: str) -> str:
        name = f"/{quote(self.filename, safe='')}" if self.filename else ""
        query = f"?{urlencode(self.query)}" if self.query else ""
        return f"{base}/{self.kind}/{quote(self.server, safe='')}/{quote(self.media_id, safe='')}{name}{query}"


class Media:
    """Uploads and downloads as a caller, or as the bridge's bot for an API key."""

    def __init__(self, callers: Callers, homeserver: Homeserver, relay: Relay) -> None:
        self._callers = callers
        self._homeserver = homeserver
        self._relay = relay
        self._limits = Cache[str, int | None](MAX_KEPT, KEEP_SECONDS)
        self._spools = Limiter("uploads that are kept on the disk", MAX_SPOOLS, MAX_SPOOLS_OF_ONE)
        self._json = Limiter("files inside JSON that are being read", MAX_JSON, 1)

    async def upload(self, credential: Credential, upload: Upload) -> Stored:
        """Upload a file. Raises BadRequest, TooLarge, or the homeserver's error."""
        caller = await self._callers.identify(credential)
        with self._callers.as_(caller):
            return await self._receive(caller, upload, await self._limit(caller))

    async def store(self, caller: Caller, file: Upload) -> str:
        """Upload a file as it is, whatever its type, and return its `mxc://` address. Raises as `upload` does."""
        with self._callers.as_(caller):
            return (await self._as_it_is(caller, file, await self._limit(caller))).uri

    async def largest(self, caller: Caller) -> int:
        """How many bytes a file of this caller may have. Raises the homeserver's error."""
        with self._callers.as_(caller):
            limit = await self._limit(caller)
        return SPOOL_BYTES if limit is None else limit

    @contextlib.asynccontextmanager
    async def fetch(self, credential: Credential | None, wanted: Wanted) -> AsyncIterator[Relayed]:
        """The homeserver's answer with the file. Without a credential it comes from the old endpoints, as for anybody.

        Raises the homeserver's error.
        """
        caller = await self._callers.identify(credential) if credential is not None else None
        async with contextlib.AsyncExitStack() as stack:
            try:
                answer = await self._open(stack, caller, wanted)
            except MatrixError as error:
                raise (self._callers.refused(caller, error) if caller else error) from None
            yield answer

    async def _open(self, stack: contextlib.AsyncExitStack, caller: Caller | None, wanted: Wanted) -> Relayed:
        """From the authenticated endpoints or, where the homeserver does not have them, from the old ones."""
        token = ""
        if caller is not None:
            token = caller.token
            try:
                return await stack.enter_async_context(self._get(token, wanted.target(AUTHENTICATED), wanted))
            except HomeserverError as error:
                if error.errcode != Errcode.UNRECOGNIZED:
                    raise
        return await stack.enter_async_context(self._get(token, wanted.target(LEGACY), wanted))

    @contextlib.asynccontextmanager
    async def _get(self, token: str, target: str, wanted: Wanted) -> AsyncIterator[Relayed]:
        headers = [*wanted.headers, *_authorization(token)]
        async with self._relay.open(wanted.method, target, headers) as answer:
            if answer.status >= 400:
                raise answers.error(await answer.whole(ANSWER_BYTES))
            yield answer

    # uploads

    async def _receive(self, caller: Caller, upload: Upload, limit: int | None) -> Stored:
        kind = attachment.essence(upload.label.content_type)
        if kind == "multipart/form-data":
            return await self._from_form(caller, upload, limit)
        body = upload.body
        if kind in _JSON_LABELS:
            begin, body = await _peek(body)
            if begin in (b"{", b'"'):
                return await self._from_json(caller, upload, body, limit)
        return await self._as_it_is(caller, Upload(body, upload.length, _of_file(upload.label)), limit)

    async def _as_it_is(self, caller: Caller, file: Upload, limit: int | None) -> Stored:
        if file.length is not None:
            _check(file.length, limit)
            return await self._send(caller, file.label, file.length, file.body)
        async with self.spool() as spool:
            await _fill(spool, file.body, SPOOL_BYTES if limit is None else limit)
            return await self._send_spool(caller, file.label, spool)

    async def _from_form(self, caller: Caller, upload: Upload, limit: int | None) -> Stored:
        most = SPOOL_BYTES if limit is None else limit
        _check(max(1, (upload.length or 0) - FORM_BYTES), most)
        form = Multipart(upload.label.content_type)
        read = 0
        async with self.spool() as spool:
            async for data in upload.body:
                read += len(data)
                await spool.write(form.feed(data))
                if spool.size > most or read > most + FORM_BYTES:
                    raise _too_large(most)
            label = Label(upload.label.filename).or_else(form.end())
            return await self._send_spool(caller, label, spool)

    async def _from_json(self, caller: Caller, upload: Upload, body: AsyncIterator[bytes], limit: int | None) -> Stored:
        if (upload.length or 0) > JSON_BYTES:
            raise _too_long_json()
        async with self.spool() as spool:
            await _fill(spool, body, JSON_BYTES, _too_long_json())
            async with self._json.turn(peer.who()):
                found = await asyncio.to_thread(attachment.read, await spool.read())
            if found is None:
                _check(spool.size, limit)
                return await self._send_spool(caller, _of_file(upload.label), spool)
        _check(len(found.data), limit)
        label = Label(upload.label.filename).or_else(found.label)
        return await self._send(caller, label, len(found.data), _once(found.data))

    async def _send_spool(self, caller: Caller, label: Label, spool: Spool) -> Stored:
        _check(spool.size, None)
        return await self._send(caller, label, spool.size, spool.chunks())

    async def _send(self, caller: Caller, label: Label, length: int, body: AsyncIterator[bytes]) -> Stored:
        query = f"?filename={quote(label.filename, safe='')}" if label.filename else ""
        headers = [
            (b"content-type", label.media_type.encode("ascii")),
            (b"content-length", b"%d" % length),
            *_authorization(caller.token),
        ]
        head = bytearray()
        async with self._relay.open("POST", f"{LEGACY}/upload{query}", headers, _noting(body, head)) as answer:
            uri = answers.success(await answer.whole(ANSWER_BYTES)).get("content_uri")
        if not isinstance(uri, str) or not uri.startswith("mxc://"):
            raise BadGateway("the homeserver's answer to an upload names no content_uri")
        return Stored(uri, label, length, bytes(head))

    @contextlib.asynccontextmanager
    async def spool(self) -> AsyncIterator[Spool]:
        """A place on the disk for a file, of the caller's share. Raises TooMany."""
        with self._spools.hold(peer.who()):
            spool = Spool()
            try:
                yield spool
            finally:
                spool.close()

    # how large a file may be

    async def _limit(self, caller: Caller) -> int | None:
        """In bytes; None when the homeserver names none."""
        limit = self._limits.get(caller.user_id, UNKNOWN)
        if limit != UNKNOWN:
            return limit
        return self._limits.put(caller.user_id, await self._ask_limit(caller))

    async def _ask_limit(self, caller: Caller) -> int | None:
        for base in (AUTHENTICATED, LEGACY):
            answer = await self._homeserver.call("GET", f"{base}/config", token=caller.token)
            try:
                size = answers.success(answer).get("m.upload.size")
            except HomeserverError as error:
                if error.errcode != Errcode.UNRECOGNIZED:
                    raise
            else:
                return size if isinstance(size, int) and size > 0 else None
        return None


def _authorization(token: str) -> Headers:
    return [(b"authorization", b"Bearer " + token.encode("ascii"))] if token else []


def _of_file(label: Label) -> Label:
    """The label of a raw body, without the Content-Type that curl gives any body."""
    is_curls = attachment.essence(label.content_type) == "application/x-www-form-urlencoded"
    return Label(label.filename) if is_curls else label


def _check(size: int, limit: int | None) -> None:
    if not size:
        raise BadRequest("the file is empty")
    if limit is not None and size > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the file is too large: the homeserver takes at most {limit} bytes")


def _too_long_json() -> TooLarge:
    return TooLarge(f"a file inside JSON may be {JSON_BYTES} bytes of JSON: send it raw, or as multipart/form-data")


async def _fill(spool: Spool, body: AsyncIterator[bytes], limit: int, error: TooLarge | None = None) -> None:
    async for data in body:
        await spool.write(data)
        if spool.size > limit:
            raise error or _too_large(limit)


async def _peek(body: AsyncIterator[bytes]) -> tuple[bytes, AsyncIterator[bytes]]:
    """The first byte that is not white space (none after 64 KiB of it), and the whole body."""
    read = bytearray()
    async for data in body:
        read += data
        if read.lstrip() or len(read) > 64 * 1024:
            break
    return bytes(read.lstrip()[:1]), _chain(bytes(read), body)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for data in rest:
        yield data


async def _noting(body: AsyncIterator[bytes], head: bytearray) -> AsyncIterator[bytes]:
    """The body, and its first bytes, as many as tell a picture's size."""
    async for data in body:
        if len(head) < content.HEAD_BYTES:
            head += data[: content.HEAD_BYTES - len(head)]
        yield data


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
