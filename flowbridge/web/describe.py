"""The OpenAPI operations of media and live streams, in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from flowbridge.web.dependencies import ROOM
from flowbridge.web.routing import error_response

Operation = dict[str, Any]

UPSTREAM = (401, 403, 429, 500, 502, 503, 504)


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
}


def operation(
    id_: str,
    tag: str,
    summary: str,
    *,
    ok: str = "",
    answers: Mapping[str, Any] | None = None,
    errors: Iterable[int] = (),
    description: str = "",
    parameters: Iterable[Operation] = (),
    body: Operation | None = None,
    open_to_all: bool = False,
) -> Operation:
    responses: dict[str, Any] = {}
    if answers is not None:
        responses["200"] = {"description": ok, "content": dict(answers)}
    if not open_to_all:
        errors = {*errors, 429}
    for status in sorted({404, 405, *errors}):
        responses[str(status)] = error_response(status)
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


def query(name: str, description: str, example: Any, **schema: Any) -> Operation:
    return parameter(name, description, example, "query", **schema)
