"""For those who run it: health, readiness, the homeserver's versions, the documentation."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from flowbridge import __version__, metrics
from flowbridge.core import Core
from flowbridge.errors import Errcode, MatrixError, NotFound, Unavailable
from flowbridge.routes import describe
from flowbridge.routes.endpoint import Endpoint, endpoint, json_answer
from flowbridge.store.accounts import account_of

ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


class Operations:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def healthz(self, _: Request) -> Response:
        """GET /healthz: the process answers."""
        return json_answer({"status": "ok", "version": __version__})

    async def readyz(self, _: Request) -> Response:
        """GET /readyz: events are accepted and delivered; else which part fails, and why."""
        core = self._core
        paused = self._paused()
        checks: dict[str, Any] = {"queued": core.stock.queued, "accounts_paused": len(paused)}
        failed = "store"
        try:
            if reason := core.database.trouble or core.stock.full:
                raise Unavailable(f"the store: {reason}")
            failed = "homeserver"
            await core.homeserver.versions()
            checks["homeserver"] = str(core.locator.known)
            failed = "bot"
            bot = await core.callers.check_bot()
            checks["bot"] = bot.user_id if bot else None
            if bot is not None and (reason := paused.get(account_of(bot.user_id), "")):
                raise Unavailable(f"the homeserver does not accept the bridge's own account: {reason}")
        except MatrixError as error:
            not_ready = MatrixError(f"not ready: {error.error}", status=503, flowbridge={"failed": failed, **checks})
            return json_answer(not_ready.body(), 503, {"Retry-After": "2"})
        return json_answer({"ready": True, **checks})

    def _paused(self) -> dict[str, str]:
        """The accounts of which something waits for a token that works: what is wrong with the one there is.

        One that was refused and of which nothing waits is nobody's trouble, and may be right by now.
        """
        distrusted = self._core.carrier.distrusted
        waiting = self._core.stock.accounts() if distrusted else ()
        return {account: reason for account, reason in distrusted.items() if account in waiting}

    async def metrics(self, _: Request) -> Response:
        """GET /metrics: Prometheus' text format; no names of rooms or accounts are in it."""
        stock, carrier = self._core.stock, self._core.carrier
        lanes = self._core.courier.lanes()
        metrics.uncertain.set(lanes.pop("uncertain"))
        for state, number in lanes.items():
            metrics.lanes.labels(state).set(number)
        metrics.queued.set(stock.queued)
        metrics.dead.set(stock.dead)
        metrics.store_bytes.set(stock.used_bytes)
        metrics.store_full.set(bool(stock.full))
        oldest = stock.oldest_at if stock.queued else None
        metrics.oldest_queued_seconds.set(max(0.0, time.time() - oldest) if oldest is not None else 0.0)
        metrics.accounts_paused.set(len(self._paused()))
        metrics.homeserver_up.set(not carrier.is_away)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def versions(self, _: Request) -> Response:
        """GET /_matrix/client/versions: the homeserver's own answer."""
        answer = await self._core.homeserver.versions()
        return Response(answer.body, 200, media_type="application/json")


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    return json_answer(request.scope["app"].openapi())


async def docs(_: Request) -> Response:
    """GET /docs: Swagger UI, from files that are installed with flowbridge."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="flowbridge",
        swagger_js_url=f"docs/{ASSETS[0]}",
        swagger_css_url=f"docs/{ASSETS[1]}",
        swagger_favicon_url=f"docs/{ASSETS[2]}",
    )


async def asset(request: Request) -> Response:
    """GET /docs/{file}"""
    name = request.path_params["file"]
    if name not in ASSETS:
        raise NotFound("there is no such file", errcode=Errcode.NOT_FOUND)
    found = importlib.util.find_spec("fastapi_offline")
    assert found is not None
    assert found.origin is not None
    return FileResponse(Path(found.origin).parent / "static" / name)


def routes(core: Core) -> list[Endpoint]:
    handlers = Operations(core)
    return [
        endpoint("GET", "/healthz", handlers.healthz, describe.HEALTHZ),
        endpoint("GET", "/readyz", handlers.readyz, describe.READYZ),
        endpoint("GET", "/metrics", handlers.metrics, describe.METRICS),
        endpoint("GET", "/_matrix/client/versions", handlers.versions, describe.VERSIONS),
        endpoint("GET", "/openapi.json", openapi, describe.OPENAPI),
        endpoint("GET", "/docs", docs, describe.PAGE, documented=False),
        endpoint("GET", "/docs/{file}", asset, describe.PAGE, documented=False),
    ]
