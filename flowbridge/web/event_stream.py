"""A live stream: Server-Sent Events until the listener, the caller or the bridge ends it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from starlette.responses import Response

from flowbridge.errors import MatrixError
from flowbridge.live import Listener, frames
from flowbridge.web import streaming

KEEP_ALIVE_SECONDS: Final = 15.0
LAST_SECONDS: Final = 30.0  # for the caller to take the last bytes, which say what is wrong
STOP_SECONDS: Final = 1.0  # the same, when nothing is

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
MEDIA_TYPE = "text/event-stream"


class EventStream(streaming.StreamedAnswer):
    """A listener's events. `revoked` waits until the caller may listen no longer, and returns why.

    A caller may take any time to read, since a listener that falls too far behind is dropped.
    """

    def __init__(self, listener: Listener, revoked: Callable[[], Awaitable[MatrixError]] | None = None) -> None:
        super().__init__(200, stall_seconds=None)
        self._listener = listener
        self._revoked = revoked

    async def write(self) -> None:
        headers = Response(headers=HEADERS, media_type=MEDIA_TYPE).raw_headers
        await self.start(200, [pair for pair in headers if pair[0] != b"content-length"])
        events = frames.HELLO + await self._listener.take(0)
        while events:
            await self.give(events)
            events = await self._listener.take(KEEP_ALIVE_SECONDS)

    def interruptions(self) -> list[Coroutine[Any, Any, MatrixError | None]]:
        return [self._overdue()] if self._revoked is None else [self._overdue(), self._revocation(self._revoked)]

    async def release(self) -> None:
        self._listener.close()
        if why := self._listener.why:
            streaming.note(self._scope, why)

    async def _overdue(self) -> None:
        """Hang up on a caller that does not even take the last bytes."""
        await self._listener.over.wait()
        await asyncio.sleep(LAST_SECONDS if self._listener.why else STOP_SECONDS)
        streaming.hang_up(self._scope)

    async def _revocation(self, revoked: Callable[[], Awaitable[MatrixError]]) -> None:
        """End the stream with the reason in place of what is queued."""
        self._listener.drop(await revoked())
        await self._overdue()
