"""Moves what an OpenAPI document repeats to its `components`, and refers to it instead. Pure.

FastAPI writes the responses, parameters and examples of each operation in full: two thirds of 787 KB were repeats.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

Json = dict[str, Any]
Place = tuple[Any, Any, str]  # a dict or a list, a key or an index, and the name of a component; "" stays where it is

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")  # what the name of a component may not hold


def share(document: Json) -> None:
    """Move repeats into components: examples first, since bodies hold them."""
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    examples = [media["examples"] for operation in operations for media in _media(operation) if "examples" in media]
    bodies = [operation for operation in operations if "requestBody" in operation]
    parameters = [operation["parameters"] for operation in operations if "parameters" in operation]
    responses = [operation["responses"] for operation in operations]
    _move(document, "examples", ((found, name, name) for found in examples for name in found))
    _move(document, "requestBodies", ((found, "requestBody", _body(found["requestBody"])) for found in bodies))
    _move(document, "responses", ((found, status, _status(status)) for found in responses for status in found))
    _move(
        document,
        "parameters",
        ((found, index, each["name"]) for found in parameters for index, each in enumerate(found)),
    )


def _move(document: Json, kind: str, places: Iterable[Place]) -> None:
    """Replace each value that is at several places by a reference."""
    found = [(holder, key, name, json.dumps(holder[key], sort_keys=True)) for holder, key, name in places]
    number = Counter(text for *_, text in found)
    names: dict[str, str] = {}
    components = document["components"].setdefault(kind, {})
    for holder, key, name, text in found:
        if number[text] == 1 or not name:
            continue
        if text not in names:
            names[text] = _free(components, _NO_NAME.sub("-", name))
            components[names[text]] = holder[key]
        holder[key] = {"$ref": f"#/components/{kind}/{names[text]}"}
    if not components:
        del document["components"][kind]


def _media(operation: Json) -> Iterator[Json]:
    for holder in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from holder.get("content", {}).values()


def _body(body: Json) -> str:
    """By its schema, if that has a name."""
    references = [kind.get("schema", {}).get("$ref", "") for kind in body["content"].values()]
    return next((name for each in references if (name := each.rpartition("/")[2])), "")


def _status(code: str) -> str:
    """Errors are the same everywhere; a success is what an operation is about, and is read beside it."""
    return HTTPStatus(int(code)).phrase.replace(" ", "") if int(code) >= HTTPStatus.BAD_REQUEST else ""


def _free(taken: Json, name: str) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}{number}"
    return found
