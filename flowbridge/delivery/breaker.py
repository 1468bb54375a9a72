"""Circuit breaker: while the homeserver cannot be reached, one probe asks for its versions, and nothing is sent."""

import asyncio
import time

from flowbridge import log
from flowbridge.delivery.limiter import WIDEST, RateLimiter
from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.models.timing import Timing

FAILURES = 5  # to connect, in a row, which open the circuit


class Breaker:
    """`limiter` is the one of all requests together, and shut while the circuit is open. For one event loop."""

    def __init__(self, homeserver: Homeserver, *, timing: Timing = Timing()) -> None:
        self.limiter = RateLimiter(WIDEST)
        self._homeserver = homeserver
        self._timing = timing
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self._probes_at = 0.0  # monotonic

    @property
    def is_open(self) -> bool:
        """Whether the homeserver cannot be reached at the moment."""
        return self._probing is not None

    @property
    def probes_in(self) -> float:
        """Seconds until the homeserver is asked again whether it is back."""
        return max(0.0, self._probes_at - time.monotonic())

    def reached(self) -> None:
        """An answer came, whatever it says."""
        self._failures = 0
        self.limiter.went_well()

    def unreached(self, error: MatrixError) -> None:
        self._failures += 1
        if self._failures >= FAILURES and self._probing is None:
            self.limiter.shut()
            log.warning("homeserver_away", error=error.error)
            self._probing = asyncio.create_task(self._probe())

    def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()

    async def _probe(self) -> None:
        pause = self._timing.first_probe_pause
        await self._sleep(pause)
        while not await self._answers():
            pause = min(pause * 2, self._timing.max_probe_pause)
            await self._sleep(pause)
        log.info("homeserver_back")
        self._failures = 0
        self._probing = None
        self.limiter.open()

    async def _sleep(self, pause: float) -> None:
        self._probes_at = time.monotonic() + pause
        await asyncio.sleep(pause)

    async def _answers(self) -> bool:
        """Whether the homeserver is there again: one that answers 429 to this is."""
        try:
            await self._homeserver.versions()
        except HomeserverError as error:
            return error.status < 500
        except Exception:  # whatever it is, sending has to go on one day
            return False
        return True
