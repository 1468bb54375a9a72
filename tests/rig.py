"""The worker put together without HTTP, over a homeserver in memory that does what a test tells it to.

`Rooms` remembers transaction ids as Synapse does, until it is told to forget them. A behaviour says what becomes of
one send; where none is given, the event goes into its room.
"""

import asyncio
import contextlib
import itertools
import json
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from cryptography.fernet import Fernet
from sqlalchemy import select

from flowbridge.auth.tokens import Tokens
from flowbridge.delivery import Worker
from flowbridge.delivery.account_limits import FIRST, MAX_ACCOUNTS, AccountLimits
from flowbridge.delivery.attempt import Attempt, Attempts
from flowbridge.delivery.backpressure import Backpressure, Limits
from flowbridge.delivery.breaker import Breaker
from flowbridge.delivery.encryption import MAX_PLAIN, EncryptionCheck
from flowbridge.delivery.lanes import Bounds
from flowbridge.delivery.lookup import MAX_PLACES, Lookup
from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.errors import BadGateway, GatewayTimeout, MatrixError
from flowbridge.events.relations import Binding
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.answers import Verdict
from flowbridge.homeserver.pool import Answer
from flowbridge.homeserver.standing import Standing
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Row, clock, outbox, tables
from flowbridge.store.accounts import account_of
from tests.patience import PATIENCE as PATIENCE

ROOM = "!room:hs"
KEY = Fernet.generate_key()
PLENTY = Limits(queued=1_000_000, per_lane=100_000, database_bytes=1 << 30, free_disk_bytes=0)

ALICE = Caller("@alice:hs", "PHONE", "alice")
DESK = Caller("@alice:hs", "DESK", "desk")  # another device of hers
BOB = Caller("@bob:hs", "PHONE", "bob")
SERVICE = Caller("@service:hs", None, "service")  # an application service: its tokens have no device


@dataclass(frozen=True, slots=True)
class Sent:
    """A send as the homeserver sees it."""

    token: str
    room: str
    type: str
    state_key: str | None
    content: Any
    txn_id: str

    @property
    def body(self) -> Any:
        return self.content.get("body")


Behaviour = Callable[["Rooms", Sent], Awaitable[Answer]]


class Rooms(Homeserver):
    """A homeserver's rooms. `users`: token → user id and device id."""

    def __init__(self) -> None:
        self.users = {caller.token: (caller.user_id, caller.device_id) for caller in (ALICE, DESK, BOB, SERVICE)}
        self.sends: list[Sent] = []
        self.looks: list[tuple[str, str]] = []  # what else was asked, and about which room
        self.timeline: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.shows_txn_ids = True
        self.encrypted: dict[str, bool | MatrixError | float] = {}  # a number: it is not, after so many seconds
        self.joined: bool | MatrixError | float = True
        self.page_size = 100
        self.version: MatrixError | None = None
        self.reading: MatrixError | None = None
        self._script: Callable[[Sent], Behaviour | None] = lambda _: None
        self.following: dict[str, deque[Behaviour]] = defaultdict(deque)
        self._known: dict[tuple[str, ...], str] = {}
        self._numbers = itertools.count(1)

    # what a test says

    def script(self, script: Callable[[Sent], Behaviour | None]) -> None:
        """Do this from now on; None is a send that goes well."""
        self._script = script

    def always(self, behaviour: Behaviour | None) -> None:
        self._script = lambda _: behaviour

    def then(self, *behaviours: Behaviour, room: str = ROOM) -> None:
        """Do these, one after the other, with the next sends into a room."""
        self.following[room].extend(behaviours)

    def forget(self) -> None:
        """Know no transaction id any more."""
        self._known.clear()

    def put(self, body: str, room: str = ROOM, *, sender: str = ALICE.user_id, **event: Any) -> str:
        """Put an event into a room by another way; returns its id."""
        content = {"msgtype": "m.text", "body": body}
        return self._put(room, {"sender": sender, "type": "m.room.message", "content": content, **event})

    def bodies(self, room: str = ROOM) -> list[Any]:
        """What people read in a room, the oldest first."""
        return [event["content"].get("body") for event in self.timeline[room]]

    async def reads(self, number: int, room: str = ROOM) -> None:
        """Until there are so many events in a room."""
        await until(lambda: len(self.timeline[room]) >= number)

    def tries(self, room: str | None = None) -> list[Any]:
        """The bodies of all sends, those that failed included."""
        return [sent.body for sent in self.sends if room in (None, sent.room)]

    # what the worker asks

    async def send(self, token: str, event: Event, txn_id: str) -> Answer:
        sent = Sent(token, event.room, event.type, event.state_key, json.loads(event.content), txn_id)
        self.sends.append(sent)
        following = self.following[sent.room]
        behaviour = following.popleft() if following else self._script(sent)
        return await (behaviour or accept)(self, sent)

    async def is_encrypted(self, token: str, room_id: str, query: str = "") -> bool:
        self.looks.append(("encrypted", room_id))
        return await _say(self.encrypted.get(room_id, False))

    async def is_joined(self, token: str, room_id: str, user_id: str) -> bool:
        self.looks.append(("joined", room_id))
        return await _say(self.joined)

    async def standing(self, token: str, room_id: str, user_id: str) -> Standing:
        self.looks.append(("standing", room_id))
        return Standing(user_id, room_id)

    async def recent(
        self, token: str, room_id: str, before: str, *, only: Any = None, limit: int = 100
    ) -> tuple[list[dict[str, Any]], str]:
        self.looks.append(("recent", room_id))
        if self.reading is not None:
            raise self.reading
        newest_first = self.timeline[room_id][::-1]
        start = int(before or 0)
        page = newest_first[start : start + self.page_size]
        device = self.users[token]
        shown = [{key: value for key, value in event.items() if key != "_txn"} for event in page]
        for event, whole in zip(shown, page, strict=True):
            txn = whole.get("_txn")
            if self.shows_txn_ids and txn is not None and txn[0] == device:
                event["unsigned"] = {"transaction_id": txn[1]}
        return shown, str(start + self.page_size) if page else ""

    async def versions(self) -> Answer:
        self.looks.append(("versions", ""))
        if self.version is not None:
            raise self.version
        return reply(200, {"versions": ["v1.11"]})

    def store(self, sent: Sent) -> str:
        """Take an event, unless it is one that came before; a state, unless it is so already."""
        device = self.users.get(sent.token, ("", None))
        if sent.state_key is not None:
            state = {"type": sent.type, "state_key": sent.state_key}
            before = [event for event in self.timeline[sent.room] if state.items() <= event.items()]
            if before and before[-1]["content"] == sent.content:
                return str(before[-1]["event_id"])
            return self._put(sent.room, {"sender": device[0], "content": sent.content, **state})
        name = (str(device), sent.room, sent.type, sent.txn_id)
        if name not in self._known:
            event = {"sender": device[0], "type": sent.type, "content": sent.content, "_txn": (device, sent.txn_id)}
            self._known[name] = self._put(sent.room, event)
        return self._known[name]

    def _put(self, room: str, event: dict[str, Any]) -> str:
        event_id = f"${next(self._numbers)}"
        self.timeline[room].append({"origin_server_ts": clock.now_ms(), **event, "event_id": event_id})
        return event_id


async def _say(what: bool | MatrixError | float) -> bool:
    if isinstance(what, MatrixError):
        raise what
    if isinstance(what, float):
        await asyncio.sleep(what)
        return False
    return what


def reply(status: int, value: Any, *headers: tuple[bytes, bytes]) -> Answer:
    return Answer(status, headers, json.dumps(value).encode())


async def accept(rooms: Rooms, sent: Sent) -> Answer:
    return reply(200, {"event_id": rooms.store(sent)})


async def lose(rooms: Rooms, sent: Sent) -> Answer:
    """Take the event; the answer gets lost."""
    rooms.store(sent)
    raise cut_off()


async def cut(rooms: Rooms, sent: Sent) -> Answer:
    """The request gets lost on its way."""
    raise cut_off()


async def refuse_connection(rooms: Rooms, sent: Sent) -> Answer:
    raise unreachable()


async def silence(rooms: Rooms, sent: Sent) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


def error(status: int, errcode: str, text: str = "no", **extra: Any) -> Behaviour:
    """The homeserver refuses."""
    return raw(reply(status, {"errcode": errcode, "error": text, **extra}))


def slow(ms: int) -> Behaviour:
    return error(429, "M_LIMIT_EXCEEDED", retry_after_ms=ms)


def raw(answer: Answer) -> Behaviour:
    async def behave(rooms: Rooms, sent: Sent) -> Answer:
        return answer

    return behave


def after(event: asyncio.Event, behaviour: Behaviour = accept) -> Behaviour:
    """That, but not before the event."""

    async def behave(rooms: Rooms, sent: Sent) -> Answer:
        await event.wait()
        return await behaviour(rooms, sent)

    return behave


def cut_off() -> MatrixError:
    lost = GatewayTimeout("the homeserver did not answer in time")
    lost.sent = True
    return lost


def unreachable() -> MatrixError:
    return BadGateway("cannot connect")


@dataclass
class Rig:
    """A worker with all that it stands on, as `with` is entered; `stop` or `crash` end it before that is left."""

    url: str
    rooms: Rooms
    lease: float = 10 * PATIENCE  # the worker looks by itself, too, three times in a lease: no test waits for that
    deadline: float = 10.0
    refuse_encrypted: bool = False
    set_aside: float = 300.0
    grace: float = 0.0
    limits: Limits = PLENTY
    timing: Timing = Timing()
    first: int = FIRST
    max_accounts: int = MAX_ACCOUNTS
    max_plain: int = MAX_PLAIN
    max_places: int = MAX_PLACES
    on_refused: Callable[[str], None] | None = None
    on_distrust: Callable[[str, str], Awaitable[None]] | None = None
    bounds: Bounds = Bounds()  # noqa: RUF009 (frozen)
    callers: dict[str, Caller] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic  # of the tokens
    max_known: int = 10_000  # tokens
    database: Database = field(init=False)

    def __post_init__(self) -> None:
        self.database = Database(self.url, timing=self.timing)
        self.write_queue = WriteQueue(self.database, timing=self.timing)
        self.backpressure = Backpressure(self.database, self.limits, timing=self.timing)
        self.tokens = Tokens(
            self.database,
            self.write_queue.remember,
            timing=replace(self.timing, clock=self.clock),
            max_known=self.max_known,
        )
        self.tokens.unlock(Fernet(KEY))
        self.encryption = EncryptionCheck(
            self.rooms, refuses=self.refuse_encrypted, max_plain=self.max_plain, timing=self.timing
        )
        self.breaker = Breaker(self.rooms, timing=self.timing)
        self.account_limits = AccountLimits(
            self.tokens,
            self.breaker.limiter,
            on_refused=self.on_refused,
            on_distrust=self.on_distrust,
            first=self.first,
            max_accounts=self.max_accounts,
            timing=self.timing,
        )
        self.lookup = Lookup(self.rooms, self.database, max_places=self.max_places)
        self.attempts = Attempts(
            self.rooms,
            self.tokens,
            self.account_limits,
            self.breaker,
            self.encryption,
            self.lookup,
            deadline=self.deadline,
        )
        self.worker = Worker(
            self.database,
            self.write_queue,
            self.backpressure,
            self.account_limits,
            self.attempts,
            deadline=self.deadline,
            lease=self.lease,
            set_aside=self.set_aside,
            grace=self.grace,
            timing=self.timing,
            bounds=self.bounds,
        )
        self.tokens.on_change = self.account_limits.trust
        self._name, self._names = secrets.token_hex(4), itertools.count(1)
        self.ended = False

    async def __aenter__(self) -> Self:
        self.database.open()
        self.database.start()
        await self.backpressure.refresh()
        await self.worker.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended:
            await (self.stop() if failure is None else self.crash())

    async def stop(self, seconds: float = 10.0) -> None:
        self.ended = True
        await self.worker.stop(seconds)
        self.breaker.stop()
        await self.database.stop()

    async def crash(self) -> None:
        """End as by kill -9, but for what waits for a commit: that is written. Nothing is given back."""
        self.ended = True
        await self.database.stop()
        with contextlib.suppress(TimeoutError):  # what it asks of the store from here on is never done
            await asyncio.wait_for(self.worker.stop(0.0), 0.02)
        self.breaker.stop()
        for renewing in self.worker._lanes._renewing:
            renewing.cancel()

    async def attempt(self, attempt: Attempt, *, still: bool = True) -> Verdict | None:
        """One attempt as a lane makes it; `still`: whether it may be sent once it is prepared."""
        account, limits = attempt.row.account, self.account_limits
        async with limits.permit(account, ahead=False):
            ready = self.attempts.prepare_at_once(attempt)
            verdict = None if ready else await self.attempts.prepare(attempt)
            if verdict is None:
                if not still:
                    return None
                verdict = await self.attempts.send(attempt)
            limits.apply(account, verdict, attempt.token)
            return verdict

    def pending(
        self,
        body: str,
        room: str = ROOM,
        *,
        caller: Caller = ALICE,
        key: str | None = None,
        waits: bool = True,
        type_: str = "m.room.message",
        content: dict[str, Any] | None = None,
        state_key: str | None = None,
        api_key: str | None = None,
        binding: Binding | None = None,
        following: Sequence[str] = (),
    ) -> PendingDelivery:
        """A new pending delivery, as the acceptance makes it. `key`: an Idempotency-Key, the same for the same body.

        `following`: the bodies of further events of its message.
        """
        account = self.tokens.remember(caller)
        delivery = f"{self._name}-{next(self._names)}"
        text = json.dumps({"msgtype": "m.text", "body": body} if content is None else content)
        row = Row(
            delivery=delivery,
            lane=f"{account}|{room}",
            account=account,
            room_id=room,
            event_type=type_,
            state_key=state_key,
            content=text.encode(),
            txn_id=delivery,
            accepted_at=clock.now_ms(),
            api_key=api_key,
            binding=binding.to_json() if binding else None,
        )
        idem, fingerprint = (None, None) if key is None else (f"{account}|{room}|{key}", text)
        pending = PendingDelivery(row, caller.token, idem=idem, fingerprint=fingerprint)
        pending.following = tuple(
            PendingDelivery(
                row._replace(
                    delivery=f"{delivery}.{number}",
                    txn_id=f"{delivery}.{number}",
                    content=json.dumps({"msgtype": "m.text", "body": each}).encode(),
                    binding=None,
                ),
                caller.token,
            )
            for number, each in enumerate(following, 1)
        )
        if waits:
            for each in (pending, *pending.following):
                each.add_waiter()
        return pending

    def offer(self, body: str, room: str = ROOM, **how: Any) -> PendingDelivery:
        """Give the worker a new event; see `pending`."""
        pending = self.pending(body, room, **how)
        self.worker.offer(pending)
        return pending

    async def accept(self, body: str, room: str = ROOM, **how: Any) -> PendingDelivery:
        """As a 202 does: come back when it is on the disk, with the delivery, also one from before."""
        how.setdefault("waits", False)
        pending = self.offer(body, room, **how)
        await soon(pending.committed)
        if pending.existing is None:
            return pending
        return await self.worker.join(outbox.row_of(pending.existing), waits=how["waits"])

    async def send(self, body: str, room: str = ROOM, *, seconds: float = PATIENCE, **how: Any) -> Outcome | None:
        """As a caller who waits does."""
        return await self.worker.wait(self.offer(body, room, **how), seconds)

    @contextlib.contextmanager
    def busy_writer(self) -> Iterator[None]:
        """Nothing is committed for as long as this lasts."""
        free = threading.Event()
        self.database.run(lambda connection: free.wait(PATIENCE))
        try:
            yield
        finally:
            free.set()

    @property
    def remembered(self) -> int:
        """How many deliveries are in memory."""
        return len(self.worker._deliveries)

    def rows(self, *columns: str) -> list[Any]:
        """These columns of all rows in the order of acceptance; a single column not as a tuple."""
        chosen = [tables.outbox.c[name] for name in columns]
        with self.database.engine.connect().execution_options(reads=True) as connection:
            found = connection.execute(select(*chosen).order_by(tables.outbox.c.id)).all()
        return [row[0] if len(columns) == 1 else tuple(row) for row in found]

    def states(self) -> list[str]:
        return self.rows("state")

    def lane(self, room: str = ROOM, caller: Caller = ALICE) -> Any:
        """The row of a lane, or None."""
        name = f"{account_of(caller.user_id)}|{room}"
        with self.database.engine.connect().execution_options(reads=True) as connection:
            return connection.execute(select(tables.lanes).where(tables.lanes.c.lane == name)).first()

    async def settled_in(self, room: str) -> None:
        """Until nothing is queued any more for a room."""
        await until(lambda: ("queued", room) not in self.rows("state", "room_id"))

    async def settled(self, number: int | None = None) -> None:
        """Until nothing is queued any more or, with a number, until so many are settled."""
        if number is None:
            await until(lambda: self.rows("state") and "queued" not in self.rows("state"))
        else:
            await until(lambda: len([state for state in self.states() if state != "queued"]) >= number)


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what should have come at once did not come"
        await asyncio.sleep(0.002)


async def soon(what: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(what, PATIENCE)


class MakeRig:
    """`make()`: a process on the same store and homeserver as those before it; `how` as for `Rig`."""

    def __init__(self, url: str, rooms: Rooms, **how: Any) -> None:
        self._url = url
        self._rooms = rooms
        self._how: dict[str, Any] = {"timing": Timing(), "bounds": Bounds(), **how}

    def tune(self, **values: Any) -> None:
        """Let rigs made from here on have these durations, and bounds of the worker."""
        durations = {name: values.pop(name) for name in list(values) if name in Timing.__dataclass_fields__}
        self._how["timing"] = replace(self._how["timing"], **durations)
        self._how["bounds"] = replace(self._how["bounds"], **values)

    def __call__(self, **how: Any) -> Rig:
        return Rig(self._url, self._rooms, **{**self._how, **how})
