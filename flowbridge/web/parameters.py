"""Query parameters: none is silently ignored, since a lost `?user_id=` or `?ts=` changes what a send means.

On the flow surface an endpoint takes those of its OpenAPI operation, and a 400 names any other. On the Matrix surface
clients send what the specification, or a proposal that we do not know, defines: parameters that an endpoint does not
use go on to the homeserver. A blank value means that the parameter is absent (contract §4, 7).
"""

from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import Query
from pydantic import AfterValidator, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth.callers import Credential
from flowbridge.errors import BadRequest, Forbidden

Handler = Callable[[Request], Awaitable[Response]]

ACCESS_TOKEN = "access_token"  # noqa: S105 (a name, not a secret)
# The user and the device as which an application service acts (specification, "Identity assertion"; MSC3202).
IDENTITY = frozenset({"user_id", "device_id", "org.matrix.msc3202.device_id"})
MAX_PARAMETERS = 200
MAX_VALUE = 4_096  # characters
NEAR = 0.6  # difflib's own measure of two names that are alike

_OF_SENDS = IDENTITY | {"ts"}
_MATRIX_SURFACE = "; a Matrix client can say it to /_matrix/client/v3/…, whence it goes on to the homeserver"


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text[:80]!r} is not a whole number")
    return int(text[:12])


def _printable(text: str) -> str:
    if len(text) > MAX_VALUE or not text.isprintable():
        raise ValueError(f"is longer than {MAX_VALUE} characters, or holds a control character")
    return text


DIGITS = BeforeValidator(_whole)  # pydantic's own int takes " 1", "1_0" and "1.0", too
WholeNumber = Annotated[int, Field(ge=0), DIGITS]
Text = Annotated[str, AfterValidator(_printable)]


def query(description: str, example: object = None, *, alias: str | None = None, **more: Any) -> Any:
    """A query parameter, documented."""
    return Query(alias=alias, description=description, examples=None if example is None else [example], **more)


def only(names: Callable[[], frozenset[str]], handler: Handler) -> Handler:
    """The handler, which answers 400 to an unknown parameter now."""

    def checked(request: Request) -> Awaitable[Response]:  # no coroutine: each resumption would pass through it
        if query := request.scope["query_string"]:
            known = names()
            for name, _ in given(query):
                if name not in known:
                    raise _unknown(name, known)
        return handler(request)

    return checked


def given(query: bytes) -> list[tuple[str, str]]:
    """The parameters of a query, without blank ones and the access token. Raises BadRequest.

    Bytes that are not UTF-8 become surrogates, which no parameter may contain.
    """
    try:
        pairs = parse_qsl(
            query.decode("utf-8", "surrogateescape"), errors="surrogateescape", max_num_fields=MAX_PARAMETERS
        )
    except ValueError:
        raise BadRequest(f"the query holds more than {MAX_PARAMETERS} parameters") from None
    return [pair for pair in pairs if pair[0].strip().lower() != ACCESS_TOKEN and pair[1].strip()]


def others(request: Request, credential: Credential, *known: str) -> list[tuple[str, str]]:
    """The parameters that go on to the homeserver: all but the known ones.

    Raises BadRequest for a value that no homeserver could read, Forbidden for an API key that would act as a user.
    """
    query: bytes = request.scope["query_string"]
    found = [pair for pair in given(query) if pair[0] not in known] if query else []
    for name, value in found:
        if len(value) > MAX_VALUE or not (name + value).isprintable():
            raise BadRequest(f"{name[:80]!r}: it is longer than {MAX_VALUE} characters, or no printable text")
        if name in IDENTITY and credential.key is not None:
            raise as_nobody_else()
    return found


def passed_on(request: Request, credential: Credential, *known: str) -> str:
    """`?` and the parameters of `others`, or an empty string. Raises as `others` does."""
    found = others(request, credential, *known)
    return f"?{urlencode(found)}" if found else ""


def acts_as_another(request: Request) -> bool:
    """Whether an application service acts as one of its users."""
    query: bytes = request.scope["query_string"]
    return bool(query) and any(name in IDENTITY for name, _ in given(query))


def as_nobody_else() -> Forbidden:
    """The error for an API key: the bot may be an application service, but the key is for the bot alone."""
    return Forbidden("user_id, device_id: an API key acts as the bridge's own account only")


def _unknown(name: str, known: frozenset[str]) -> BadRequest:
    shown = name[:80] if name[:80].isprintable() else repr(name[:80])
    hint = _MATRIX_SURFACE if name in _OF_SENDS or "delay" in name else ""
    near = get_close_matches(name[:80].lower(), known, 1, NEAR)
    meant = f"did you mean {near[0]}? " if near else ""
    return BadRequest(f"{shown}: unknown here; {meant}known are {', '.join(sorted(known | {ACCESS_TOKEN}))}{hint}")
