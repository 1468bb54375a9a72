"""One attempt at one event: may it be sent, was it perhaps sent already, and what does the homeserver say."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from flowbridge import log, metrics
from flowbridge.delivery.gate import Gate
from flowbridge.delivery.places import Places
from flowbridge.errors import BadGateway, Forbidden, GatewayTimeout, HomeserverError, MatrixError, Unauthorized
from flowbridge.homeserver import Homeserver, verdict
from flowbridge.homeserver.verdict import Verdict
from flowbridge.models import Event
from flowbridge.store import Database, Row, outbox
from flowbridge.tokens import Tokens

WIDEST = 64  # requests under way at once
WIDEST_EACH = 48  # of one account: another one that comes finds a place at once
FIRST = 16  # of one account, as long as its limit is not known
REMEMBERED_SECONDS = 20 * 60.0  # for how long a homeserver surely knows a transaction id
TOKEN_PAUSE = 5.0
PLAIN_SECONDS = 10.0  # for how long a room that was found plain is taken to be so
MAX_PLAIN = 10_000
MAX_GATES = 10_000  # accounts that are remembered; those with something under way not counted
FAILURES = 5  # to connect, in a row, and the homeserver is taken to be away
FIRST_PROBE_PAUSE = 0.5
MAX_PROBE_PAUSE = 10.0
CLOCK_SKEW_MS = 60_000

_ALWAYS_PLAIN = frozenset({"m.room.encrypted", "m.room.redaction", "m.reaction"})


Refused = Callable[[str, str], Awaitable[None]]  # an account, and its token that is not accepted any more
Still = Callable[[bool], bool]  # asked with: whether the room has been looked into, and the event is not there


@dataclass(slots=True)
class _Attempt:
    """How far an attempt has come."""

    row: Row
    uncertain_since: float | None
    still: Still
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
        self._database = database
        self._refuse_encrypted = refuse_encrypted
        self._deadline = deadline
        self._everyone = Gate(WIDEST)
        self._places = Places(WIDEST, WIDEST_EACH)
        self._gates: dict[str, Gate] = {}
        self._plain: dict[str, float] = {}
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Future[None]] = set()
        self._told_at: dict[str, float] = {}  # account → when `on_distrust` was told of it last, monotonic
        self.distrusted: dict[str, str] = {}  # account → why its token is not accepted
        self.on_distrust: Refused | None = None

    async def carry(self, row: Row, uncertain_since: float | None, still: Still) -> Verdict | None:
        """Wait for the account's turn, then try once. `uncertain_since`: the event may have been sent then.

        `still` is asked right before the event goes out; None when it says that it is not to be sent any more.
        """
        gate = self._gate(row.account)
        account, places = row.account, self._places
        async with gate.passage():
            if not places.finds(account):
                await places.wait(account)
            try:
                async with self._everyone.passage():
                    found = await self._try(_Attempt(row, uncertain_since, still))
                    if found is not None:
                        self._heed(account, gate, found)  # before the next one is let through
            finally:
                places.leave(account)
        return found

    def _heed(self, account: str, gate: Gate, found: Verdict) -> None:
        """What an answer says about the account."""
        metrics.count(metrics.attempts, found.kind)
        if found.kind == "slow":
            pause = found.pause_ms / 1000
            metrics.rate_limited.inc(pause)
            gate.too_much(pause * random.uniform(1.0, 1.02))  # noqa: S311 (spread, no secret)
        elif found.kind != "token":
            gate.went_well()
            if found.kind != "again" and self.distrusted:
                self.distrusted.pop(account, None)

    async def refuses(self, token: str, event: Event) -> bool:
        """Whether this would put plain text into an encrypted room. Raises MatrixError when nobody can tell."""
        if self._is_plain(event.room, event.type, event.state_key):
            return False
        asked = time.monotonic()
        if await self._homeserver.is_encrypted(token, event.room):
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

    def trust(self, account: str) -> None:
        """The account has a new token."""
        if self.distrusted.pop(account, None) is not None:
            self._gate(account).open()

    def pause_of(self, account: str) -> float:
        """Seconds for which nothing of this account will be sent, as far as is known; infinity for no known time."""
        gate = self._gates.get(account)
        return max(gate.closed_for if gate else 0.0, self._everyone.closed_for)

    def paused(self, seconds: float) -> list[str]:
        """The accounts that will be sent nothing of for longer than this."""
        return [account for account, gate in self._gates.items() if gate.closed_for > seconds]

    @property
    def is_away(self) -> bool:
        """Whether the homeserver cannot be reached at the moment."""
        return self._probing is not None

    def close(self) -> None:
        for task in (self._probing, *self._telling):
            if task is not None:
                task.cancel()

    def _gate(self, account: str) -> Gate:
        gate = self._gates.get(account)
        if gate is None:
            if len(self._gates) >= MAX_GATES:
                self._forget_idle()
            gate = self._gates[account] = Gate(WIDEST, FIRST)
        return gate

    def _forget_idle(self) -> None:
        self._gates = {account: gate for account, gate in self._gates.items() if not gate.is_idle}
        for memory in (self.distrusted, self._told_at):
            for account in memory.keys() - self._gates.keys():
                del memory[account]

    async def _try(self, attempt: _Attempt) -> Verdict | None:
        """One attempt, with all that is asked for it, within the deadline."""
        if self._asks_nothing(attempt.row, attempt.uncertain_since):  # then the request's own deadline is enough
            found = await self._ask(attempt)
        else:
            try:
                async with asyncio.timeout(self._deadline):
                    found = await self._ask(attempt)
            except TimeoutError:
                found = attempt.found or Verdict("again", error=_late(sending=attempt.sending))
        if found is not None and found.kind == "token":
            self._distrust(attempt.row.account, attempt.token, found)
        return found

    def _asks_nothing(self, row: Row, uncertain_since: float | None) -> bool:
        """Whether nothing has to be known before it is sent."""
        is_certain = uncertain_since is None and self._tokens.knows(row.account)
        return is_certain and self._is_plain(row.room_id, row.event_type, row.state_key)

    async def _ask(self, attempt: _Attempt) -> Verdict | None:
        try:
            found = attempt.found = await self._send(attempt)
        except MatrixError as error:
            found = attempt.found = self._failed(error, sending=attempt.sending)
        if found is not None and found.kind == "forbidden":
            return await self._absent(found, attempt)
        return found

    async def _send(self, attempt: _Attempt) -> Verdict | None:
        row = attempt.row
        known = await self._tokens.of(row.account)
        if known is None:
            return Verdict("token", error=Unauthorized("the token of this account is not known any more"))
        attempt.user_id, device_id, attempt.token = known
        looks = attempt.uncertain_since is not None and (
            row.state_key is not None or _may_be_forgotten(attempt.uncertain_since, device_id)
        )
        if looks and (event_id := await self._find(attempt)) is not None:
            return Verdict("sent", event_id)
        event = Event(row.room_id, row.event_type, row.content, row.state_key)
        if await self.refuses(attempt.token, event):
            return _REFUSED
        if not attempt.still(looks):
            return None
        attempt.sending = True
        found = verdict.judge(await self._homeserver.send(attempt.token, event, row.txn_id))
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
        return verdict.refused(error)

    async def _absent(self, found: Verdict, attempt: _Attempt) -> Verdict:
        """Whether a 403 comes from not being in the room, which an invitation on its way would mend."""
        try:
            joined = await self._homeserver.is_joined(attempt.token, attempt.row.room_id, attempt.user_id)
        except MatrixError:
            return found
        return found if joined else replace(found, kind="absent")

    def _distrust(self, account: str, token: str, found: Verdict) -> None:
        reason = found.error.error if found.error else ""
        if account not in self.distrusted:
            log.warning("account_paused", account=account, error=reason)
        self.distrusted[account] = reason
        self._gate(account).too_much(TOKEN_PAUSE)
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

    async def _find(self, attempt: _Attempt) -> str | None:
        """Look for an event in its room: by transaction id, or by equal content since it was accepted.

        Also for a state, which has no transaction id: once more it would undo what was set after it.
        """
        row = attempt.row
        content, before = json.loads(row.content), ""
        since = row.accepted_at - CLOCK_SKEW_MS
        alike: list[str] = []
        while True:
            events, before = await self._homeserver.recent(attempt.token, row.room_id, before)
            for event in events:
                if event.get("sender") != attempt.user_id or event.get("type") != row.event_type:
                    continue
                if event.get("state_key") != row.state_key:
                    continue
                txn_id = (event.get("unsigned") or {}).get("transaction_id")
                if txn_id == row.txn_id:
                    return str(event.get("event_id"))
                if txn_id is None and event.get("content") == content and _sent_at(event) >= since:
                    alike.append(str(event.get("event_id")))
            if not before or all(_sent_at(event) < since for event in events):
                break  # not at the first old one: any homeserver may give its events any time
        if not alike:
            return None
        others = await self._database.run(
            lambda connection: outbox.sent_before(connection, row.lane, since - CLOCK_SKEW_MS, alike)
        )
        return next((event_id for event_id in reversed(alike) if event_id not in others), None)

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


def _late(*, sending: bool) -> MatrixError:
    late = GatewayTimeout("the homeserver did not answer in time")
    late.sent = sending
    return late


def _sent_at(event: dict[str, Any]) -> int:
    """A homeserver's time of an event, in milliseconds."""
    at = event.get("origin_server_ts")
    return at if isinstance(at, int) else 0


def _may_be_forgotten(uncertain_since: float, device_id: str | None) -> bool:
    return device_id is None or time.time() - uncertain_since > REMEMBERED_SECONDS
