"""openapi.json: what FastAPI derives from the endpoints, with the catalogue's schemas and examples."""

from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from flowbridge import __version__
from flowbridge.events import Catalogue
from flowbridge.web import openapi_sharing

Json = dict[str, Any]

_DESCRIPTION = """\
One HTTP call puts an event into a Matrix room. flowbridge checks the payload against a JSON Schema of its event type,
tells you exactly what is wrong with it, stores it, and brings it to the homeserver once and in order.

Two surfaces over one core: short paths for flow tools, and the Matrix client-server API. On the Matrix surface each
path is served under `/_matrix/client/v3`, `r0`, `api/v1` and `unstable` alike; only v3 is listed here. A blank query
parameter counts as absent.
"""

_SECURITY = {
    "matrixToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "A Matrix access token, or an API key (`fb_…`).",
    },
    "matrixTokenInQuery": {
        "type": "apiKey",
        "in": "query",
        "name": "access_token",
        "description": "A Matrix access token. Goes upstream as a header only, and never into a log.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "A bridge API key: the bridge then acts as its own bot account.",
    },
}


class Problem(TypedDict):
    pointer: Annotated[str, Field(description="RFC 6901, into the event's content.", examples=["/info/size"])]
    message: Annotated[str, Field(examples=["must be an integer, not a string"])]
    schema: Annotated[str, Field(examples=["m.room.message$m.image"])]


class Current(TypedDict, total=False):
    """The room's state that a replay would overwrite."""

    event_id: str
    sender: str
    origin_server_ts: int
    content: Json


class Details(TypedDict, total=False):
    problems: list[Problem]
    replacement_room: Annotated[str, Field(description="What took the place of a room that was upgraded.")]
    current: Current


class MatrixError(TypedDict):
    errcode: Annotated[str, Field(examples=["M_BAD_JSON"])]
    error: Annotated[str, Field(description="A sentence for a person.")]
    retry_after_ms: NotRequired[Annotated[int, Field(ge=0)]]
    flowbridge: NotRequired[Details]


def document(operations: Sequence[APIRoute], catalogue: Catalogue) -> Json:
    """The OpenAPI 3.1 document as JSON."""
    found = get_openapi(
        title="flowbridge",
        version=__version__,
        summary="One HTTP call puts an event into a Matrix room.",
        description=_DESCRIPTION,
        routes=operations,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    error = TypeAdapter(MatrixError).json_schema(ref_template="#/components/schemas/{model}")
    typed = {**found["components"]["schemas"], **error.pop("$defs"), "MatrixError": error}
    del typed["ValidationError"], typed["HTTPValidationError"]  # FastAPI's own, which no endpoint answers
    found["components"] = {"schemas": {**_terse(typed), **_schemas(catalogue)}, "securitySchemes": _SECURITY}
    found["security"] = [{name: []} for name in _SECURITY]
    for path in found["paths"].values():
        for operation in path.values():
            _finish(operation, catalogue)
    openapi_sharing.share(found)
    return found


def _terse(schema: Any) -> Any:
    """A schema without what it would only repeat: titles that pydantic makes of names, and empty defaults."""
    if isinstance(schema, list):
        return [_terse(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _terse(item)
        for key, item in schema.items()
        if not (key == "title" and isinstance(item, str)) and not (key == "default" and item == "")
    }


def _finish(operation: Json, catalogue: Catalogue) -> None:
    if "ValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _terse(parameter["schema"])
        parameter["schema"].pop("description", None)  # it is the parameter's own
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        kind = body["schema"].get("$ref", "").rpartition("/")[2]
        if kind in ("FlowBody", "MatrixBody"):
            body["examples"] = _flow_examples(catalogue) if kind == "FlowBody" else _examples(catalogue)


def _flow_examples(catalogue: Catalogue) -> Json:
    return {
        "string": {"summary": "a bare string", "value": "the backup is done"},
        "flow message": {
            "summary": "a flow message",
            "value": {
                "payload": {"msgtype": "m.text", "body": "the backup is done"},
                "topic": "backup",
                "_msgid": "f1",
            },
        },
        **_examples(catalogue),
    }


def _examples(catalogue: Catalogue) -> Json:
    """For each schema one content; the seed document's own where it has one."""
    found = {}
    for name in catalogue:
        events = catalogue.examples(name)
        events.sort(key=lambda event: "seed" not in event.get("$comment", ""))
        if events:
            found[name] = {"summary": name, "value": events[0]["content"]}
    return found


def _schemas(catalogue: Catalogue) -> Json:
    contents = [{"$ref": f"#/components/schemas/{_component(name)}"} for name in catalogue]
    found = {_component(name): _rewritten(schema) for name, schema in catalogue.documents.items()}
    # Other event types and msgtypes are sent too, so any object may be right.
    content: Json = {"title": "The event's content", "anyOf": [*contents, {"type": "object"}]}
    found |= {
        "Content": content,
        "WholeEvent": {
            "type": "object",
            "description": "An event as a homeserver prints it; everything but content and state_key is ignored.",
            "required": ["type", "content"],
            "properties": {
                "type": {"type": "string", "description": "Must be the event type of the path."},
                "content": {"$ref": "#/components/schemas/Content"},
                "state_key": {"type": ["string", "null"]},
            },
        },
        "FlowMessage": {
            "type": "object",
            "description": "A message of a flow tool.",
            "required": ["payload"],
            "properties": {
                "payload": {"anyOf": [{"$ref": "#/components/schemas/Content"}, {"type": "string"}]},
                "topic": {},
                "_msgid": {},
            },
        },
        "MatrixBody": _any("Content", "WholeEvent"),
        "FlowBody": {"anyOf": [*_any("Content", "WholeEvent", "FlowMessage")["anyOf"], {"type": "string"}]},
    }
    return found


def _any(*names: str) -> Json:
    return {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}


def _component(name: str) -> str:
    """A schema's name as OpenAPI allows it: no `$`, no `/`."""
    return name.replace("$", "-").replace("components/", "")


def _rewritten(schema: Any) -> Any:
    """A schema with its file references turned into references inside this document."""
    if isinstance(schema, list):
        return [_rewritten(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _rewritten(value) for key, value in schema.items() if key != "$schema"}
    if isinstance(reference := found.get("$ref"), str) and not reference.startswith("#"):
        found["$ref"] = f"#/components/schemas/{_component(reference.removesuffix('.json'))}"
    return found
