"""Deadlines that are all equally far away when they are set: one timer for them, and not one for each.

A send sets and drops two, an answer's and its connection's, and both are nearly always dropped. A timer of the event
loop costs 2 µs each time. These wait in the order in which they were set, which is that in which they end.
"""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """`expire` is called with each key that was set `seconds` ago, and not dropped since. For one event loop."""

    def __init__(self, seconds: float, expire: Callable[[K], None]) -> None:
        self._seconds = seconds
        self._expire = expire
        self._ends: dict[K, float] = {}  # the first to end is first; the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def set(self, key: K) -> None:
        """In place of an earlier deadline of this key."""
        loop = asyncio.get_running_loop()
        self._ends.pop(key, None)
        self._ends[key] = ends = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(ends, self._ring)

    def drop(self, key: K) -> None:
        """It has none any more, if it had one."""
        self._ends.pop(key, None)

    def __len__(self) -> int:
        return len(self._ends)

    def _ring(self) -> None:
        """Look at the first, which may have been set after the timer was."""
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        while self._ends:
            key, ends = next(iter(self._ends.items()))
            if ends > now:
                self._timer = loop.call_at(ends, self._ring)
                return
            del self._ends[key]
            self._expire(key)
