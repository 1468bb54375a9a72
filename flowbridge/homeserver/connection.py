"""One connection to the homeserver on which bodies are streamed, both ways, no faster than either side takes them."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

import httptools

from flowbridge.homeserver.pool import MAX_HEAD_BYTES, TimedOut, Unreachable

HIGH_WATER: Final = 64 * 1024  # bytes of an answer that wait here for whoever reads them


class Connection(asyncio.Protocol):
    """Asks one question at a time: `begin`, `give` for each piece of the body, `head`, then `take` until b""."""

    idle_since = 0.0  # the loop's clock
    _is_answered: bool
    _is_done: bool
    _is_given: bool
    _waiting: int  # bytes in _pieces

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: "Callable[[Connection], None]") -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._asked = 0
        self._keep = True
        self._lost = ""  # why nothing more will come
        self._is_full = False  # the other side takes no more just now
        self._reset()

    # for whoever asks

    def begin(self, head: bytes, *, is_head: bool) -> None:
        """Write the head of a request. `is_head`: the answer has no body, whatever it says of its length."""
        assert self._transport is not None
        self._reset()
        self._asked += 1
        self._is_head = is_head
        self._is_given = False
        self._transport.write(head)

    async def give(self, piece: bytes, seconds: float) -> bool:
        """Write a piece of the body; whether more is wanted. The other side has so many seconds to take it.

        When it answers before it has heard everything, or hangs up, nothing more is wanted. Raises TimedOut.
        """
        assert self._transport is not None
        if not self._is_answered and not self._lost:
            self._transport.write(piece)
        while self._is_full and not self._is_answered and not self._lost:
            await self._wait(seconds, f"the homeserver has taken nothing of the body for {seconds:g} s")
        return not self._is_answered and not self._lost

    def all_given(self) -> None:
        """The body went with the head: after the answer, the next request may follow."""
        self._is_given = True

    async def head(self, seconds: float) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers (lower-case names). Raises Unreachable, TimedOut; Stale if a kept connection was gone."""
        while not self._is_answered:
            if self._lost:
                kind = Stale if self._asked > 1 and not self._received else Unreachable
                raise kind(self._lost, sent=True)
            await self._wait(seconds, "the homeserver did not answer in time")
        return self.status, self._headers

    async def take(self, seconds: float) -> bytes:
        """What has come of the answer's body; b"" at its end. Raises Unreachable or TimedOut."""
        assert self._transport is not None
        while not self._pieces:
            if self._is_done:
                return b""
            if self._lost:
                raise Unreachable(f"in the middle of an answer: {self._lost}", sent=True)
            await self._wait(seconds, "the homeserver fell silent in the middle of an answer")
        found = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._waiting > HIGH_WATER and not self._lost:
            self._transport.resume_reading()
        self._waiting = 0
        return found

    def usable(self) -> bool:
        """Whether the next question may be asked."""
        is_open = self._transport is not None and not self._transport.is_closing()
        return is_open and self._keep and not self._lost and (self._asked == 0 or (self._is_done and self._is_given))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, seconds: float, why: str) -> None:
        """Until something happens."""
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._expire, why)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _expire(self, why: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimedOut(why, sent=True))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _reset(self) -> None:
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._received = 0
        self._is_answered = self._is_done = self._is_head = self._until_close = False
        self._is_given = True

    def _fail(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._keep = False
        self.abort()
        self._wake()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._asked == 0 or (self._is_done and self._is_given):
            self._fail("unsolicited bytes")
            return
        self._received += len(data)
        if not self._is_answered and self._received > MAX_HEAD_BYTES + HIGH_WATER * 4:  # what one read may bring
            self._fail(f"the answer's headers are longer than {MAX_HEAD_BYTES} bytes")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("the homeserver's answer is not HTTP/1.1")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._until_close and exc is None and not self._lost:
            self._is_done = True
        self._is_full = False
        self._fail("the homeserver closed the connection")
        self._on_lost(self)

    # httptools

    def on_message_begin(self) -> None:
        if self._is_done:
            self._keep = False  # bytes behind the answer: whose next answer would they become?

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_answered:  # else a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._is_done:
            return
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            return
        self.status = status
        self._is_answered = True
        if self._is_head or status in (204, 304):
            self._keep = False  # the parser may wait for a body that will not come
            self._is_done = True
        else:
            self._until_close = not {name for name, _ in self._headers} & {b"content-length", b"transfer-encoding"}
        self._wake()

    def on_body(self, chunk: bytes) -> None:
        if self._is_done or not chunk:
            return
        was = self._waiting
        self._pieces.append(chunk)
        self._waiting += len(chunk)
        if was <= HIGH_WATER < self._waiting and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if not self._is_answered:
            self._headers = []  # of an interim answer
            return
        self._keep = self._keep and self._parser.should_keep_alive()
        self._is_done = True
        self._wake()


class Stale(Unreachable):
    """A kept connection ended before it gave one byte of an answer."""
