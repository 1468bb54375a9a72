"""Requests that pass through to the homeserver: one exchange of any length, streamed both ways.

A download, or an upload, goes on for as long as bytes move, and a long poll for as long as it asked to.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from flowbridge.errors import BadGateway, BadRequest
from flowbridge.homeserver import answers
from flowbridge.homeserver.address import Locator
from flowbridge.homeserver.connection import Connection, NoAnswer
from flowbridge.homeserver.pool import IDEMPOTENT, Answer, Pool, first
from flowbridge.homeserver.proxy_rules import Headers
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models.timing import Timing

Body = bytes | AsyncIterable[bytes]

MAX_IDLE: Final = 32
MAX_AT_ONCE: Final = 2_048  # half of the connections that the server takes: each long poll of a client is one
MAX_OF_ONE: Final = 64  # of one user, or API key: a client on each of some devices has a poll and a screen of pictures
GUESTS: Final = 256  # the same, for callers whose token is not known, or who have none
GUESTS_OF_ONE: Final = 32  # of one address

IDLE_SECONDS: Final = 30.0  # then a proxy in between may have forgotten the connection
BODYLESS: Final = frozenset({"GET", "HEAD"})

# A head is made of these alone (RFC 9110 §5.1, §5.5): other bytes in one could end a line, or the head.
_TARGET: Final = re.compile(r"[\x21-\x7e]+")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_OURS: Final = frozenset({b"host", b"transfer-encoding"})  # only the pool, and `_framed`, write them


@dataclass(frozen=True, slots=True)
class Relayed:
    """An answer whose head has come. Header names are in lower case; the body is as it came, still encoded."""

    status: int
    headers: Headers
    _connection: Connection = field(repr=False)
    _silence: float = field(repr=False)

    def header(self, name: bytes) -> str:
        """The first value of a header, or an empty string."""
        return first(self.headers, name)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises BadGateway or GatewayTimeout when it breaks off."""
        try:
            while chunk := await self._connection.take(self._silence):
                yield chunk
        except NoAnswer as failure:
            raise answers.no_answer(failure) from None

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises BadGateway, too, when it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise BadGateway(f"the homeserver's answer is larger than {limit} bytes")
        return bytes(body)

    async def whole(self, limit: int) -> Answer:
        """The answer with its body. Raises as `read` does."""
        return Answer(self.status, tuple(self.headers), await self.read(limit))


class Relay:
    """Connections to the homeserver: so many in all, and of these so many for one caller.

    300 requests of an address without a token once had 300 of them.
    """

    def __init__(self, locator: Locator, tls: ssl.SSLContext, *, timing: Timing = Timing()) -> None:
        most = MAX_AT_ONCE + GUESTS
        self._pool = Pool(locator, tls, most=most, most_idle=MAX_IDLE, idle_seconds=IDLE_SECONDS, timing=timing)
        self._timing = timing
        self._known = Limiter("exchanges with the homeserver", MAX_AT_ONCE, MAX_OF_ONE)
        self._guests = Limiter("exchanges with the homeserver without a known token", GUESTS, GUESTS_OF_ONE)
        self.stopping = asyncio.Event()  # set when the bridge stops: long polls end

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, target: str, headers: Headers, body: Body = b"", *, silence: float | None = None
    ) -> AsyncIterator[Relayed]:
        """One request; the answer from when its head has come. Leaving early ends the exchange at once.

        `target`: path and query as they go onto the wire, in ASCII. `headers`: with lower-case names, without Host; a
        streamed body whose length is known needs its Content-Length there, else it goes in chunks. `silence`: seconds
        that the homeserver may say nothing, where they are not the usual ones. Raises BadRequest, BadGateway,
        GatewayTimeout; TooMany or Unavailable when there is no place in time; and whatever `body` raises.
        """
        with await self._places().wait(peer.who(), self._timing.relay_turn_seconds):
            silence = self._timing.answer_silence_seconds if silence is None else silence
            lines, length = _framed(method, target, headers, body)

            async def ask(connection: Connection) -> None:
                head = connection.request_line(method, target) + lines
                is_head = method == "HEAD"
                if isinstance(body, bytes):
                    connection.begin(head + body, is_head=is_head)
                else:
                    connection.begin(head, is_head=is_head, is_whole=False)
                    await _give(connection, body, length, self._timing.upload_stall_seconds)
                await connection.head(silence)

            try:
                await self._pool.locate()
                ends = asyncio.get_running_loop().time() + self._timing.connect_seconds
                may_repeat = method in IDEMPOTENT and isinstance(body, bytes)
                connection = await self._pool.ask(ask, ends, may_repeat=may_repeat)
            except NoAnswer as failure:
                raise answers.no_answer(failure) from None
            try:
                yield Relayed(connection.status, connection.headers, connection, silence)
            finally:
                self._pool.release(connection)

    def has_room(self) -> bool:
        """Whether the caller's next exchange could begin at once."""
        return self._places().has_room(peer.who())

    def close(self) -> None:
        """Drop the idle connections; those in use end with their exchange."""
        self._pool.close()

    def _places(self) -> Limiter:
        return self._guests if peer.is_guest() else self._known


def _framed(method: str, target: str, headers: Headers, body: Body) -> tuple[bytes, int | None]:
    """The headers ready for the wire, and how the body is framed: its length, or None for chunks. Raises BadRequest.

    The body is written by this value. What a caller says is in the head, too: a search in it for a framing found
    `X-A: transfer-encoding: chunked`, and the body went in chunks beside a Content-Length.
    """
    if not _TARGET.fullmatch(target):
        raise BadRequest("the request cannot be passed on: its target is not visible ASCII")
    for name, value in headers:
        if name in _OURS or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadRequest(f"the request cannot be passed on with this header: {name.decode('latin-1')!r}")
    lines = [b"%b: %b" % pair for pair in headers]
    length = _length(headers, body)
    if length is None:
        lines.append(b"transfer-encoding: chunked")
    elif method not in BODYLESS and not any(name == b"content-length" for name, _ in headers):
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join([*lines, b"", b""]), length


def _length(headers: Headers, body: Body) -> int | None:
    """How long the body is; None when that is not known. Raises BadRequest when headers and body do not agree."""
    named = [value for name, value in headers if name == b"content-length"]
    if len(named) > 1 or not all(_LENGTH.fullmatch(value) for value in named):
        raise BadRequest("Content-Length: it has to be one number")
    length = int(named[0]) if named else None
    if isinstance(body, bytes):
        if length not in (None, len(body)):
            raise _wrong_length(length)
        return len(body)
    return length


def _wrong_length(length: int | None) -> BadRequest:
    return BadRequest(f"Content-Length: the body is not of {length} bytes")


async def _give(connection: Connection, body: AsyncIterable[bytes], length: int | None, stall: float) -> None:
    """Write a streamed body, as far as it is wanted: of this length, or in chunks.

    Raises BadRequest for another length. What is too much is not written: it would be taken for another request.
    """
    left = length
    async for piece in body:
        if left is not None:
            left -= len(piece)
            if left < 0:
                raise _wrong_length(length)
        elif piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if piece and not await connection.give(piece, stall):
            return
    if left is None:
        await connection.give(b"0\r\n\r\n", stall)
    elif left:
        raise _wrong_length(length)
