"""The API keys, as they are known in memory: which of them a caller brings."""

import asyncio
import contextlib
import hmac
import math
from functools import partial

from flowbridge import log
from flowbridge.errors import Unavailable
from flowbridge.limits.tasks import Once, ignore_result
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys, clock

LOOK_UP_SECONDS = 5.0  # at most, for one key that is not known: a read that is in flight may have begun too early
NOTE_SECONDS = 60.0


class ApiKeys:
    """The keys of FLOWBRIDGE_API_KEYS or, when there are none, those of the store."""

    def __init__(self, settings: Settings, database: Database, *, timing: Timing = Timing()) -> None:
        self._database = database
        self._timing = timing
        self._clock = timing.clock
        self._known = [_fixed(key.get_secret_value()) for key in settings.api_keys]
        self._is_fixed = bool(settings.api_keys)
        self._look_at = 0.0
        self._looking = Once[None, None]()
        self._read_at = -math.inf  # when the last finished read began, monotonic
        self._failed = False
        self._changed = asyncio.Event()
        self._used: dict[str, int] = {}
        self._note_at = 0.0

    async def refresh(self) -> None:
        """Read which keys there are; to be called at the start and every `key_refresh_seconds`.

        While the store cannot be read, the known keys stay valid.
        """
        if self._is_fixed:
            return
        self._note_use()
        await self._read()

    def known(self, secret: str) -> ApiKey | None:
        """The key with this secret, as far as it is known in memory."""
        digest, found = api_keys.digest(secret), None
        for known, key in self._known:
            if hmac.compare_digest(digest, known):
                found = key  # no early return: the time taken must reveal nothing about the keys
        if found is not None and not self._is_fixed:
            self._used[found.id] = clock.now_ms()
        return found

    async def look_up(self, secret: str) -> ApiKey | None:
        """The key with this secret; None when the store, read since, has none. Raises Unavailable."""
        began = self._clock()
        key = await self.find(secret)
        while key is None and secret.startswith(api_keys.PREFIX) and not self.was_read_since(began):
            if self._clock() > began + LOOK_UP_SECONDS:
                raise _unread()
            # Timers count in whole milliseconds, and may fire early: never sleep for 0.
            await asyncio.sleep(max(self._look_at - self._clock(), 0.001))
            key = await self.find(secret)
        return key

    async def find(self, secret: str) -> ApiKey | None:
        """As `look_up`, without waiting for a new read: the store is read once a second for all unknown keys."""
        found = self.known(secret)
        if found is None and not self._is_fixed and secret.startswith(api_keys.PREFIX):
            await self._look()
            found = self.known(secret)
            if found is None and self._failed:
                raise _unread()
        return found

    def was_read_since(self, moment: float) -> bool:
        """Whether the store has been read since (monotonic seconds): a key that is still unknown is wrong."""
        return self._is_fixed or self._read_at >= moment

    async def revoked(self, key: ApiKey) -> None:
        """Wait until this key is gone from memory, which is read again every `key_refresh_seconds`."""
        while any(known.id == key.id for _, known in self._known):
            await self._changed.wait()

    async def _look(self) -> None:
        now = self._clock()
        if now >= self._look_at and not self._looking:
            self._look_at = now + self._timing.key_lookup_seconds
            self._looking.task(None, self._read)
        if looking := list(self._looking):
            _, late = await asyncio.wait(looking, timeout=self._timing.key_patience_seconds)
            self._failed = self._failed or bool(late)

    async def _read(self) -> None:
        if not self._database.is_open:
            return
        began = self._clock()
        try:
            known = await self._database.read(api_keys.valid)
        except Unavailable as error:
            if not self._failed:
                log.warning("keys_unread", error=error.error)
            self._failed = True
            return
        self._failed = False
        self._read_at = max(self._read_at, began)  # only now: a caller that asks meanwhile has to wait for the end
        if known != self._known:
            self._known = known
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def _note_use(self) -> None:
        """Write when keys were last used, to the minute: a write per request would cost as much as the request."""
        now = self._clock()
        if self._used and now >= self._note_at:
            used, self._used, self._note_at = self._used, {}, now + NOTE_SECONDS
            with contextlib.suppress(Unavailable):
                self._database.run(partial(api_keys.note_use, used=used), lingers=True).add_done_callback(ignore_result)


def _unread() -> Unavailable:
    return Unavailable("this API key cannot be checked: the store cannot be read at the moment")


def _fixed(secret: str) -> tuple[bytes, ApiKey]:
    digest = api_keys.digest(secret)
    return digest, ApiKey(f"fixed-{digest.hex()[:8]}", admin=True)
