"""The OpenAPI operations of the endpoints, in words. Their schemas are in openapi.py."""

from collections.abc import Iterable, Mapping
from typing import Any

Operation = dict[str, Any]

ROOM = "!CvcvRuDYDzTOzfKKgh:localhost"

_ERRORS = {
    400: "The request is malformed, or the payload breaks its schema: `flowbridge.problems` lists every problem.",
    401: "No token or key, or one that is not accepted.",
    403: "The account may not do this in the room.",
    404: "There is no such room, event, delivery or path.",
    408: "The body did not arrive in time.",
    409: "The delivery is queued, or being sent, or its replay would overwrite newer state.",
    413: "The body or the event is too large.",
    415: "The body is a form, multipart, XML or compressed.",
    422: "This `Idempotency-Key` was used before, with other content.",
    429: "The homeserver, or a bound of the bridge that this caller has its share of, asks to wait `retry_after_ms`.",
    500: "The homeserver failed.",
    502: "The homeserver is away, or what answers is not a homeserver.",
    503: "Not at the moment; `Retry-After` says when: the store is full or away, it is not known whose token this is, "
    "or (`M_LIMIT_EXCEEDED`) the caller has its share of the store.",
    504: "The homeserver did not answer in time.",
}


def schema(name: str) -> Operation:
    return {"$ref": f"#/components/schemas/{name}"}


def as_json(schema: Mapping[str, Any], **more: Any) -> Operation:
    return {"application/json": {"schema": dict(schema), **more}}


def parameter(name: str, description: str, example: Any, where: str = "path", **schema: Any) -> Operation:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": description,
        "schema": {"type": "string", **schema},
        "example": example,
    }


PARAMETERS = {
    "roomId": parameter(
        "roomId",
        "A room id, with or without `:server`, or an alias `#name:server`, which is joined once. "
        "Percent-encoded or raw.",
        ROOM,
    ),
    "eventType": parameter("eventType", "The event type, e.g. one of `GET /schemas`.", "m.room.message"),
    "txnId": parameter("txnId", "The caller's transaction id: the same id sends the same event once.", "m1"),
    "stateKey": parameter("stateKey", "The state key; may be empty.", "", maxLength=255),
}
_FORMAT = parameter(
    "format",
    "`event` answers the whole event instead of its content.",
    "event",
    "query",
    enum=["content", "event"],
)


def operation(
    id_: str,
    tag: str,
    summary: str,
    *,
    ok: str = "",
    answers: Mapping[str, Any] | None = None,
    accepted: Operation | None = None,
    errors: Iterable[int] = (),
    description: str = "",
    parameters: Iterable[Operation] = (),
    body: Operation | None = None,
    open_to_all: bool = False,
    kept: bool = False,
) -> Operation:
    """`kept`: the answer has an ETag, and a caller that has it already gets a 304."""
    responses: dict[str, Any] = {}
    if answers is not None:
        responses["200"] = {"description": ok, "content": dict(answers)}
    if accepted is not None:
        responses["202"] = accepted
    if kept:
        responses["304"] = {"description": "`If-None-Match` names the ETag of what would be answered."}
    if not open_to_all:
        errors = {*errors, 429}
    for status in sorted({404, 405, *errors}):
        text = _ERRORS.get(status, "The path is known, but not with this method.")
        responses[str(status)] = {"description": text, "content": as_json(schema("MatrixError"))}
    found: Operation = {"operationId": id_, "tags": [tag], "summary": summary, "responses": responses}
    if description:
        found["description"] = description
    if parameters := list(parameters):
        found["parameters"] = parameters
    if body is not None:
        found["requestBody"] = body
    if open_to_all:
        found["security"] = []
    return found


def _body(name: str, description: str, *, text: bool) -> Operation:
    content = as_json(schema(name))
    if text:
        content["text/plain"] = {"schema": {"type": "string"}, "example": "the backup is done"}
    return {"required": True, "description": description, "content": content}


_SHAPES = (
    "The event's content; or a flow message whose `payload` is the content or a string; or a whole event, whose "
    "`content` and `state_key` are used; or, for `m.room.message`, a bare string. Content-Type is not looked at, "
    "but for text/plain."
)
_MATRIX_SHAPES = "The event's content; or a whole event, whose `content` and `state_key` are used."
UPSTREAM = (401, 403, 429, 500, 502, 503, 504)
_BODY = (400, 408, 413, 415)

_PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "RFC 7240. `wait=N`: wait for N seconds, instead of the bridge's own 10, for the event to be in the "
    "room. `respond-async`, on the flow surface: answer 202 as soon as the event is on the disk.",
    "schema": {"type": "string"},
    "example": "respond-async",
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Any text. The same key with the same content is the same delivery: its answer is given again, with "
    "`Idempotent-Replayed: true`. Wins over a `txnId` in the path.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "example": "order-17-shipped",
}


def _header(description: str, **schema: Any) -> Operation:
    return {"description": description, "schema": {"type": "string", **schema}}


_LOCATION = _header("The delivery: `/deliveries/{deliveryId}`.")
_DELIVERY_HEADERS = {
    "Flowbridge-Delivery": _header("The delivery's id, in every answer to an event that was accepted."),
    "Idempotent-Replayed": _header("The answer is that of an earlier request with the same key.", const="true"),
}
_ACCEPTED = {
    "description": "The event is on the disk, and will be in the room.",
    "content": as_json(schema("Accepted")),
    "headers": {
        "Location": _LOCATION,
        "Preference-Applied": _header("What was granted of `Prefer`.", const="respond-async"),
        **_DELIVERY_HEADERS,
    },
}


def _sending(surface: str, operation: Operation) -> Operation:
    """A send: with what a caller may say about waiting, and what it hears of the delivery."""
    operation["responses"]["200"]["headers"] = _DELIVERY_HEADERS
    operation["parameters"] += [_PREFER, _IDEMPOTENCY_KEY] if surface == "flow" else [_PREFER]
    return operation


def event(method: str, path: str) -> Operation:
    """The operation of one of the send and state routes."""
    matrix = path.startswith("/_matrix/")
    parameters = [parameter for name, parameter in PARAMETERS.items() if f"{{{name}}}" in path]
    surface, tag = ("matrix", "Matrix surface") if matrix else ("flow", "Flow surface")
    variant = "Txn" if "{txnId}" in path else "Key" if "{stateKey}" in path else ""
    shapes = _MATRIX_SHAPES if matrix else _SHAPES
    accepted = None if matrix else _ACCEPTED
    errors = (*_BODY, *UPSTREAM) if matrix else (*_BODY, *UPSTREAM, 422)
    if "/send/" in path:
        found = operation(
            f"{surface}_{method.lower()}_send{variant}",
            tag,
            "Send an event",
            description="The payload is checked against the schema of its event type, stored, then sent. State event "
            "types of the catalogue (`m.room.name`, `m.room.topic`, …) become room state.",
            ok="The event is in the room.",
            answers=as_json(schema("EventId")),
            accepted=accepted,
            errors=errors,
            parameters=parameters,
            body=_body("MatrixBody" if matrix else "FlowBody", shapes, text=not matrix),
        )
        return _sending(surface, found)
    if method == "PUT":
        found = operation(
            f"{surface}_put_state{variant}",
            tag,
            "Set room state",
            description="`{}` clears most state; a name and a topic are cleared by an empty string, pinned events "
            "by an empty list. Setting what is already set answers the old event id.",
            ok="The state is set.",
            answers=as_json(schema("EventId")),
            accepted=accepted,
            errors=errors,
            parameters=parameters,
            body=_body("MatrixBody" if matrix else "FlowBody", shapes, text=False),
        )
        return _sending(surface, found)
    return operation(
        f"{surface}_get_state{variant}",
        tag,
        "Read room state",
        ok="The content of the state event, or the whole event with `format=event`.",
        answers=as_json({"type": "object"}),
        errors=(400, *UPSTREAM),
        parameters=[*parameters, _FORMAT],
    )


def query(name: str, description: str, example: Any, **schema: Any) -> Operation:
    return parameter(name, description, example, "query", **schema)


_DELIVERY_ID = parameter(
    "deliveryId", "As `Flowbridge-Delivery` and a 202 name it.", "KZbVxTqKq5mS0o3lPz9r_g1f", maxLength=128
)
_OWN = (
    "A key with `admin` sees all deliveries in its rooms and of its event types, another key those that it sent, a "
    "Matrix token those that its user sent. A key made for users (`--user`) also sees what these sent by themselves. "
)
_LOG_ERRORS = (400, 401, 403, 429, 500, 502, 503, 504)

DELIVERIES = operation(
    "deliveries",
    "Deliveries",
    "What became of events",
    description=f"{_OWN}The newest first. A parameter that is blank counts as absent.",
    ok="A page of them. `next` is the `cursor` of the following page; the last page has none.",
    answers=as_json(schema("Deliveries")),
    errors=_LOG_ERRORS,
    parameters=[
        query("state", "`sent`, `queued`, `dead`; several with commas, or repeated.", "dead"),
        query("room_id", "A room id; no alias.", ROOM),
        query("event_type", "An event type.", "m.room.message"),
        query("since", "Accepted then or later: ISO 8601, UTC where it has no offset.", "2026-11-22T10:00:00Z"),
        query("until", "Accepted before then.", "2026-11-22T12:00:00+01:00"),
        query("limit", "How many at most.", 50, type="integer", minimum=1, maximum=200, default=50),
        query("cursor", "The `next` of the page before; the other parameters stay as they were.", "AAAAAAAAAGQ"),
    ],
)
DELIVERY = operation(
    "delivery",
    "Deliveries",
    "All about one delivery",
    description=f"{_OWN}That of another caller is a 404, as is one that never was.",
    ok="The request as it came, the event as it is sent, and every attempt.",
    answers=as_json(schema("DeliveryDetail")),
    errors=_LOG_ERRORS,
    parameters=[_DELIVERY_ID],
)
REPLAY = operation(
    "replay",
    "Deliveries",
    "Send a settled event again",
    description="Of a dead letter, or once more of what was sent: the same delivery goes behind all that is queued for "
    "its room. What a Matrix user sent, only this user sends again, or a key that is made for the user. A state event "
    "whose room state has been set since is a 409, with `flowbridge.current`: what the room holds now. Where the "
    "homeserver cannot tell, this is a 503.",
    accepted={
        "description": "It is queued.",
        "content": as_json(schema("Accepted")),
        "headers": {"Location": _LOCATION},
    },
    errors=(*_LOG_ERRORS, 409),
    parameters=[
        _DELIVERY_ID,
        query(
            "overwrite",
            "`true`: send a state event whatever has been set since.",
            "true",
            enum=["true", "false"],
            default="false",
        ),
    ],
)
DELETE_DELIVERY = operation(
    "deleteDelivery",
    "Deliveries",
    "Delete a delivery",
    description="One that is queued is given up, unless it is being sent. Nothing is taken out of the room: "
    "after an attempt without an answer the event may be there all the same. What a Matrix user sent, this user "
    "deletes, a key that is made for the user, or one with `admin` and no limits.",
    ok="It is gone.",
    answers=as_json({"type": "object", "maxProperties": 0}),
    errors=(*_LOG_ERRORS, 409),
    parameters=[_DELIVERY_ID],
)
SCHEMAS = operation(
    "schemas",
    "Catalogue",
    "The event types that flowbridge knows",
    ok="All event types by name.",
    answers=as_json(schema("Schemas")),
    open_to_all=True,
    kept=True,
)
SCHEMA = operation(
    "schema",
    "Catalogue",
    "The JSON Schema of an event type",
    description="Also of one msgtype: `m.room.message$m.image`. A relative `$ref` leads to `/schemas/…`.",
    ok="A JSON Schema 2020-12.",
    answers=as_json({"type": "object"}),
    errors=(400,),
    parameters=[PARAMETERS["eventType"]],
    open_to_all=True,
    kept=True,
)
COMPONENT = operation(
    "schemaComponent",
    "Catalogue",
    "A part that schemas share",
    ok="A JSON Schema 2020-12.",
    answers=as_json({"type": "object"}),
    errors=(400,),
    parameters=[parameter("name", "The component's file name.", "image_info.json")],
    open_to_all=True,
    kept=True,
)
VALIDATE = operation(
    "validate",
    "Catalogue",
    "Try a payload without sending it",
    description="Answers what would be sent, or the error that a send would get. Needs no token.",
    ok="The payload is right.",
    answers=as_json(schema("Valid")),
    errors=(*_BODY, 429, 503),
    parameters=[PARAMETERS["eventType"]],
    body=_body("FlowBody", _SHAPES, text=True),
    open_to_all=True,
)
HEALTHZ = operation(
    "healthz",
    "Operations",
    "Whether the process answers",
    ok="It does.",
    answers=as_json(schema("Health")),
    open_to_all=True,
)
READYZ = operation(
    "readyz",
    "Operations",
    "Whether events can be sent",
    ok="The store can be written, the homeserver reached, and the bot account, if there is one, is accepted. "
    "With a 503 `flowbridge.failed` names the part that fails: store, homeserver or bot. "
    "With FLOWBRIDGE_OPERATIONS_PORT it is served there alone.",
    answers=as_json(schema("Ready")),
    errors=(503,),
    open_to_all=True,
)
METRICS = operation(
    "metrics",
    "Operations",
    "Figures for Prometheus",
    ok="Prometheus' text format: what is queued and since when, lanes, commits, pauses. No names of rooms or accounts. "
    "With FLOWBRIDGE_OPERATIONS_PORT it is served there alone.",
    answers={"text/plain": {"schema": {"type": "string"}}},
    open_to_all=True,
)
VERSIONS = operation(
    "versions",
    "Matrix surface",
    "The homeserver's versions",
    ok="The homeserver's own answer.",
    answers=as_json({"type": "object"}),
    errors=(429, 500, 502, 504),
    open_to_all=True,
)
OPENAPI = operation(
    "openapi",
    "Operations",
    "This document",
    ok="OpenAPI 3.1.",
    answers=as_json({"type": "object"}),
    open_to_all=True,
    kept=True,
)
PAGE = operation("docs", "Operations", "The documentation as a page", ok="HTML.", answers={"text/html": {}})
