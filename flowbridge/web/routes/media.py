"""Uploads and downloads: the flow surface's paths, and the download paths of older Matrix clients."""

import contextlib
import re
from collections.abc import Mapping
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import BadRequest, Errcode, Unauthorized, UnsupportedMedia
from flowbridge.homeserver import paths, proxy_rules
from flowbridge.homeserver.relay import Relayed
from flowbridge.services.media import attachment
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.files import Kind, Upload, Wanted
from flowbridge.web.endpoint import Endpoint, endpoint, headers_of, json_answer
from flowbridge.web.routes import describe_media
from flowbridge.web.streaming import StreamedAnswer

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


class Files:
    """The handlers of both surfaces."""

    def __init__(self, core: Core) -> None:
        self._callers = core.callers
        self._media = core.media
        self._stall_seconds = core.timing.answer_stall_seconds

    async def upload(self, request: Request) -> Response:
        """POST /media"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise UnsupportedMedia("compressed bodies are not read: send the file as it is")
        name = attachment.filename(request.query_params.get("filename", ""))
        label = Label(name, attachment.content_type(headers.get("content-type", "")))
        length = headers.get("content-length")
        upload = Upload(request.stream(), None if length is None else int(length), label)
        return json_answer({"content_uri": await self._media.upload(credential, upload)})

    async def fetch(self, kind: Kind, is_open: bool, request: Request) -> Response:
        """GET /media/{server}/{mediaId}[/{filename}] and …/thumbnail, and the old paths, which are open to all.

        Without a token, an old path gives what the homeserver gives to anybody.
        """
        credential: Credential | None = None
        try:
            credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        except Unauthorized as error:
            if not is_open or error.errcode != Errcode.MISSING_TOKEN:
                raise
        stack = contextlib.AsyncExitStack()
        answer = await stack.enter_async_context(self._media.fetch(credential, _wanted(kind, request)))
        return FileAnswer(answer, stack, self._stall_seconds)


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
    text = paths.segment(raw, what)
    if not pattern.fullmatch(text):
        raise BadRequest(f"{text!r} is not a {what}")
    return text


def _filename(raw: str) -> str:
    text = paths.segment(raw, "file name", empty=True)
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


def routes(core: Core) -> list[Endpoint]:
    """Both surfaces. Of the old paths only v3 is documented, since the other versions are the same."""
    files = Files(core)
    found = [endpoint("POST", "/media", files.upload, describe_media.UPLOAD)]
    for version in ("", *VERSIONS):
        base = f"/_matrix/media/{version}/download" if version else "/media"
        file = f"{base}/{{serverName}}/{{mediaId}}"
        thumbnail = file.replace("/download/", "/thumbnail/") if version else f"{file}/thumbnail"
        paths: list[tuple[Kind, str]] = [
            ("download", file),
            ("download", f"{file}/{{filename}}"),
            ("thumbnail", thumbnail),
        ]
        for kind, path in paths:
            handler, described = partial(files.fetch, kind, bool(version)), describe_media.download(path)
            found.append(endpoint("GET", path, handler, described, documented=version in ("", "v3")))
    return found
