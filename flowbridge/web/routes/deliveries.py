"""The delivery log: list, show, replay, delete."""

from collections import Counter
from typing import Annotated, Any, Literal, NotRequired
from urllib.parse import quote, unquote

from fastapi import Depends
from pydantic import BeforeValidator, Field, with_config
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers
from flowbridge.services.deliveries import Viewer
from flowbridge.services.delivery_views import deliveries, states, text
from flowbridge.services.delivery_views import since as moment_of
from flowbridge.store.delivery_log import Selection
from flowbridge.web.dependencies import ROOM, Caller, LogLine, TheCore, segment
from flowbridge.web.endpoint import json_answer
from flowbridge.web.parameters import DIGITS, Text, query
from flowbridge.web.routing import Routes, header

Json = dict[str, Any]

MAX_LIMIT = 200
DEFAULT_LIMIT = 50
LOCATION = header("The delivery: `/deliveries/{deliveryId}`.")

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # there is content in these answers

Id = Annotated[str, Field(examples=["KZbVxTqKq5mS0o3lPz9r_g1f"])]
Status = Literal["queued", "sent", "dead", "refused"]
Time = Annotated[
    str,
    Field(
        description="UTC, with milliseconds.",
        examples=["2026-11-22T10:00:00.000Z"],
        json_schema_extra={"format": "date-time"},
    ),
]


class Remarks(TypedDict):
    ignored: Annotated[list[str], Field(description="Keys beside `payload` or `content` that have no effect.")]


class Accepted(TypedDict):
    """The event is queued."""

    delivery_id: Id
    status: Status
    flowbridge: NotRequired[Remarks]


class Refusal(TypedDict):
    """The homeserver's answer; of a refused call, the bridge's."""

    status: int
    errcode: str
    error: str


class Waiting(TypedDict):
    """What a queued event waits for: the homeserver, its account, an invitation, older events."""

    reason: Annotated[str, Field(description="For people to read.")]
    until: NotRequired[Annotated[Time, Field(description="When it is tried again, where that is known.")]]
    behind: NotRequired[Annotated[Id, Field(description="The first event of the room, while that is another one.")]]


class Delivery(TypedDict):
    delivery_id: Id
    status: Status
    room_id: str
    event_type: str
    state_key: NotRequired[Annotated[str, Field(description="Only of a state event.")]]
    event_id: NotRequired[Annotated[str, Field(description="Once it is sent.")]]
    error: NotRequired[Annotated[Refusal, Field(description="Why it is dead, or was refused.")]]
    attempts: Annotated[int, Field(ge=0, description="Since it was accepted, or replayed.")]
    accepted_at: NotRequired[
        Annotated[Time, Field(description="When it was accepted, or replayed. A refused call has `refused_at`.")]
    ]
    settled_at: NotRequired[Annotated[Time, Field(description="When it was sent, or died.")]]
    user_id: NotRequired[Annotated[str, Field(description="Whose account it is sent with.")]]
    api_key: NotRequired[Annotated[str, Field(description="The id of the API key that sent it.")]]
    hook: NotRequired[Annotated[str, Field(description="The name of the hook that it came by.")]]
    key: NotRequired[Annotated[str, Field(description="The caller's `Idempotency-Key` or txnId.")]]
    waiting: NotRequired[Annotated[Waiting, Field(description="Only while it is queued.")]]
    refused_at: NotRequired[Annotated[Time, Field(description="When the call was refused.")]]
    last_refused_at: NotRequired[Annotated[Time, Field(description="Of several calls alike: when the last one was.")]]
    count: NotRequired[Annotated[int, Field(ge=1, description="How many calls alike were refused.")]]
    address: NotRequired[Annotated[str, Field(description="Where a refused call came from.")]]


class Deliveries(TypedDict):
    """A page of the log."""

    deliveries: list[Delivery]
    next: NotRequired[Annotated[str, Field(description="The `cursor` of the following page; the last page has none.")]]


class StoredEvent(TypedDict):
    type: str
    content: Annotated[Json, Field(description="As it is sent.")]
    state_key: NotRequired[str]


class Replay(TypedDict):
    """What the delivery was before."""

    by: Annotated[str, Field(description="A user id, `key:` and a key's id, or `cli:` and a name.")]
    status: Literal["sent", "dead"]
    event_id: NotRequired[str]
    txn_id: str
    accepted_at: Time


class HistoryEntry(TypedDict):
    time: Time
    milliseconds: NotRequired[Annotated[int, Field(ge=0, description="How long the attempt took.")]]
    status: NotRequired[Annotated[int, Field(description="The homeserver's answer to the attempt.")]]
    errcode: NotRequired[str]
    error: NotRequired[str]
    note: NotRequired[Annotated[str, Field(description="What a message could not be as it was asked for.")]]
    replayed: NotRequired[Replay]


class DeliveryDetail(Delivery):
    """The request as it came, the event as it is sent, and every attempt. A refused call has none of them."""

    request: NotRequired[
        Annotated[
            str,
            Field(
                description="The body as it came, if that is kept: `FLOWBRIDGE_KEEP_CONTENTS`, `_KEEP_CONTENT_DAYS`."
            ),
        ]
    ]
    event: NotRequired[StoredEvent]
    txn_id: NotRequired[
        Annotated[str, Field(description="Under which the homeserver knows it; a replay has a new one.")]
    ]
    history: NotRequired[
        Annotated[list[HistoryEntry], Field(description="The last attempts and replays, the oldest first.")]
    ]


@with_config(extra="forbid")
class Nothing(TypedDict):
    pass


routes = Routes("Deliveries")


async def viewer(core: TheCore, credential: Caller, line: LogLine) -> Viewer:
    found = await core.deliveries.viewer(credential)
    line["user"] = found.name
    return found


async def delivery_id(
    raw: Annotated[
        str,
        segment("deliveryId", "As `Flowbridge-Delivery` and a 202 name it.", "KZbVxTqKq5mS0o3lPz9r_g1f", maxLength=128),
    ],
) -> str:
    return unquote(raw)


async def selection(
    request: Request,
    core: TheCore,
    viewer: Annotated[Viewer, Depends(viewer)],
    state: Annotated[
        list[str],
        query("`sent`, `queued`, `dead`, `refused`; several with commas, or repeated.", ["dead"], default_factory=list),
    ],
    names: Annotated[
        list[str],
        query("These, by their ids; 100 at most.", ["KZbVxTqKq5mS0o3lPz9r_g1f"], alias="id", default_factory=list),
    ],
    room: Annotated[Text, query("A room id, or an alias `#name:server`.", ROOM)] = "",
    type_: Annotated[Text, query("An event type.", "m.room.message", alias="type")] = "",
    key: Annotated[
        Text, query("The `Idempotency-Key` or txnId that the caller sent, as it is.", "order-17-shipped")
    ] = "",
    hook: Annotated[Text, query("The name of the hook that it came by.", "ci")] = "",
    since: Annotated[
        str,
        query(
            "Accepted then or later: ISO 8601 (UTC where it has no offset), so long ago (`2h`, `7d`), or seconds since "
            "1970.",
            "2026-11-22T10:00:00Z",
        ),
    ] = "",
    until: Annotated[str, query("Accepted before then, as `since`.", "2026-11-22T12:00:00+01:00")] = "",
    q: Annotated[Text, query("Part of the content, capital or small letters (of ASCII) alike.", "backup")] = "",
    room_id: Annotated[Text, query("An older name of `room`.")] = "",
    event_type: Annotated[Text, query("An older name of `type`.")] = "",
) -> Selection:
    for name, number in Counter(name for name, _ in request.query_params.multi_items()).items():
        if number > 1 and name not in ("state", "id"):
            raise BadRequest(f"{name}: it is there twice")
    if (room and room_id) or (type_ and event_type):
        raise BadRequest("room_id and event_type are older names of room and type: send one of the two")
    named = _room(room, "room") or _room(room_id, "room_id")
    return Selection(
        names=deliveries(",".join(names), "id"),
        states=states(",".join(state), "state"),
        room_id=await core.deliveries.room(viewer, named, "room" if room else "room_id") if named else None,
        alias=named if named.startswith("#") else None,
        event_type=(_type(type_, "type") or _type(event_type, "event_type")) or None,
        since=moment_of(since, "since") if since else None,
        until=moment_of(until, "until") if until else None,
        key=identifiers.identifier(key, "key") if key else None,
        hook=identifiers.identifier(hook, "hook") if hook else None,
        text=text(q, "q") if q else None,
    )


def _type(event_type: str, name: str) -> str:
    return identifiers.identifier(event_type, name) if event_type else ""


def _room(room: str, name: str) -> str:
    try:
        return identifiers.room(quote(room)) if room else ""
    except BadRequest as error:
        raise BadRequest(f"{name}: {error.error}") from None


TheViewer = Annotated[Viewer, Depends(viewer)]
DeliveryId = Annotated[str, Depends(delivery_id)]


@routes.flow("GET", "/deliveries", "deliveries", answers=Deliveries)
async def index(
    core: TheCore,
    viewer: TheViewer,
    selection: Annotated[Selection, Depends(selection)],
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT), DIGITS, query("How many at most.")] = DEFAULT_LIMIT,
    cursor: Annotated[
        str, query("The `next` of the page before; the other parameters stay as they were.", "AAAAAAAAAGQ")
    ] = "",
) -> Response:
    """What became of events

    A key with `admin` sees all deliveries in its rooms and of its event types, another key those that it sent, a Matrix
    token those that its user sent. A key made for users (`--user`) also sees what these sent by themselves. The newest
    first. Calls that were refused (4xx) are among them, without their bodies; those without a known key or token only a
    key with `admin` and no limits sees.

    A search that takes longer than some seconds is answered with what it has found: as long as there is a `next`, it
    goes on there, even after an empty page.
    """
    return json_answer(await core.deliveries.page(viewer, selection, limit, cursor), headers=_HEADERS)


@routes.flow("GET", "/deliveries/{deliveryId}", "delivery", answers=DeliveryDetail)
async def show(core: TheCore, viewer: TheViewer, delivery: DeliveryId) -> Response:
    """All about one delivery

    Who sees it in the list sees it here. That of another caller is a 404, as is one that never was.
    """
    return json_answer(await core.deliveries.get(viewer, delivery), headers=_HEADERS)


@routes.flow(
    "POST",
    "/deliveries/{deliveryId}/replay",
    "replay",
    errors=[409],
    status=202,
    answers=Accepted,
    extra={"responses": {"202": {"headers": {"Location": LOCATION}}}},
)
async def replay(
    core: TheCore,
    viewer: TheViewer,
    delivery: DeliveryId,
    overwrite: Annotated[
        Literal["true", "false"],
        BeforeValidator(lambda text: text.strip().lower()),
        query("`true`: send a state event whatever has been set since."),
    ] = "false",
) -> Response:
    """Send a settled event again

    Of a dead letter, or once more of what was sent: the same delivery goes behind all that is queued for its room. What
    a Matrix user sent, only this user sends again, or a key that is made for the user. A state event whose room state
    has been set since is a 409, with `flowbridge.current`: what the room holds now. Where the homeserver cannot tell,
    this is a 503.
    """
    await core.deliveries.replay(viewer, delivery, overwrite=overwrite == "true")
    answer = {"delivery_id": delivery, "status": "queued"}
    return json_answer(answer, 202, {"Location": f"/deliveries/{delivery}"})


@routes.flow("DELETE", "/deliveries/{deliveryId}", "deleteDelivery", errors=[409], answers=Nothing)
async def remove(core: TheCore, viewer: TheViewer, delivery: DeliveryId) -> Response:
    """Delete a delivery

    One that is queued is given up, unless it is being sent. Nothing is taken out of the room: after an attempt without
    an answer the event may be there all the same. What a Matrix user sent, this user deletes, a key that is made for
    the user, or one with `admin` and no limits.
    """
    await core.deliveries.remove(viewer, delivery)
    return json_answer({})
