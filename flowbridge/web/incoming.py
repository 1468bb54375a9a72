"""What a request brings beside its path: a JSON object, and query parameters, as a homeserver can bear them.

Synapse answers 500 to values of the wrong type, to NUL, to lone surrogates and to numbers like 1e400 (contract §4, 14).
So a body is read strictly, looked at, and written anew.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request

from flowbridge.errors import BadContent, Problem
from flowbridge.events import canonical_json
from flowbridge.homeserver import identifiers
from flowbridge.web.endpoint import read_body

Shape = tuple[str, Callable[[Any], bool]]  # in words, and as a test

RULE = "body"  # what Problem.schema says for the shapes


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


TEXT: Shape = ("a string", lambda value: isinstance(value, str))
FLAG: Shape = ("true or false", lambda value: isinstance(value, bool))
OBJECT: Shape = ("an object", lambda value: isinstance(value, dict))
TEXTS: Shape = ("a list of strings", _list_of(TEXT[1]))


def record(required: Mapping[str, Shape], optional: Mapping[str, Shape]) -> Shape:
    """An object that has these keys, and perhaps those."""
    shapes = {**required, **optional}

    def fits(value: Any) -> bool:
        return isinstance(value, dict) and required.keys() <= value.keys() and not misfits(value, shapes)

    keys = [f"`{key}`{'' if key in required else '?'}: {words}" for key, (words, _) in shapes.items()]
    return f"an object with {', '.join(keys)}", fits


def records(required: Mapping[str, Shape], optional: Mapping[str, Shape]) -> Shape:
    """A list of such objects."""
    words, fits = record(required, optional)
    return f"a list, each item {words}", _list_of(fits)


async def read_object(request: Request, headers: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The JSON object of a body; nothing and `null` are an empty one. Content-Type is not looked at.

    `shapes`: what these keys hold; null under one of them means that it is not there.
    Raises NotJson, BadContent with every problem, TooLarge, UnsupportedMedia.
    """
    body = await read_body(request, headers)
    if not body.strip():
        return {}
    document = canonical_json.read(body)
    value = {} if document.value is None else document.value
    if not isinstance(value, dict):
        raise BadContent([Problem("", "must be a JSON object", canonical_json.RULE)])
    found = {key: item for key, item in value.items() if item is not None or key not in shapes}
    problems = [] if document.clean else canonical_json.problems(value)
    if b"\\u0000" in body:
        problems += _nuls(value, "")
    if problems := problems or misfits(found, shapes):
        raise BadContent(problems)
    return found


def misfits(found: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[Problem]:
    """The keys that hold something else than they should."""
    return [
        Problem(canonical_json.pointer("", key), f"must be {words}", RULE)
        for key, (words, fits) in shapes.items()
        if key in found and not fits(found[key])
    ]


def query_of(request: Request, *names: str) -> str:
    """`?` and those query parameters that are passed on, as often as they are there; blank ones are not.

    Raises BadRequest for a value that no homeserver could read.
    """
    query = request.scope["query_string"].decode("utf-8", "surrogateescape")
    found = [
        (name, identifiers.identifier(value, name))
        for name, value in parse_qsl(query, errors="surrogateescape")
        if name in names
    ]
    return f"?{urlencode(found)}" if found else ""


def _nuls(value: Any, at: str) -> Iterator[Problem]:
    if isinstance(value, str) and "\0" in value:
        yield Problem(at, "holds a NUL character, which homeservers cannot store", canonical_json.RULE)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nuls(item, canonical_json.pointer(at, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\0" in key:
                yield Problem(canonical_json.pointer(at, key), "has a NUL character in its name", canonical_json.RULE)
            yield from _nuls(item, canonical_json.pointer(at, key))
