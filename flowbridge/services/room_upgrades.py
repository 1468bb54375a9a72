"""Room upgrades: an old room refuses events for ever, and its tombstone names its replacement.

An alias usually moves to the new room at once (client-server API, "Room upgrades").
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from flowbridge.errors import Errcode, MatrixError
from flowbridge.homeserver import Homeserver, answers, identifiers
from flowbridge.models import Caller

TOMBSTONE = "m.room.tombstone"
SECONDS = 2.0  # for reading the tombstone: a caller waits for its refusal


def is_forbidden(error: Mapping[str, Any] | None) -> bool:
    """Whether an old room refuses events with this error."""
    return error is not None and error.get("status") == 403 and error.get("errcode") == Errcode.FORBIDDEN


async def explained(homeserver: Homeserver, caller: Caller, room_id: str, error: dict[str, Any]) -> dict[str, Any]:
    """A 403 for the caller, with the room's replacement if there is one."""
    replacement = await _replacement(homeserver, caller.token, room_id)
    if replacement is None:
        return error
    return {
        **error,
        "error": f"{error.get('error', '')} (this room was upgraded: its replacement is {replacement}, join it first)",
        "flowbridge": {**error.get("flowbridge", {}), "replacement_room": replacement},
    }


async def _replacement(homeserver: Homeserver, token: str, room_id: str) -> str | None:
    """The replacement; None also when the account may not see it, or the homeserver does not answer in time."""
    try:
        async with asyncio.timeout(SECONDS):
            answer = await homeserver.read_state(token, room_id, TOMBSTONE, "", "")
        found = answers.success(answer).get("replacement_room")
        return found if isinstance(found, str) and identifiers.identifier(found, "room").startswith("!") else None
    except (MatrixError, TimeoutError):
        return None
