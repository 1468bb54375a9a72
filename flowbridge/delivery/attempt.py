"""One attempt at one event: learn whether it may be sent, and whether it was sent already; then send it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from flowbridge.auth.tokens import Known, Tokens, digest_of
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.breaker import Breaker
from flowbridge.delivery.encryption import EncryptionCheck
from flowbridge.delivery.lookup import Lookup
from flowbridge.errors import (
    BadGateway,
    Forbidden,
    GatewayTimeout,
    HeldElsewhere,
    MatrixError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from flowbridge.homeserver import Homeserver, answers, standing
from flowbridge.homeserver.answers import Verdict
from flowbridge.homeserver.standing import Standing
from flowbridge.models import Caller, Event
from flowbridge.store import Row
from flowbridge.store.contents import OTHER_KEY, is_readable

ENCRYPTED = "m.room.encrypted"
REMEMBERED_SECONDS = 20 * 60.0  # for how long a homeserver surely knows a transaction id


@dataclass(slots=True)
class Attempt:
    """One try at an event, and how far it has come.

    `uncertain_since`: the event may have been sent then (seconds), with the token of which `sent_with` is the digest:
    "" for one that is not known, None for the same as now. `must_look`: look for it in its room first, in any case.
    `own`: the token of the caller, which is taken before others of the account; a caller who `waits` hears that it is
    refused.
    """

    row: Row
    uncertain_since: float | None = None
    sent_with: str | None = None
    must_look: bool = False
    own: str = ""
    waits: bool = False
    # What is learnt on the way: what it is encrypted to, if it is; which token sends it; and whether the event was
    # looked for, and is not in its room.
    sealed: bytes | None = None
    token: str = ""
    digest: str = ""
    user_id: str = ""
    device_id: str | None = None
    looked: bool = False
    sending: bool = False
    ends_at: float | None = None  # the loop's clock
    verdict: Verdict | None = None

    @property
    def sent_as(self) -> Row:
        """The event as the homeserver has it."""
        return self.row if self.sealed is None else self.row._replace(event_type=ENCRYPTED, content=self.sealed)


_Step = Callable[[Attempt], Awaitable[Verdict | None]]


class Attempts:
    """Makes attempts, in two steps: the caller decides in between whether the event may still be sent.

    `deadline`: seconds for one attempt, with all that it has to ask.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        tokens: Tokens,
        limits: AccountLimits,
        breaker: Breaker,
        encryption: EncryptionCheck,
        lookup: Lookup,
        *,
        deadline: float = 10.0,
    ) -> None:
        self._homeserver = homeserver
        self._tokens = tokens
        self._limits = limits
        self._breaker = breaker
        self._encryption = encryption
        self._lookup = lookup
        self.deadline = deadline

    def prepare_at_once(self, attempt: Attempt) -> bool:
        """As `prepare`, where nothing has to be asked and it is to be sent; otherwise nothing has happened."""
        known = self._tokens.at_hand(attempt.row.account, attempt.own)
        if attempt.row.is_sealed and not is_readable(attempt.row.content):
            return False
        if known is None or attempt.must_look or not self._asks_nothing(attempt):
            return False
        if attempt.waits and self._tokens.is_refused(attempt.own):
            return False
        self._use(attempt, known)
        return True

    async def prepare(self, attempt: Attempt) -> Verdict | None:
        """Ask all that has to be known before the event is sent. None: it is to be sent."""
        if attempt.must_look or not self._asks_nothing(attempt):  # else the request's own deadline is enough
            attempt.ends_at = asyncio.get_running_loop().time() + self.deadline
        return await self._run(attempt, self._prepare)

    async def send(self, attempt: Attempt) -> Verdict:
        """Send the event, which was prepared."""
        attempt.sending = True
        verdict = await self._run(attempt, self._send)
        assert verdict is not None
        return verdict

    def _asks_nothing(self, attempt: Attempt) -> bool:
        row = attempt.row
        is_certain = attempt.uncertain_since is None and self._tokens.knows(row.account)
        return is_certain and self._encryption.is_known_plain(row.room_id, row.event_type, row.state_key)

    def _run(self, attempt: Attempt, step: _Step) -> Awaitable[Verdict | None]:
        return self._judged(attempt, step) if attempt.ends_at is None else self._within_deadline(attempt, step)

    async def _within_deadline(self, attempt: Attempt, step: _Step) -> Verdict | None:
        try:
            async with asyncio.timeout_at(attempt.ends_at):
                return await self._judged(attempt, step)
        except TimeoutError:
            return attempt.verdict or Verdict("again", error=_late(sending=attempt.sending))

    async def _judged(self, attempt: Attempt, step: _Step) -> Verdict | None:
        """The verdict of a step, also over an error in it."""
        try:
            verdict = answer = await step(attempt)
        except MatrixError as error:
            answer = self._failed(error, sending=attempt.sending)
            verdict = _of_the_event(answer)
        attempt.verdict = verdict
        if answer is not None and answer.kind == "forbidden":
            found = await self._forbidden(answer, attempt)
            return found if found.kind == "absent" else _of_the_event(found)
        return verdict

    async def _prepare(self, attempt: Attempt) -> Verdict | None:
        row, uncertain_since = attempt.row, attempt.uncertain_since
        if row.is_sealed and not is_readable(row.content):
            raise Unavailable(f"the event cannot be read: {OTHER_KEY}")  # it waits for that one
        if attempt.waits and self._tokens.is_refused(attempt.own):  # another send has learnt it
            return Verdict("token", error=Unauthorized("the homeserver does not accept this token any more"))
        known = await self._tokens.of(row.account, attempt.own)
        if known is None:
            reason = self._limits.distrusted.get(row.account) or "those that there were have been refused"
            return Verdict("token", error=Unauthorized(reason))
        device_id = known[1]
        self._use(attempt, known)
        if attempt.must_look or uncertain_since is not None:
            attempt.sealed = await self._encryption.made(row.delivery, row.event_type, row.state_key)
        looks = attempt.must_look or (
            uncertain_since is not None
            and (
                row.state_key is not None
                or attempt.sent_with not in (None, attempt.digest)  # homeservers know a txnId by device, or token
                or _may_be_forgotten(uncertain_since, device_id)
            )
        )
        if looks and (event_id := await self._look(attempt)) is not None:
            return Verdict("sent", event_id)
        if attempt.sealed is not None or self._encryption.is_known_plain(row.room_id, row.event_type, row.state_key):
            return None
        return await self._encrypt(attempt)

    async def _encrypt(self, attempt: Attempt) -> Verdict | None:
        """Where the room is encrypted, encrypt the event; refuse it where that cannot be done."""
        row, encryption = attempt.row, self._encryption
        try:
            encrypts = encryption.encrypts_for(row.account)
        except Unavailable:  # whose event it is does not matter in a plain room
            if not await encryption.refuses(attempt.token, _event(row)):
                return None
            raise
        if not encrypts and not await encryption.refuses(attempt.token, _event(row)):
            return None
        # The room may have been encrypted after the event was sent.
        may_be_there = attempt.uncertain_since is not None and not attempt.looked
        if may_be_there and (event_id := await self._look(attempt)) is not None:
            return Verdict("sent", event_id)
        try:
            if encrypts:
                attempt.sealed = await encryption.encrypt(row.account, _event(row), row.delivery)
            else:
                caller = Caller(attempt.user_id, attempt.device_id, attempt.token)
                attempt.sealed = await encryption.encrypt_for(caller, _event(row), row.delivery)
        except (Forbidden, TooLarge) as error:
            return Verdict("dead", error=error)
        except HeldElsewhere as error:
            return Verdict("elsewhere", error=error, beforehand=True)
        return None

    @staticmethod
    def _use(attempt: Attempt, known: Known) -> None:
        attempt.user_id, attempt.device_id, attempt.token = known
        attempt.digest = digest_of(attempt.token)

    async def _look(self, attempt: Attempt) -> str | None:
        event_id = await self._lookup.find(attempt.sent_as, attempt.token, attempt.user_id)
        attempt.looked = event_id is None
        return event_id

    async def _send(self, attempt: Attempt) -> Verdict:
        row = attempt.sent_as
        verdict = answers.judge(await self._homeserver.send(attempt.token, _event(row), row.txn_id))
        if verdict.error is not None:
            verdict.error.sent = verdict.kind == "again"
        self._breaker.reached()
        return verdict

    def _failed(self, error: MatrixError, *, sending: bool) -> Verdict:
        if isinstance(error, BadGateway | GatewayTimeout) and not error.sent:
            self._breaker.unreached(error)
        else:
            self._breaker.reached()
        error.sent = error.sent and sending
        return replace(answers.refused(error), beforehand=not sending)

    async def _forbidden(self, verdict: Verdict, attempt: Attempt) -> Verdict:
        """The verdict over a 403: "absent", in words, where the account is not in the room.

        That is what an invitation on its way would mend.
        """
        room_id, user_id, token, error = attempt.row.room_id, attempt.user_id, attempt.token, verdict.error
        assert error is not None
        try:
            if await self._homeserver.is_joined(token, room_id, user_id):
                return verdict
        except MatrixError:
            return verdict
        try:
            found = await self._homeserver.standing(token, room_id, user_id)
        except MatrixError:
            found = Standing(user_id, room_id)
        return replace(verdict, kind="absent", error=standing.in_words(error, str(found)))


def _event(row: Row) -> Event:
    return Event(row.room_id, row.event_type, row.content, row.state_key)


def _of_the_event(refused: Verdict) -> Verdict:
    """What the refusal of a question says of the event that it was asked for: nothing, it is asked again.

    It may be in the room already, and a caller who is told that it is dead would send it once more.
    """
    is_final = refused.kind in ("dead", "forbidden")
    return replace(refused, kind="again") if refused.beforehand and is_final else refused


def _late(*, sending: bool) -> MatrixError:
    late = GatewayTimeout("the homeserver did not answer in time")
    late.sent = sending
    return late


def _may_be_forgotten(uncertain_since: float, device_id: str | None) -> bool:
    return device_id is None or time.time() - uncertain_since > REMEMBERED_SECONDS
