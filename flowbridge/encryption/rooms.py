"""What encryption has to know of rooms: their settings, and who may read them.

Asked for when a room is first sent to, and again once a sync has said that it changed. That a room is encrypted is
remembered for good: a homeserver that denies it later is not believed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flowbridge.encryption.identities import MEGOLM
from flowbridge.encryption.key_server import KeyServer
from flowbridge.homeserver.sync import Json
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.store import Database, crypto

MAX_READERS = 500_000  # that are kept in memory, of all rooms together: some 100 bytes each
ROOM_READERS = 20  # as many as a room itself takes
DEFAULT_PERIOD_MS = 604_800_000  # specification, m.room.encryption
DEFAULT_MESSAGES = 100
MIN_PERIOD_MS = 3_600_000  # a room that asks for less would have its keys shared again and again
MIN_MESSAGES = 1

CHANGES = frozenset({"m.room.encryption", "m.room.member", "m.room.history_visibility"})
_READERS = {"joined": {"join"}}


@dataclass(frozen=True, slots=True)
class Rotation:
    """After how long, or how many messages, a room's session ends."""

    period_ms: int = DEFAULT_PERIOD_MS
    messages: int = DEFAULT_MESSAGES

    @classmethod
    def of(cls, settings: Json) -> "Rotation":
        """As m.room.encryption has it; what is not a number there counts for nothing."""
        period = _number(settings.get("rotation_period_ms"), DEFAULT_PERIOD_MS)
        messages = _number(settings.get("rotation_period_msgs"), DEFAULT_MESSAGES)
        return cls(max(MIN_PERIOD_MS, period), max(MIN_MESSAGES, messages))


@dataclass(frozen=True, slots=True)
class Room:
    """`readers`: the users who are to be able to read what is sent now. `number`: another one for each look."""

    settings: Json
    rotation: Rotation
    readers: frozenset[str]
    number: int

    @property
    def is_understood(self) -> bool:
        return self.settings.get("algorithm") == MEGOLM


class Rooms:
    def __init__(self, database: Database, server: KeyServer) -> None:
        self._database = database
        self._server = server
        self._rooms: Cache[str, Room] = Cache(MAX_READERS)
        self._asking = Once[str, Room | None]()
        self._changes: dict[str, int] = {}
        self._number = 0

    async def get(self, room_id: str) -> Room | None:
        """The room; None for one that is not encrypted. Raises MatrixError, StoreUnavailable."""
        while True:
            if (known := self._rooms.get(room_id)) is not None:
                return known
            number = self._changes.setdefault(room_id, 0)
            try:
                found = await self._asking.get(room_id, lambda: self._ask(room_id))
            except BaseException:
                self._changes.pop(room_id, None)  # another that waits for it asks again
                raise
            if self._changes.get(room_id) == number:  # else it has changed while it was asked for
                self._changes.pop(room_id, None)
                if found is None:
                    return None
                return self._rooms.put(room_id, found, weight=ROOM_READERS + len(found.readers))

    def changed(self, rooms: Iterable[str]) -> None:
        """A sync had a change of these rooms that matters here (CHANGES)."""
        for room_id in rooms:
            self._rooms.pop(room_id)
            if room_id in self._changes:
                self._changes[room_id] += 1

    def forget_all(self) -> None:
        """Changes may have been missed."""
        self._rooms.clear()
        self.changed(list(self._changes))

    async def _ask(self, room_id: str) -> Room | None:
        stored = await self._database.read(lambda connection: crypto.room_settings(connection, room_id))
        told = await self._server.state(room_id, "m.room.encryption")
        if told is None:
            if stored is None:
                return None
            told = json.loads(stored)
        elif (text := json.dumps(told, sort_keys=True)) != stored:
            await self._database.run(lambda connection: crypto.note_room(connection, room_id, text))
        visibility = (await self._server.state(room_id, "m.room.history_visibility") or {}).get("history_visibility")
        memberships = _READERS.get(str(visibility), {"join", "invite"})
        members = await self._server.members(room_id)
        readers = frozenset(user for user, membership in members.items() if membership in memberships)
        self._number += 1
        return Room(told, Rotation.of(told), readers, self._number)


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
