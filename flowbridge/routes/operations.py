"""For those who run it: health, readiness, the homeserver's versions, the documentation."""

import importlib.util
from pathlib import Path
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from flowbridge import __version__
from flowbridge.callers import Callers
from flowbridge.errors import Errcode, MatrixError, NotFound
from flowbridge.homeserver import Homeserver
from flowbridge.routes import describe
from flowbridge.routes.endpoint import Endpoint, endpoint, json_answer

ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


class Operations:
    def __init__(self, homeserver: Homeserver, callers: Callers) -> None:
        self._homeserver = homeserver
        self._callers = callers

    async def healthz(self, _: Request) -> Response:
        """GET /healthz: the process answers."""
        return json_answer({"status": "ok", "version": __version__})

    async def readyz(self, _: Request) -> Response:
        """GET /readyz: the homeserver can be reached, and the bot account, if there is one, is accepted."""
        checks: dict[str, Any] = {}
        try:
            await self._homeserver.versions()
            checks["homeserver"] = str(self._homeserver.locator.known)
            bot = await self._callers.bot()
            checks["bot"] = bot.user_id if bot else None
        except MatrixError as error:
            failed = "bot" if "homeserver" in checks else "homeserver"
            not_ready = MatrixError(f"not ready: {error.error}", status=503, flowbridge={"failed": failed, **checks})
            return json_answer(not_ready.body(), 503, {"Retry-After": "2"})
        return json_answer({"ready": True, **checks})

    async def versions(self, _: Request) -> Response:
        """GET /_matrix/client/versions: the homeserver's own answer."""
        answer = await self._homeserver.versions()
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


def routes(homeserver: Homeserver, callers: Callers) -> list[Endpoint]:
    handlers = Operations(homeserver, callers)
    return [
        endpoint("GET", "/healthz", handlers.healthz, describe.HEALTHZ),
        endpoint("GET", "/readyz", handlers.readyz, describe.READYZ),
        endpoint("GET", "/_matrix/client/versions", handlers.versions, describe.VERSIONS),
        endpoint("GET", "/openapi.json", openapi, describe.OPENAPI),
        endpoint("GET", "/docs", docs, describe.PAGE, documented=False),
        endpoint("GET", "/docs/{file}", asset, describe.PAGE, documented=False),
    ]
