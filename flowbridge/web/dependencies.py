"""What endpoints ask for by `Depends`: the core, the credential, path segments, the query that goes on.

FastAPI solves them in the order of an endpoint's parameters: the credential comes before the body.
"""

from typing import Annotated, Any

from fastapi import Depends, Path
from starlette.requests import Request

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.homeserver import identifiers
from flowbridge.web import parameters
from flowbridge.web.endpoint import LOG, forwarded_of, headers_of
from flowbridge.web.endpoint import Headers as RawHeaders

ROOM = "!CvcvRuDYDzTOzfKKgh:localhost"


def segment(name: str, description: str, example: str, **schema: Any) -> Any:
    """A path segment, documented; `schema`: what else a client has to know."""
    return Path(alias=name, description=description, examples=[example], json_schema_extra=schema or None)


async def core(request: Request) -> Core:
    found: Core = request.app.core
    return found


async def credential(request: Request) -> Credential:
    """Raises Unauthorized. A Matrix token is not asked of the homeserver here."""
    found: Core = request.app.core
    return await found.callers.credential(headers_of(request), request.scope["query_string"])


async def log_line(request: Request) -> dict[str, Any]:
    """Further fields of the request's line in the log."""
    fields: dict[str, Any] = request.scope.setdefault(LOG, {})
    return fields


async def forwarded(request: Request) -> RawHeaders:
    return forwarded_of(request)


async def room(
    raw: Annotated[
        str,
        segment(
            "roomId", "A room id, with or without `:server`, or an alias `#name:server`. Percent-encoded or raw.", ROOM
        ),
    ],
) -> str:
    return identifiers.room(raw)


async def event_type(
    raw: Annotated[str, segment("eventType", "The event type, e.g. one of `GET /schemas`.", "m.room.message")],
) -> str:
    return identifiers.event_type(raw)


async def is_first_api(request: Request) -> bool:
    """Whether it came under `api/v1`, whose clients know the first Matrix API."""
    path: str = request.scope["path"]
    return path.startswith("/_matrix/client/api/v1/")


async def passed_on(request: Request, credential: Annotated[Credential, Depends(credential)]) -> str:
    """The query that goes on to the homeserver: `?` and its parameters, or an empty string."""
    return parameters.passed_on(request, credential)


TheCore = Annotated[Core, Depends(core)]
Caller = Annotated[Credential, Depends(credential)]
Room = Annotated[str, Depends(room)]
EventType = Annotated[str, Depends(event_type)]
PassedOn = Annotated[str, Depends(passed_on)]
IsFirstApi = Annotated[bool, Depends(is_first_api)]
LogLine = Annotated[dict[str, Any], Depends(log_line)]
Forwarded = Annotated[RawHeaders, Depends(forwarded)]
