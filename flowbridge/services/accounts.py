"""Accounts: register, log in and out, and tell whose a token is.

The guide registers in one call. Today's homeservers first answer 401 with a session and the stages that they require
(specification, "User-Interactive Authentication API"); `register_at_once` completes them for the caller.
"""

import contextlib
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from flowbridge.auth.callers import Callers, Credential
from flowbridge.errors import BadRequest, Errcode, Forbidden, MatrixError
from flowbridge.events import canonical_json
from flowbridge.homeserver import Homeserver, answers, paths
from flowbridge.homeserver.client import READ_LIMIT, success
from flowbridge.homeserver.pool import Answer
from flowbridge.homeserver.proxy_rules import Headers
from flowbridge.settings import Settings

Json = dict[str, Any]

DUMMY = "m.login.dummy"
PAGE = "/_matrix/static/client/login/"
MAX_NAMED = 500  # characters of the stages that an error names

_OPTIONS = ("device_id", "initial_device_display_name", "inhibit_login", "refresh_token")


class Sessions(Protocol):
    """Who wants to know of logins: `flowbridge.encryption.callers.CallerDevices`."""

    async def logged_in(self, user_id: str, device_id: str) -> None: ...

    async def forget(self, user_id: str, device_id: str) -> None: ...

    async def forget_user(self, user_id: str) -> None: ...


class Accounts:
    """Every method raises MatrixError with what the homeserver says, or that it does not answer."""

    def __init__(
        self, settings: Settings, homeserver: Homeserver, callers: Callers, sessions: Sessions | None = None
    ) -> None:
        self._homeserver = homeserver
        self._callers = callers
        self._sessions = sessions
        # A bare host is a server name; an address does not tell whose users are there.
        self._server_name = "" if "://" in settings.base_url else settings.base_url

    async def register(self, body: Json, query: str, token: str, forwarded: Headers) -> tuple[int, Json]:
        """200 and the account, or 401 and what the homeserver requires. `token`: that of an application service.

        `forwarded`, here and below: headers that tell the homeserver who calls.
        """
        target = f"{paths.CLIENT}/register{query}"
        request = canonical_json.write(body)
        answer = await self._homeserver.guest_call("POST", target, token=token, body=request, forwarded=forwarded)
        if (challenge := answers.challenge(answer)) is not None:
            return 401, challenge
        return 200, await self._session(self._with_server(answers.success(answer)))

    async def register_at_once(self, given: Mapping[str, Any], forwarded: Headers) -> Json:
        """The old way: `{"user_id"?, "password"?}` → access_token, device_id, home_server, user_id.

        Without a name the homeserver chooses one; without a password a random one is set, and not told. Raises
        Forbidden when the homeserver requires a stage that only the caller could complete.
        """
        body = {key: given[key] for key in _OPTIONS if key in given}
        name = given.get("user_id", given.get("username", given.get("user")))
        if name is not None:
            body["username"] = await self._localpart(name)
        body["password"] = given.get("password", secrets.token_urlsafe(32))
        status, found = await self.register(body, "", "", forwarded)
        if status == 401:
            status, found = await self.register({**body, "auth": _completed(found)}, "", "", forwarded)
        if status == 401:
            raise _unmet(_ways(found))
        return found

    async def flows(self) -> Json:
        """The ways to log in."""
        return await success(await self._homeserver.guest_call("GET", f"{paths.CLIENT}/login", limit=READ_LIMIT))

    async def login(self, body: Json, token: str, public_url: str, forwarded: Headers) -> Json:
        """Log in; before 2018 `user` stood for `identifier`. The answer points clients at `public_url`."""
        if "user" in body and "identifier" not in body:
            body = {**body, "identifier": {"type": "m.id.user", "user": body["user"]}}
        request, target = canonical_json.write(body), f"{paths.CLIENT}/login"
        answer = await self._homeserver.guest_call("POST", target, token=token, body=request, forwarded=forwarded)
        found = self._with_server(answers.success(answer))
        if (well_known := found.pop("well_known", None)) and isinstance(well_known, dict):
            found["well_known"] = {**well_known, "m.homeserver": {"base_url": public_url}}
        return await self._session(found)

    async def logout(self, token: str, query: str = "", *, everywhere: bool) -> None:
        """End this token or, `everywhere`, all of its user's. `query`: the user that an application service acts as."""
        target = f"{paths.CLIENT}/logout{'/all' if everywhere else ''}{query}"
        user = await self._callers.identities.user_of(token) if everywhere else None
        caller = None
        if self._sessions is not None and not query:
            with contextlib.suppress(MatrixError):
                caller = await self._callers.identify(Credential(token))
        answer = await self._homeserver.call("POST", target, token=token, body=b"{}")
        if answer.status in (200, 401):
            self._callers.identities.forget(token)
        if answer.status == 200 and everywhere:
            self._callers.identities.forget_user(user)
        if answer.status == 200 and self._sessions is not None and caller is not None and caller.device_id:
            with contextlib.suppress(MatrixError):  # it is logged out, whatever the store says
                await self._sessions.forget(caller.user_id, caller.device_id)
                if everywhere:
                    await self._sessions.forget_user(caller.user_id)
        answers.success(answer)

    async def whoami(self, credential: Credential, query: str = "") -> Json:
        """user_id, device_id and is_guest, from the homeserver itself; and the scopes of an API key.

        `query`: the user that an application service acts as.
        """
        caller = await self._callers.identify(credential)
        target = f"{paths.CLIENT}/account/whoami{query}"
        with self._callers.as_(caller):
            found = answers.success(await self._homeserver.call("GET", target, token=caller.token))
        if (key := credential.key) is not None:
            scopes = {"rooms": key.rooms, "event_types": key.event_types, "admin": key.admin, "users": key.users}
            found["flowbridge"] = {"key": {"name": key.name, **scopes}}
        return found

    async def page(self) -> Answer:
        """The homeserver's page for logging in with a browser, or its redirect to one."""
        answer = await self._homeserver.guest_call("GET", PAGE, limit=READ_LIMIT)
        if not 200 <= answer.status < 400:
            raise answers.error(answer)
        return answer

    async def _localpart(self, name: str) -> str:
        """A user's name, which may be given as a whole user id."""
        if not name.startswith("@"):
            return name
        localpart, colon, server = name[1:].partition(":")
        if colon and server.lower() != (ours := await self._server()).lower():
            known = f"which is {ours!r}" if ours else "whose name flowbridge does not know yet: send the name alone"
            raise BadRequest(
                f"{name[:255]!r} is not a user of this homeserver, {known}", errcode=Errcode.INVALID_USERNAME
            )
        return localpart

    async def _server(self) -> str:
        """The homeserver's name, as in its user ids; empty when it is not known."""
        if not self._server_name:
            with contextlib.suppress(MatrixError):
                if (bot := await self._callers.bot.caller()) is not None:
                    self._server_name = server_of(bot.user_id)
        return self._server_name

    async def _session(self, found: Json) -> Json:
        """Note a login, so that the bridge may make keys for its device."""
        user_id, device_id = found.get("user_id"), found.get("device_id")
        if self._sessions is not None and isinstance(user_id, str) and isinstance(device_id, str):
            with contextlib.suppress(MatrixError):  # the login stands, and its token sends to rooms without encryption
                await self._sessions.logged_in(user_id, device_id)
        return found

    def _with_server(self, found: Json) -> Json:
        """An account as old clients expect it."""
        user_id = found.get("user_id")
        if isinstance(user_id, str) and (server := server_of(user_id)):
            self._server_name = server
            found.setdefault("home_server", server)
        return found


def server_of(user_id: str) -> str:
    return user_id.partition(":")[2]


def _ways(challenge: Mapping[str, Any]) -> list[list[str]]:
    """The stages that are still to be completed, for each way to do it, the shortest first."""
    done = _texts(challenge.get("completed"))
    ways = [_texts(flow.get("stages")) for flow in challenge["flows"] if isinstance(flow, dict)]
    return sorted(([stage for stage in way if stage not in done] for way in ways), key=len)


def _completed(challenge: Mapping[str, Any]) -> Json:
    """The `auth` to send where m.login.dummy is all that is required. Raises Forbidden."""
    ways = _ways(challenge)
    if [DUMMY] not in ways:
        raise _unmet(ways)
    session = challenge.get("session")
    return {"type": DUMMY, "session": session} if isinstance(session, str) else {"type": DUMMY}


def _unmet(ways: list[list[str]]) -> Forbidden:
    stages = ", or ".join(" and ".join(way) for way in ways if way)[:MAX_NAMED] or "it does not say what"
    return Forbidden(
        f"the homeserver asks for more before it makes an account, and only you can give it: {stages}; "
        "a Matrix client can, at /_matrix/client/v3/register"
    )


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
