"""Typed endpoints: FastAPI solves their dependencies, validates what comes, and documents them.

They hang in one tree of raw paths with the raw endpoints (middleware.py), so that `%2F`, 404, 405 and HEAD are the same
for both. Typed endpoints take 15 to 30 µs more of the event loop than raw ones: that matters for a send alone.

What operations have in common follows from their dependencies: who may call them, the errors that they answer, the
query parameters that they know. A raw endpoint does by hand what its dependencies say; they are its documentation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from inspect import cleandoc
from typing import Any, TypeVar

from fastapi import Depends
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body, Query
from fastapi.routing import APIRoute
from fastapi.utils import create_model_field
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import is_typeddict

from flowbridge.errors import BadRequest
from flowbridge.models import Surface
from flowbridge.web import parameters
from flowbridge.web.body import JsonBody, sentence
from flowbridge.web.dependencies import credential
from flowbridge.web.endpoint import Handler

F = TypeVar("F", bound=Callable[..., Any])
Json = dict[str, Any]

DIALECTS = ("v3", "r0", "v1", "api/v1", "unstable")  # of the Matrix surface: v3 is documented
MATRIX = "/_matrix/client/"
TAGS: dict[Surface, str] = {"flow": "Flow surface", "matrix": "Matrix surface"}

UPSTREAM = (400, 401, 403, 429, 500, 502, 503, 504)  # of what the homeserver is asked, or a credential is needed
BODY = (400, 408, 413, 415)
ERRORS = {
    400: "The request is malformed, or the payload breaks its schema: `flowbridge.problems` lists every problem.",
    401: "No token or key, or one that is not accepted.",
    403: "The account may not do this in the room.",
    404: "There is no such room, event, delivery or path.",
    405: "The path is known, but not with this method.",
    408: "The body did not arrive in time.",
    409: "The delivery is queued, or being sent, or its replay would overwrite newer state.",
    413: "The body or the event is too large.",
    415: "The body is a form, multipart, XML or compressed.",
    422: "This `Idempotency-Key` was used before, with other content.",
    429: "The homeserver, or a bound of the bridge that this caller has its share of, asks to wait `retry_after_ms`.",
    500: "The homeserver failed.",
    502: "The homeserver is away, or what answers is not a homeserver.",
    503: "Not at the moment; `Retry-After` says when: the store is full or away, it is not known whose token this is, "
    "or (`M_LIMIT_EXCEEDED`) the caller has its share of the store.",
    504: "The homeserver did not answer in time.",
}
_UNCHANGED = {"description": "`If-None-Match` names the ETag of what would be answered."}


class Route:
    """An endpoint, and where it is served. Its operation is made when it is asked for.

    FastAPI takes 1.5 ms for each: all of them took a quarter of the processor time of a start, and most bridges serve
    a few, and their document to no one. `paths`: the first is documented. `lenient`: unknown query parameters are
    ignored on the flow surface, too. `sends`: what it refuses is in the delivery log. `documentation`: see Operation.
    """

    def __init__(
        self,
        method: str,
        paths: Sequence[str],
        endpoint: Callable[..., Any],
        operation: str,
        *,
        lenient: bool = False,
        sends: bool = False,
        **documentation: Any,
    ) -> None:
        self.method = method
        self.paths, self.path = paths, paths[0]
        self.endpoint = endpoint
        self.operation_id = operation
        self.sends = sends
        self._documentation = documentation
        is_strict = not lenient and not self.path.startswith(("/_matrix/", "/.well-known/"))
        handler = self._handler()
        self.handler: Handler = parameters.only(self._query_names, handler) if is_strict else handler

    @cached_property
    def operation(self) -> "Operation":
        return Operation(self.method, self.path, self.endpoint, self.operation_id, **self._documentation)

    def _handler(self) -> Handler:
        return lambda request: self.operation.solve(request)

    def _query_names(self) -> frozenset[str]:
        return self.operation.query_names


class RawRoute(Route):
    """An endpoint that takes the request as it came: a send, or a file, can afford no more."""

    def _handler(self) -> Handler:
        return self.endpoint


class Operation(APIRoute):
    """One operation of the OpenAPI document. The endpoint's docstring is its summary and, below it, its description.

    `answers`: the type of a success; it is not enforced, since the homeserver's answers pass as they came. `ok`: what a
    success is, else the type's docstring says it. `body`: the type of one that a raw handler reads. `errors`: those
    that do not follow from the dependencies. `uses`: dependencies without a value. `kept`: answers have an ETag.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Any],
        operation: str,
        *,
        tag: str,
        answers: Any = None,
        body: Any = None,
        ok: str = "",
        status: int = 200,
        errors: Iterable[int] = (),
        kept: bool = False,
        response_class: type[Response] = JSONResponse,
        uses: Sequence[Callable[..., Any]] = (),
        documented: bool = True,
        extra: Json | None = None,
    ) -> None:
        summary, _, description = cleandoc(endpoint.__doc__ or "").partition("\n")
        super().__init__(
            path,
            endpoint,
            methods=[method],
            operation_id=operation,
            summary=summary.removesuffix("."),
            description=description or "\f",  # else FastAPI takes the whole docstring, up to a \f
            tags=[tag],
            dependencies=[Depends(use) for use in uses],
            response_model=answers,
            response_class=response_class,
            response_description=ok or (is_typeddict(answers) and answers.__doc__) or "Success.",
            status_code=status,
            include_in_schema=documented,
        )
        self._solved = self.get_route_handler()
        calls, self.openapi_extra = _calls(self.dependant), dict(extra or {})
        # Set after the handler was made: FastAPI would read the body before it solves any dependency.
        if body is not None:
            self.body_field = create_model_field("body", body, field_info=Body(annotation=body))
        elif json_body := next((call for call in calls if isinstance(call, JsonBody)), None):
            shape, errors = json_body.shape, (*errors, *BODY)
            self.body_field = create_model_field("body", shape, field_info=Body(None, annotation=shape))
            self.openapi_extra["requestBody"] = {
                "description": "May be empty, or `null`. Content-Type is not looked at."
            }
        statuses = {404, 405, *errors, *(UPSTREAM if credential in calls else ())}
        self.responses = {status: error_response(status) for status in sorted(statuses)}
        if kept:
            self.responses[304] = _UNCHANGED
        if credential not in calls:
            self.openapi_extra["security"] = []
        self.query_names = _query_names(self.dependant)

    async def solve(self, request: Request) -> Response:
        async with AsyncExitStack() as stack:  # for dependencies that yield; the names are FastAPI's
            for name in ("fastapi_middleware_astack", "fastapi_inner_astack", "fastapi_function_astack"):
                request.scope[name] = stack
            try:
                return await self._solved(_Request(request.scope, request.receive))
            except RequestValidationError as error:
                raise _refusal(error.errors()) from None


class Routes(list[Route]):
    """The endpoints of a file, registered by decorators, which leave the function as it is."""

    def __init__(self, tag: str = "") -> None:
        """`tag`: their section of the document; without it each surface has its own."""
        super().__init__()
        self._tag = tag

    def flow(self, method: str, path: str, operation: str, **more: Any) -> Callable[[F], F]:
        return self._on("flow", method, path, operation, **more)

    def matrix(self, method: str, path: str, operation: str, **more: Any) -> Callable[[F], F]:
        return self._on("matrix", method, path, operation, **more)

    def both(self, method: str, path: str, operation: str, **more: Any) -> Callable[[F], F]:
        """On both surfaces: the operations are `flow_` and `matrix_` and this name."""
        flow = self.flow(method, path, f"flow_{operation}", **more)
        matrix = self.matrix(method, path, f"matrix_{operation}", **more)
        return lambda endpoint: flow(matrix(endpoint))

    def _on(
        self, surface: Surface, method: str, path: str, operation: str, *, tag: str = "", **more: Any
    ) -> Callable[[F], F]:
        def register(endpoint: F) -> F:
            tag_ = tag or self._tag or TAGS[surface]
            self.append(Route(method, served(surface, path), endpoint, operation, tag=tag_, **more))
            return endpoint

        return register


def served(surface: Surface, path: str) -> tuple[str, ...]:
    """The paths below which a surface serves this one; the first is documented."""
    return (path,) if surface == "flow" else tuple(f"{MATRIX}{dialect}{path}" for dialect in DIALECTS)


class _Request(Request):
    """A request whose query is read as ours are: a blank value is absent, the access token is not among them."""

    @cached_property
    def query_params(self) -> QueryParams:
        return QueryParams(parameters.given(self.scope["query_string"]))


def header(description: str, **schema: Any) -> Json:
    """A header of a response."""
    return {"description": description, "schema": {"type": "string", **schema}}


def error_response(status: int) -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/MatrixError"}}}
    return {"description": ERRORS[status], "content": content}


def _query_names(dependant: Dependant) -> frozenset[str]:
    fields = get_flat_params(dependant)
    return frozenset(field.alias for field in fields if isinstance(field.field_info, Query))


def _calls(dependant: Dependant) -> list[Any]:
    """All dependencies, at any depth."""
    return [call for each in dependant.dependencies for call in (each.call, *_calls(each))]


def _refusal(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """What is wrong with the query parameters."""
    return BadRequest("; ".join(f"{error['loc'][-1]}: {sentence(error)}" for error in errors))
