"""The last requests of each hook, kept for its owner: encrypted, bounded, and without anybody waiting for it.

A request is what a template was given, so that another one can be tried on it.
"""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from flowbridge import log
from flowbridge.models.hooks import Hook
from flowbridge.store import Database, StoreFull, StoreUnavailable, clock, hooks

MAX_BODY = 64 * 1024  # bytes of a body that are kept
MAX_HEADERS = 8 * 1024  # bytes of headers
MAX_WAITING = 8 * 1024 * 1024  # bytes of all that are not written yet
_SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-gitlab-token", "x-api-key"})


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a hook. `headers`: by lower-case name. `body`: as text; `is_text`: it is not meant as JSON.

    `outcome`: what was done with it, for its owner. `size`: of the body, in bytes; `is_cut`: it was longer than what is
    here. `id`, `received_at` (ms): once it is kept.
    """

    headers: Mapping[str, str]
    body: str
    is_text: bool = False
    outcome: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    is_cut: bool = False
    received_at: int = 0
    id: str = ""


class Requests:
    """For one event loop."""

    def __init__(self, database: Database, *, max_waiting: int = MAX_WAITING) -> None:
        self._database = database
        self._max_waiting = max_waiting
        self._fernet: Fernet
        self._waiting: dict[str, deque[Request]] = {}  # by hook: no more than are kept of it
        self._bytes = 0
        self._writing = asyncio.Lock()

    def open(self, fernet: Fernet) -> None:
        self._fernet = fernet

    def note(self, hook: Hook, request: Request) -> None:
        """Keep it among the last ones of this hook. Where too much waits for the store, it is not kept."""
        cost = min(len(request.body), MAX_BODY) + MAX_HEADERS
        if not hook.keep_requests or self._bytes + cost > self._max_waiting:
            return
        mine = self._waiting.get(hook.name)
        if mine is None or mine.maxlen != hook.keep_requests:
            mine = self._waiting[hook.name] = deque(mine or (), maxlen=hook.keep_requests)
        if len(mine) < hook.keep_requests:
            self._bytes += cost
        mine.append(_bounded(request))

    async def flush(self) -> None:
        """Write what was noted so far. What the store does not take now is not kept."""
        async with self._writing:  # also for who finds nothing new: what is being written should be there
            taken, self._waiting, self._bytes = self._waiting, {}, 0
            if not taken or self._database.trouble or self._database.missing:
                return
            rows = await asyncio.to_thread(self._rows, taken)
            most = {name: mine.maxlen or 0 for name, mine in taken.items()}
            try:
                await self._database.run(partial(hooks.keep, rows=rows, most=most), lingers=True, alone=True)
            except (StoreFull, StoreUnavailable) as error:
                log.warning("hook_requests_lost", requests=len(rows), error=error.error)

    async def of(self, name: str) -> list[Request]:
        """The kept ones of a hook, the newest first. Raises Unavailable."""
        await self.flush()
        return self._opened(await self._database.read(partial(hooks.requests, name=name)))

    async def one(self, name: str, id_: str) -> Request | None:
        """Raises Unavailable."""
        await self.flush()
        if not id_.isascii() or not id_.isdigit() or len(id_) > 18:
            return None
        found = self._opened(await self._database.read(partial(hooks.requests, name=name, id_=int(id_))))
        return found[0] if found else None

    def _opened(self, rows: list[dict[str, Any]]) -> list[Request]:
        return [request for request in (opened(row, self._fernet) for row in rows) if request is not None]

    def _rows(self, taken: Mapping[str, "deque[Request]"]) -> list[dict[str, Any]]:
        return [sealed(name, request, self._fernet) for name, mine in taken.items() for request in mine]


def sealed(name: str, request: Request, fernet: Fernet) -> dict[str, Any]:
    """As the store keeps it."""
    kept = [dict(request.headers), request.body, request.is_text, request.size, request.is_cut]
    return {
        "hook": name,
        "received_at": request.received_at,
        "request": fernet.encrypt(json.dumps(kept).encode()).decode(),
        "outcome": json.dumps(dict(request.outcome)),
    }


def opened(row: Mapping[str, Any], fernet: Fernet) -> Request | None:
    """None for one that was written with another secret key."""
    try:
        headers, body, is_text, size, is_cut = json.loads(fernet.decrypt(row["request"].encode()))
    except InvalidToken:
        log.warning("hook_request_unreadable", hook=row["hook"], hint="FLOWBRIDGE_SECRET_KEY has been changed since")
        return None
    outcome = json.loads(row["outcome"])
    return Request(headers, body, is_text, outcome, size, is_cut, row["received_at"], str(row["id"]))


def _bounded(request: Request) -> Request:
    """Within what is kept of one, and without what its sender proves itself with."""
    body = request.body
    size, is_cut = len(body), len(body) > MAX_BODY
    if is_cut or not body.isascii():
        raw = body.encode("utf-8", "replace")
        size, is_cut = len(raw), len(raw) > MAX_BODY
        body = raw[:MAX_BODY].decode("utf-8", "ignore") if is_cut else raw.decode()
    headers: dict[str, str] = {}
    left = MAX_HEADERS
    for name, value in request.headers.items():
        left -= len(name) + len(value)
        if left >= 0 and name.lower() not in _SECRET_HEADERS:
            headers[name.lower()] = value
    return Request(headers, body, request.is_text, request.outcome, request.size or size, is_cut, clock.now_ms())
