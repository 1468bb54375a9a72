"""Whose a Matrix token is. The homeserver says so; its answers are kept in memory."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from flowbridge.auth.refusals import Refusals
from flowbridge.errors import BadGateway, GatewayTimeout, MatrixError, TooMany, Unauthorized, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.limits import peer
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter
from flowbridge.limits.tasks import Once
from flowbridge.models import Caller, macaroons
from flowbridge.models.timing import Timing
from flowbridge.store.api_keys import digest as digest_of

KEEP_SECONDS = 600.0  # how long an answer is good; after that it is asked for again, and counts until that is answered
RETRY_SECONDS = 5.0  # between two questions that bring no answer
MAX_KEPT = 10_000
MAX_LOOKUPS = 16  # of unknown tokens at once: callers that are not authenticated must not delay a send
MAX_LOOKUPS_OF_ONE = 8  # of one address
LOOKUP_SECONDS = 10.0  # to wait for a turn
MAX_ASKED_AGAIN = 3  # tokens of one user
MAX_RENEWING = 16  # answers that are asked for again at once: sends need the connections to the homeserver, too

Identity = tuple[str, str | None]  # user id and device id
Seen = Callable[[str], Awaitable[Identity | None]]  # token → whose it was when it was last accepted


class Identities:
    """Asks the homeserver once per token, however many callers bring it.

    `seen`: what the store remembers of a token; it counts while the homeserver does not answer. `on_seen`: called each
    time the homeserver has said whose a token is. `on_revoked`: called with a user who ended tokens.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        seen: Seen,
        refusals: Refusals,
        *,
        on_seen: Callable[[Caller], object] = lambda _: None,
        on_revoked: Callable[[str], object] = lambda _: None,
        timing: Timing = Timing(),
        max_kept: int = MAX_KEPT,
    ) -> None:
        self._homeserver = homeserver
        self._seen = seen
        self._refusals = refusals
        self._on_seen = on_seen
        self._on_revoked = on_revoked
        self._patience = timing.patience_seconds
        self.clock = timing.clock
        self._max_kept = max_kept
        self._kept: dict[str, tuple[Identity, float]] = {}  # with the end of its validity, monotonic
        self.known = self._kept.get  # what is kept of a token, if anything is; bound, for the hot path
        self._dead = Cache[bytes, None](max_kept)  # digests: tokens may be long, and anybody can send them
        self._asking = Once[str, Identity]()
        self._learning = Once[str, Identity]()
        self._renewing = Once[str, Identity]()
        self._meeting = Once[str, None]()
        self._meet_again_at = 0.0
        self._lookups = Limiter("look-ups of unknown tokens", MAX_LOOKUPS, MAX_LOOKUPS_OF_ONE)

    async def of(self, token: str) -> Identity:
        """Whose token this is. Raises what the homeserver says, or Unavailable while it cannot be asked."""
        kept = self._kept.get(token)
        if kept is None:
            self._refusals.check(peer.address(), digest_of(token))
            return await self._learning.get(token, partial(self._learn, token))
        identity, until = kept
        now = self.clock()
        if until <= now and len(self._renewing) < MAX_RENEWING:
            self._kept[token] = (identity, now + RETRY_SECONDS)
            self._renewing.task(token, partial(self.ask, token))
        return identity

    async def _learn(self, token: str) -> Identity:
        """Ask the homeserver; while it does not answer, what was seen of the token before counts."""
        asking = self._asking.task(token, partial(self._ask_in_turn, token))
        await asyncio.wait({asking}, timeout=self._patience)
        if not asking.done():
            known = await self._before(token)
            if known is not None and not asking.done():
                return self._keep(token, known, RETRY_SECONDS)
        try:
            return await asyncio.shield(asking)
        except MatrixError as error:
            if error.status < 500 and error.status != 429:
                raise
            known = await self._before(token)
            if known is not None:
                return self._keep(token, known, RETRY_SECONDS)
            if error.status == 500 and macaroons.may_break(token):
                raise Unauthorized("the homeserver cannot read this access token") from None
            if isinstance(error, (BadGateway, GatewayTimeout)):
                raise Unavailable(f"the homeserver cannot say whose token this is: {error.error}") from None
            raise

    async def _ask_in_turn(self, token: str) -> Identity:
        """As `_ask`, for an address that may bring many unknown tokens."""
        address, digest = peer.address(), digest_of(token)
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
        self._dead.pop(digest_of(token))
        self._on_seen(Caller(*identity, token))
        return self._keep(token, identity, KEEP_SECONDS)

    async def _before(self, token: str) -> Identity | None:
        """Whose token it was when it was last accepted, unless it has been refused since."""
        if digest_of(token) in self._dead:
            return None
        try:
            return await self._seen(token)
        except Unavailable:
            return None

    def _keep(self, token: str, identity: Identity, seconds: float) -> Identity:
        if len(self._kept) >= self._max_kept and token not in self._kept:
            del self._kept[next(iter(self._kept))]
        self._kept[token] = (identity, self.clock() + seconds)
        return identity

    async def ask(self, token: str) -> Identity:
        """Ask the homeserver, whatever is kept. Raises what it says."""
        return await self._asking.get(token, partial(self._ask, token))

    async def ask_again(self, is_meant: Callable[[str], bool], *, but: str) -> None:
        """Ask about the tokens of a user (chosen by its id) that were used lately, except this one."""
        tokens = [token for token, (identity, _) in self._kept.items() if token != but and is_meant(identity[0])]
        await asyncio.gather(*map(self.ask, tokens[-MAX_ASKED_AGAIN:]), return_exceptions=True)

    async def user_of(self, token: str) -> str | None:
        """The user of a token, if it can be known; to be called before the token is ended."""
        try:
            return (await self.of(token))[0]
        except MatrixError:
            return None

    def meet(self, token: str) -> None:
        """Learn in the background whose token this is: the homeserver has just served a request with it.

        Otherwise a caller whose requests all pass through would stay a guest. It costs one look-up in ten minutes.
        """
        _, until = self._kept.get(token, (None, 0.0))
        now = self.clock()
        is_busy = token in self._learning or len(self._meeting) >= MAX_RENEWING
        if now >= until and now >= self._meet_again_at and not is_busy:
            self._meeting.task(token, partial(self._meet, token))

    async def _meet(self, token: str) -> None:
        try:
            await self.of(token)
        except MatrixError as error:
            if error.status != 401 and not isinstance(error, TooMany):  # these are the caller's trouble alone
                self._meet_again_at = self.clock() + RETRY_SECONDS

    def forget(self, token: str) -> None:
        """The homeserver does not accept this token: from now on only the homeserver can say whose it is."""
        self._kept.pop(token, None)
        self._dead.put(digest_of(token), None)

    def forget_user(self, user_id: str | None) -> None:
        """Some tokens of a user may have ended: only the homeserver can say which.

        None: of an unknown user. Then each token is asked about when it is next used, and stays good until the answer
        comes: no caller must be able to end everybody's tokens.
        """
        if user_id is None:
            self._kept.update({token: (identity, 0.0) for token, (identity, _) in self._kept.items()})
            return
        for token in [token for token, (identity, _) in self._kept.items() if identity[0] == user_id]:
            self.forget(token)
        self._on_revoked(user_id)

    async def idle(self) -> None:
        """Wait until no question is in flight."""
        while asking := {*self._asking, *self._learning, *self._renewing, *self._meeting}:
            await asyncio.wait(asking)
