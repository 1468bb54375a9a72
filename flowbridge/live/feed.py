"""One long poll for all listeners of an account, and what each of them missed before it came."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final

from flowbridge import log, metrics
from flowbridge.errors import BadRequest, MatrixError
from flowbridge.homeserver import answers
from flowbridge.live import frames
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position
from flowbridge.live.reader import Item, Reader

LINGER_SECONDS: Final = 10.0  # after the last listener: most come back
FIRST_PAUSE: Final = 0.25  # after an attempt that failed; doubled while none gets any further
MAX_PAUSE: Final = 5.0
MIN_POLL_SECONDS: Final = 0.5  # a homeserver that says at once that nothing is new is not asked at once again
TELL_SECONDS: Final = 0.005  # of telling what is new, before others have their turn
MISTAKE: Final = "flowbridge made a mistake; its log says which"

Refused = Callable[[Listener, MatrixError], MatrixError]  # what this listener is told of a refusal


class Feed:
    """Runs from the first listener until some seconds after the last. `on_end`: it is over, or about to be."""

    def __init__(self, user_id: str, reader: Reader, refused: Refused, on_end: Callable[[], None]) -> None:
        self.user_id = user_id
        self._reader = reader
        self._refused = refused
        self._on_end = on_end
        self._listeners: set[Listener] = set()
        self._attached: set[Listener] = set()  # those of them that are told what is new
        self._audience: frozenset[Listener] = frozenset()  # those of them that were there when the batch began
        self._head = ""  # behind the batch that is told just now
        self._at: Position | None = None
        self._trouble: MatrixError | None = None
        self._tried = asyncio.Event()
        self._begun = asyncio.Event()
        self._missing: set[asyncio.Task[None]] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = asyncio.ensure_future(self._run())
        metrics.live_accounts.inc()

    async def join(self, listener: Listener, position: Position | None) -> None:
        """Tell a listener what comes and, with a position, what has come since.

        Raises MatrixError when the homeserver refuses the account or the position, or, without a position, when it is
        away: nobody knows where to begin then.
        """
        self._add(listener)
        try:
            await self._tried.wait()
            if self._trouble is not None and (_is_final(self._trouble) or not (self._head or position)):
                raise self._refused(listener, self._trouble)
            if position is not None and self._head not in ("", position.until):
                await self._look_up(listener, position)
        except BaseException:
            self.leave(listener)
            raise
        if position is None:
            self._attached.add(listener)
            listener.reach(Position(self._head))
        else:
            task = asyncio.ensure_future(self._catch_up(listener, position))
            self._missing.add(task)
            task.add_done_callback(partial(self._caught_up, listener))

    def leave(self, listener: Listener) -> None:
        """The listener went away."""
        listener.end()
        self._attached.discard(listener)
        if listener in self._listeners:
            self._listeners.discard(listener)
            metrics.live_listeners.dec()
            if not self._listeners:
                self._lingering = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.stop)

    def stop(self, error: MatrixError | None = None) -> None:
        """End all streams. Whoever comes from now on needs another feed."""
        if self._task is None:
            return
        for listener in list(self._listeners):
            listener.end(self._refused(listener, error) if error else None)
        for task in (self._task, *self._missing):
            if task is not asyncio.current_task():
                task.cancel()
        self._task = None
        self._tried.set()
        metrics.live_accounts.dec()
        self._on_end()

    def _add(self, listener: Listener) -> None:
        self._listeners.add(listener)
        metrics.live_listeners.inc()
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    # the loop

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        try:
            while True:
                before = self._at
                try:
                    await self._round()
                    pause = FIRST_PAUSE
                except MatrixError as error:
                    self._worse(error)
                    if _is_final(error):
                        self.stop(error)
                        return
                    pause = min(pause * 2, MAX_PAUSE) if self._at == before else FIRST_PAUSE
                    await asyncio.sleep(max(pause, _asked_pause(error)))
        except Exception as error:
            log.error("live_failed", exc_info=error, user=self.user_id)
            self._trouble = MatrixError(MISTAKE)
            self.stop(self._trouble)

    async def _round(self) -> None:
        """One batch, or the rest of one."""
        if self._at is None:
            self._head = await self._reader.now()
            self._at = Position(self._head)
            self._tried.set()
            self._begun.set()
        elif self._at.between:
            await self._poll(self._at.until)
        else:
            await self._tell(self._reader.rest(self._at))
        self._better()

    async def _poll(self, since: str) -> None:
        began = asyncio.get_running_loop().time()
        cautious = self._trouble is not None
        news = await self._reader.poll(since, cautious=cautious)
        self._head, self._audience = news.until, frozenset(self._attached)
        self._at = Position(news.until, since)
        await self._tell(self._reader.items(news))
        is_idle = news.until == since and not cautious
        if is_idle and asyncio.get_running_loop().time() - began < MIN_POLL_SECONDS:
            await asyncio.sleep(MIN_POLL_SECONDS)

    async def _tell(self, items: AsyncGenerator[Item, None]) -> None:
        """To everybody who was there when the batch began; all who are there now have it behind them then."""
        ends = time.monotonic() + TELL_SECONDS
        async for item in items:
            frame = frames.event(item.position, item.room, item.event)
            for listener in self._audience:
                listener.tell(frame)
            self._at = item.position
            if time.monotonic() > ends:  # a batch of 10 MB is 10,000 events: others have their turn, and listeners read
                await asyncio.sleep(0)
                ends = time.monotonic() + TELL_SECONDS
        self._at = Position(self._head)
        for listener in self._attached:
            listener.reach(self._at)

    def _worse(self, error: MatrixError) -> None:
        if self._trouble is None:
            log.warning("live_waits", user=self.user_id, errcode=str(error.errcode), error=error.error[:300])
        self._trouble = error
        self._tried.set()

    def _better(self) -> None:
        if self._trouble is not None:
            log.info("live_goes_on", user=self.user_id)
            self._trouble = None

    # what was missed

    async def _look_up(self, listener: Listener, position: Position) -> None:
        """Whether the homeserver knows this position. When it cannot tell, that is found out later."""
        try:
            if position.between:
                await self._reader.changed(position.until, self._head)
            else:
                await self._reader.changed(position.since, position.until)
        except MatrixError as error:
            if not _is_final(error):
                return
            if error.status in (401, 403):
                raise self._refused(listener, error) from None
            raise BadRequest(f"Last-Event-ID: the homeserver does not take it: {error.error}") from None

    async def _catch_up(self, listener: Listener, at: Position) -> None:
        """Tell a listener what it missed, and let it listen from there.

        First without what is new in the meantime, which may be long; that is read, too, while the next is kept.
        """
        pause, rounds, target = FIRST_PAUSE, 0, ""
        while not listener.ended:
            if at.between:
                await self._begun.wait()
                if at.until in (self._head, target):
                    break
                if rounds:
                    target = self._head
                    listener.hold()
                    self._attached.add(listener)
                at, rounds = Position(self._head, at.until), rounds + 1
            before = at
            try:
                async with contextlib.aclosing(self._reader.rest(at)) as items:
                    async for item in items:
                        await listener.retell(frames.event(item.position, item.room, item.event))
                        if listener.ended:
                            return
                        at = item.position
                at = Position(at.until)
                listener.reach(at)
                pause = FIRST_PAUSE
            except MatrixError as error:
                if _is_final(error):
                    listener.end(self._refused(listener, error))
                    return
                pause = min(pause * 2, MAX_PAUSE) if at == before else FIRST_PAUSE
                await asyncio.sleep(max(pause, _asked_pause(error)))
        self._attached.add(listener)
        listener.release()

    def _caught_up(self, listener: Listener, task: "asyncio.Task[None]") -> None:
        self._missing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("live_failed", exc_info=error, user=self.user_id)
            listener.end(MatrixError(MISTAKE))


def _is_final(error: MatrixError) -> bool:
    """Whether asking again would bring the same answer."""
    return answers.refused(error).kind not in ("again", "slow")


def _asked_pause(error: MatrixError) -> float:
    """For how many seconds the homeserver wants to be left alone."""
    return float(error.extra.get("retry_after_ms", 0)) / 1000
