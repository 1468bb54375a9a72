"""openapi.json: the endpoints that FastAPI knows, with the catalogue's schemas and examples in it."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from flowbridge import __version__
from flowbridge.events import Catalogue
from flowbridge.web import openapi_sharing

Json = dict[str, Any]

_DESCRIPTION = """\
One HTTP call puts an event into a Matrix room. flowbridge checks the payload against a JSON Schema of its event type,
tells you exactly what is wrong with it, stores it, and brings it to the homeserver once and in order.

Two surfaces over one core: short paths for flow tools, and the Matrix client-server API. On the Matrix surface each
path is served under `/_matrix/client/v3`, `r0`, `api/v1` and `unstable` alike; only v3 is listed here.
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


def document(app: FastAPI, catalogue: Catalogue) -> Json:
    """The OpenAPI 3.1 document as JSON."""
    found = get_openapi(
        title="flowbridge",
        version=__version__,
        summary="One HTTP call puts an event into a Matrix room.",
        description=_DESCRIPTION,
        routes=app.routes,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    typed = {
        name: _without_titles(schema)
        for name, schema in found["components"]["schemas"].items()
        if not name.endswith("ValidationError")  # FastAPI's own errors, which no endpoint answers
    }
    found["components"] = {"schemas": {**typed, **_schemas(catalogue)}, "securitySchemes": _SECURITY}
    found["security"] = [{name: []} for name in _SECURITY]
    for path in found["paths"].values():
        for operation in path.values():
            _finish(operation, catalogue)
    openapi_sharing.share(found)
    return found


def _without_titles(schema: Any) -> Any:
    """A schema without the titles that pydantic makes of its names, a tenth of the document."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_titles(item) for key, item in schema.items() if key != "title" or not isinstance(item, str)}


def _finish(operation: Json, catalogue: Catalogue) -> None:
    if "ValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    answers = operation["responses"].get("200", {}).get("content", {})
    if len(answers) > 1 and answers.get("application/json") == {"schema": {}}:
        del answers["application/json"]  # FastAPI's guess, beside what we say
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
        **_ANSWERS,
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


def _object(required: list[str], /, **properties: Json) -> Json:
    return {"type": "object", "required": required, "properties": properties}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_STRING: Json = {"type": "string"}
_TIME: Json = {
    "type": "string",
    "format": "date-time",
    "description": "UTC, with milliseconds.",
    "examples": ["2026-11-22T10:00:00.000Z"],
}
_DELIVERY_ID: Json = {**_STRING, "examples": ["KZbVxTqKq5mS0o3lPz9r_g1f"]}
_STATUS: Json = {"enum": ["queued", "sent", "dead"]}
_DELIVERY: Json = {
    "delivery_id": _DELIVERY_ID,
    "status": _STATUS,
    "room_id": _STRING,
    "event_type": _STRING,
    "state_key": {**_STRING, "description": "Only of a state event."},
    "event_id": {**_STRING, "description": "Once it is sent."},
    "error": {
        "type": "object",
        "description": "Why it is dead: the homeserver's answer.",
        "required": ["status", "errcode", "error"],
        "properties": {"status": {"type": "integer"}, "errcode": _STRING, "error": _STRING},
    },
    "attempts": {"type": "integer", "minimum": 0, "description": "Since it was accepted, or replayed."},
    "accepted_at": {**_TIME, "description": "When it was accepted, or replayed."},
    "settled_at": {**_TIME, "description": "When it was sent, or died."},
    "user_id": {**_STRING, "description": "Whose account it is sent with."},
    "api_key": {**_STRING, "description": "The id of the API key that sent it."},
}
_DELIVERY_REQUIRED = ["delivery_id", "status", "room_id", "event_type", "attempts", "accepted_at"]
_ANSWERS: Json = {
    "EventId": _object(["event_id"], event_id={**_STRING, "examples": ["$YUwRidLecu:example.com"]}),
    "Problem": _object(
        ["pointer", "message", "schema"],
        pointer={
            **_STRING,
            "description": "RFC 6901, into the event's content.",
            "examples": ["/info/size"],
        },
        message={**_STRING, "examples": ["must be an integer, not a string"]},
        schema={**_STRING, "examples": ["m.room.message$m.image"]},
    ),
    "MatrixError": _object(
        ["errcode", "error"],
        errcode={**_STRING, "examples": ["M_BAD_JSON"]},
        error={**_STRING, "description": "A sentence for a person."},
        retry_after_ms={"type": "integer", "minimum": 0},
        flowbridge={
            "type": "object",
            "properties": {
                "problems": {"type": "array", "items": {"$ref": "#/components/schemas/Problem"}},
                "replacement_room": {**_STRING, "description": "What took the place of a room that was upgraded."},
                "current": {
                    "type": "object",
                    "description": "The room's state that a replay would overwrite.",
                    "properties": {
                        "event_id": _STRING,
                        "sender": _STRING,
                        "origin_server_ts": {"type": "integer"},
                        "content": {"type": "object"},
                    },
                },
            },
        },
    ),
    "Accepted": _object(["delivery_id", "status"], delivery_id=_DELIVERY_ID, status=_STATUS),
    "Delivery": _object(_DELIVERY_REQUIRED, **_DELIVERY),
    "Deliveries": _object(
        ["deliveries"],
        deliveries={"type": "array", "items": _reference("Delivery")},
        next={**_STRING, "description": "The `cursor` of the following page; the last page has none."},
    ),
    "DeliveryDetail": _object(
        [*_DELIVERY_REQUIRED, "request", "event", "txn_id", "history"],
        **_DELIVERY,
        request={**_STRING, "description": "The body as it came."},
        event=_object(
            ["type", "content"],
            type=_STRING,
            state_key=_STRING,
            content={"type": "object", "description": "As it is sent."},
        ),
        txn_id={**_STRING, "description": "Under which the homeserver knows it; a replay has a new one."},
        history={
            "type": "array",
            "description": "The last attempts and replays, the oldest first.",
            "items": _reference("HistoryEntry"),
        },
        waiting={
            **_object(
                ["reason"],
                reason={**_STRING, "description": "For people to read."},
                until={**_TIME, "description": "When it is tried again, where that is known."},
            ),
            "description": "What a queued event waits for: the homeserver, its account, an invitation, older events.",
        },
    ),
    "HistoryEntry": _object(
        ["time"],
        time=_TIME,
        milliseconds={"type": "integer", "minimum": 0, "description": "How long the attempt took."},
        status={"type": "integer", "description": "The homeserver's answer to the attempt."},
        errcode=_STRING,
        error=_STRING,
        replayed=_object(
            ["by", "status", "txn_id", "accepted_at"],
            by={**_STRING, "description": "A user id, `key:` and a key's id, or `cli:` and a name."},
            status={"enum": ["sent", "dead"], "description": "What it was before."},
            event_id=_STRING,
            txn_id=_STRING,
            accepted_at=_TIME,
        ),
    ),
    "Schemas": _object(
        ["event_types"],
        event_types={
            "type": "array",
            "items": _object(
                ["type", "name", "state", "schema"],
                type=_STRING,
                name=_STRING,
                description=_STRING,
                state={"type": "boolean", "description": "Whether it is a state event."},
                state_key={"type": "object", "description": "A JSON Schema of the state key."},
                required={"type": "array", "items": _STRING},
                schema={**_STRING, "description": "Where its JSON Schema is."},
                msgtypes={"type": "array", "items": {"type": "object"}},
            ),
        },
    ),
    "Valid": _object(
        ["valid", "type", "content"],
        valid={"const": True},
        type=_STRING,
        content={"type": "object", "description": "As it would be sent."},
        state_key=_STRING,
    ),
    "Health": _object(["status", "version"], status={"const": "ok"}, version=_STRING),
    "Ready": _object(
        ["ready", "homeserver", "bot"],
        ready={"const": True},
        homeserver={**_STRING, "description": "Its address."},
        bot={"type": ["string", "null"], "description": "The bot account's user id."},
        queued={"type": "integer", "description": "Events that wait to be sent."},
        accounts_paused={"type": "integer", "description": "Accounts whose token is not accepted: their events wait."},
    ),
}
