"""Sending events and reading state, on both surfaces."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring_ascii
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from flowbridge import log
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.attempt import IN_PLAIN_TEXT
from flowbridge.delivery.write_queue import Outcome, Ticket
from flowbridge.errors import (
    BadContent,
    BadGateway,
    BadRequest,
    Errcode,
    Forbidden,
    GatewayTimeout,
    MatrixError,
    Problem,
)
from flowbridge.homeserver import paths
from flowbridge.models import Event, Payload, Surface
from flowbridge.services import room_upgrades
from flowbridge.services.sending import Receipt
from flowbridge.services.sending import Sending as How
from flowbridge.web import describe, parameters
from flowbridge.web.endpoint import (
    LOG,
    Endpoint,
    JsonAnswer,
    endpoint,
    error_answer,
    headers_of,
    json_answer,
    read_body,
)
from flowbridge.web.routes.passthrough import Relaying

MAX_WAIT_SECONDS = 300
DIALECTS = ("v3", "r0", "v1", "api/v1", "unstable")


class Sending:
    """The handlers of one surface."""

    def __init__(self, surface: Surface, core: Core, relaying: Relaying) -> None:
        self._surface: Surface = surface
        self._relaying = relaying
        self._intake = core.intake
        self._callers = core.callers
        self._aliases = core.aliases
        self._homeserver = core.homeserver
        self._courier = core.courier
        self._carrier = core.carrier
        self._wait_seconds = core.settings.wait_seconds

    async def send(self, request: Request) -> Response:
        """POST/PUT …/rooms/{roomId}/send/{eventType}[/{txnId}]"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._intake.check_share(credential)
        path = request.path_params
        room, event_type = paths.room(path["roomId"]), paths.event_type(path["eventType"])
        txn_id = paths.segment(path["txnId"], "transaction id") if "txnId" in path else None
        body, found = await self._read(request, headers, event_type)
        event = await self._intake.check(room, event_type, found, as_state=False)
        if others := self._others(request, credential):
            if event.state_key is not None:
                raise BadRequest(
                    f"{others[0][0]}: {event_type} is room state, which takes this parameter at "
                    "PUT …/state/{eventType}/{stateKey} alone"
                )
            return await self._pass_on(request, credential, event, others)
        return await self._accept(request, headers, credential, event, body, txn_id)

    async def put_state(self, request: Request) -> Response:
        """PUT …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._intake.check_share(credential)
        path = request.path_params
        room, event_type = paths.room(path["roomId"]), paths.event_type(path["eventType"])
        state_key = paths.segment(path.get("stateKey", ""), "state key", empty=True)
        body, found = await self._read(request, headers, event_type)
        found = _keyed(found, state_key, named="stateKey" in path)
        event = await self._intake.check(room, event_type, found, as_state=True)
        if others := self._others(request, credential):
            return await self._pass_on(request, credential, event, others)
        return await self._accept(request, headers, credential, event, body, None)

    async def get_state(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        path = request.path_params
        room, event_type = paths.room(path["roomId"]), paths.event_type(path["eventType"])
        state_key = paths.segment(path.get("stateKey", ""), "state key", empty=True)
        query = [("format", "event")] if request.query_params.get("format") == "event" else []
        query += self._others(request, credential, "format")
        permit = partial(self._callers.permit, credential, event_type)
        caller, room_id = await self._aliases.enter(credential, room, permit)
        try:
            answer = await self._homeserver.read_state(caller.token, room_id, event_type, state_key, urlencode(query))
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        return Response(answer.body, answer.status, media_type="application/json")

    def _others(self, request: Request, credential: Credential, *known: str) -> list[tuple[str, str]]:
        """On the Matrix surface the query parameters that are the homeserver's to understand."""
        return parameters.others(request, credential, *known) if self._surface == "matrix" else []

    async def _pass_on(
        self, request: Request, credential: Credential, event: Event, others: Sequence[tuple[str, str]]
    ) -> Response:
        """A checked event whose parameters say more of it than we can keep: another sender, a time, a delay.

        It goes to the homeserver now, with its own transaction id, and is not stored: what is promised of it, the
        homeserver promises.
        """
        permit = partial(self._callers.permit, credential, event.type)
        caller, room_id = await self._aliases.enter(credential, event.room, permit)
        request.scope[LOG] = {"user": caller.user_id}
        identity = [pair for pair in others if pair[0] in parameters.IDENTITY]
        query = f"?{urlencode(identity)}" if identity else ""
        try:
            if await self._carrier.refuses(caller.token, replace(event, room=room_id), query=query):
                raise Forbidden(IN_PLAIN_TEXT)
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        return await self._relaying.pass_on(request, event.content, caller)

    def _wishes(self, request: Request, headers: Mapping[str, str]) -> tuple[float | None, bool]:
        """What a caller prefers (RFC 7240): for how many seconds it waits, None for not at all; and `respond-async`.

        With both, it is answered asynchronously once it has waited. A Matrix client must be told how it ended, so that
        it can only say for how long it would wait.
        """
        wished = _preferences(request.headers.getlist("prefer")) if "prefer" in headers else {}
        is_async = self._surface == "flow" and "respond-async" in wished
        seconds = wished.get("wait", "")
        if seconds.isascii() and seconds.isdigit():
            return float(min(int(seconds[:9]), MAX_WAIT_SECONDS)), is_async
        return None if is_async else self._wait_seconds, is_async

    async def _read(self, request: Request, headers: Mapping[str, str], event_type: str) -> tuple[bytes, Payload]:
        body = await read_body(request, headers)
        content_type = headers.get("content-type", "")
        return body, await self._intake.receive(body, content_type, event_type, self._surface)

    async def _accept(
        self,
        request: Request,
        headers: Mapping[str, str],
        credential: Credential,
        event: Event,
        body: bytes,
        txn_id: str | None,
    ) -> Response:
        key = txn_id
        if self._surface == "flow" and "idempotency-key" in headers:
            key = _idempotency_key(request.headers.getlist("idempotency-key"))
        patience, is_async = self._wishes(request, headers)
        how = How(self._surface, key, body, waits=patience is not None)
        receipt = await self._intake.accept(credential, event, how)
        request.scope[LOG] = {"user": receipt.caller.user_id, "delivery": receipt.ticket.row.delivery}
        ends = time.monotonic() + (patience or 0.0)
        try:
            patience = patience if receipt.waits else None
            outcome = await self._wait(receipt, patience)
            if event.room.startswith("#") and outcome is not None and room_upgrades.is_forbidden(outcome.error):
                receipt, outcome = await self._follow(credential, event, how, receipt, outcome, ends)
            response = await self._answer(receipt, outcome, waited=patience is not None)
        except MatrixError as error:
            response = error_answer(error)
            request.scope[LOG]["errcode"] = str(error.errcode)
        request.scope[LOG]["delivery"] = delivery = receipt.ticket.row.delivery
        response.add(b"flowbridge-delivery", delivery)
        if is_async and response.status_code == 202:
            response.add(b"preference-applied", "respond-async")
        if receipt.replayed:
            response.add(b"idempotent-replayed", "true")
        return response

    async def _wait(self, receipt: Receipt, patience: float | None) -> Outcome | None:
        """How a send ended; None when the caller does not wait, or has waited in vain."""
        return None if patience is None else await self._courier.wait(receipt.ticket, patience)

    async def _follow(
        self, credential: Credential, event: Event, how: How, receipt: Receipt, outcome: Outcome, ends: float
    ) -> tuple[Receipt, Outcome | None]:
        """Send an event again that the room of an alias refuses, when the alias leads to another room by now.

        The refusal stays in the delivery log. It is also the answer where the new room lets nobody in.
        """
        row = receipt.ticket.row
        try:
            if not await self._aliases.moved(receipt.caller, event.room, row.room_id):
                return receipt, outcome
            again = await self._intake.accept(credential, event, how)
        except MatrixError as error:
            log.info("alias_not_followed", alias=event.room, room=row.room_id, error=error.error)
            return receipt, outcome
        log.info("alias_moved", alias=event.room, room=row.room_id, now=again.ticket.row.room_id)
        if not again.waits:
            return again, None
        return again, await self._wait(again, max(0.0, ends - time.monotonic()))

    async def _answer(self, receipt: Receipt, outcome: Outcome | None, *, waited: bool) -> JsonAnswer:
        """The answer to a send: how it ended or, on the flow surface, that it is accepted."""
        if outcome is not None:
            return await self._settled(receipt, outcome)
        if waited and self._surface == "matrix":
            raise await self._unsettled(receipt.ticket)
        return await self._queued(receipt)

    async def _queued(self, receipt: Receipt) -> JsonAnswer:
        """202, once it is on the disk."""
        ticket = receipt.ticket
        if not receipt.replayed:
            try:
                await ticket.committed
            except MatrixError:
                if ticket.withdrawn:
                    raise
                raise GatewayTimeout("the store cannot be written, and the event may be on its way") from None
        outcome = ticket.settled.result() if ticket.settled.done() else None
        delivery = ticket.row.delivery
        answer = {"delivery_id": delivery, "status": outcome.state if outcome else "queued"}
        return json_answer(answer, 202, {"Location": f"/deliveries/{delivery}"})

    async def _settled(self, receipt: Receipt, outcome: Outcome) -> JsonAnswer:
        caller = receipt.caller
        if outcome.event_id is not None and outcome.event_id.isascii():  # an encoder of its own would cost 3 µs
            return JsonAnswer(b'{"event_id":%b}' % encode_basestring_ascii(outcome.event_id).encode())
        if outcome.state == "sent":
            return json_answer({"event_id": outcome.event_id})
        found = dict(outcome.error or {})
        if room_upgrades.is_forbidden(found):
            found = await room_upgrades.explained(self._homeserver, caller, receipt.ticket.row.room_id, found)
        status = int(found.pop("status", 500))
        if status == 401:
            error = MatrixError(found.pop("error"), errcode=found.pop("errcode"), status=status, **found)
            raise self._callers.refused(caller, error)
        return json_answer(found, status)

    async def _unsettled(self, ticket: Ticket) -> MatrixError:
        """What a Matrix client is told instead of a 202, which it would not know."""
        account = ticket.row.account
        pause = self._carrier.pause_of(account)
        if not await self._courier.withdraw(ticket):
            return GatewayTimeout(
                "the homeserver has not answered yet: the event may be sent; the same txnId finds out"
            )
        if ticket.row.api_key is not None and (reason := self._carrier.distrusted.get(account)):
            return BadGateway(f"nothing was sent: the homeserver does not accept the bridge's own account: {reason}")
        if ticket.attempts:
            return BadGateway(f"nothing was sent: {ticket.history[-1]['error']}")
        if self._carrier.is_away:
            return BadGateway("nothing was sent: the homeserver is away")
        return MatrixError(
            "nothing was sent: other events go first",
            status=429,
            errcode=Errcode.LIMIT_EXCEEDED,
            retry_after_ms=int(min(pause, 60.0) * 1000) or 1_000,
        )


def _idempotency_key(lines: Sequence[str]) -> str:
    if len(set(lines)) > 1:
        raise BadRequest("Idempotency-Key: it is given more than once, with different values")
    return paths.identifier(lines[0], "Idempotency-Key")


def _preferences(lines: Sequence[str]) -> dict[str, str]:
    """The preferences of all Prefer headers, without their parameters; of two with the same name the first counts."""
    found: dict[str, str] = {}
    for preference in ",".join(lines).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def _keyed(found: Payload, state_key: str, *, named: bool) -> Payload:
    """The state key of the path, or of the body where the path has none; a body that differs is refused."""
    if found.state_key is None or found.state_key == state_key:
        return Payload(found.content, state_key)
    if named:
        message = f"is {found.state_key[:255]!r} but the path says {state_key!r}"
        raise BadContent([Problem("/state_key", message, "body")])
    return found


def routes(core: Core, relaying: Relaying) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented: the others are the same."""
    found = _routes("", Sending("flow", core, relaying), documented=True)
    matrix = Sending("matrix", core, relaying)
    for name in DIALECTS:
        found += _routes(f"/_matrix/client/{name}", matrix, documented=name == "v3")
    return found


def _routes(prefix: str, handlers: Sending, *, documented: bool) -> list[Endpoint]:
    send, state = (
        f"{prefix}/rooms/{{roomId}}/send/{{eventType}}",
        f"{prefix}/rooms/{{roomId}}/state/{{eventType}}",
    )
    table = [
        ("POST", send, handlers.send),
        ("PUT", send, handlers.send),
        ("POST", f"{send}/{{txnId}}", handlers.send),
        ("PUT", f"{send}/{{txnId}}", handlers.send),
        ("PUT", state, handlers.put_state),
        ("PUT", f"{state}/{{stateKey}}", handlers.put_state),
        ("GET", state, handlers.get_state),
        ("GET", f"{state}/{{stateKey}}", handlers.get_state),
    ]
    return [
        endpoint(method, path, handler, describe.event(method, path), documented=documented)
        for method, path, handler in table
    ]
