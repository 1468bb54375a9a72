"""Accounts that the homeserver refuses: for how long each pauses, and why.

A suspended user, a homeserver over its limit, terms that are not agreed to: the answer would be the same to any event.
So the account pauses, longer each time, until one of its events is answered in another way. A caller who waits may have
it tried earlier.
"""

import time
from dataclasses import dataclass

from flowbridge.homeserver.answers import Verdict

PAUSES = (5.0, 15.0, 60.0, 300.0, 600.0)  # seconds, one after the other
KNOCK_SECONDS = 2.0  # between two tries for callers who wait


@dataclass(slots=True)
class _Halt:
    found: Verdict
    times: int = 0
    tried_at: float = 0.0  # monotonic


class Halts:
    """For one event loop."""

    def __init__(self) -> None:
        self._by_account: dict[str, _Halt] = {}

    def __bool__(self) -> bool:
        return bool(self._by_account)

    def refuse(self, account: str, found: Verdict, *, again: bool) -> float:
        """The homeserver refuses the account; returns for how many seconds it pauses.

        `again`: all that is under way in the same moment is refused, too, and counts once.
        """
        halt = self._by_account.setdefault(account, _Halt(found))
        halt.found, halt.tried_at = found, time.monotonic()
        pause = PAUSES[min(halt.times, len(PAUSES) - 1)]
        if again:
            pause = PAUSES[min(max(0, halt.times - 1), len(PAUSES) - 1)]
        else:
            halt.times += 1
        return max(pause, found.pause_ms / 1000)

    def lift(self, account: str) -> bool:
        """One of its events was answered in another way. Whether it was refused before."""
        return self._by_account.pop(account, None) is not None

    def found(self, account: str) -> Verdict | None:
        """The last refusal, while the account pauses."""
        halt = self._by_account.get(account)
        return halt.found if halt else None

    def may_knock(self, account: str) -> float:
        """In how many seconds it may be tried for a caller who waits; 0: at once."""
        halt = self._by_account.get(account)
        return max(0.0, halt.tried_at + KNOCK_SECONDS - time.monotonic()) if halt else 0.0

    def reasons(self) -> dict[str, str]:
        """Account → what the homeserver says."""
        return {account: _words(halt.found) for account, halt in self._by_account.items()}

    def reason(self, account: str) -> str:
        found = self.found(account)
        return _words(found) if found else ""

    def forget(self, keep: set[str]) -> None:
        """Drop all accounts but these."""
        for account in self._by_account.keys() - keep:
            del self._by_account[account]


def _words(found: Verdict) -> str:
    return f"{found.error.error} ({found.error.errcode})" if found.error else ""
