"""Rate limiter: how many requests may be in flight at once, and when none may.

The window halves at a 429 and grows by one for each windowful of answers, but for a while by one a second at most: all
that is in flight when the next limit is met is refused, too. At first, and after an outage, it doubles for each
windowful. So a homeserver that allows ten messages a second gets about ten, and not sixty at once.
"""

import asyncio
from collections import OrderedDict

WIDEST = 64  # requests in flight, of all accounts
LIMITED_SECONDS = 60.0  # for which the window grows slowly after a 429
SLOWLY = 1.0  # a second


class RateLimiter:
    """Lets requests through in the order they came. For one event loop.

    `widest`, `first`: the bound of the window, and its width at first. Requests that come `ahead` have a queue of their
    own, which takes turns with the other one: they wait behind no backlog, and cannot hold it up.
    """

    def __init__(self, widest: int, first: int | None = None, *, limited_seconds: float = LIMITED_SECONDS) -> None:
        self._widest = widest
        self._window = float(first or widest)
        self._limited_seconds = limited_seconds
        self._known_good = float(widest)  # up to where the window may double
        self._limited_until = self._grown_at = 0.0  # the loop's clock
        self.in_flight = 0
        self._closed_until = 0.0  # the loop's clock
        self._shut = False
        self._queue: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._front: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._was_ahead = False  # the last request that a queue let in
        self._in_turn, self._ahead = _Passage(self, self._queue), _Passage(self, self._front)
        self._timer: asyncio.TimerHandle | None = None

    def passage(self, *, ahead: bool = False) -> "_Passage":
        """`async with limiter.passage():` waits for a place in the window, and holds it."""
        return self._ahead if ahead else self._in_turn

    def enters(self) -> bool:
        """Take a place if there is one at once; whether there was. To be followed by `leave`."""
        if self._queue or self._front or not self._free():
            return False
        self.in_flight += 1
        return True

    async def _wait_in(self, queue: "OrderedDict[asyncio.Future[None], None]") -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue[turn] = None
        self._plan()
        try:
            await turn
        except asyncio.CancelledError:
            queue.pop(turn, None)
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self.in_flight -= 1
        if self._queue or self._front:
            self._pump()

    @property
    def is_idle(self) -> bool:
        """Whether it is open, with no request in flight or waiting."""
        return not (self.in_flight or self._queue or self._front) and self.closed_for == 0

    @property
    def closed_for(self) -> float:
        """Seconds until it opens: 0 when it is open, infinity when it is shut for no known time."""
        if self._shut:
            return float("inf")
        if not self._closed_until:
            return 0.0
        left = self._closed_until - asyncio.get_running_loop().time()
        if left <= 0.0:
            self._closed_until = 0.0
        return max(0.0, left)

    def went_well(self) -> None:
        """An answer other than 429 came. The window grows only while requests wait."""
        if self._window >= self._widest or not (self._queue or self._front):
            return
        step = 1.0 if self._window < self._known_good else 1 / self._window
        if self._limited_until and (now := asyncio.get_running_loop().time()) < self._limited_until:
            step = min(step, max(0.0, now - self._grown_at) * SLOWLY)
            self._grown_at = max(now, self._closed_until)
        self._window = min(self._widest, self._window + step)

    def too_much(self, seconds: float) -> None:
        """Close for a time, with half the window from then on."""
        loop = asyncio.get_running_loop()
        if self._closed_until <= loop.time():  # one 429 halves it, and not all those in flight
            self._window = self._known_good = max(1.0, self._window / 2)
        self._closed_until = self._grown_at = max(self._closed_until, loop.time() + seconds)
        self._limited_until = self._closed_until + self._limited_seconds
        self._plan()

    def pause(self, seconds: float) -> None:
        """Close for a time, without changing the window."""
        self._closed_until = max(self._closed_until, asyncio.get_running_loop().time() + seconds)
        self._plan()

    def shut(self) -> None:
        """Let no request through until `open`."""
        self._shut = True

    def open(self) -> None:
        """Let requests through again, at first one at a time."""
        self._shut = False
        self._window = 1.0
        self._closed_until = 0.0
        self._pump()

    def _free(self) -> bool:
        return not self._shut and self.in_flight < int(self._window) and self.closed_for == 0

    def _pump(self) -> None:
        while (self._queue or self._front) and self._free():
            self._was_ahead = bool(self._front) and not (self._was_ahead and self._queue)
            turn, _ = (self._front if self._was_ahead else self._queue).popitem(last=False)
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)
        self._plan()

    def _plan(self) -> None:
        """Wake the queues when the pause is over, which it may be by now."""
        waits = self._queue or self._front
        if waits and self._timer is None and not self._shut and self.in_flight < int(self._window):
            self._timer = asyncio.get_running_loop().call_later(self.closed_for, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._pump()


class _Passage:
    """A way through a limiter, with its queue."""

    def __init__(self, limiter: RateLimiter, queue: "OrderedDict[asyncio.Future[None], None]") -> None:
        self._limiter = limiter
        self._queue = queue

    async def __aenter__(self) -> None:
        if not self._limiter.enters():
            await self._limiter._wait_in(self._queue)

    async def __aexit__(self, *_: object) -> None:
        self._limiter.leave()
