"""JSON bodies of typed endpoints: read strictly, checked against a TypedDict, passed on as they came.

Synapse answers 500 to values of the wrong type, to NUL, to lone surrogates and to numbers like 1e400 (contract §4, 14).
A TypedDict says what the known keys hold, and allows any others: they belong to the homeserver.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import ConfigDict, FailFast, TypeAdapter, ValidationError, with_config
from starlette.requests import Request

from flowbridge.errors import BadContent, NotJson, Problem
from flowbridge.events import canonical_json
from flowbridge.web.endpoint import headers_of, read_body

T = TypeVar("T")

RULE = "body"  # what Problem.schema says for a wrong type

Texts = Annotated[list[str], FailFast()]  # the first problem only: a body has room for 100,000

_SENTENCES = {
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "missing": "is required",
    "string_unicode": "is not UTF-8",
}


def matrix_object(example: dict[str, Any] | None = None) -> Callable[[type[T]], type[T]]:
    """A TypedDict as Matrix has objects: further keys are kept, and `1` is not `true`. `example`: for the document."""
    return with_config(
        ConfigDict(extra="allow", strict=True, json_schema_extra={"examples": [example]} if example else None)
    )


class JsonBody:
    """A dependency: the JSON object of a body. Nothing and `null` are an empty one; Content-Type is not looked at.

    A key of `shape` that holds null counts as absent. Raises NotJson, BadContent with every problem, TooLarge,
    UnsupportedMedia.
    """

    def __init__(self, shape: Any) -> None:
        self.shape = shape
        self._keys = shape.__annotations__.keys()

    @cached_property
    def _adapter(self) -> TypeAdapter[dict[str, Any]]:
        return TypeAdapter(self.shape)

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, headers_of(request))
        if not body.strip():
            return {}
        document = canonical_json.read(body)
        value = {} if document.value is None else document.value
        if not isinstance(value, dict):
            raise BadContent([Problem("", "must be a JSON object", canonical_json.RULE)])
        problems = [] if document.clean else canonical_json.problems(value)
        if b"\\u0000" in body:
            problems += islice(_nuls(value, ""), canonical_json.MAX_REPORTED)
        if problems:
            raise BadContent(problems)
        try:
            return self._adapter.validate_python(
                {key: item for key, item in value.items() if item is not None or key not in self._keys}
            )
        except ValidationError as error:
            raise BadContent([_problem(each) for each in error.errors()]) from None


class ForeignBody(JsonBody):
    """The same of an object that the use case itself checks, and whose JSON need not be Matrix': a webhook's is in it.

    Raises NotJson, BadContent, TooLarge, UnsupportedMedia.
    """

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, headers_of(request))
        if not body.strip():
            return {}
        if body.count(b"[") + body.count(b"{") > canonical_json.MAX_DEPTH:
            canonical_json.read(body)  # which says how deep, or what else is wrong
        try:
            value = json.loads(body.decode("utf-8-sig"), parse_constant=_not_json)
        except (ValueError, RecursionError) as error:
            canonical_json.read(body)
            raise NotJson(f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadContent([Problem("", "must be a JSON object", canonical_json.RULE)])
        return value


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def sentence(error: Mapping[str, Any]) -> str:
    """What pydantic found, said as our other errors are."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return _SENTENCES.get(error["type"]) or str(error["msg"]).replace("Input should be", "must be")


def _problem(error: Mapping[str, Any]) -> Problem:
    at = ""
    for step in error["loc"]:
        at = canonical_json.pointer(at, step)
    return Problem(at, sentence(error), RULE)


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
