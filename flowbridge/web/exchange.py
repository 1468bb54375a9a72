"""One exchange with the homeserver that passes through: the caller's body goes up, the answer comes down."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import HomeserverError, MatrixError, Unavailable
from flowbridge.homeserver import answers, proxy_rules
from flowbridge.homeserver.pool import Answer
from flowbridge.homeserver.relay import BODYLESS, Body, Relayed
from flowbridge.limits import peer
from flowbridge.models import Caller, macaroons
from flowbridge.web.streaming import StreamedAnswer

REFUSAL_LIMIT = 1024 * 1024  # bytes of a 401, which is inspected
GONE = 499  # in the log: the caller did not wait for the answer


class Incoming:
    """The body of the caller's request: once, piece by piece or, up to a limit, as a whole. Raises ClientDisconnect."""

    def __init__(self, request: Request, *, has_body: bool) -> None:
        self._pieces = request.stream()
        self._early = bytearray()
        self.ended = asyncio.Event()
        if not has_body:
            self.ended.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield bytes(self._early)
        self._early.clear()
        async for piece in self._pieces:
            yield piece
        self.ended.set()

    async def whole(self, limit: int) -> bytes | None:
        """The body; None when it is longer than `limit` bytes. Then a larger limit or an iteration may follow."""
        if len(self._early) <= limit:
            async for piece in self._pieces:
                self._early += piece
                if len(self._early) > limit:
                    return None
            self.ended.set()
        return bytes(self._early) if self.ended.is_set() else None


@dataclass(frozen=True, slots=True)
class Ends:
    """Whose tokens a request may end; None when that is unknown. `is_nobodys`: it has no valid token."""

    user: str | None
    is_nobodys: bool


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request to the homeserver. `bot`: the bridge's account, which acts for an API key."""

    method: str
    target: str
    headers: proxy_rules.Headers
    body: Body
    silence: float
    token: str | None
    bot: Caller | None
    ends: Ends | None = None


class Exchange(StreamedAnswer):
    """The homeserver's answer to `request`, which is made while the caller waits.

    `held`: the resources of its body, released once the homeserver answers, or the exchange ends without that.
    """

    def __init__(self, core: Core, request: Outgoing, incoming: Incoming, held: contextlib.ExitStack) -> None:
        super().__init__(GONE, core.timing.answer_stall_seconds)
        self._relay = core.relay
        self._callers = core.callers
        self._request = request
        self._incoming = incoming
        self._held = held

    async def write(self) -> None:
        try:
            await self._pass()
        except BaseException as error:
            ends, may_be_done = self._request.ends, error.sent if isinstance(error, MatrixError) else True
            if ends is not None and not ends.is_nobodys and not self.started and may_be_done:
                self._callers.identities.forget_user(ends.user)
            raise

    async def _pass(self) -> None:
        request = self._request
        await self._introduce()
        async with self._relay.open(
            request.method, request.target, request.headers, request.body, silence=request.silence
        ) as answer:
            self._held.close()
            await self._check(answer)
            refusal = await self._refusal(answer)
            if request.token is not None and request.bot is None and answer.status < 300:
                self._callers.identities.meet(request.token)  # deliveries that wait for a token of its user go on
            if request.ends is not None and answer.status < 400:
                self._callers.identities.forget_user(request.ends.user)
            await self.start(answer.status, proxy_rules.answer_headers(answer.headers, answer.status))
            if refusal is not None:
                await self.give(refusal)
            else:
                async for piece in answer.chunks():
                    await self.give(piece)

    async def _introduce(self) -> None:
        """Identify an unknown token when its address is at its share, so that the exchange counts as its user's.

        Behind one address there may be hundreds of users, each with a long poll.
        """
        if self._request.token is not None and peer.is_guest() and not self._relay.has_room():
            with contextlib.suppress(MatrixError):
                await self._callers.identify(Credential(self._request.token))

    async def _check(self, answer: Relayed) -> None:
        """Raise what the caller hears in place of an answer that is not a homeserver's, or explains nothing."""
        status, token = answer.status, self._request.token
        is_page = answer.header(b"content-type").startswith("text/html")
        # A proxy in between says this: a homeserver's own HTML pages have other statuses.
        if status > 599 or (is_page and (status in (404, 405) or status >= 500)):
            raise answers.error(Answer(status, tuple(answer.headers), b""))
        if status >= 400 and answer.header(b"content-length") == "0" and self._request.method != "HEAD":
            error = MatrixError(f"the homeserver answers {status}, and says no more", status=status)
            error.sent = status >= 500
            raise error
        if status == 500 and token is not None and self._request.bot is None and macaroons.may_break(token):
            await self._callers.identify(Credential(token))  # raises a 401 when the token is the cause

    async def _refusal(self, answer: Relayed) -> bytes | None:
        """The body of a 401 to a token, after a look into it; None for any other answer.

        It may be the first step of an interactive authentication, which says nothing about the token.
        """
        if answer.status != 401 or self._request.token is None:
            return None
        body = await answer.read(REFUSAL_LIMIT)
        error = answers.error(Answer(401, tuple(answer.headers), body))
        if isinstance(error, HomeserverError) and answers.refused(error).kind == "token":
            if self._request.bot is not None:
                raise self._callers.refused(self._request.bot, error)
            self._callers.identities.forget(self._request.token)
        return body

    def interruptions(self) -> list[Coroutine[Any, Any, MatrixError | None]]:
        bot = self._request.bot
        revoked = [self._callers.revoked(bot.key)] if bot is not None and bot.key is not None else []
        return [*revoked, self._stop()]

    async def _stop(self) -> MatrixError:
        """Wait until the bridge stops. Only a long poll ends then; whatever else is in flight may be completed."""
        await self._relay.stopping.wait()
        if self.started or self._request.method not in BODYLESS:
            await asyncio.Event().wait()
        return Unavailable("the bridge stops")

    async def caller_left(self, receive: Receive) -> None:
        await self._incoming.ended.wait()  # until then, `Incoming` is the one to receive
        await super().caller_left(receive)

    async def release(self) -> None:
        self._held.close()
