"""Accounts that the homeserver refuses: for how long each pauses, and why.

A suspended user, a homeserver over its limit, terms that are not agreed to: any event would get the same answer. So the
account pauses, longer each time, until one of its events gets another answer. A waiting caller may have it tried early.
"""

import time
from dataclasses import dataclass

from flowbridge.homeserver.answers import Verdict
from flowbridge.models.timing import Timing


@dataclass(slots=True)
class _Halt:
    verdict: Verdict
    times: int = 0
    tried_at: float = 0.0  # monotonic


class Halts:
    """For one event loop."""

    def __init__(self, timing: Timing = Timing()) -> None:
        self._pauses = timing.halt_pauses
        self._retry_seconds = timing.halt_retry_seconds
        self.by_account: dict[str, _Halt] = {}

    def refuse(self, account: str, verdict: Verdict, *, again: bool) -> float:
        """The homeserver refuses the account; returns for how many seconds it pauses.

        `again`: what was in flight in the same moment is refused, too, and counts once.
        """
        halt = self.by_account.setdefault(account, _Halt(verdict))
        halt.verdict, halt.tried_at = verdict, time.monotonic()
        if not again:
            halt.times += 1
        pause = self._pauses[min(max(0, halt.times - 1), len(self._pauses) - 1)]
        return max(pause, verdict.pause_ms / 1000)

    def lift(self, account: str) -> bool:
        """One of its events was answered in another way. Whether it was refused before."""
        return self.by_account.pop(account, None) is not None

    def verdict(self, account: str) -> Verdict | None:
        """The last refusal, while the account pauses."""
        halt = self.by_account.get(account)
        return halt.verdict if halt else None

    def may_retry_in(self, account: str) -> float:
        """Seconds until it may be tried for a caller who waits."""
        halt = self.by_account.get(account)
        return max(0.0, halt.tried_at + self._retry_seconds - time.monotonic()) if halt else 0.0

    def reasons(self) -> dict[str, str]:
        """Account → what the homeserver says."""
        return {account: _words(halt.verdict) for account, halt in self.by_account.items()}

    def reason(self, account: str) -> str:
        verdict = self.verdict(account)
        return _words(verdict) if verdict else ""

    def keep_only(self, accounts: set[str]) -> None:
        for account in self.by_account.keys() - accounts:
            del self.by_account[account]


def _words(verdict: Verdict) -> str:
    return f"{verdict.error.error} ({verdict.error.errcode})" if verdict.error else ""
