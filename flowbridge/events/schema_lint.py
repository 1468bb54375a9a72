"""What a schema file must look like, checked when it is loaded: a bad one stops the start, not a request."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

MAX_UNIQUE_ITEMS = 1_000

_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")

# A repeated group that itself repeats, as in ^(a+)+$, takes a backtracking engine minutes on 30 characters.
_NESTED_REPEAT = re.compile(r"\((?:[^()\\]|\\.)*[+*}](?:[^()\\]|\\.)*\)[+*{]")


class SchemaError(Exception):
    """A schema file that cannot be used; the message names the file and says why in one line."""


def lint(path: Path, schema: Any, *, is_event: bool) -> dict[str, Any]:
    """Returns the schema. Raises SchemaError with all problems in one line."""
    found = list(_complaints(schema, is_event))
    if found:
        raise SchemaError(f"{path}: {'; '.join(found)}")
    assert isinstance(schema, dict)
    return schema


def lint_references(name: str, documents: Mapping[str, Any]) -> None:
    """Raises SchemaError when a document refers to a missing file, or back to itself in an endless circle.

    A circle is endless when all of its keywords apply to the same value (`allOf`, `$ref`, `if`, …).
    """
    for part in _subschemas(documents[name]):
        file = _file(name, part)
        if file is not None and file not in documents:
            raise SchemaError(f"{name}.json: $ref {json.dumps(part['$ref'])} leads to no file")
    _descend(name, documents[name], documents, [name])


def _descend(name: str, schema: Any, documents: Mapping[str, Any], trail: list[str]) -> None:
    if not isinstance(schema, dict):
        return
    file = _file(name, schema)
    if file is None and schema.get("$ref") == "#":
        file = name
    if file is not None:
        if file in trail:
            raise SchemaError(f"{trail[0]}.json: $ref {json.dumps(schema['$ref'])} leads in a circle")
        _descend(file, documents.get(file), documents, [*trail, file])
    for keyword in _IN_PLACE:
        value = schema.get(keyword)
        for part in value if isinstance(value, list) else [value]:
            _descend(name, part, documents, trail)


def _file(name: str, schema: Mapping[str, Any]) -> str | None:
    """The document that a `$ref` leads to; None when there is none, or it stays inside its own."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or reference.startswith("#"):
        return None
    return urljoin(f"/{name}.json", reference.partition("#")[0]).removeprefix("/").removesuffix(".json")


def _complaints(schema: Any, is_event: bool) -> Iterator[str]:
    if not isinstance(schema, dict):
        yield "a schema file holds one JSON object"
        return
    if is_event:
        yield from _annotations(schema)
    for part in _subschemas(schema):
        yield from _costs(part)


def _annotations(schema: dict[str, Any]) -> Iterator[str]:
    if schema.get("x-kind") not in ("message", "state"):
        yield 'x-kind must be "message" or "state"'
    if schema.get("x-kind") == "state" and not isinstance(schema.get("x-state-key"), dict):
        yield 'a state event says in x-state-key which state key it takes, e.g. {"const": ""}'


def _costs(part: dict[str, Any]) -> Iterator[str]:
    most = part.get("maxItems")
    if part.get("uniqueItems") is True and not (isinstance(most, int) and most <= MAX_UNIQUE_ITEMS):
        yield f"uniqueItems needs maxItems of at most {MAX_UNIQUE_ITEMS}: comparing all pairs takes seconds beyond"
    limit = part.get("x-max-bytes")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        yield f"x-max-bytes is a number of bytes, not {json.dumps(limit)}"
    by_name = part.get("patternProperties")
    for pattern in (part.get("pattern"), *(by_name if isinstance(by_name, dict) else ())):
        if isinstance(pattern, str) and _NESTED_REPEAT.search(pattern):
            yield f"the pattern {pattern!r} repeats a repeated group, which can take minutes: write it without"
    for keyword in ("$ref", "$dynamicRef"):
        reference = part.get(keyword)
        if isinstance(reference, str) and re.match(r"[a-z][a-z0-9+.-]*:|//", reference, re.IGNORECASE):
            yield f"{keyword} {json.dumps(reference)} leaves the folder: refer to a file beside it"


def _subschemas(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _subschemas(item)
    elif isinstance(value, list):
        for item in value:
            yield from _subschemas(item)
