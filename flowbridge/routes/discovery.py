"""What tells Matrix clients where their homeserver is: the bridge itself (specification, "Well-known URI")."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from flowbridge.core import Core
from flowbridge.errors import BadRequest
from flowbridge.homeserver import AddressError
from flowbridge.homeserver.address import parse_host
from flowbridge.routes import describe_discovery as describe
from flowbridge.routes.endpoint import Endpoint, endpoint, json_answer
from flowbridge.settings import Settings


def public_url(settings: Settings, scope: Scope) -> str:
    """The bridge's address for clients: FLOWBRIDGE_PUBLIC_URL, else as this request named it. Raises BadRequest.

    `X-Forwarded-*` is not believed: any caller can send it.
    """
    if settings.public_url:
        return settings.public_url
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    try:
        return f"{scope['scheme']}://{parse_host(host)}"
    except AddressError as error:
        raise BadRequest(f"Host: {error}") from None


def routes(core: Core) -> list[Endpoint]:
    async def well_known(request: Request) -> Response:
        """GET /.well-known/matrix/client"""
        return json_answer({"m.homeserver": {"base_url": public_url(core.settings, request.scope)}})

    return [endpoint("GET", "/.well-known/matrix/client", well_known, describe.WELL_KNOWN)]
