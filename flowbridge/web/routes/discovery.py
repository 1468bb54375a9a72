"""What tells Matrix clients where their homeserver is: the bridge itself (specification, "Well-known URI")."""

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.bridge import Core
from flowbridge.web.endpoint import Endpoint, endpoint, json_answer
from flowbridge.web.public_url import public_url
from flowbridge.web.routes import describe_discovery as describe


def routes(core: Core) -> list[Endpoint]:
    async def well_known(request: Request) -> Response:
        """GET /.well-known/matrix/client"""
        return json_answer({"m.homeserver": {"base_url": public_url(core.settings, request)}})

    return [endpoint("GET", "/.well-known/matrix/client", well_known, describe.WELL_KNOWN)]
