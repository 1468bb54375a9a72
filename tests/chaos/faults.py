"""What goes wrong at the scripted homeserver, and when: chances drawn from one seed, and a rate limit."""

import math
import random
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any


class Fault(Enum):
    """What happens to one request."""

    LIMITED = "429"
    FAILED = "500 before the event is stored"
    FAILED_LATE = "500 after the event is stored"
    LOST = "stored, then the connection is closed without an answer"
    DROPPED = "the connection is closed before the event is stored"
    DRIPPED = "stored, and the answer comes at one byte per second"


@dataclass(slots=True)
class Faults:
    """Chances from 0 to 1 for each request. `html`: a proxy in front knows no homeserver and says 404 to everything.

    `broken`: the homeserver itself answers 500 to everything.
    """

    p429: float = 0.0
    p500: float = 0.0
    plost: float = 0.0
    pdrop: float = 0.0
    pdrip: float = 0.0
    latency_ms: float = 0.0
    retry_after_ms: int = 200
    html: bool = False
    broken: bool = False

    def change(self, values: dict[str, Any]) -> dict[str, Any]:
        """Set some of them; gives all. Raises ValueError for a name that there is not."""
        unknown = values.keys() - {field.name for field in fields(self)}
        if unknown:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            setattr(self, name, value)
        return asdict(self)

    def draw(self, chance: random.Random) -> Fault | None:
        """The fate of the next request. Half of the 500s come after the event is stored, as a proxy's 502 may."""
        left = chance.random()
        for share, fault in (
            (self.p429, Fault.LIMITED),
            (self.p500 / 2, Fault.FAILED),
            (self.p500 / 2, Fault.FAILED_LATE),
            (self.plost, Fault.LOST),
            (self.pdrop, Fault.DROPPED),
            (self.pdrip, Fault.DRIPPED),
        ):
            if left < share:
                return fault
            left -= share
        return None


@dataclass(slots=True)
class Limiter:
    """One user's leaky bucket (`rate` sends/s, `burst` at once), and how well its pauses are kept.

    `pauses` are the refusals that began one, `early` the requests made before a pause was over, `worst` the most
    of those in one pause.
    """

    rate: float
    burst: int
    allowed: int = 0
    pauses: int = 0
    early: int = 0
    worst: int = 0
    _full_at: float = -math.inf
    _paused_until: float = -math.inf
    _early_now: int = 0

    def wait(self, now: float) -> float:
        """Seconds until this send would be allowed; 0.0: it is."""
        if now < self._paused_until:
            self.early += 1
            self._early_now += 1
            self.worst = max(self.worst, self._early_now)
            return self._paused_until - now
        full_at = max(self._full_at, now)
        wait = full_at - now - (self.burst - 1) / self.rate
        if wait > 1e-6:
            self.pauses += 1
            self._early_now = 0
            self._paused_until = now + wait
            return wait
        self._full_at = full_at + 1 / self.rate
        self.allowed += 1
        return 0.0
