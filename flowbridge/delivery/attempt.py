"""One attempt at one event: may it be sent, was it perhaps sent already, and what does the homeserver say."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from flowbridge import log, metrics
from flowbridge.auth.tokens import Tokens, digest_of
from flowbridge.delivery.halts import Halts
from flowbridge.delivery.limiter import RateLimiter
from flowbridge.delivery.lookup import Looks
from flowbridge.delivery.places import Places
from flowbridge.errors import BadGateway, Forbidden, GatewayTimeout, HomeserverError, MatrixError, Unauthorized
from flowbridge.homeserver import Homeserver, answers
from flowbridge.homeserver.answers import Verdict
from flowbridge.models import Event
from flowbridge.store import Database, Row

WIDEST = 64  # requests under way at once
WIDEST_EACH = 48  # of one account: another one that comes finds a place at once
FIRST = 16  # of one account, as long as its limit is not known
REMEMBERED_SECONDS = 20 * 60.0  # for how long a homeserver surely knows a transaction id
TOKEN_PAUSE = 5.0
PLAIN_SECONDS = 10.0  # for how long a room that was found plain is taken to be so
MAX_PLAIN = 10_000
MAX_LIMITERS = 10_000  # accounts that are remembered; those with something under way not counted
FAILURES = 5  # to connect, in a row, and the homeserver is taken to be away
FIRST_PROBE_PAUSE = 0.5
MAX_PROBE_PAUSE = 10.0

_ALWAYS_PLAIN = frozenset({"m.room.encrypted", "m.room.redaction", "m.reaction"})


Refused = Callable[[str, str], Awaitable[None]]  # an account, and its token that is not accepted any more
# Asked with: whether the room has been looked into, and the event is not there; the digest of the token that sends it.
Still = Callable[[bool, str], bool]


@dataclass(slots=True)
class _Attempt:
    """How far an attempt has come."""

    row: Row
    uncertain_since: float | None
    still: Still
    must_look: bool = False
    sent_with: str | None = None
    own: str = ""
    waits: bool = False
    token: str = ""
    user_id: str = ""
    sending: bool = False
    found: Verdict | None = None


class Carrier:
    """Carries events to the homeserver. `deadline`: seconds for one attempt, with all that it has to ask."""

    def __init__(
        self,
        homeserver: Homeserver,
        tokens: Tokens,
        database: Database,
        *,
        refuse_encrypted: bool,
        deadline: float = 10.0,
    ) -> None:
        self._homeserver = homeserver
        self._tokens = tokens
        self._looks = Looks(homeserver, database)
        self._refuse_encrypted = refuse_encrypted
        self._deadline = deadline
        self._everyone = RateLimiter(WIDEST)
        self._places = Places(WIDEST, WIDEST_EACH)
        self._limiters: dict[str, RateLimiter] = {}
        self._plain: dict[str, float] = {}
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Future[None]] = set()
        self._told_at: dict[str, float] = {}  # account → when `on_distrust` was told of it last, monotonic
        self.distrusted: dict[str, str] = {}  # account → why none of its tokens is accepted
        self._halts = Halts()
        self._knocks: dict[str, asyncio.TimerHandle] = {}
        self.on_refusal: Callable[[str, Verdict], None] | None = None  # told of an account that is refused
        self.on_refused: Callable[[str], None] | None = None  # told of each token that is not accepted, at once
        self.on_distrust: Refused | None = None  # told of an account that has no token left

    async def carry(
        self,
        row: Row,
        uncertain_since: float | None,
        still: Still,
        *,
        must_look: bool = False,
        ahead: bool = False,
        sent_with: str | None = None,
        own: str = "",
        waits: bool = False,
    ) -> Verdict | None:
        """Wait for the account's turn, then try once.

        `uncertain_since`: the event may have been sent then, `sent_with` this token (its digest, "" for one that is
        not known, None for the same as now). `must_look`: look for it in its room first, in any case. `ahead`: do not
        wait behind a long queue. `own`: the token of the caller, which is taken before others of the account; a caller
        who `waits` hears that it is refused. `still` is asked right before the event goes out; None when it says that
        it is not to be sent now.
        """
        limiter = self._limiter(row.account)
        account, places = row.account, self._places
        async with limiter.passage(ahead=ahead):
            if not places.finds(account):
                await places.wait(account)
            try:
                async with self._everyone.passage(ahead=ahead):
                    attempt = _Attempt(row, uncertain_since, still, must_look, sent_with, own, waits)
                    found = await self._try(attempt)
                    if found is not None:
                        self._heed(account, limiter, found)  # before the next one is let through
            finally:
                places.leave(account)
        return found

    def _heed(self, account: str, limiter: RateLimiter, found: Verdict) -> None:
        """What an answer says about the account."""
        metrics.count(metrics.attempts, found.kind)
        if found.kind == "slow":
            pause = found.pause_ms / 1000
            metrics.rate_limited.inc(pause)
            limiter.too_much(pause * random.uniform(1.0, 1.02))  # noqa: S311 (spread, no secret)
        elif found.kind == "account":
            self._halt(account, limiter, found)
        elif found.kind != "token":
            limiter.went_well()
            if found.kind != "again" and (self.distrusted or self._halts):
                self.distrusted.pop(account, None)
                if self._halts.lift(account):
                    log.info("account_goes_on", account=account)

    def _halt(self, account: str, limiter: RateLimiter, found: Verdict) -> None:
        """Pause an account that the homeserver refuses, whatever it sends."""
        if self._halts.found(account) is None:
            log.warning("account_paused", account=account, error=found.error.error if found.error else "")
        again = limiter.closed_for > 0
        limiter.too_much(self._halts.refuse(account, found, again=again))
        # Once in each pause: who comes later is tried for, and all that is under way hears its own answer.
        if self.on_refusal is not None and not again:
            self.on_refusal(account, found)

    def knock(self, account: str) -> None:
        """A caller waits: try the account although it pauses since the homeserver refuses it; every 2 s at most."""
        if self._halts.found(account) is None or account in self._knocks:
            return
        pause = self._halts.may_knock(account)
        self._knocks[account] = asyncio.get_running_loop().call_later(pause, self._try_early, account)

    def _try_early(self, account: str) -> None:
        self._knocks.pop(account, None)
        if self._halts.found(account) is not None and (limiter := self._limiters.get(account)) is not None:
            limiter.open()

    @property
    def has_halts(self) -> bool:
        """Whether any account pauses since the homeserver refuses it."""
        return bool(self._halts)

    def refusals(self) -> dict[str, str]:
        """The accounts that the homeserver refuses, or whose token it does not accept → what it says."""
        return {**self._halts.reasons(), **self.distrusted}

    def refusal_of(self, account: str) -> str:
        """What the homeserver says against an account; "" for nothing."""
        return self.distrusted.get(account) or self._halts.reason(account)

    async def refuses(self, token: str, event: Event, *, query: str = "") -> bool:
        """Whether this would put plain text into an encrypted room. Raises MatrixError when nobody can tell.

        `query`: as whom an application service looks.
        """
        if self._is_plain(event.room, event.type, event.state_key):
            return False
        asked = time.monotonic()
        if await self._homeserver.is_encrypted(token, event.room, query):
            return True
        if len(self._plain) >= MAX_PLAIN:
            self._plain.clear()
        self._plain[event.room] = asked + PLAIN_SECONDS
        return False

    def _is_plain(self, room: str, event_type: str, state_key: str | None) -> bool:
        """Whether it is known that this may be sent as it is."""
        if not self._refuse_encrypted or state_key is not None or event_type in _ALWAYS_PLAIN:
            return True
        return self._plain.get(room, 0.0) > time.monotonic()

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
            self._limiter(account).open()

    def pause_of(self, account: str) -> float:
        """Seconds for which nothing of this account will be sent, as far as is known; infinity for no known time."""
        limiter = self._limiters.get(account)
        return max(limiter.closed_for if limiter else 0.0, self._everyone.closed_for)

    def paused(self, seconds: float) -> list[str]:
        """The accounts that will be sent nothing of for longer than this."""
        return [account for account, limiter in self._limiters.items() if limiter.closed_for > seconds]

    @property
    def is_away(self) -> bool:
        """Whether the homeserver cannot be reached at the moment."""
        return self._probing is not None

    def close(self) -> None:
        for task in (self._probing, *self._telling, *self._knocks.values()):
            if task is not None:
                task.cancel()

    def _limiter(self, account: str) -> RateLimiter:
        limiter = self._limiters.get(account)
        if limiter is None:
            if len(self._limiters) >= MAX_LIMITERS:
                self._forget_idle()
            limiter = self._limiters[account] = RateLimiter(WIDEST, FIRST)
        return limiter

    def _forget_idle(self) -> None:
        self._limiters = {account: limiter for account, limiter in self._limiters.items() if not limiter.is_idle}
        for memory in (self.distrusted, self._told_at):
            for account in memory.keys() - self._limiters.keys():
                del memory[account]
        self._halts.forget(set(self._limiters))

    async def _try(self, attempt: _Attempt) -> Verdict | None:
        """One attempt, with all that is asked for it, within the deadline."""
        if not attempt.must_look and self._asks_nothing(
            attempt.row, attempt.uncertain_since
        ):  # then the request's own deadline is enough
            found = await self._ask(attempt)
        else:
            try:
                async with asyncio.timeout(self._deadline):
                    found = await self._ask(attempt)
            except TimeoutError:
                found = attempt.found or Verdict("again", error=_late(sending=attempt.sending))
        if found is not None and found.kind == "token":
            self._refused(attempt.row.account, attempt.token, found)
        return found

    def _asks_nothing(self, row: Row, uncertain_since: float | None) -> bool:
        """Whether nothing has to be known before it is sent."""
        is_certain = uncertain_since is None and self._tokens.knows(row.account)
        return is_certain and self._is_plain(row.room_id, row.event_type, row.state_key)

    async def _ask(self, attempt: _Attempt) -> Verdict | None:
        try:
            found = attempt.found = await self._send(attempt)
        except MatrixError as error:
            refused = self._failed(error, sending=attempt.sending)
            found = attempt.found = _of_the_event(refused)
            if refused.kind == "forbidden" and refused.beforehand:
                return await self._absent(refused, attempt) or found
        if found is not None and found.kind == "forbidden":
            return await self._absent(found, attempt) or found
        return found

    async def _send(self, attempt: _Attempt) -> Verdict | None:
        row = attempt.row
        if attempt.waits and self._tokens.is_refused(attempt.own):  # another send has learnt it
            return Verdict("token", error=Unauthorized("the homeserver does not accept this token any more"))
        known = await self._tokens.of(row.account, attempt.own)
        if known is None:
            reason = self.distrusted.get(row.account) or "those that there were have been refused"
            return Verdict("token", error=Unauthorized(reason))
        attempt.user_id, device_id, attempt.token = known
        digest = digest_of(attempt.token)
        looks = attempt.must_look or (
            attempt.uncertain_since is not None
            and (
                row.state_key is not None
                or attempt.sent_with not in (None, digest)  # homeservers know a transaction id by device, or token
                or _may_be_forgotten(attempt.uncertain_since, device_id)
            )
        )
        if looks and (event_id := await self._looks.find(row, attempt.token, attempt.user_id)) is not None:
            return Verdict("sent", event_id)
        event = Event(row.room_id, row.event_type, row.content, row.state_key)
        if await self.refuses(attempt.token, event):
            if looks or attempt.uncertain_since is None:
                return _REFUSED
            # The room may have been encrypted after the event was sent.
            event_id = await self._looks.find(row, attempt.token, attempt.user_id)
            return _REFUSED if event_id is None else Verdict("sent", event_id)
        if not attempt.still(looks, digest):
            return None
        attempt.sending = True
        found = answers.judge(await self._homeserver.send(attempt.token, event, row.txn_id))
        if found.error is not None:
            found.error.sent = found.kind == "again"
        self._reached()
        return found

    def _failed(self, error: MatrixError, *, sending: bool) -> Verdict:
        if isinstance(error, BadGateway | GatewayTimeout) and not error.sent:
            self._unreached(error)
        else:
            self._reached()
        error.sent = error.sent and sending
        return replace(answers.refused(error), beforehand=not sending)

    async def _absent(self, found: Verdict, attempt: _Attempt) -> Verdict | None:
        """The verdict over a 403 that comes from not being in the room, which an invitation on its way would mend."""
        room_id, user_id = attempt.row.room_id, attempt.user_id
        try:
            joined = await self._homeserver.is_joined(attempt.token, room_id, user_id)
        except MatrixError:
            return None
        if joined or found.error is None:
            return None
        error = f"{user_id} is not in this room: invite {user_id}, or POST /join/{room_id} ({found.error.error})"
        refusal = HomeserverError(
            error, errcode=found.error.errcode, status=found.error.status, **dict(found.error.extra)
        )
        return replace(found, kind="absent", error=refusal)

    def _refused(self, account: str, token: str, found: Verdict) -> None:
        """A token is not accepted, or there is none: from now on another one of the account is used, if it has one."""
        if token and not self._tokens.is_refused(token):
            log.info("token_refused", account=account, error=found.error.error if found.error else "")
            self._tokens.refuse(account, token)
            if self.on_refused is not None:
                self.on_refused(token)
        if not self._tokens.knows(account):
            self._distrust(account, token, found)

    def is_refused(self, token: str) -> bool:
        """Whether the homeserver does not accept a token any more, as far as is known here."""
        return self._tokens.is_refused(token)

    def _distrust(self, account: str, token: str, found: Verdict) -> None:
        reason = found.error.error if found.error else ""
        if account not in self.distrusted:
            log.warning("account_paused", account=account, error=reason)
        self.distrusted[account] = reason
        self._limiter(account).pause(TOKEN_PAUSE)
        now = time.monotonic()
        # Who is told may log in anew, which must not be tried at every answer: homeservers lock such accounts.
        if self.on_distrust is not None and self._told_at.get(account, -TOKEN_PAUSE) < now - TOKEN_PAUSE / 2:
            self._told_at[account] = now
            telling = asyncio.ensure_future(self.on_distrust(account, token))
            self._telling.add(telling)
            telling.add_done_callback(self._told)

    def _told(self, telling: "asyncio.Future[None]") -> None:
        self._telling.discard(telling)
        if not telling.cancelled() and (error := telling.exception()) is not None:
            log.warning("account_still_paused", error=error)

    def _reached(self) -> None:
        self._failures = 0
        self._everyone.went_well()

    def _unreached(self, error: MatrixError) -> None:
        """After some failures to connect, ask for the homeserver's versions instead of sending, until it answers."""
        self._failures += 1
        if self._failures >= FAILURES and self._probing is None:
            self._everyone.shut()
            log.warning("homeserver_away", error=error.error)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        pause = FIRST_PROBE_PAUSE
        await asyncio.sleep(pause)
        while not await self._answers():
            pause = min(pause * 2, MAX_PROBE_PAUSE)
            await asyncio.sleep(pause)
        log.info("homeserver_back")
        self._failures = 0
        self._probing = None
        self._everyone.open()

    async def _answers(self) -> bool:
        """Whether the homeserver is there again: one that answers 429 to this is."""
        try:
            await self._homeserver.versions()
        except HomeserverError as error:
            return error.status < 500
        except Exception:  # whatever it is, sending has to go on one day
            return False
        return True


IN_PLAIN_TEXT = (
    "the room is encrypted, and this would go into it as plain text: send it to another room, or allow it with "
    "FLOWBRIDGE_ENCRYPTED_ROOMS=allow"
)
_REFUSED = Verdict("dead", error=Forbidden(IN_PLAIN_TEXT))


def _of_the_event(refused: Verdict) -> Verdict:
    """What the refusal of a question says of the event that it was asked for: nothing, it is asked again.

    It may be in the room already, and would be doubled by who is told that it is dead.
    """
    is_final = refused.kind in ("dead", "forbidden")
    return replace(refused, kind="again") if refused.beforehand and is_final else refused


def _late(*, sending: bool) -> MatrixError:
    late = GatewayTimeout("the homeserver did not answer in time")
    late.sent = sending
    return late


def _may_be_forgotten(uncertain_since: float, device_id: str | None) -> bool:
    return device_id is None or time.time() - uncertain_since > REMEMBERED_SECONDS
