"""The usual request to a hook: without ASGI's messages, Request and Response.

It arrived in one piece, at a hook's own path, and its sender is known: nearly all are like that. What is decided is
decided by the functions that web/routes/webhooks.py calls. At the first that refuses before it was admitted, the
request begins in the ordinary way; any error after that is told by the ordinary way, which it is handed to.
"""

import asyncio
import re
import time
from collections.abc import Mapping

from flowbridge import log, metrics
from flowbridge.bridge import Core
from flowbridge.errors import MatrixError
from flowbridge.hooks.known import PREFIX, Known
from flowbridge.hooks.receiving import Done
from flowbridge.hooks.signatures import Asked
from flowbridge.limits import peer
from flowbridge.limits.proxies import Proxies
from flowbridge.web import answering
from flowbridge.web.masking import MASK
from flowbridge.web.routes.webhooks import SMALL_BYTES, answer_to, count
from flowbridge.web.usual import Connection, Usual

START = b"/hooks/"
# What else may be behind a name are the paths of its administration, or a token that its owner has chosen.
_PATH = re.compile(rb"/hooks/([^/{}%%]{1,255})(?:/(%b[^/{}%%]{1,255}))?" % PREFIX.encode())


class UsualHooks:
    """Recognises the usual requests to hooks."""

    def __init__(self, core: Core) -> None:
        self.admission = core.admission
        self.receiving = core.receiving
        self.limit = core.settings.max_hook_bytes
        self.proxies = Proxies(core.settings.trusted_proxies) or None

    def take(self, connection: Connection, headers: dict[bytes, bytes]) -> "UsualHook | None":
        """Begin with the request that has arrived on a connection. None, and nothing has happened: it is not usual."""
        started = time.perf_counter()
        if not connection.raw_path.startswith(START):
            return None
        path = _PATH.fullmatch(connection.raw_path)
        if path is None or b"prefer" in headers:
            return None
        name, token = path[1].decode(), (path[2] or b"").decode()
        if connection.method == "PUT" and not token:
            return None
        body = connection.body()
        if len(body) >= min(SMALL_BYTES, self.limit):
            return None
        texts = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers.items()}
        try:
            known = self.admission.at_once(name, Asked(texts, token), body)
        except MatrixError:  # it is raised, and told, again
            return None
        if known is None:
            return None
        hook = UsualHook(self, connection, started, headers, known, texts, body)
        hook.begin(f"/hooks/{name}/{MASK}" if token else f"/hooks/{name}")
        return hook


class UsualHook(Usual):
    """Until its answer."""

    is_begun = True
    _task: asyncio.Task[None]

    def __init__(
        self,
        hooks: UsualHooks,
        connection: Connection,
        started: float,
        raw_headers: Mapping[bytes, bytes],
        known: Known,
        headers: Mapping[str, str],
        body: bytes,
    ) -> None:
        super().__init__(connection, started, raw_headers, hooks.proxies)
        self._hooks = hooks
        self.known = known
        self._headers = headers
        self._body = body

    def begin(self, path: str) -> None:
        """`path`: as it may be logged."""
        self._task = asyncio.get_running_loop().create_task(self._receive(path))

    async def _receive(self, path: str) -> None:
        peer.enter({"client": (self.client, 0)} if self.client else {})
        peer.identified(f"key {self.known.hook.owner}")
        try:
            done = await self._hooks.receiving.receive(self.known.hook, self._headers, self._body, self._hooks.limit)
        except Exception as error:
            self.error = error
            self._connection.go_on(self)
            return
        try:
            self._answer(done, path)
        except Exception as error:  # it is accepted: its sender must not wait for ever
            log.error("internal_error", exc_info=error, path=path)
            self.transport.abort()

    def _answer(self, done: Done, path: str) -> None:
        count(done)
        response = answer_to(done, done.source, is_async=False)
        body = bytes(response.body)
        answering.answer(self, response.status_code, response.raw_headers, body)  # unless the sender has hung up
        metrics.count(metrics.requests, str(response.status_code))
        log.info(
            "request",
            method=self.scope["method"],
            path=path,
            status=response.status_code,
            ms=round((time.perf_counter() - self.started) * 1000, 1),
            client=self.client,
            key=self.known.hook.owner,
            **({"user": done.user_id, "delivery": done.delivery} if done.delivery else {}),
        )
