"""Reading the state of a room, on both surfaces."""

from functools import partial
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth import scopes
from flowbridge.bridge import Core
from flowbridge.errors import MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.models import Surface
from flowbridge.web import parameters
from flowbridge.web.endpoint import headers_of


class State:
    """The handler of one surface. On the Matrix surface query parameters are the homeserver's to understand."""

    def __init__(self, surface: Surface, core: Core) -> None:
        self._surface: Surface = surface
        self._callers = core.callers
        self._room_access = core.room_access
        self._homeserver = core.homeserver

    async def get(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        path = request.path_params
        room, event_type = identifiers.room(path["roomId"]), identifiers.event_type(path["eventType"])
        state_key = identifiers.segment(path.get("stateKey", ""), "state key", empty=True)
        query = [("format", "event")] if request.query_params.get("format") == "event" else []
        if self._surface == "matrix":
            query += parameters.others(request, credential, "format")
        permit = partial(scopes.permit, credential.key, event_type)
        caller, room_id = await self._room_access.enter(credential, room, permit)
        try:
            answer = await self._homeserver.read_state(caller.token, room_id, event_type, state_key, urlencode(query))
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        return Response(answer.body, answer.status, media_type="application/json")
