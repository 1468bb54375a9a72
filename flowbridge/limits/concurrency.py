"""A bound that callers share: so many in all, and of these so many for one caller.

Without a share per caller one of them takes all: 200 long polls, 64 joins, or 64 long bodies without a token, of a
single client kept every other caller out.
"""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Self

from flowbridge.errors import TooMany, Unavailable

RETRY_MS = 1_000
MAX_WAITING = 1_000  # of one caller


class Limiter:
    """`what`: what is bounded, in the plural. `total`: at once; `each`: of one caller. To be used on one event loop.

    A caller named "" is the bridge itself, which keeps to no bound.
    """

    def __init__(self, what: str, total: int, each: int, *, waiting: int = MAX_WAITING) -> None:
        self._what = what
        self._total = total
        self._each = each
        self._most_waiting = waiting
        self._taken = 0
        self._held: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def has_room(self, who: str) -> bool:
        """Whether a place could be had at once."""
        return not who or (self._taken < self._total and not self._is_at_its_share(who))

    def hold(self, who: str) -> "Place":
        """A place, at once. Raises TooMany."""
        if self._is_at_its_share(who):
            raise self._own_fault()
        if who and self._taken >= self._total:
            raise TooMany(f"all {self._total} {self._what} are taken", retry_after_ms=RETRY_MS)
        return self._take(who)

    @contextlib.asynccontextmanager
    async def turn(self, who: str, seconds: float | None = None) -> AsyncIterator[None]:
        """Wait for a place, and hold it. Callers have their turns one after another, however many of each wait.

        Raises TooMany when this caller has too many waiting, or none of its own ended within `seconds`; Unavailable
        when others had all places for so long.
        """
        with await self.wait(who, seconds):
            yield

    async def wait(self, who: str, seconds: float | None = None) -> "Place":
        """As `turn`; the place is held until it is freed."""
        # A place that is free now is not wanted by any caller that waits, since those are at their share.
        if self.has_room(who):
            return self._take(who)
        queue = self._waiting.setdefault(who, deque())
        if len(queue) >= self._most_waiting:
            raise self._own_fault()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(who)
            else:
                self._forget(who, turn)
            if not isinstance(error, TimeoutError):
                raise
            if self._is_at_its_share(who):
                raise self._own_fault() from None
            raise Unavailable(f"all {self._total} {self._what} are taken by other callers") from None
        return Place(self, who)

    def release(self, who: str) -> None:
        """One place less is held."""
        if not who:
            return
        self._taken -= 1
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
        self._pass_on()

    def _take(self, who: str) -> "Place":
        if who:
            self._taken += 1
            self._held[who] = self._held.get(who, 0) + 1
        return Place(self, who)

    def _pass_on(self) -> None:
        while self._taken < self._total:
            who = next((name for name in self._waiting if not self._is_at_its_share(name)), None)
            if who is None:
                return
            turn = self._waiting[who].popleft()
            self._waiting.move_to_end(who)
            if not self._waiting[who]:
                del self._waiting[who]
            if not turn.done():
                self._take(who)
                turn.set_result(None)

    def _forget(self, who: str, turn: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(who)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[who]

    def _is_at_its_share(self, who: str) -> bool:
        return bool(who) and self._held.get(who, 0) >= self._each

    def _own_fault(self) -> TooMany:
        return TooMany(
            f"{self._each} of the {self._total} {self._what} are yours already, which is the share of one caller",
            retry_after_ms=RETRY_MS,
        )


class Place:
    """A place that is held until it is freed, once."""

    __slots__ = ("_limiter", "_who")

    def __init__(self, limiter: Limiter, who: str) -> None:
        self._limiter: Limiter | None = limiter
        self._who = who

    def free(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.release(self._who)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
