"""Everything under `/_matrix/` that no endpoint serves: who may pass what through to the homeserver."""

import contextlib
from collections.abc import Mapping
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import Errcode, Forbidden, MatrixError, NotFound, TooLarge, Unauthorized
from flowbridge.homeserver import large_json, paths, proxy_rules
from flowbridge.homeserver.relay import BODYLESS
from flowbridge.homeserver.spool import Spool
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.limits.processor import Aside
from flowbridge.models import Caller
from flowbridge.web import parameters
from flowbridge.web.endpoint import MAX_BODY_BYTES, forwarded_of, headers_of
from flowbridge.web.exchange import Ends, Exchange, Incoming, Outgoing

MAX_JSON_BYTES = 8 * 1024 * 1024  # of a body that is not a file: events have 64 KiB at most, key backups some MiB
MAX_LONG = 64  # bodies on the disk at a time
MAX_LONG_OF_ONE = 8
MAX_GUEST_BYTES = 64 * 1024  # of a body without a valid token: to register or log in takes less
INLINE_BYTES = 16 * 1024  # a longer body is inspected outside the event loop, if it is suspicious
FRAMING = frozenset({"content-length", "transfer-encoding"})  # either says that there is a body
MEDIA = "/_matrix/media/"
UPLOADS = frozenset(f"{MEDIA}{version}/upload" for version in ("v3", "r0", "v1"))  # open to any key, as POST /media is
NO_REGISTRATION = "no accounts are made here: FLOWBRIDGE_REGISTRATION is off"
SIGNED = ("/_matrix/federation/", "/_matrix/key/")  # by the sending server, in X-Matrix
_OF_BODY = frozenset((b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"))


class Relaying:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._long = Limiter("long bodies on their way", MAX_LONG, MAX_LONG_OF_ONE)
        self._aside = Aside("bodies", "long bodies that are being looked into", core.guests)
        self._silence = core.timing.answer_silence_seconds

    async def relay(self, request: Request) -> Response:
        """Any request. The exchange with the homeserver takes place while its answer is given."""
        path, query = request.scope["raw_path"].decode("ascii"), request.scope["query_string"]
        self._permit(path)
        target = proxy_rules.target(path, query)
        headers = headers_of(request)
        token, bot = await self._token(request, headers)
        devices = self._core.devices
        if (
            devices is not None
            and request.method == "GET"
            and target.startswith(paths.SYNC)
            and devices.account_with(token) is not None
        ):
            assert token is not None
            return await self._sync(target, query, token)
        if devices is not None and token and request.method == "POST" and paths.is_key_upload(target):
            await self._keys_of_a_client(token)
        has_body = request.method not in BODYLESS and not headers.keys().isdisjoint(FRAMING)
        incoming = Incoming(request, has_body=has_body)
        passed_on = proxy_rules.request_headers(_headers(request, bot), token, has_body=has_body)
        passed_on += forwarded_of(request)
        with contextlib.ExitStack() as held:
            body = await self._body(incoming, headers, target, token, held) if has_body else b""
            if isinstance(body, Spool) and "content-length" not in headers:
                passed_on.append((b"content-length", b"%d" % body.size))
            outgoing = Outgoing(
                request.method,
                target,
                passed_on,
                body.chunks() if isinstance(body, Spool) else body,
                self._silence + proxy_rules.poll_seconds(query),
                token,
                bot,
                await self._ends(request.method, target, token),
            )
            return Exchange(self._core, outgoing, incoming, held.pop_all())

    async def _keys_of_a_client(self, token: str) -> None:
        """A client is about to give its device keys of its own: the bridge does not encrypt with it from here on."""
        devices = self._core.devices
        with contextlib.suppress(Unauthorized):
            caller = await self._core.callers.identify(Credential(token))
            if devices is not None and caller.device_id is not None and token != devices.keeper.token:
                await devices.callers.forget(caller.user_id, caller.device_id)

    async def _sync(self, target: str, query: bytes, token: str) -> Response:
        """A sync with the token of the bridge's own device, without the messages for that: they are kept for it."""
        seconds = self._silence + proxy_rules.poll_seconds(query)
        body, value = await self._core.homeserver.poll(target, token=token, seconds=seconds)
        rest = {name: part for name, part in value.items() if name != "to_device"} if isinstance(value, dict) else value
        answer = await large_json.aside(len(body), large_json.write, rest)
        return Response(answer, 200, media_type="application/json")

    async def pass_on(self, request: Request, body: bytes, caller: Caller) -> Response:
        """A request whose body has been read and is this JSON now, as the caller. Its answer is as `relay` gives it."""
        scope, bot = request.scope, caller if caller.bot else None
        kept = [pair for pair in _headers(request, bot) if pair[0] not in _OF_BODY]
        headers = proxy_rules.request_headers(kept, caller.token, has_body=False)
        target = proxy_rules.target(scope["raw_path"].decode("ascii"), scope["query_string"])
        headers.append((b"content-type", b"application/json"))
        outgoing = Outgoing(request.method, target, headers, body, self._silence, caller.token, bot)
        return Exchange(self._core, outgoing, Incoming(request, has_body=False), contextlib.ExitStack())

    def _permit(self, path: str) -> None:
        """Raise what the settings say of a path. It is read as the homeserver, or a proxy before it, may read it."""
        settings = self._core.settings
        match [step for step in unquote(path).split("/") if step][1:]:
            case ["federation" | "key", *_] if not settings.pass_federation:
                raise NotFound("this is not served here: FLOWBRIDGE_PASS_FEDERATION is off")
            case ["client", "api", _, "register", *_] | ["client", _, "register", *_] if not settings.registration:
                raise Forbidden(NO_REGISTRATION)

    async def _token(self, request: Request, headers: Mapping[str, str]) -> tuple[str | None, Caller | None]:
        """The token to pass on, None when the caller has none; and the bot if it is the bot's."""
        callers = self._core.callers
        try:
            credential = await callers.credential(headers, request.scope["query_string"])
        except Unauthorized as error:
            if error.errcode != Errcode.MISSING_TOKEN:
                raise
            return None, None
        if credential.key is None:
            return credential.token, None
        if request.method != "POST" or request.scope["raw_path"].decode("ascii") not in UPLOADS:
            scopes.permit_all(credential.key)
        if parameters.acts_as_another(request):
            raise parameters.as_nobody_else()
        bot = await callers.identify(credential)
        return bot.token, bot

    async def _body(
        self, incoming: Incoming, headers: Mapping[str, str], target: str, token: str | None, held: contextlib.ExitStack
    ) -> bytes | Spool | Incoming:
        """The body after an inspection, a long one on the disk until `held` is closed; or a file, still to be streamed.

        A long one is read only for a caller whose token the homeserver accepts, or from another server, which signs it.
        Raises BadRequest, TooLarge, TooMany, Unavailable; Unauthorized, or what the homeserver says of the token.
        """
        if target.startswith(MEDIA):
            return incoming
        length = headers.get("content-length", "0")
        if len(length) > 9 or int(length) > MAX_JSON_BYTES:
            raise _too_long()
        body = await incoming.whole(MAX_GUEST_BYTES)
        if body is None and not target.startswith(SIGNED):
            await self._authenticate(token)
            body = await incoming.whole(MAX_BODY_BYTES)
        if body is not None:
            await self._inspect(body)
            return body
        held.enter_context(self._long.hold(peer.who()))
        spool = Spool()
        held.callback(spool.close)
        async for piece in incoming:
            await spool.write(piece)
            if spool.size > MAX_JSON_BYTES:
                raise _too_long()
        await self._inspect(await spool.read())
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

    async def _inspect(self, body: bytes) -> None:
        if len(body) > MAX_GUEST_BYTES or (len(body) > INLINE_BYTES and proxy_rules.is_suspicious(body)):
            await self._aside.run(proxy_rules.check_body, body)
        else:
            proxy_rules.check_body(body)

    async def _ends(self, method: str, target: str, token: str | None) -> Ends | None:
        """Whose tokens the request may end, which has to be asked before it does; None when it ends none."""
        if not proxy_rules.ends_tokens(method, target.partition("?")[0]):
            return None
        if token is None:
            return Ends(None, is_nobodys=True)
        try:
            return Ends((await self._core.callers.identify(Credential(token))).user_id, is_nobodys=False)
        except MatrixError as error:
            return Ends(None, is_nobodys=error.status == 401)


def _headers(request: Request, bot: Caller | None) -> proxy_rules.Headers:
    """The request's headers. The bot's answer is not to be compressed, since the bridge reads a 401 to it."""
    return [pair for pair in request.scope["headers"] if bot is None or pair[0] != b"accept-encoding"]


def _too_long() -> TooLarge:
    return TooLarge(f"the body is longer than {MAX_JSON_BYTES} bytes")
