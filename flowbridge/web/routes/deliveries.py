"""The delivery log: list, show, replay, delete."""

import re
from functools import partial
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.bridge import Core
from flowbridge.delivery.waiting import waiting
from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers
from flowbridge.services.deliveries import Deliveries, Viewer
from flowbridge.services.delivery_views import moment, states
from flowbridge.store.delivery_log import Selection
from flowbridge.web import describe
from flowbridge.web.endpoint import LOG, Endpoint, endpoint, headers_of, json_answer

MAX_LIMIT = 200
DEFAULT_LIMIT = 50

_PARAMETERS = frozenset({"state", "room_id", "event_type", "since", "until", "limit", "cursor"})
_LIMIT = re.compile(r"[0-9]{1,3}")
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # there is content in these answers


class Log:
    def __init__(self, core: Core) -> None:
        worker = core.worker
        self._callers = core.callers
        self._deliveries = Deliveries(
            core.database,
            core.callers,
            core.tokens,
            core.room_access,
            core.replays,
            cancel=worker.cancel,
            wake=worker.wake,
            amended=core.write_queue.amended,
            waiting=partial(waiting, core.account_limits, core.breaker),
            readings=core.readings,
        )

    async def index(self, request: Request) -> Response:
        """GET /deliveries"""
        viewer = await self._viewer(request)
        given = _parameters(request.scope["query_string"])
        limit, cursor = _limit(given.get("limit", "")), given.get("cursor", "")
        page = await self._deliveries.page(viewer, _selection(given), limit, cursor)
        return json_answer(page, headers=_HEADERS)

    async def show(self, request: Request) -> Response:
        """GET /deliveries/{deliveryId}"""
        viewer = await self._viewer(request)
        return json_answer(await self._deliveries.get(viewer, _delivery(request)), headers=_HEADERS)

    async def replay(self, request: Request) -> Response:
        """POST /deliveries/{deliveryId}/replay?overwrite="""
        viewer = await self._viewer(request)
        delivery = _delivery(request)
        await self._deliveries.replay(viewer, delivery, overwrite=_overwrite(request))
        answer = {"delivery_id": delivery, "status": "queued"}
        return json_answer(answer, 202, {"Location": f"/deliveries/{delivery}"})

    async def remove(self, request: Request) -> Response:
        """DELETE /deliveries/{deliveryId}"""
        viewer = await self._viewer(request)
        await self._deliveries.remove(viewer, _delivery(request))
        return json_answer({})

    async def _viewer(self, request: Request) -> Viewer:
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        viewer = await self._deliveries.viewer(credential)
        request.scope[LOG] = {"user": viewer.name}
        return viewer


def _delivery(request: Request) -> str:
    return unquote(request.path_params["deliveryId"])


def _overwrite(request: Request) -> bool:
    text = request.query_params.get("overwrite", "").strip().lower() or "false"
    if text not in ("true", "false"):
        raise BadRequest("overwrite: it is 'true' or 'false'")
    return text == "true"


def _selection(given: dict[str, str]) -> Selection:
    room_id, event_type = given.get("room_id"), given.get("event_type")
    if room_id and not identifiers.identifier(room_id, "room_id").startswith("!"):
        raise BadRequest(f"room_id: {room_id!r} is not a room id, which begins with '!'")
    if event_type:
        identifiers.identifier(event_type, "event_type")
    return Selection(
        states=states(given.get("state", ""), "state"),
        room_id=room_id,
        event_type=event_type,
        since=moment(given["since"], "since") if "since" in given else None,
        until=moment(given["until"], "until") if "until" in given else None,
    )


def _limit(text: str) -> int:
    if not text:
        return DEFAULT_LIMIT
    if not _LIMIT.fullmatch(text) or not 1 <= int(text) <= MAX_LIMIT:
        raise BadRequest(f"limit: {text[:80]!r} is not a number from 1 to {MAX_LIMIT}")
    return int(text)


def _parameters(query: bytes) -> dict[str, str]:
    """The parameters that are known here and not blank; `state` may be there more than once."""
    found: dict[str, str] = {}
    # What is no UTF-8 becomes surrogates, which no parameter may hold.
    for name, value in parse_qsl(query.decode("utf-8", "surrogateescape"), errors="surrogateescape"):
        if name not in _PARAMETERS or not value.strip():
            continue
        if name in found and name != "state":
            raise BadRequest(f"{name}: it is there twice")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def routes(core: Core) -> list[Endpoint]:
    handlers = Log(core)
    one = "/deliveries/{deliveryId}"
    return [
        endpoint("GET", "/deliveries", handlers.index, describe.DELIVERIES),
        endpoint("GET", one, handlers.show, describe.DELIVERY),
        endpoint("POST", f"{one}/replay", handlers.replay, describe.REPLAY),
        endpoint("DELETE", one, handlers.remove, describe.DELETE_DELIVERY),
    ]
