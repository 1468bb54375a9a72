"""Who may call: Matrix tokens and bridge API keys (contract §1, "Who may call")."""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import parse_qs

from flowbridge import log
from flowbridge.auth import api_keys
from flowbridge.auth.api_keys import ApiKeys
from flowbridge.auth.bot import Bot
from flowbridge.auth.names import Names
from flowbridge.auth.refusals import Refusals
from flowbridge.errors import (
    BadGateway,
    BadRequest,
    Errcode,
    Forbidden,
    GatewayTimeout,
    MatrixError,
    TooMany,
    Unauthorized,
    Unavailable,
)
from flowbridge.homeserver import Homeserver
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.limits.tasks import Once, ignore_result
from flowbridge.models import ApiKey, Caller, macaroons
from flowbridge.settings import Settings, is_token
from flowbridge.store.api_keys import PREFIX

KEEP_SECONDS = 600.0  # how long whoami's answer is good; after that it is asked anew, and good until then
AGAIN_SECONDS = 5.0  # between two questions that bring no answer
PATIENCE_SECONDS = 0.5  # for a homeserver that hangs, before what was seen earlier counts
MAX_KEPT = 10_000
MAX_LOOKUPS = 16  # of tokens that are not known, at once: what nobody has authenticated must not delay a send
MAX_LOOKUPS_OF_ONE = 8  # of one address
LOOKUP_SECONDS = 10.0  # to wait for one's turn
MAX_ASKED_AGAIN = 3  # tokens of one user
MAX_LOOK_SECONDS = 5.0  # for one key that is not known: a look into the store that others began may be too early
MAX_RENEWING = 16  # answers that are asked anew at once: sends need the connections to the homeserver, too


@dataclass(frozen=True, slots=True)
class Credential:
    """What a request brought: a Matrix token, or (None) an API key that was right. Neither: the bridge itself."""

    token: str | None
    key: ApiKey | None = None


Identity = tuple[str, str | None]  # user id and device id
Seen = Callable[[str], Awaitable[Identity | None]]  # token → whose it was when it was seen before


class Callers:
    """Tells whose request it is. Asks the homeserver once per token."""

    def __init__(
        self, settings: Settings, homeserver: Homeserver, seen: Seen, keys: ApiKeys, names: Names | None = None
    ) -> None:
        self._homeserver = homeserver
        self._seen = seen
        self._keys = keys
        self._names = names
        self._bot = Bot(settings, homeserver) if settings.has_bot else None
        self._kept: dict[str, tuple[Identity, float]] = {}
        self._dead: dict[bytes, None] = {}
        self._asking: Once[str, Identity] = Once()
        self._learning: Once[str, Identity] = Once()
        self._renewing: set[asyncio.Task[Identity]] = set()
        self._meeting: set[asyncio.Task[None]] = set()
        self._meet_again_at = 0.0  # monotonic
        self._refusals = Refusals(settings.wrong_keys_per_minute)
        self._lookups = Limiter("look-ups of unknown tokens", MAX_LOOKUPS, MAX_LOOKUPS_OF_ONE)
        self._bot_token = ""  # of those who were met last
        self._bot_before: Identity | None = None  # who the bot was when that was known last
        self._bot_asking: asyncio.Task[Caller] | None = None
        self._bot_trouble_until = 0.0  # monotonic: until then the bot is not asked for again by those who only write
        self._bot_asked_at = -math.inf
        self.on_seen: Callable[[Caller], object] | None = (
            None  # told each time the homeserver has said whose a token is
        )
        self.on_revoked: Callable[[str], object] | None = None  # told of a user who ended tokens
        self.on_bot: Callable[[Caller], object] | None = None  # told of the bot each time it has another token

    async def refresh(self) -> None:
        """Learn which API keys there are; to be called at the start and every api_keys.REFRESH_SECONDS."""
        await self._keys.refresh()

    async def revoked(self, key: ApiKey) -> MatrixError:
        """Until this API key is revoked: what its open streams are told then, within 2 s."""
        await self._keys.revoked(key)
        return Unauthorized("this API key has been revoked")

    async def credential(self, headers: Mapping[str, str], query: bytes) -> Credential:
        """What the request brought, without asking the homeserver. Raises Unauthorized, or Unavailable.

        `X-API-Key` counts before a Matrix token, a header before the query. Raises BadRequest for two different API
        keys: they may do different things, and which of them is meant nobody can tell.
        """
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        token = bearer.strip() if scheme.lower() == "bearer" else ""
        if (kept := self._kept.get(token)) and "x-api-key" not in headers and b"access_token" not in query:
            peer.identified(kept[0][0])  # most requests: nothing else has to be known of it
            return Credential(token)
        tokens = [token, *_from_query(query)] if b"access_token" in query else [token]
        key = headers.get("x-api-key", "").strip()
        if (key or len(tokens) > 1) and len({key, *(each for each in tokens if each.startswith(PREFIX))} - {""}) > 1:
            raise BadRequest("the request holds two different API keys: send one, in one place")
        if key:
            return await self._by_key(key)
        token = next(filter(None, tokens), "")
        if not token:
            raise Unauthorized(
                "no access token: send `Authorization: Bearer …` or `?access_token=…` (a Matrix token), "
                "or `X-API-Key: fb_…`",
                errcode=Errcode.MISSING_TOKEN,
            )
        if token.startswith(PREFIX):
            return await self._by_key(token)
        if not is_token(token):
            raise Unauthorized(
                "this is not an access token: it is `None`, or not visible ASCII, or of a form that no server issues"
            )
        if kept := self._kept.get(token):
            peer.identified(kept[0][0])
        return Credential(token)

    def permit(self, credential: Credential, event_type: str, *rooms: str) -> None:
        """Raises Forbidden when an API key is not for this.

        `rooms`: all that the one room is called: as the request named it, and its id once that is known; none: only
        the event type is looked at. What a Matrix token may do, the homeserver says.
        """
        if credential.key is not None:
            api_keys.permit(credential.key, event_type, rooms)

    def permit_all(self, credential: Credential) -> None:
        """Raises Forbidden unless an API key has `admin` and no limits: for what is about no room and no event type."""
        key = credential.key
        if key is not None and (not key.admin or key.rooms or key.event_types):
            raise Forbidden("this API key is not for this, which needs `admin`, for all rooms and event types")

    def permit_reading(self, credential: Credential, *rooms: str) -> None:
        """Raises Forbidden when an API key may not read a room (all that it is called); none: all that the bot sees."""
        if credential.key is not None:
            api_keys.permit_reading(credential.key, rooms)

    async def identify(self, credential: Credential) -> Caller:
        """The account behind a credential. Raises what the homeserver says of the token, or Unavailable."""
        if credential.token is not None:
            caller = Caller(*await self._whoami(credential.token), credential.token)
            peer.identified(caller.user_id)
            return caller
        assert self._bot is not None
        try:
            return replace(await self._as_bot(self._bot), key=credential.key)
        except MatrixError as error:
            raise self._bot_trouble(error) from None

    async def author(self, credential: Credential) -> Caller:
        """As `identify`, for one who sends an event, which is kept until it can be sent.

        The bot is known by what was seen of it before, while its token is refused or the homeserver is away: it has no
        token then (""). Raises what the homeserver says of a caller's own token, else Unavailable.
        """
        if credential.token is not None:
            try:
                caller = Caller(*await self._whoami(credential.token), credential.token)
            except MatrixError as error:
                raise later(error) from None
            peer.identified(caller.user_id)
            return caller
        assert self._bot is not None
        token = self._bot.current
        if token is not None and token in self._kept:
            return Caller(*await self._whoami(token), token, bot=True, key=credential.key)
        known = await self._known_bot(self._bot)
        if known is not None and time.monotonic() < self._bot_trouble_until:
            return Caller(*known, "", bot=True, key=credential.key)
        if self._bot_asking is None or self._bot_asking.done():
            self._bot_asking = asyncio.ensure_future(self._as_bot(self._bot))
            self._bot_asking.add_done_callback(ignore_result)
        asking = self._bot_asking
        await asyncio.wait({asking}, timeout=None if known is None else PATIENCE_SECONDS)
        try:
            if known is None or asking.done():
                return replace(asking.result(), key=credential.key)
        except MatrixError as error:
            if known is None:
                raise later(self._bot_trouble(error)) from None
        self._bot_trouble_until = time.monotonic() + AGAIN_SECONDS
        return Caller(*known, "", bot=True, key=credential.key)

    async def _known_bot(self, bot: Bot) -> Identity | None:
        """Who the bot is, by what was seen of it before, here or by an earlier process, or by the settings."""
        if self._bot_before is None:
            user_id = await self._names.find(bot.name) if self._names else None
            if user_id := user_id or bot.user_id:
                self._bot_before = (user_id, None)
        return self._bot_before

    @property
    def bot_user_id(self) -> str | None:
        """Who the bot is, as far as that is known here without asking."""
        return self._bot_before[0] if self._bot_before else None

    async def check_bot(self) -> Caller | None:
        """The bridge's own account, after the homeserver has been asked, some seconds ago at the most."""
        if self._bot is None:
            return None
        token = self._bot.current
        if token is not None and time.monotonic() >= self._bot_asked_at + AGAIN_SECONDS:
            try:
                await self._asking.get(token, partial(self._ask, token))
            except MatrixError as error:
                if error.status != 401:
                    raise
            self._bot_asked_at = time.monotonic()
        return await self.bot()

    async def reload_bot(self) -> None:
        """Read the bot's secrets again where they are in files. A token is used once the homeserver accepts it."""
        if self._bot is None or (token := self._bot.candidate()) is None:
            return
        try:
            await self._whoami(token)
        except MatrixError as error:
            log.error("bot_token_not_taken", error=error.error)
            return
        log.info("bot_token_taken")
        self._bot.adopt(token)
        await self.bot()

    async def bot(self) -> Caller | None:
        """The bridge's own account; None when none is configured."""
        return await self.identify(Credential(None)) if self._bot else None

    async def renew_bot(self, token: str) -> Caller | None:
        """The bridge's own account with another token, when this one of its is refused; None without a password.

        Logs in unless that has been done since. Raises as `identify` does.
        """
        if self._bot is None or not self._bot.forget(token):
            return None
        self.forget(token)
        return await self.bot()

    def refused(self, caller: Caller, error: MatrixError) -> MatrixError:
        """To be told when the homeserver refuses a caller's call: forgets a token that it no longer accepts."""
        if error.status != 401 or not caller.token:
            return error
        self.forget(caller.token)
        if not caller.bot:
            return error
        assert self._bot is not None
        self._bot.forget(caller.token)
        return self._bot_trouble(error)

    def forget(self, token: str) -> None:
        """The homeserver does not accept this token: from now on only the homeserver can say whose it is."""
        self._kept.pop(token, None)
        if len(self._dead) >= MAX_KEPT:
            del self._dead[next(iter(self._dead))]
        self._dead[_digest(token)] = None

    def forget_user(self, user_id: str | None) -> None:
        """Some tokens of a user may not be accepted any more: only the homeserver can say which.

        None: of some user, nobody knows whose. Then every token is asked of when it is used next, and good until the
        answer comes: what anybody can bring about must not end the tokens of all.
        """
        if user_id is None:
            self._kept = {token: (identity, 0.0) for token, (identity, _) in self._kept.items()}
            return
        for token in [token for token, (identity, _) in self._kept.items() if identity[0] == user_id]:
            self.forget(token)
        if self.on_revoked is not None:
            self.on_revoked(user_id)

    async def ask_again(self, is_meant: Callable[[str], bool], *, but: str) -> None:
        """Ask the homeserver of tokens of a user (chosen by its id) that were used here lately; not of this one."""
        tokens = [token for token, (identity, _) in self._kept.items() if token != but and is_meant(identity[0])]
        asking = [self._asking.task(token, partial(self._ask, token)) for token in tokens[-MAX_ASKED_AGAIN:]]
        if asking:
            await asyncio.wait(asking)

    def meet(self, token: str) -> None:
        """The homeserver has served a request with this token: learn whose it is, beside that, unless it is known.

        Else a caller whose requests all pass through would be a guest for ever. It costs a look-up in ten minutes.
        """
        _, until = self._kept.get(token, (None, 0.0))
        now = time.monotonic()
        is_busy = token in self._learning or len(self._meeting) >= MAX_RENEWING
        if now >= until and now >= self._meet_again_at and not is_busy:
            meeting = asyncio.ensure_future(self._meet(token))
            self._meeting.add(meeting)
            meeting.add_done_callback(self._meeting.discard)
            meeting.add_done_callback(ignore_result)

    async def _meet(self, token: str) -> None:
        try:
            await self._whoami(token)
        except MatrixError as error:
            if error.status != 401 and not isinstance(error, TooMany):  # these are the caller's trouble alone
                self._meet_again_at = time.monotonic() + AGAIN_SECONDS

    async def user_of(self, token: str) -> str | None:
        """Whose token this is, if anything can tell; to be asked before the token is ended."""
        try:
            return (await self._whoami(token))[0]
        except MatrixError:
            return None

    async def _by_key(self, secret: str) -> Credential:
        key = self._keys.known(secret) or await self._look_up(secret)
        peer.identified(f"key {key.id}")
        log.note(key=key.id)
        if self._bot is None:
            raise Unauthorized(
                "the API key is right, but the bridge has no account to act as: set ACCESS_TOKEN, "
                "or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
            )
        return Credential(None, key)

    async def _look_up(self, secret: str) -> ApiKey:
        """An API key that is not known in memory. Raises Unauthorized, TooMany or Unavailable."""
        address, digest = peer.address(), _digest(secret)
        self._refusals.check(address, digest)
        began = time.monotonic()
        key = await self._keys.find(secret)
        while key is None and secret.startswith(PREFIX) and not self._keys.was_read_since(began):
            if time.monotonic() > began + MAX_LOOK_SECONDS:
                raise api_keys.unread()
            # It may be newer than what was read last. Timers count in whole milliseconds, and may ring before time.
            await asyncio.sleep(max(self._keys.next_look, 0.001))
            key = await self._keys.find(secret)
        if key is None:
            self._refusals.check(address, digest)  # others of this address may have been refused meanwhile
            refusal = Unauthorized("this API key is not known here")
            self._refusals.note(address, digest, refusal)
            raise refusal
        return key

    @peer.own_work
    async def _as_bot(self, bot: Bot) -> Caller:
        token = await bot.token()
        try:
            found = Caller(*await self._whoami(token), token, bot=True)
        except MatrixError as error:
            if error.status != 401 or not bot.forget(token):
                raise
            token = await bot.token()
            found = Caller(*await self._whoami(token), token, bot=True)
        if token != self._bot_token:
            self._met_bot(bot, found)
        return found

    def _met_bot(self, bot: Bot, found: Caller) -> None:
        """The bot has a token that is accepted, and it is another one than before."""
        self._bot_token = found.token
        self._bot_before = (found.user_id, found.device_id)
        self._bot_trouble_until = 0.0
        if self._names is not None:
            self._names.note(bot.name, found.user_id)
        if self.on_bot is not None:
            self.on_bot(found)

    # whose token it is

    async def _whoami(self, token: str) -> Identity:
        """Whoever comes while it is being found out waits for the same answer."""
        kept = self._kept.get(token)
        if kept is None:
            self._refusals.check(peer.address(), _digest(token))
            return await self._learning.get(token, partial(self._learn, token))
        identity, until = kept
        now = time.monotonic()
        if until <= now and len(self._renewing) < MAX_RENEWING:
            self._kept[token] = (identity, now + AGAIN_SECONDS)
            renewing = self._asking.task(token, partial(self._ask, token))
            self._renewing.add(renewing)
            renewing.add_done_callback(self._renewing.discard)
        return identity

    async def _learn(self, token: str) -> Identity:
        """Ask the homeserver; while it does not answer, what was seen of the token before counts."""
        asking = self._asking.task(token, partial(self._ask_in_turn, token))
        await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
        if not asking.done():
            known = await self._before(token)
            if known is not None and not asking.done():
                return self._keep(token, known, AGAIN_SECONDS)
        try:
            return await asyncio.shield(asking)
        except MatrixError as error:
            if error.status < 500 and error.status != 429:
                raise
            known = await self._before(token)
            if known is not None:
                return self._keep(token, known, AGAIN_SECONDS)
            if error.status == 500 and macaroons.may_break(token):
                raise Unauthorized("the homeserver cannot read this access token") from None
            if isinstance(error, (BadGateway, GatewayTimeout)):
                raise Unavailable(f"the homeserver cannot say whose token this is: {error.error}") from None
            raise

    async def _ask_in_turn(self, token: str) -> Identity:
        """As `_ask`, for an address that may have many tokens that are not known."""
        address, digest = peer.address(), _digest(token)
        async with self._lookups.turn(address, LOOKUP_SECONDS):
            self._refusals.check(address, digest)  # others of this address may have been refused meanwhile
            try:
                return await self._ask(token)
            except MatrixError as error:
                if error.status == 401:
                    self._refusals.note(address, digest, error)
                raise

    async def _ask(self, token: str) -> Identity:
        try:
            identity = await self._homeserver.whoami(token)
        except MatrixError as error:
            if error.status == 401:
                self.forget(token)
            raise
        self._dead.pop(_digest(token), None)
        if self.on_seen is not None:
            self.on_seen(Caller(*identity, token))
        return self._keep(token, identity, KEEP_SECONDS)

    async def _before(self, token: str) -> Identity | None:
        """Whose token it was when it was seen before, unless it has been refused since."""
        if _digest(token) in self._dead:
            return None
        try:
            return await self._seen(token)
        except Unavailable:
            return None

    def _keep(self, token: str, identity: Identity, seconds: float) -> Identity:
        if len(self._kept) >= MAX_KEPT and token not in self._kept:
            del self._kept[next(iter(self._kept))]
        self._kept[token] = (identity, time.monotonic() + seconds)
        return identity

    def _bot_trouble(self, error: MatrixError) -> MatrixError:
        """A caller with the right key must not read that *its* token is wrong."""
        if error.status not in (401, 403):
            return error
        return BadGateway(f"the homeserver does not accept the bridge's own account: {error.error}")


def later(error: MatrixError) -> MatrixError:
    """What a caller hears whose event cannot be taken for the homeserver's trouble: to come again."""
    if error.status < 500 or isinstance(error, Unavailable):
        return error
    return Unavailable(f"nothing of the event is kept: {error.error}")


def _digest(token: str) -> bytes:
    """Of the tokens that are dead only this is kept: they may be long, and anybody can send them."""
    return hashlib.sha256(token.encode()).digest()


def _from_query(query: bytes) -> list[str]:
    return parse_qs(query.decode("latin-1"), errors="replace").get("access_token", [])
