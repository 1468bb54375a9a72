"""For those who run it: health, readiness, the homeserver's versions, the documentation."""

import asyncio
import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

from flowbridge import __version__, metrics
from flowbridge.bridge import Core
from flowbridge.errors import Errcode, MatrixError, NotFound, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.store.accounts import account_of
from flowbridge.web import describe
from flowbridge.web.document import Document
from flowbridge.web.endpoint import PAGE_HEADERS, Endpoint, endpoint, json_answer

KEEP_SECONDS = 1.0  # what the homeserver says of its versions, and a look at the store's file

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_ASSET_CACHE = "public, max-age=86400"  # a day; they change with a release


class Versions:
    """The homeserver's versions, asked for once a second at most: neither /readyz nor /versions needs a token."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._asking: asyncio.Task[Answer] | None = None
        self._until = 0.0

    async def get(self) -> Answer:
        """The answer, when it is a 200. Raises MatrixError, to all callers of that second."""
        if self._asking is None or (self._asking.done() and time.monotonic() >= self._until):
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> Answer:
        try:
            return await self._homeserver.versions()
        finally:
            self._until = time.monotonic() + KEEP_SECONDS


class Operations:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._look_at = 0.0  # monotonic
        self._versions = Versions(core.homeserver)

    async def healthz(self, _: Request) -> Response:
        """GET /healthz: the process answers."""
        return json_answer({"status": "ok", "version": __version__})

    async def readyz(self, _: Request) -> Response:
        """GET /readyz: events are accepted and delivered; else which part fails, and why."""
        core = self._core
        paused = self._paused()
        checks: dict[str, Any] = {"queued": core.backpressure.queued, "accounts_paused": len(paused)}
        failed = "store"
        try:
            await self._look_at_store()
            if reason := core.database.missing or core.database.trouble or core.backpressure.full:
                raise Unavailable(f"the store: {reason}")
            failed = "homeserver"
            await self._versions.get()
            checks["homeserver"] = str(core.locator.known)
            failed = "bot"
            bot = await core.bot.check()
            checks["bot"] = bot.user_id if bot else None
            if bot is not None and (reason := paused.get(account_of(bot.user_id), "")):
                raise Unavailable(f"the homeserver does not accept the bridge's own account: {reason}")
        except MatrixError as error:
            not_ready = MatrixError(f"not ready: {error.error}", status=503, flowbridge={"failed": failed, **checks})
            return json_answer(not_ready.body(), 503, {"Retry-After": "2"})
        return json_answer({"ready": True, **checks})

    async def _look_at_store(self) -> None:
        """Once a second at most: /readyz needs no token. Raises StoreUnavailable for a database that is malformed."""
        if time.monotonic() >= self._look_at:
            await self._core.database.check()
            self._look_at = time.monotonic() + KEEP_SECONDS

    def _paused(self) -> dict[str, str]:
        """The accounts of which something waits, since the homeserver refuses them or their token: what it says.

        One that was refused and of which nothing waits is nobody's trouble, and may be right by now.
        """
        refusals = self._core.account_limits.refusals()
        waiting = self._core.backpressure.accounts() if refusals else ()
        return {account: reason for account, reason in refusals.items() if account in waiting}

    async def metrics(self, _: Request) -> Response:
        """GET /metrics: Prometheus' text format; no names of rooms or accounts are in it."""
        backpressure = self._core.backpressure
        lanes = self._core.worker.lanes()
        metrics.uncertain.set(lanes.pop("uncertain"))
        for state, number in lanes.items():
            metrics.lanes.labels(state).set(number)
        metrics.queued.set(backpressure.queued)
        metrics.dead.set(backpressure.dead)
        metrics.store_bytes.set(backpressure.used_bytes)
        metrics.store_full.set(bool(backpressure.full))
        oldest = backpressure.oldest_at if backpressure.queued else None
        metrics.oldest_queued_seconds.set(max(0.0, time.time() - oldest) if oldest is not None else 0.0)
        metrics.accounts_paused.set(len(self._paused()))
        metrics.homeserver_up.set(not self._core.breaker.is_open)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def versions(self, _: Request) -> Response:
        """GET /_matrix/client/versions: the homeserver's own answer."""
        answer = await self._versions.get()
        return Response(answer.body, 200, media_type="application/json")


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    document: Document = request.scope["app"].document
    return await document.answer(request)


def _page() -> bytes:
    """Swagger UI, from files that are installed with flowbridge."""
    script, style, icon = (f"docs/{name}" for name in _ASSETS)
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="flowbridge",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    return bytes(page.body)


def _file(name: str) -> bytes:
    found = importlib.util.find_spec("fastapi_offline")
    assert found is not None
    assert found.origin is not None
    return (Path(found.origin).parent / "static" / name).read_bytes()


class Documentation:
    """GET /docs and its files."""

    def __init__(self) -> None:
        self._page = Document(_page, "text/html", headers=PAGE_HEADERS)
        self._assets = {
            name: Document(partial(_file, name), media_type, cache_control=_ASSET_CACHE)
            for name, media_type in _ASSETS.items()
        }

    async def page(self, request: Request) -> Response:
        """GET /docs"""
        return await self._page.answer(request)

    async def asset(self, request: Request) -> Response:
        """GET /docs/{file}"""
        document = self._assets.get(request.path_params["file"])
        if document is None:
            raise NotFound("there is no such file", errcode=Errcode.NOT_FOUND)
        return await document.answer(request)


def routes(core: Core) -> list[Endpoint]:
    handlers, documentation = Operations(core), Documentation()
    return [
        # lenient: probes, scrapers and browsers' caches add parameters that change nothing
        endpoint("GET", "/healthz", handlers.healthz, describe.HEALTHZ, lenient=True),
        endpoint("GET", "/readyz", handlers.readyz, describe.READYZ, lenient=True),
        endpoint("GET", "/metrics", handlers.metrics, describe.METRICS, lenient=True),
        endpoint("GET", "/_matrix/client/versions", handlers.versions, describe.VERSIONS),
        endpoint("GET", "/openapi.json", openapi, describe.OPENAPI, lenient=True),
        endpoint("GET", "/docs", documentation.page, describe.PAGE, documented=False, lenient=True),
        endpoint("GET", "/docs/{file}", documentation.asset, describe.PAGE, documented=False, lenient=True),
    ]
