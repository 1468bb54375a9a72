"""Whatever passes through to the homeserver: one exchange of any length, streamed both ways.

Why not `pool.py`: it holds a whole answer in memory, under one deadline. Here a download, or an upload, goes on for as
long as bytes move, and a long poll for as long as it asked to. Why not httpx: with it, an answer of 5 kB took 3.7 ms of
the processor in all, with this 0.9 ms (one caller, loaded machine).
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
from flowbridge.homeserver.address import Address, AddressError, AddressUnknown, Locator
from flowbridge.homeserver.connection import Connection, Stale
from flowbridge.homeserver.pool import CONNECT_SECONDS, WireError, connect
from flowbridge.homeserver.proxy_rules import Headers
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter

Body = bytes | AsyncIterable[bytes]

SILENCE_SECONDS: Final = 300.0  # without a byte of an answer: a first sync, or a join across servers, takes minutes
STALL_SECONDS: Final = 60.0  # for the other side to take a piece of a body
MAX_IDLE: Final = 32
MAX_AT_ONCE: Final = 2_048  # half of the connections that the server takes: each long poll of a client is one
MAX_OF_ONE: Final = 64  # of one user, or API key: a client on each of some devices has a poll and a screen of pictures
GUESTS: Final = 256  # the same, of those whose token is not known, or who have none
GUESTS_OF_ONE: Final = 32  # of one address
TURN_SECONDS: Final = 5.0  # to wait for a place: a page of pictures asks for more than a share at once

IDLE_SECONDS: Final = 30.0  # then somebody in between may have forgotten the connection
BODYLESS: Final = frozenset({"GET", "HEAD"})
REPEATABLE: Final = BODYLESS | {"PUT", "DELETE"}  # RFC 9110 §9.2.2

# A head is made of these alone (RFC 9110 §5.1, §5.5): whatever else would be in one could end a line, or the head.
_TARGET: Final = re.compile(r"[\x21-\x7e]+")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_OURS: Final = frozenset({b"host", b"transfer-encoding"})  # only `_head` says them


@dataclass(frozen=True, slots=True)
class Relayed:
    """An answer whose head has come. Header names are in lower case; the body is as it came, still encoded."""

    status: int
    headers: Headers
    _connection: Connection = field(repr=False)
    _silence: float = field(repr=False)

    def header(self, name: bytes) -> str:
        """The first value of a header, or an empty string."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises BadGateway or GatewayTimeout when it breaks off."""
        try:
            while chunk := await self._connection.take(self._silence):
                yield chunk
        except WireError as failure:
            raise answers.no_answer(failure) from None

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises BadGateway, too, when it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise BadGateway(f"the homeserver's answer is larger than {limit} bytes")
        return bytes(body)


@dataclass(frozen=True, slots=True)
class _Request:
    """`length`: bytes of the body, as the head says; None when it goes in chunks."""

    method: str
    head: bytes
    length: int | None
    body: Body
    silence: float


class Relay:
    """Connections to the homeserver, wherever it is just now, each for one exchange at a time.

    So many in all, and of these so many for one caller: 300 requests of an address without a token had 300 of them.
    """

    def __init__(self, locator: Locator, tls: ssl.SSLContext) -> None:
        self._locator = locator
        self._tls = tls
        self._address: Address | None = None
        self._idle: list[Connection] = []
        self._known = Limiter("exchanges with the homeserver", MAX_AT_ONCE, MAX_OF_ONE)
        self._guests = Limiter("exchanges with the homeserver without a known token", GUESTS, GUESTS_OF_ONE)
        self.stopping = asyncio.Event()  # set when the bridge stops: long polls end

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, target: str, headers: Headers, body: Body = b"", *, silence: float = SILENCE_SECONDS
    ) -> AsyncIterator[Relayed]:
        """One request; the answer from when its head has come. Leaving early ends the exchange at once.

        `target`: path and query as they go onto the wire, in ASCII. `headers`: with lower-case names, without Host; a
        streamed body whose length is known needs its Content-Length there, else it goes in chunks. `silence`: seconds
        that the homeserver may say nothing. Raises BadRequest, BadGateway, GatewayTimeout; TooMany or Unavailable when
        there is no place within TURN_SECONDS; and whatever `body` raises.
        """
        with await self._places().wait(peer.who(), TURN_SECONDS):
            async with self._open(method, target, headers, body, silence) as found:
                yield found

    def has_room(self) -> bool:
        """Whether the caller's next exchange could begin at once."""
        return self._places().has_room(peer.who())

    def _places(self) -> Limiter:
        return self._guests if peer.is_guest() else self._known

    @contextlib.asynccontextmanager
    async def _open(
        self, method: str, target: str, headers: Headers, body: Body, silence: float
    ) -> AsyncIterator[Relayed]:
        address = await self._locate()
        head, length = _head(method, address, target, headers, body)
        request = _Request(method, head, length, body, silence)
        # A kept connection may be gone in the same moment: only what may be repeated is sent on one.
        is_repeatable = method in REPEATABLE and isinstance(body, bytes)
        connection = (self._take() if is_repeatable else None) or await self._connect(address)
        try:
            try:
                found = await _ask(connection, request)
            except Stale:
                connection = await self._connect(address)
                found = await _ask(connection, request)
            yield found
        finally:
            self._release(connection, address)

    def close(self) -> None:
        """Drop the idle connections; those at work end with their exchange."""
        self._address = None
        while self._idle:
            self._idle.pop().abort()

    async def _locate(self) -> Address:
        try:
            address = await self._locator.address()
        except (AddressError, AddressUnknown) as error:
            raise BadGateway(f"the homeserver's address is not known: {error}") from None
        if address != self._address:
            self.close()
            self._address = address
        return address

    async def _connect(self, address: Address) -> Connection:
        loop = asyncio.get_running_loop()
        ends = loop.time() + CONNECT_SECONDS
        try:
            return await connect(address.origin, self._tls, lambda: Connection(loop, self._lost), ends)
        except WireError as failure:
            raise answers.no_answer(failure) from None

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable() and asyncio.get_running_loop().time() - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.abort()
        return None

    def _release(self, connection: Connection, address: Address) -> None:
        if connection.usable() and address == self._address and len(self._idle) < MAX_IDLE:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)


def _head(method: str, address: Address, target: str, headers: Headers, body: Body) -> tuple[bytes, int | None]:
    """The head of the request, ready for the wire, and how its body is framed: its length, or None for chunks.

    Whoever writes the body goes by this value. What a caller says is in the head, too: a search in it for a framing
    found `X-A: transfer-encoding: chunked`, and the body went in chunks beside a Content-Length. Raises BadRequest.
    """
    if not _TARGET.fullmatch(target):
        raise BadRequest("the request cannot be passed on: its target is not visible ASCII")
    for name, value in headers:
        if name in _OURS or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadRequest(f"the request cannot be passed on with this header: {name.decode('latin-1')!r}")
    lines = [
        f"{method} {address.prefix}{target} HTTP/1.1".encode("ascii"),
        b"host: " + address.origin.authority.encode("ascii"),
        *(b"%b: %b" % pair for pair in headers),
    ]
    length = _length(headers, body)
    if length is None:
        lines.append(b"transfer-encoding: chunked")
    elif method not in BODYLESS and not any(name == b"content-length" for name, _ in headers):
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join([*lines, b"", b""]), length


def _length(headers: Headers, body: Body) -> int | None:
    """How long the body is; None when nobody says. Raises BadRequest when the headers and the body do not agree."""
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


async def _ask(connection: Connection, request: _Request) -> Relayed:
    """Write the request, and wait for the head of its answer. Raises Stale, BadGateway or GatewayTimeout.

    BadRequest, too, for a streamed body of another length than the head says. After a streamed body the connection
    serves nobody else: an upload has a new one anyway, and what a caller streams is never before another's request.
    """
    body, is_head = request.body, request.method == "HEAD"
    try:
        if isinstance(body, bytes):
            connection.begin(request.head + body, is_head=is_head)
            connection.all_given()
        else:
            connection.begin(request.head, is_head=is_head)
            if request.length is None:
                await _give_chunks(connection, body)
            else:
                await _give(connection, body, request.length)
        status, headers = await connection.head(request.silence)
    except Stale:
        raise
    except WireError as failure:
        raise answers.no_answer(failure) from None
    return Relayed(status, headers, connection, request.silence)


async def _give(connection: Connection, body: AsyncIterable[bytes], length: int) -> None:
    """Write a body of so many bytes, as far as it is wanted. Raises BadRequest when it has more or fewer.

    What is too much is not written: the homeserver would take it for another request.
    """
    left = length
    async for piece in body:
        left -= len(piece)
        if left < 0:
            raise _wrong_length(length)
        if piece and not await connection.give(piece, STALL_SECONDS):
            return
    if left:
        raise _wrong_length(length)


async def _give_chunks(connection: Connection, body: AsyncIterable[bytes]) -> None:
    """Write a body in chunks, as far as it is wanted."""
    async for piece in body:
        if piece and not await connection.give(b"%x\r\n%b\r\n" % (len(piece), piece), STALL_SECONDS):
            return
    await connection.give(b"0\r\n\r\n", STALL_SECONDS)
