"""flowbridge.web.body: what a JSON body may be, and how its problems are said."""

import json
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator
from starlette.requests import Request
from typing_extensions import TypedDict

from flowbridge.errors import BadContent
from flowbridge.web.body import JsonBody, Texts, matrix_object


def lower(text: str) -> str:
    if text != text.lower():
        raise ValueError("must be lower case")
    return text


@matrix_object()
class Inner(TypedDict):
    word: Annotated[str, AfterValidator(lower)]


@matrix_object({"name": "x"})
class Outer(TypedDict, total=False):
    name: str
    flag: bool
    words: Texts
    inner: list[Inner]
    anything: dict[str, Any]


async def read(body: bytes) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await JsonBody(Outer)(Request({"type": "http", "headers": []}, receive))


@pytest.mark.parametrize("body", [b"", b" ", b"null", b"{}", b'{"name": null}'])
async def test_nothing_is_an_empty_object(body: bytes) -> None:
    assert await read(body) == {}


async def test_what_is_right_or_unknown_is_kept_as_it_came() -> None:
    given = {"z": [None, {"y": 1}], "name": "n", "inner": [{"word": "w", "more": None}], "anything": {"null": None}}
    found = await read(json.dumps(given).encode())
    assert json.dumps(found, sort_keys=True) == json.dumps(given, sort_keys=True)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"name": 5, "flag": 1}, [("/name", "must be a string"), ("/flag", "must be true or false")]),
        ({"words": "x"}, [("/words", "must be a list")]),
        ({"words": ["x", None, 5]}, [("/words/1", "must be a string")]),
        ({"inner": [5]}, [("/inner/0", "must be an object")]),
        ({"inner": [{}]}, [("/inner/0/word", "is required")]),
        ({"inner": [{"word": "Word"}]}, [("/inner/0/word", "must be lower case")]),
        ({"anything": []}, [("/anything", "must be an object")]),
        ({"a/b": "\0"}, [("/a~1b", "holds a NUL character, which homeservers cannot store")]),
    ],
)
async def test_problems_have_pointers_and_sentences(given: Any, problems: list[tuple[str, str]]) -> None:
    with pytest.raises(BadContent) as raised:
        await read(json.dumps(given).encode())
    assert [(problem.pointer, problem.message) for problem in raised.value.problems] == problems


@pytest.mark.parametrize("body", [b"5", b"[]", b'"x"', b'{"a": 1e400}', b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}'])
async def test_what_no_homeserver_could_read_is_refused(body: bytes) -> None:
    with pytest.raises(BadContent):
        await read(body)
