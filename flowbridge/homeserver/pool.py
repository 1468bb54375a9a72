"""HTTP/1.1 to one homeserver: kept-alive connections, one deadline around a whole exchange, capped answers.

Why our own: on this path the client is what costs. Under one bare bridge with 32 senders aiohttp forwarded 2,300
requests/s, pyreqwest 2,600 and this one 6,600 in the same run, because it lives in the server's own event loop, on the
parser that uvicorn uses, and does nothing that a homeserver call does not need: no redirects (a followed 302 turns a
PUT into a GET), no cookies, no proxies, no compression.
"""

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar, cast

import httptools

CONNECT_SECONDS: Final = 5.0
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_CONNECTIONS: Final = 128
REPEATABLE: Final = frozenset({"GET", "PUT"})

P = TypeVar("P", bound=asyncio.Protocol)


class WireError(Exception):
    """No answer. `sent`: whether the homeserver may have seen the request all the same."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Unreachable(WireError):
    """The connection could not be made, or broke."""


class Oversize(Unreachable):
    """The answer is larger than was asked for."""


class TimedOut(WireError):
    """The deadline passed."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to connect. `host` is a name or an address without brackets."""

    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        """What goes into `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names are lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> str:
        """The first value of a header, or an empty string."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return ""


class Wire:
    """The connections to one origin: at most `most` (MAX_CONNECTIONS), each asking one question at a time."""

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None, *, most: int | None = None) -> None:
        self.origin = origin
        self._bound = most
        self._tls = tls if origin.tls else None
        self._idle: list[_Connection] = []
        self._open = 0
        self._queue: deque[asyncio.Future[_Connection | None]] = deque()
        self._closed = False

    @property
    def _most(self) -> int:
        return self._bound or MAX_CONNECTIONS

    async def exchange(
        self, method: str, target: str, head: bytes, body: bytes, *, deadline: float, limit: int
    ) -> Answer:
        """One request and its answer, within `deadline` seconds in all and at most `limit` bytes of body.

        `target` is the path and query as they go onto the wire, `head` further header lines, each ended by CRLF.
        A kept connection may have been closed by the other side in the same moment: what may be repeated
        (GET, and PUT, which carries its transaction id) is then sent once more on a new one.
        Raises Unreachable or TimedOut.
        """
        request = b"%b %b HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
            method.encode("ascii"),
            target.encode("ascii"),
            self.origin.authority.encode("ascii"),
            len(body),
            head,
            body,
        )
        ends = asyncio.get_running_loop().time() + deadline
        was_sent = False
        if method in REPEATABLE:
            try:
                return await self._ask(self._take() or await self._place(ends), request, ends, limit)
            except _Stale:
                was_sent = True  # the homeserver may have read it before it closed the connection
        try:
            return await self._ask(await self._place(ends, fresh=True), request, ends, limit)
        except WireError as error:
            error.sent = error.sent or was_sent
            raise

    def close(self) -> None:
        """Drop the idle connections; those at work end with their answer."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def _take(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
        return None

    async def _place(self, ends: float, *, fresh: bool = False) -> "_Connection":
        """A new connection or, when there are too many, the first that is free; `fresh`: a new one in its stead."""
        while self._open >= self._most:
            if fresh and self._idle:
                self._idle.pop().abort()  # its end gives a turn
            turn: asyncio.Future[_Connection | None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                async with asyncio.timeout_at(ends):
                    connection = await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self._pass_on(turn.result())
                if isinstance(error, TimeoutError):
                    reason = f"all {self._most} connections to {self.origin} are taken"
                    raise TimedOut(reason, sent=False) from None
                raise
            if connection is not None and connection.usable():
                if not fresh:
                    return connection
                connection.abort()
        return await self._connect(ends)

    def _pass_on(self, connection: "_Connection | None") -> None:
        """Somebody was given a turn and went away: it is the next one's."""
        if connection is not None:
            self._release(connection)
        else:
            self._give_turn()

    async def _connect(self, ends: float) -> "_Connection":
        loop = asyncio.get_running_loop()
        self._open += 1
        try:
            return await connect(self.origin, self._tls, lambda: _Connection(loop, self._lost), ends)
        except BaseException:
            self._freed()
            raise

    async def _ask(self, connection: "_Connection", request: bytes, ends: float, limit: int) -> Answer:
        try:
            answer = await connection.ask(request, ends, limit)
        except BaseException:
            connection.abort()
            raise
        self._release(connection)
        return answer

    def _release(self, connection: "_Connection") -> None:
        if self._closed or not connection.usable():
            connection.abort()
            return
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        self._idle.append(connection)

    def _lost(self, connection: "_Connection") -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._freed()

    def _freed(self) -> None:
        """There is room for one more connection: whoever waits may make it."""
        self._open -= 1
        self._give_turn()

    def _give_turn(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return


async def connect(origin: Origin, tls: ssl.SSLContext | None, make: Callable[[], P], ends: float) -> P:
    """A connection, within CONNECT_SECONDS and until `ends` (the loop's clock). Raises Unreachable or TimedOut."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(min(ends, loop.time() + CONNECT_SECONDS)):
            _, connection = await loop.create_connection(
                make, origin.host, origin.port, ssl=tls if origin.tls else None
            )
    except TimeoutError:
        raise TimedOut(f"{origin} does not accept a connection in time", sent=False) from None
    except ssl.SSLError as error:
        raise Unreachable(f"TLS with {origin} fails: {_reason(error)}", sent=False) from None
    except OSError as error:
        raise Unreachable(f"cannot connect to {origin}: {_reason(error)}", sent=False) from None
    return connection


class _Stale(Unreachable):
    """A kept connection ended before it gave one byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection: asks one question at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: "Callable[[_Connection], None]") -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._ends = self._rings = math.inf  # the deadline of the question; when the timer looks at it
        self._timer: asyncio.TimerHandle | None = None
        self._asked = 0
        self._keep = True
        self._reset(0)

    def usable(self) -> bool:
        return self._keep and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes, ends: float, limit: int) -> Answer:
        """Write a request and wait for its answer until `ends` (the loop's clock)."""
        assert self._transport is not None
        self._reset(limit)
        self._asked += 1
        self._waiter = self._loop.create_future()
        self._ends = ends
        if ends < self._rings:  # else it looks in time, and most questions have their answer long before
            self._ring_at(ends)
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _reset(self, limit: int) -> None:
        self._limit = limit
        self._received = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._until_close = False

    def _ring_at(self, ends: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings = ends
        self._timer = self._loop.call_at(ends, self._expire)

    def _expire(self) -> None:
        self._timer, self._rings = None, math.inf
        if self._waiter is None:
            return
        if self._loop.time() < self._ends:  # it was set for an earlier question
            self._ring_at(self._ends)
            return
        self._fail(TimedOut("the homeserver did not answer in time", sent=True))

    def _fail(self, error: WireError) -> None:
        self._keep = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self.abort()

    def _finish(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(Answer(self._parser.get_status_code(), tuple(self._headers), bytes(self._body)))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self._fail(Unreachable("unsolicited bytes", sent=True))
            return
        self._received += len(data)
        if self._received > self._limit + MAX_HEAD_BYTES:
            self._fail(Oversize(f"the homeserver's answer is larger than {self._limit} bytes", sent=True))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(Unreachable("the homeserver's answer is not HTTP/1.1", sent=True))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._until_close and exc is None:
            self._finish()
        kind = _Stale if self._asked > 1 and not self._received else Unreachable
        self._fail(kind("the homeserver closed the connection without an answer", sent=True))
        self._on_lost(self)

    # httptools

    def on_message_begin(self) -> None:
        if self._waiter is None or self._waiter.done():
            self._keep = False  # bytes behind the answer: whose next answer would they become?

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        names = {name for name, _ in self._headers}
        self._until_close = not names & {b"content-length", b"transfer-encoding"}

    def on_body(self, chunk: bytes) -> None:
        self._body += chunk
        if len(self._body) > self._limit:
            self._fail(Oversize(f"the homeserver's answer is larger than {self._limit} bytes", sent=True))

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self._reset(self._limit)
            return
        self._keep = self._keep and self._parser.should_keep_alive()
        self._finish()


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
