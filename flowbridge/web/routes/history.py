"""Reading rooms and what happens in them, on both surfaces; `initialSync` and `events` as the old guide has them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import BadRequest, MatrixError
from flowbridge.events import canonical_json
from flowbridge.homeserver import paths
from flowbridge.web import parameters, streaming
from flowbridge.web.endpoint import Endpoint, endpoint, headers_of
from flowbridge.web.routes import describe_reading
from flowbridge.web.routes.passthrough import Relaying
from flowbridge.web.routing import DIALECTS

T = TypeVar("T")

DEFAULT_LIMIT = 10  # events of a room
MAX_LIMIT = 1_000
POLL_SECONDS = 30.0  # that `events` waits unless told otherwise: as Synapse's own did
MAX_POLL_SECONDS = 300.0
MAX_PARAMETER = 4_096  # characters: tokens grow with the number of a homeserver's writers

_LISTS = frozenset(f"{no}{what}" for what in ("types", "senders", "rooms") for no in ("", "not_"))


class Reading:
    """The handlers. `old`: lists of members, messages and state have the old fields, too.

    `relaying`, on the Matrix surface: what the bridge makes for the account of a token, and not for the user as whom an
    application service acts, passes through then.
    """

    def __init__(self, core: Core, relaying: Relaying | None, *, old: bool) -> None:
        self._relaying = relaying
        self._callers = core.callers
        self._history = core.history
        self._old = old

    async def initial_sync(self, request: Request) -> Response:
        """GET …/initialSync?limit=&archived="""
        if passed := await self._as_another(request):
            return passed
        credential = await self._credential(request)
        limit = _number(request, "limit", DEFAULT_LIMIT, MAX_LIMIT)
        archived = _choice(request, "archived", "false", ("true", "false")) == "true"
        return _answer(await self._history.snapshot(credential, limit, archived=archived))

    async def room_initial_sync(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/initialSync?limit="""
        if passed := await self._as_another(request):
            return passed
        credential = await self._credential(request)
        room = paths.room(request.path_params["roomId"])
        limit = _number(request, "limit", DEFAULT_LIMIT, MAX_LIMIT)
        return _answer(await self._history.room_snapshot(credential, room, limit))

    async def events(self, request: Request) -> Response:
        """GET …/events?from=&timeout=&room_id=, timeout in milliseconds"""
        if passed := await self._as_another(request):
            return passed
        credential = await self._credential(request)
        since = _token(request, "from")
        seconds = _number(request, "timeout", int(POLL_SECONDS * 1000), int(MAX_POLL_SECONDS * 1000)) / 1000
        room = _text(request, "room_id")
        if room:
            paths.room(room)
        working = self._history.events(credential, "" if since == "END" else since, seconds, room)
        over = self._callers.revoked(credential.key) if credential.key is not None else None
        return _answer(await _unless_gone(request, working, over))

    async def members(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/members?membership=&not_membership=&at="""
        query = {name: _text(request, name) for name in ("membership", "not_membership")}
        return await self._page(request, "members", {**query, "at": _token(request, "at")})

    async def joined_members(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/joined_members"""
        return await self._page(request, "joined_members", {})

    async def state(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/state"""
        return await self._page(request, "state", {})

    async def messages(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/messages?from=&to=&dir=&limit=&filter=

        Without `dir` the newest come first; `from=END` and `to=START` are what clients once said for "all".
        """
        since, until = _token(request, "from"), _token(request, "to")
        dir_ = _choice(request, "dir", "b", ("b", "f"))
        ends = ("END", "START") if dir_ == "b" else ("START", "END")
        query = {
            "from": "" if since == ends[0] else since,
            "to": "" if until == ends[1] else until,
            "dir": dir_,
            "limit": str(_number(request, "limit", DEFAULT_LIMIT, MAX_LIMIT)),
            "filter": _filter(request.query_params.get("filter", "")),
        }
        return await self._page(request, "messages", query)

    async def _page(self, request: Request, what: str, query: dict[str, str]) -> Response:
        credential = await self._credential(request)
        room = paths.room(request.path_params["roomId"])
        # Nothing else reaches this on the flow surface, where other parameters are refused.
        given = {name: text for name, text in query.items() if text}
        given = {**dict(parameters.others(request, credential, *query)), **given}
        return _answer(await self._history.page(credential, room, what, given, old=self._old))

    async def _as_another(self, request: Request) -> Response | None:
        """What the homeserver answers to an application service that says as whom it asks; None for other callers."""
        if self._relaying is None or not parameters.acts_as_another(request):
            return None
        return await self._relaying.relay(request)

    async def _credential(self, request: Request) -> Credential:
        return await self._callers.credential(headers_of(request), request.scope["query_string"])


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


def _text(request: Request, name: str) -> str:
    """A parameter; a blank one counts as absent."""
    text = request.query_params.get(name, "")
    if len(text) > MAX_PARAMETER or not text.isprintable():
        raise BadRequest(f"{name}: it is longer than {MAX_PARAMETER} characters, or holds a control character")
    return text


def _token(request: Request, name: str) -> str:
    return paths.token(_text(request, name), name)


def _number(request: Request, name: str, default: int, most: int) -> int:
    """A whole number; one that is larger than the most counts as that."""
    text = _text(request, name)
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{name}: {text[:80]!r} is not a whole number")
    return min(int(text[:12]), most)


def _choice(request: Request, name: str, default: str, choices: tuple[str, ...]) -> str:
    text = _text(request, name) or default
    if text not in choices:
        raise BadRequest(f"{name}: {text[:80]!r} is none of {', '.join(choices)}")
    return text


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


def routes(core: Core, relaying: Relaying) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented: but for the old fields the others are the same."""
    flow = Reading(core, None, old=False)
    table = [
        ("/initialSync", flow.initial_sync),
        ("/events", flow.events),
        ("/rooms/{roomId}/initialSync", flow.room_initial_sync),
        ("/rooms/{roomId}/members", flow.members),
        ("/rooms/{roomId}/messages", flow.messages),
        ("/rooms/{roomId}/state", flow.state),
    ]
    found = [endpoint("GET", path, handler, describe_reading.of(path)) for path, handler in table]
    for name in DIALECTS:
        found += _matrix(
            f"/_matrix/client/{name}", Reading(core, relaying, old=name == "api/v1"), documented=name == "v3"
        )
    return found


def _matrix(prefix: str, handlers: Reading, *, documented: bool) -> list[Endpoint]:
    room = f"{prefix}/rooms/{{roomId}}"
    table = [
        (f"{prefix}/initialSync", handlers.initial_sync),
        (f"{prefix}/events", handlers.events),
        (f"{room}/initialSync", handlers.room_initial_sync),
        (f"{room}/members", handlers.members),
        (f"{room}/joined_members", handlers.joined_members),
        (f"{room}/messages", handlers.messages),
        (f"{room}/state", handlers.state),
    ]
    return [endpoint("GET", path, handler, describe_reading.of(path), documented=documented) for path, handler in table]
