"""Reading rooms and what happens in them, on both surfaces; `initialSync` and `events` as the old guide has them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from fastapi import Depends
from pydantic import AfterValidator, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.errors import BadRequest, MatrixError
from flowbridge.events import canonical_json
from flowbridge.homeserver import identifiers
from flowbridge.web import parameters, streaming
from flowbridge.web.dependencies import ROOM, Caller, IsFirstApi, Room, TheCore
from flowbridge.web.parameters import Text, WholeNumber, query
from flowbridge.web.routing import Routes

T = TypeVar("T")
Json = dict[str, Any]

DEFAULT_LIMIT = 10  # events of a room
MAX_LIMIT = 1_000
POLL_MILLISECONDS = 30_000  # that `events` waits unless told otherwise: as Synapse's own did
MAX_POLL_MILLISECONDS = 300_000

_LISTS = frozenset(f"{no}{what}" for what in ("types", "senders", "rooms") for no in ("", "not_"))

Events = list[Json]
Reader = Callable[[str, Mapping[str, str]], Awaitable[Response]]
Token = Annotated[
    str, Field(description="A place in the stream: for `from` of events and messages, `since` of a sync.")
]


class Messages(TypedDict):
    """Events in order, from `start` to `end`."""

    chunk: Events
    start: Token
    end: Token


class RoomSnapshot(TypedDict):
    """The state and the newest events of a room."""

    room_id: str
    membership: NotRequired[Literal["join", "invite", "leave"]]
    visibility: NotRequired[Literal["public", "private"]]
    messages: NotRequired[Messages]
    state: NotRequired[Events]
    account_data: NotRequired[Events]
    inviter: NotRequired[str]
    invite: NotRequired[Annotated[Json, Field(description="The event that invites, with `invite_room_state`.")]]
    presence: NotRequired[Events]
    receipts: NotRequired[Events]


class Snapshot(TypedDict):
    """The rooms that the caller is in or invited to."""

    end: Token
    presence: Events
    rooms: list[RoomSnapshot]
    receipts: NotRequired[Events]
    account_data: NotRequired[Events]


class Members(TypedDict):
    """The m.room.member events."""

    chunk: Events


class JoinedMembers(TypedDict):
    """Display names and pictures by user id."""

    joined: Json


class Page(TypedDict):
    """A page of events. `end` is the `from` of the next one; where there is none, there is no more."""

    chunk: Events
    start: NotRequired[Token]
    end: NotRequired[Token]
    state: NotRequired[Events]


def _token(name: str) -> AfterValidator:
    return AfterValidator(lambda text: identifiers.token(text, name))


def _filter(text: str) -> str:
    """The specification's RoomEventFilter, as far as Synapse answers a 500 for what is wrong with it."""
    if not text:
        return ""
    try:
        found = canonical_json.read(text.encode())
    except BadRequest as error:
        raise BadRequest(f"filter: {error.error}") from None
    if not found.clean or not isinstance(found.value, dict):
        raise BadRequest("filter: it is not a JSON object as Matrix defines filters")
    for name in _LISTS & found.value.keys():
        names = found.value[name]
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise BadRequest(f"filter: {name} is not a list of strings")
    return canonical_json.write(found.value).decode()


async def reader(request: Request, core: TheCore, credential: Caller, room: Room, is_first_api: IsFirstApi) -> Reader:
    """What answers with one of the homeserver's own lists of a room."""

    async def read(what: str, query: Mapping[str, str]) -> Response:
        # The flow surface has refused all other parameters; on the Matrix surface they go on to the homeserver.
        given = {name: text for name, text in query.items() if text}
        given = {**dict(parameters.others(request, credential, *query)), **given}
        return _answer(await core.history.page(credential, room, what, given, old=is_first_api))

    return read


Read = Annotated[Reader, Depends(reader)]
Newest = Annotated[WholeNumber, query("How many of the newest events of each room; 100 at most.", 1)]
routes = Routes()


@routes.both("GET", "/initialSync", "read_initialSync", answers=Snapshot, errors=[413])
async def initial_sync(
    request: Request,
    core: TheCore,
    credential: Caller,
    limit: Newest = DEFAULT_LIMIT,
    archived: Annotated[Literal["true", "false"], query("`true`: the rooms that the caller has left, too.")] = "false",
) -> Response:
    """All rooms at once

    Events have the guide's `ts`, `user_id`, `age` and, for members, `membership` beside today's fields. `end` is where
    `GET /events` goes on. An API key must be for all rooms and all event types.
    """
    if parameters.acts_as_another(request):
        return await _as_another(request)
    found = await core.history.snapshot(credential, min(limit, MAX_LIMIT), archived=archived == "true")
    return _answer(found)


@routes.both("GET", "/rooms/{roomId}/initialSync", "read_room_initialSync", answers=RoomSnapshot, errors=[413])
async def room_initial_sync(
    request: Request, core: TheCore, credential: Caller, room: Room, limit: Newest = DEFAULT_LIMIT
) -> Response:
    """One room at once

    Events have the guide's `ts`, `user_id`, `age` and, for members, `membership` beside today's fields.
    """
    if parameters.acts_as_another(request):
        return await _as_another(request)
    return _answer(await core.history.room_snapshot(credential, room, min(limit, MAX_LIMIT)))


@routes.both("GET", "/events", "read_events", answers=Messages, errors=[413])
async def events(
    request: Request,
    core: TheCore,
    credential: Caller,
    since: Annotated[
        Text,
        _token("from"),
        query("The `end` of the answer before, or of an initialSync. Default: now.", "s39_18_0", alias="from"),
    ] = "",
    timeout: Annotated[  # noqa: ASYNC109 (a parameter of the old guide's)
        WholeNumber, query("Milliseconds to wait for something to happen; 0 does not wait, 300,000 at most.")
    ] = POLL_MILLISECONDS,
    room_id: Annotated[Text, query("Only what happens in this room, which the caller must be in.", ROOM)] = "",
) -> Response:
    """Wait for events

    Events have the guide's `ts`, `user_id`, `age` and, for members, `membership` beside today's fields. Ask again with
    `from` set to the answer's `end`. Without `room_id` an API key must be for all rooms and all event types.
    """
    if parameters.acts_as_another(request):
        return await _as_another(request)
    if room_id:
        identifiers.room(room_id)
    seconds = min(timeout, MAX_POLL_MILLISECONDS) / 1000
    working = core.history.events(credential, "" if since == "END" else since, seconds, room_id)
    over = core.callers.revoked(credential.key) if credential.key is not None else None
    return _answer(await _unless_gone(request, working, over))


@routes.both("GET", "/rooms/{roomId}/members", "read_members", answers=Members, errors=[413])
async def members(
    read: Read,
    membership: Annotated[Text, query("Only these: join, invite, leave, ban or knock.", "join")] = "",
    not_membership: Annotated[Text, query("All but these.", "leave")] = "",
    at: Annotated[Text, _token("at"), query("As of this token.", "s39_18_0")] = "",
) -> Response:
    """The members of a room"""
    return await read("members", {"membership": membership, "not_membership": not_membership, "at": at})


@routes.matrix(
    "GET", "/rooms/{roomId}/joined_members", "matrix_read_joined_members", answers=JoinedMembers, errors=[413]
)
async def joined_members(read: Read) -> Response:
    """Who is in a room"""
    return await read("joined_members", {})


@routes.both("GET", "/rooms/{roomId}/state", "read_state", answers=Events, errors=[413], ok="Its state events.")
async def state(read: Read) -> Response:
    """All state of a room"""
    return await read("state", {})


@routes.both("GET", "/rooms/{roomId}/messages", "read_messages", answers=Page, errors=[413])
async def messages(
    read: Read,
    since: Annotated[
        Text,
        _token("from"),
        query(
            "The `end` of the page before. Default: the end of the room, or its beginning.", "t1-11_18_0", alias="from"
        ),
    ] = "",
    until: Annotated[Text, _token("to"), query("Where to stop.", "s39_18_0", alias="to")] = "",
    direction: Annotated[Literal["b", "f"], query("`b`: the newest first; `f`: the oldest first.", alias="dir")] = "b",
    limit: Annotated[WholeNumber, query("How many events of a room; 1,000 at most.")] = DEFAULT_LIMIT,
    filter_: Annotated[
        str,
        AfterValidator(_filter),
        query("A RoomEventFilter of the specification, in JSON.", '{"types":["m.room.message"]}', alias="filter"),
    ] = "",
) -> Response:
    """The history of a room"""
    ends = ("END", "START") if direction == "b" else ("START", "END")  # what clients once said for "all"
    query = {
        "from": "" if since == ends[0] else since,
        "to": "" if until == ends[1] else until,
        "dir": direction,
        "limit": str(min(limit, MAX_LIMIT)),
        "filter": filter_,
    }
    return await read("messages", query)


async def _as_another(request: Request) -> Response:
    """What the homeserver answers to an application service that says as whom it asks.

    What the bridge makes of several answers it makes for the account of a token alone.
    """
    answer: Response = await request.app.relaying.relay(request)
    answer.background = None  # FastAPI asks, and it is no response that Starlette made
    return answer


def _answer(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def _unless_gone(
    request: Request, work: Coroutine[None, None, T], over: Coroutine[None, None, MatrixError] | None
) -> T:
    """What the work brings; it is given up when the caller hangs up, or when it is over.

    Raises ClientDisconnect, or the error that `over` returns.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(streaming.left(request.receive))
    ending = asyncio.ensure_future(over) if over is not None else None
    awaited: set[asyncio.Future[Any]] = {working, gone} if ending is None else {working, gone, ending}
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if ending is not None and ending.done():
            raise ending.result()
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for one in awaited:
            one.cancel()
