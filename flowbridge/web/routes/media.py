"""Uploads and downloads: the flow surface's paths, and the download paths of older Matrix clients."""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired
from urllib.parse import quote

from pydantic import Field, with_config
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.encryption.attachments import BadFile, EncryptedFile
from flowbridge.errors import BadGateway, BadRequest, Errcode, Unauthorized, UnsupportedMedia
from flowbridge.homeserver import identifiers, proxy_rules
from flowbridge.homeserver.relay import Relayed
from flowbridge.models import Surface
from flowbridge.services.media import attachment, content, encrypted
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.files import Kind, Upload, Wanted
from flowbridge.web.dependencies import credential, segment
from flowbridge.web.endpoint import headers_of, json_answer
from flowbridge.web.parameters import query
from flowbridge.web.routing import BODY, TAGS, UPSTREAM, RawRoute, Route
from flowbridge.web.streaming import StreamedAnswer

Json = dict[str, Any]

MEDIA_ID = "ascERGshawAWawugaAcauga"  # an example
VERSIONS = ("v3", "r0", "v1")  # in the old download paths

_QUERY: Mapping[Kind, frozenset[str]] = {
    "download": frozenset({"allow_remote", "allow_redirect", "timeout_ms"}),
    "thumbnail": frozenset({"width", "height", "method", "animated", "allow_remote", "allow_redirect", "timeout_ms"}),
}
_NUMBERS = frozenset({"width", "height", "timeout_ms"})
_NUMBER = re.compile(r"[0-9]{1,5}")
_SERVER = re.compile(r"[A-Za-z0-9.-]{1,230}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?")
_MEDIA_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
_SENT_ON = frozenset({b"accept", b"range", b"if-range", b"if-none-match", b"if-modified-since"})
_KEPT = frozenset(
    b"content-type content-length content-range accept-ranges etag last-modified cache-control expires location "
    b"x-robots-tag".split()
)
# What a browser may show (client-server API, "Serving inline content"); anything else is to be saved.
_INLINE = frozenset(
    f"{kind}/{name}"
    for kind, names in {
        "text": "css plain csv",
        "application": "json ld+json",
        "image": "jpeg gif png apng webp avif",
        "video": "mp4 webm ogg quicktime",
        "audio": "mp4 webm aac mpeg ogg wave wav x-wav x-pn-wav flac x-flac",
    }.items()
    for name in names.split()
)
_CSP = (
    b"sandbox; default-src 'none'; script-src 'none'; plugin-types application/pdf; style-src 'unsafe-inline'; "
    b"media-src 'self'; object-src 'self';"
)
_SAFE = [
    (b"content-security-policy", _CSP),
    (b"cross-origin-resource-policy", b"cross-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


Flag = Literal["true", "false"]


@with_config(extra="forbid")
class Base64File(TypedDict):
    data: Annotated[str, Field(description="Base64 (either alphabet), or a `data:` URL.")]
    filename: NotRequired[str]
    content_type: NotRequired[Annotated[str, Field(description="May also be written `contentType`.")]]
    contentType: NotRequired[str]


@with_config(extra="forbid")
class Buffer(TypedDict):
    """A Node-RED Buffer."""

    type: Literal["Buffer"]
    data: list[Annotated[int, Field(ge=0, le=255)]]


DataUrl = Annotated[str, Field(pattern="^data:")]


class FileMessage(TypedDict):
    """A message of a flow tool; its other properties are ignored."""

    payload: Buffer | Base64File | DataUrl
    filename: NotRequired[str]
    contentType: NotRequired[Annotated[str, Field(description="May also be written `content_type`.")]]


UploadBody = Base64File | Buffer | DataUrl | FileMessage


class Info(TypedDict):
    """What is known of a file: for `info` of an event, or of an attachment."""

    mimetype: Annotated[str, Field(examples=["image/png"])]
    size: Annotated[int, Field(description="In bytes.")]
    w: NotRequired[Annotated[int, Field(description="Of a picture, in pixels.")]]
    h: NotRequired[Annotated[int, Field(description="Likewise.")]]


class Uploaded(TypedDict):
    """The file is uploaded."""

    content_uri: Annotated[str, Field(examples=[f"mxc://localhost/{MEDIA_ID}"])]
    info: Info


_BYTES: Json = {"schema": {"type": "string", "format": "binary"}}
_FORM: Json = {"type": "object", "required": ["file"], "properties": {"file": _BYTES["schema"]}}
_CONTENT: Json = {
    "application/octet-stream": _BYTES,
    "multipart/form-data": {"schema": _FORM},
    "application/json": {
        "examples": {
            "base64": {"value": {"data": "aGVsbG8=", "filename": "hello.txt"}},
            "data URL": {"value": {"data": "data:text/plain;base64,aGVsbG8="}},
            "Buffer": {"value": {"type": "Buffer", "data": [104, 105]}},
            "flow message": {
                "value": {
                    "payload": {"type": "Buffer", "data": [104, 105]},
                    "filename": "hi.txt",
                    "contentType": "text/plain",
                    "_msgid": "f1",
                }
            },
        }
    },
}


class Files:
    """The handlers of both surfaces."""

    def __init__(self, core: Core) -> None:
        self._callers = core.callers
        self._media = core.media
        self._history = core.history
        self._stall_seconds = core.timing.answer_stall_seconds

    async def upload(self, request: Request) -> Response:
        """Upload a file

        The body is the file, and its Content-Type the file's type; or a form (`multipart/form-data`), whose first part
        with a filename is the file; or JSON that contains the file. A body is read as JSON when it has exactly one of
        the shapes below, and its Content-Type is JSON, curl's default (`application/x-www-form-urlencoded`) or missing;
        otherwise it is the file itself. To upload a JSON file that looks like one of the shapes, send it as a form.
        Without a type, or with curl's default, the type is guessed from the filename. A body with one of these types
        that begins like JSON may be 32 MiB long; for any other file the homeserver's limit counts.
        """
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise UnsupportedMedia("compressed bodies are not read: send the file as it is")
        name = attachment.filename(request.query_params.get("filename", ""))
        label = Label(name, attachment.content_type(headers.get("content-type", "")))
        length = headers.get("content-length")
        upload = Upload(request.stream(), None if length is None else int(length), label)
        stored = await self._media.upload(credential, upload)
        known = await asyncio.to_thread(content.info, stored.head, stored.size)
        info = {"mimetype": attachment.essence(stored.label.media_type), **known}
        return json_answer({"content_uri": stored.uri, "info": info})

    async def download(self, request: Request) -> Response:
        """Download a file

        On the Matrix surface, without a token, only files from before the homeserver made its media private are served.
        On the flow surface, a file of an encrypted event is decrypted for an API key that may read the room, when
        `room_id` and `event_id` name that event. It has no ranges then; one that is not what was sent breaks off.
        """
        return await self._fetch("download", request)

    async def thumbnail(self, request: Request) -> Response:
        """Download a thumbnail

        On the Matrix surface, without a token, only files from before the homeserver made its media private are served.
        """
        return await self._fetch("thumbnail", request)

    async def _fetch(self, kind: Kind, request: Request) -> Response:
        credential: Credential | None = None
        try:
            credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        except Unauthorized as error:
            if not request.scope["path"].startswith("/_matrix/") or error.errcode != Errcode.MISSING_TOKEN:
                raise
        if (named := _event(request)) is not None:
            if kind == "thumbnail":
                raise BadRequest(
                    "event_id: only whole files are decrypted; an encrypted thumbnail is a file of its own"
                )
            if credential is None:
                raise Unauthorized("a token or an API key is needed", errcode=Errcode.MISSING_TOKEN)
            return await self._decrypted(credential, _wanted(kind, request), *named)
        stack = contextlib.AsyncExitStack()
        answer = await stack.enter_async_context(self._media.fetch(credential, _wanted(kind, request)))
        return FileAnswer(answer, stack, self._stall_seconds)

    async def _decrypted(self, credential: Credential, wanted: Wanted, room: str, event_id: str) -> Response:
        """The file of an event, decrypted if it is encrypted."""
        event = await self._history.event(credential, room, event_id)
        found = encrypted.find(event, f"mxc://{wanted.server}/{wanted.media_id}")
        if found is not None:
            query = {name: value for name, value in wanted.query.items() if name != "allow_redirect"}
            wanted = replace(wanted, query=query, headers=[], filename="")
        stack = contextlib.AsyncExitStack()
        answer = await stack.enter_async_context(self._media.fetch(credential, wanted))
        if found is None:
            return FileAnswer(answer, stack, self._stall_seconds)
        return DecryptedAnswer(answer, stack, self._stall_seconds, *found, body=wanted.method != "HEAD")


class FileAnswer(StreamedAnswer):
    """A file from the homeserver, with the headers that keep a browser from running it. `stack` holds the exchange."""

    def __init__(self, answer: Relayed, stack: contextlib.AsyncExitStack, stall_seconds: float) -> None:
        super().__init__(answer.status, stall_seconds)
        kept = [pair for pair in proxy_rules.answer_headers(answer.headers, answer.status) if pair[0] in _KEPT]
        self._head = [*kept, (b"content-disposition", _disposition(answer)), *_SAFE]
        self._answer = answer
        self._stack = stack

    async def write(self) -> None:
        await self.start(self.status_code, self._head)
        async for piece in self._answer.chunks():
            await self.give(piece)

    async def release(self) -> None:
        await self._stack.aclose()


class DecryptedAnswer(FileAnswer):
    """A file out of an encrypted event. What turns out not to be the one that was sent is cut off."""

    def __init__(
        self,
        answer: Relayed,
        stack: contextlib.AsyncExitStack,
        stall_seconds: float,
        file: EncryptedFile,
        label: Label,
        *,
        body: bool,
    ) -> None:
        super().__init__(answer, stack, stall_seconds)
        type_ = label.media_type
        kind = "inline" if type_ in _INLINE else "attachment"
        name = f"; filename*=utf-8''{quote(label.filename, safe='')}" if label.filename else ""
        length = answer.header(b"content-length")
        self._head = [
            (b"content-type", type_.encode()),
            *([(b"content-length", length.encode())] if length else []),
            (b"content-disposition", f"{kind}{name}".encode()),
            (b"cache-control", b"private, max-age=86400, immutable"),
            *_SAFE,
        ]
        self._file = file
        self._has_body = body

    async def write(self) -> None:
        if not self._has_body:
            await self.start(self.status_code, self._head)
            return
        pieces = self._file.decrypted(self._answer.chunks())
        try:
            first = await anext(pieces, b"")  # before the head: a short file is known to be right then
            await self.start(self.status_code, self._head)
            await self.give(first)
            async for piece in pieces:
                await self.give(piece)
        except BadFile as error:
            raise BadGateway(str(error)) from None


def _event(request: Request) -> tuple[str, str] | None:
    """The room and the event that a request names, of which the file is."""
    if request.scope["path"].startswith("/_matrix/"):
        return None
    named = {name: request.query_params.get(name, "") for name in ("room_id", "event_id")}
    if not any(named.values()):
        return None
    for name, value in named.items():
        if not value:
            raise BadRequest(f"{name} is missing: both room_id and event_id name the event of an encrypted file")
    return identifiers.room(named["room_id"]), identifiers.identifier(named["event_id"], "event_id")


def _wanted(kind: Kind, request: Request) -> Wanted:
    path = request.path_params
    query = {key: value for key, value in request.query_params.items() if key in _QUERY[kind] and value}
    for key in _NUMBERS & query.keys():
        if not _NUMBER.fullmatch(query[key]):
            raise BadRequest(f"{key}: must be a number of at most five digits")
    if query.get("method", "scale") not in ("scale", "crop"):
        raise BadRequest("method: must be scale or crop")
    return Wanted(
        kind,
        _matching(_SERVER, path["serverName"], "server name"),
        _matching(_MEDIA_ID, path["mediaId"], "media id"),
        _filename(path.get("filename", "")),
        query,
        request.method,
        [(name, value) for name, value in request.scope["headers"] if name in _SENT_ON],
    )


def _matching(pattern: re.Pattern[str], raw: str, what: str) -> str:
    text = identifiers.segment(raw, what)
    if not pattern.fullmatch(text):
        raise BadRequest(f"{text!r} is not a {what}")
    return text


def _filename(raw: str) -> str:
    text = identifiers.segment(raw, "file name", empty=True)
    if "/" in text or "\\" in text:
        raise BadRequest("a file name holds no '/' and no '\\'")
    return text


def _disposition(answer: Relayed) -> bytes:
    """The homeserver's Content-Disposition, but nothing inline that a browser could run."""
    disposition = answer.header(b"content-disposition")
    kind, semicolon, parameters = disposition.partition(";")
    if kind.strip().lower() == "inline" and attachment.essence(answer.header(b"content-type")) not in _INLINE:
        disposition = f"attachment{semicolon}{parameters}"
    return (disposition or "attachment").encode("latin-1")


async def file(
    server: Annotated[str, segment("serverName", "The server of an `mxc://server/mediaId` address.", "localhost")],
    media_id: Annotated[
        str, segment("mediaId", "The media id of an `mxc://server/mediaId` address.", MEDIA_ID, maxLength=255)
    ],
    allow_remote: Annotated[Flag, query("Whether the homeserver may fetch it from another server.")] = "true",
    allow_redirect: Annotated[Flag, query("Whether it may redirect to the file.")] = "false",
    timeout_ms: Annotated[int, Field(ge=0), query("How long to wait for a file that is not uploaded yet.")] = 20_000,
) -> None: ...


async def name(
    filename: Annotated[str, segment("filename", "The name to save it under.", "cat.png", maxLength=255)],
) -> None: ...


async def event(
    room_id: Annotated[str, query("Together with `event_id`: the room of the encrypted event that has the file.")] = "",
    event_id: Annotated[str, query("The event whose file it is: it is decrypted then.")] = "",
) -> None: ...


async def size(
    width: Annotated[int, Field(ge=1, le=99_999), query("In pixels.", 64, default_factory=int)],
    height: Annotated[int, Field(ge=1, le=99_999), query("In pixels.", 64, default_factory=int)],
    method: Annotated[Literal["scale", "crop"], query("Scale or crop the picture to this size.")] = "scale",
    animated: Annotated[Flag, query("Whether the picture may be animated.")] = "false",
) -> None: ...


async def upload_name(
    filename: Annotated[
        str, query("The file's name. Overrides one in the body.", "cat.png", json_schema_extra={"maxLength": 255})
    ] = "",
) -> None: ...


def routes(core: Core) -> list[Route]:
    files = Files(core)
    address = "/{serverName}/{mediaId}"

    def get(surface: Surface, kind: Kind, operation: str, path: str, *uses: Any) -> Route:
        served = tuple(f"/_matrix/media/{version}{path}" for version in VERSIONS)
        return RawRoute(
            "GET",
            (path,) if surface == "flow" else served,
            files.download if kind == "download" else files.thumbnail,
            f"{surface}_{operation}",
            tag=TAGS[surface],
            uses=[credential, file, *uses] if surface == "flow" else [file, *uses],
            errors=UPSTREAM,
            ok="The file, streamed, with headers that keep a browser from running it.",
            response_class=Response,
            extra={"responses": {"200": {"content": {"*/*": _BYTES}}}},
        )

    return [
        RawRoute(
            "POST",
            ("/media",),
            files.upload,
            "upload",
            tag=TAGS["flow"],
            uses=[credential, upload_name],
            errors=BODY,
            answers=Uploaded,
            body=UploadBody,
            extra={"requestBody": {"content": _CONTENT}},
        ),
        get("flow", "download", "download", f"/media{address}", event),
        get("flow", "download", "downloadFilename", f"/media{address}/{{filename}}", name, event),
        get("flow", "thumbnail", "thumbnail", f"/media{address}/thumbnail", size),
        get("matrix", "download", "download", f"/download{address}"),
        get("matrix", "download", "downloadFilename", f"/download{address}/{{filename}}", name),
        get("matrix", "thumbnail", "thumbnail", f"/thumbnail{address}", size),
    ]
