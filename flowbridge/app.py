"""HTTP around the core: the endpoints, and the lifespan."""

import contextlib
from collections.abc import AsyncIterator
from functools import cached_property
from typing import Any

from fastapi import FastAPI

from flowbridge import edge, openapi
from flowbridge.core import Core
from flowbridge.routes import (
    accounts,
    deliveries,
    discovery,
    live,
    media,
    operations,
    reading,
    relay,
    rooms,
    schemas,
    send,
)
from flowbridge.routes.document import Document
from flowbridge.routes.endpoint import json_bytes
from flowbridge.settings import Settings


class Bridge(FastAPI):
    """FastAPI with an OpenAPI document that is written from the catalogue."""

    core: Core

    @cached_property
    def _document(self) -> dict[str, Any]:
        return openapi.document(self, self.core.catalogue)

    def openapi(self) -> dict[str, Any]:
        return self._document

    @cached_property
    def document(self) -> Document:
        """The same as it is served."""
        return Document(lambda: json_bytes(self.openapi()), "application/json")


def create_app(settings: Settings, core: Core | None = None) -> edge.Edge:
    """The ASGI application. Raises AddressError or SchemaError for settings that cannot work."""
    core = core or Core(settings)
    app = Bridge(lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.core = core
    endpoints = [
        *send.routes(core),
        *accounts.routes(core),
        *rooms.routes(core),
        *reading.routes(core),
        *deliveries.routes(core),
        *media.routes(core),
        *live.routes(core),
        *schemas.routes(core.catalogue, core.intake),
        *operations.routes(core),
        *discovery.routes(core),
    ]
    app.router.routes.extend(endpoints)
    return edge.Edge(app, endpoints, relay.Relaying(core).relay)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, Bridge)
    async with app.core.running():
        yield
