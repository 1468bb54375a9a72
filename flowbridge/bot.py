"""The bridge's own account."""

import asyncio
import hashlib
import socket
import time

from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.settings import Settings

LOGIN_PAUSE_SECONDS = 10.0


class Bot:
    """The bridge's own account: a token from the settings, or one from logging in with the password."""

    def __init__(self, settings: Settings, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._user = settings.user
        self._password = settings.password
        self._token = settings.access_token.get_secret_value() if settings.access_token else None
        self._logging_in: asyncio.Task[str] | None = None
        self._refused: MatrixError | None = None
        self._retry_at = 0.0

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
        assert self._user is not None
        assert self._password is not None
        if self._refused is not None and time.monotonic() < self._retry_at:
            raise self._refused.with_traceback(None)
        try:
            token = await self._homeserver.login(self._user, self._password.get_secret_value(), device_id())
        except MatrixError as error:
            if error.status < 500:
                self._refused, self._retry_at = error, time.monotonic() + LOGIN_PAUSE_SECONDS
            raise
        self._refused = None
        self._token = token
        return token

    def forget(self, token: str) -> bool:
        """A token that was refused is replaced by logging in again; False where there is no password to do so."""
        if self._password is not None and self._token == token:
            self._token = None
        return self._password is not None


def device_id() -> str:
    """The same device at each start on this machine, so that logging in again leaves no row of dead devices."""
    return f"FLOWBRIDGE_{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8].upper()}"


def _heard(done: "asyncio.Task[str]") -> None:
    """The end of a login that perhaps nobody waits for any more."""
    if not done.cancelled():
        done.exception()
