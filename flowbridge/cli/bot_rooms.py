"""What `flowbridge doctor` says of the bot's rooms: where it may send, and what keeps it from that."""

from collections.abc import Iterator
from typing import Any, Final

from flowbridge.bridge import Core
from flowbridge.cli.findings import Finding
from flowbridge.errors import MatrixError
from flowbridge.homeserver.sync import NOTHING, ROOMS_ALONE, Json, SyncClient, listed, objects, section
from flowbridge.models import Caller

MAX_ROOMS: Final = 20  # that have a line of their own: those first where something is to be done
MAX_BYTES: Final = 16 * 1024 * 1024  # of the answer; a room with a long list of power levels has some 10 kB
MAX_NAME: Final = 60  # characters

_MESSAGE = "m.room.message"
_TYPES = [
    "m.room.create",
    "m.room.canonical_alias",
    "m.room.encryption",
    "m.room.name",
    "m.room.power_levels",
    "m.room.tombstone",
]
_FILTER: Json = {
    **ROOMS_ALONE,
    "room": {
        "timeline": {**NOTHING, "limit": 1},
        "state": {"types": _TYPES},
        "ephemeral": NOTHING,
        "account_data": NOTHING,
    },
}
_FIRST_WITH_CREATORS = 12  # room version: who made the room may do everything, and no power level says so


async def look(core: Core, bot: Caller) -> list[Finding]:
    """A line for each room up to a bound, then how many more there are; nothing when the bot is in no room."""
    try:
        batch = await SyncClient(core.homeserver.read).sync(
            bot.token, _FILTER, patience=core.homeserver.deadline, limit=MAX_BYTES
        )
    except MatrixError as error:
        return [Finding("rooms", None, f"they cannot be looked at: {error.error}")]
    return lines(section(batch.value, "rooms"), bot.user_id, refuses=core.settings.encrypted_rooms == "refuse")


def lines(rooms: Json, user_id: str, *, refuses: bool) -> list[Finding]:
    """The same of the rooms of a sync. `refuses`: plain text does not go into encrypted rooms."""
    found = [*_invited(section(rooms, "invite"), user_id), *_joined(section(rooms, "join"), user_id, refuses=refuses)]
    found.sort(key=lambda finding: finding.good is True)
    shown, rest = found[:MAX_ROOMS], found[MAX_ROOMS:]
    if rest:
        good = sum(finding.good is True for finding in rest)
        shown.append(Finding("rooms", None, f"{len(rest)} more: {good} take messages, {len(rest) - good} do not"))
    return shown


def _invited(rooms: Json, user_id: str) -> Iterator[Finding]:
    for room_id, room in rooms.items():
        state = objects(section(room, "invite_state"), "events")
        inviter = next((each.get("sender") for each in state if _is(each, "m.room.member", user_id)), None)
        by = f" by {inviter}" if isinstance(inviter, str) else ""
        says = f"invited{by}, and not joined yet: POST /join/{room_id}"
        yield Finding("room", None, f"{_named(room_id, state)}: {says}")


def _joined(rooms: Json, user_id: str, *, refuses: bool) -> Iterator[Finding]:
    for room_id, room in rooms.items():
        state = [*listed(room, "state"), *listed(room, "timeline")]
        wrong = _hindrance(state, user_id, refuses=refuses)
        encrypted = (
            "" if wrong or _content(state, "m.room.encryption") is None else ", in plain text although it is encrypted"
        )
        says = wrong or f"joined, takes messages{encrypted}"
        yield Finding("room", None if wrong else True, f"{_named(room_id, state)}: {says}")


def _hindrance(state: list[Json], user_id: str, *, refuses: bool) -> str:
    """Why the room takes no message of this user; "" when it does."""
    if (replaced := _content(state, "m.room.tombstone")) is not None:
        return f"joined, but replaced by {replaced.get('replacement_room') or 'another room'}: send there"
    if not _may_send(state, user_id):
        return f"joined, but {user_id} may not send {_MESSAGE}: a moderator has to raise its power level"
    if refuses and _content(state, "m.room.encryption") is not None:
        return (
            "joined, but it is encrypted, and messages would go out as plain text: they are refused, unless "
            "FLOWBRIDGE_ENCRYPTED_ROOMS=allow"
        )
    return ""


def _may_send(state: list[Json], user_id: str) -> bool:
    """Specification, "m.room.power_levels"."""
    create = next((each for each in state if _is(each, "m.room.create")), {})
    content = section(create, "content")
    levels = _content(state, "m.room.power_levels")
    version = str(content.get("room_version", "1"))
    if version.isdecimal() and int(version) >= _FIRST_WITH_CREATORS:
        more = content.get("additional_creators")
        if user_id == create.get("sender") or (isinstance(more, list) and user_id in more):
            return True
    if levels is None:
        return True  # the default level is that of messages
    has = _level(section(levels, "users").get(user_id), _level(levels.get("users_default"), 0))
    return has >= _level(section(levels, "events").get(_MESSAGE), _level(levels.get("events_default"), 0))


def _level(value: Any, default: int) -> int:
    """Old rooms have levels that are text."""
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    return int(value) if isinstance(value, int | float) else default


def _named(room_id: str, state: list[Json]) -> str:
    alias = (_content(state, "m.room.canonical_alias") or {}).get("alias")
    name = (_content(state, "m.room.name") or {}).get("name")
    known = [text for text in (name, alias) if isinstance(text, str) and text.strip()]
    return f"{room_id} ({', '.join(text[:MAX_NAME] for text in known)})" if known else room_id


def _content(state: list[Json], type_: str) -> Json | None:
    """The content of the newest event of this type, with an empty state key."""
    found = next((each for each in reversed(state) if _is(each, type_)), None)
    return None if found is None else section(found, "content")


def _is(event: Json, type_: str, state_key: str = "") -> bool:
    return event.get("type") == type_ and event.get("state_key") == state_key
