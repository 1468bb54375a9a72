"""Where Matrix clients find their homeserver: the bridge itself (specification, "Well-known URI")."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.web.dependencies import TheCore
from flowbridge.web.endpoint import json_answer
from flowbridge.web.public_url import public_url
from flowbridge.web.routing import Routes


class BaseUrl(TypedDict):
    base_url: Annotated[str, Field(json_schema_extra={"format": "uri"})]


WellKnown = TypedDict("WellKnown", {"m.homeserver": BaseUrl})

routes = Routes("Matrix surface")


@routes.flow(
    "GET",
    "/.well-known/matrix/client",
    "well_known",
    errors=[400],
    answers=WellKnown,
    ok="What the specification's server discovery says.",
)
async def well_known(request: Request, core: TheCore) -> Response:
    """Where Matrix clients find their homeserver

    The bridge's own address: `FLOWBRIDGE_PUBLIC_URL`, or as the request names it.
    """
    return json_answer({"m.homeserver": {"base_url": public_url(core.settings, request)}})
