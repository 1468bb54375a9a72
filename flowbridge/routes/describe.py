"""The OpenAPI operations of the endpoints, in words. Their schemas are in flowbridge.openapi."""

from collections.abc import Iterable, Mapping
from typing import Any

Operation = dict[str, Any]

ROOM = "!CvcvRuDYDzTOzfKKgh:localhost"

_ERRORS = {
    400: "The request is malformed, or the payload breaks its schema: `flowbridge.problems` lists every problem.",
    401: "No token or key, or one that is not accepted.",
    403: "The account may not do this in the room.",
    404: "There is no such room, event or path.",
    408: "The body did not arrive in time.",
    413: "The body or the event is too large.",
    415: "The body is a form, multipart, XML or compressed.",
    429: "The homeserver asks to wait `retry_after_ms`.",
    500: "The homeserver failed.",
    502: "The homeserver is away, or is no homeserver.",
    503: "Not ready.",
    504: "The homeserver did not answer in time.",
}


def _schema(name: str) -> Operation:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Mapping[str, Any], **more: Any) -> Operation:
    return {"application/json": {"schema": dict(schema), **more}}


def _parameter(name: str, description: str, example: str, where: str = "path", **schema: Any) -> Operation:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": description,
        "schema": {"type": "string", **schema},
        "example": example,
    }


_PARAMETERS = {
    "roomId": _parameter(
        "roomId",
        "A room id, with or without `:server`, or an alias `#name:server`, which is joined once. "
        "Percent-encoded or raw.",
        ROOM,
    ),
    "eventType": _parameter("eventType", "The event type, e.g. one of `GET /schemas`.", "m.room.message"),
    "txnId": _parameter("txnId", "The caller's transaction id: the same id sends the same event once.", "m1"),
    "stateKey": _parameter("stateKey", "The state key; may be empty.", "", maxLength=255),
}
_FORMAT = _parameter(
    "format",
    "`event` answers the whole event instead of its content.",
    "event",
    "query",
    enum=["content", "event"],
)


def _operation(
    id_: str,
    tag: str,
    summary: str,
    *,
    ok: str,
    answers: Mapping[str, Any],
    errors: Iterable[int] = (),
    description: str = "",
    parameters: Iterable[Operation] = (),
    body: Operation | None = None,
    open_to_all: bool = False,
) -> Operation:
    responses: dict[str, Any] = {"200": {"description": ok, "content": dict(answers)}}
    for status in sorted({404, 405, *errors}):
        text = _ERRORS.get(status, "The path is known, but not with this method.")
        responses[str(status)] = {"description": text, "content": _json(_schema("MatrixError"))}
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
    content = _json(_schema(name))
    if text:
        content["text/plain"] = {"schema": {"type": "string"}, "example": "the backup is done"}
    return {"required": True, "description": description, "content": content}


_SHAPES = (
    "The event's content; or a flow message whose `payload` is the content or a string; or a whole event, whose "
    "`content` and `state_key` are used; or, for `m.room.message`, a bare string. Content-Type is not looked at, "
    "but for text/plain."
)
_MATRIX_SHAPES = "The event's content; or a whole event, whose `content` and `state_key` are used."
_UPSTREAM = (401, 403, 429, 500, 502, 504)
_BODY = (400, 408, 413, 415)


def event(method: str, path: str) -> Operation:
    """The operation of one of the send and state routes."""
    matrix = path.startswith("/_matrix/")
    parameters = [parameter for name, parameter in _PARAMETERS.items() if f"{{{name}}}" in path]
    surface, tag = ("matrix", "Matrix surface") if matrix else ("flow", "Flow surface")
    variant = "Txn" if "{txnId}" in path else "Key" if "{stateKey}" in path else ""
    shapes = _MATRIX_SHAPES if matrix else _SHAPES
    if "/send/" in path:
        return _operation(
            f"{surface}_{method.lower()}_send{variant}",
            tag,
            "Send an event",
            description="The payload is checked against the schema of its event type, then sent. State event types "
            "of the catalogue (`m.room.name`, `m.room.topic`, …) become room state.",
            ok="The event is in the room.",
            answers=_json(_schema("EventId")),
            errors=(*_BODY, *_UPSTREAM),
            parameters=parameters,
            body=_body("MatrixBody" if matrix else "FlowBody", shapes, text=not matrix),
        )
    if method == "PUT":
        return _operation(
            f"{surface}_put_state{variant}",
            tag,
            "Set room state",
            description="`{}` clears most state; a name and a topic are cleared by an empty string, pinned events "
            "by an empty list. Setting what is already set answers the old event id.",
            ok="The state is set.",
            answers=_json(_schema("EventId")),
            errors=(*_BODY, *_UPSTREAM),
            parameters=parameters,
            body=_body("MatrixBody" if matrix else "FlowBody", shapes, text=False),
        )
    return _operation(
        f"{surface}_get_state{variant}",
        tag,
        "Read room state",
        ok="The content of the state event, or the whole event with `format=event`.",
        answers=_json({"type": "object"}),
        errors=(400, *_UPSTREAM),
        parameters=[*parameters, _FORMAT],
    )


SCHEMAS = _operation(
    "schemas",
    "Catalogue",
    "The event types that flowbridge knows",
    ok="All event types by name.",
    answers=_json(_schema("Schemas")),
    open_to_all=True,
)
SCHEMA = _operation(
    "schema",
    "Catalogue",
    "The JSON Schema of an event type",
    description="Also of one msgtype: `m.room.message$m.image`. A relative `$ref` leads to `/schemas/…`.",
    ok="A JSON Schema 2020-12.",
    answers=_json({"type": "object"}),
    errors=(400,),
    parameters=[_PARAMETERS["eventType"]],
    open_to_all=True,
)
COMPONENT = _operation(
    "schemaComponent",
    "Catalogue",
    "A part that schemas share",
    ok="A JSON Schema 2020-12.",
    answers=_json({"type": "object"}),
    errors=(400,),
    parameters=[_parameter("name", "The component's file name.", "image_info.json")],
    open_to_all=True,
)
VALIDATE = _operation(
    "validate",
    "Catalogue",
    "Try a payload without sending it",
    description="Answers what would be sent, or the error that a send would get. Needs no token.",
    ok="The payload is right.",
    answers=_json(_schema("Valid")),
    errors=_BODY,
    parameters=[_PARAMETERS["eventType"]],
    body=_body("FlowBody", _SHAPES, text=True),
    open_to_all=True,
)
HEALTHZ = _operation(
    "healthz",
    "Operations",
    "Whether the process answers",
    ok="It does.",
    answers=_json(_schema("Health")),
    open_to_all=True,
)
READYZ = _operation(
    "readyz",
    "Operations",
    "Whether events can be sent",
    ok="The homeserver can be reached, and the bot account, if there is one, is accepted.",
    answers=_json(_schema("Ready")),
    errors=(503,),
    open_to_all=True,
)
VERSIONS = _operation(
    "versions",
    "Matrix surface",
    "The homeserver's versions",
    ok="The homeserver's own answer.",
    answers=_json({"type": "object"}),
    errors=(429, 500, 502, 504),
    open_to_all=True,
)
OPENAPI = _operation(
    "openapi",
    "Operations",
    "This document",
    ok="OpenAPI 3.1.",
    answers=_json({"type": "object"}),
    open_to_all=True,
)
PAGE = _operation("docs", "Operations", "The documentation as a page", ok="HTML.", answers={"text/html": {}})
