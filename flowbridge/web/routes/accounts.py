"""Registering, logging in and out, and whose token it is, on both surfaces."""

import re
from typing import Annotated, Any, NotRequired
from urllib.parse import urlencode

from fastapi import Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from typing_extensions import TypedDict

from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import Errcode, Forbidden, Unauthorized
from flowbridge.homeserver import identifiers
from flowbridge.services.accounts import PAGE
from flowbridge.web import parameters
from flowbridge.web.body import JsonBody, matrix_object
from flowbridge.web.dependencies import Caller, Forwarded, IsFirstApi, LogLine, PassedOn, TheCore, credential
from flowbridge.web.endpoint import PAGE_HEADERS, headers_of, json_answer, read_body
from flowbridge.web.public_url import public_url
from flowbridge.web.routes.passthrough import NO_REGISTRATION
from flowbridge.web.routing import BODY, MATRIX, UPSTREAM, Routes

Json = dict[str, Any]

_HEAD = re.compile(rb"<head\b[^>]*>", re.IGNORECASE)
_PROTECTING = (  # what the homeserver says for its page's safety: it knows what that needs
    "X-Frame-Options",
    "Content-Security-Policy",
    "X-Content-Type-Options",
    "Referrer-Policy",
    "Permissions-Policy",
    "Cross-Origin-Opener-Policy",
)
_HEADERS = {"Cache-Control": "no-store"}  # there are tokens in these answers


class _Device(TypedDict, total=False):
    type: Annotated[str, Field(examples=["m.login.password"])]
    user: Annotated[str, Field(description="A name or a user id; old clients send it instead of `identifier`.")]
    password: Annotated[str, Field(description="An account that is made without it cannot be logged in to later.")]
    device_id: str
    initial_device_display_name: str
    refresh_token: bool


@matrix_object()
class Authentication(TypedDict, total=False):
    type: str
    session: str


@matrix_object({"user_id": "example", "password": "wordpass"})
class Registration(_Device, total=False):
    user_id: Annotated[str, Field(description="A name, or a whole user id; without it the homeserver chooses one.")]
    username: str
    auth: Authentication
    inhibit_login: bool
    guest_access_token: str


@matrix_object()
class Identifier(TypedDict, total=False):
    """`{"type": "m.id.user", "user": …}`, or by email or phone."""

    type: str
    user: str
    medium: str
    address: str
    country: str
    phone: str
    number: str


@matrix_object({"type": "m.login.password", "user": "example", "password": "wordpass"})
class Login(_Device, total=False):
    identifier: Identifier
    medium: str
    address: str
    token: str


class User(TypedDict):
    user_id: Annotated[str, Field(examples=["@example:localhost"])]


class Account(User, total=False):
    """The account."""

    access_token: Annotated[str, Field(examples=["QGV4YW1wbGU6bG9jYWxob3N0.AqdSzFmFYrLrTmteXc"])]
    device_id: str
    home_server: Annotated[str, Field(examples=["localhost"])]
    well_known: Annotated[
        Json, Field(description="What clients should use from now on, where the homeserver says so: the bridge.")
    ]


class LoginFlows(TypedDict):
    flows: list[Json]
    session: NotRequired[str]
    params: NotRequired[Json]


routes = Routes()

_CHALLENGE = {
    "description": "What the homeserver asks for (User-Interactive Authentication API). Or the credential that came "
    "with it is not accepted.",
    "content": {
        "application/json": {
            "schema": {
                "anyOf": [{"$ref": "#/components/schemas/LoginFlows"}, {"$ref": "#/components/schemas/MatrixError"}]
            }
        }
    },
}


async def registration_allowed(core: TheCore) -> None:
    if not core.settings.registration:
        raise Forbidden(NO_REGISTRATION)


async def token_if_any(request: Request, core: TheCore) -> str:
    """The Matrix token of a request that needs none: an application service brings one.

    Raises Unauthorized for a wrong credential, Forbidden for an API key without `admin`.
    """
    try:
        found = await credential(request)
    except Unauthorized as error:
        if error.errcode == Errcode.MISSING_TOKEN:
            return ""
        raise
    scopes.permit_all(found.key)
    return found.token or ""


Token = Annotated[str, Depends(token_if_any)]
_REGISTER: Json = {"uses": [registration_allowed], "errors": UPSTREAM, "answers": Account}


@routes.matrix("POST", "/register", "matrix_register", extra={"responses": {"401": _CHALLENGE}}, **_REGISTER)
@routes.flow("POST", "/register", "flow_register", **_REGISTER)
async def register(
    request: Request,
    core: TheCore,
    token: Token,
    body: Annotated[Json, Depends(JsonBody(Registration))],
    forwarded: Forwarded,
    line: LogLine,
    is_first_api: IsFirstApi,
) -> Response:
    """Register an account

    The account is made in one call: flowbridge completes `m.login.dummy` itself. Where the homeserver asks for another
    stage, this is a 403 that names it. On the Matrix surface that is so on `api/v1`, and for a body with `user_id` and
    without `username` and `auth`; everything else goes to the homeserver as it is.
    """
    as_the_guide = "user_id" in body and not body.keys() & {"username", "auth"}
    if is_first_api or as_the_guide or not request.scope["path"].startswith(MATRIX):
        status, found = 200, await core.accounts.register_at_once(body, forwarded)
    else:
        status, found = await core.accounts.register(body, _kind(request), token, forwarded)
    if "user_id" in found:
        line["user"] = found["user_id"]
    return json_answer(found, status, _HEADERS)


@routes.both("GET", "/login", "get_login", errors=UPSTREAM, answers=LoginFlows)
async def flows(core: TheCore) -> Response:
    """The ways to log in"""
    return json_answer(await core.accounts.flows())


@routes.both("POST", "/login", "post_login", errors=UPSTREAM, answers=Account)
async def login(
    request: Request,
    core: TheCore,
    token: Token,
    body: Annotated[Json, Depends(JsonBody(Login))],
    forwarded: Forwarded,
    line: LogLine,
) -> Response:
    """Log in"""
    found = await core.accounts.login(body, token, public_url(core.settings, request), forwarded)
    line["user"] = found.get("user_id")
    return json_answer(found, headers=_HEADERS)


# lenient: its parameters are for the script in the page
@routes.both("GET", "/login/fallback", "get_fallback", errors=UPSTREAM, response_class=HTMLResponse, lenient=True)
async def page(request: Request, core: TheCore) -> Response:
    """Log in with a browser"""
    answer = await core.accounts.page()
    headers = {"Content-Type": answer.header(b"content-type") or "text/html", **_HEADERS, **PAGE_HEADERS}
    headers |= {name: value for name in _PROTECTING if (value := answer.header(name.lower().encode()))}
    if location := answer.header(b"location"):
        headers["Location"] = location
    # The page's relative links still lead to where it comes from.
    up = "../" * (request.scope["raw_path"].count(b"/") - 1)
    base = f'<base href="{up}{PAGE[1:]}">'.encode()
    return Response(_HEAD.sub(lambda head: head[0] + base, answer.body, count=1), answer.status, headers)


@routes.both("POST", "/logout", "post_logout", errors=BODY, answers=Json)
async def logout(request: Request, core: TheCore, credential: Caller, query: PassedOn) -> Response:
    """Log out: end this token

    A body is not looked at. API keys do not log out: they are revoked.
    """
    return await _logout(request, core, credential, query, everywhere=False)


@routes.both("POST", "/logout/all", "post_logout_all", errors=BODY, answers=Json)
async def logout_all(request: Request, core: TheCore, credential: Caller, query: PassedOn) -> Response:
    """Log out: end all tokens of the user

    A body is not looked at. API keys do not log out: they are revoked.
    """
    return await _logout(request, core, credential, query, everywhere=True)


@routes.matrix("GET", "/account/whoami", "matrix_get_whoami", answers=User)
@routes.flow("GET", "/whoami", "flow_get_whoami", answers=User)
async def whoami(core: TheCore, credential: Caller, query: PassedOn, line: LogLine) -> Response:
    """Whose token this is

    With an API key: the bot account, and in `flowbridge.key` what the key may do.
    """
    found = await core.accounts.whoami(credential, query)
    line["user"] = found.get("user_id")
    return json_answer(found)


async def _logout(request: Request, core: Core, credential: Credential, query: str, *, everywhere: bool) -> Response:
    if credential.token is None:
        raise Forbidden("an API key does not log out: the bridge needs its own account; revoke the key instead")
    await read_body(request, headers_of(request))
    await core.accounts.logout(credential.token, query, everywhere=everywhere)
    return json_answer({})


def _kind(request: Request) -> str:
    """The one parameter of a registration that goes on. Raises BadRequest for what no homeserver could read."""
    given = parameters.given(request.scope["query_string"])
    kinds = [(name, identifiers.identifier(value, name)) for name, value in given if name == "kind"]
    return f"?{urlencode(kinds)}" if kinds else ""
