"""Sending events and setting state, on both surfaces.

The handlers are raw: as typed ones they would take some 30 µs more of the 500 of a send.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any, NotRequired, Protocol
from urllib.parse import urlencode

from fastapi import Header
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge import log
from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import BadContent, BadRequest, MatrixError, Problem
from flowbridge.homeserver import identifiers
from flowbridge.limits import peer
from flowbridge.models import Caller, Event, Payload, Surface
from flowbridge.services.acceptance import How, Receipt
from flowbridge.services.sending import Sender, Told
from flowbridge.web import parameters
from flowbridge.web.dependencies import credential, event_type, room, segment
from flowbridge.web.endpoint import LOG, RECEIPT, Handler, JsonAnswer, error_answer, headers_of, json_answer, read_body
from flowbridge.web.routes.deliveries import LOCATION, Remarks
from flowbridge.web.routes.passthrough import Relaying
from flowbridge.web.routes.state import State, format_, state_key
from flowbridge.web.routing import BODY, TAGS, RawRoute, Route, header, served

Json = dict[str, Any]

MAX_WAIT_SECONDS = 300


class EventId(TypedDict):
    event_id: Annotated[str, Field(examples=["$YUwRidLecu:example.com"])]
    flowbridge: NotRequired[Remarks]


class Accepted(Protocol):
    """A send that was accepted, and whose outcome is not known yet; or that was refused."""

    credential: Credential
    caller: Caller
    error: MatrixError | None
    event: Event
    how: How
    receipt: Receipt
    ignored: Sequence[str]
    is_async: bool
    ends: float  # monotonic: until when its caller waits


class Sending:
    """The handlers of one surface."""

    def __init__(self, surface: Surface, core: Core, relaying: Relaying) -> None:
        self._surface: Surface = surface
        self._relaying = relaying
        self._acceptance = core.acceptance
        self._sender = core.sender
        self._callers = core.callers
        self._room_access = core.room_access
        self._encryption = core.encryption
        self._wait_seconds = core.settings.wait_seconds

    async def send(self, request: Request) -> Response:
        """Send an event

        The payload is checked against the schema of its event type, stored, then sent. State event types of the
        catalogue (`m.room.name`, `m.room.topic`, …) become room state.
        """
        if (accepted := request.scope.get(RECEIPT)) is not None:
            told = await outcome_of(self._sender, accepted)
            return self._told(request, told, accepted.ignored, is_async=accepted.is_async)
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._acceptance.check_share(credential)
        path = request.path_params
        room, event_type = identifiers.room(path["roomId"]), identifiers.event_type(path["eventType"])
        txn_id = path.get("txnId")
        if txn_id == "" and self._surface == "flow":
            txn_id = None  # a slash too many
        if txn_id is not None:
            txn_id = identifiers.segment(txn_id, "transaction id")
        body, found = await self._read(request, headers, event_type)
        event = await self._acceptance.check(room, event_type, found, as_state=False)
        if others := self._others(request, credential):
            if event.state_key is not None:
                raise BadRequest(
                    f"{others[0][0]}: {event_type} is room state, which takes this parameter at "
                    "PUT …/state/{eventType}/{stateKey} alone"
                )
            return await self._pass_on(request, credential, event, others)
        return await self._accept(request, headers, credential, event, body, txn_id, found.ignored)

    async def put_state(self, request: Request) -> Response:
        """Set room state

        `{}` clears most state; a name and a topic are cleared by an empty string, pinned events by an empty list.
        Setting what is already set answers the old event id.
        """
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._acceptance.check_share(credential)
        path = request.path_params
        room, event_type = identifiers.room(path["roomId"]), identifiers.event_type(path["eventType"])
        state_key = identifiers.segment(path.get("stateKey", ""), "state key", empty=True)
        body, found = await self._read(request, headers, event_type)
        found = _keyed(found, state_key, named="stateKey" in path)
        event = await self._acceptance.check(room, event_type, found, as_state=True)
        if others := self._others(request, credential):
            return await self._pass_on(request, credential, event, others)
        return await self._accept(request, headers, credential, event, body, None, found.ignored)

    def _others(self, request: Request, credential: Credential) -> list[tuple[str, str]]:
        """The query parameters that only the homeserver understands: there are none on the flow surface."""
        return parameters.others(request, credential) if self._surface == "matrix" else []

    async def _pass_on(
        self, request: Request, credential: Credential, event: Event, others: Sequence[tuple[str, str]]
    ) -> Response:
        """Send a checked event whose parameters are more than the store keeps: another sender, a time, a delay.

        It goes to the homeserver immediately, with its own transaction id, and is not stored: all promises are the
        homeserver's.
        """
        permit = partial(scopes.permit, credential.key, event.type)
        caller, room_id = await self._room_access.enter(credential, event.room, permit)
        request.scope[LOG] = {"user": caller.user_id}
        identity = [pair for pair in others if pair[0] in parameters.IDENTITY]
        query = f"?{urlencode(identity)}" if identity else ""
        with self._callers.as_(caller):
            await self._encryption.permit(caller.token, replace(event, room=room_id), query=query)
        return await self._relaying.pass_on(request, event.content, caller)

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
        ignored: Sequence[str],
    ) -> Response:
        key = txn_id
        if self._surface == "flow" and "idempotency-key" in headers:
            key = key_of(request.headers.getlist("idempotency-key"))
        patience, is_async = preference(request, headers, self._surface, self._wait_seconds)
        how = How(self._surface, key, body, waits=patience is not None)
        told = await self._sender.send(credential, event, how, patience or 0.0)
        return self._told(request, told, ignored, is_async=is_async)

    @staticmethod
    def _told(request: Request, told: Told, ignored: Sequence[str], *, is_async: bool) -> JsonAnswer:
        request.scope[LOG] = fields = {"user": told.user_id, "delivery": told.delivery}
        if told.error is not None:
            fields["errcode"] = str(told.error.errcode)
        return answer_to(told, ignored, is_async)


async def outcome_of(sender: Sender, send: Accepted) -> Told:
    """Wait for the outcome of an event that web/usual_send.py has accepted. Raises why it was not."""
    key = send.credential.key
    peer.identified(send.caller.user_id if key is None else f"key {key.id}")
    if key is not None:
        log.note(key=key.id)
    if send.error is not None:
        raise send.error
    patience = max(0.0, send.ends - time.monotonic())
    return await sender.outcome(send.credential, send.event, send.how, send.receipt, patience)


def answer_to(told: Told, ignored: Sequence[str], is_async: bool) -> JsonAnswer:
    response = _answer(told, ignored)
    response.add(b"flowbridge-delivery", told.delivery)
    if is_async and response.status_code == 202:
        response.add(b"preference-applied", "respond-async")
    if told.replayed:
        response.add(b"idempotent-replayed", "true")
    return response


def _answer(told: Told, ignored: Sequence[str]) -> JsonAnswer:
    if told.error is not None:
        return error_answer(told.error)
    beside = {"flowbridge": {"ignored": ignored}} if ignored else {}
    if told.status:
        answer = {"delivery_id": told.delivery, "status": told.status, **beside}
        return json_answer(answer, 202, {"Location": f"/deliveries/{told.delivery}"})
    if not ignored and told.event_id is not None and told.event_id.isascii():  # an encoder of its own would cost 3 µs
        return JsonAnswer(b'{"event_id":%b}' % encode_basestring_ascii(told.event_id).encode())
    return json_answer({"event_id": told.event_id, **beside})


def preference(
    request: Request, headers: Mapping[str, str], surface: Surface, wait_seconds: float
) -> tuple[float | None, bool]:
    """The caller's preference (RFC 7240): the seconds to wait, or None, and whether it said `respond-async`.

    With both, it gets a 202 after that time. A Matrix client has to learn the outcome: it can only set the time.
    """
    return preferred(request.headers.getlist("prefer") if "prefer" in headers else (), surface, wait_seconds)


def preferred(lines: Sequence[str], surface: Surface, wait_seconds: float) -> tuple[float | None, bool]:
    """As `preference`, of these Prefer headers."""
    preferred = _preferences(lines) if lines else {}
    is_async = surface == "flow" and "respond-async" in preferred
    seconds = preferred.get("wait", "")
    if seconds.isascii() and seconds.isdigit():
        return float(min(int(seconds[:9]), MAX_WAIT_SECONDS)), is_async
    return None if is_async else wait_seconds, is_async


def key_of(lines: Sequence[str]) -> str:
    if len(set(lines)) > 1:
        raise BadRequest("Idempotency-Key: it is given more than once, with different values")
    return identifiers.identifier(lines[0], "Idempotency-Key")


def _preferences(lines: Sequence[str]) -> dict[str, str]:
    """The preferences of all Prefer headers, without their parameters; the first of a name counts."""
    found: dict[str, str] = {}
    for preference in ",".join(lines).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def _keyed(found: Payload, state_key: str, *, named: bool) -> Payload:
    """The payload with the state key of the path, or else of the body. Raises BadContent when they differ."""
    if found.state_key is None or found.state_key == state_key:
        return replace(found, state_key=state_key)
    if named:
        message = f"is {found.state_key[:255]!r} but the path says {state_key!r}"
        raise BadContent([Problem("/state_key", message, "body")])
    return found


async def txn_id(
    raw: Annotated[str, segment("txnId", "The caller's transaction id: the same id sends the same event once.", "m1")],
) -> None: ...


async def prefer(
    raw: Annotated[
        str,
        Header(
            alias="Prefer",
            description="RFC 7240. `wait=N`: wait for N seconds, instead of the bridge's own 10, for the event to be "
            "in the room. `respond-async`, on the flow surface: answer 202 as soon as the event is on the disk.",
            # No example: /docs would fill it in, and a first try would not wait for the room.
        ),
    ] = "",
) -> None: ...


async def idempotency_key(
    raw: Annotated[
        str,
        Header(
            alias="Idempotency-Key",
            description="Any text. The same key with the same content is the same delivery: its answer is given again, "
            "with `Idempotent-Replayed: true`. Wins over a `txnId` in the path. For example `order-17-shipped`.",
            min_length=1,
            max_length=255,
            # No example: /docs would fill it in, and every try but the first would reach no room.
        ),
    ] = "",
) -> None: ...


def _body(surface: Surface, *, text: bool) -> Json:
    """`text`: a bare string is taken, too."""
    name = "FlowBody" if surface == "flow" else "MatrixBody"
    content: Json = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    if text:
        content["text/plain"] = {"schema": {"type": "string"}, "example": "the backup is done"}
    return {"required": True, "description": _SHAPES[surface], "content": content}


_SHAPES: dict[Surface, str] = {
    "flow": "The event's content; or a flow message whose `payload` is the content or a string; or a whole event, "
    "whose `content` and `state_key` are used; or, for `m.room.message`, a bare string. Content-Type is not looked at, "
    "but for text/plain.",
    "matrix": "The event's content; or a whole event, whose `content` and `state_key` are used.",
}
DELIVERY = {
    "Flowbridge-Delivery": header("The delivery's id, in every answer to an event that was accepted."),
    "Idempotent-Replayed": header("The answer is that of an earlier request with the same key.", const="true"),
}
ACCEPTED: Json = {
    "description": "The event is on the disk, and will be in the room.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Accepted"}}},
    "headers": {
        "Location": LOCATION,
        "Preference-Applied": header("What was granted of `Prefer`.", const="respond-async"),
        **DELIVERY,
    },
}
FLOW_BODY = _body("flow", text=True)


def routes(core: Core, relaying: Relaying) -> list[Route]:
    return [*_routes("flow", core, relaying), *_routes("matrix", core, relaying)]


def _routes(surface: Surface, core: Core, relaying: Relaying) -> list[Route]:
    is_flow = surface == "flow"
    sending, reading = Sending(surface, core, relaying), State(surface, core)
    prefers = [prefer, idempotency_key] if is_flow else [prefer]
    responses = {"200": {"headers": DELIVERY}, **({"202": ACCEPTED} if is_flow else {})}

    def write(method: str, path: str, handler: Handler, name: str, *uses: Any) -> Route:
        is_send = handler == sending.send
        return RawRoute(
            method,
            served(surface, path),
            handler,
            f"{surface}_{name}",
            tag=TAGS[surface],
            uses=[credential, room, event_type, *uses, *prefers],
            answers=EventId,
            ok="The event is in the room." if is_send else "The state is set.",
            errors=(*BODY, 422) if is_flow else BODY,
            sends=True,
            extra={"responses": responses, "requestBody": _body(surface, text=is_flow and is_send)},
        )

    def read(path: str, name: str, *uses: Any) -> Route:
        return RawRoute(
            "GET",
            served(surface, path),
            reading.get,
            f"{surface}_{name}",
            tag=TAGS[surface],
            uses=[credential, room, event_type, *uses, format_],
            answers=Json,
            ok="The content of the state event, or the whole event with `format=event`.",
        )

    send, state = "/rooms/{roomId}/send/{eventType}", "/rooms/{roomId}/state/{eventType}"
    return [
        write("POST", send, sending.send, "post_send"),
        write("PUT", send, sending.send, "put_send"),
        write("POST", f"{send}/{{txnId}}", sending.send, "post_sendTxn", txn_id),
        write("PUT", f"{send}/{{txnId}}", sending.send, "put_sendTxn", txn_id),
        write("PUT", state, sending.put_state, "put_state"),
        write("PUT", f"{state}/{{stateKey}}", sending.put_state, "put_stateKey", state_key),
        read(state, "get_state"),
        read(f"{state}/{{stateKey}}", "get_stateKey", state_key),
    ]
