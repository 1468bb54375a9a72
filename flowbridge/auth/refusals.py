"""Wrong keys and tokens: each costs one look-up, and an address that brings many of them is slowed down.

Keys and tokens that are known in memory are accepted before this is checked: others behind the same NAT go on working.
"""

from dataclasses import dataclass

from flowbridge.errors import MatrixError, TooMany
from flowbridge.limits.cache import Cache
from flowbridge.models.timing import Timing

MAX_KEPT = 10_000  # refusals, and addresses


@dataclass(slots=True)
class _Allowance:
    """Refusals that an address may still cause: of any secret, and of one that was not refused shortly before."""

    any: float
    new: float
    at: float


class Refusals:
    """`per_minute`: refusals that one address may cause; they come back one by one (a token bucket)."""

    def __init__(self, per_minute: int, *, timing: Timing = Timing(), max_kept: int = MAX_KEPT) -> None:
        self._most = float(per_minute)
        self._seconds = timing.refusal_seconds
        self._clock = timing.clock
        self._kept = Cache[bytes, tuple[MatrixError, float]](max_kept)
        self._allowances = Cache[str, _Allowance](max_kept)

    def check(self, address: str, digest: bytes) -> None:
        """Raises the last refusal of this secret, or TooMany. Address "" is the bridge itself."""
        if not address:
            return
        allowance = self._allowance(address)
        refusal, until = self._kept.get(digest, (None, 0.0))
        is_repeated = refusal is not None and self._clock() < until
        left = allowance.any if is_repeated else allowance.new
        if left < 1:
            raise TooMany(
                f"more than {self._most:g} wrong keys or tokens a minute come from {address}",
                retry_after_ms=max(1_000, round((1 - left) * 60_000 / self._most)),
            )
        if refusal is not None and is_repeated:
            allowance.any -= 1
            self._allowances.put(address, allowance)
            raise type(refusal)(refusal.error, errcode=refusal.errcode, status=refusal.status, **refusal.extra)

    def note(self, address: str, digest: bytes, refusal: MatrixError) -> None:
        """Remember a refusal: for some seconds a repeat is refused without another look-up."""
        if not address:
            return
        self._kept.put(digest, (refusal, self._clock() + self._seconds))
        allowance = self._allowances.put(address, self._allowance(address))
        # Not below 0: a burst that was in flight causes no longer wait than it takes to earn one refusal.
        allowance.any = max(0.0, allowance.any - 1)
        allowance.new = max(0.0, allowance.new - 1)

    def _allowance(self, address: str) -> _Allowance:
        """What this address may still cause, refilled until now."""
        now = self._clock()
        found = self._allowances.get(address) or _Allowance(self._most, self._most, now)
        more = (now - found.at) * self._most / 60
        found.any = min(self._most, found.any + more)
        found.new = min(self._most, found.new + more)
        found.at = now
        return found
