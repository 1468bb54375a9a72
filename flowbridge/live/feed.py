"""One long poll for all listeners of an account, and what each of them missed before it came."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Final

from flowbridge import log, metrics
from flowbridge.errors import BadRequest, MatrixError
from flowbridge.homeserver import answers
from flowbridge.homeserver.sync import Json, unmarked
from flowbridge.live import frames
from flowbridge.live.frames import Frame
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position
from flowbridge.live.reader import Item, Reader
from flowbridge.models.timing import Timing

MAX_PAUSE: Final = 5.0
TURN_SECONDS: Final = 0.005  # of publishing events, before other tasks have their turn
MISTAKE: Final = "flowbridge made a mistake; its log says which"

Shown = Callable[[str, Json], Awaitable[Json]]  # an event of a room, as listeners read it
Refused = Callable[[Listener, MatrixError], MatrixError]  # the error that this listener sees for a refusal


class Feed:
    """Runs from the first listener until some seconds after the last. `on_end`: it is over, or about to be."""

    def __init__(
        self,
        user_id: str,
        reader: Reader,
        refused: Refused,
        on_end: Callable[[], None],
        *,
        shown: Shown | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.user_id = user_id
        self._reader = reader
        self._refused = refused
        self._on_end = on_end
        self._shown = shown
        self._timing = timing
        self._listeners: set[Listener] = set()
        self._attached: set[Listener] = set()  # the listeners that are notified of new events
        self._audience: frozenset[Listener] = frozenset()  # the listeners that were attached when the batch began
        self._head = ""  # the token behind the current batch
        self._at: Position | None = None
        self._trouble: MatrixError | None = None
        self._tried = asyncio.Event()
        self._begun = asyncio.Event()
        self._catching_up: set[asyncio.Task[None]] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = asyncio.ensure_future(self._run())
        metrics.live_accounts.inc()

    async def join(self, listener: Listener, position: Position | None) -> None:
        """Notify a listener of new events and, with a position, of all events since then.

        Raises MatrixError when the homeserver refuses the account or the position, or, without a position, when it is
        away: then it is not known where to begin.
        """
        self._add(listener)
        try:
            await self._tried.wait()
            if self._trouble is not None and (_is_final(self._trouble) or not (self._head or position)):
                raise self._refused(listener, self._trouble)
            if position is not None and self._head not in ("", position.until):
                await self._check(listener, position)
        except BaseException:
            self.leave(listener)
            raise
        if position is None:
            self._attached.add(listener)
            listener.reach(Position(self._head))
        else:
            task = asyncio.ensure_future(self._catch_up(listener, position))
            self._catching_up.add(task)
            task.add_done_callback(partial(self._caught_up, listener))

    def leave(self, listener: Listener) -> None:
        """The listener went away."""
        listener.end()
        self._attached.discard(listener)
        if listener in self._listeners:
            self._listeners.discard(listener)
            metrics.live_listeners.dec()
            if not self._listeners:
                linger = self._timing.linger_seconds
                self._lingering = asyncio.get_running_loop().call_later(linger, self.stop)

    def stop(self, error: MatrixError | None = None) -> None:
        """End all streams. A listener that comes from now on needs another feed."""
        if self._task is None:
            return
        for listener in list(self._listeners):
            listener.end(self._refused(listener, error) if error else None)
        for task in (self._task, *self._catching_up):
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

    # new events

    async def _run(self) -> None:
        backoff = _Backoff(self._timing.live_retry_seconds)
        try:
            while True:
                before = self._at
                try:
                    await self._round()
                    backoff.reset()
                except MatrixError as error:
                    self._failed(error)
                    if _is_final(error):
                        self.stop(error)
                        return
                    await backoff.wait(error, has_progress=self._at != before)
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
            await self._publish(self._reader.rest(self._at))
        self._recovered()

    async def _poll(self, since: str) -> None:
        began = asyncio.get_running_loop().time()
        cautious = self._trouble is not None
        news = await self._reader.poll(since, cautious=cautious)
        self._head, self._audience = news.until, frozenset(self._attached)
        self._at = Position(news.until, since)
        await self._publish(self._reader.items(news))
        pause = self._timing.empty_poll_seconds
        if news.until == since and not cautious and asyncio.get_running_loop().time() - began < pause:
            await asyncio.sleep(pause)

    async def _publish(self, items: AsyncGenerator[Item, None]) -> None:
        """Notify every listener of the batch's audience; then all attached listeners have the batch behind them."""
        ends = time.monotonic() + TURN_SECONDS
        async for item in items:
            frame = await self._frame(item)
            for listener in self._audience:
                listener.notify(frame)
            self._at = item.position
            if time.monotonic() > ends:  # a batch of 10 MB is 10,000 events: other tasks run, and listeners read
                await asyncio.sleep(0)
                ends = time.monotonic() + TURN_SECONDS
        self._at = Position(self._head)
        for listener in self._attached:
            listener.reach(self._at)

    def tell(self, room_id: str, event: Json) -> None:
        """Notify all listeners of an event beside the stream, which goes on where it is."""
        if self._at is not None:
            frame = frames.event(self._at, room_id, event)
            for listener in list(self._attached):
                listener.notify(frame)

    async def _frame(self, item: Item) -> Frame:
        """An event, or an invitation, as listeners read it."""
        if item.invitation is not None:
            return frames.invitation(item.invitation)
        event = unmarked(item.event) if self._shown is None else await self._shown(item.room, item.event)
        return frames.event(item.position, item.room, event)

    def _failed(self, error: MatrixError) -> None:
        if self._trouble is None:
            log.warning("live_waits", user=self.user_id, errcode=str(error.errcode), error=error.error[:300])
        self._trouble = error
        self._tried.set()

    def _recovered(self) -> None:
        if self._trouble is not None:
            log.info("live_goes_on", user=self.user_id)
            self._trouble = None

    # missed events

    async def _check(self, listener: Listener, position: Position) -> None:
        """Raise when the homeserver does not know this position. When it cannot tell, `_catch_up` finds out later."""
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
        """Replay what a listener missed, and attach it there.

        The first round ends at the head as it is then, which may be long ago when the round is over. What comes from
        then on is held back while a second round replays the events between.
        """
        backoff, rounds, target = _Backoff(self._timing.live_retry_seconds), 0, ""
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
                        await listener.replay(await self._frame(item))
                        if listener.ended:
                            return
                        at = item.position
                at = Position(at.until)
                listener.reach(at)
                backoff.reset()
            except MatrixError as error:
                if _is_final(error):
                    listener.end(self._refused(listener, error))
                    return
                await backoff.wait(error, has_progress=at != before)
        self._attached.add(listener)
        listener.release()

    def _caught_up(self, listener: Listener, task: "asyncio.Task[None]") -> None:
        self._catching_up.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("live_failed", exc_info=error, user=self.user_id)
            listener.end(MatrixError(MISTAKE))


class _Backoff:
    """The pause after an attempt that failed: doubled while no attempt gets any further."""

    def __init__(self, first: float) -> None:
        self._first = self._pause = first

    def reset(self) -> None:
        self._pause = self._first

    async def wait(self, error: MatrixError, *, has_progress: bool) -> None:
        self._pause = self._first if has_progress else min(self._pause * 2, MAX_PAUSE)
        await asyncio.sleep(max(self._pause, float(error.extra.get("retry_after_ms", 0)) / 1000))


def _is_final(error: MatrixError) -> bool:
    """Whether asking again would bring the same answer."""
    return answers.refused(error).kind not in ("again", "slow")
