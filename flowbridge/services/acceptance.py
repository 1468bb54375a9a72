"""Check an event, and write it down for its room. The homeserver is asked nothing before the payload is valid."""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

from flowbridge import log, metrics
from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery import Worker
from flowbridge.delivery.pending import KeyBefore, Outcome, PendingDelivery
from flowbridge.errors import BadContent, Conflict, Problem
from flowbridge.events import Catalogue, Entry, canonical_json, payload, size
from flowbridge.homeserver import identifiers
from flowbridge.limits.processor import Account, Aside
from flowbridge.models import Caller, Event, Payload, Surface
from flowbridge.services import room_upgrades
from flowbridge.services.at_rest import PLAIN, AtRest
from flowbridge.store import Row, clock, outbox
from flowbridge.store.errors import ShareTaken
from flowbridge.store.json_columns import from_json, to_json

LARGE_BYTES = 16_384  # of a body: a smaller one is read and checked at once, whatever is in it, in 0.7 ms at most, …
LARGEST_BYTES = 65_536  # … and one up to an event's size, too, where it has no more parts than that may have
MAX_PARTS = 1_200  # of JSON, each of which takes 0.5 µs; a kilobyte of text takes 5 µs
PARTS = (b",", b"[", b"{", b"%", b"&")  # what begins one, of JSON or of a form
MAX_TXN_IDS = 10_000
MEMBER = "m.room.member"
MAX_HELD_BACK = 10_000
HELD_BACK = 0.1  # of the time after which a caller beyond its share should try again


@dataclass(frozen=True, slots=True)
class How:
    """How an event came: on which surface, under which key (Idempotency-Key or txnId), in which body.

    `waits`: the caller wants its outcome, and will ask the worker for it once. `meaning`: what a repeat under the same
    key has to be equal in, where that is not the event's content. `before`: another key under which the
    same is a repeat. `notes`: what its history says from the beginning. `is_patient`: the caller does not mind
    some milliseconds more, if that saves others some.
    """

    surface: Surface
    key: str | None = None
    request: bytes = b""
    waits: bool = True
    meaning: bytes | None = None
    before: KeyBefore | None = None
    notes: tuple[str, ...] = ()
    is_patient: bool = False


class Receipt(NamedTuple):  # as `Row`: a frozen dataclass takes longer to make
    """An accepted event. `replayed`: it had been accepted before, under the same key.

    `waits`: the caller may ask the worker for its outcome, once. `following`: the other events of its message, for
    which the same holds.
    """

    caller: Caller
    pending: PendingDelivery
    replayed: bool = False
    waits: bool = True
    following: tuple[PendingDelivery, ...] = ()


def is_large(body: bytes) -> bool:
    """Whether a body is read and checked outside the event loop.

    Handing it over to a thread and back costs a send 330 µs, twice: as much as reading and checking 60 kB of text.
    """
    if len(body) < LARGE_BYTES:
        return False
    return len(body) > LARGEST_BYTES or sum(map(body.count, PARTS)) > MAX_PARTS


class Acceptance:
    """`reused_txn_id`: what becomes of other content under a txnId that was used before (Matrix surface).

    `at_rest`: how what may be for an encrypted room is kept from those who read the store.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        room_access: RoomAccess,
        tokens: Tokens,
        worker: Worker,
        *,
        reused_txn_id: Literal["send", "replay"] = "send",
        at_rest: AtRest = PLAIN,
        guests: Account | None = None,
    ) -> None:
        self.catalogue = catalogue
        self._room_access = room_access
        # Callers take turns with its threads: fifty hostile bodies of one caller share the time of one.
        self.aside = Aside("check", "bodies that are being checked", guests).run
        self._tokens = tokens
        self._worker = worker
        self._reused_txn_id = reused_txn_id
        self.at_rest = at_rest
        self._txn_ids: dict[str, str] = {}  # key → fingerprint of the content last sent under it
        self._deliveries = _ids()
        self._held_back: dict[Credential, tuple[float, ShareTaken]] = {}

    def check_share(self, credential: Credential) -> None:
        """Raises ShareTaken, before a body is read, for a caller that was refused with it shortly before.

        Reading and checking 60 kB takes ten times as long as refusing them.
        """
        found = self._held_back.get(credential) if self._held_back else None
        if found is None:
            return
        until, error = found
        if time.monotonic() < until:
            raise ShareTaken(error.error, **error.extra)
        del self._held_back[credential]

    def read(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """Read a body of any shape. Raises a 4xx MatrixError."""
        return payload.read(body, content_type, event_type, self.catalogue.required, surface)

    async def receive(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """As `read`, in a thread for a large body. The flow surface knows which types Matrix has."""
        if surface == "flow":
            self.catalogue.check_type(event_type)
        if not is_large(body):
            return self.read(body, content_type, event_type, surface)
        found = await self.aside(self.read, body, content_type, event_type, surface)
        return replace(found, size=len(body))

    async def check(
        self, room: str, event_type: str, found: Payload, *, as_state: bool, kept: dict[str, Any] | None = None
    ) -> Event:
        """The event that would be sent. Raises BadContent with every problem, or TooLarge.

        `as_state`: the path says that it is a state event. Otherwise the catalogue, or a state key in the body, does.
        `kept`: what is written down in place of the content, which this may become.
        """
        event = self.check_at_once(room, event_type, found, as_state=as_state, kept=kept)
        if event is not None:
            return event
        # It is large, or wrong: explaining what is takes 1,000 times as long as seeing that something is.
        entry = self.catalogue.select(event_type, found.content)
        return await self.aside(self._check, room, event_type, entry, found, as_state, kept)

    def check_at_once(
        self, room: str, event_type: str, found: Payload, *, as_state: bool, kept: dict[str, Any] | None = None
    ) -> Event | None:
        """As `check`; None where that takes long: the content is large, or does not fit its schema."""
        entry = self.catalogue.select(event_type, found.content)
        if found.size < LARGE_BYTES and (entry is None or entry.validator.is_valid(found.content)):
            return self._check(room, event_type, entry, found, as_state, kept, is_valid=True)
        return None

    def _check(
        self,
        room: str,
        event_type: str,
        entry: Entry | None,
        found: Payload,
        as_state: bool,
        kept: dict[str, Any] | None,
        *,
        is_valid: bool = False,
    ) -> Event:
        """`is_valid`: the content is known to fit its schema."""
        kind = entry.kind if entry else None
        is_state = as_state or kind == "state" or (kind is None and found.state_key is not None)
        state_key = (found.state_key or "") if is_state else None
        if not isinstance(found.content, dict):
            raise BadContent([Problem("", "must be a JSON object", canonical_json.RULE)])
        content = canonical_json.write(found.content if kept is None else kept)
        if not room and len(content) > size.SMALL_BYTES:  # a dry run; `accept` knows all that counts
            size.check(content, event_type, state_key, "", "")
        if state_key:
            identifiers.identifier(state_key, "state key")
        problems = [] if entry is None else _problems(entry, found, state_key, as_state, is_valid=is_valid)
        if general := self.catalogue.general_problems(event_type, found.content):
            known = {problem.pointer for problem in problems}  # the type's own schema is more precise
            problems = [*problems, *(problem for problem in general if problem.pointer not in known)]
        if problems:
            raise BadContent(problems, ignored=found.ignored)
        return Event(room, event_type, content, state_key)

    async def accept(self, credential: Credential, event: Event, how: How, following: Sequence[Event] = ()) -> Receipt:
        """Write a checked event down, and hand it to the worker.

        `following`: further events of its message, of the same type: all are accepted, in this order, or none.
        Raises Forbidden for an API key that does not cover it, Conflict for an Idempotency-Key that was used with
        other content, StoreFull and StoreUnavailable.
        """
        permit = partial(scopes.permit, credential.key, event.type)
        caller, room_id = await self._room_access.enter(credential, event.room, permit, joins=True, writes=True)
        receipt = self.offer(credential, caller, room_id, event, how, following)
        pending = receipt.pending
        if event.room.startswith("#"):
            pending.settled.add_done_callback(partial(self._doubt, caller, event.room, room_id))
            self._worker.rouse(pending.row.lane)  # its caller may have joined the room a moment ago
        if pending.idem is not None:
            await pending.committed
            if pending.existing is not None:
                how = how if how.waits == receipt.waits else _unwaited(how)
                return await self._replayed(caller, pending, pending.existing, how, len(pending.following))
            self._count(pending, how)
        return receipt

    def offer(
        self,
        credential: Credential,
        caller: Caller,
        room_id: str,
        event: Event,
        how: How,
        following: Sequence[Event] = (),
    ) -> Receipt:
        """As `accept`, for a caller that may write into this room. With a key it may turn out to be a repeat."""
        if event.type == MEMBER:
            _check_member(event, caller)
        if len(event.content) > size.SMALL_BYTES:
            size.check(event.content, event.type, event.state_key, room_id, caller.user_id)
        pending = self._pending(caller, room_id, event, how)
        if following:
            pending.following = tuple(self._following(caller, pending.row, following))
        if how.waits and not self._worker.may_wait(pending.caller):
            how = _unwaited(how)
        if how.waits:
            pending.add_waiter()
            for each in pending.following:
                each.add_waiter()
        try:
            self._worker.offer(pending)
        except ShareTaken as error:
            self._hold_back(credential, error)
            raise
        if pending.idem is None:
            self._count(pending, how)
        return Receipt(caller, pending, waits=how.waits, following=pending.following)

    @staticmethod
    def _count(pending: PendingDelivery, how: How) -> None:
        metrics.count(metrics.accepted, how.surface)
        for _ in pending.following:
            metrics.count(metrics.accepted, how.surface)

    async def earlier(
        self, credential: Credential, room: str, event_type: str, how: How, following: int
    ) -> Receipt | None:
        """What was accepted under the same key before, with so many events behind it; None if there is nothing.

        Raises as `accept` does.
        """
        if how.key is None:
            return None
        permit = partial(scopes.permit, credential.key, event_type)
        caller, room_id = await self._room_access.enter(credential, room, permit, joins=True, writes=True)
        pending = self._pending(caller, room_id, Event(room, event_type, b"{}", None), how)
        existing = await self._worker.accepted_before(pending)
        if existing is None:
            return None
        if how.waits and not self._worker.may_wait(pending.caller):
            how = _unwaited(how)
        return await self._replayed(caller, pending, existing, how, following)

    def _hold_back(self, credential: Credential, error: ShareTaken) -> None:
        if len(self._held_back) >= MAX_HELD_BACK:
            del self._held_back[next(iter(self._held_back))]
        seconds = HELD_BACK * error.extra["retry_after_ms"] / 1000
        self._held_back[credential] = (time.monotonic() + seconds, error)

    def _doubt(self, caller: Caller, alias: str, room_id: str, settled: "asyncio.Future[Outcome | None]") -> None:
        """A room that refuses an event that came by its alias may have been upgraded: send the next one elsewhere."""
        if settled.cancelled() or settled.exception() is not None:
            return
        outcome = settled.result()
        if outcome is not None and room_upgrades.is_forbidden(outcome.error):
            self._room_access.doubt(caller, alias, room_id)

    def _following(self, caller: Caller, first: Row, events: Sequence[Event]) -> Iterator[PendingDelivery]:
        """Further events of a message. Their ids tell which message it is, so that a repeat finds them."""
        for number, event in enumerate(events, 1):
            if len(event.content) > size.SMALL_BYTES:
                size.check(event.content, event.type, event.state_key, first.room_id, caller.user_id)
            delivery = following_id(first.delivery, number)
            row = first._replace(
                delivery=delivery, txn_id=delivery, content=event.content, binding=event.binding, attempts=0
            )
            yield PendingDelivery(row, token=caller.token)

    def _pending(self, caller: Caller, room_id: str, event: Event, how: How) -> PendingDelivery:
        account = self._tokens.remember(caller)
        delivery = next(self._deliveries)
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
            binding=event.binding,
            is_sealed=self.at_rest.seals and self.at_rest.hides(room_id, event.type, event.state_key),
        )
        request = None if how.request in (b"", event.content) else how.request.decode("utf-8", "replace")
        idem, fingerprint, before = None, None, how.before
        if before is not None:
            before = KeyBefore(_scoped(row, caller, how, before.key), before.since)
        if how.key is not None:
            idem, fingerprint, other = self._idem(row, caller, how, how.key)
            before = before or other
        pending = PendingDelivery(
            row,
            token=caller.token,
            request=request and request.replace("\0", "\ufffd"),
            idem=idem,
            fingerprint=fingerprint,
            key=how.key,
            before=before,
            is_patient=how.is_patient,
        )
        if how.notes:
            history = to_json([{"at": row.accepted_at, "note": note} for note in how.notes])
            pending.renew(row._replace(history=history))
        return pending

    def _idem(self, row: Row, caller: Caller, how: How, key: str) -> tuple[str, str, KeyBefore | None]:
        """What its key stands for in the store, by user, device (or API key), room and event type; its fingerprint.

        And what the key may have stood for before, when FLOWBRIDGE_ENCRYPTED_ROOMS was another one.
        """
        digest = _fingerprint(row, how)
        fingerprint, before = self.at_rest.mark(digest), None
        idem = _scoped(row, caller, how, key)
        if how.surface == "matrix" and self._reused_txn_id == "send":
            # Real clients use a transaction id again for something else, and lose messages by it.
            was = self._txn_ids.pop(idem, fingerprint)
            if was != fingerprint:
                log.warning("txn_id_reused", was=was, now=fingerprint, delivery=row.delivery)
            elif len(self._txn_ids) >= MAX_TXN_IDS:
                del self._txn_ids[next(iter(self._txn_ids))]
            self._txn_ids[idem] = fingerprint
            if self.at_rest.seals or self.at_rest.has_sealed:
                before = KeyBefore(_digest(idem.encode(), self.at_rest.other_mark(digest).encode()), since=0)
            idem = _digest(idem.encode(), fingerprint.encode())
        return idem, fingerprint, before

    async def _replayed(
        self, caller: Caller, pending: PendingDelivery, existing: Mapping[str, Any], how: How, following: int
    ) -> Receipt:
        """The delivery that was accepted under the same key before."""
        is_other = existing["fingerprint"] != pending.fingerprint
        if is_other and how.surface == "flow" and existing["fingerprint"] != self._other_fingerprint(pending.row, how):
            log.warning(
                "key_reused", was=existing["fingerprint"], now=pending.fingerprint, delivery=existing["delivery"]
            )
            raise Conflict("this Idempotency-Key was used before, with other content")
        first, others = await self._joined(existing, how), list[PendingDelivery]()
        if following:
            names = [following_id(existing["delivery"], number + 1) for number in range(following)]
            rows = await self._worker.rows(names)
            others = [await self._joined(rows[name], how) for name in names if name in rows]
        is_settled = all(each.settled.done() for each in (first, *others))
        return Receipt(caller, first, replayed=True, waits=how.waits or is_settled, following=tuple(others))

    def _other_fingerprint(self, row: Row, how: How) -> str:
        return self.at_rest.other_mark(_fingerprint(row, how))

    async def _joined(self, existing: Mapping[str, Any], how: How) -> PendingDelivery:
        """A delivery that was accepted before, to wait for."""
        row = outbox.row_of(existing)
        if existing["state"] == "queued":
            return await self._worker.join(row, waits=how.waits)
        error = from_json(existing["error"]) if existing["error"] else None
        settled = PendingDelivery.stored(row)
        settled.add_waiter()
        settled.answer(Outcome(existing["state"], existing["event_id"], error))
        return settled


def following_id(first: str, number: int) -> str:
    """The id of an event that follows the first of its message."""
    return f"{first}.{number}"


def _unwaited(how: How) -> How:
    """For a caller that waits for many outcomes already: on a surface with a 202 it hears that the event is queued."""
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
    """No user joins, or knocks, for another: Synapse 1.163 answers 500 to a join of another server's user."""
    membership = json.loads(event.content).get("membership")
    if membership in ("join", "knock") and event.state_key != caller.user_id:
        message = f"is {membership!r}, which a user says of itself only: the state key is not {caller.user_id}"
        raise BadContent([Problem("/membership", message, MEMBER)])


def _ids() -> Iterator[str]:
    """Unique delivery ids: a random prefix per process, then a counter (urandom per id costs a system call).

    Without a dash: commands would take an id that begins with one for an option.
    """
    prefix = secrets.token_urlsafe(12).replace("-", "_")
    return (f"{prefix}{number:x}" for number in count(1))


def _fingerprint(row: Row, how: How) -> str:
    """A hash of what a repeat has to be equal in; for the store, see `AtRest.mark`."""
    return _digest(row.content if how.meaning is None else how.meaning, (row.state_key or "").encode())


def _scoped(row: Row, caller: Caller, how: How, key: str) -> str:
    who = row.api_key or caller.device_id or ""  # a bot may have another device at each replica
    scope = (caller.user_id, who, row.room_id, row.event_type, how.surface, key)
    return hashlib.sha256("\0".join(scope).encode()).hexdigest()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
