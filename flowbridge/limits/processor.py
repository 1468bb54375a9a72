"""The processor's time: callers take turns with what is large, and those not authenticated have a part of it.

A thread alone does not help the event loop: both need the interpreter, so that a thread at work takes half of it. And
the loop serves all that is ready in turn, so that 16 callers of something cheap get as much of it as 16 senders.
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

GUESTS_SHARE = 0.15  # of the processor time that the bridge gets, for all callers that have not been authenticated
BODIES_SHARE = 0.07  # likewise, for the checking of their bodies: a thread at work costs the event loop as much again
SAVED_SECONDS = 0.5  # that they may have in store: 2,000 answers, or a large body now and then, do not wait
TURN_SECONDS = 20.0
MAX_WAITING = 256  # bodies of one caller: each is held in memory
MAX_GUESTS_WAITING = 64
HOP_SECONDS = 0.0004  # of work in a thread, besides that: the loop waits for the interpreter, too
ANSWER_SECONDS = 0.00025  # what the least request costs on the event loop,
READ_SECONDS = 0.00075  # one that asks the homeserver,
STREAM_SECONDS = 0.0005  # to open a live stream, and to close it, besides that,
SENT_BYTE_SECONDS = 1.2e-9  # each byte of an answer,
RECEIVED_BYTE_SECONDS = 3e-9  # and of a body


class Account:
    """A share of the processor, spent before it is earned.

    A machine that is busy with other processes gives the bridge less than a second of the processor in a second of the
    clock; what its thread has waited for (Linux: schedstat) earns nothing.
    """

    def __init__(self, share: float = GUESTS_SHARE) -> None:
        self._share = share
        self._saved = SAVED_SECONDS
        self._at: float | None = None

    def spend(self, seconds: float) -> float:
        """For how long the next has to wait, at the least, until this is paid for."""
        self._earn()
        self._saved -= seconds
        return self.debt()

    def debt(self) -> float:
        """For how long the next has to wait now; 0 when it need not."""
        self._earn()
        return max(0.0, -self._saved / self._share)

    def _earn(self) -> None:
        now = time.monotonic() - _THREAD.waited()
        if self._at is not None:
            self._saved = min(self._saved + max(0.0, now - self._at) * self._share, SAVED_SECONDS)
        self._at = now


class _Thread(threading.local):
    """What the system says of the thread that asks: one open file for each thread, however many accounts it has."""

    def __init__(self) -> None:
        self._schedstat: int | None = None
        with contextlib.suppress(OSError):  # another system
            path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
            self._schedstat = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def waited(self) -> float:
        """The seconds for which this thread was ready to run and did not, since it began."""
        if self._schedstat is None:
            return 0.0
        try:
            return int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def __del__(self) -> None:
        if self._schedstat is not None:
            with contextlib.suppress(OSError):
                os.close(self._schedstat)


_THREAD = _Thread()


class Allowance:
    """Turns that are paid for from an account: the next one waits until what the last one spent has been earned."""

    def __init__(self, what: str, waiting: int, account: Account) -> None:
        self._turns = Limiter(what, 1, 1, waiting=waiting)
        self._account = account

    async def turn(self, seconds: float | None = None) -> Place:
        """This caller's turn. To be ended by `pay`. Raises TooMany or Unavailable."""
        return await self._turns.wait(peer.who(), seconds)

    def pay(self, place: Place, spent: float) -> None:
        """So much was spent in this turn."""
        self._account.spend(spent)
        self._rest(place)

    def _rest(self, place: Place) -> None:
        if (pause := self._account.debt()) > 0:
            asyncio.get_running_loop().call_later(pause, self._rest, place)
        else:
            place.free()


class Aside:
    """Work in threads. `name`: of the threads, `what`: of the work, in the plural; `guests`: what pays for theirs.

    To be used on one event loop.
    """

    def __init__(self, name: str, what: str, guests: Account | None = None) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"flowbridge-{name}")
        self._turns = Limiter(what, 1, 1, waiting=MAX_WAITING)
        self._guests = Allowance(f"{what} without a known token", MAX_GUESTS_WAITING, guests or Account(BODIES_SHARE))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do this in a thread. Raises TooMany or Unavailable, and what the work raises."""
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

        # Not on leaving this function: a caller that goes away does not end its thread.
        working = asyncio.get_running_loop().run_in_executor(self._threads, timed)
        working.add_done_callback(done)
        return await asyncio.shield(working)
