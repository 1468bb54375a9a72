"""The bridge's own account, as which API keys act: who it is, and whether its token is accepted."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

from flowbridge import log
from flowbridge.auth.bot_token import BotToken, device_id
from flowbridge.auth.identities import RETRY_SECONDS, Identities, Identity
from flowbridge.auth.names import Names
from flowbridge.errors import BadGateway, MatrixError, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.limits import peer
from flowbridge.limits.tasks import Once
from flowbridge.models import ApiKey, Caller
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings


class Bot:
    """`on_new`: called with the bot each time it has another token.

    `device_of`: of a user, the device whose keys the bridge has; it is the one to log in as.
    """

    def __init__(
        self,
        settings: Settings,
        homeserver: Homeserver,
        identities: Identities,
        names: Names,
        *,
        timing: Timing = Timing(),
    ) -> None:
        self.is_configured = settings.has_bot
        self._token = BotToken(settings, homeserver, timing, device=self._device)
        self.device_of: Callable[[str], Awaitable[str | None]] | None = None
        self._identities = identities
        self._names = names
        self._patience = timing.patience_seconds
        self._clock = timing.clock
        self._asking = Once[None, Caller]()
        self._last_token = ""  # with which it was last accepted
        self._last_identity: Identity | None = None
        self._trouble_until = 0.0  # monotonic: until then events are accepted without another question
        self._checked_at = -math.inf
        self.on_new: Callable[[Caller], object] = lambda _: None

    @property
    def user_id(self) -> str | None:
        """Its user id, as far as that is known without a question."""
        return self._last_identity[0] if self._last_identity else None

    async def caller(self) -> Caller | None:
        """The bot as a caller; None when none is configured. Raises as `identify` does."""
        return await self.identify() if self.is_configured else None

    async def identify(self, key: ApiKey | None = None) -> Caller:
        """The bot on behalf of an API key. Raises BadGateway when the homeserver does not accept it, or MatrixError."""
        try:
            return replace(await self._accepted(), key=key)
        except MatrixError as error:
            raise _trouble(error) from None

    def at_once(self, key: ApiKey | None) -> Caller | None:
        """As `author`, where nothing has to be asked; otherwise None."""
        token = self._token.current
        known = self._identities.known(token) if token is not None else None
        if token is None or known is None or self._identities.clock() >= known[1]:
            return None
        return Caller(*known[0], token, bot=True, key=key)

    async def author(self, key: ApiKey | None) -> Caller:
        """As `identify`, for an event that is kept until it can be sent.

        While the bot's token is refused, or the homeserver is away, the bot is known from before, and its token is "".
        Raises Unavailable when it is not known.
        """
        token = self._token.current
        if token is not None and self._identities.known(token) is not None:
            return Caller(*await self._identities.of(token), token, bot=True, key=key)
        known = await self._from_before()
        if known is not None and self._clock() < self._trouble_until:
            return Caller(*known, "", bot=True, key=key)
        asking = self._asking.task(None, self._accepted)
        await asyncio.wait({asking}, timeout=None if known is None else self._patience)
        try:
            if known is None or asking.done():
                return replace(asking.result(), key=key)
        except MatrixError as error:
            if known is None:
                raise later(_trouble(error)) from None
        self._trouble_until = self._clock() + RETRY_SECONDS
        return Caller(*known, "", bot=True, key=key)

    async def _device(self) -> str:
        known = await self._from_before() if self.device_of is not None else None
        stored = await self.device_of(known[0]) if self.device_of is not None and known is not None else None
        return stored or device_id()

    async def _from_before(self) -> Identity | None:
        """Who the bot is: as last seen, here or by an earlier process, or as the settings say."""
        if self._last_identity is None:
            user_id = await self._names.find(self._token.name) or self._token.user_id
            self._last_identity = (user_id, None) if user_id else None
        return self._last_identity

    @peer.own_work
    async def _accepted(self) -> Caller:
        """The bot with a token that the homeserver accepts. Raises what it says."""
        token = await self._token.get()
        try:
            identity = await self._identities.of(token)
        except MatrixError as error:
            if error.status != 401 or not self._token.forget(token):
                raise
            token = await self._token.get()
            identity = await self._identities.of(token)
        found = Caller(*identity, token, bot=True)
        if token != self._last_token:
            self._last_token, self._last_identity = token, identity
            self._trouble_until = 0.0
            self._names.note(self._token.name, found.user_id)
            self.on_new(found)
        return found

    async def check(self) -> Caller | None:
        """As `caller`, after the homeserver has been asked, a few seconds ago at most."""
        token = self._token.current
        if token is not None and self._clock() >= self._checked_at + RETRY_SECONDS:
            try:
                await self._identities.ask(token)
            except MatrixError as error:
                if error.status != 401:
                    raise
            self._checked_at = self._clock()
        return await self.caller()

    async def reload(self) -> None:
        """Read its secrets again where they are in files. A new token is used once the homeserver accepts it."""
        if (token := self._token.candidate()) is None:
            return
        try:
            await self._identities.of(token)
        except MatrixError as error:
            log.error("bot_token_not_taken", error=error.error)
            return
        log.info("bot_token_taken")
        self._token.current = token
        await self.caller()

    async def renew(self, token: str) -> Caller | None:
        """The bot with another token than this, which is refused; None where there is no other. Raises as `identify`.

        It logs in unless that has been done since.
        """
        if not self.is_configured or not self._token.forget(token):
            return None
        self._identities.forget(token)
        return await self.caller()

    def refused(self, token: str, error: MatrixError) -> MatrixError:
        """The homeserver does not accept this token of the bot: the error for the API key's holder."""
        self._token.forget(token)
        return _trouble(error)


def later(error: MatrixError) -> MatrixError:
    """The error for a caller whose event cannot be accepted because of the homeserver: it should try again."""
    if error.status < 500 or isinstance(error, Unavailable):
        return error
    return Unavailable(f"nothing of the event is kept: {error.error}")


def _trouble(error: MatrixError) -> MatrixError:
    """A caller with the right key must not read that *its* token is wrong."""
    if error.status not in (401, 403):
        return error
    return BadGateway(f"the homeserver does not accept the bridge's own account: {error.error}")
