"""flowbridge.web.routing: what an operation answers and knows follows from its dependencies."""

from typing import Annotated, Any

import pytest
from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from flowbridge.errors import BadRequest, Unauthorized
from flowbridge.web.body import JsonBody, matrix_object
from flowbridge.web.dependencies import Caller
from flowbridge.web.routing import BODY, DIALECTS, UPSTREAM, Operation, Route, Routes


@matrix_object()
class Shape(TypedDict, total=False):
    name: str


Body = Annotated[dict[str, Any], Depends(JsonBody(Shape))]
routes = Routes()


@routes.flow("GET", "/open", "open")
async def open_to_all(limit: Annotated[int, Query(le=9)] = 5) -> Response:
    """Anyone may ask.

    As often
    as they like.
    """
    return JSONResponse({"limit": limit})


@routes.both("POST", "/write", "write")
async def write(credential: Caller, body: Body) -> Response:
    """Write"""
    return JSONResponse(body)


def route(operation: str) -> Route:
    return next(each for each in routes if each.operation_id == operation)


def described(operation: str) -> Operation:
    return route(operation).operation


async def call(operation: str, query: bytes = b"", body: bytes = b"", headers: Any = ()) -> Response:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    class App:
        class core:  # noqa: N801
            class callers:  # noqa: N801
                @staticmethod
                async def credential(headers: dict[str, str], query: bytes) -> None:
                    if "authorization" not in headers:
                        raise Unauthorized("who is it?")

    scope = {"type": "http", "query_string": query, "headers": list(headers), "path_params": {}, "app": App}
    return await route(operation).handler(Request({**scope, "method": "GET", "path": "/"}, receive))


def test_errors_follow_from_the_dependencies() -> None:
    assert described("open").responses.keys() == {404, 405}
    assert described("flow_write").responses.keys() == {404, 405, *UPSTREAM, *BODY}
    assert described("open").openapi_extra == {"security": []}


def test_docstring_is_the_documentation() -> None:
    assert (described("open").summary, described("open").description) == ("Anyone may ask", "As often\nas they like.")
    assert described("flow_write").description == ""


def test_both_surfaces_come_from_one_function() -> None:
    flow, matrix = route("flow_write"), route("matrix_write")
    assert flow.endpoint is matrix.endpoint is write
    assert (flow.paths, flow.operation.tags) == (("/write",), ["Flow surface"])
    assert matrix.paths == tuple(f"/_matrix/client/{dialect}/write" for dialect in DIALECTS)
    assert matrix.operation.tags == ["Matrix surface"]


async def test_credential_comes_before_the_body() -> None:
    with pytest.raises(Unauthorized):
        await call("flow_write", body=b"no JSON")
    answer = await call("flow_write", body=b'{"name": "x"}', headers=[(b"authorization", b"Bearer x")])
    assert answer.body == b'{"name":"x"}'


@pytest.mark.parametrize(
    ("query", "limit"), [(b"", 5), (b"limit=", 5), (b"limit=%20", 5), (b"limit=7", 7), (b"access_token=x", 5)]
)
async def test_blank_parameter_is_absent(query: bytes, limit: int) -> None:
    assert (await call("open", query)).body == b'{"limit":%d}' % limit


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (b"limit=10", "limit: must be less than or equal to 9"),
        (b"limit=x", "limit: must be a valid integer, unable to parse string as an integer"),
        (b"other=1", "other: unknown here; known are access_token, limit"),
    ],
)
async def test_wrong_parameter_is_named(query: bytes, error: str) -> None:
    with pytest.raises(BadRequest) as raised:
        await call("open", query)
    assert raised.value.error == error


async def test_matrix_surface_knows_all_parameters() -> None:
    headers = [(b"authorization", b"Bearer x")]
    assert (await call("matrix_write", b"other=1", headers=headers)).body == b"{}"
    with pytest.raises(BadRequest):
        await call("flow_write", b"other=1", headers=headers)
