"""Reading the state of a room, on both surfaces."""

from functools import partial
from typing import Annotated, Literal
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth import scopes
from flowbridge.bridge import Core
from flowbridge.homeserver import identifiers
from flowbridge.models import Surface
from flowbridge.web import parameters
from flowbridge.web.dependencies import segment
from flowbridge.web.endpoint import headers_of
from flowbridge.web.parameters import query


async def state_key(
    raw: Annotated[str, segment("stateKey", "The state key; may be empty.", "", maxLength=255)],
) -> None: ...


async def format_(
    value: Annotated[
        Literal["content", "event"], query("`event` answers the whole event instead of its content.", alias="format")
    ] = "content",
) -> None: ...


class State:
    """The handler of one surface. On the Matrix surface unknown query parameters go on to the homeserver."""

    def __init__(self, surface: Surface, core: Core) -> None:
        self._surface: Surface = surface
        self._callers = core.callers
        self._room_access = core.room_access
        self._homeserver = core.homeserver

    async def get(self, request: Request) -> Response:
        """Read room state"""
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        path = request.path_params
        room, event_type = identifiers.room(path["roomId"]), identifiers.event_type(path["eventType"])
        state_key = identifiers.segment(path.get("stateKey", ""), "state key", empty=True)
        query = [("format", "event")] if request.query_params.get("format") == "event" else []
        if self._surface == "matrix":
            query += parameters.others(request, credential, "format")
        permit = partial(scopes.permit, credential.key, event_type)
        caller, room_id = await self._room_access.enter(credential, room, permit)
        with self._callers.as_(caller):
            answer = await self._homeserver.read_state(caller.token, room_id, event_type, state_key, urlencode(query))
        return Response(answer.body, answer.status, media_type="application/json")
