"""What is queued for one listener: bounded, so that a listener that does not read costs no other one anything."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

from flowbridge import metrics
from flowbridge.errors import Errcode, MatrixError
from flowbridge.live import frames
from flowbridge.live.frames import EventFilter, Frame
from flowbridge.live.position import Position
from flowbridge.models import Caller

MAX_FRAMES: Final = 1_000
MAX_BYTES: Final = 4 * 1024 * 1024
SLOW_BYTES: Final = 64 * 1024  # when so many are queued, the replay of missed events waits for the listener
CHUNK_BYTES: Final = 64 * 1024


class Listener:
    """A queue of bytes for one stream of this caller's. `on_leave` is called when the stream is closed."""

    def __init__(
        self,
        caller: Caller,
        wanted: EventFilter,
        on_leave: "Callable[[Listener], None]",
        *,
        max_frames: int = MAX_FRAMES,
        max_bytes: int = MAX_BYTES,
        slow_bytes: int = SLOW_BYTES,
    ) -> None:
        self.caller = caller
        self.over = asyncio.Event()
        self.why: MatrixError | None = None
        self._on_leave = on_leave
        self._wanted = wanted
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._slow_bytes = slow_bytes
        self._ready: deque[bytes] = deque()
        self._held: deque[bytes] | None = None  # new events, while missed ones go first
        self._bytes = 0
        self._reached: Position | None = None  # unless it is the position of the last event
        self._wake = asyncio.Event()
        self._space = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether nothing more is queued."""
        return self.over.is_set()

    # for the feed

    def notify(self, frame: Frame) -> None:
        """Queue a new event. A listener that falls too far behind is dropped; its last message says why."""
        if self.ended or not self._wanted.matches(frame):
            return
        queue = self._ready if self._held is None else self._held
        self._queue(queue, frame)
        if self._bytes > self._max_bytes or len(queue) > self._max_frames:
            metrics.live_dropped.inc()
            self.drop(
                MatrixError(
                    f"this listener was dropped, being more than {self._max_frames} events or "
                    f"{self._max_bytes // 1024**2} MiB behind: connect again with the last id in Last-Event-ID, and "
                    "nothing is lost",
                    errcode=Errcode.LIMIT_EXCEEDED,
                )
            )

    async def replay(self, frame: Frame) -> None:
        """Queue a missed event, once there is room for it."""
        while self._bytes > self._slow_bytes and not self.ended:
            self._space.clear()
            await self._space.wait()
        if not self.ended and self._wanted.matches(frame):
            self._queue(self._ready, frame)

    def hold(self) -> None:
        """Hold new events back until the missed ones are replayed."""
        self._held = deque()

    def release(self) -> None:
        """All missed events are replayed: queue the new ones that were held back."""
        held, self._held = self._held, None
        self._ready.extend(held or ())
        self._wake.set()

    def reach(self, position: Position) -> None:
        """Every event up to this position is queued."""
        self._reached = position

    def end(self, error: MatrixError | None = None) -> None:
        """Queue nothing more but why it ends."""
        if self.ended:
            return
        self.over.set()
        self.why = error
        self.release()
        if error is not None:
            self._ready.append(frames.error(error))
        self._wake.set()
        self._space.set()

    def drop(self, why: MatrixError) -> None:
        """End with this message in place of what is queued."""
        self._ready.clear()
        self._held = None
        self._bytes = 0
        self.end(why)

    # for the stream

    async def take(self, seconds: float) -> bytes:
        """The bytes to write next: at least a comment after so many seconds; nothing once the listener has ended."""
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
        return self._sign_of_life()

    def close(self) -> None:
        """The stream is closed."""
        self._on_leave(self)

    def _queue(self, queue: deque[bytes], frame: Frame) -> None:
        queue.append(frame.data)
        self._bytes += len(frame.data)
        self._reached = None
        self._wake.set()

    def _sign_of_life(self) -> bytes:
        """A comment or, when there is a newer one, the position: a later resumption then has less to look through."""
        if self._reached is None or self._held is not None:
            return frames.COMMENT
        reached, self._reached = self._reached, None
        return frames.position(reached)
