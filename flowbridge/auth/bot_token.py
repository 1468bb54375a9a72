"""The token that the bridge's own account acts with: from the settings, or from a login with the password."""

import hashlib
import re
import socket
from collections.abc import Awaitable, Callable

from flowbridge import log
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.limits.tasks import Once
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError

LOGIN_PAUSE_SECONDS = 10.0

_USER_ID = re.compile(r"@[a-z0-9._=/+-]+:[^\s\x00]+")  # as homeservers make them: others may be spelt in several ways


class BotToken:
    """A token or password from a file is read again when it is refused, and when `candidate` is called.

    `device`: the device to log in as.
    """

    def __init__(
        self,
        settings: Settings,
        homeserver: Homeserver,
        timing: Timing = Timing(),
        *,
        device: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self._device = device
        self._settings = settings
        self._homeserver = homeserver
        self._clock = timing.clock
        self._user = settings.user
        self._password = settings.password.get_secret_value() if settings.password else None
        # The token in use; None when there is none before the next login.
        self.current = settings.access_token.get_secret_value() if settings.access_token else None
        self._logging_in = Once[None, str]()
        self._refused: MatrixError | None = None
        self._retry_at = 0.0

    @property
    def user_id(self) -> str | None:
        """The user id, as far as the settings say it."""
        return self._user if self._user is not None and _USER_ID.fullmatch(self._user) else None

    @property
    def name(self) -> str:
        """The name under which its user id is remembered: the same settings are the same account."""
        account = self._user if self._user is not None else hashlib.sha256((self.current or "").encode()).hexdigest()
        return f"bot|{self._settings.base_url}|{account}"

    async def get(self) -> str:
        """The token; all callers that come during a login share its outcome. Raises MatrixError when that fails."""
        if self.current is not None:
            return self.current
        return await self._logging_in.get(None, self._login)

    async def _login(self) -> str:
        """After a refusal it pauses: homeservers lock accounts that try too often."""
        if self._refused is not None and self._clock() < self._retry_at and not self._has_new_password():
            raise self._refused.with_traceback(None)
        try:
            self.current = await self._try()
        except MatrixError as error:
            if error.status < 500:
                self._refused, self._retry_at = error, self._clock() + LOGIN_PAUSE_SECONDS
            raise
        self._refused = None
        return self.current

    async def _try(self) -> str:
        assert self._user is not None
        assert self._password is not None
        device = device_id() if self._device is None else await self._device()
        try:
            return await self._homeserver.login(self._user, self._password, device)
        except MatrixError as error:
            if error.status not in (401, 403) or not self._has_new_password():
                raise
        return await self._homeserver.login(self._user, self._password, device)

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
        """Replace a token that was refused: by what its file holds now, or by a new login.

        Returns False where there is no other token.
        """
        if self.current == token:
            if self._password is not None:
                self.current = None
            else:
                self.current = self.candidate() or token
        return self.current != token

    def candidate(self) -> str | None:
        """Another token that its file holds now; a new password is used from the next login on."""
        if self._password is not None:
            if self._has_new_password():
                self._retry_at = 0.0
            return None
        fresh = self._read_again("access_token")
        return fresh if fresh != self.current else None


def device_id() -> str:
    """The same device at each start on this machine, so that repeated logins leave no row of dead devices."""
    return f"FLOWBRIDGE_{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8].upper()}"
