"""The catalogue, served: event types, their schemas, and a dry run."""

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.errors import Errcode, NotFound
from flowbridge.events import Catalogue, Entry
from flowbridge.homeserver import identifiers
from flowbridge.services.acceptance import Acceptance
from flowbridge.web import describe
from flowbridge.web.document import Document
from flowbridge.web.endpoint import Endpoint, endpoint, headers_of, json_answer, json_bytes, read_body


class Schemas:
    def __init__(self, catalogue: Catalogue, acceptance: Acceptance) -> None:
        self._catalogue = catalogue
        self._acceptance = acceptance
        self._index = Document(self._all, "application/json")
        self._documents = {
            name: Document(partial(json_bytes, schema), "application/json")
            for name, schema in catalogue.documents.items()
        }

    async def index(self, request: Request) -> Response:
        """GET /schemas"""
        return await self._index.answer(request)

    async def show(self, request: Request) -> Response:
        """GET /schemas/{eventType}: also `m.room.message$m.image` and `components/…`, as `$ref`s name them."""
        name = identifiers.segment(request.path_params["eventType"], "event type").removesuffix(".json")
        document = self._documents.get(name)
        if document is None:
            raise NotFound(f"there is no schema for {name!r}", errcode=Errcode.NOT_FOUND)
        return await document.answer(request)

    async def component(self, request: Request) -> Response:
        """GET /schemas/components/{name}: what the schemas share, so that a relative `$ref` can be followed."""
        name = identifiers.segment(request.path_params["name"], "component").removesuffix(".json")
        document = self._documents.get(f"components/{name}")
        if document is None:
            raise NotFound(f"there is no schema component {name!r}", errcode=Errcode.NOT_FOUND)
        return await document.answer(request)

    async def validate(self, request: Request) -> Response:
        """POST /validate/{eventType}: what a send would do, without sending, and without a token."""
        event_type = identifiers.event_type(request.path_params["eventType"])
        headers = headers_of(request)
        body = await read_body(request, headers)
        found = await self._acceptance.receive(body, headers.get("content-type", ""), event_type, "flow")
        event = await self._acceptance.check("", event_type, found, as_state=False)
        answer: dict[str, Any] = {"valid": True, "type": event_type, "content": found.content}
        if event.state_key is not None:
            answer["state_key"] = event.state_key
        return json_answer(answer)

    def _all(self) -> bytes:
        names = [name for name in self._catalogue if "$" not in name]
        return json_bytes({"event_types": [self._summary(name) for name in names]})

    def _summary(self, name: str) -> dict[str, Any]:
        entry = self._catalogue[name]
        summary: dict[str, Any] = {"type": name, **_about(entry), "state": entry.kind == "state"}
        if entry.kind == "state":
            summary["state_key"] = entry.schema["x-state-key"]
        msgtypes = [other for other in self._catalogue if other.startswith(f"{name}$")]
        if msgtypes:
            summary["msgtypes"] = [
                {"msgtype": other.partition("$")[2], **_about(self._catalogue[other])} for other in msgtypes
            ]
        return summary


def _about(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "description": entry.schema.get("description", ""),
        "required": sorted(entry.required),
        "schema": f"/schemas/{entry.name.replace('$', '%24')}",
    }


def routes(catalogue: Catalogue, acceptance: Acceptance) -> list[Endpoint]:
    handlers = Schemas(catalogue, acceptance)
    return [
        endpoint("GET", "/schemas", handlers.index, describe.SCHEMAS),
        endpoint("GET", "/schemas/{eventType}", handlers.show, describe.SCHEMA),
        endpoint("GET", "/schemas/components/{name}", handlers.component, describe.COMPONENT),
        endpoint("POST", "/validate/{eventType}", handlers.validate, describe.VALIDATE),
    ]
