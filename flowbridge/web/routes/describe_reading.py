"""The OpenAPI operations of the reading routes, in words."""

from typing import Any

from flowbridge.web.describe import ROOM, UPSTREAM, Operation, as_json, operation, parameter

_TEXT = {"type": "string"}
_EVENTS = {"type": "array", "items": {"type": "object"}}
_TOKEN = {
    "type": "string",
    "description": "A place in the stream: for `from` of events and messages, `since` of a sync.",
}
_MESSAGES = {
    "type": "object",
    "required": ["chunk", "start", "end"],
    "properties": {"chunk": _EVENTS, "start": _TOKEN, "end": _TOKEN},
}
_ROOM = {
    "type": "object",
    "required": ["room_id"],
    "properties": {
        "room_id": _TEXT,
        "membership": {"enum": ["join", "invite", "leave"]},
        "visibility": {"enum": ["public", "private"]},
        "messages": _MESSAGES,
        "state": _EVENTS,
        "account_data": _EVENTS,
        "inviter": _TEXT,
        "invite": {"type": "object", "description": "The event that invites, with `invite_room_state`."},
        "presence": _EVENTS,
        "receipts": _EVENTS,
    },
}
_SNAPSHOT = {
    "type": "object",
    "required": ["end", "presence", "rooms"],
    "properties": {
        "end": _TOKEN,
        "presence": _EVENTS,
        "rooms": {"type": "array", "items": _ROOM},
        "receipts": _EVENTS,
        "account_data": _EVENTS,
    },
}
_ROOMS = {
    "type": "object",
    "required": ["rooms"],
    "properties": {
        "rooms": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["room_id"],
                "properties": {"room_id": _TEXT, "name": _TEXT, "canonical_alias": _TEXT},
            },
        }
    },
}
_CHUNK = {"type": "object", "required": ["chunk"], "properties": {"chunk": _EVENTS}}
_PAGE = {**_CHUNK, "properties": {"chunk": _EVENTS, "start": _TOKEN, "end": _TOKEN, "state": _EVENTS}}
_JOINED = {"type": "object", "required": ["joined"], "properties": {"joined": {"type": "object"}}}

_ROOM_ID = parameter(
    "roomId",
    "A room id, with or without `:server`, or an alias `#name:server`, which is looked up; the room is not joined. "
    "Percent-encoded or raw.",
    ROOM,
)


def _query(name: str, description: str, example: Any, **schema: Any) -> Operation:
    return parameter(name, f"{description} Blank counts as absent.", example, "query", **schema)


_LIMIT = _query("limit", "How many events of a room; 1,000 at most.", 10, type="integer", minimum=0, default=10)
_NEWEST = _query("limit", "How many of the newest events of each room; 100 at most.", 1, type="integer", minimum=0)
_KEY = "An API key must be for all rooms and all event types."
_OLD = "Events have the guide's `ts`, `user_id`, `age` and, for members, `membership` beside today's fields."

# name: summary, what there is, its schema, description, parameters
_OPERATIONS: dict[str, tuple[str, str, Operation, str, list[Operation]]] = {
    "rooms": (
        "Where the caller is",
        "The rooms that it has joined, by name; of an API key with rooms, those.",
        _ROOMS,
        "",
        [],
    ),
    "initialSync": (
        "All rooms at once",
        "The rooms that the caller is in or invited to, with their state and newest events.",
        _SNAPSHOT,
        f"{_OLD} `end` is where `GET /events` goes on. {_KEY}",
        [
            _NEWEST,
            _query("archived", "`true`: the rooms that the caller has left, too.", "true", enum=["true", "false"]),
        ],
    ),
    "room_initialSync": (
        "One room at once",
        "Its state and newest events.",
        _ROOM,
        _OLD,
        [_NEWEST],
    ),
    "events": (
        "Wait for events",
        "What happened after `from`, in order; nothing when the time is up.",
        _MESSAGES,
        f"{_OLD} Ask again with `from` set to the answer's `end`. Without `room_id`: {_KEY}",
        [
            _query("from", "The `end` of the answer before, or of an initialSync. Default: now.", "s39_18_0"),
            _query(
                "timeout",
                "Milliseconds to wait for something to happen; 0 does not wait, 300,000 at most.",
                30_000,
                type="integer",
                minimum=0,
                default=30_000,
            ),
            _query("room_id", "Only what happens in this room, which the caller must be in.", ROOM),
        ],
    ),
    "members": (
        "The members of a room",
        "Their m.room.member events.",
        _CHUNK,
        "",
        [
            _query("membership", "Only these: join, invite, leave, ban or knock.", "join"),
            _query("not_membership", "All but these.", "leave"),
            _query("at", "As of this token.", "s39_18_0"),
        ],
    ),
    "joined_members": ("Who is in a room", "Their display names and pictures by user id.", _JOINED, "", []),
    "messages": (
        "The history of a room",
        "A page of events. `end` is the `from` of the next one; where there is none, there is no more.",
        _PAGE,
        "",
        [
            _query(
                "from", "The `end` of the page before. Default: the end of the room, or its beginning.", "t1-11_18_0"
            ),
            _query("to", "Where to stop.", "s39_18_0"),
            _query("dir", "`b`: the newest first; `f`: the oldest first.", "b", enum=["b", "f"], default="b"),
            _LIMIT,
            _query("filter", "A RoomEventFilter of the specification, in JSON.", '{"types":["m.room.message"]}'),
        ],
    ),
    "state": ("All state of a room", "Its state events.", {"type": "array", "items": {"type": "object"}}, "", []),
}


def of(path: str) -> Operation:
    """The operation of one of the reading routes."""
    surface, tag = ("matrix", "Matrix surface") if path.startswith("/_matrix/") else ("flow", "Flow surface")
    name = path.rpartition("/")[2]
    in_room = "{roomId}" in path
    key = f"room_{name}" if in_room and f"room_{name}" in _OPERATIONS else name
    summary, ok, schema, description, parameters = _OPERATIONS[key]
    return operation(
        f"{surface}_read_{key}",
        tag,
        summary,
        description=description,
        ok=ok,
        answers=as_json(schema),
        errors=(400, 413, *UPSTREAM),
        parameters=[_ROOM_ID, *parameters] if in_room else parameters,
    )
