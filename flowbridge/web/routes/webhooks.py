"""Requests to hooks, at their own paths and at those of the tools that they stand in for (contract §6).

The handlers are raw: a signature is made of the bytes as they came.
"""

import contextlib
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NotRequired, Protocol
from urllib.parse import quote, unquote

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge import metrics
from flowbridge.bridge import Core
from flowbridge.errors import MatrixError, MethodNotAllowed, TooLarge
from flowbridge.events.shaping import MESSAGE
from flowbridge.hooks import body as bodies
from flowbridge.hooks.admission import identify
from flowbridge.hooks.known import Known
from flowbridge.hooks.receiving import Done
from flowbridge.hooks.signatures import Asked
from flowbridge.hooks.trouble import ours
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models.hooks import Hook
from flowbridge.web.dependencies import segment
from flowbridge.web.endpoint import (
    LOG,
    MAX_BODY_BYTES,
    RECEIPT,
    Handler,
    JsonAnswer,
    error_answer,
    headers_of,
    json_answer,
)
from flowbridge.web.routes.deliveries import LOCATION, Id
from flowbridge.web.routes.send import DELIVERY, prefer, preference
from flowbridge.web.routing import BODY, RawRoute, Route, header

Json = dict[str, Any]
Dialect = Literal["", "slack", "discord"]

TAG = "Hooks"
MAX_LARGE = 4  # bodies of more than 512 KiB at a time, each in memory as a whole; so many of strangers, too
SMALL_BYTES = 64 * 1024  # GitHub's largest usual ones are 30 kB
MAX_OF_STRANGERS = 64  # larger ones that are read before their senders are known: 4,096 connections may hold one each
EACH_STRANGER = 16
TURN_SECONDS = 5.0  # for one of these places: senders hang up after 10
ALLOWED = "POST, PUT, OPTIONS"
ALLOWED_WITHOUT_TOKEN = "GET, POST, PUT, DELETE, OPTIONS"  # noqa: S105 (methods): the hook itself, administered there, too
UNKNOWN = "unknown"  # the source of a request whose sender is not known, in the metrics
ORIGINS = "webhook-request-origin"

_GET = (
    "this is the address of a webhook: what it is told by POST appears in a Matrix room. Nothing is to be seen here. "
    "To try it: curl -d 'hello' and this address"
)


class Taken(TypedDict):
    """It is stored, and will be in the room; or there was nothing to say, and `done` says why."""

    ok: Literal[True]
    delivery_id: NotRequired[Annotated[Id, Field(description="Of its first message.")]]
    done: NotRequired[Annotated[str, Field(examples=["a ping"])]]
    warnings: NotRequired[Annotated[list[str], Field(description="What could not be as it was asked for.")]]


class Begun(Protocol):
    """A request that was admitted, and has failed (web/usual_hook.py)."""

    known: Known
    error: Exception | None


class Webhooks:
    """The handlers."""

    def __init__(self, core: Core) -> None:
        self._admission = core.admission
        self._receiving = core.receiving
        self._wait_seconds = core.settings.wait_seconds
        self._limit = core.settings.max_hook_bytes
        self._aside = core.acceptance.aside
        # Strangers, who may be slow on purpose, do not keep out those whose token is right.
        self._large = Limiter("large bodies of webhooks that are being read", MAX_LARGE, 1)
        self._large_of_strangers = Limiter("large bodies of webhooks of unknown senders", MAX_LARGE, 1)
        self._of_strangers = Limiter("bodies of webhooks of unknown senders", MAX_OF_STRANGERS, EACH_STRANGER)

    async def receive(self, request: Request) -> Response:
        """Report to a hook

        The report may have any form: JSON of the tools that hooks know, a message object, any other JSON, a form, or
        plain text. It is stored, then sent. The secret is in the path, in `Authorization` or in a signature, depending
        on the hook. Errors that are worth a retry are 503 with `Retry-After`.
        """
        return await self._receive(request, "")

    async def slack(self, request: Request) -> Response:
        return await self._receive(request, "slack")

    async def discord(self, request: Request) -> Response:
        return await self._receive(request, "discord")

    async def refuse(self, request: Request) -> Response:
        answer = error_answer(MethodNotAllowed(_GET))
        answer.add(b"allow", ALLOWED)
        return answer

    async def shake_hands(self, request: Request) -> Response:
        """CloudEvents' abuse protection: whoever asks may send, if it has the secret."""
        origin = headers_of(request).get(ORIGINS, "")
        headers = {"Allow": ALLOWED if "token" in request.path_params else ALLOWED_WITHOUT_TOKEN}
        if origin:
            headers |= {"WebHook-Allowed-Origin": origin, "WebHook-Allowed-Rate": "*"}
        return Response(status_code=200, headers=headers)

    async def _receive(self, request: Request, dialect: Dialect) -> Response:
        if (begun := request.scope.get(RECEIPT)) is not None:
            raise self._failure(request, begun)
        headers = headers_of(request)
        path = request.path_params
        name = _decoded(path.get("name", ""))
        token = path.get("token", "") if name else next(reversed(path.values()), "")  # its last segment
        asked = Asked(headers, _decoded(token))
        source = UNKNOWN  # the name in the path is whatever a stranger wrote
        try:
            async with contextlib.AsyncExitStack() as stack:
                with ours():
                    found = await self._admission.find(name, asked)
                    body = await self._body(request, headers, stack)
                known = await self._admission.admit(name, found, asked, body)
                source = dialect or known.hook.source
                if bodies.is_compressed(headers):
                    with ours():
                        await self._make_room(body, headers, stack)
                _note(request, known.hook)
                done = await self._receiving.receive(known.hook, headers, body, self._limit, dialect)
        except MatrixError as error:
            metrics.count(metrics.hook_requests, source, _outcome(error.status))
            raise
        count(done)
        request.scope[LOG] = {"user": done.user_id, "delivery": done.delivery} if done.delivery else {}
        _, is_async = preference(request, headers, "flow", self._wait_seconds)
        return answer_to(done, dialect or done.source, is_async=is_async)

    @staticmethod
    def _failure(request: Request, begun: Begun) -> Exception:
        """Why a request failed that web/usual_hook.py has admitted."""
        hook, error = begun.known.hook, begun.error or RuntimeError("a request to a hook without an outcome")
        identify(begun.known)
        _note(request, hook)
        if isinstance(error, MatrixError):
            metrics.count(metrics.hook_requests, hook.source, _outcome(error.status))
        return error

    async def _body(self, request: Request, headers: Mapping[str, str], stack: contextlib.AsyncExitStack) -> bytes:
        """The body as it came, compressed or not. A large one takes a place, and so does a stranger's."""
        length = headers.get("content-length", "")
        expected = int(length[:20]) if length.isdigit() else 0
        body = bytearray()
        if expected > self._limit:
            raise self._too_large()
        bounds = [(MAX_BODY_BYTES, self._large)]
        if peer.is_guest():
            bounds = [(SMALL_BYTES, self._of_strangers), (MAX_BODY_BYTES, self._large_of_strangers)]
        async for piece in request.stream():
            while bounds and max(len(body) + len(piece), expected) > bounds[0][0]:
                await stack.enter_async_context(bounds.pop(0)[1].turn(peer.who(), TURN_SECONDS))
            body += piece
            if len(body) > self._limit:
                raise self._too_large()
        return bytes(body)

    async def _make_room(self, body: bytes, headers: Mapping[str, str], stack: contextlib.AsyncExitStack) -> None:
        """A place for what is large once it is unpacked: 1 kB of gzip can be a megabyte."""
        is_large = partial(bodies.is_larger, body, headers, MAX_BODY_BYTES)
        if len(body) <= MAX_BODY_BYTES and await self._aside(is_large):
            await stack.enter_async_context(self._large.turn(peer.who(), TURN_SECONDS))

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is longer than {self._limit} bytes, which FLOWBRIDGE_MAX_HOOK_BYTES allows")


def count(done: Done) -> None:
    outcome = "repeated" if done.replayed else "accepted" if done.delivery else "nothing"
    metrics.count(metrics.hook_requests, done.source, outcome)


def _note(request: Request, hook: Hook) -> None:
    """Refused calls are logged by room and event type."""
    request.path_params["roomId"], request.path_params["eventType"] = _quoted(hook.room), MESSAGE


def _outcome(status: int) -> str:
    """Of a request that got an error, for the metrics."""
    if status in (401, 429):
        return "refused"
    return "invalid" if status < 500 else "unavailable"


def answer_to(done: Done, source: str, *, is_async: bool) -> JsonAnswer:
    response = _answer(done, source, is_async=is_async)
    if done.delivery:
        response.add(b"flowbridge-delivery", done.delivery)
    if done.replayed:
        response.add(b"idempotent-replayed", "true")
    return response


def _answer(done: Done, source: str, *, is_async: bool) -> JsonAnswer:
    """As the sender knows it: Slack's want `ok`, Discord's no content; 202 is a failure to some."""
    if is_async and done.delivery:
        answer = json_answer(_taken(done), 202, {"Location": f"/deliveries/{done.delivery}"})
        answer.add(b"preference-applied", "respond-async")
        return answer
    if source == "slack":
        return _Text(b"ok")
    if source == "discord":
        return _Nothing()
    return json_answer(_taken(done))


def _taken(done: Done) -> Json:
    found: Json = {"ok": True}
    if done.delivery:
        found["delivery_id"] = done.delivery
    if done.why:
        found["done"] = done.why
    if done.warnings:
        found["warnings"] = list(done.warnings)
    return found


class _Text(JsonAnswer):
    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self.raw_headers[1] = (b"content-type", b"text/plain; charset=utf-8")


class _Nothing(JsonAnswer):
    def __init__(self) -> None:
        super().__init__(b"", 204)
        self.raw_headers.clear()


_quoted = lru_cache(1_000)(quote)


def _decoded(raw: str) -> str:
    return unquote(raw) if "%" in raw else raw


async def name(raw: Annotated[str, segment("name", "The hook's name.", "alerts")]) -> None: ...


async def token(raw: Annotated[str, segment("token", "The hook's secret, if it is a token.", "fh_…")]) -> None: ...


_ANY: Json = {
    "responses": {
        "200": {"headers": DELIVERY},
        "202": {
            "description": "The same, for `Prefer: respond-async`.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Taken"}}},
            "headers": {
                "Location": LOCATION,
                "Preference-Applied": header("What was granted of `Prefer`.", const="respond-async"),
                **DELIVERY,
            },
        },
    },
    "requestBody": {
        "description": "What happened. JSON under any Content-Type; a form with a field `payload`; a text. gzip is "
        "unpacked; 1 MiB at most (`FLOWBRIDGE_MAX_HOOK_BYTES`).",
        "content": {
            "application/json": {
                "schema": {},
                "example": {"title": "Backup failed", "status": "error", "host": "db-1"},
            },
            "text/plain": {"schema": {"type": "string"}, "example": "the backup is done"},
        },
    },
}


def routes(core: Core) -> list[Route]:
    hooks = Webhooks(core)

    def take(method: str, path: str, handler: Handler, operation: str = "", *uses: Any) -> Route:
        return RawRoute(
            method,
            (path,),
            handler,
            operation or f"{method}_{path}".lower(),
            tag=TAG,
            uses=uses,
            answers=Taken,
            errors=(*BODY, 401, 429, 503),
            sends=True,
            lenient=True,
            documented=bool(operation),
            extra=_ANY if operation else None,
        )

    own, secret = "/hooks/{name}", "/hooks/{name}/{token}"
    found = [
        take("POST", own, hooks.receive, "tell_hook", name, prefer),
        take("POST", secret, hooks.receive, "tell_hook_by_token", name, token, prefer),
        take("PUT", secret, hooks.receive, "put_hook_by_token", name, token, prefer),
        take("GET", secret, hooks.refuse),
        take("OPTIONS", own, hooks.shake_hands),
        take("OPTIONS", secret, hooks.shake_hands),
    ]
    for path, handler in others(hooks).items():
        found += [take("POST", path, handler), take("PUT", path, handler), take("GET", path, hooks.refuse)]
        found.append(take("OPTIONS", path, hooks.shake_hands))
    return found


def others(hooks: Webhooks) -> dict[str, Handler]:
    """Other tools' paths: the token tells which hook is meant."""
    return {
        "/webhook/{token}": hooks.receive,  # matrix-hookshot
        "/api/v1/matrix/hook/{token}": hooks.receive,  # matrix-appservice-webhooks
        "/services/{team}": hooks.slack,
        "/services/{team}/{bot}": hooks.slack,
        "/services/{team}/{bot}/{token}": hooks.slack,
        "/api/webhooks/{id}/{token}": hooks.discord,
        "/api/webhooks/{id}/{token}/slack": hooks.slack,
    }
