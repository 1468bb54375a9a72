"""Refusals on the flow surface, in words: which mistake it was, and what to do next. A Matrix client gets them as they
come."""

import contextlib

from starlette.requests import Request

from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.web.endpoint import headers_of

REFUSALS = (403, 404)


async def explained(request: Request, error: MatrixError) -> MatrixError:
    """The error to answer with, where the homeserver refuses something in a room that the path names."""
    params = request.path_params
    raw = params.get("roomId") or params.get("roomIdOrAlias")
    if not raw or not isinstance(error, HomeserverError) or error.status not in REFUSALS:
        return error
    action = request.scope["raw_path"].partition(b"?")[0].rstrip(b"/").rpartition(b"/")[2].decode("ascii", "replace")
    if "roomIdOrAlias" in params:
        action = "join"
    core = request.app.core
    with contextlib.suppress(MatrixError):
        credential = await core.callers.credential(headers_of(request), request.scope["query_string"])
        found: MatrixError = await core.rooms.explained(credential, identifiers.room(raw), action, error)
        return found
    return error
