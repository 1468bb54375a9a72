"""Which accounts may send, and how fast: what the homeserver's answers say of each."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

from flowbridge import log, metrics
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery.fairness import Places
from flowbridge.delivery.halts import Halts
from flowbridge.delivery.limiter import WIDEST, RateLimiter
from flowbridge.homeserver.answers import Verdict
from flowbridge.models.timing import Timing

WIDEST_EACH = 48  # requests in flight of one account: another one that comes finds a place at once
FIRST = 16  # likewise, as long as its limit is not known
MAX_ACCOUNTS = 10_000  # that are remembered; those with a request in flight not counted


class AccountLimits:
    """A request passes its account's `limiter`, takes one of the `places`, and passes `everyone`, the limiter of all.

    `on_refused` is told of each token that is not accepted, at once. `on_distrust` is told of an account that has no
    token left, and of the last one. For one event loop.
    """

    def __init__(
        self,
        tokens: Tokens,
        everyone: RateLimiter,
        *,
        on_refused: Callable[[str], None] | None = None,
        on_distrust: Callable[[str, str], Awaitable[None]] | None = None,
        first: int = FIRST,
        max_accounts: int = MAX_ACCOUNTS,
        timing: Timing = Timing(),
    ) -> None:
        self._tokens = tokens
        self.everyone = everyone
        self._on_refused = on_refused
        self._on_distrust = on_distrust
        self._first = first
        self._max_accounts = max_accounts
        self._token_pause = timing.token_pause
        self.places = Places(WIDEST, WIDEST_EACH)
        self._limiters: dict[str, RateLimiter] = {}
        self._halts = Halts(timing)
        self._retries: dict[str, asyncio.TimerHandle] = {}  # of halted accounts, for callers who wait
        self._distrust_told_at: dict[str, float] = {}  # account → when `on_distrust` was called last, monotonic
        self._telling: set[asyncio.Future[None]] = set()
        self.distrusted: dict[str, str] = {}  # account → why none of its tokens is accepted

    def permit(self, account: str, *, ahead: bool) -> "_Permit":
        """`async with limits.permit(account):` waits until a request of this account may go out, and holds its places.

        `ahead`: it waits behind no backlog.
        """
        return _Permit(self, account, ahead)

    def apply(self, account: str, verdict: Verdict, token: str) -> bool:
        """Learn from an answer to a request with this token, before the next one is let through.

        Returns whether the account pauses from now on since the homeserver refuses it: once for each pause.
        """
        metrics.count(metrics.attempts, verdict.kind)
        if verdict.kind == "token":
            self._refuse_token(account, token, verdict)
        elif verdict.kind == "slow":
            pause = verdict.pause_ms / 1000
            metrics.rate_limited.inc(pause)
            self.limiter(account).too_much(pause * random.uniform(1.0, 1.02))  # noqa: S311 (spread, no secret)
        elif verdict.kind == "account":
            return self._halt(account, verdict)
        else:
            self.limiter(account).went_well()
            if verdict.kind != "again" and (self.distrusted or self._halts.by_account):
                self.distrusted.pop(account, None)
                if self._halts.lift(account):
                    log.info("account_goes_on", account=account)
        return False

    # accounts that the homeserver refuses

    def _halt(self, account: str, verdict: Verdict) -> bool:
        """Pause an account that the homeserver refuses, whatever it sends."""
        if self._halts.verdict(account) is None:
            log.warning("account_paused", account=account, error=verdict.error.error if verdict.error else "")
        limiter = self.limiter(account)
        again = limiter.closed_for > 0
        limiter.too_much(self._halts.refuse(account, verdict, again=again))
        return not again  # whatever was in flight when the pause began hears its own answer

    def retry_soon(self, account: str) -> None:
        """A caller waits: try the account although it pauses since the homeserver refuses it; every 2 s at most."""
        if self._halts.verdict(account) is None or account in self._retries:
            return
        pause = self._halts.may_retry_in(account)
        self._retries[account] = asyncio.get_running_loop().call_later(pause, self._retry, account)

    def _retry(self, account: str) -> None:
        self._retries.pop(account, None)
        if self._halts.verdict(account) is not None and (limiter := self._limiters.get(account)) is not None:
            limiter.open()

    @property
    def has_halts(self) -> bool:
        """Whether any account pauses since the homeserver refuses it."""
        return bool(self._halts.by_account)

    def refusals(self) -> dict[str, str]:
        """The accounts that the homeserver refuses, or whose token it does not accept → what it says."""
        return {**self._halts.reasons(), **self.distrusted}

    def refusal_of(self, account: str) -> str:
        """What the homeserver says against an account; "" for nothing."""
        return self.distrusted.get(account) or self._halts.reason(account)

    # tokens that the homeserver does not accept

    def _refuse_token(self, account: str, token: str, verdict: Verdict) -> None:
        """A token is not accepted, or there is none: from now on another one of the account is used, if it has one."""
        reason = verdict.error.error if verdict.error else ""
        if token and not self._tokens.is_refused(token):
            log.info("token_refused", account=account, error=reason)
            self._tokens.refuse(account, token)
            if self._on_refused is not None:
                self._on_refused(token)
        if not self._tokens.knows(account):
            self._distrust(account, token, reason)

    def _distrust(self, account: str, token: str, reason: str) -> None:
        if account not in self.distrusted:
            log.warning("account_paused", account=account, error=reason)
        self.distrusted[account] = reason
        self.limiter(account).pause(self._token_pause)
        now, told_at = time.monotonic(), self._distrust_told_at.get(account, -self._token_pause)
        # The call may log in again, which must not be tried at every answer: homeservers lock such accounts.
        if self._on_distrust is not None and told_at < now - self._token_pause / 2:
            self._distrust_told_at[account] = now
            telling = asyncio.ensure_future(self._on_distrust(account, token))
            self._telling.add(telling)
            telling.add_done_callback(self._told)

    def _told(self, telling: "asyncio.Future[None]") -> None:
        self._telling.discard(telling)
        if not telling.cancelled() and (error := telling.exception()) is not None:
            log.warning("account_still_paused", error=error)

    def is_refused(self, token: str) -> bool:
        """Whether the homeserver does not accept a token any more, as far as is known here."""
        return self._tokens.is_refused(token)

    def waits_for(self, account: str) -> str:
        """Why nothing of this account is sent until it has another token; "" where that is not so."""
        reason = self.distrusted.get(account)
        return "" if reason is None else f"no access token of its account is accepted: {reason}"

    def trust(self, account: str, again: bool = False) -> None:
        """The account has a new token; `again`: one that was refused before, and shows itself good by sending."""
        is_distrusted = account in self.distrusted
        if is_distrusted and not again:
            del self.distrusted[account]
        if self._halts.lift(account) or is_distrusted:
            self.limiter(account).open()

    # pauses

    def pause_of(self, account: str) -> float:
        """Seconds for which nothing of this account will be sent, as far as is known; infinity for no known time."""
        limiter = self._limiters.get(account)
        return max(limiter.closed_for if limiter else 0.0, self.everyone.closed_for)

    def paused(self, seconds: float) -> list[str]:
        """The accounts that will be sent nothing of for longer than this."""
        return [account for account, limiter in self._limiters.items() if limiter.closed_for > seconds]

    def stop(self) -> None:
        for telling in self._telling:
            telling.cancel()
        for retry in self._retries.values():
            retry.cancel()

    def __len__(self) -> int:
        """How many accounts are remembered."""
        return len(self._limiters)

    def limiter(self, account: str) -> RateLimiter:
        limiter = self._limiters.get(account)
        if limiter is None:
            if len(self._limiters) >= self._max_accounts:
                self._forget_idle()
            limiter = self._limiters[account] = RateLimiter(WIDEST, self._first)
        return limiter

    def _forget_idle(self) -> None:
        self._limiters = {account: limiter for account, limiter in self._limiters.items() if not limiter.is_idle}
        for memory in (self.distrusted, self._distrust_told_at):
            for account in memory.keys() - self._limiters.keys():
                del memory[account]
        self._halts.keep_only(set(self._limiters))


class _Permit:
    """What a request holds while it is in flight. Mostly all of it is free, and taken without a wait."""

    __slots__ = ("_account", "_ahead", "_limiter", "_limits", "_waited")

    def __init__(self, limits: AccountLimits, account: str, ahead: bool) -> None:
        self._limits = limits
        self._limiter = limits.limiter(account)
        self._account = account
        self._ahead = ahead
        self._waited: contextlib.AsyncExitStack | None = None

    async def __aenter__(self) -> None:
        if not self._is_free():
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(self._limiter.passage(ahead=self._ahead))
                await stack.enter_async_context(self._limits.places.hold(self._account))
                await stack.enter_async_context(self._limits.everyone.passage(ahead=self._ahead))
                self._waited = stack.pop_all()

    def _is_free(self) -> bool:
        """Take all at once, or nothing."""
        if not self._limiter.enters():
            return False
        if self._limits.places.finds(self._account):
            if self._limits.everyone.enters():
                return True
            self._limits.places.leave(self._account)
        self._limiter.leave()
        return False

    async def __aexit__(self, *_: object) -> None:
        if self._waited is not None:
            await self._waited.aclose()
            return
        self._limits.everyone.leave()
        self._limits.places.leave(self._account)
        self._limiter.leave()
