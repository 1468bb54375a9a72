"""For operators: health, readiness, figures, the homeserver's versions, the documentation."""

import asyncio
import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from fastapi import Depends
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from flowbridge import __version__, metrics
from flowbridge.bridge import Core
from flowbridge.errors import Errcode, MatrixError, NotFound, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.limits.tasks import ignore_result
from flowbridge.store.accounts import account_of
from flowbridge.web.dependencies import TheCore
from flowbridge.web.document import Document
from flowbridge.web.endpoint import PAGE_HEADERS, json_answer
from flowbridge.web.routing import TAGS, Routes

Json = dict[str, Any]

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_ASSET_CACHE = "public, max-age=86400"  # a day; they change with a release


class Health(TypedDict):
    status: Literal["ok"]
    version: str


class Ready(TypedDict):
    ready: Literal[True]
    homeserver: Annotated[str, Field(description="Its address.")]
    bot: Annotated[str | None, Field(description="The bot account's user id.")]
    queued: NotRequired[Annotated[int, Field(description="Events that wait to be sent.")]]
    accounts_paused: NotRequired[
        Annotated[int, Field(description="Accounts whose token is not accepted: their events wait.")]
    ]
    encryption: NotRequired[
        Annotated[
            Literal["signed", "unsigned", "foreign", "absent", "starting", "held", "elsewhere", "failed", "off"],
            Field(
                description="How the bot's device stands. Strict clients read it once it is `signed`; `foreign`: the "
                "account is cross-signed by another client; `elsewhere`: another replica has it. The log says more."
            ),
        ]
    ]
    encryption_missing: NotRequired[
        Annotated[
            str, Field(description="What has to be done before others can rely on the device, or it can encrypt.")
        ]
    ]
    hooks_file_refused: NotRequired[
        Annotated[
            Literal[True],
            Field(description="hooks.yaml cannot be used as it is now: the hooks that were read before hold."),
        ]
    ]


class Versions:
    """The homeserver's versions, asked for once a second at most: neither /readyz nor /versions needs a token."""

    def __init__(self, homeserver: Homeserver, keep_seconds: float) -> None:
        self._homeserver = homeserver
        self._keep_seconds = keep_seconds
        self._asking: asyncio.Task[Answer] | None = None
        self._until = 0.0

    async def get(self) -> Answer:
        """The answer, when it is a 200. Raises MatrixError, to all callers of that second."""
        if self._asking is None or (self._asking.done() and time.monotonic() >= self._until):
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(ignore_result)
        return await asyncio.shield(self._asking)

    async def _ask(self) -> Answer:
        try:
            return await self._homeserver.versions()
        finally:
            self._until = time.monotonic() + self._keep_seconds


class Readiness:
    """Whether events can be sent. Neither /readyz nor /versions needs a token: each looks once a second at most."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._look_at = 0.0  # monotonic
        self.versions = Versions(core.homeserver, core.timing.readiness_seconds)

    async def answer(self) -> Response:
        """200, or 503 and which part fails, and why."""
        core = self._core
        paused = self.paused()
        checks: Json = {"queued": core.backpressure.queued, "accounts_paused": len(paused)}
        if core.registry.trouble:  # the log says why: what stands in the file is not for everybody
            checks["hooks_file_refused"] = True
        if core.devices is not None:
            checks["encryption"] = core.devices.standing
            if missing := core.devices.missing:
                checks["encryption_missing"] = missing
        failed = "store"
        try:
            await self._look_at_store()
            if reason := core.database.missing or core.database.trouble or core.backpressure.full:
                raise Unavailable(f"the store: {reason}")
            failed = "homeserver"
            await self.versions.get()
            checks["homeserver"] = str(core.locator.known)
            failed = "bot"
            bot = await core.callers.bot.check()
            checks["bot"] = bot.user_id if bot else None
            if bot is not None and (reason := paused.get(account_of(bot.user_id), "")):
                raise Unavailable(f"the homeserver does not accept the bridge's own account: {reason}")
        except MatrixError as error:
            not_ready = MatrixError(f"not ready: {error.error}", status=503, flowbridge={"failed": failed, **checks})
            return json_answer(not_ready.body(), 503, {"Retry-After": "2"})
        return json_answer({"ready": True, **checks})

    async def _look_at_store(self) -> None:
        """Raises StoreUnavailable for a database that is malformed."""
        if time.monotonic() >= self._look_at:
            await self._core.database.check()
            self._look_at = time.monotonic() + self._core.timing.readiness_seconds

    def paused(self) -> dict[str, str]:
        """The accounts of which something waits, since the homeserver refuses them or their token: what it says.

        One that was refused and of which nothing waits is nobody's trouble, and may be right by now.
        """
        refusals = self._core.account_limits.refusals()
        waiting = self._core.backpressure.accounts() if refusals else ()
        return {account: reason for account, reason in refusals.items() if account in waiting}


async def readiness(request: Request) -> Readiness:
    found: Readiness = request.app.readiness
    return found


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


_PAGE = Document(_page, "text/html", headers=PAGE_HEADERS)
_FILES = {
    name: Document(partial(_file, name), media_type, cache_control=_ASSET_CACHE) for name, media_type in _ASSETS.items()
}

TheReadiness = Annotated[Readiness, Depends(readiness)]
# lenient, below: probes, scrapers and browsers' caches add parameters that change nothing
routes = Routes("Operations")


@routes.flow("GET", "/healthz", "healthz", answers=Health, lenient=True)
async def healthz() -> Response:
    """Whether the process answers"""
    return json_answer({"status": "ok", "version": __version__})


@routes.flow("GET", "/readyz", "readyz", errors=[503], answers=Ready, lenient=True)
async def readyz(readiness: TheReadiness) -> Response:
    """Whether events can be sent

    The store can be written, the homeserver reached, and the bot account, if there is one, is accepted. With a 503
    `flowbridge.failed` names the part that fails: store, homeserver or bot. With FLOWBRIDGE_OPERATIONS_PORT it is
    served there alone.
    """
    return await readiness.answer()


@routes.flow("GET", "/metrics", "metrics", response_class=PlainTextResponse, lenient=True)
async def figures(core: TheCore, readiness: TheReadiness) -> Response:
    """Figures for Prometheus

    What is queued and since when, lanes, commits, pauses. No names of rooms or accounts. With
    FLOWBRIDGE_OPERATIONS_PORT it is served there alone.
    """
    backpressure = core.backpressure
    lanes = core.worker.lanes()
    metrics.uncertain.set(lanes.pop("uncertain"))
    for state, number in lanes.items():
        metrics.lanes.labels(state).set(number)
    metrics.queued.set(backpressure.queued)
    metrics.dead.set(backpressure.dead)
    metrics.store_bytes.set(backpressure.used_bytes)
    metrics.store_full.set(bool(backpressure.full))
    oldest = backpressure.oldest_at if backpressure.queued else None
    metrics.oldest_queued_seconds.set(max(0.0, time.time() - oldest) if oldest is not None else 0.0)
    metrics.accounts_paused.set(len(readiness.paused()))
    metrics.hooks_file_refused.set(bool(core.registry.trouble))
    metrics.homeserver_up.set(not core.breaker.is_open)
    if core.devices is not None:
        core.devices.measure()
    return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)


@routes.flow(
    "GET", "/_matrix/client/versions", "versions", tag=TAGS["matrix"], errors=(429, 500, 502, 504), answers=Json
)
async def versions(readiness: TheReadiness) -> Response:
    """The homeserver's versions"""
    answer = await readiness.versions.get()
    return Response(answer.body, 200, media_type="application/json")


@routes.flow("GET", "/openapi.json", "openapi", kept=True, answers=Json, ok="OpenAPI 3.1.", lenient=True)
async def openapi(request: Request) -> Response:
    """This document"""
    document: Document = request.app.document
    return await document.answer(request)


@routes.flow("GET", "/docs", "docs", response_class=HTMLResponse, documented=False, lenient=True)
async def docs(request: Request) -> Response:
    """The documentation as a page"""
    return await _PAGE.answer(request)


@routes.flow("GET", "/docs/{file}", "docsFile", documented=False, lenient=True)
async def docs_file(request: Request, file: str) -> Response:
    """A file of the page"""
    document = _FILES.get(file)
    if document is None:
        raise NotFound("there is no such file", errcode=Errcode.NOT_FOUND)
    return await document.answer(request)
