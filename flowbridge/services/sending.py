"""Send an event: accept it, wait for its outcome, and report that to the caller. Knows nothing of HTTP's headers.

The report is the promise (docs/reliability.md): the event is in its room; it is refused, and why; it is queued and
will be sent; or its outcome is unknown, and how to find out.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

from flowbridge import log
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.delivery import Worker
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.breaker import Breaker
from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.errors import BadGateway, Errcode, GatewayTimeout, MatrixError
from flowbridge.homeserver import Homeserver, standing
from flowbridge.models import Event, Surface
from flowbridge.services import room_upgrades
from flowbridge.services.acceptance import Acceptance, How, Receipt


class Told(NamedTuple):  # a frozen dataclass takes 1 µs more to make, which is for each send
    """What a caller hears of an accepted event: exactly one of `event_id`, `error` and `status`.

    `status` (queued, sent, dead): how far it is; to be answered with a 202. `replayed`: it had been accepted before,
    under the same key. `following`: the same of the events that follow it in its message.
    """

    delivery: str
    user_id: str
    replayed: bool
    event_id: str | None = None
    error: MatrixError | None = None
    status: str = ""
    following: "tuple[Told, ...]" = ()
    history: Sequence[Mapping[str, Any]] = ()


class Sender:
    """Sends events of both surfaces.

    Matrix clients do not know a 202: instead of `status` they hear that nothing was sent, or that it may have been.
    """

    def __init__(
        self,
        acceptance: Acceptance,
        callers: Callers,
        room_access: RoomAccess,
        homeserver: Homeserver,
        worker: Worker,
        limits: AccountLimits,
        breaker: Breaker,
    ) -> None:
        self._acceptance = acceptance
        self._callers = callers
        self._room_access = room_access
        self._homeserver = homeserver
        self._worker = worker
        self._limits = limits
        self._breaker = breaker

    def send_together(
        self, credential: Credential, events: Sequence[Event], how: How, patience: float
    ) -> Awaitable[Told]:
        """As `send`, for the events of one message on the flow surface."""
        if len(events) == 1:
            return self.send(credential, events[0], how, patience)
        return self._send_several(credential, events, how, patience)

    async def _send_several(self, credential: Credential, events: Sequence[Event], how: How, patience: float) -> Told:
        first, *following = events
        ends = time.monotonic() + patience
        receipt = await self._acceptance.accept(credential, first, how, following)
        outcomes = await self._outcomes(receipt, how, patience)
        if first.room.startswith("#") and outcomes[0] is not None and room_upgrades.is_forbidden(outcomes[0].error):
            again = await self._accepted_elsewhere(credential, events, how, receipt)
            if again is not None:
                receipt, outcomes = again, await self._outcomes(again, how, max(0.0, ends - time.monotonic()))
        return await self._told_together(receipt, outcomes)

    async def repeat(
        self, credential: Credential, room: str, event_type: str, how: How, events: int, patience: float
    ) -> Told | None:
        """What became of a message of so many events that was accepted under the same key before; None without one.

        Raises Conflict where that one was another.
        """
        receipt = await self._acceptance.earlier(credential, room, event_type, how, events - 1)
        if receipt is None:
            return None
        return await self._told_together(receipt, await self._outcomes(receipt, how, patience))

    async def _told_together(self, receipt: Receipt, outcomes: Sequence[Outcome | None]) -> Told:
        told = [
            await self._told_of(receipt._replace(pending=pending), outcome)
            for pending, outcome in zip((receipt.pending, *receipt.following), outcomes, strict=True)
        ]
        return told[0]._replace(following=tuple(told[1:]))

    async def _outcomes(self, receipt: Receipt, how: How, seconds: float) -> list[Outcome | None]:
        """Of all events of a message. Waited for at once: those behind a refused one hear it, too."""
        deliveries = (receipt.pending, *receipt.following)
        if not (how.waits and receipt.waits):
            return [None for _ in deliveries]
        return await asyncio.gather(*(self._worker.wait(pending, seconds) for pending in deliveries))

    async def _told_of(self, receipt: Receipt, outcome: Outcome | None) -> Told:
        try:
            if outcome is not None:
                return await self._ended(receipt, outcome, "flow")
            return _told(receipt, status=await self._accepted(receipt))
        except MatrixError as error:
            return _told(receipt, error=error)

    async def send(self, credential: Credential, event: Event, how: How, patience: float) -> Told:
        """Accept a checked event and, if `how.waits`, wait for its outcome for `patience` seconds.

        Raises what `Acceptance.accept` does: then nothing was accepted.
        """
        return await self.outcome(
            credential, event, how, await self._acceptance.accept(credential, event, how), patience
        )

    def outcome_at_once(self, receipt: Receipt) -> Told | None:
        """What its caller hears, where that is the good news, and nothing has to be awaited any more: most sends."""
        pending = receipt.pending
        settled, committed = pending.settled, pending.committed
        outcome = settled.result() if is_good(settled) else None
        if receipt.waits:
            is_sent = outcome is not None and outcome.state == "sent"
            return _told(receipt, event_id=outcome.event_id) if is_sent and outcome is not None else None
        if not is_good(committed):
            return None
        return _told(receipt, status=outcome.state if outcome is not None else "queued")

    async def outcome(self, credential: Credential, event: Event, how: How, receipt: Receipt, patience: float) -> Told:
        """As `send`, of an event that was accepted."""
        waits = how.waits and receipt.waits
        ends = time.monotonic() + patience
        try:
            outcome = await self._worker.wait(receipt.pending, patience) if waits else None
            if event.room.startswith("#") and outcome is not None and room_upgrades.is_forbidden(outcome.error):
                receipt, outcome = await self._follow(credential, event, how, receipt, outcome, ends)
            if outcome is not None:
                return await self._ended(receipt, outcome, how.surface)
            if waits and how.surface == "matrix":
                return _told(receipt, error=await self._unsettled(receipt.pending))
            return _told(receipt, status=await self._accepted(receipt))
        except MatrixError as error:
            return _told(receipt, error=error)

    async def _follow(
        self, credential: Credential, event: Event, how: How, receipt: Receipt, outcome: Outcome, ends: float
    ) -> tuple[Receipt, Outcome | None]:
        """Send an event again after its room refused it, when its alias leads to another room by now.

        The refusal stays in the delivery log. It is also the answer where the caller may not join the new room.
        """
        again = await self._accepted_elsewhere(credential, [event], how, receipt)
        if again is None:
            return receipt, outcome
        if not again.waits:
            return again, None
        return again, await self._worker.wait(again.pending, max(0.0, ends - time.monotonic()))

    async def _accepted_elsewhere(
        self, credential: Credential, events: Sequence[Event], how: How, receipt: Receipt
    ) -> Receipt | None:
        """The events of a refused message, in the room that their alias leads to by now; None if that is the same."""
        row, (first, *following) = receipt.pending.row, events
        try:
            if not await self._room_access.moved(receipt.caller, first.room, row.room_id):
                return None
            again = await self._acceptance.accept(credential, first, how, following)
        except MatrixError as error:
            log.info("alias_not_followed", alias=first.room, room=row.room_id, error=error.error)
            return None
        log.info("alias_moved", alias=first.room, room=row.room_id, now=again.pending.row.room_id)
        return again

    async def _accepted(self, receipt: Receipt) -> str:
        """How far it is, once it is on the disk. Raises GatewayTimeout when the store cannot tell whether it is."""
        pending = receipt.pending
        if not receipt.replayed:
            try:
                await pending.committed
            except MatrixError:
                if pending.withdrawn:
                    raise
                raise GatewayTimeout("the store cannot be written, and the event may be on its way") from None
        outcome = pending.settled.result() if pending.settled.done() else None
        return outcome.state if outcome is not None else "queued"

    async def _ended(self, receipt: Receipt, outcome: Outcome, surface: Surface) -> Told:
        if outcome.state == "sent":
            return _told(receipt, event_id=outcome.event_id)
        caller, found = receipt.caller, dict(outcome.error or {})
        if room_upgrades.is_forbidden(found):
            found = await room_upgrades.explained(self._homeserver, caller, receipt.pending.row.room_id, found)
            if surface == "flow" and "flowbridge" not in found:
                own = found.get("error", "")
                words = standing.of_power(caller.user_id, receipt.pending.row.event_type, own)
                found["error"] = f"{words} ({own})" if words else own
        if surface == "matrix":
            found = standing.as_it_came(found)
        error = MatrixError(
            found.pop("error", ""),
            errcode=found.pop("errcode", None),
            status=int(found.pop("status", 500)),
        )
        error.extra = found
        return _told(receipt, error=self._callers.refused(caller, error))

    async def _unsettled(self, pending: PendingDelivery) -> MatrixError:
        """The answer for a Matrix client instead of a 202, which it would not know."""
        account = pending.row.account
        pause = self._limits.pause_of(account)
        if not await self._worker.withdraw(pending):
            return GatewayTimeout(
                "the homeserver has not answered yet: the event may be sent; the same txnId finds out"
            )
        if pending.row.api_key is not None and (reason := self._limits.distrusted.get(account)):
            return BadGateway(f"nothing was sent: the homeserver does not accept the bridge's own account: {reason}")
        if pending.attempts:
            return BadGateway(f"nothing was sent: {pending.history[-1]['error']}")
        if self._breaker.is_open:
            return BadGateway("nothing was sent: the homeserver is away")
        return MatrixError(
            "nothing was sent: other events go first",
            status=429,
            errcode=Errcode.LIMIT_EXCEEDED,
            retry_after_ms=int(min(pause, 60.0) * 1000) or 1_000,
        )


def is_good(future: "asyncio.Future[Any]") -> bool:
    """Whether it is done, and has a result."""
    return future.done() and not future.cancelled() and future.exception() is None


def _told(receipt: Receipt, *, event_id: str | None = None, error: MatrixError | None = None, status: str = "") -> Told:
    pending = receipt.pending
    user_id, replayed = receipt.caller.user_id, receipt.replayed
    return Told(pending.row.delivery, user_id, replayed, event_id, error, status, history=pending.history)
