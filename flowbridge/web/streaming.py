"""What every answer needs that is given piece by piece: a caller who may stall or go away, and a way to break off."""

import asyncio

from starlette.types import Receive, Scope, Send

from flowbridge import log
from flowbridge.errors import MatrixError
from flowbridge.homeserver.relay import STALL_SECONDS
from flowbridge.web.endpoint import HANG_UP, LOG


async def give(send: Send, chunk: bytes) -> None:
    """A piece of the body to the caller, as fast as it takes them. Raises TimeoutError when it takes none."""
    async with asyncio.timeout(STALL_SECONDS):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def left(receive: Receive) -> None:
    """Until the caller has gone away. Whatever it still says meanwhile is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def broken(scope: Scope, error: BaseException) -> None:
    """What to do when an answer breaks off in its middle. Raises what is neither the homeserver's nor the caller's."""
    if isinstance(error, MatrixError):
        cut(scope, error.error)
    elif isinstance(error, TimeoutError):
        cut(scope, f"the caller has taken nothing of the answer for {STALL_SECONDS:g} s")
    else:
        raise error


def cut(scope: Scope, reason: str) -> None:
    """End the connection, so that nobody takes a part of an answer for the whole; the log says why."""
    log.warning("answer_cut", path=scope["raw_path"].decode("ascii")[:1_000], reason=reason)
    scope.setdefault(LOG, {}).update(error=reason)
    hang_up(scope)


def hang_up(scope: Scope) -> None:
    if HANG_UP in scope:
        scope[HANG_UP]()
