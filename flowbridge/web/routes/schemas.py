"""The catalogue, served: event types, their schemas, and a dry run."""

from functools import partial
from typing import Annotated, Any, Literal, NotRequired

from fastapi import Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.errors import Errcode, NotFound
from flowbridge.events import Catalogue, Entry
from flowbridge.homeserver import identifiers
from flowbridge.web.dependencies import EventType, TheCore, segment
from flowbridge.web.document import Document
from flowbridge.web.endpoint import headers_of, json_answer, json_bytes, read_body
from flowbridge.web.routes.deliveries import Remarks
from flowbridge.web.routes.send import FLOW_BODY
from flowbridge.web.routing import BODY, Routes

Json = dict[str, Any]


class Summary(TypedDict):
    type: str
    name: str
    description: NotRequired[str]
    state: Annotated[bool, Field(description="Whether it is a state event.")]
    state_key: NotRequired[Annotated[Json, Field(description="A JSON Schema of the state key.")]]
    required: NotRequired[list[str]]
    schema: Annotated[str, Field(description="Where its JSON Schema is.")]
    msgtypes: NotRequired[list[Json]]


class Schemas(TypedDict):
    """All event types by name."""

    event_types: list[Summary]


class Valid(TypedDict):
    valid: Literal[True]
    type: str
    content: Annotated[Json, Field(description="As it would be sent.")]
    state_key: NotRequired[str]
    flowbridge: NotRequired[Remarks]


class Published:
    """The catalogue's documents, as they are served."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.index = Document(lambda: json_bytes({"event_types": _summaries(catalogue)}), "application/json")
        self._documents = {
            name: Document(partial(json_bytes, schema), "application/json")
            for name, schema in catalogue.documents.items()
        }

    async def answer(self, request: Request, name: str, what: str = "schema for") -> Response:
        document = self._documents.get(name)
        if document is None:
            raise NotFound(f"there is no {what} {name.removeprefix('components/')!r}", errcode=Errcode.NOT_FOUND)
        return await document.answer(request)


async def published(request: Request) -> Published:
    found: Published = request.app.published
    return found


async def schema_name(
    raw: Annotated[str, segment("eventType", "The event type, e.g. one of `GET /schemas`.", "m.room.message")],
) -> str:
    return identifiers.segment(raw, "event type").removesuffix(".json")


async def component_name(raw: Annotated[str, segment("name", "The component's file name.", "image_info.json")]) -> str:
    return identifiers.segment(raw, "component").removesuffix(".json")


Documents = Annotated[Published, Depends(published)]
routes = Routes("Catalogue")


@routes.flow("GET", "/schemas", "schemas", kept=True, answers=Schemas)
async def index(request: Request, documents: Documents) -> Response:
    """The event types that flowbridge knows"""
    return await documents.index.answer(request)


@routes.flow(
    "GET", "/schemas/{eventType}", "schema", kept=True, errors=[400], answers=Json, ok="A JSON Schema 2020-12."
)
async def show(request: Request, documents: Documents, name: Annotated[str, Depends(schema_name)]) -> Response:
    """The JSON Schema of an event type

    Also of one msgtype: `m.room.message$m.image`. A relative `$ref` leads to `/schemas/…`.
    """
    return await documents.answer(request, name)


@routes.flow(
    "GET",
    "/schemas/components/{name}",
    "schemaComponent",
    kept=True,
    errors=[400],
    answers=Json,
    ok="A JSON Schema 2020-12.",
)
async def component(request: Request, documents: Documents, name: Annotated[str, Depends(component_name)]) -> Response:
    """A part that schemas share"""
    return await documents.answer(request, f"components/{name}", "schema component")


@routes.flow(
    "POST",
    "/validate/{eventType}",
    "validate",
    errors=(*BODY, 429, 503),
    answers=Valid,
    extra={"requestBody": FLOW_BODY},
)
async def validate(request: Request, core: TheCore, event_type: EventType) -> Response:
    """Try a payload without sending it

    Answers what would be sent, or the error that a send would get. Needs no token.
    """
    headers = headers_of(request)
    body = await read_body(request, headers)
    found = await core.acceptance.receive(body, headers.get("content-type", ""), event_type, "flow")
    event = await core.acceptance.check("", event_type, found, as_state=False)
    answer: Json = {"valid": True, "type": event_type, "content": found.content}
    if event.state_key is not None:
        answer["state_key"] = event.state_key
    if found.ignored:
        answer["flowbridge"] = {"ignored": found.ignored}
    return json_answer(answer)


def _summaries(catalogue: Catalogue) -> list[Json]:
    """One for each event type; its msgtypes are in it."""
    found = []
    for name in catalogue:
        if "$" in name:
            continue
        entry = catalogue[name]
        summary: Json = {"type": name, **_about(entry), "state": entry.kind == "state"}
        if entry.kind == "state":
            summary["state_key"] = entry.schema["x-state-key"]
        if msgtypes := [other for other in catalogue if other.startswith(f"{name}$")]:
            summary["msgtypes"] = [
                {"msgtype": other.partition("$")[2], **_about(catalogue[other])} for other in msgtypes
            ]
        found.append(summary)
    return found


def _about(entry: Entry) -> Json:
    return {
        "name": entry.name,
        "description": entry.schema.get("description", ""),
        "required": sorted(entry.required),
        "schema": f"/schemas/{entry.name.replace('$', '%24')}",
    }
