"""Sending events and setting state, on both surfaces: parse, let the service send, say how it ended."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring_ascii
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.attempt import IN_PLAIN_TEXT
from flowbridge.errors import BadContent, BadRequest, Forbidden, MatrixError, Problem
from flowbridge.homeserver import paths
from flowbridge.models import Event, Payload, Surface
from flowbridge.services.acceptance import How
from flowbridge.services.sending import Told
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
from flowbridge.web.routes.state import State
from flowbridge.web.routing import DIALECTS

MAX_WAIT_SECONDS = 300


class Sending:
    """The handlers of one surface."""

    def __init__(self, surface: Surface, core: Core, relaying: Relaying) -> None:
        self._surface: Surface = surface
        self._relaying = relaying
        self._acceptance = core.acceptance
        self._sender = core.sender
        self._callers = core.callers
        self._room_access = core.room_access
        self._carrier = core.carrier
        self._wait_seconds = core.settings.wait_seconds

    async def send(self, request: Request) -> Response:
        """POST/PUT …/rooms/{roomId}/send/{eventType}[/{txnId}]"""
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._acceptance.check_share(credential)
        path = request.path_params
        room, event_type = paths.room(path["roomId"]), paths.event_type(path["eventType"])
        txn_id = paths.segment(path["txnId"], "transaction id") if "txnId" in path else None
        body, found = await self._read(request, headers, event_type)
        event = await self._acceptance.check(room, event_type, found, as_state=False)
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
        self._acceptance.check_share(credential)
        path = request.path_params
        room, event_type = paths.room(path["roomId"]), paths.event_type(path["eventType"])
        state_key = paths.segment(path.get("stateKey", ""), "state key", empty=True)
        body, found = await self._read(request, headers, event_type)
        found = _keyed(found, state_key, named="stateKey" in path)
        event = await self._acceptance.check(room, event_type, found, as_state=True)
        if others := self._others(request, credential):
            return await self._pass_on(request, credential, event, others)
        return await self._accept(request, headers, credential, event, body, None)

    def _others(self, request: Request, credential: Credential) -> list[tuple[str, str]]:
        """On the Matrix surface the query parameters that are the homeserver's to understand."""
        return parameters.others(request, credential) if self._surface == "matrix" else []

    async def _pass_on(
        self, request: Request, credential: Credential, event: Event, others: Sequence[tuple[str, str]]
    ) -> Response:
        """A checked event whose parameters say more of it than we can keep: another sender, a time, a delay.

        It goes to the homeserver now, with its own transaction id, and is not stored: what is promised of it, the
        homeserver promises.
        """
        permit = partial(self._callers.permit, credential, event.type)
        caller, room_id = await self._room_access.enter(credential, event.room, permit)
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
        return body, await self._acceptance.receive(body, content_type, event_type, self._surface)

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
        told = await self._sender.send(credential, event, how, patience or 0.0)
        request.scope[LOG] = fields = {"user": told.user_id, "delivery": told.delivery}
        response = _answer(told)
        if told.error is not None:
            fields["errcode"] = str(told.error.errcode)
        response.add(b"flowbridge-delivery", told.delivery)
        if is_async and response.status_code == 202:
            response.add(b"preference-applied", "respond-async")
        if told.replayed:
            response.add(b"idempotent-replayed", "true")
        return response


def _answer(told: Told) -> JsonAnswer:
    if told.error is not None:
        return error_answer(told.error)
    if told.status:
        answer = {"delivery_id": told.delivery, "status": told.status}
        return json_answer(answer, 202, {"Location": f"/deliveries/{told.delivery}"})
    if told.event_id is not None and told.event_id.isascii():  # an encoder of its own would cost 3 µs
        return JsonAnswer(b'{"event_id":%b}' % encode_basestring_ascii(told.event_id).encode())
    return json_answer({"event_id": told.event_id})


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
    found = _routes("", Sending("flow", core, relaying), State("flow", core), documented=True)
    handlers = Sending("matrix", core, relaying), State("matrix", core)
    for name in DIALECTS:
        found += _routes(f"/_matrix/client/{name}", *handlers, documented=name == "v3")
    return found


def _routes(prefix: str, sending: Sending, reading: State, *, documented: bool) -> list[Endpoint]:
    send, state = (
        f"{prefix}/rooms/{{roomId}}/send/{{eventType}}",
        f"{prefix}/rooms/{{roomId}}/state/{{eventType}}",
    )
    table = [
        ("POST", send, sending.send),
        ("PUT", send, sending.send),
        ("POST", f"{send}/{{txnId}}", sending.send),
        ("PUT", f"{send}/{{txnId}}", sending.send),
        ("PUT", state, sending.put_state),
        ("PUT", f"{state}/{{stateKey}}", sending.put_state),
        ("GET", state, reading.get),
        ("GET", f"{state}/{{stateKey}}", reading.get),
    ]
    return [
        endpoint(method, path, handler, describe.event(method, path), documented=documented)
        for method, path, handler in table
    ]
