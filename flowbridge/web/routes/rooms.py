"""Making rooms, and being in them or not, on both surfaces."""

from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.bridge import Core
from flowbridge.homeserver import identifiers
from flowbridge.models import Caller
from flowbridge.services.rooms import Action, Rooms
from flowbridge.web import parameters
from flowbridge.web.describe import Operation
from flowbridge.web.endpoint import LOG, Endpoint, Handler, endpoint, headers_of, json_answer
from flowbridge.web.incoming import FLAG, OBJECT, TEXT, TEXTS, Shape, read_object, record, records
from flowbridge.web.routes import describe_rooms as describe
from flowbridge.web.routes.send import DIALECTS

_THIRD_PARTY: dict[str, Shape] = dict.fromkeys(("medium", "address", "id_server", "id_access_token"), TEXT)
_EVENTS = records({"type": TEXT, "content": OBJECT}, {"state_key": TEXT})
_NOT_BY_HAND = "m.room.create"


def _is_initial_state(value: Any) -> bool:
    """Synapse answers 500 to the event that it makes itself, and to a membership of another type."""
    return _EVENTS[1](value) and all(
        event["type"] != _NOT_BY_HAND and isinstance(event["content"].get("membership", ""), str) for event in value
    )


CREATE: dict[str, Shape] = {
    "room_alias_name": TEXT,
    "name": TEXT,
    "topic": TEXT,
    "visibility": TEXT,
    "preset": TEXT,
    "room_version": TEXT,
    "invite": TEXTS,
    "invite_3pid": records(_THIRD_PARTY, {}),
    "initial_state": (f"{_EVENTS[0]}, and none {_NOT_BY_HAND}", _is_initial_state),
    "creation_content": OBJECT,
    "power_level_content_override": OBJECT,
    "is_direct": FLAG,
}
MEMBERSHIP: dict[str, Shape] = {
    **_THIRD_PARTY,
    "user_id": TEXT,
    "reason": TEXT,
    "displayname": TEXT,
    "avatar_url": TEXT,
    "third_party_signed": record({"sender": TEXT, "mxid": TEXT, "token": TEXT, "signatures": OBJECT}, {}),
}


class Handlers:
    def __init__(self, core: Core) -> None:
        self._callers = core.callers
        self._rooms = Rooms(core.homeserver, core.callers, core.room_access, joined=core.worker.joined)

    async def create(self, request: Request) -> Response:
        """POST …/createRoom, POST /rooms"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        body = await read_object(request, headers, CREATE)
        query = parameters.passed_on(request, credential)
        return _answer(request, *await self._rooms.create(credential, body, query))

    async def join(self, request: Request) -> Response:
        """POST …/join/{roomIdOrAlias}"""
        return await self._change(request, request.path_params["roomIdOrAlias"], "join")

    def change(self, action: Action) -> Handler:
        """POST …/rooms/{roomId}/{action}"""

        async def handler(request: Request) -> Response:
            return await self._change(request, request.path_params["roomId"], action)

        return handler

    async def _change(self, request: Request, raw: str, action: Action) -> Response:
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        room, query = identifiers.room(raw), parameters.passed_on(request, credential)
        body = await read_object(request, headers, MEMBERSHIP)
        return _answer(request, *await self._rooms.change(credential, room, action, body, query))


def _answer(request: Request, caller: Caller, found: dict[str, object]) -> Response:
    request.scope[LOG] = {"user": caller.user_id}
    return json_answer(found)


def routes(core: Core) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented: the others are the same."""
    handlers = Handlers(core)
    found = [endpoint("POST", "/rooms", handlers.create, describe.create("/rooms"))]
    found += _routes("", handlers, documented=True)
    for name in DIALECTS:
        found += _routes(f"/_matrix/client/{name}", handlers, documented=name == "v3")
    return found


def _routes(prefix: str, handlers: Handlers, *, documented: bool) -> list[Endpoint]:
    create, join = f"{prefix}/createRoom", f"{prefix}/join/{{roomIdOrAlias}}"
    table: list[tuple[str, Handler, Operation]] = [
        (create, handlers.create, describe.create(create)),
        (join, handlers.join, describe.join(join)),
    ]
    for action in get_args(Action):
        path = f"{prefix}/rooms/{{roomId}}/{action}"
        table.append((path, handlers.change(action), describe.change(path, action)))
    return [endpoint("POST", path, handler, about, documented=documented) for path, handler, about in table]
