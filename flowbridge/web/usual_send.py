"""The usual send, by callbacks: no task, no ASGI message, no Request and no Response. It costs a third less.

It arrived in one piece, its caller is known, its room is named by its id, its content fits, and it has no key of its
own: what nearly all sends are like, and what needs no answer from anyone before it is accepted. (Markdown and HTML are
rendered before, for which they have a task.) What is decided about it is decided by the functions that
web/routes/send.py and messages.py call, in the same order: those of them that do not wait. At the first that would have
to wait, or refuses, nothing has happened yet, and the request begins in the ordinary way (`Protocol._begin_asgi`).
After it was accepted, only good news is told from here; otherwise the ordinary way goes on with the receipt. So there
is one copy of each rule, and of each answer.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from flowbridge import log, metrics
from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.watching import Watch
from flowbridge.errors import MatrixError
from flowbridge.events.shaping import MESSAGE
from flowbridge.homeserver import identifiers
from flowbridge.hooks.known import PREFIX
from flowbridge.limits import peer
from flowbridge.limits.proxies import Proxies
from flowbridge.models import Caller, Event, Payload
from flowbridge.services.acceptance import LARGE_BYTES, How, Receipt
from flowbridge.services.messages import Later
from flowbridge.services.sending import Told
from flowbridge.web import answering
from flowbridge.web.endpoint import JsonAnswer
from flowbridge.web.routes import messages
from flowbridge.web.routes.send import answer_to, preferred
from flowbridge.web.usual import Connection, Usual

MAX_PATH = 1_000
MAX_PATHS = 4_096  # that are remembered

_PATH = re.compile(rb"/rooms/([^/{}]+)/(?:send/([^/{}]+)|messages)")


class Door(NamedTuple):
    """What tells an event from a message as people write it: how its body is read, and how it is answered."""

    read: Callable[[bytes, str, str], Payload | Later | None]  # body, content type, event type
    answer: Callable[[Told, Sequence[str], bool], JsonAnswer]  # told, ignored, is_async


class Target(NamedTuple):
    path: str
    room: str
    event_type: str
    door: Door


class UsualSends:
    """Recognises the usual sends to the flow surface: events, and messages of one event that refer to nothing."""

    def __init__(self, core: Core) -> None:
        self._callers = core.callers
        self._room_access = core.room_access
        self._acceptance = core.acceptance
        self.proxies = Proxies(core.settings.trusted_proxies) or None
        self._wait_seconds = core.settings.wait_seconds
        self._usual_wait = preferred((), "flow", self._wait_seconds)
        self._target = lru_cache(MAX_PATHS)(self._read_path)
        self._events = Door(partial(core.acceptance.read, surface="flow"), answer_to)
        self._messages = Door(
            lambda body, content_type, _: core.messages.at_once(body, content_type),
            lambda told, _, is_async: messages.answer_to(told, is_async=is_async),
        )
        self.sender = core.sender
        self.watchers = core.worker.watchers

    def take(self, connection: Connection, headers: dict[bytes, bytes]) -> "UsualSend | None":
        """Accept the request that has arrived on a connection, or have it rendered before.

        None, and nothing has happened, if it is not usual.
        """
        target = self._target(connection.raw_path) if len(connection.raw_path) <= MAX_PATH else None
        if target is None or b"idempotency-key" in headers:
            return None
        try:
            send = self._read(connection, target, headers)
        except MatrixError:  # it is raised, and told, again
            return None
        except Exception as error:  # likewise, if it is not a fault of this way alone
            log.error("internal_error", exc_info=error, path=target.path)
            return None
        if send is None:
            return None
        if send.later is not None:
            send.render(send.later)
            return send
        return send if self.accept(send) else None

    def check(self, send: "UsualSend", payload: Payload) -> bool:
        """Whether what was rendered may be sent as it is."""
        event = self._acceptance.check_at_once(send.target.room, MESSAGE, payload, as_state=False)
        if event is not None:
            send.event = event
        return event is not None

    def accept(self, send: "UsualSend") -> bool:
        """Accept it, unless it is refused."""
        try:
            receipt = self._acceptance.offer(send.credential, send.caller, send.target.room, send.event, send.how)
        except MatrixError:  # of another fault it is not known whether the event was accepted: the connection ends
            return False
        send.wait(receipt)
        return True

    def _read(self, connection: Connection, target: Target, headers: dict[bytes, bytes]) -> "UsualSend | None":
        """What is to be accepted; None if it is not usual."""

        def header(name: bytes) -> str:
            return headers.get(name, b"").decode("latin-1")

        started = time.perf_counter()
        _, room, event_type, door = target
        content_type = header(b"content-type")
        known = self._callers.at_once(header(b"authorization"), header(b"x-api-key"))
        if known is None:
            return None
        credential, caller = known
        body = connection.body() if self._room_access.is_plain(credential.key, room) else b""
        if not 0 < len(body) < LARGE_BYTES:
            return None
        self._acceptance.check_share(credential)
        found = door.read(body, content_type, event_type)
        event: Event | None = None
        ignored: Sequence[str] = ()
        later: Later | None = None
        if isinstance(found, Payload):
            event, ignored = self._acceptance.check_at_once(room, event_type, found, as_state=False), found.ignored
        else:
            later = found
        if event is None and later is None:
            return None
        if credential.key is not None:
            scopes.permit(credential.key, event_type, room)
        patience, is_async = self._usual_wait
        if b"prefer" in headers:
            patience, is_async = preferred([header(b"prefer")], "flow", self._wait_seconds)
        how = How("flow", None, body, waits=patience is not None)
        send = UsualSend(self, connection, target, started, headers)
        send.credential, send.caller, send.how = credential, caller, how
        send.is_async, send.patience = is_async, patience or 0.0
        send.later = later
        if event is not None:
            send.event, send.ignored = event, ignored
        return send

    def _read_path(self, raw: bytes) -> Target | None:
        found = _PATH.fullmatch(raw)
        path = raw.decode("ascii")
        if found is None or PREFIX in path:
            return None
        try:
            room, event_type = identifiers.room(found[1].decode()), MESSAGE
            if found[2] is None:
                return Target(path, room, event_type, self._messages)
            event_type = identifiers.event_type(found[2].decode())
            self._acceptance.catalogue.check_type(event_type)
        except MatrixError:
            return None
        return Target(path, room, event_type, self._events)


class UsualSend(Usual):
    """Until its answer."""

    later: Later | None = None  # its content, which is yet to be rendered
    credential: Credential
    caller: Caller
    event: Event
    how: How
    ignored: Sequence[str] = ()
    is_async: bool
    patience: float  # seconds
    receipt: Receipt
    ends: float  # monotonic: until when its caller waits

    def __init__(
        self,
        sends: UsualSends,
        connection: Connection,
        target: Target,
        started: float,
        headers: Mapping[bytes, bytes],
    ) -> None:
        super().__init__(connection, started, headers, sends.proxies)
        self._sends = sends
        self.target = target
        self._task: asyncio.Task[None] | None = None
        self._watch: Watch | None = None
        self._is_heard = False

    @property
    def body(self) -> bytes:
        return self.how.request

    def render(self, later: Later) -> None:
        """Have its content rendered, and accept it then, or begin in the ordinary way."""
        self._task = asyncio.get_running_loop().create_task(self._render(later))

    async def _render(self, later: Later) -> None:
        peer.enter({"client": (self.client, 0)} if self.client else {})
        key = self.credential.key
        peer.identified(self.caller.user_id if key is None else f"key {key.id}")  # whose share it counts in
        is_usual = False
        try:
            is_usual = self._sends.check(self, await later())
        except MatrixError as error:  # it is not rendered again: that may have taken a second
            self.error, self.is_begun = error, True
        except Exception as error:  # likewise, if it is not a fault of this way alone
            log.error("internal_error", exc_info=error, path=self.target.path)
        try:
            if not (is_usual and self._sends.accept(self)):
                self._connection.go_on(self)
        except Exception as error:  # it is not known whether the event was accepted
            log.error("internal_error", exc_info=error, path=self.target.path)
            self.transport.abort()

    def wait(self, receipt: Receipt) -> None:
        """For the outcome or, if the caller does not want that, for the commit."""
        self.is_begun = True
        self.receipt = receipt
        self.ends = time.monotonic() + self.patience
        if receipt.waits:
            self._watch = self._sends.watchers.watch(receipt.pending, self.patience, self._hear)
        else:
            receipt.pending.committed.add_done_callback(self._hear)

    def _hear(self, _: object) -> None:
        if self._is_heard:
            return
        self._is_heard = True
        try:
            self._tell()
        except Exception as error:  # the event is accepted: its caller must not wait for ever
            log.error("internal_error", exc_info=error, path=self.target.path)
            self.transport.abort()

    def _tell(self) -> None:
        told = self._sends.sender.outcome_at_once(self.receipt)
        watch, self._watch = self._watch, None  # it holds this: only the collector would free them
        if watch is not None:
            if told is None:
                self.receipt.pending.add_waiter()  # in its place
            watch.end()
        if told is None:
            self._connection.go_on(self)
        else:
            self._answer(told)

    def _answer(self, told: Told) -> None:
        response = self.target.door.answer(told, self.ignored, self.is_async)
        body = bytes(response.body)
        answering.answer(self, response.status_code, response.raw_headers, body)  # unless the caller has hung up
        metrics.count(metrics.requests, str(response.status_code))
        key = self.credential.key
        log.info(
            "request",
            method=self.scope["method"],
            path=self.target.path,
            status=response.status_code,
            ms=round((time.perf_counter() - self.started) * 1000, 1),
            client=self.client,
            **({} if key is None else {"key": key.id}),
            user=told.user_id,
            delivery=told.delivery,
        )
