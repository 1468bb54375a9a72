"""How much of a large job is done at once: other writers wait for a few milliseconds, and have most of the time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 0.005  # that a slice should take, of the processor: a busy machine must not keep what has to go
FIRST, LEAST, MOST = 250, 250, 2_500  # rows of one
PAUSE_SECONDS = 0.02  # after a slice, at least …
PAUSE_SHARE = 4  # … and so many times as long as it took


class Slices:
    """`rows` of the next slice; `pause`: seconds to wait before it."""

    def __init__(self, *, clock: Callable[[], float] = time.thread_time) -> None:
        self.rows = FIRST
        self.pause = 0.0
        self._clock = clock

    def run(self, work: Callable[[int], T]) -> T:
        """Do the next slice: `work` gets its number of rows."""
        began = self._clock()
        try:
            return work(self.rows)
        finally:
            taken = self._clock() - began
            self.pause = max(PAUSE_SECONDS, PAUSE_SHARE * taken)
            if taken > 2 * SECONDS:
                self.rows = max(LEAST, self.rows // 2)
            elif taken < SECONDS / 2:
                self.rows = min(MOST, self.rows * 2)
