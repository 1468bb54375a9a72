"""Live events as Server-Sent Events."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import Header
from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import BadGateway, BadRequest, Forbidden, GatewayTimeout, MatrixError
from flowbridge.homeserver import answers, identifiers
from flowbridge.live import EventFilter, position
from flowbridge.live.position import Position
from flowbridge.models import Caller
from flowbridge.web.dependencies import credential, room
from flowbridge.web.endpoint import LOG, Handler, headers_of
from flowbridge.web.event_stream import HEADERS, MEDIA_TYPE, EventStream
from flowbridge.web.parameters import query
from flowbridge.web.routing import TAGS, RawRoute, Route

MAX_NAMES = 100  # event types, or senders, in a filter


class Listening:
    def __init__(self, core: Core) -> None:
        self._live = core.live
        self._callers = core.callers
        self._room_access = core.room_access
        self._homeserver = core.homeserver
        self._rooms = core.rooms

    async def everywhere(self, request: Request) -> Response:
        """Listen to all rooms

        The rooms that the account is in, including those that it joins later; with an API key for some rooms, those.

        Server-Sent Events. Each message is one event of a room in the form of the current client-server API with its
        `room_id`, as one line of JSON. Its `id` is a position: sent back in `Last-Event-ID`, which an EventSource does
        by itself, it resumes the stream there without gap or repeat, even after a restart of the bridge. Within a room,
        messages and state events come in the homeserver's order; between rooms there is no order. A comment comes at
        least every 15 s. A message of the type `invite` is an invitation that the account has got: an m.room.member
        event with the `inviter` and, where they are told, the room's `name` and `canonical_alias`; without an `id`, and
        perhaps once more after a resumption. However many listen, the homeserver sees one long poll per access token;
        while it is away, the stream stays open. A message of the type `error` is the last one and says why the stream
        ends: `M_UNKNOWN_TOKEN`, or `M_LIMIT_EXCEEDED` for a listener that reads too slowly, and may connect again. An
        API key that is for some event types only needs `types=`. A client that decrypts messages needs an access token
        of its own: with a shared one both are the same device to the homeserver, and the first to ask gets the keys
        that are sent to it.
        """
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        types, since = self._types(request, credential), _position(request)
        caller = await self._callers.identify(credential)
        key, rooms = credential.key, None
        if key is not None and key.rooms:
            rooms = await self._room_access.scope(caller, key, joins=True)
        return await self._stream(request, credential, caller, _filter(request, caller, types, rooms), since)

    async def room(self, request: Request) -> Response:
        """Listen to a room

        As `GET /live`, for one room, which the account must be in.
        """
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        room = identifiers.room(request.path_params["roomId"])
        types, since = self._types(request, credential), _position(request)
        permit = partial(self._permit, credential, types)
        caller, room_id = await self._room_access.enter(credential, room, permit, joins=True)
        try:
            await self._enter(caller, room_id)
        except (BadGateway, GatewayTimeout):
            if since is None:
                raise
            # A caller that resumes waits for the homeserver with an open stream.
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        wanted = _filter(request, caller, types, frozenset({room_id}))
        return await self._stream(request, credential, caller, wanted, since)

    def _types(self, request: Request, credential: Credential) -> tuple[str, ...]:
        """The event types to filter by. Raises Forbidden when an API key is not for all of them."""
        types = _names(request, "types")
        for type_ in types:
            identifiers.identifier(type_, "event type")
            if "*" in type_[:-1]:
                raise BadRequest("types: '*' may only stand at the end of a type")
        self._permit(credential, types)
        return types

    def _permit(self, credential: Credential, types: tuple[str, ...], *rooms: str) -> None:
        for type_ in types or ("*",):
            scopes.permit(credential.key, type_, *rooms)

    async def _enter(self, caller: Caller, room_id: str) -> None:
        """Check that the caller is in the room. Raises Forbidden, or what the homeserver says."""
        answer = await self._homeserver.read_state(caller.token, room_id, "m.room.member", caller.user_id, "")
        if answers.success(answer).get("membership") != "join":
            standing = await self._rooms.standing(caller, room_id)
            raise Forbidden(str(standing) or f"{caller.user_id} is not in this room: join it first")

    async def _stream(
        self, request: Request, credential: Credential, caller: Caller, wanted: EventFilter, since: Position | None
    ) -> Response:
        request.scope[LOG] = {"user": caller.user_id}
        if request.method == "HEAD":
            return Response(headers=HEADERS, media_type=MEDIA_TYPE)
        listener = await self._live.listen(caller, wanted, since)
        return EventStream(listener, partial(self._callers.revoked, credential.key) if credential.key else None)


def _filter(request: Request, caller: Caller, types: tuple[str, ...], rooms: frozenset[str] | None) -> EventFilter:
    not_senders = {identifiers.identifier(sender, "user id") for sender in _names(request, "not_senders")}
    own = request.query_params.get("own", "").strip().lower() or "true"
    if own not in ("true", "false"):
        raise BadRequest("own: it is 'true' or 'false'")
    if own == "false":
        not_senders.add(caller.user_id)
    return EventFilter(rooms, types, frozenset(not_senders))


def _names(request: Request, name: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas; blank ones do not count."""
    parts = ",".join(request.query_params.getlist(name)).split(",")
    names = tuple(stripped for part in parts if (stripped := part.strip()))
    if len(names) > MAX_NAMES:
        raise BadRequest(f"{name}: at most {MAX_NAMES} can be named")
    return names


def _position(request: Request) -> Position | None:
    """Where to resume. A browser that reconnects sends a header, which wins over the query that it began with."""
    text = request.headers.get("last-event-id", "").strip() or request.query_params.get("last_event_id", "").strip()
    if not text:
        return None
    found = position.parse(text)
    since, until = (
        identifiers.stream_token(identifiers.token(part, "Last-Event-ID")) for part in (found.since, found.until)
    )
    return replace(found, since=since, until=until)


async def choice(
    types: Annotated[
        str, query("Only these event types, separated by commas; `m.room.*` stands for a prefix.", "m.room.message")
    ] = "",
    not_senders: Annotated[str, query("No events of these users, separated by commas.", "@noisy:localhost")] = "",
    own: Annotated[
        str, query("`false`: no events of the account itself, so that a bot does not answer itself.", "false")
    ] = "",
    last_event_id: Annotated[str, query("As `Last-Event-ID`, for a client that cannot set headers.")] = "",
    last: Annotated[
        str,
        Header(
            alias="Last-Event-ID",
            description="The `id` of the last message that was read. Takes precedence over `last_event_id`.",
            max_length=8192,
        ),
    ] = "",
) -> None: ...


def routes(core: Core) -> list[Route]:
    handlers = Listening(core)

    def get(path: str, handler: Handler, operation: str, *uses: Any) -> Route:
        return RawRoute(
            "GET",
            (path,),
            handler,
            operation,
            tag=TAGS["flow"],
            uses=[credential, *uses, choice],
            ok="A stream without end.",
            response_class=Response,
            extra={"responses": {"200": {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}}},
        )

    return [
        get("/live", handlers.everywhere, "live"),
        get("/rooms/{roomId}/live", handlers.room, "roomLive", room),
    ]
