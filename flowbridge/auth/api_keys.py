"""The API keys as they are known in memory: which key it is that a caller brings, and what it may do."""

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Iterable
from functools import partial

from flowbridge import log
from flowbridge.errors import Forbidden, Unavailable
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys, clock

REFRESH_SECONDS = 1.5  # a revoked key is refused within 2 s, the reading included
LOOK_SECONDS = 1.0  # between two looks into the store for keys that are not known
PATIENCE_SECONDS = 2.0  # for a store that does not answer
NOTE_SECONDS = 60.0
MAX_NAMED = 10  # rooms and event types that an error names


class ApiKeys:
    """The keys of FLOWBRIDGE_API_KEYS or, when there are none, those of the store."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._known = [_fixed(key.get_secret_value()) for key in settings.api_keys]
        self._is_fixed = bool(settings.api_keys)
        self._look_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._read_at = -math.inf  # when the last reading that came to its end was begun, monotonic
        self._failed = False
        self._changed = asyncio.Event()
        self._used: dict[str, int] = {}
        self._note_at = 0.0

    async def refresh(self) -> None:
        """Learn which keys there are; to be called at the start and every REFRESH_SECONDS.

        While the store cannot be read, the keys that were known stay so.
        """
        if self._is_fixed:
            return
        self._note_use()
        await self._read()

    async def find(self, secret: str) -> ApiKey | None:
        """What this key may do; None when there is no such key. Raises Unavailable when nobody can tell.

        A key that is not known may be a minute old: the store is asked, once a second for all that are not known.
        """
        found = self.known(secret)
        if found is None and not self._is_fixed and secret.startswith(api_keys.PREFIX):
            await self._look()
            found = self.known(secret)
            if found is None and self._failed:
                raise unread()
        return found

    def known(self, secret: str) -> ApiKey | None:
        """What this key may do, as far as it is known in memory."""
        found = self._match(api_keys.digest(secret))
        if found is not None and not self._is_fixed:
            self._used[found.id] = clock.now_ms()
        return found

    def was_read_since(self, moment: float) -> bool:
        """Whether the store has been read since (monotonic seconds): a key that is not known since then is wrong."""
        return self._is_fixed or self._read_at >= moment

    @property
    def next_look(self) -> float:
        """Seconds until the store may be read again for a key that is not known."""
        return max(0.0, self._look_at - time.monotonic())

    def _match(self, digest: bytes) -> ApiKey | None:
        found = None
        for known, key in self._known:
            if hmac.compare_digest(digest, known):
                found = key  # no early end: the time taken tells nothing about the keys that there are
        return found

    async def _look(self) -> None:
        now = time.monotonic()
        if now >= self._look_at and (self._looking is None or self._looking.done()):
            self._look_at = now + LOOK_SECONDS
            self._looking = asyncio.ensure_future(self._read())
        if self._looking is not None and not self._looking.done():
            _, late = await asyncio.wait({self._looking}, timeout=PATIENCE_SECONDS)
            self._failed = self._failed or bool(late)

    async def _read(self) -> None:
        if not self._database.is_open:
            return
        began = time.monotonic()
        try:
            known = await self._database.read(api_keys.valid)
        except Unavailable as error:
            if not self._failed:
                log.warning("keys_unread", error=error.error)
            self._failed = True
        else:
            self._failed = False
            self._read_at = max(self._read_at, began)  # not before: who asks meanwhile has to wait for it
            if known != self._known:
                self._known = known
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()

    async def revoked(self, key: ApiKey) -> None:
        """Until this key is no longer there, as far as is known: that is read every REFRESH_SECONDS."""
        while any(known.id == key.id for _, known in self._known):
            await self._changed.wait()

    def _note_use(self) -> None:
        """When a key was last used, to the minute: a write for each request would cost as much as the request."""
        now = time.monotonic()
        if self._used and now >= self._note_at:
            used, self._used, self._note_at = self._used, {}, now + NOTE_SECONDS
            with contextlib.suppress(Unavailable):
                self._database.run(partial(api_keys.note_use, used=used), lingers=True).add_done_callback(_heard)


def unread() -> Unavailable:
    return Unavailable("this API key cannot be checked: the store cannot be read at the moment")


def permit(key: ApiKey, event_type: str, rooms: Iterable[str]) -> None:
    """Raises Forbidden unless the key is for this event type and for one of these names of the room.

    No room named: only the event type is looked at.
    """
    rooms = list(rooms)
    good_type = not key.event_types or any(_covers(scope, event_type) for scope in key.event_types)
    good_room = not key.rooms or not rooms or any(room in key.rooms for room in rooms)
    if not (good_type and good_room):
        raise Forbidden(
            f"this API key is not for this: it is for {_named(key.event_types, 'all event types')} "
            f"in {_named(key.rooms, 'all rooms')}, and for nothing else"
        )


def permit_reading(key: ApiKey, rooms: Iterable[str]) -> None:
    """Raises Forbidden unless the key may read all events of the room that has these names.

    That needs a key for all event types. No room named: all at once, which needs a key for all rooms.
    """
    if key.rooms and not any(room in key.rooms for room in rooms):
        raise Forbidden(f"this API key is not for this room: it is for {_named(key.rooms, '')}, and for no other")
    if key.event_types:
        only = _named(key.event_types, "")
        raise Forbidden(f"this API key may not read: it is for {only}, and reading shows events of every type")


def _covers(scope: str, event_type: str) -> bool:
    """`m.room.message` covers itself, `m.room.*` whatever begins with `m.room.`."""
    return event_type.startswith(scope[:-1]) if scope.endswith("*") else event_type == scope


def _named(scope: tuple[str, ...], everything: str) -> str:
    if not scope:
        return everything
    more = f" and {len(scope) - MAX_NAMED} more" if len(scope) > MAX_NAMED else ""
    return ", ".join(scope[:MAX_NAMED]) + more


def _fixed(secret: str) -> tuple[bytes, ApiKey]:
    digest = api_keys.digest(secret)
    return digest, ApiKey(f"fixed-{digest.hex()[:8]}", admin=True)


def _heard(noting: "asyncio.Future[None]") -> None:
    """Nobody waits for it, and nothing hangs on it."""
    if not noting.cancelled():
        noting.exception()
