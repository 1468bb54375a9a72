"""Processor time: callers take turns with large work, and those not authenticated share a part of the processor.

A thread alone does not relieve the event loop: both need the interpreter, and a busy thread takes half of it. And the
loop serves all that is ready in turn, so that 16 callers of something cheap get as much of it as 16 senders.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter, Place

P = ParamSpec("P")
T = TypeVar("T")

GUESTS_SHARE = 0.15  # of the bridge's processor time, for all callers that have not been authenticated
BODIES_SHARE = 0.07  # likewise, for checking their bodies: a busy thread costs the event loop as much again
SAVED_SECONDS = 0.5  # that an account may save: 2,000 answers, or a large body now and then, do not wait
TURN_SECONDS = 20.0
MAX_WAITING = 256  # bodies of one caller: each is held in memory
MAX_GUESTS_WAITING = 64
HOP_SECONDS = 0.0004  # that work in a thread costs besides: the loop waits for the interpreter, too
ANSWER_SECONDS = 0.00025  # that the cheapest request costs on the event loop
READ_SECONDS = 0.00075  # that a request costs which asks the homeserver
STREAM_SECONDS = 0.0005  # that opening and closing a live stream costs besides
SENT_BYTE_SECONDS = 1.2e-9  # that each byte of an answer costs
RECEIVED_BYTE_SECONDS = 3e-9  # that each byte of a body costs


class Schedstat(threading.local):
    """The system's figures for the calling thread: one open file per thread, however many accounts there are."""

    def __init__(self) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):  # not Linux
            path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def is_known(self) -> bool:
        return self._file is not None

    def waited(self) -> float:
        """The seconds for which this thread was ready to run and did not, since it began; 0 where not known."""
        if self._file is None:
            return 0.0
        try:
            return int(os.pread(self._file, 100, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def __del__(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)


_SCHEDSTAT = Schedstat()


class Account:
    """A share of the processor, spent before it is earned.

    On a busy machine the bridge gets less than a second of the processor in a second of the clock: the time that its
    thread waited for the processor (Linux: schedstat) earns nothing.
    """

    def __init__(
        self,
        share: float = GUESTS_SHARE,
        *,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] = _SCHEDSTAT.waited,
    ) -> None:
        self._share = share
        self._clock = clock
        self._waited = waited
        self._saved = SAVED_SECONDS
        self._at: float | None = None

    def spend(self, seconds: float) -> float:
        """Returns the seconds until this is paid for: the next request has to wait at least that long."""
        self._earn()
        self._saved -= seconds
        return self.debt()

    def debt(self) -> float:
        """The seconds that the next request has to wait now; 0 when it need not."""
        self._earn()
        return max(0.0, -self._saved / self._share)

    def _earn(self) -> None:
        now = self._clock() - self._waited()
        if self._at is not None:
            self._saved = min(self._saved + max(0.0, now - self._at) * self._share, SAVED_SECONDS)
        self._at = now


class Allowance:
    """Turns that an account pays for: the next one waits until the cost of the last one has been earned."""

    def __init__(self, what: str, waiting: int, account: Account) -> None:
        self._turns = Limiter(what, 1, 1, waiting=waiting)
        self._account = account

    async def turn(self, seconds: float | None = None) -> Place:
        """Wait for the caller's turn, which `pay` ends. Raises TooMany or Unavailable."""
        return await self._turns.wait(peer.who(), seconds)

    def pay(self, place: Place, spent: float) -> None:
        """End a turn that has cost this many seconds."""
        self._account.spend(spent)
        self._rest(place)

    def _rest(self, place: Place) -> None:
        if (pause := self._account.debt()) > 0:
            asyncio.get_running_loop().call_later(pause, self._rest, place)
        else:
            place.free()


class Aside:
    """Work in threads. `name`: of the threads; `what`: the work, in the plural; `guests`: pays for unknown callers.

    For one event loop.
    """

    def __init__(self, name: str, what: str, guests: Account | None = None) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"flowbridge-{name}")
        self._turns = Limiter(what, 1, 1, waiting=MAX_WAITING)
        self._guests = Allowance(f"{what} without a known token", MAX_GUESTS_WAITING, guests or Account(BODIES_SHARE))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do this in a thread, in the caller's turn. Raises TooMany or Unavailable, and what the work raises."""
        is_guest = peer.is_guest()
        if is_guest:
            place = await self._guests.turn(TURN_SECONDS)
        else:
            place = await self._turns.wait(peer.who() or "here", TURN_SECONDS)
        spent = 0.0

        def timed() -> T:
            nonlocal spent
            began = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                spent = time.thread_time() - began + HOP_SECONDS

        def done(_: object) -> None:
            if is_guest:
                self._guests.pay(place, spent)
            else:
                peer.spend(spent)
                place.free()

        # A caller that goes away does not end its thread: the turn ends with the work, not with this function.
        working = asyncio.get_running_loop().run_in_executor(self._threads, timed)
        working.add_done_callback(done)
        return await asyncio.shield(working)
