"""The OpenAPI operations of flowbridge.web.routes.rooms, in words."""

from typing import Any

from flowbridge.web.describe import ROOM, UPSTREAM, Operation, operation, parameter

_ERRORS = (400, 408, 413, 415, *UPSTREAM)
_KEYS = "An API key acts as the bot, in the rooms of its scopes; membership is the event type `m.room.member`."

_TEXT = {"type": "string"}
_ROOM_ID = {**_TEXT, "examples": [ROOM]}
_CREATE = {
    "room_alias_name": {**_TEXT, "description": "What stands before the colon of the room's alias."},
    "name": _TEXT,
    "topic": _TEXT,
    "visibility": {**_TEXT, "examples": ["public", "private"]},
    "preset": {**_TEXT, "examples": ["private_chat", "public_chat", "trusted_private_chat"]},
    "invite": {"type": "array", "items": _TEXT},
}
_SERVERS = [
    parameter("server_name", "A server to join by; may be there several times.", "example.org", "query"),
    parameter("via", "The same, by its newer name.", "example.org", "query"),
]
_WORDS = {
    "join": "Join a room",
    "invite": "Invite a user",
    "leave": "Leave a room, or refuse an invitation",
    "kick": "Remove a user",
    "ban": "Ban a user",
    "unban": "Let a banned user come back",
}


def create(path: str) -> Operation:
    surface, tag = _surface(path)
    return operation(
        f"{surface}_create{'Rooms' if path == '/rooms' else 'Room'}",
        tag,
        "Make a room",
        description="An API key needs `admin`, and no limits, and makes it as the bot.",
        ok="The room, and its alias when one was asked for.",
        answers=_json(["room_id"], room_id=_ROOM_ID, room_alias={**_TEXT, "examples": ["#tutorial:localhost"]}),
        errors=_ERRORS,
        body=_body(_CREATE, {"room_alias_name": "tutorial"}),
    )


def join(path: str) -> Operation:
    surface, tag = _surface(path)
    about = "A room id, with or without `:server`, or an alias `#name:server`. Percent-encoded or raw."
    return operation(
        f"{surface}_join",
        tag,
        "Join a room by its id or an alias",
        description=f"Joining a room that one is in does nothing. {_KEYS}",
        ok="The room.",
        answers=_json(["room_id"], room_id=_ROOM_ID),
        errors=_ERRORS,
        parameters=[
            parameter("roomIdOrAlias", about, "#tutorial:localhost"),
            *_SERVERS,
        ],
        body=_body({"reason": _TEXT}, {}),
    )


def change(path: str, action: str) -> Operation:
    surface, tag = _surface(path)
    about = "A room id, with or without `:server`, or an alias `#name:server`. Percent-encoded or raw."
    own = action in ("join", "leave")
    properties = {"reason": _TEXT} if own else {"user_id": _TEXT, "reason": _TEXT}
    return operation(
        f"{surface}_room_{action}",
        tag,
        _WORDS[action],
        description=_KEYS,
        ok="It is done.",
        answers=_json(["room_id"], room_id=_ROOM_ID) if action == "join" else _json([]),
        errors=_ERRORS,
        parameters=[parameter("roomId", about, ROOM), *(_SERVERS if action == "join" else [])],
        body=_body(properties, {} if own else {"user_id": "@myfriend:localhost"}),
    )


def _surface(path: str) -> tuple[str, str]:
    return ("matrix", "Matrix surface") if path.startswith("/_matrix/") else ("flow", "Flow surface")


def _json(required: list[str], /, **properties: Any) -> Operation:
    found: Operation = {"type": "object", "properties": properties}
    return {"application/json": {"schema": {**found, "required": required} if required else found}}


def _body(properties: Any, example: Any) -> Operation:
    found = {"schema": {"type": "object", "properties": properties}, "example": example}
    return {
        "description": "May be empty, or `null`. Content-Type is not looked at.",
        "content": {"application/json": found},
    }
