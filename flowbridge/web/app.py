"""HTTP around the core: the endpoints, and the lifespan."""

import contextlib
from collections.abc import AsyncIterator
from functools import cached_property
from typing import Any

from fastapi import FastAPI

from flowbridge.bridge import Core
from flowbridge.limits.proxies import Proxies
from flowbridge.settings import Settings
from flowbridge.web import cors, middleware, openapi
from flowbridge.web.document import Document
from flowbridge.web.endpoint import json_bytes
from flowbridge.web.routes import (
    accounts,
    deliveries,
    discovery,
    history,
    hooks,
    live,
    media,
    messages,
    operations,
    passthrough,
    rooms,
    schemas,
    send,
    webhooks,
)
from flowbridge.web.routing import Route


class Bridge(FastAPI):
    """FastAPI with an OpenAPI document that is written from the catalogue."""

    core: Core
    endpoints: list[Route]
    relaying: passthrough.Relaying
    published: schemas.Published
    readiness: operations.Readiness

    @cached_property
    def _document(self) -> dict[str, Any]:
        return openapi.document([each.operation for each in self.endpoints], self.core.catalogue)

    def openapi(self) -> dict[str, Any]:
        return self._document

    @cached_property
    def document(self) -> Document:
        """The same as it is served."""
        return Document(lambda: json_bytes(self.openapi()), "application/json")


def create_app(settings: Settings, core: Core | None = None) -> middleware.Middleware:
    """The ASGI application. Raises AddressError or SchemaError for settings that cannot work."""
    core = core or Core(settings)
    app = Bridge(lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.core = core
    app.relaying = relaying = passthrough.Relaying(core)
    app.published = schemas.Published(core.catalogue)
    app.readiness = operations.Readiness(core)
    app.endpoints = endpoints = [
        *send.routes(core, relaying),
        *accounts.routes,
        *rooms.routes,
        *history.routes,
        *messages.routes(core),
        *hooks.routes,
        *webhooks.routes(core),
        *deliveries.routes,
        *media.routes(core),
        *live.routes(core),
        *schemas.routes,
        *operations.routes,
        *discovery.routes,
    ]
    apart, proxies = settings.operations_port is not None, Proxies(settings.trusted_proxies)
    origins = cors.Origins(settings.cors_origins)
    return middleware.Middleware(
        app, endpoints, relaying.relay, proxies=proxies, origins=origins, apart=apart, is_hook=core.registry.is_hook
    )


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, Bridge)
    async with app.core.running():
        yield
