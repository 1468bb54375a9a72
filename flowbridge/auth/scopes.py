"""What an API key may do. No key: a Matrix token or the bridge itself, whose rights are the homeserver's to say."""

from flowbridge.errors import Forbidden
from flowbridge.models import ApiKey

MEMBER = "m.room.member"
MAX_NAMED = 10  # rooms and event types that an error names


def permit(key: ApiKey | None, event_type: str, *rooms: str) -> None:
    """Raises Forbidden unless the key covers this event type and one of these names of the room.

    `rooms`: the room as the request named it, and its id once that is known. Without any, only the type is checked.
    """
    if key is None:
        return
    types = key.event_types
    is_type_covered = not types or event_type in types or any(covers(scope, event_type) for scope in types)
    is_room_covered = not key.rooms or not rooms or any(map(key.rooms.__contains__, rooms))
    if not (is_type_covered and is_room_covered):
        raise Forbidden(
            f"this API key is not for this: it is for {_named(key.event_types, 'all event types')} "
            f"in {_named(key.rooms, 'all rooms')}, and for nothing else"
        )


def permit_joining(key: ApiKey | None, *rooms: str) -> None:
    """Raises Forbidden unless the bot may join the room with these names for this key.

    A key that names the room may, whatever its event types: many clients join before they send, and what they join is
    where they may send. Another one must cover `m.room.member`.
    """
    if key is None or any(room in key.rooms for room in rooms):
        return
    if key.rooms:
        raise Forbidden(f"this API key is not for this room: it is for {_named(key.rooms, '')}, and for no other")
    if not any(covers(scope, MEMBER) for scope in key.event_types or ("*",)):
        raise Forbidden(
            f"this API key is for {_named(key.event_types, '')} only, and names no room that it may join: make one "
            "with --room, or have the bot join by another key"
        )


def permit_reading(key: ApiKey | None, *rooms: str) -> None:
    """Raises Forbidden unless the key may read all events of the room with these names.

    Reading shows events of every type, so the key must cover all types. Without `rooms` it must cover all rooms, too.
    """
    if key is None:
        return
    if key.rooms and not any(room in key.rooms for room in rooms):
        raise Forbidden(f"this API key is not for this room: it is for {_named(key.rooms, '')}, and for no other")
    if key.event_types:
        only = _named(key.event_types, "")
        raise Forbidden(f"this API key may not read: it is for {only}, and reading shows events of every type")


def permit_all(key: ApiKey | None) -> None:
    """Raises Forbidden unless the key has `admin` and no limits: for what concerns no room and no event type."""
    if key is not None and (not key.admin or key.rooms or key.event_types):
        raise Forbidden("this API key is not for this, which needs `admin`, for all rooms and event types")


def covers(scope: str, event_type: str) -> bool:
    """`m.room.message` covers itself, `m.room.*` every type that begins with `m.room.`."""
    return event_type.startswith(scope[:-1]) if scope.endswith("*") else event_type == scope


def _named(scope: tuple[str, ...], everything: str) -> str:
    if not scope:
        return everything
    more = f" and {len(scope) - MAX_NAMED} more" if len(scope) > MAX_NAMED else ""
    return ", ".join(scope[:MAX_NAMED]) + more
