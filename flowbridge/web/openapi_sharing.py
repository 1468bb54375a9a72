"""What an OpenAPI document says more than once, said once: under `components`, and named wherever it is meant. Pure.

FastAPI writes the answers, parameters and examples of each operation out: of 787 KB two thirds were repeats.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

Json = dict[str, Any]

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")  # what the name of a component may not hold


def share(document: Json) -> None:
    """Move repeats into components: examples first, since bodies hold them."""
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    media = [kind for operation in operations for kind in _media(operation)]
    _move(document, "examples", [kind["examples"] for kind in media if "examples" in kind], str)
    _move(document, "requestBodies", [each for each in operations if "requestBody" in each], _body, only="requestBody")
    _move(document, "responses", [operation["responses"] for operation in operations], _status)
    _move(document, "parameters", [_Places(each["parameters"]) for each in operations if "parameters" in each], _first)


class _Places(dict[str, Any]):
    """The parameters of an operation by their names, and the list that they lie in."""

    def __init__(self, listed: list[Json]) -> None:
        super().__init__((f"{each['name']} {each['in']}", each) for each in listed)
        self._listed = listed
        self._at = {name: index for index, name in enumerate(self)}

    def __setitem__(self, name: str, value: Json) -> None:
        super().__setitem__(name, value)
        self._listed[self._at[name]] = value


def _move(
    document: Json, kind: str, holders: list[Json], named: Callable[[Any], str], *, only: str | None = None
) -> None:
    """Replace each value that several holders have by a reference.

    `named`: what it is called, from its key (of `only` one key: from its value); "" where it stays as it is.
    """
    found = [(holder, key, _text(holder[key])) for holder in holders for key in holder if only in (None, key)]
    number = Counter(text for *_, text in found)
    names: dict[str, str] = {}
    components = document["components"].setdefault(kind, {})
    for holder, key, text in found:
        name = named(holder[key] if only else key)
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


def _first(name: str) -> str:
    return name.partition(" ")[0]


def _free(taken: Json, name: str) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}{number}"
    return found


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)
