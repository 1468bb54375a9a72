"""An event comes in, is checked, and is written down for its room.

Nothing is asked of the homeserver before the payload is known to be right.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal, ParamSpec, TypeVar

from flowbridge import log, metrics
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery import Courier
from flowbridge.delivery.write_queue import Outcome, Ticket
from flowbridge.errors import BadContent, Conflict, Problem, TooLarge
from flowbridge.events import Catalogue, Entry, canonical_json, payload
from flowbridge.homeserver import paths
from flowbridge.limits.processor import Account, Aside
from flowbridge.models import Caller, Event, Payload, Surface
from flowbridge.services import room_upgrades
from flowbridge.store import Row, clock, outbox
from flowbridge.store.errors import ShareTaken

P = ParamSpec("P")
T = TypeVar("T")

MAX_CONTENT_BYTES = 62_000  # of the 65,536 that a whole event may have (specification, "Size limits")
LARGE_BYTES = 16_384  # a larger body is read and checked outside the event loop
MAX_TXN_IDS = 10_000
MEMBER = "m.room.member"
MAX_HELD_BACK = 10_000
HELD_BACK = 0.1  # of the time after which a caller with more than its share should come again


@dataclass(frozen=True, slots=True)
class How:
    """How an event came: by which surface, under which key (Idempotency-Key or txnId), with which body.

    `waits`: the caller wants to know how it ends, and will ask the courier once.
    """

    surface: Surface
    key: str | None = None
    request: bytes = b""
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Receipt:
    """An accepted event. `replayed`: the same had been accepted before, under the same key.

    `waits`: the caller may ask the courier, once, how it ends.
    """

    caller: Caller
    ticket: Ticket
    replayed: bool = False
    waits: bool = True


class Acceptance:
    """`reused_txn_id`: what becomes of other content under a txnId that was used before (Matrix surface)."""

    def __init__(
        self,
        catalogue: Catalogue,
        callers: Callers,
        aliases: RoomAccess,
        tokens: Tokens,
        courier: Courier,
        *,
        reused_txn_id: Literal["send", "replay"] = "send",
        guests: Account | None = None,
    ) -> None:
        self.catalogue = catalogue
        self._callers = callers
        self._room_access = aliases
        self._thread = Aside("check", "bodies that are being checked", guests)
        self._tokens = tokens
        self._instance, self._numbers = secrets.token_urlsafe(16), count()
        self._courier = courier
        self._reused_txn_id = reused_txn_id
        self._txn_ids: dict[str, str] = {}  # key → fingerprint of what was sent under it last
        self._deliveries = _names()
        self._held_back: dict[Credential, tuple[float, ShareTaken]] = {}

    def check_share(self, credential: Credential) -> None:
        """Raises ShareTaken, before a body is read, for a caller that was told so a moment ago.

        To read and check 60 kB takes ten times as long as to refuse them.
        """
        found = self._held_back.get(credential) if self._held_back else None
        if found is None:
            return
        until, error = found
        if time.monotonic() < until:
            raise ShareTaken(error.error, **error.extra)
        del self._held_back[credential]

    def read(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """Any of the body shapes. Raises a 4xx MatrixError."""
        return payload.read(body, content_type, event_type, self.catalogue.required(event_type), surface)

    async def receive(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """As `read`; a large body does not hold up the event loop."""
        if len(body) < LARGE_BYTES:
            return self.read(body, content_type, event_type, surface)
        found = await self._aside(self.read, body, content_type, event_type, surface)
        return replace(found, size=len(body))

    async def check(self, room: str, event_type: str, found: Payload, *, as_state: bool) -> Event:
        """The event that would be sent. Raises BadContent with every problem, or TooLarge.

        `as_state`: the path says that it is a state event. Else the catalogue does, or the body by a state key.
        """
        entry = self.catalogue.select(event_type, found.content)
        if found.size >= LARGE_BYTES:
            return await self._aside(self._check, room, event_type, entry, found, as_state)
        if entry is None or entry.validator.is_valid(found.content):
            return self._check(room, event_type, entry, found, as_state, is_valid=True)
        # To find words for what is wrong takes 1,000 times as long as to see that it is.
        return await self._aside(self._check, room, event_type, entry, found, as_state)

    def _check(
        self, room: str, event_type: str, entry: Entry | None, found: Payload, as_state: bool, *, is_valid: bool = False
    ) -> Event:
        """`is_valid`: the content is known to fit its schema."""
        kind = entry.kind if entry else None
        is_state = as_state or kind == "state" or (kind is None and found.state_key is not None)
        state_key = (found.state_key or "") if is_state else None
        if not isinstance(found.content, dict):
            raise BadContent([Problem("", "must be a JSON object", canonical_json.RULE)])
        content = canonical_json.write(found.content)
        if len(content) > MAX_CONTENT_BYTES:
            raise TooLarge(
                f"the content is {len(content)} bytes of canonical JSON: an event holds at most {MAX_CONTENT_BYTES}"
            )
        if state_key:
            paths.identifier(state_key, "state key")
        problems = [] if entry is None else _problems(entry, found, state_key, as_state, is_valid=is_valid)
        if general := self.catalogue.general.problems(event_type, found.content):
            known = {problem.pointer for problem in problems}  # a schema of the type says it more exactly
            problems = [*problems, *(problem for problem in general if problem.pointer not in known)]
        if problems:
            raise BadContent(problems)
        return Event(room, event_type, content, state_key)

    async def accept(self, credential: Credential, event: Event, how: How) -> Receipt:
        """Write a checked event down, and hand it to the worker.

        Raises Forbidden for a key that is not for this, Conflict for an Idempotency-Key that was used with other
        content, StoreFull and StoreUnavailable.
        """
        permit = partial(self._callers.permit, credential, event.type)
        caller, room_id = await self._room_access.enter(credential, event.room, permit, joins=True, writes=True)
        if event.type == MEMBER:
            _check_member(event, caller)
        ticket = self._ticket(caller, room_id, event, how)
        if how.waits and not self._courier.may_wait(ticket.caller):
            how = _unwaited(how)
            ticket.waiters = 0
        try:
            self._courier.offer(ticket)
        except ShareTaken as error:
            self._hold_back(credential, error)
            raise
        if event.room.startswith("#"):
            ticket.settled.add_done_callback(partial(self._doubt, caller, event.room, room_id))
            self._courier.rouse(ticket.row.lane)  # the room has just been joined, perhaps
        if ticket.idem is not None:
            await ticket.committed
            if ticket.existing is not None:
                return await self._replayed(caller, ticket, ticket.existing, how)
        metrics.count(metrics.accepted, how.surface)
        return Receipt(caller, ticket, waits=how.waits)

    def _hold_back(self, credential: Credential, error: ShareTaken) -> None:
        if len(self._held_back) >= MAX_HELD_BACK:
            del self._held_back[next(iter(self._held_back))]
        seconds = HELD_BACK * error.extra["retry_after_ms"] / 1000
        self._held_back[credential] = (time.monotonic() + seconds, error)

    def _doubt(self, caller: Caller, alias: str, room_id: str, settled: "asyncio.Future[Outcome | None]") -> None:
        """A room that refuses what came by its alias may have been upgraded: the next event is not to go there."""
        if settled.cancelled() or settled.exception() is not None:
            return
        outcome = settled.result()
        if outcome is not None and room_upgrades.is_forbidden(outcome.error):
            self._room_access.doubt(caller, alias, room_id)

    def _ticket(self, caller: Caller, room_id: str, event: Event, how: How) -> Ticket:
        account = self._tokens.remember(caller)
        delivery = next(self._deliveries)
        loop = asyncio.get_running_loop()
        row = Row(
            delivery=delivery,
            lane=f"{account}|{room_id}",
            account=account,
            room_id=room_id,
            event_type=event.type,
            state_key=event.state_key,
            content=event.content,
            txn_id=delivery,
            accepted_at=clock.now_ms(),
            api_key=caller.key.id if caller.key else None,
        )
        ticket = Ticket(row, loop.create_future(), loop.create_future(), waiters=int(how.waits))
        ticket.token = caller.token
        ticket.committed.add_done_callback(_heard)  # who does not wait for the commit need not hear of its failure
        if how.request != event.content:
            ticket.request = how.request.decode("utf-8", "replace").replace("\0", "\ufffd")
        if how.key is not None:
            self._mark(ticket, caller, how, how.key)
        return ticket

    def _mark(self, ticket: Ticket, caller: Caller, how: How, key: str) -> None:
        """Under which key it was accepted: by user, device (or API key), room and event type."""
        row = ticket.row
        ticket.fingerprint = _digest(row.content, (row.state_key or "").encode())
        who = row.api_key or caller.device_id or ""  # a bot may have another device at each replica
        scope = (caller.user_id, who, row.room_id, row.event_type)
        ticket.idem = _digest(*(part.encode() for part in (*scope, how.surface, key)))
        if how.surface == "matrix" and self._reused_txn_id == "send":
            # Real clients use a transaction id again for something else, and lose messages by it.
            before = self._txn_ids.pop(ticket.idem, ticket.fingerprint)
            if before != ticket.fingerprint:
                log.warning("txn_id_reused", was=before, now=ticket.fingerprint, delivery=row.delivery)
            elif len(self._txn_ids) >= MAX_TXN_IDS:
                del self._txn_ids[next(iter(self._txn_ids))]
            self._txn_ids[ticket.idem] = ticket.fingerprint
            ticket.idem = _digest(ticket.idem.encode(), ticket.fingerprint.encode())

    async def _replayed(self, caller: Caller, ticket: Ticket, existing: Mapping[str, Any], how: How) -> Receipt:
        """The delivery that was accepted under the same key before."""
        if existing["fingerprint"] != ticket.fingerprint and how.surface == "flow":
            log.warning(
                "key_reused", was=existing["fingerprint"], now=ticket.fingerprint, delivery=existing["delivery"]
            )
            raise Conflict("this Idempotency-Key was used before, with other content")
        row = outbox.row_of(existing)
        if existing["state"] == "queued":
            joined = await self._courier.join(row, waits=how.waits)
            return Receipt(caller, joined, replayed=True, waits=how.waits)
        error = json.loads(existing["error"]) if existing["error"] else None
        settled = replace(ticket, row=row, settled=asyncio.get_running_loop().create_future(), waiters=1)
        settled.settled.set_result(Outcome(existing["state"], existing["event_id"], error))
        return Receipt(caller, settled, replayed=True)

    async def _aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work in a thread, in turns with other callers, so that fifty hostile bodies of one share its time."""
        return await self._thread.run(work, *args, **kwargs)


def _unwaited(how: How) -> How:
    """For a caller that waits for many outcomes already: it hears that the event is queued, where there is a 202."""
    if how.surface == "matrix":
        raise ShareTaken(
            "too many requests of this account wait for an outcome already: nothing was sent", retry_after_ms=1_000
        )
    return replace(how, waits=False)


def _problems(entry: Entry, found: Payload, state_key: str | None, as_state: bool, *, is_valid: bool) -> list[Problem]:
    problems = []
    if not (is_valid or (as_state and not found.content and entry.clears_by_empty)):
        problems = entry.problems(found.content)
    if entry.kind == "message":
        if as_state:
            message = f"{entry.event_type} is a message event: send it with /send/"
            problems = [Problem("", message, entry.event_type), *problems]
        elif found.state_key is not None:
            message = f"{entry.event_type} is a message event and has no state key"
            problems = [Problem("/state_key", message, entry.event_type), *problems]
    elif state_key is not None and (problem := entry.state_key_problem(state_key)):
        problems = [*problems, problem]
    return problems


def _check_member(event: Event, caller: Caller) -> None:
    """Nobody joins, or knocks, for another user: to a join of a user of another server Synapse 1.163 answers 500."""
    membership = json.loads(event.content).get("membership")
    if membership in ("join", "knock") and event.state_key != caller.user_id:
        message = f"is {membership!r}, which a user says of itself only: the state key is not {caller.user_id}"
        raise BadContent([Problem("/membership", message, MEMBER)])


def _heard(future: "asyncio.Future[None]") -> None:
    if not future.cancelled():
        future.exception()


def _names() -> Iterator[str]:
    """Names of deliveries that nobody else gives. Chance once: for each it would be a system call."""
    prefix = secrets.token_urlsafe(12)
    return (f"{prefix}{number:x}" for number in count(1))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
