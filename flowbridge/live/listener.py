"""What one listener has still to be told: bounded, so that one who does not read costs nobody else anything."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

from flowbridge import metrics
from flowbridge.errors import Errcode, MatrixError
from flowbridge.live import frames
from flowbridge.live.frames import Frame, Wish
from flowbridge.live.position import Position
from flowbridge.models import Caller

MAX_FRAMES: Final = 1_000
MAX_BYTES: Final = 4 * 1024 * 1024
SLOW_BYTES: Final = 64 * 1024  # from here on, who reads what was missed waits for the listener
CHUNK_BYTES: Final = 64 * 1024


class Listener:
    """A queue of bytes for one stream. `caller`: whose stream it is; `on_leave` is told when that is closed."""

    def __init__(self, caller: Caller, wish: Wish, on_leave: "Callable[[Listener], None]") -> None:
        self.caller = caller
        self._on_leave = on_leave
        self.over = asyncio.Event()
        self.why: MatrixError | None = None
        self._wish = wish
        self._ready: deque[bytes] = deque()
        self._later: deque[bytes] | None = None  # what is new, while what was missed goes first
        self._bytes = 0
        self._here: Position | None = None  # when it is not the one of the last event that was told
        self._wake = asyncio.Event()
        self._space = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether it is told nothing any more."""
        return self.over.is_set()

    # for who tells

    def tell(self, frame: Frame) -> None:
        """What is new. One who has not read far too much is told nothing any more, but for why."""
        if self.ended or not self._wish.holds(frame):
            return
        queue = self._ready if self._later is None else self._later
        queue.append(frame.data)
        self._bytes += len(frame.data)
        self._here = None
        self._wake.set()
        if self._bytes > MAX_BYTES or len(queue) > MAX_FRAMES:
            self._drop()

    async def retell(self, frame: Frame) -> None:
        """What was missed: waits until there is room for it."""
        while self._bytes > SLOW_BYTES and not self.ended:
            self._space.clear()
            await self._space.wait()
        if not self.ended and self._wish.holds(frame):
            self._ready.append(frame.data)
            self._bytes += len(frame.data)
            self._here = None
            self._wake.set()

    def hold(self) -> None:
        """From now on what is new waits until what was missed is told."""
        self._later = deque()

    def release(self) -> None:
        """Everything that was missed is told."""
        later, self._later = self._later, None
        self._ready.extend(later or ())
        self._wake.set()

    def reach(self, position: Position) -> None:
        """Everything up to here is told."""
        self._here = position

    def end(self, error: MatrixError | None = None) -> None:
        """Say no more than why."""
        if self.ended:
            return
        self.over.set()
        self.why = error
        self.release()
        if error is not None:
            self._ready.append(frames.error(error))
        self._wake.set()
        self._space.set()

    # for who writes

    async def take(self, seconds: float) -> bytes:
        """What is to be written next: at least a comment every so many seconds; nothing once it is over."""
        if not self._ready and not self.ended:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
        found, size = [], 0
        while self._ready and size < CHUNK_BYTES:
            found.append(self._ready.popleft())
            size += len(found[-1])
        self._bytes -= size
        self._space.set()
        if found or self.ended:
            return b"".join(found)
        return self._idle()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._on_leave(self)

    def _idle(self) -> bytes:
        """A sign of life and, when there is a newer one, the position: then a later resumption has less to look at."""
        if self._here is None or self._later is not None:
            return frames.COMMENT
        here, self._here = self._here, None
        return frames.here(here)

    def drop(self, why: MatrixError) -> None:
        """Forget what it has not read, and say why."""
        self._ready.clear()
        self._later = None
        self._bytes = 0
        self.end(why)

    def _drop(self) -> None:
        metrics.live_dropped.inc()
        self.drop(
            MatrixError(
                f"this listener was dropped, being more than {MAX_FRAMES} events or {MAX_BYTES // 1024**2} MiB behind: "
                "connect again with the last id in Last-Event-ID, and nothing is lost",
                errcode=Errcode.LIMIT_EXCEEDED,
            )
        )
