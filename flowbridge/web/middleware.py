"""Around every request: routing on the raw path, one log line, errors as Matrix has them.

The endpoints, typed and raw, hang in one tree of raw segments. `%2F` inside a segment must survive (event ids and
transaction ids contain it), and Starlette decodes the path before it matches. Per request this tree took 14 to 17 µs,
Starlette's Router, given the raw path, 17 to 38. 404, 405 with `Allow`, HEAD, CORS and the port for operators depend on
what the tree finds, too. FastAPI makes the handlers of typed endpoints, the lifespan and the OpenAPI document; its own
router sees no request.

Requests under `/_matrix/` that no endpoint serves pass through to the homeserver; web pages may call all of them.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flowbridge import log, metrics
from flowbridge.errors import BadContent, MatrixError, MethodNotAllowed, NotFound, TooMany
from flowbridge.hooks.known import PREFIX
from flowbridge.limits import peer
from flowbridge.limits.processor import (
    ANSWER_SECONDS,
    READ_SECONDS,
    RECEIVED_BYTE_SECONDS,
    SENT_BYTE_SECONDS,
    STREAM_SECONDS,
    Account,
    Allowance,
)
from flowbridge.limits.proxies import Proxies
from flowbridge.web import cors, streaming
from flowbridge.web.endpoint import ANSWER, FORWARDED, HANG_UP, LOG, STARTED, Handler, error_answer
from flowbridge.web.event_stream import EventStream
from flowbridge.web.explained import explained
from flowbridge.web.masking import PLAIN, masked
from flowbridge.web.routing import Route

Tree = dict[str, Any]

MAX_GUESTS = 10_000  # answers that wait for their turn
MAX_RECEIVED = 1024 * 1024
MAX_KNOWN = 1_000  # callers with an allowance of their own
MAX_LOGGED = 1_000  # characters of a path: enough for three segments of 255 bytes

_ANY = "{}"  # the child that matches any segment; its name is at _NAME
_NAME = "{name}"
_HANDLERS = "{handlers}"  # method → handler; braces cannot stand raw in a path

MATRIX = "/_matrix/"
TRIALS = "/validate/"
READS = ("GET", "HEAD")
FAILED = 500
REFUSED = 400  # and every status above; HTTPStatus, an enum, would cost a send 1 µs
OPERATIONS = ("/metrics", "/readyz")
HEALTH = "/healthz"
PROBES = (b"/healthz", b"/readyz")
WELL_KNOWN = "/.well-known/"

_NO_PAGES = "; web pages of other origins may call it when FLOWBRIDGE_CORS_ORIGINS names them"
_SCHEMES = (b"https", b"http")


class Middleware:
    """The ASGI application, around FastAPI's. `relay` handles what no endpoint serves under `/_matrix/`.

    `apart`: the operator's endpoints are served on `operations_port` only. `is_hook`: tells a hook's name.
    """

    operations_port: int | None = None  # set when the server listens

    def __init__(
        self,
        app: FastAPI,
        endpoints: Iterable[Route],
        relay: Handler,
        *,
        proxies: Proxies | None = None,
        origins: cors.Origins | None = None,
        apart: bool = False,
        is_hook: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.app = app
        self._is_hook = is_hook
        endpoints = list(endpoints)
        self._tree = _tree_of(one for one in endpoints if not (apart and one.path in OPERATIONS))
        self._operations = _tree_of(one for one in endpoints if one.path in (*OPERATIONS, HEALTH)) if apart else {}
        self._relay = relay
        self._sends = frozenset(one.handler for one in endpoints if one.sends)
        self._proxies = proxies or None
        self._origins = origins or None
        self._allowances = _Allowances()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = scope.get(STARTED) or time.perf_counter()
        noted = log.begin()
        if scope["raw_path"].startswith(b"//"):  # many clients append /_matrix/… to a base URL that ends with a slash
            scope["raw_path"] = b"/" + scope["raw_path"].lstrip(b"/")
        path = scope["raw_path"].decode("ascii", "replace")
        is_operator = self.operations_port is not None and scope["server"][1] == self.operations_port
        methods, params = _find(self._operations if is_operator else self._tree, path)
        scope["app"] = self.app
        scope["path_params"] = params
        if self._proxies:
            self._learn_client(self._proxies, scope)
        peer.enter(scope)
        client = scope["client"]
        if path.startswith((MATRIX, WELL_KNOWN)) and not is_operator:
            send = cors.open_to_all(scope, send)
            if scope["method"] == "OPTIONS":
                methods = {"OPTIONS": cors.matrix_preflight}
            elif path.startswith(MATRIX) and scope["method"] not in (methods or ()):
                methods = {scope["method"]: self._relay}
        elif self._origins is not None and not is_operator:
            send = self._origins.open(scope, send)
            if scope["method"] == "OPTIONS" and methods is not None:
                own = {} if _is_preflight(scope) else methods  # hooks have an OPTIONS of their own, for CloudEvents
                methods = {"OPTIONS": self._origins.preflight(methods), **own}
        try:
            response = await _respond(Request(scope, receive), methods, path, self._sends, self._is_hook)
            # A known caller pays for reads, refusals and trials.
            is_paid = scope["method"] in READS or response.status_code >= REFUSED or path.startswith(TRIALS)
            if (is_paid or peer.is_guest()) and not is_operator:
                await self._allowances.pay(scope, response)
            await response(scope, receive, send)
        except asyncio.CancelledError:  # the server stops, and has waited for long enough
            streaming.cut(scope, "the bridge stops")  # no answer can say that the outcome is unknown
            return
        metrics.count(metrics.requests, str(response.status_code))
        log.info(
            "request",
            method=scope["method"],
            # Without a call for each send.
            path=path[:MAX_LOGGED]
            if path.startswith(PLAIN) and PREFIX not in path
            else masked(path[:MAX_LOGGED], self._is_hook),
            status=response.status_code,
            ms=round((time.perf_counter() - started) * 1000, 1),
            client=client[0] if client else None,
            **{**noted, **scope.get(LOG, {})},
        )
        for name in (ANSWER, HANG_UP):  # they hold the scope: only the garbage collector would free all of it
            scope.pop(name, None)

    @staticmethod
    def _learn_client(proxies: Proxies, scope: Scope) -> None:
        """Find the caller's address behind trusted proxies, for us and for the homeserver.

        Synapse limits logins and registrations by address, and takes the first one in X-Forwarded-For: what the request
        said there is replaced.
        """
        if scope["client"] is None:
            return
        address, port = scope["client"]
        headers = scope["headers"]
        client = proxies.client(address, [value for name, value in headers if name == b"x-forwarded-for"])
        scheme = scope["scheme"].encode()
        if proxies.trusts(address):
            schemes = [value for name, value in headers if name == b"x-forwarded-proto" and value in _SCHEMES]
            scheme = schemes[-1] if schemes else scheme
        scope["client"] = (client, port if client == address else 0)
        scope[FORWARDED] = [(b"x-forwarded-for", client.encode()), (b"x-forwarded-proto", scheme)]


class _Allowances:
    """The event loop's time that answers cost: all guests share one allowance, each known caller has its own.

    Accepted sends have bounds of their own. Above 15 % of the processor a caller waits for its answer. 16 callers of
    what costs 0.2 ms took half of the sends, as did 16 whose payloads were wrong (each mistake is put into words); 16
    callers of a document of 400 kB took two thirds.
    """

    def __init__(self) -> None:
        self._guests = Allowance("answers without a known token", MAX_GUESTS, Account())
        # An orchestrator restarts a bridge whose probe is not answered within a second: none waits behind what else
        # comes from its address. Behind 1,000 large bodies it took 45 s.
        self._probes = Allowance("probes", MAX_GUESTS, Account())
        self._known: dict[str, Allowance] = {}

    async def pay(self, scope: Scope, response: Response) -> None:
        is_guest = peer.is_guest()
        if is_guest:
            allowance = self._probes if scope["raw_path"] in PROBES else self._guests
        else:
            allowance = self._of(peer.who())
        cost = ANSWER_SECONDS if is_guest else READ_SECONDS + peer.spent()
        cost += len(getattr(response, "body", b"")) * SENT_BYTE_SECONDS + _length(scope) * RECEIVED_BYTE_SECONDS
        if isinstance(response, EventStream):
            cost += STREAM_SECONDS
        with contextlib.suppress(TooMany):  # not raised: the server has fewer connections than may wait
            allowance.pay(await allowance.turn(), cost)

    def _of(self, who: str) -> Allowance:
        found = self._known.pop(who, None) or Allowance("answers", MAX_GUESTS, Account())
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[who] = found
        return found


def _is_preflight(scope: Scope) -> bool:
    return any(name == b"access-control-request-method" for name, _ in scope["headers"])


def _length(scope: Scope) -> int:
    """About how many bytes of a body arrive although the answer does not wait for them."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return min(int(length[:10]), MAX_RECEIVED) if length.isdigit() else 0


async def _respond(
    request: Request,
    methods: dict[str, Handler] | None,
    path: str,
    sends: Container[Handler],
    is_hook: Callable[[str], bool],
) -> Response:
    handler = methods.get(request.method) if methods else None
    try:
        if methods is None:
            # Not even a hook's name: whoever asks without a secret must not hear whether there is such a hook.
            shown = masked(path[:MAX_LOGGED], lambda name: False)[:200]
            raise NotFound(f"there is nothing at {shown}; GET /docs lists what there is")
        if handler is None:
            allowed = ", ".join(sorted(methods))
            hint = _NO_PAGES if request.method == "OPTIONS" else ""
            raise MethodNotAllowed(f"{request.method} is not served on this path; {allowed} is{hint}")
        return await handler(request)
    except MatrixError as raised:
        error = raised if path.startswith(MATRIX) else await explained(request, raised)
        said = error.error
        if isinstance(error, BadContent) and request.app.core.acceptance.at_rest.seals:
            said = error.unquoted  # it may be meant for an encrypted room
        request.scope.setdefault(LOG, {}).update(errcode=str(error.errcode), error=said[:300])
        if handler in sends and REFUSED <= error.status < FAILED:
            request.app.core.refused_calls.note(
                request.path_params.get("roomId", ""), request.path_params.get("eventType", ""), error
            )
        response = error_answer(error)
        if methods and handler is None:
            response.headers["Allow"] = allowed
        return response
    except ClientDisconnect:
        return error_answer(MatrixError("the caller went away", status=499))
    except Exception as error:
        log.error("internal_error", exc_info=error, path=masked(path[:MAX_LOGGED], is_hook))
        return error_answer(MatrixError("flowbridge made a mistake; its log says which"))


def _tree_of(endpoints: Iterable[Route]) -> Tree:
    tree: Tree = {}
    for endpoint in endpoints:
        for path in endpoint.paths:
            handlers = _handlers(tree, path)
            handlers[endpoint.method] = endpoint.handler
            if endpoint.method == "GET":
                handlers["HEAD"] = endpoint.handler
    return tree


def _handlers(tree: Tree, path: str) -> dict[str, Handler]:
    """The handlers of a path, by method; it is added to the tree."""
    node = tree
    for segment in path.split("/")[1:]:
        if segment.startswith("{"):
            child = node.setdefault(_ANY, {})
            child[_NAME] = segment[1:-1]
        else:
            child = node.setdefault(segment, {})
        node = child
    found: dict[str, Handler] = node.setdefault(_HANDLERS, {})
    return found


def _find(tree: Tree, path: str) -> tuple[dict[str, Handler] | None, dict[str, str]]:
    """The handlers of a raw path, and its variable segments, still percent-encoded."""
    node = tree
    params: dict[str, str] = {}
    for segment in path.split("/")[1:]:
        child = node.get(segment) if "{" not in segment else None
        if child is None:
            child = node.get(_ANY)
            if child is None:
                return None, params
            params[child[_NAME]] = segment
        node = child
    return node.get(_HANDLERS), params
