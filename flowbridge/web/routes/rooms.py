"""Rooms: which there are, making them, and being in them or not, on both surfaces."""

from typing import Annotated, Any, Literal, Required

from fastapi import Depends
from pydantic import AfterValidator, FailFast, Field
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.homeserver import identifiers
from flowbridge.models import Caller as Account
from flowbridge.services.rooms import Action
from flowbridge.web.body import JsonBody, Texts, matrix_object
from flowbridge.web.dependencies import ROOM, Caller, LogLine, PassedOn, Room, TheCore, segment
from flowbridge.web.endpoint import json_answer
from flowbridge.web.parameters import query
from flowbridge.web.routing import Routes

Json = dict[str, Any]


def _not_made_by_hand(event_type: str) -> str:
    """Synapse answers 500 to the event that it makes itself."""
    if event_type == "m.room.create":
        raise ValueError("must not be m.room.create, which the homeserver makes: use creation_content")
    return event_type


@matrix_object()
class ThirdParty(TypedDict):
    medium: str
    address: str
    id_server: str
    id_access_token: str


@matrix_object()
class InitialContent(TypedDict, total=False):
    """The content of a state event."""

    membership: str  # Synapse answers 500 to one of another type, whatever the event's own


@matrix_object()
class InitialEvent(TypedDict, total=False):
    type: Required[Annotated[str, AfterValidator(_not_made_by_hand), Field(examples=["m.room.guest_access"])]]
    content: Required[InitialContent]
    state_key: str


@matrix_object({"room_alias_name": "tutorial"})
class NewRoom(TypedDict, total=False):
    room_alias_name: Annotated[str, Field(description="What stands before the colon of the room's alias.")]
    name: str
    topic: str
    visibility: Annotated[str, Field(examples=["public", "private"])]
    preset: Annotated[str, Field(examples=["private_chat", "public_chat", "trusted_private_chat"])]
    room_version: str
    invite: Texts
    invite_3pid: Annotated[list[ThirdParty], FailFast()]
    initial_state: Annotated[list[InitialEvent], FailFast()]
    creation_content: Json
    power_level_content_override: Json
    is_direct: bool


@matrix_object()
class Signed(TypedDict):
    sender: str
    mxid: str
    token: str
    signatures: Json


@matrix_object({"user_id": "@myfriend:localhost"})
class Membership(TypedDict, total=False):
    user_id: Annotated[str, Field(description="Another user; of no use where it is one's own membership.")]
    reason: str
    displayname: str
    avatar_url: str
    medium: str
    address: str
    id_server: str
    id_access_token: str
    third_party_signed: Signed


@matrix_object({"reason": "on duty again"})
class OwnMembership(Membership):
    """Of the caller."""


class RoomId(TypedDict):
    room_id: Annotated[str, Field(examples=[ROOM])]


class CreatedRoom(RoomId, total=False):
    """The room, and its alias when one was asked for."""

    room_alias: Annotated[str, Field(examples=["#tutorial:localhost"])]


class JoinedRoom(RoomId, total=False):
    name: str
    canonical_alias: str
    encrypted: Annotated[bool, Field(description="Only, and `true`, of an encrypted room.")]


class InvitedRoom(RoomId, total=False):
    """A room that the caller is invited to; its name and alias are what the inviter's server says."""

    name: str
    canonical_alias: str
    inviter: Annotated[str, Field(examples=["@myfriend:localhost"])]


class JoinedRooms(TypedDict):
    """The rooms that the caller has joined, by name; of an API key with rooms, those. And its open invitations."""

    rooms: list[JoinedRoom]
    invitations: list[InvitedRoom]
    encrypted_rooms: Annotated[
        Literal["refuse", "allow", "encrypt"],
        Field(description="What becomes of plain text for an encrypted room: `FLOWBRIDGE_ENCRYPTED_ROOMS`."),
    ]


routes = Routes()

_KEYS = "An API key acts as the bot, in the rooms of its scopes; membership is the event type `m.room.member`."
_JOINING_KEYS = (
    "An API key acts as the bot: one that names rooms may join these, any other needs the event type `m.room.member`."
)
_CHANGES: dict[Action, str] = {
    "join": "Join a room",
    "invite": "Invite a user",
    "leave": "Leave a room, or refuse an invitation",
    "kick": "Remove a user",
    "ban": "Ban a user",
    "unban": "Let a banned user come back",
}


async def room_or_alias(
    raw: Annotated[
        str,
        segment(
            "roomIdOrAlias",
            "A room id, with or without `:server`, or an alias `#name:server`. Percent-encoded or raw.",
            "#tutorial:localhost",
        ),
    ],
) -> str:
    return identifiers.room(raw)


async def servers(
    server_name: Annotated[
        list[str], query("A server to join by; may be there several times.", ["example.org"], default_factory=list)
    ],
    via: Annotated[list[str], query("The same, by its newer name.", ["example.org"], default_factory=list)],
) -> None:
    """For the document: the homeserver reads them."""


@routes.flow("GET", "/rooms", "flow_read_rooms", errors=[413], answers=JoinedRooms)
async def joined(core: TheCore, credential: Caller) -> Response:
    """Where the caller is, and where it is invited

    The bot takes invitations by itself, as `FLOWBRIDGE_AUTO_JOIN` says; any other is taken with
    `POST /join/{roomIdOrAlias}`.
    """
    return Response(await core.history.rooms(credential), media_type="application/json")


@routes.flow("POST", "/rooms", "flow_createRooms", answers=CreatedRoom)
@routes.both("POST", "/createRoom", "createRoom", answers=CreatedRoom)
async def create(
    core: TheCore, credential: Caller, query: PassedOn, body: Annotated[Json, Depends(JsonBody(NewRoom))], line: LogLine
) -> Response:
    """Make a room

    An API key needs `admin`, and no limits, and makes it as the bot.
    """
    return _answer(line, *await core.rooms.create(credential, body, query))


@routes.both("POST", "/join/{roomIdOrAlias}", "join", uses=[servers], answers=RoomId)
async def join(
    core: TheCore,
    credential: Caller,
    room: Annotated[str, Depends(room_or_alias)],
    query: PassedOn,
    body: Annotated[Json, Depends(JsonBody(OwnMembership))],
    line: LogLine,
) -> Response:
    """Join a room by its id or an alias

    Joining a room that one is in does nothing. An API key acts as the bot: one that names rooms may join these, any
    other needs the event type `m.room.member`.
    """
    return _answer(line, *await core.rooms.change(credential, room, "join", body, query))


def _change(action: Action, summary: str) -> None:
    """POST …/rooms/{roomId}/{action}"""
    shape = OwnMembership if action in ("join", "leave") else Membership

    async def change(
        core: TheCore,
        credential: Caller,
        room: Room,
        query: PassedOn,
        body: Annotated[Json, Depends(JsonBody(shape))],
        line: LogLine,
    ) -> Response:
        return _answer(line, *await core.rooms.change(credential, room, action, body, query))

    change.__doc__ = f"{summary}\n\n{_JOINING_KEYS if action == 'join' else _KEYS}"
    register = routes.both(
        "POST",
        f"/rooms/{{roomId}}/{action}",
        f"room_{action}",
        uses=[servers] if action == "join" else [],
        answers=RoomId if action == "join" else Json,
    )
    register(change)


for _action, _summary in _CHANGES.items():
    _change(_action, _summary)


def _answer(line: Json, caller: Account, found: Json) -> Response:
    line["user"] = caller.user_id
    return json_answer(found)
