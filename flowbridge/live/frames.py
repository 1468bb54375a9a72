"""What goes over a live stream, and to whom. Pure (WHATWG HTML, "Server-sent events")."""

import json
from dataclasses import dataclass
from typing import Any, Final

from flowbridge.auth.scopes import covers
from flowbridge.errors import MatrixError
from flowbridge.live.position import Position

Event = dict[str, Any]

RETRY_MS: Final = 3_000
HELLO: Final = b"retry: %d\n\n" % RETRY_MS
COMMENT: Final = b":\n\n"

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# What homeservers add to the events of /messages, in the old form, beside today's.
_OLD_FORM = frozenset(
    {"user_id", "age", "prev_content", "replaces_state", "redacted_because", "invite_room_state", "knock_room_state"}
)


@dataclass(frozen=True, slots=True)
class Frame:
    """An event as bytes, the same for all listeners, and what a listener chooses by."""

    data: bytes
    room: str
    type: str
    sender: str


@dataclass(frozen=True, slots=True)
class Wish:
    """Which events a listener wants. `rooms`: None for all. `types`: none for all; `m.room.*` begins with `m.room.`"""

    rooms: frozenset[str] | None = None
    types: tuple[str, ...] = ()
    not_senders: frozenset[str] = frozenset()

    def holds(self, frame: Frame) -> bool:
        return (
            (self.rooms is None or frame.room in self.rooms)
            and frame.sender not in self.not_senders
            and (not self.types or any(covers(type_, frame.type) for type_ in self.types))
        )


def event(position: Position, room: str, found: Event) -> Frame:
    """An event of this room, with the position behind it."""
    data = {key: value for key, value in found.items() if key not in _OLD_FORM}
    data["room_id"] = room
    text = _ENCODER.encode(data).encode("utf-8", "replace")
    frame = b"id: %b\ndata: %b\n\n" % (str(position).encode(), text)
    return Frame(frame, room, str(found.get("type")), str(found.get("sender")))


def here(position: Position) -> bytes:
    """A position without an event: a browser keeps it, and tells its script nothing."""
    return b"id: %b\n\n" % str(position).encode()


def error(reason: MatrixError) -> bytes:
    """Why the stream ends: the last that is said on it."""
    return b"event: error\ndata: %b\n\n" % _ENCODER.encode(reason.body()).encode("utf-8", "replace")
