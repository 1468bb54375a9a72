"""Answers given piece by piece: the caller may stall or leave, and the bridge may have to break off."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flowbridge import log
from flowbridge.errors import MatrixError
from flowbridge.web.endpoint import HANG_UP, LOG, Headers, error_answer


class StreamedAnswer(Response):
    """An answer that `write` gives with `start` and `give`. A subclass defines that, and what else may end it.

    It ends when it is complete or fails, when the caller leaves, when an interruption returns, or when the server
    cancels it. An error before `start` becomes the answer; a later one cuts the connection, so that no caller takes a
    part for the whole. `status`: what the log says of an answer that never starts. `stall_seconds`: for the caller to
    take a piece.
    """

    started = False
    _scope: Scope
    _send: Send

    def __init__(self, status: int, stall_seconds: float | None) -> None:  # the base class would want the body
        self.status_code = status
        self._stall_seconds = stall_seconds

    async def write(self) -> None:
        """Give the answer. A MatrixError says why it fails."""
        raise NotImplementedError

    def interruptions(self) -> list[Coroutine[Any, Any, MatrixError | None]]:
        """Waits, each for a reason to break off. None: there is nothing to tell the caller."""
        return []

    async def caller_left(self, receive: Receive) -> None:
        await left(receive)

    async def release(self) -> None:
        """Let go of what the answer holds, once nothing more is written."""

    async def start(self, status: int, headers: Headers) -> None:
        self.status_code = status
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def give(self, piece: bytes) -> None:
        """A piece of the body, as fast as the caller takes it. Raises MatrixError when it takes none."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            raise MatrixError(f"the caller has taken nothing of the answer for {self._stall_seconds:g} s") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._send = scope, send
        tasks: list[asyncio.Task[MatrixError | None]] = [
            asyncio.create_task(wait) for wait in (self._complete(), self.caller_left(receive), *self.interruptions())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the time that the server gives to requests when it stops is up
            cut(scope, "the bridge stops")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.release()
        ended = next((task for task in tasks if not task.cancelled()), None)
        if ended is not None and (error := ended.exception() or ended.result()) is not None:
            await self._fail(error, receive)

    async def _complete(self) -> None:
        await self.write()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: BaseException, receive: Receive) -> None:
        if isinstance(error, ClientDisconnect):
            return
        if not isinstance(error, MatrixError):
            log.error("internal_error", exc_info=error, path=_path(self._scope))
            error = MatrixError("flowbridge made a mistake; its log says which")
        if self.started:
            cut(self._scope, error.error)
            return
        note(self._scope, error)
        response = error_answer(error)
        self.status_code = response.status_code
        await response(self._scope, receive, self._send)


async def left(receive: Receive) -> None:
    """Wait until the caller has left. What it sends meanwhile is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def note(scope: Scope, error: MatrixError) -> None:
    """Name an error in the request's log line."""
    scope.setdefault(LOG, {}).update(errcode=str(error.errcode), error=error.error[:300])


def cut(scope: Scope, reason: str) -> None:
    """End the connection in the middle of an answer, and log why."""
    log.warning("answer_cut", path=_path(scope), reason=reason)
    scope.setdefault(LOG, {}).update(error=reason)
    hang_up(scope)


def hang_up(scope: Scope) -> None:
    if HANG_UP in scope:
        scope[HANG_UP]()


def _path(scope: Scope) -> str:
    return str(scope["raw_path"].decode("ascii", "replace")[:1_000])
