"""The usual send, by callbacks: no task, no ASGI message, no Request and no Response. It costs a third less.

It arrived in one piece, its caller is known, its room is named by its id, its content fits, and it has no key of its
own: what nearly all sends are like, and what needs no answer from anyone before it is accepted. What is decided about
it is decided by the functions that web/routes/send.py calls, in the same order: those of them that do not wait. At the
first that would have to wait, or refuses, nothing has happened yet, and the request begins in the ordinary way
(`Protocol.begin`). After it was accepted, only good news is told from here; otherwise the ordinary way goes on with the
receipt. So there is one copy of each rule, and of each answer.
"""

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from flowbridge import log, metrics
from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.watching import Watch
from flowbridge.errors import MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.hooks.known import PREFIX
from flowbridge.limits.proxies import Proxies
from flowbridge.models import Event
from flowbridge.services.acceptance import LARGE_BYTES, How, Receipt
from flowbridge.services.sending import Told
from flowbridge.web import answering
from flowbridge.web.endpoint import Headers
from flowbridge.web.routes.send import answer_to, preferred

MAX_PATH = 1_000
MAX_PATHS = 4_096  # that are remembered

_PATH = re.compile(rb"/rooms/([^/{}]+)/send/([^/{}]+)")
# What the ordinary way has to see: a key, another form of the body, a page that wants to read the answer.
_UNUSUAL = frozenset({b"idempotency-key", b"content-encoding", b"expect", b"upgrade", b"origin"})


class Connection(Protocol):
    """What a send has to know of web/protocol.py: the request that has arrived, and how to answer it."""

    transport: Any
    client: tuple[str, int] | None
    headers: Headers
    method: str
    raw_path: bytes
    query: bytes
    is_kept: bool

    @property
    def flow(self) -> FlowControl: ...
    def body(self) -> bytes: ...
    def default_headers(self) -> Headers: ...
    def on_response_complete(self) -> None: ...
    def go_on(self, send: "UsualSend") -> None: ...


class Target(NamedTuple):
    path: str
    room: str
    event_type: str


class UsualSends:
    """Recognises the usual sends to the flow surface."""

    def __init__(self, core: Core) -> None:
        self._callers = core.callers
        self._room_access = core.room_access
        self._acceptance = core.acceptance
        self._proxies = Proxies(core.settings.trusted_proxies)
        self._wait_seconds = core.settings.wait_seconds
        self._target = lru_cache(MAX_PATHS)(self._read_path)
        self.sender = core.sender
        self.watchers = core.worker.watchers

    def take(self, connection: Connection) -> "UsualSend | None":
        """Accept the request that has arrived on a connection; None, and nothing has happened, if it is not usual."""
        target = self._target(connection.raw_path) if len(connection.raw_path) <= MAX_PATH else None
        headers = dict(connection.headers)
        is_plain = len(headers) == len(connection.headers) and _UNUSUAL.isdisjoint(headers)
        if target is None or connection.query or not is_plain or connection.method not in ("POST", "PUT"):
            return None
        try:
            return self._accept(connection, target, headers)
        except MatrixError:  # it is raised, and told, again
            return None

    def _accept(self, connection: Connection, target: Target, headers: dict[bytes, bytes]) -> "UsualSend | None":
        def header(name: bytes) -> str:
            return headers.get(name, b"").decode("latin-1")

        started = time.perf_counter()
        path, room, event_type = target
        found = self._callers.at_once(header(b"authorization"), header(b"x-api-key"))
        if found is None:
            return None
        credential, caller = found
        self._acceptance.check_share(credential)
        body = connection.body()
        if len(body) >= LARGE_BYTES or not self._room_access.is_plain(credential.key, room):
            return None
        payload = self._acceptance.read(body, header(b"content-type"), event_type, "flow")
        event = self._acceptance.check_at_once(room, event_type, payload, as_state=False)
        if event is None:
            return None
        if credential.key is not None:
            scopes.permit(credential.key, event_type, room)
        patience, is_async = preferred([header(b"prefer")] if b"prefer" in headers else (), "flow", self._wait_seconds)
        how = How("flow", None, body, waits=patience is not None)
        client = connection.client[0] if connection.client else None
        if self._proxies and client is not None:
            client = self._proxies.client(
                client, [headers[b"x-forwarded-for"]] if b"x-forwarded-for" in headers else []
            )
        send = UsualSend(self, connection, path, client, started, credential, event, how, payload.ignored, is_async)
        send.wait(self._acceptance.offer(credential, caller, room, event, how), patience)
        return send

    def _read_path(self, raw: bytes) -> Target | None:
        found = _PATH.fullmatch(raw)
        path = raw.decode("ascii")
        if found is None or PREFIX in path:
            return None
        try:
            room, event_type = (part.decode("ascii") for part in found.groups())
            target = Target(path, identifiers.room(room), identifiers.event_type(event_type))
            self._acceptance.catalogue.check_type(target.event_type)
        except MatrixError:
            return None
        return target


class _Silent:
    """No task waits for what arrives behind a usual send, nor for its hang-up."""

    def set(self) -> None: ...


class UsualSend:
    """From its acceptance to its answer. Has the attributes of uvicorn's cycle, in whose place it stands meanwhile."""

    message_event = _Silent()
    receipt: Receipt
    ends: float

    def __init__(
        self,
        sends: UsualSends,
        connection: Connection,
        path: str,
        client: str | None,
        started: float,
        credential: Credential,
        event: Event,
        how: How,
        ignored: Sequence[str],
        is_async: bool,
    ) -> None:
        self._sends = sends
        self._connection = connection
        self._path = path
        self._client = client
        self._watch: Watch | None = None
        self._is_heard = False
        self.started = started
        self.credential = credential
        self.event = event
        self.how = how
        self.ignored = ignored
        self.is_async = is_async
        self.scope = {"method": connection.method}
        self.transport = connection.transport
        self.flow = connection.flow
        self.keep_alive = connection.is_kept
        self.default_headers = connection.default_headers()
        self.on_response = connection.on_response_complete
        self.disconnected = self.response_started = self.response_complete = self.waiting_for_100_continue = False

    def wait(self, receipt: Receipt, patience: float | None) -> None:
        """For the outcome or, if the caller does not want that, for the commit."""
        self.receipt = receipt
        self.ends = time.monotonic() + (patience or 0.0)
        if receipt.waits:
            self._watch = self._sends.watchers.watch(receipt.pending, patience or 0.0, self._hear)
        else:
            receipt.pending.committed.add_done_callback(self._hear)

    def _hear(self, _: object) -> None:
        if self._is_heard:
            return
        self._is_heard = True
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
        response = answer_to(told, self.ignored, is_async=self.is_async)
        answering.answer(
            self, response.status_code, response.raw_headers, bytes(response.body)
        )  # not if it has hung up
        metrics.count(metrics.requests, str(response.status_code))
        key = self.credential.key
        log.info(
            "request",
            method=self.scope["method"],
            path=self._path,
            status=response.status_code,
            ms=round((time.perf_counter() - self.started) * 1000, 1),
            client=self._client,
            **({} if key is None else {"key": key.id}),
            user=told.user_id,
            delivery=told.delivery,
        )
