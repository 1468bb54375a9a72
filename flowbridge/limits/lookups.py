"""Reads of the store for what is not known in memory: a key, a hook or a secret that another process has just made."""

import asyncio
import math
from collections.abc import Awaitable, Callable

from flowbridge import log
from flowbridge.errors import Unavailable
from flowbridge.limits.tasks import Once
from flowbridge.models.timing import Timing

PATIENCE_SECONDS = 5.0  # at most, for one caller: a read that is in flight may have begun too early


class LookUps:
    """One read at a time and one a second, for all callers together: a flood of guesses costs no more.

    `read`: reads what there is, and puts it in place; False while the store is not open. `action`: the log's, when it
    fails; `unread`: what callers are told then.
    """

    def __init__(self, read: Callable[[], Awaitable[bool]], action: str, unread: str, *, timing: Timing) -> None:
        self._read = read
        self._action = action
        self._unread = unread
        self._timing = timing
        self.clock = timing.clock
        self.read_at = -math.inf  # when the last finished read began, monotonic
        self._look_at = 0.0
        self._looking = Once[None, None]()
        self._failed = False

    async def refresh(self) -> None:
        """Read now. While the store cannot be read, what is known stays valid."""
        began = self.clock()
        try:
            if not await self._read():
                return
        except Unavailable as error:
            if not self._failed:
                log.warning(self._action, error=error.error)
            self._failed = True
            return
        self._failed = False
        self.read_at = max(self.read_at, began)  # only now: a caller that asks meanwhile has to wait for the end

    async def look(self) -> None:
        """Read, or wait for the read in flight, unless there was one within the last second."""
        now = self.clock()
        if now >= self._look_at and not self._looking:
            self._look_at = now + self._timing.key_lookup_seconds
            self._looking.task(None, self.refresh)
        if looking := list(self._looking):
            _, late = await asyncio.wait(looking, timeout=self._timing.key_patience_seconds)
            self._failed = self._failed or bool(late)

    def check(self) -> None:
        """Raises Unavailable if the store could not be read: what is not known may be in there."""
        if self._failed:
            raise Unavailable(self._unread)

    async def since(self, moment: float) -> None:
        """Wait for a read that began at this moment (monotonic) or later: what is unknown then, there is not.

        It takes a second at most, and the read. Raises Unavailable.
        """
        began = self.clock()
        while self.read_at < moment:
            if self.clock() > began + PATIENCE_SECONDS:
                raise Unavailable(self._unread)
            # Timers count in whole milliseconds, and may fire early: never sleep for 0.
            await asyncio.sleep(max(self._look_at - self.clock(), 0.001))
            await self.look()
            self.check()
