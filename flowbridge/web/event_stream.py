"""An answer that goes on until somebody ends it: Server-Sent Events."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flowbridge import log
from flowbridge.errors import MatrixError
from flowbridge.live import Listener, frames
from flowbridge.web import streaming
from flowbridge.web.endpoint import LOG

KEEP_ALIVE_SECONDS: Final = 15.0
LAST_SECONDS: Final = 30.0  # for the last bytes to be taken, which say what is wrong
STOP_SECONDS: Final = 1.0  # the same, when nothing is

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
MEDIA_TYPE = "text/event-stream"


class EventStream(Response):
    """What a listener is told, until it or the caller ends. `revoked` waits until the caller may not listen any longer,
    and says why.

    Writes wait for the caller to read; one who goes away is noticed at once, and one who does not even take the last
    bytes is hung up on.
    """

    def __init__(self, listener: Listener, revoked: Callable[[], Awaitable[MatrixError]] | None = None) -> None:
        super().__init__(headers=HEADERS, media_type=MEDIA_TYPE)
        del self.headers["content-length"]
        self._listener = listener
        self._revoked = revoked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        works = [streaming.left(receive), self._write(send), self._overdue(scope)]
        if self._revoked is not None:
            works.append(self._watch(self._revoked))
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            self._listener.close()
            if why := self._listener.why:
                scope.setdefault(LOG, {}).update(errcode=str(why.errcode), error=why.error[:300])
            for failure in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(failure, Exception):
                    log.error("stream_failed", exc_info=failure)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = frames.HELLO + await self._listener.take(0)
        while body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            body = await self._listener.take(KEEP_ALIVE_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _overdue(self, scope: Scope) -> None:
        await self._listener.over.wait()
        await asyncio.sleep(LAST_SECONDS if self._listener.why else STOP_SECONDS)
        streaming.hang_up(scope)

    async def _watch(self, revoked: Callable[[], Awaitable[MatrixError]]) -> None:
        """Of what is queued nothing more is told, but for why; then the stream ends by itself."""
        self._listener.drop(await revoked())
        await asyncio.Event().wait()
