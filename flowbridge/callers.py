"""Who may call: Matrix tokens and bridge API keys (contract §1, "Who may call")."""

import asyncio
import hashlib
import hmac
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from flowbridge.errors import BadGateway, Errcode, MatrixError, Unauthorized
from flowbridge.homeserver import Homeserver
from flowbridge.models import Caller
from flowbridge.settings import Settings, is_token

KEEP_SECONDS = 600.0  # how long whoami's answer is kept
MAX_KEPT = 10_000
LOGIN_PAUSE_SECONDS = 10.0
KEY_PREFIX = "fb_"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a request brought: a Matrix token, or (None) an API key that was right."""

    token: str | None


Identity = tuple[str, str | None]  # user id and device id


class Callers:
    """Tells whose request it is. Asks the homeserver once per token."""

    def __init__(self, settings: Settings, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._bot = Bot(settings, homeserver) if settings.has_bot else None
        self._keys = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._kept: dict[str, tuple[Identity, float]] = {}
        self._asking: dict[str, asyncio.Task[Identity]] = {}

    def credential(self, headers: Mapping[str, str], query: bytes) -> Credential:
        """What the request brought, without asking anybody. Raises Unauthorized."""
        if key := headers.get("x-api-key"):
            return self._by_key(key)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else _from_query(query)
        if not token:
            raise Unauthorized(
                "no access token: send `Authorization: Bearer …` or `?access_token=…` (a Matrix token), "
                "or `X-API-Key: fb_…`",
                errcode=Errcode.MISSING_TOKEN,
            )
        if token.startswith(KEY_PREFIX):
            return self._by_key(token)
        if not is_token(token):
            raise Unauthorized("the access token is not visible ASCII")
        return Credential(token)

    async def identify(self, credential: Credential) -> Caller:
        """The account behind a credential. Raises what the homeserver says of the token."""
        if credential.token is not None:
            return Caller(*await self._whoami(credential.token), credential.token)
        assert self._bot is not None
        try:
            return await self._as_bot(self._bot)
        except MatrixError as error:
            raise self._bot_trouble(error) from None

    async def bot(self) -> Caller | None:
        """The bridge's own account; None when none is configured."""
        return await self.identify(Credential(None)) if self._bot else None

    def refused(self, caller: Caller, error: MatrixError) -> MatrixError:
        """To be told when the homeserver refuses a caller's call: forgets a token that it no longer accepts."""
        if error.status != 401:
            return error
        self._kept.pop(caller.token, None)
        if not caller.bot:
            return error
        assert self._bot is not None
        self._bot.forget(caller.token)
        return self._bot_trouble(error)

    def _by_key(self, key: str) -> Credential:
        digest = _digest(key)
        # No early end: the time taken tells nothing about which key was nearly right.
        if not sum(hmac.compare_digest(digest, known) for known in self._keys):
            raise Unauthorized("this API key is not known here")
        if self._bot is None:
            raise Unauthorized(
                "the API key is right, but the bridge has no account to act as: set ACCESS_TOKEN, "
                "or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
            )
        return Credential(None)

    async def _as_bot(self, bot: "Bot") -> Caller:
        token = await bot.token()
        try:
            return Caller(*await self._whoami(token), token, bot=True)
        except MatrixError as error:
            if error.status != 401 or not bot.forget(token):
                raise
        token = await bot.token()
        return Caller(*await self._whoami(token), token, bot=True)

    async def _whoami(self, token: str) -> Identity:
        identity, until = self._kept.get(token, (None, 0.0))
        if identity is not None and until > time.monotonic():
            return identity
        task = self._asking.get(token)
        if task is None:  # whoever comes while the homeserver is asked waits for the same answer
            task = asyncio.ensure_future(self._ask(token))
            self._asking[token] = task
            task.add_done_callback(lambda _: self._asking.pop(token, None))
        return await asyncio.shield(task)

    async def _ask(self, token: str) -> Identity:
        identity = await self._homeserver.whoami(token)
        if len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[token] = (identity, time.monotonic() + KEEP_SECONDS)
        return identity

    def _bot_trouble(self, error: MatrixError) -> MatrixError:
        """A caller with the right key must not read that *its* token is wrong."""
        if error.status not in (401, 403):
            return error
        return BadGateway(f"the homeserver does not accept the bridge's own account: {error.error}")


class Bot:
    """The bridge's own account: a token from the settings, or one from logging in with the password."""

    def __init__(self, settings: Settings, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._user = settings.user
        self._password = settings.password
        self._token = settings.access_token.get_secret_value() if settings.access_token else None
        self._lock = asyncio.Lock()
        self._refused: MatrixError | None = None
        self._retry_at = 0.0

    async def token(self) -> str:
        if self._token is None:
            async with self._lock:
                if self._token is None:
                    self._token = await self._login()
        return self._token

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
        return token

    def forget(self, token: str) -> bool:
        """A token that was refused is replaced by logging in again; False where there is no password to do so."""
        if self._password is not None and self._token == token:
            self._token = None
        return self._password is not None


def device_id() -> str:
    """The same device at each start on this machine, so that logging in again leaves no row of dead devices."""
    return f"FLOWBRIDGE_{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8].upper()}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _from_query(query: bytes) -> str:
    if b"access_token" not in query:
        return ""
    return parse_qs(query.decode("latin-1"), errors="replace").get("access_token", [""])[0]
