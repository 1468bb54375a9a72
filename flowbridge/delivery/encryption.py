"""Encryption check: plain text must not go into an encrypted room, unless FLOWBRIDGE_ENCRYPTED_ROOMS allows it."""

import time

from flowbridge.errors import Forbidden
from flowbridge.homeserver import Homeserver
from flowbridge.models import Event
from flowbridge.models.timing import Timing

MAX_PLAIN = 10_000  # rooms that are remembered

_ALWAYS_PLAIN = frozenset({"m.room.encrypted", "m.room.redaction", "m.reaction"})

IN_PLAIN_TEXT = (
    "the room is encrypted, and this would go into it as plain text: send it to another room, or allow it with "
    "FLOWBRIDGE_ENCRYPTED_ROOMS=allow"
)


class EncryptionCheck:
    """Remembers for a few seconds that a room is plain; an encrypted one is asked about each time.

    `refuses`: what FLOWBRIDGE_ENCRYPTED_ROOMS says. For one event loop.
    """

    def __init__(
        self, homeserver: Homeserver, *, refuses: bool, max_plain: int = MAX_PLAIN, timing: Timing = Timing()
    ) -> None:
        self._homeserver = homeserver
        self._refuses = refuses
        self._max_plain = max_plain
        self._plain_seconds = timing.plain_seconds
        self.plain_until: dict[str, float] = {}  # room → monotonic

    async def refuses(self, token: str, event: Event, *, query: str = "") -> bool:
        """Whether this would put plain text into an encrypted room. Raises MatrixError when that cannot be learnt.

        `query`: as whom an application service asks.
        """
        if self.is_known_plain(event.room, event.type, event.state_key):
            return False
        asked = time.monotonic()
        if await self._homeserver.is_encrypted(token, event.room, query):
            return True
        if len(self.plain_until) >= self._max_plain:
            self.plain_until.clear()
        self.plain_until[event.room] = asked + self._plain_seconds
        return False

    async def permit(self, token: str, event: Event, *, query: str = "") -> None:
        """Raise Forbidden for plain text into an encrypted room; otherwise as `refuses`."""
        if await self.refuses(token, event, query=query):
            raise Forbidden(IN_PLAIN_TEXT)

    def is_known_plain(self, room: str, event_type: str, state_key: str | None) -> bool:
        """Whether this may be sent as it is, without asking."""
        if not self._refuses or state_key is not None or event_type in _ALWAYS_PLAIN:
            return True
        return self.plain_until.get(room, 0.0) > time.monotonic()
