"""The one use case: an event comes in, is checked, and goes to its room.

Nothing is asked of the homeserver before the payload is known to be right.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

from flowbridge import canonical, payload
from flowbridge.callers import Callers, Credential
from flowbridge.catalogue import Catalogue, Entry
from flowbridge.errors import BadContent, MatrixError, Problem, TooLarge
from flowbridge.homeserver import Homeserver, dialect
from flowbridge.models import Caller, Event, Payload, Surface

P = ParamSpec("P")
T = TypeVar("T")

MAX_CONTENT_BYTES = 62_000  # of the 65,536 that a whole event may have (specification, "Size limits")
LARGE_BYTES = 16_384  # a larger body is read and checked outside the event loop
ALIAS_SECONDS = 600.0
MAX_ALIASES = 10_000


class Intake:
    def __init__(self, catalogue: Catalogue, callers: Callers, homeserver: Homeserver) -> None:
        self.catalogue = catalogue
        self._callers = callers
        self._homeserver = homeserver
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-check")
        self._aliases: dict[tuple[str, str], tuple[asyncio.Task[str], float]] = {}

    def read(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """Any of the body shapes. Raises a 4xx MatrixError."""
        return payload.read(body, content_type, event_type, self.catalogue.required(event_type), surface)

    async def receive(self, body: bytes, content_type: str, event_type: str, surface: Surface) -> Payload:
        """As `read`; a large body does not hold up the event loop."""
        if len(body) < LARGE_BYTES:
            return self.read(body, content_type, event_type, surface)
        found = await self._aside(self.read, body, content_type, event_type, surface)
        return replace(found, size=len(body))

    async def check(self, room: str, event_type: str, found: Payload, *, as_state: bool) -> Event:
        """The event that would be sent. Raises BadContent with every problem, or TooLarge.

        `as_state`: the path says that it is a state event. Else the catalogue does, or the body by a state key.
        """
        if found.size < LARGE_BYTES:
            return self._check(room, event_type, found, as_state)
        return await self._aside(self._check, room, event_type, found, as_state)

    def _check(self, room: str, event_type: str, found: Payload, as_state: bool) -> Event:
        entry = self.catalogue.select(event_type, found.content)
        kind = entry.kind if entry else None
        is_state = as_state or kind == "state" or (kind is None and found.state_key is not None)
        state_key = (found.state_key or "") if is_state else None
        if not isinstance(found.content, dict):
            raise BadContent([Problem("", "must be a JSON object", canonical.RULE)])
        content = canonical.write(found.content)
        if len(content) > MAX_CONTENT_BYTES:
            raise TooLarge(
                f"the content is {len(content)} bytes of canonical JSON: an event holds at most {MAX_CONTENT_BYTES}"
            )
        if state_key:
            dialect.identifier(state_key, "state key")
        if entry is not None and (problems := _problems(entry, found, state_key, as_state)):
            raise BadContent(problems)
        return Event(room, event_type, content, state_key)

    async def accept(self, credential: Credential, event: Event, txn_id: str | None) -> tuple[Caller, str]:
        """Send a checked event as the caller. Returns the caller and the event id."""
        caller = await self._callers.identify(credential)
        try:
            room_id = await self.room_id(caller, event.room)
            return caller, await self._homeserver.send(caller.token, event, room_id, txn_id or new_txn_id())
        except MatrixError as error:
            self._aliases.pop((caller.user_id, event.room), None)
            raise self._callers.refused(caller, error) from None

    async def room_id(self, caller: Caller, room: str) -> str:
        """The room id of an alias, which the caller joins once; a room id as it is."""
        if not room.startswith("#"):
            return room
        key = (caller.user_id, room)
        joining, until = self._aliases.get(key, (None, 0.0))
        if joining is None or until < time.monotonic():
            joining = asyncio.ensure_future(self._homeserver.join(caller.token, room))
            if len(self._aliases) >= MAX_ALIASES:
                del self._aliases[next(iter(self._aliases))]
            self._aliases[key] = (joining, time.monotonic() + ALIAS_SECONDS)
        return await asyncio.shield(joining)

    async def _aside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work in a thread: in one only, so that fifty hostile bodies share its time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **kwargs))


def _problems(entry: Entry, found: Payload, state_key: str | None, as_state: bool) -> list[Problem]:
    problems = []
    if not (as_state and not found.content and entry.clears_by_empty):
        problems = entry.problems(found.content)
    if entry.kind == "message":
        if as_state:
            message = f"{entry.event_type} is a message event: send it with /send/"
            problems = [Problem("", message, entry.event_type), *problems]
        elif found.state_key is not None:
            message = f"{entry.event_type} is a message event and has no state key"
            problems = [Problem("/state_key", message, entry.event_type), *problems]
    elif state_key is not None and (problem := entry.state_key_problem(state_key)):
        problems = [*problems, problem]
    return problems


def new_txn_id() -> str:
    return secrets.token_urlsafe(16)
