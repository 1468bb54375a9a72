"""A bound that callers share: so many places in all, and so many of them for one caller.

Without a share per caller a single client takes them all: 200 long polls, 64 joins, or 64 long bodies without a token
kept every other caller out.
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
    """`what`: the things that are bounded, in the plural. `total`: how many at once; `each`: how many of one caller.

    The caller "" is the bridge itself, which is not bounded. For one event loop.
    """

    def __init__(self, what: str, total: int, each: int, *, waiting: int = MAX_WAITING) -> None:
        self._what = what
        self._total = total
        self._each = each
        self._most_waiting = waiting
        self._taken = 0
        self._held: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def has_room(self, caller: str) -> bool:
        """Whether a place is free for this caller."""
        return not caller or (self._taken < self._total and not self._is_at_its_share(caller))

    def hold(self, caller: str) -> "Place":
        """Take a place at once. Raises TooMany."""
        if self._is_at_its_share(caller):
            raise self._own_fault()
        if caller and self._taken >= self._total:
            raise TooMany(f"all {self._total} {self._what} are taken", retry_after_ms=RETRY_MS)
        return self._take(caller)

    @contextlib.asynccontextmanager
    async def turn(self, caller: str, seconds: float | None = None) -> AsyncIterator[None]:
        """Wait for a place, and hold it. Callers take turns, however many requests of each wait.

        Raises TooMany when too many requests of this caller wait, or when its own ones kept its share for `seconds`;
        Unavailable when other callers held all places that long.
        """
        with await self.wait(caller, seconds):
            yield

    async def wait(self, caller: str, seconds: float | None = None) -> "Place":
        """As `turn`; the place is held until it is freed."""
        # No waiting caller could use a place that is free now: all of them are at their share.
        if self.has_room(caller):
            return self._take(caller)
        queue = self._waiting.setdefault(caller, deque())
        if len(queue) >= self._most_waiting:
            raise self._own_fault()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(caller)
            else:
                self._forget(caller, turn)
            if not isinstance(error, TimeoutError):
                raise
            if self._is_at_its_share(caller):
                raise self._own_fault() from None
            raise Unavailable(f"all {self._total} {self._what} are taken by other callers") from None
        return Place(self, caller)

    @property
    def is_idle(self) -> bool:
        """Whether no caller holds a place or waits for one."""
        return not self._held and not self._waiting

    def release(self, caller: str) -> None:
        """Give one place of this caller back."""
        if not caller:
            return
        self._taken -= 1
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        self._pass_on()

    def _take(self, caller: str) -> "Place":
        if caller:
            self._taken += 1
            self._held[caller] = self._held.get(caller, 0) + 1
        return Place(self, caller)

    def _pass_on(self) -> None:
        while self._taken < self._total:
            caller = next((name for name in self._waiting if not self._is_at_its_share(name)), None)
            if caller is None:
                return
            turn = self._waiting[caller].popleft()
            self._waiting.move_to_end(caller)
            if not self._waiting[caller]:
                del self._waiting[caller]
            if not turn.done():
                self._take(caller)
                turn.set_result(None)

    def _forget(self, caller: str, turn: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(caller)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[caller]

    def _is_at_its_share(self, caller: str) -> bool:
        return bool(caller) and self._held.get(caller, 0) >= self._each

    def _own_fault(self) -> TooMany:
        return TooMany(
            f"{self._each} of the {self._total} {self._what} are yours already, which is the share of one caller",
            retry_after_ms=RETRY_MS,
        )


class Place:
    """A place that is held until it is freed; freeing it again does nothing."""

    __slots__ = ("_caller", "_limiter")

    def __init__(self, limiter: Limiter, caller: str) -> None:
        self._limiter: Limiter | None = limiter
        self._caller = caller

    def free(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.release(self._caller)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
