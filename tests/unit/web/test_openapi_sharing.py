"""flowbridge.web.openapi_sharing: a document with its repeats under components says what it said before."""

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flowbridge.web.openapi_sharing import share

Json = dict[str, Any]

ERROR: Json = {
    "description": "No.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
GONE: Json = {"description": "Gone."}
OK: Json = {"description": "It is done."}
LIMIT: Json = {"name": "limit", "in": "query", "schema": {"type": "integer"}}
ROOM: Json = {"name": "roomId", "in": "path", "schema": {"type": "string"}}
HEADER: Json = {"name": "limit", "in": "header", "schema": {"type": "string"}}
EXAMPLE: Json = {"value": {"msgtype": "m.text", "body": "hello"}}
BODY: Json = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}, "examples": {"a $b": EXAMPLE}}}
}
NAMELESS: Json = {"content": {"text/plain": {"schema": {"type": "string"}}}}

responses = st.dictionaries(st.sampled_from(["400", "404", "503"]), st.sampled_from([ERROR, GONE]))
operations = st.fixed_dictionaries(
    {"responses": responses.map(lambda errors: {"200": OK, **errors})},
    optional={
        "parameters": st.lists(st.sampled_from([LIMIT, ROOM, HEADER]), unique_by=json.dumps),
        "requestBody": st.sampled_from([BODY, NAMELESS]),
    },
)


def document_of(*found: Json) -> Json:
    paths = {f"/{number}": {"get": copy.deepcopy(operation)} for number, operation in enumerate(found)}
    return {"paths": paths, "components": {"schemas": {"Error": {}, "Body": {}}}}


def resolved(value: Any, document: Json) -> Any:
    """As it reads with all references of ours followed."""
    if isinstance(value, dict):
        reference = value.get("$ref", "")
        if reference and not reference.startswith("#/components/schemas/"):
            _, _, kind, name = reference.split("/")
            return resolved(document["components"][kind][name], document)
        return {key: resolved(item, document) for key, item in value.items()}
    return [resolved(item, document) for item in value] if isinstance(value, list) else value


@given(st.lists(operations, max_size=6))
def test_it_says_what_it_said(found: list[Json]) -> None:
    document = document_of(*found)
    before = copy.deepcopy(document["paths"])
    share(document)
    assert resolved(document["paths"], document) == before


@given(st.lists(operations, max_size=6))
def test_no_component_is_empty_or_unused(found: list[Json]) -> None:
    document = document_of(*found)
    share(document)
    text = json.dumps(document)
    for kind, components in document["components"].items():
        assert components, kind
        if kind != "schemas":
            for name in components:
                assert f'"#/components/{kind}/{name}"' in text, name


def test_repeats_have_names_that_openapi_allows() -> None:
    operation = {"responses": {"200": OK, "404": ERROR}, "parameters": [LIMIT, HEADER], "requestBody": BODY}
    document = document_of(operation, operation)
    share(document)
    components = document["components"]
    assert components["responses"] == {"NotFound": ERROR}
    assert components["parameters"] == {"limit": LIMIT, "limit2": HEADER}
    assert list(components["requestBodies"]) == ["Body"]
    assert components["examples"] == {"a-b": EXAMPLE}
    first = document["paths"]["/0"]["get"]
    assert first["parameters"] == [
        {"$ref": "#/components/parameters/limit"},
        {"$ref": "#/components/parameters/limit2"},
    ]
    assert first["responses"] == {"200": OK, "404": {"$ref": "#/components/responses/NotFound"}}


def test_what_is_said_once_stays_where_it_is() -> None:
    operation = {"responses": {"200": OK, "404": ERROR}, "parameters": [LIMIT], "requestBody": NAMELESS}
    document = document_of(operation)
    share(document)
    assert document == document_of(operation)
