"""The API keys, as they are known in memory: which of them a caller brings."""

import asyncio
import contextlib
from functools import partial

from sqlalchemy import Connection

from flowbridge.errors import Unavailable
from flowbridge.limits.lookups import LookUps
from flowbridge.limits.tasks import ignore_result
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys, clock

NOTE_SECONDS = 60.0


class ApiKeys:
    """The keys of FLOWBRIDGE_API_KEYS or, when there are none, those of the store."""

    def __init__(self, settings: Settings, database: Database, *, timing: Timing = Timing()) -> None:
        self._database = database
        self._clock = timing.clock
        # By SHA-256: a look-up costs the same with one key and with 20,000, and its time says nothing of a key, since
        # no one can choose the digest of a guess.
        self._known = dict(_fixed(key.get_secret_value()) for key in settings.api_keys)
        self._ids = frozenset(key.id for key in self._known.values())
        self._is_fixed = bool(settings.api_keys)
        unread = "this API key cannot be checked: the store cannot be read at the moment"
        self._lookups = LookUps(self._read, "keys_unread", unread, timing=timing)
        self._version: object = None
        self._changed = asyncio.Event()
        self._used: dict[str, int] = {}
        self._note_at = 0.0

    async def refresh(self) -> None:
        """Read which keys there are; to be called at the start and every `key_refresh_seconds`."""
        if self._is_fixed:
            return
        self._note_use()
        await self._lookups.refresh()

    def known(self, secret: str) -> ApiKey | None:
        """The key with this secret, as far as it is known in memory."""
        found = self._known.get(api_keys.digest(secret))
        if found is not None and not self._is_fixed:
            self._used[found.id] = clock.now_ms()
        return found

    async def look_up(self, secret: str) -> ApiKey | None:
        """The key with this secret; None when the store, read since, has none. Raises Unavailable."""
        began = self._clock()
        key = await self.find(secret)
        if key is None and self._may_be_stored(secret):
            await self._lookups.since(began)
            key = self.known(secret)
        return key

    async def find(self, secret: str) -> ApiKey | None:
        """As `look_up`, without waiting for a new read: the store is read once a second for all unknown keys."""
        found = self.known(secret)
        if found is None and self._may_be_stored(secret):
            await self._lookups.look()
            found = self.known(secret)
            if found is None:
                self._lookups.check()
        return found

    def was_read_since(self, moment: float) -> bool:
        """Whether the store has been read since (monotonic seconds): a key that is still unknown is wrong."""
        return self._is_fixed or self._lookups.read_at >= moment

    async def revoked(self, key: ApiKey) -> None:
        """Wait until this key is gone from memory, which is read again every `key_refresh_seconds`."""
        while key.id in self._ids:
            await self._changed.wait()

    def _may_be_stored(self, secret: str) -> bool:
        return not self._is_fixed and secret.startswith(api_keys.PREFIX)

    async def _read(self) -> bool:
        if not self._database.is_open:
            return False
        version, known = await self._database.read(partial(_changed, since=self._version))
        if known is not None:
            self._version = version
            self._known = known
            self._ids = frozenset(key.id for key in known.values())
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
        return True

    def _note_use(self) -> None:
        """Write when keys were last used, to the minute: a write per request would cost as much as the request."""
        now = self._clock()
        if self._used and now >= self._note_at:
            used, self._used, self._note_at = self._used, {}, now + NOTE_SECONDS
            with contextlib.suppress(Unavailable):
                self._database.run(partial(api_keys.note_use, used=used), lingers=True).add_done_callback(ignore_result)


def _changed(connection: Connection, since: object) -> tuple[object, dict[bytes, ApiKey] | None]:
    """The keys, if there are others than in that version."""
    version = api_keys.version(connection)
    return version, None if version == since else dict(api_keys.valid(connection))


def _fixed(secret: str) -> tuple[bytes, ApiKey]:
    digest = api_keys.digest(secret)
    return digest, ApiKey(f"fixed-{digest.hex()[:8]}", admin=True)
