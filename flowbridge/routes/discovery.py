"""What tells Matrix clients where their homeserver is: the bridge itself (specification, "Well-known URI")."""

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.core import Core
from flowbridge.routes import describe_discovery as describe
from flowbridge.routes.endpoint import Endpoint, endpoint, json_answer
from flowbridge.routes.public_url import public_url


def routes(core: Core) -> list[Endpoint]:
    async def well_known(request: Request) -> Response:
        """GET /.well-known/matrix/client"""
        return json_answer({"m.homeserver": {"base_url": public_url(core.settings, request)}})

    return [endpoint("GET", "/.well-known/matrix/client", well_known, describe.WELL_KNOWN)]
