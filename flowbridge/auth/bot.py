"""The bridge's own account."""

import asyncio
import hashlib
import re
import socket
import time

from flowbridge import log
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.settings import Settings, SettingsError

LOGIN_PAUSE_SECONDS = 10.0

_USER_ID = re.compile(r"@[a-z0-9._=/+-]+:[^\s\x00]+")  # as homeservers make them: another one may be spelt otherwise


class Bot:
    """The bridge's own account: a token from the settings, or one from logging in with the password.

    A token or password from a file is read again when it is refused, and when `candidate` is asked.
    """

    def __init__(self, settings: Settings, homeserver: Homeserver) -> None:
        self._settings = settings
        self._homeserver = homeserver
        self._user = settings.user
        self._password = settings.password.get_secret_value() if settings.password else None
        self._token = settings.access_token.get_secret_value() if settings.access_token else None
        self._logging_in: asyncio.Task[str] | None = None
        self._refused: MatrixError | None = None
        self._retry_at = 0.0

    @property
    def current(self) -> str | None:
        """The token that is used; None when there is none before the next login."""
        return self._token

    @property
    def user_id(self) -> str | None:
        """Who it is, as far as the settings say."""
        return self._user if self._user is not None and _USER_ID.fullmatch(self._user) else None

    @property
    def name(self) -> str:
        """What its user id is remembered by: the same settings are the same account."""
        who = self._user if self._user is not None else hashlib.sha256((self._token or "").encode()).hexdigest()
        return f"bot|{self._settings.base_url}|{who}"

    async def token(self) -> str:
        """Whoever comes while it logs in waits for the same answer, also when that is none."""
        if self._token is not None:
            return self._token
        if self._logging_in is None or self._logging_in.done():
            self._logging_in = asyncio.ensure_future(self._login())
            self._logging_in.add_done_callback(_heard)
        return await asyncio.shield(self._logging_in)

    async def _login(self) -> str:
        """Log in; after a refusal not at once again: homeservers lock accounts that try too often."""
        if self._refused is not None and time.monotonic() < self._retry_at and not self._has_new_password():
            raise self._refused.with_traceback(None)
        try:
            token = await self._try()
        except MatrixError as error:
            if error.status < 500:
                self._refused, self._retry_at = error, time.monotonic() + LOGIN_PAUSE_SECONDS
            raise
        self._refused = None
        self._token = token
        return token

    async def _try(self) -> str:
        assert self._user is not None
        assert self._password is not None
        try:
            return await self._homeserver.login(self._user, self._password, device_id())
        except MatrixError as error:
            if error.status not in (401, 403) or not self._has_new_password():
                raise
        return await self._homeserver.login(self._user, self._password, device_id())

    def _has_new_password(self) -> bool:
        fresh = self._read_again("password")
        if fresh is None or fresh == self._password:
            return False
        self._password = fresh
        return True

    def _read_again(self, field: str) -> str | None:
        try:
            return self._settings.read_again(field)
        except SettingsError as error:
            log.error("secret_unreadable", error=error)
            return None

    def forget(self, token: str) -> bool:
        """Replace a token that was refused: by what its file holds now, or by logging in again.

        False where there is no other one.
        """
        if self._token == token:
            if self._password is not None:
                self._token = None
            else:
                self._token = self.candidate() or token
        return self._token != token

    def candidate(self) -> str | None:
        """Another token that its file holds now; a new password is used from the next login on."""
        if self._password is not None:
            if self._has_new_password():
                self._retry_at = 0.0
            return None
        fresh = self._read_again("access_token")
        return fresh if fresh != self._token else None

    def adopt(self, token: str) -> None:
        """Use this token from now on."""
        self._token = token


def device_id() -> str:
    """The same device at each start on this machine, so that logging in again leaves no row of dead devices."""
    return f"FLOWBRIDGE_{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8].upper()}"


def _heard(done: "asyncio.Task[str]") -> None:
    """The end of a login that perhaps nobody waits for any more."""
    if not done.cancelled():
        done.exception()
