"""Files from URLs that callers name, streamed: a web server in the middle of nowhere may say and do anything.

It may hang, drip, lie about a length, send without end, redirect for ever, or send to the machine's own network.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Final
from urllib.parse import unquote

import httpcore
import httpx

from flowbridge import __version__
from flowbridge.models.timing import Timing
from flowbridge.outbound.destination import Allowed, CheckedBackend, Refused

MAX_REDIRECTS: Final = 3
MAX_URL_BYTES: Final = 2_048

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = [
    (b"User-Agent", f"flowbridge/{__version__}".encode()),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"identity"),
]


class NotFetched(Exception):
    """A file that could not be had. The message is a clause that follows the URL: "answers 404"."""


class FileTooLarge(NotFetched):
    """The file is larger than was asked for."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file on its way here. `length` in bytes, None when the server does not say; `body` can be read once.

    `filename` and `content_type` are the server's words, and may be empty. Reading raises NotFetched.
    """

    url: str
    filename: str
    content_type: str
    length: int | None
    body: AsyncIterator[bytes]


class Fetcher:
    """Fetches files within a time for the whole of each, from public addresses and those that are allowed."""

    def __init__(self, tls: ssl.SSLContext, allowed: Allowed, *, timing: Timing = Timing()) -> None:
        self._backend = CheckedBackend(allowed)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls, max_keepalive_connections=0, network_backend=self._backend
        )
        self._seconds = timing.fetch_seconds
        silence = timing.fetch_silence_seconds
        self._timeouts = {"timeout": {"connect": silence, "read": silence, "write": silence, "pool": silence}}

    async def close(self) -> None:
        await self._pool.aclose()
        self._backend.close()

    @contextlib.asynccontextmanager
    async def open(self, url: str, most: int) -> AsyncIterator[Fetched]:
        """The file of a URL, of `most` bytes at most. Raises NotFetched, here and from its body."""
        patience = _Patience(self._seconds)
        target = parse(url)
        for _ in range(MAX_REDIRECTS + 1):
            request = httpcore.Request("GET", _raw(target), headers=_headers(target), extensions=self._timeouts)
            async with patience.wait():
                response = await self._pool.handle_async_request(request)
            try:
                if response.status not in _REDIRECTS:
                    yield self._fetched(target, response, most, patience)
                    return
                target = _redirected(target, _header(response, b"location"))
            finally:
                await response.aclose()
        raise NotFetched(f"redirects more than {MAX_REDIRECTS} times")

    def _fetched(self, url: httpx.URL, response: httpcore.Response, most: int, patience: "_Patience") -> Fetched:
        if response.status != 200:
            raise NotFetched(f"answers {response.status}")
        coding = _header(response, b"content-encoding").strip().lower()
        if coding not in ("", "identity"):
            raise NotFetched(f"sends the file compressed ({coding[:40]}), which was not asked for")
        given = _header(response, b"content-length")
        length = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None
        if length is not None and length > most:
            raise _too_large(most)
        name = _filename(_header(response, b"content-disposition")) or unquote(url.path.rpartition("/")[2])
        return Fetched(
            url=str(url),
            filename=name,
            content_type=_header(response, b"content-type"),
            length=length,
            body=self._body(response, most, patience),
        )

    async def _body(self, response: httpcore.Response, most: int, patience: "_Patience") -> AsyncIterator[bytes]:
        """The time is for the whole of it: a server that drips is not silent."""
        pieces = response.aiter_stream()
        read = 0
        while True:
            async with patience.wait():
                piece = await anext(pieces, None)
            if piece is None:
                return
            read += len(piece)
            if read > most:
                raise _too_large(most)
            yield piece


def parse(text: str) -> httpx.URL:
    """Read a URL of a file. Raises NotFetched."""
    if len(text.encode("utf-8", "replace")) > MAX_URL_BYTES:
        raise NotFetched(f"is longer than {MAX_URL_BYTES} bytes")
    try:
        url = httpx.URL(text)
        host = url.host  # decoded now: `xn--a` is found to be malformed here
    except (httpx.InvalidURL, ValueError):
        raise NotFetched("is not a URL") from None
    if not 0 < (url.port or 80) < 65_536:
        raise NotFetched("names a port that there is not")
    if url.scheme not in ("http", "https") or not host:
        raise NotFetched("is not a URL that begins with https:// or http://")
    if url.userinfo:
        raise NotFetched("holds a user name or password: it would be stored and shown in the delivery log")
    return url


def _redirected(url: httpx.URL, location: str) -> httpx.URL:
    if not location:
        raise NotFetched("redirects to nowhere")
    try:
        joined = str(url.join(location))
    except (httpx.InvalidURL, ValueError):
        raise NotFetched("redirects to what is not a URL") from None
    try:
        return parse(joined)
    except NotFetched as error:
        raise NotFetched(f"redirects to an address that {error}") from None


def _raw(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _headers(url: httpx.URL) -> list[tuple[bytes, bytes]]:
    return [(b"Host", url.netloc), *_HEADERS]


def _header(response: httpcore.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


def _filename(disposition: str) -> str:
    """RFC 6266, `filename*` included."""
    header = Message()
    header["Content-Disposition"] = disposition
    try:
        return header.get_filename("")
    except (LookupError, ValueError):
        return ""


def _too_large(most: int) -> FileTooLarge:
    return FileTooLarge(f"is larger than {most} bytes, which is the most that may be uploaded")


class _Patience:
    """The seconds for which a file's server is waited for, in all.

    Between two pieces it is the homeserver that takes its time: a URL is not to blame for that.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = self._left = seconds

    @contextlib.asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Raises NotFetched for what the server does, and when its time is over."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            with _explained(self._seconds):
                async with asyncio.timeout(self._left):
                    yield
        finally:
            self._left -= loop.time() - began


@contextlib.contextmanager
def _explained(seconds: float) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise NotFetched(str(error)) from None
    except (TimeoutError, httpcore.TimeoutException):
        raise NotFetched(f"did not arrive in time: a file has {seconds:g} s in all, and may not stand still") from None
    except httpcore.ConnectError as error:
        raise NotFetched(f"cannot be reached: {_reason(error)}") from None
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise NotFetched(f"broke off: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
