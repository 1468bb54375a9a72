"""Connections to the homeserver, wherever it currently is: bounded, kept alive, each for one exchange at a time."""

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from flowbridge.homeserver.address import AddressUnknown, Locator
from flowbridge.homeserver.base_url import Address, AddressError
from flowbridge.homeserver.connection import Connection, NoAnswer, Stale, TimedOut, Unreachable
from flowbridge.homeserver.dialing import Dialer
from flowbridge.models.timing import Timing

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE"})  # RFC 9110 §9.2.2; a PUT carries its transaction id


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names are in lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> str:
        """The first value of a header, or an empty string."""
        return first(self.headers, name)


class Pool:
    """At most `most` connections, of which `most_idle` are kept when nothing is asked, for `idle_seconds` at most."""

    def __init__(
        self,
        locator: Locator,
        tls: ssl.SSLContext,
        *,
        most: int,
        most_idle: int | None = None,
        idle_seconds: float = math.inf,
        timing: Timing = Timing(),
    ) -> None:
        self._locator = locator
        self._dialer = Dialer(tls, locator.proxy)
        self._most = most
        self._most_idle = most if most_idle is None else most_idle
        self._idle_seconds = idle_seconds
        self._connect_seconds = timing.connect_seconds
        self._address: Address | None = None
        self._idle: list[Connection] = []
        self._open = 0
        self._queue: deque[asyncio.Future[Connection | None]] = deque()
        self._closed = False
        locator.on_change.append(self._move)

    def __len__(self) -> int:
        """How many connections there are, or are being made."""
        return self._open

    async def exchange(
        self, method: str, target: str, head: bytes, body: bytes, *, deadline: float, limit: int
    ) -> Answer:
        """One request and its answer, within `deadline` seconds in all and at most `limit` bytes of body.

        `target` is the path and query as they go onto the wire, `head` further header lines, each ended by CRLF.
        Raises NoAnswer.
        """
        if self._address is None:
            await self.locate()
        ends = asyncio.get_running_loop().time() + deadline
        lines = b"content-length: %d\r\n%b\r\n%b" % (len(body), head, body)

        def ask(connection: Connection) -> Awaitable[None]:
            return connection.ask(connection.request_line(method, target) + lines, ends, limit)

        connection = await self.ask(ask, ends, may_repeat=method in IDEMPOTENT)
        answer = Answer(connection.status, tuple(connection.headers), connection.body())
        self.release(connection)
        return answer

    async def locate(self) -> None:
        """Learn where the homeserver is. Raises Unreachable."""
        try:
            self._address = await self._locator.address()
        except (AddressError, AddressUnknown) as error:
            raise Unreachable(f"the homeserver's address is not known: {error}", sent=False) from None

    async def ask(
        self, question: Callable[[Connection], Awaitable[None]], ends: float, *, may_repeat: bool
    ) -> Connection:
        """The connection on which the question has been answered: to be released. Raises NoAnswer, or as `question`.

        The homeserver may close a kept connection while a request is being written to it. So only what may be repeated
        is asked on one, and then once more on a new one.
        """
        fresh, was_sent = not may_repeat, False
        while True:
            try:
                connection = (None if fresh else self._take()) or await self._place(ends, fresh=fresh)
                try:
                    await question(connection)
                except BaseException:
                    connection.abort()
                    raise
                return connection
            except Stale:  # never of a new one
                fresh = was_sent = True  # the homeserver may have read it before it closed the connection
            except NoAnswer as error:
                error.sent = error.sent or was_sent
                raise

    def release(self, connection: Connection) -> None:
        """The exchange is over: the connection serves the next one, if it can."""
        if self._closed or connection.address is not self._address or not connection.usable():
            connection.abort()
            return
        if self._queue and self._give_turn(connection):
            return
        if len(self._idle) < self._most_idle:
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Drop the idle connections; those in use end with their exchange."""
        self._closed = True
        self._drop_idle()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(self._idle_seconds):
                return connection
            connection.abort()
        return None

    async def _place(self, ends: float, *, fresh: bool = False) -> Connection:
        """A new connection or, when there are too many, the first that is free; `fresh`: a new one in its stead."""
        while self._open >= self._most:
            if fresh and self._idle:
                self._idle.pop().abort()  # its end gives a turn
            turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                async with asyncio.timeout_at(ends):
                    connection = await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():  # this caller goes away: the turn is the next one's
                    if (given := turn.result()) is not None:
                        self.release(given)
                    else:
                        self._give_turn(None)
                if isinstance(error, TimeoutError):
                    raise TimedOut(f"all {self._most} connections to the homeserver are taken", sent=False) from None
                raise
            if connection is not None and connection.usable():
                if not fresh:
                    return connection
                connection.abort()
        return await self._connect(ends)

    async def _connect(self, ends: float) -> Connection:
        """A new connection, within the time for one and until `ends`. Raises Unreachable or TimedOut."""
        loop, address = asyncio.get_running_loop(), self._address
        assert address is not None
        self._open += 1
        try:
            return await self._dialer.connect(address, self._lost, min(ends, loop.time() + self._connect_seconds))
        except BaseException:
            self._freed(address)
            raise

    def _move(self, address: Address) -> None:
        """The homeserver has another address: exchanges in flight end where they began, and count no longer."""
        self._address = address
        self._drop_idle()
        self._open = 0
        while self._give_turn(None):
            pass

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._freed(connection.address)

    def _freed(self, address: Address) -> None:
        if address is self._address:
            self._open -= 1
            self._give_turn(None)

    def _give_turn(self, connection: Connection | None) -> bool:
        """Give the next caller in the queue this connection, or the room for a new one. Whether there is a caller."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(connection)
                return True
        return False


def first(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str:
    """The first value of a header, whose name is in lower case; or an empty string."""
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
