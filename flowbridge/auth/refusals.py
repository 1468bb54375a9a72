"""Wrong keys and tokens: each costs a look-up once, and an address that brings many of them has to slow down.

A key or token that is known in memory is accepted before any of this is asked: behind a NAT others go on working.
"""

import time
from dataclasses import dataclass
from typing import TypeVar

from flowbridge.errors import MatrixError, TooMany

K = TypeVar("K")
V = TypeVar("V")

KEEP_SECONDS = 5.0  # how long a refusal is given again without another look-up
MAX_KEPT = 10_000  # refusals, and addresses


@dataclass(slots=True)
class _Allowance:
    """Refusals that an address may still cause: of any secret, and of one that was not refused a moment ago."""

    any: float
    new: float
    at: float


class Refusals:
    """`per_minute`: refusals that one address may cause; they come back one by one (a token bucket)."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._kept: dict[bytes, tuple[MatrixError, float]] = {}
        self._allowances: dict[str, _Allowance] = {}

    def check(self, address: str, digest: bytes) -> None:
        """Raises the refusal of this secret again, or TooMany. "" is the bridge itself."""
        if not address:
            return
        allowance = self._allowances.get(address)
        if allowance is not None:
            self._refill(allowance)
        refusal, until = self._kept.get(digest, (None, 0.0))
        is_repeated = refusal is not None and time.monotonic() < until
        left = self._most if allowance is None else allowance.any if is_repeated else allowance.new
        if left < 1:
            raise TooMany(
                f"more than {self._most:g} wrong keys or tokens a minute come from {address}",
                retry_after_ms=max(1_000, round((1 - left) * 60_000 / self._most)),
            )
        if refusal is not None and is_repeated:
            self._allowance(address).any -= 1
            raise type(refusal)(refusal.error, errcode=refusal.errcode, status=refusal.status, **refusal.extra)

    def note(self, address: str, digest: bytes, refusal: MatrixError) -> None:
        """This secret was looked up, and refused: for some seconds a repeat is refused without another look-up."""
        if not address:
            return
        _put(self._kept, digest, (refusal, time.monotonic() + KEEP_SECONDS))
        allowance = self._allowance(address)
        allowance.any = max(0.0, allowance.any - 1)  # a burst that was under way delays nobody for longer than it takes
        allowance.new = max(0.0, allowance.new - 1)  # to earn one

    def _allowance(self, address: str) -> _Allowance:
        found = self._allowances.get(address)
        if found is None:
            found = _Allowance(self._most, self._most, time.monotonic())
        else:
            self._refill(found)
        _put(self._allowances, address, found)
        return found

    def _refill(self, allowance: _Allowance) -> None:
        now = time.monotonic()
        more = (now - allowance.at) * self._most / 60
        allowance.any = min(self._most, allowance.any + more)
        allowance.new = min(self._most, allowance.new + more)
        allowance.at = now


def _put(kept: dict[K, V], key: K, value: V) -> None:
    """As the newest entry, in place of the oldest where there are too many."""
    kept.pop(key, None)
    if len(kept) >= MAX_KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
