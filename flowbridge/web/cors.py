"""Which web pages may call the bridge, and read its answers (the Fetch standard's CORS protocol).

The Matrix surface is open to all pages, as the specification wants it. The flow surface is open to those of
FLOWBRIDGE_CORS_ORIGINS. Neither uses cookies, so that a page can do no more than its own token or key lets it.
"""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Scope, Send

from flowbridge.errors import Forbidden
from flowbridge.web.endpoint import ANSWER, Handler, Headers

PREFLIGHT_SECONDS = 600  # a browser asks again after that; Chromium takes two hours at most
ALLOWED = (
    "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, Prefer, X-API-Key, X-Requested-With"
)
EXPOSED = b"Flowbridge-Delivery, Idempotent-Replayed, Location, Retry-After"

# Client-server specification, "Web Browser Clients"
_MATRIX: Headers = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
    (b"access-control-allow-headers", b"X-Requested-With, Content-Type, Authorization"),
]
_NAMES = frozenset(name for name, _ in _MATRIX)


async def matrix_preflight(_: Request) -> Response:
    """A browser asks whether a page may call this."""
    return Response(status_code=204)


def open_to_all(scope: Scope, send: Send) -> Send:
    """Let any page read the answer; the homeserver's own CORS headers are replaced."""
    return _with_headers(scope, send, _MATRIX, in_place_of=_NAMES)


class Origins:
    """The pages that may call the flow surface: those of these origins, or all (`*`)."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def open(self, scope: Scope, send: Send) -> Send:
        """Let a page of these origins read the answer, also one that refuses it."""
        return _with_headers(scope, send, self._headers(scope))

    def preflight(self, methods: Iterable[str]) -> Handler:
        """Answers OPTIONS on a path with these methods."""
        allowed = ", ".join(sorted({*methods, "OPTIONS"}))

        async def answer(request: Request) -> Response:
            origin = request.headers.get("origin")
            if origin is not None and not self._allows(origin.encode("latin-1")):
                shown = "".join(each if each.isprintable() else "?" for each in origin[:200])
                raise Forbidden(f"web pages of {shown} may not call this: FLOWBRIDGE_CORS_ORIGINS does not name it")
            headers = {"Allow": allowed}
            if origin is not None:
                headers |= {
                    "Access-Control-Allow-Methods": allowed,
                    "Access-Control-Allow-Headers": ALLOWED,
                    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
                }
            return Response(status_code=204, headers=headers)

        return answer

    def _allows(self, origin: bytes) -> bool:
        return self._all or origin in self._origins

    def _headers(self, scope: Scope) -> Headers:
        if self._all:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
        origin = next((value for name, value in scope["headers"] if name == b"origin"), b"")
        vary = (b"vary", b"Origin")  # also without one: a cache must not give that answer to a page
        if origin not in self._origins:
            return [vary]
        return [vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED)]


def _with_headers(scope: Scope, send: Send, added: Headers, *, in_place_of: AbstractSet[bytes] = frozenset()) -> Send:
    """Add these headers to the answer, in place of its own with these names."""

    def readable(headers: Headers) -> Headers:
        return [pair for pair in headers if pair[0] not in in_place_of] + added

    answer = scope.get(ANSWER)
    if answer is not None:
        scope[ANSWER] = lambda status, headers, body: answer(status, readable(headers), body)

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": readable(message["headers"])}
        await send(message)

    return with_headers
