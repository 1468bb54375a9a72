"""What is written on a live stream, and which events a listener gets. Pure (WHATWG HTML, "Server-sent events")."""

from dataclasses import dataclass
from typing import Final

from flowbridge.auth.scopes import covers
from flowbridge.errors import MatrixError
from flowbridge.homeserver import large_json
from flowbridge.homeserver.sync import Invitation, Json
from flowbridge.live.position import Position

RETRY_MS: Final = 3_000
HELLO: Final = b"retry: %d\n\n" % RETRY_MS
COMMENT: Final = b":\n\n"

# Fields of the old form that homeservers add to the events of /messages.
_OLD_FORM = frozenset(
    {"user_id", "age", "prev_content", "replaces_state", "redacted_because", "invite_room_state", "knock_room_state"}
)


_INVITATION = ("type", "state_key", "sender", "content", "origin_server_ts", "event_id")


@dataclass(frozen=True, slots=True)
class Frame:
    """An event as bytes, the same for all listeners, and the values that filters go by."""

    data: bytes
    room: str
    type: str
    sender: str


@dataclass(frozen=True, slots=True)
class EventFilter:
    """`rooms`: None for all. `types`: empty for all; `m.room.*` stands for all types that begin with `m.room.`"""

    rooms: frozenset[str] | None = None
    types: tuple[str, ...] = ()
    not_senders: frozenset[str] = frozenset()

    def matches(self, frame: Frame) -> bool:
        return (
            (self.rooms is None or frame.room in self.rooms)
            and frame.sender not in self.not_senders
            and (not self.types or any(covers(type_, frame.type) for type_ in self.types))
        )


def event(at: Position, room: str, found: Json) -> Frame:
    """An event of this room; `at` is the position behind it."""
    data = {key: value for key, value in found.items() if key not in _OLD_FORM}
    data["room_id"] = room
    frame = b"id: %b\ndata: %b\n\n" % (str(at).encode(), large_json.write(data, levels=0))
    return Frame(frame, room, str(found.get("type")), str(found.get("sender")))


def invitation(found: Invitation) -> Frame:
    """An invitation to this room, without a position of its own: in the homeserver's stream it has none.

    Its data is an m.room.member event, so that filters and readers take it as one, with what `GET /rooms` says of it.
    """
    event = {key: found.event[key] for key in _INVITATION if key in found.event}
    data = large_json.write({**event, **found.shown()}, levels=0)
    return Frame(b"event: invite\ndata: %b\n\n" % data, found.room_id, "m.room.member", found.inviter)


def position(at: Position) -> bytes:
    """A position without an event: a browser keeps it, and its script sees nothing."""
    return b"id: %b\n\n" % str(at).encode()


def error(reason: MatrixError) -> bytes:
    """Why the stream ends: its last message."""
    return b"event: error\ndata: %b\n\n" % large_json.write(reason.body())
