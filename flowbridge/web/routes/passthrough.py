"""Everything under `/_matrix/` that no endpoint serves: passed through, streamed both ways."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import (
    Errcode,
    Forbidden,
    HomeserverError,
    MatrixError,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from flowbridge.homeserver import answers, proxy_rules
from flowbridge.homeserver.pool import Answer
from flowbridge.homeserver.relay import BODYLESS, SILENCE_SECONDS, Relayed
from flowbridge.homeserver.spool import Spool
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter, Place
from flowbridge.limits.processor import Aside
from flowbridge.models import Caller, macaroons
from flowbridge.web import parameters, streaming
from flowbridge.web.endpoint import LOG, MAX_BODY_BYTES, error_answer, forwarded_of, headers_of

MAX_JSON_BYTES = 8 * 1024 * 1024  # of a body that is no file: events have 64 KiB at most, backups of keys some MiB
MAX_LONG = 64  # bodies on the disk at a time
MAX_LONG_OF_ONE = 8
MAX_GUEST_BYTES = 64 * 1024  # of a body without a token that the homeserver accepts: to register or log in takes less
INLINE_BYTES = 16 * 1024  # a longer body is looked into outside the event loop, if it is suspicious
REFUSAL_LIMIT = 1024 * 1024  # bytes of a 401, which is looked into
FRAMING = frozenset({"content-length", "transfer-encoding"})  # either says that there is a body
MEDIA = "/_matrix/media/"
NO_REGISTRATION = "no accounts are made here: FLOWBRIDGE_REGISTRATION is off"
_OF_BODY = frozenset((b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"))
SIGNED = ("/_matrix/federation/", "/_matrix/key/")  # by the sending server, in X-Matrix
GONE = 499  # in the log: the caller did not wait for the answer


@dataclass(frozen=True, slots=True)
class _Ends:
    """Whose tokens a request may end; None: that is not known. `is_nobodys`: it has no token that is accepted."""

    user: str | None
    is_nobodys: bool


@dataclass(frozen=True, slots=True)
class _Ask:
    """What goes to the homeserver.

    `body`: on the disk when it is long; None when it is still to come, and is streamed. `bot`: an API key asks, and the
    bridge does it as itself. `ends`: tokens that it may end.
    """

    method: str
    target: str
    headers: proxy_rules.Headers
    body: bytes | Spool | None
    silence: float
    token: str | None
    bot: Caller | None
    ends: _Ends | None = None


class Relaying:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._long = Limiter("long bodies on their way", MAX_LONG, MAX_LONG_OF_ONE)
        self._places: dict[Spool, Place] = {}
        self._aside = Aside("bodies", "long bodies that are being looked into", core.guests)

    async def relay(self, request: Request) -> Response:
        """Any request. Its answer is asked for when it is called, since it is streamed."""
        scope = request.scope
        query: bytes = scope["query_string"]
        self._permit(scope["raw_path"].decode("ascii"))
        target = proxy_rules.target(scope["raw_path"].decode("ascii"), query)
        headers = headers_of(request)
        token, bot = await self._token(request, headers)
        pairs = [pair for pair in scope["headers"] if bot is None or pair[0] != b"accept-encoding"]  # its 401 is read
        has_body = request.method not in BODYLESS and not headers.keys().isdisjoint(FRAMING)
        caller = _Caller(request.receive, has_body=has_body)
        passed_on = proxy_rules.request_headers(pairs, token, has_body=has_body) + forwarded_of(request)
        body = await self._body(caller, headers, target, token) if has_body else b""
        ends = await self._ends(token) if proxy_rules.ends_tokens(request.method, target.partition("?")[0]) else None
        if isinstance(body, Spool) and "content-length" not in headers:
            passed_on.append((b"content-length", b"%d" % body.size))
        ask = _Ask(
            request.method,
            target,
            passed_on,
            body,
            SILENCE_SECONDS + proxy_rules.poll_seconds(query),
            token,
            bot,
            ends,
        )
        return _Passage(self._core, ask, caller, self._drop)

    async def _ends(self, token: str | None) -> _Ends:
        """Whose tokens a request may end that comes with this one; to be asked before it is ended."""
        if token is None:
            return _Ends(None, is_nobodys=True)
        try:
            return _Ends((await self._core.callers.identify(Credential(token))).user_id, is_nobodys=False)
        except MatrixError as error:
            return _Ends(None, is_nobodys=error.status == 401)

    async def pass_on(self, request: Request, body: bytes, caller: Caller) -> Response:
        """A request whose body has been read, and is this JSON now, as the caller; its answer as `relay` has it."""
        scope = request.scope
        kept = [pair for pair in scope["headers"] if pair[0] not in _OF_BODY]
        if caller.bot:
            kept = [pair for pair in kept if pair[0] != b"accept-encoding"]
        headers = proxy_rules.request_headers(kept, caller.token, has_body=False)
        ask = _Ask(
            request.method,
            proxy_rules.target(scope["raw_path"].decode("ascii"), scope["query_string"]),
            [*headers, (b"content-type", b"application/json")],
            body,
            SILENCE_SECONDS,
            caller.token,
            caller if caller.bot else None,
        )
        return _Passage(self._core, ask, _Caller(request.receive, has_body=False), self._drop)

    def _permit(self, path: str) -> None:
        """Raises what the settings say of a path. It is read as the homeserver, or a proxy before it, may read it."""
        settings = self._core.settings
        match [step for step in unquote(path).split("/") if step][1:]:
            case ["federation" | "key", *_] if not settings.pass_federation:
                raise NotFound("this is not served here: FLOWBRIDGE_PASS_FEDERATION is off")
            case ["client", "api", _, "register", *_] | ["client", _, "register", *_] if not settings.registration:
                raise Forbidden(NO_REGISTRATION)

    async def _token(self, request: Request, headers: Mapping[str, str]) -> tuple[str | None, Caller | None]:
        """The token to pass on, None when the caller brings nothing; and the bot if it is the bot's."""
        callers = self._core.callers
        try:
            credential = await callers.credential(headers, request.scope["query_string"])
        except Unauthorized as error:
            if error.errcode != Errcode.MISSING_TOKEN:
                raise
            return None, None
        if credential.key is None:
            return credential.token, None
        scopes.permit_all(credential.key)
        if parameters.acts_as_another(request):
            raise parameters.as_nobody_else()
        bot = await callers.identify(credential)
        return bot.token, bot

    async def _body(
        self, caller: "_Caller", headers: Mapping[str, str], target: str, token: str | None
    ) -> bytes | Spool | None:
        """The body, after a look into it; None when it is a file, which is streamed.

        A long one is read only for a caller whose token the homeserver accepts, or from another server, which signs it.
        Raises BadRequest, TooLarge, TooMany, Unavailable; Unauthorized, or what the homeserver says of the token.
        """
        if target.startswith(MEDIA):
            return None
        length = headers.get("content-length", "0")
        if len(length) > 9 or int(length) > MAX_JSON_BYTES:
            raise _too_long()
        body = await caller.whole(MAX_GUEST_BYTES)
        if body is None and not target.startswith(SIGNED):
            await self._authenticate(token)
            body = await caller.whole(MAX_BODY_BYTES)
        if body is not None:
            await self._check(body)
            return body
        place = self._long.hold(peer.who())
        spool = Spool()
        self._places[spool] = place
        try:
            async for piece in caller:
                await spool.write(piece)
                if spool.size > MAX_JSON_BYTES:
                    raise _too_long()
            await self._check(await spool.read())
        except BaseException:
            self._drop(spool)
            raise
        return spool

    async def _authenticate(self, token: str | None) -> None:
        if not peer.is_guest():  # an API key, or a token that is known
            return
        if token is None:
            raise Unauthorized(
                f"a body of more than {MAX_GUEST_BYTES} bytes is read only with an access token",
                errcode=Errcode.MISSING_TOKEN,
            )
        await self._core.callers.identify(Credential(token))

    async def _check(self, body: bytes) -> None:
        if len(body) > MAX_GUEST_BYTES or (len(body) > INLINE_BYTES and proxy_rules.is_suspicious(body)):
            await self._aside.run(proxy_rules.check_body, body)
        else:
            proxy_rules.check_body(body)

    def _drop(self, spool: Spool) -> None:
        spool.close()
        if place := self._places.pop(spool, None):
            place.free()


def _too_long() -> TooLarge:
    return TooLarge(f"the body is longer than {MAX_JSON_BYTES} bytes")


class _Passage(Response):
    """An answer that is asked for while it is given. `status_code`: what the caller got, or 499 if it went away."""

    def __init__(self, core: Core, ask: _Ask, caller: "_Caller", drop: Callable[[Spool], None]) -> None:
        # the base class would want the body
        self.status_code = GONE
        self._relay = core.relay
        self._callers = core.callers
        self._ask = ask
        self._caller = caller
        self._drop = drop
        self._spool = ask.body if isinstance(ask.body, Spool) else None
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._send = scope, send
        exchange = asyncio.create_task(self._pass())
        leaving = asyncio.create_task(self._caller.left())
        stopping = asyncio.create_task(self._relay.stopping.wait())
        revoked = asyncio.create_task(self._revoked())
        is_here = True
        try:
            await self._wait(exchange, leaving, stopping, revoked)
            is_here = not leaving.done()
        except asyncio.CancelledError:  # the server has waited for as long as it does when it stops
            is_here = False
            streaming.cut(scope, "the bridge stops")
        finally:
            why = revoked.result() if revoked.done() else Unavailable("the bridge stops")
            tasks = {exchange, leaving, stopping, revoked}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._free()
        ends = self._ask.ends
        if ends is not None and not ends.is_nobodys and not self._started and _may_be_done(exchange):
            self._callers.identities.forget_user(ends.user)
        if not exchange.cancelled():
            await self._judge(exchange.exception())
        elif is_here:
            await self._judge(why)

    async def _wait(
        self,
        exchange: "asyncio.Task[None]",
        leaving: "asyncio.Task[None]",
        stopping: "asyncio.Task[bool]",
        revoked: "asyncio.Task[MatrixError]",
    ) -> None:
        """Until the exchange is over, or there is no reason to go on with it."""
        await asyncio.wait({exchange, leaving, stopping, revoked}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and (self._started or self._ask.method not in BODYLESS):
            await asyncio.wait({exchange, leaving, revoked}, return_when=asyncio.FIRST_COMPLETED)

    async def _revoked(self) -> MatrixError:
        """Until the API key that asks is revoked, and what its caller hears then: its long poll would go on."""
        bot = self._ask.bot
        if bot is not None and bot.key is not None:
            return await self._callers.revoked(bot.key)
        never: asyncio.Future[MatrixError] = asyncio.get_running_loop().create_future()
        return await never

    async def _pass(self) -> None:
        ask = self._ask
        body = ask.body.chunks() if isinstance(ask.body, Spool) else self._caller if ask.body is None else ask.body
        await self._introduce()
        async with self._relay.open(ask.method, ask.target, ask.headers, body, silence=ask.silence) as answer:
            self._free()
            if _is_strange(answer):
                raise answers.error(Answer(answer.status, tuple(answer.headers), b""))
            if answer.status >= 400 and answer.header(b"content-length") == "0" and ask.method != "HEAD":
                raise _wordless(answer.status)
            if answer.status == 500 and ask.token is not None and ask.bot is None and macaroons.may_break(ask.token):
                await self._callers.identify(Credential(ask.token))  # a 401, when it is the token that it fails at
            refusal = await self._refusal(answer)
            await self._begin(answer)
            if refusal is not None:
                await streaming.give(self._send, refusal)
            else:
                async for chunk in answer.chunks():
                    await streaming.give(self._send, chunk)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _introduce(self) -> None:
        """Learn whose token this is where its address has its share of what is not known, to count it as its user's.

        Behind one address there may be hundreds of users, each with a long poll.
        """
        if self._ask.token is not None and peer.is_guest() and not self._relay.has_room():
            with contextlib.suppress(MatrixError):
                await self._callers.identify(Credential(self._ask.token))

    def _free(self) -> None:
        """The body's place on the disk, once the homeserver answers or nobody waits for that any more."""
        if self._spool is not None:
            self._drop(self._spool)
            self._spool = None

    async def _refusal(self, answer: Relayed) -> bytes | None:
        """The body of a 401 to a token, after a look into it; None for any other answer.

        It may be the first step of an interactive authentication, which says nothing about the token.
        """
        if answer.status != 401 or self._ask.token is None:
            return None
        body = await answer.read(REFUSAL_LIMIT)
        error = answers.error(Answer(401, tuple(answer.headers), body))
        if isinstance(error, HomeserverError) and answers.refused(error).kind == "token":
            if self._ask.bot is not None:
                raise self._callers.refused(self._ask.bot, error)
            self._callers.identities.forget(self._ask.token)
        return body

    async def _begin(self, answer: Relayed) -> None:
        if self._ask.token is not None and self._ask.bot is None and answer.status < 300:
            self._callers.identities.meet(self._ask.token)  # what waits for its user may go on, too
        if self._ask.ends is not None and answer.status < 400:
            self._callers.identities.forget_user(self._ask.ends.user)
        self.status_code = answer.status
        self._started = True
        headers = proxy_rules.answer_headers(answer.headers, answer.status)
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def _judge(self, error: BaseException | None) -> None:
        """What is still to be said when the exchange is over."""
        if error is None:
            return
        if isinstance(error, ClientDisconnect):
            self.status_code = GONE
        elif isinstance(error, MatrixError) and not self._started:
            await self._refuse(error)
        else:
            streaming.broken(self._scope, error)

    async def _refuse(self, error: MatrixError) -> None:
        self._scope.setdefault(LOG, {}).update(errcode=str(error.errcode), error=error.error[:300])
        response = error_answer(error)
        self.status_code = response.status_code
        await response(self._scope, _nothing, self._send)


class _Caller:
    """The caller's side: its body, piece by piece, and whether it is still there."""

    def __init__(self, receive: Receive, *, has_body: bool) -> None:
        self._receive = receive
        self._early = bytearray()
        self._read = asyncio.Event()
        if not has_body:
            self._read.set()

    def __aiter__(self) -> "_Caller":
        return self

    async def __anext__(self) -> bytes:
        if self._early:
            early, self._early = self._early, bytearray()
            return bytes(early)
        while not self._read.is_set():
            if piece := await self._more():
                return piece
        raise StopAsyncIteration

    async def whole(self, limit: int) -> bytes | None:
        """The body; None when it is longer than `limit` bytes, and still to be given piece by piece."""
        while not self._read.is_set() and len(self._early) <= limit:
            self._early += await self._more()
        return bytes(self._early) if len(self._early) <= limit else None

    async def _more(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if not message.get("more_body", False):
            self._read.set()
        return bytes(message.get("body", b""))

    async def left(self) -> None:
        """Until it has gone away; that is only looked at when its body is there."""
        await self._read.wait()
        await streaming.left(self._receive)


def _is_strange(answer: Relayed) -> bool:
    """Whether something in between says this: a homeserver's own HTML pages have other statuses."""
    is_page = answer.header(b"content-type").startswith("text/html")
    return answer.status > 599 or (is_page and (answer.status in (404, 405) or answer.status >= 500))


def _wordless(status: int) -> MatrixError:
    error = MatrixError(f"the homeserver answers {status}, and says no more", status=status)
    error.sent = status >= 500
    return error


def _may_be_done(exchange: "asyncio.Task[None]") -> bool:
    """Whether the homeserver may have done what it was asked for, although its answer has not begun."""
    error = None if exchange.cancelled() else exchange.exception()
    return error.sent if isinstance(error, MatrixError) else True


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
