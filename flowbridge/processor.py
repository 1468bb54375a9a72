"""Work on large bodies, in threads: callers take turns, and those not authenticated have a fifth of one processor.

A thread alone does not help the event loop: both need the interpreter, so that a thread at work takes half of it.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from flowbridge import peer
from flowbridge.limiter import Limiter

P = ParamSpec("P")
T = TypeVar("T")

GUESTS_SHARE = 0.2  # of one processor, for all callers that have not been authenticated together
GUESTS_SECONDS = 2.0  # of work that they may save up: one body now and then does not wait
TURN_SECONDS = 20.0
MAX_WAITING = 256  # bodies of one caller: each is held in memory
MAX_GUESTS_WAITING = 64


class Aside:
    """`name`: of the threads, `what`: of the work, in the plural. To be used on one event loop."""

    def __init__(self, name: str, what: str) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"flowbridge-{name}")
        self._turns = Limiter(what, 1, 1, waiting=MAX_WAITING)
        self._guests = Limiter(f"{what} without a known token", 1, 1, waiting=MAX_GUESTS_WAITING)
        self._saved, self._saved_at = GUESTS_SECONDS, time.monotonic()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do this in a thread. Raises TooMany or Unavailable, and what the work raises."""
        is_guest = peer.is_guest()
        place = await (self._guests if is_guest else self._turns).wait(peer.who() or "here", TURN_SECONDS)
        loop = asyncio.get_running_loop()
        spent = 0.0

        def timed() -> T:
            nonlocal spent
            began = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                spent = time.thread_time() - began

        def rest(_: object) -> None:
            """The next guest's turn comes once this work is paid for."""
            pause = self._debt(spent) if is_guest else 0.0
            if pause > 0:
                loop.call_later(pause, place.free)
            else:
                place.free()

        # Not on leaving this function: a caller that goes away does not end its thread.
        working = loop.run_in_executor(self._threads, timed)
        working.add_done_callback(rest)
        return await asyncio.shield(working)

    def _debt(self, spent: float) -> float:
        """The seconds until guests have earned what they have spent."""
        now = time.monotonic()
        self._saved = min(self._saved + (now - self._saved_at) * GUESTS_SHARE, GUESTS_SECONDS) - spent
        self._saved_at = now
        return -self._saved / GUESTS_SHARE
