"""Who may call: Matrix tokens and bridge API keys (contract §1, "Who may call")."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from flowbridge import log
from flowbridge.auth.api_keys import ApiKeys
from flowbridge.auth.bot import Bot, later
from flowbridge.auth.identities import Identities, Identity
from flowbridge.auth.refusals import Refusals
from flowbridge.errors import BadRequest, Errcode, MatrixError, Unauthorized
from flowbridge.limits import peer
from flowbridge.models import ApiKey, Caller
from flowbridge.settings import is_token
from flowbridge.store.api_keys import PREFIX, digest

_NO_KEY = f"this is not an API key: one begins with {PREFIX}. A Matrix token is sent as `Authorization: Bearer …`"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a request brought: a Matrix token, or (None) an API key that was right. Neither: the bridge itself."""

    token: str | None
    key: ApiKey | None = None


class Callers:
    """Identifies the caller of a request: first by what it brought, then, when that is needed, as an account."""

    def __init__(self, identities: Identities, keys: ApiKeys, bot: Bot, refusals: Refusals) -> None:
        self.identities = identities
        self.keys = keys
        self.bot = bot
        self._refusals = refusals
        self._known = identities.known
        self._clock = identities.clock

    async def credential(self, headers: Mapping[str, str], query: bytes) -> Credential:
        """What the request brought, without a question to the homeserver. Raises Unauthorized, or Unavailable.

        `X-API-Key` counts before a Matrix token, a header before the query. Raises BadRequest for two different API
        keys: they may have different rights, and nothing says which one is meant.
        """
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        token = bearer.strip() if scheme.lower() == "bearer" else ""
        if (known := self._known(token)) and "x-api-key" not in headers and b"access_token" not in query:
            peer.identified(known[0][0])  # most requests: nothing else has to be checked
            return Credential(token)
        tokens = [token]
        if b"access_token" in query:
            tokens += parse_qs(query.decode("latin-1"), errors="replace").get("access_token", [])
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
        if known := self._known(token):
            peer.identified(known[0][0])
        return Credential(token)

    def at_once(self, authorization: str, api_key: str) -> tuple[Credential, Caller] | None:
        """What these headers bring, and as whom its events are sent, where nothing has to be asked: most sends.

        None: `credential` and `author` find out.
        """
        if api_key:
            return None if authorization else self._key_at_once(api_key.strip())
        scheme, _, bearer = authorization.partition(" ")
        token = bearer.strip() if scheme.lower() == "bearer" else ""
        known = self._known(token)
        if known is None:
            return self._key_at_once(token) if token.startswith(PREFIX) else None
        return (Credential(token), Caller(*known[0], token)) if self._clock() < known[1] else None

    def _key_at_once(self, secret: str) -> tuple[Credential, Caller] | None:
        key = self.keys.known(secret)
        caller = self.bot.at_once(key) if key is not None else None
        return (Credential(None, key), caller) if caller is not None else None

    async def _by_key(self, secret: str) -> Credential:
        key = self.keys.known(secret) or await self._look_up(secret)
        peer.identified(f"key {key.id}")
        log.note(key=key.id)
        if not self.bot.is_configured:
            raise Unauthorized(
                "the API key is right, but the bridge has no account to act as: set ACCESS_TOKEN, "
                "or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
            )
        return Credential(None, key)

    async def _look_up(self, secret: str) -> ApiKey:
        """An API key that is not known in memory. Raises Unauthorized, TooMany or Unavailable."""
        address, hashed = peer.address(), digest(secret)
        self._refusals.check(address, hashed)
        key = await self.keys.look_up(secret)
        if key is None:
            self._refusals.check(address, hashed)  # others of this address may have been refused meanwhile
            refusal = Unauthorized("this API key is not known here" if secret.startswith(PREFIX) else _NO_KEY)
            self._refusals.note(address, hashed, refusal)
            raise refusal
        return key

    async def identify(self, credential: Credential) -> Caller:
        """The account behind a credential. Raises what the homeserver says of the token, or Unavailable."""
        token = credential.token
        if token is None:
            return await self.bot.identify(credential.key)
        return self._identified(token, await self.identities.of(token))

    async def author(self, credential: Credential) -> Caller:
        """As `identify`, for an event that is kept until it can be sent (`Bot.author`).

        Raises what the homeserver says of a caller's own token, otherwise Unavailable.
        """
        token = credential.token
        if token is None:
            return await self.bot.author(credential.key)
        if (known := self._known(token)) and self._clock() < known[1]:  # most sends
            return self._identified(token, known[0])
        try:
            return await self.identify(credential)
        except MatrixError as error:
            raise later(error) from None

    def _identified(self, token: str, identity: Identity) -> Caller:
        peer.identified(identity[0])
        return Caller(*identity, token)

    @contextlib.contextmanager
    def as_(self, caller: Caller) -> Iterator[None]:
        """Call the homeserver as this caller. Raises its errors, and forgets a token that it does not accept."""
        try:
            yield
        except MatrixError as error:
            raise self.refused(caller, error) from None

    def refused(self, caller: Caller, error: MatrixError) -> MatrixError:
        """The error to raise after the homeserver refused a caller's call. Forgets a token that it does not accept."""
        if error.status != 401 or not caller.token:
            return error
        self.identities.forget(caller.token)
        return self.bot.refused(caller.token, error) if caller.bot else error

    async def revoked(self, key: ApiKey) -> MatrixError:
        """Wait until this API key is revoked. Returns, within 2 s, the error for its open streams."""
        await self.keys.revoked(key)
        return Unauthorized("this API key has been revoked")
