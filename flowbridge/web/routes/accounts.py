"""Registering, logging in and out, and whose token it is, on both surfaces."""

import re
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth import scopes
from flowbridge.bridge import Core
from flowbridge.errors import Errcode, Forbidden, Unauthorized
from flowbridge.services.accounts import PAGE, Accounts
from flowbridge.web import parameters
from flowbridge.web.endpoint import (
    LOG,
    PAGE_HEADERS,
    Endpoint,
    endpoint,
    forwarded_of,
    headers_of,
    json_answer,
    read_body,
)
from flowbridge.web.incoming import FLAG, TEXT, Shape, query_of, read_object, record
from flowbridge.web.public_url import public_url
from flowbridge.web.routes import describe_accounts as describe
from flowbridge.web.routes.passthrough import NO_REGISTRATION
from flowbridge.web.routes.send import DIALECTS

_DEVICE: dict[str, Shape] = {
    "type": TEXT,
    "user": TEXT,
    "password": TEXT,
    "device_id": TEXT,
    "initial_device_display_name": TEXT,
    "refresh_token": FLAG,
}
_IDENTIFIER = ("type", "user", "medium", "address", "country", "phone", "number")
REGISTER: dict[str, Shape] = {
    **_DEVICE,
    "user_id": TEXT,
    "username": TEXT,
    "auth": record({}, {"type": TEXT, "session": TEXT}),
    "inhibit_login": FLAG,
    "guest_access_token": TEXT,
}
LOGIN: dict[str, Shape] = {
    **_DEVICE,
    "identifier": record({}, dict.fromkeys(_IDENTIFIER, TEXT)),
    "medium": TEXT,
    "address": TEXT,
    "token": TEXT,
}

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


class Register:
    """`always_at_once`: as the guide does it, whatever the body; else only for a body as the guide has it."""

    def __init__(self, core: Core, accounts: Accounts, *, always_at_once: bool) -> None:
        self._core = core
        self._accounts = accounts
        self._always = always_at_once

    async def handle(self, request: Request) -> Response:
        """POST …/register"""
        if not self._core.settings.registration:
            raise Forbidden(NO_REGISTRATION)
        headers = headers_of(request)
        token = await token_if_any(self._core, request, headers)
        body = await read_object(request, headers, REGISTER)
        if self._always or ("user_id" in body and not body.keys() & {"username", "auth"}):
            status, found = 200, await self._accounts.register_at_once(body, forwarded_of(request))
        else:
            query = query_of(request, "kind")
            status, found = await self._accounts.register(body, query, token, forwarded_of(request))
        if "user_id" in found:
            request.scope[LOG] = {"user": found["user_id"]}
        return json_answer(found, status, _HEADERS)


class Sessions:
    def __init__(self, core: Core, accounts: Accounts) -> None:
        self._core = core
        self._accounts = accounts

    async def flows(self, _: Request) -> Response:
        """GET …/login"""
        return json_answer(await self._accounts.flows())

    async def login(self, request: Request) -> Response:
        """POST …/login"""
        headers = headers_of(request)
        token = await token_if_any(self._core, request, headers)
        body = await read_object(request, headers, LOGIN)
        ours = public_url(self._core.settings, request)
        found = await self._accounts.login(body, token, ours, forwarded_of(request))
        request.scope[LOG] = {"user": found.get("user_id")}
        return json_answer(found, headers=_HEADERS)

    async def page(self, request: Request) -> Response:
        """GET …/login/fallback: the homeserver's page, whose relative links still lead to where it comes from."""
        answer = await self._accounts.page()
        headers = {"Content-Type": answer.header(b"content-type") or "text/html", **_HEADERS, **PAGE_HEADERS}
        headers |= {name: value for name in _PROTECTING if (value := answer.header(name.lower().encode()))}
        if location := answer.header(b"location"):
            headers["Location"] = location
        up = "../" * (request.scope["raw_path"].count(b"/") - 1)
        base = f'<base href="{up}{PAGE[1:]}">'.encode()
        return Response(_HEAD.sub(lambda head: head[0] + base, answer.body, count=1), answer.status, headers)

    async def logout(self, request: Request) -> Response:
        """POST …/logout"""
        return await self._logout(request, everywhere=False)

    async def logout_all(self, request: Request) -> Response:
        """POST …/logout/all"""
        return await self._logout(request, everywhere=True)

    async def whoami(self, request: Request) -> Response:
        """GET …/account/whoami"""
        credential = await self._core.callers.credential(headers_of(request), request.scope["query_string"])
        found = await self._accounts.whoami(credential, parameters.passed_on(request, credential))
        request.scope[LOG] = {"user": found.get("user_id")}
        return json_answer(found)

    async def _logout(self, request: Request, *, everywhere: bool) -> Response:
        headers = headers_of(request)
        credential = await self._core.callers.credential(headers, request.scope["query_string"])
        if credential.token is None:
            raise Forbidden("an API key does not log out: the bridge needs its own account; revoke the key instead")
        await read_body(request, headers)
        query = parameters.passed_on(request, credential)
        await self._accounts.logout(credential.token, query, everywhere=everywhere)
        return json_answer({})


async def token_if_any(core: Core, request: Request, headers: Mapping[str, str]) -> str:
    """The Matrix token of a request that needs none: an application service brings one.

    Raises Unauthorized for a wrong credential, Forbidden for an API key without `admin`.
    """
    try:
        credential = await core.callers.credential(headers, request.scope["query_string"])
    except Unauthorized as error:
        if error.errcode == Errcode.MISSING_TOKEN:
            return ""
        raise
    scopes.permit_all(credential.key)
    return credential.token or ""


def routes(core: Core) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented; api/v1 registers as the flow surface does."""
    accounts = Accounts(core.settings, core.homeserver, core.callers)
    sessions = Sessions(core, accounts)
    at_once = Register(core, accounts, always_at_once=True)
    as_asked = Register(core, accounts, always_at_once=False)
    found = _routes("", sessions, at_once, "/whoami", documented=True)
    for name in DIALECTS:
        prefix = f"/_matrix/client/{name}"
        register = at_once if name == "api/v1" else as_asked
        found += _routes(prefix, sessions, register, "/account/whoami", documented=name == "v3")
    return found


def _routes(prefix: str, sessions: Sessions, register: Register, whoami: str, *, documented: bool) -> list[Endpoint]:
    table = [
        ("POST", "/register", register.handle),
        ("GET", "/login", sessions.flows),
        ("POST", "/login", sessions.login),
        ("GET", "/login/fallback", sessions.page),
        ("POST", "/logout", sessions.logout),
        ("POST", "/logout/all", sessions.logout_all),
        ("GET", whoami, sessions.whoami),
    ]
    return [
        endpoint(
            method,
            prefix + path,
            handler,
            describe.account(method, prefix + path),
            documented=documented,
            lenient=path == "/login/fallback",  # its parameters are for the script in the homeserver's page
        )
        for method, path, handler in table
    ]
