"""Sending events and reading state, on both surfaces."""

from collections.abc import Mapping, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.callers import Credential
from flowbridge.core import Core
from flowbridge.errors import BadContent, BadGateway, BadRequest, Errcode, GatewayTimeout, MatrixError, Problem
from flowbridge.homeserver import dialect
from flowbridge.intake import Receipt
from flowbridge.intake import Sending as How
from flowbridge.models import Caller, Event, Payload, Surface
from flowbridge.routes import describe
from flowbridge.routes.endpoint import LOG, Endpoint, endpoint, error_answer, headers_of, json_answer, read_body
from flowbridge.store.journal import Outcome, Ticket

MAX_WAIT_SECONDS = 300
DIALECTS = ("v3", "r0", "v1", "api/v1", "unstable")


class Sending:
    """The handlers of one surface."""

    def __init__(self, surface: Surface, core: Core) -> None:
        self._surface: Surface = surface
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
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        txn_id = dialect.segment(path["txnId"], "transaction id") if "txnId" in path else None
        body, found = await self._read(request, headers, event_type)
        event = await self._intake.check(room, event_type, found, as_state=False)
        return await self._accept(request, headers, credential, event, body, txn_id)

    async def put_state(self, request: Request) -> Response:
        """PUT …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._intake.check_share(credential)
        path = request.path_params
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        state_key = dialect.segment(path.get("stateKey", ""), "state key", empty=True)
        body, found = await self._read(request, headers, event_type)
        found = _keyed(found, state_key, named="stateKey" in path)
        event = await self._intake.check(room, event_type, found, as_state=True)
        return await self._accept(request, headers, credential, event, body, None)

    async def get_state(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        credential = await self._callers.credential(headers_of(request), request.scope["query_string"])
        path = request.path_params
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        state_key = dialect.segment(path.get("stateKey", ""), "state key", empty=True)
        query = "format=event" if request.query_params.get("format") == "event" else ""
        permit = partial(self._callers.permit, credential, event_type)
        caller, room_id = await self._aliases.enter(credential, room, permit)
        try:
            answer = await self._homeserver.read_state(caller.token, room_id, event_type, state_key, query)
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        return Response(answer.body, answer.status, media_type="application/json")

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
        delivery = receipt.ticket.row.delivery
        request.scope[LOG] = {"user": receipt.caller.user_id, "delivery": delivery}
        try:
            response = await self._outcome(receipt, patience if receipt.waits else None)
        except MatrixError as error:
            response = error_answer(error)
            request.scope[LOG]["errcode"] = str(error.errcode)
        response.headers["Flowbridge-Delivery"] = delivery
        if is_async and response.status_code == 202:
            response.headers["Preference-Applied"] = "respond-async"
        if receipt.replayed:
            response.headers["Idempotent-Replayed"] = "true"
        return response

    async def _outcome(self, receipt: Receipt, patience: float | None) -> Response:
        """The answer to a send: how it ended or, on the flow surface, that it is accepted."""
        ticket = receipt.ticket
        if patience is None:
            return await self._queued(receipt)
        outcome = await self._courier.wait(ticket, patience)
        if outcome is not None:
            return self._settled(receipt.caller, outcome)
        if self._surface == "matrix":
            raise await self._unsettled(ticket)
        return await self._queued(receipt)

    async def _queued(self, receipt: Receipt) -> Response:
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

    def _settled(self, caller: Caller, outcome: Outcome) -> Response:
        if outcome.state == "sent":
            return json_answer({"event_id": outcome.event_id})
        found = dict(outcome.error or {})
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
    return dialect.identifier(lines[0], "Idempotency-Key")


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


def routes(core: Core) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented: the others are the same."""
    found = _routes("", Sending("flow", core), documented=True)
    matrix = Sending("matrix", core)
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
