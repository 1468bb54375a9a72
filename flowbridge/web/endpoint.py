"""What endpoints are made of: headers, bodies that are read within bounds, JSON answers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flowbridge.errors import BadRequest, MatrixError, TooLarge, Unavailable, UnsupportedMedia
from flowbridge.homeserver.large_json import ENCODER

Handler = Callable[[Request], Awaitable[Response]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY_BYTES = 512 * 1024  # 62,000 bytes of content, written as \\u escapes, are six times as many
LOG = "flowbridge.log"  # in the scope: fields that a handler adds to its request's log line
FORWARDED = (
    "flowbridge.forwarded"  # in the scope, behind proxies: headers that tell the homeserver the caller's address
)
# Of our own pages: no other page may show them in a frame, against clickjacking.
PAGE_HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
ANSWER = "flowbridge.answer"  # in the scope: a function that writes a whole answer at once, if it can
RECEIPT = "flowbridge.receipt"  # in the scope: a send that was accepted before, or refused, and is to be answered
STARTED = "flowbridge.started"  # in the scope: when the request began (perf_counter), if that was before
HANG_UP = "flowbridge.hang_up"  # in the scope: a function that ends the connection in the middle of an answer


def headers_of(request: Request) -> dict[str, str]:
    """The request's headers by lower-case name, decoded once: Starlette searches a list at each access.

    Raises BadRequest for two different credentials in headers of one name: proxies differ in which one they use.
    """
    headers = request.scope["headers"]
    found = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    if len(found) != len(headers):
        for name in (b"authorization", b"x-api-key"):
            if len({value.strip() for key, value in headers if key == name}) > 1:
                raise BadRequest(f"{name.decode()}: it is given more than once, with different values")
    return found


def forwarded_of(request: Request) -> Headers:
    """The headers that tell the homeserver the caller's address, if FLOWBRIDGE_TRUSTED_PROXIES is set."""
    found: Headers = request.scope.get(FORWARDED, [])
    return found


async def read_body(request: Request, headers: Mapping[str, str], limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body; the server bounds the time.

    Raises TooLarge, UnsupportedMedia when it is compressed, Unavailable when the bridge stops before it has arrived.
    """
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise UnsupportedMedia("compressed bodies are not read: send the JSON as it is")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > limit:
        raise TooLarge(f"the body is {length[:20]} bytes: at most {limit} are read here")
    body = bytearray()
    while True:
        try:
            message = await request.receive()
        except asyncio.CancelledError:  # the server stops, and has waited for long enough
            raise Unavailable("the bridge stops") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            raise TooLarge(f"the body is longer than {limit} bytes")
        if not message.get("more_body", False):
            return bytes(body)


def json_bytes(value: Any) -> bytes:
    """JSON as flowbridge writes it; a lone surrogate becomes a question mark."""
    return ENCODER.encode(value).encode("utf-8", "replace")


class JsonAnswer(Response):
    """Encoded JSON. Its headers are written once: Starlette's write and search cost 5 µs of each send."""

    media_type = "application/json"

    def __init__(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.status_code = status
        self.background = None
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        if headers:
            self.raw_headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        at_once = scope.get(ANSWER)
        if at_once is None or not at_once(self.status_code, self.raw_headers, self.body):
            await super().__call__(scope, receive, send)

    def add(self, name: bytes, value: str) -> None:
        """Add a header; `name` is lower case."""
        self.raw_headers.append((name, value.encode("latin-1")))


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> JsonAnswer:
    return JsonAnswer(json_bytes(value), status, headers)


def error_answer(error: MatrixError) -> JsonAnswer:
    return json_answer(error.body(), error.status, error.headers())
