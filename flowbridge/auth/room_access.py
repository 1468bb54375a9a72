"""The room that is meant, by its id or by an alias, and whether an API key is for it.

A key's scope and a request may call one room by different names: its id, or one of its aliases.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from flowbridge import log
from flowbridge.auth.callers import AGAIN_SECONDS, PATIENCE_SECONDS, Callers, Credential, later
from flowbridge.auth.names import Names
from flowbridge.errors import MatrixError, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.models import ApiKey, Caller

FOUND_SECONDS = 60.0  # how long an alias of a key's scope leads where it led
JOINED_SECONDS = 600.0  # likewise an alias that was joined
MAX_KNOWN = 10_000

Ask = Callable[[str, str], Awaitable[str]]  # token and alias → room id
Permit = Callable[..., None]  # names of one room; raises Forbidden unless the key is for one of them


class RoomAccess:
    """Every method raises MatrixError with what the homeserver says."""

    def __init__(self, callers: Callers, homeserver: Homeserver, names: Names | None = None) -> None:
        self._callers = callers
        self._resolve = homeserver.resolve
        self._found = _Known(homeserver.resolve, FOUND_SECONDS, "found", names)
        self._joined = _Known(homeserver.join, JOINED_SECONDS, "joined", names)
        self._doubts: dict[tuple[str, str], asyncio.Task[bool]] = {}

    async def enter(
        self, credential: Credential, room: str, permit: Permit, *, joins: bool = False, writes: bool = False
    ) -> tuple[Caller, str]:
        """Who asks, and the id of the room. `joins`: whoever asks joins an alias, once.

        `writes`: for an event that is kept until it can be sent. It needs no homeserver where the names are known from
        before; raises Unavailable where one is not.

        The homeserver is asked what else the room is called only when the key's scope does not have the room as the
        request names it. A key that is not for the room joins nothing.
        """
        key = _needs_look(credential.key, room)
        if key is None:
            permit(room)
        caller = await (self._callers.author if writes else self._callers.identify)(credential)
        if key is None and not room.startswith("#"):
            return caller, room
        try:
            return caller, await self._enter(caller, room, key, permit, joins=joins)
        except MatrixError as error:
            error = self._callers.refused(caller, error)
            raise later(error) if writes else error from None

    async def joined(self, caller: Caller, room: str) -> str:
        """The room id of an alias, which the caller joins once; a room id as it is."""
        return await self._joined.room_id(caller, room) if room.startswith("#") else room

    async def scope(self, caller: Caller, key: ApiKey, *, joins: bool = False, strict: bool = False) -> frozenset[str]:
        """The ids of the rooms that a key is for; an alias that leads nowhere just now is none.

        `strict`: raise MatrixError when it is not known where an alias leads.
        """
        known = self._joined if joins else self._found
        found = {room for room in key.rooms if not room.startswith("#")}
        for alias in _room_access(key):
            try:
                found.add(await known.room_id(caller, alias))
            except MatrixError as error:
                if strict and error.status not in (400, 403, 404):
                    raise
        return frozenset(found)

    async def moved(self, caller: Caller, alias: str, room_id: str) -> bool:
        """Whether an alias leads to another room by now; then what was known of it is forgotten.

        To be asked when a room refuses what came by its alias: rooms are upgraded, and their aliases move on.
        """
        if await self._resolve(caller.token, alias) == room_id:
            return False
        self._found.moved(caller, alias)
        self._joined.moved(caller, alias)
        return True

    def doubt(self, caller: Caller, alias: str, room_id: str) -> None:
        """As `moved`, when nobody waits for the answer."""
        key = (caller.user_id, alias)
        if key not in self._doubts:
            task = self._doubts[key] = asyncio.ensure_future(self.moved(caller, alias, room_id))
            task.add_done_callback(lambda done: self._settle(key, done))

    def _settle(self, key: tuple[str, str], done: "asyncio.Task[bool]") -> None:
        del self._doubts[key]
        if not done.cancelled() and (error := done.exception()) is not None and not isinstance(error, MatrixError):
            log.error("alias_unknown", exc_info=error, alias=key[1])

    async def _enter(self, caller: Caller, room: str, key: ApiKey | None, permit: Permit, *, joins: bool) -> str:
        """`key`: one that is yet to be permitted."""
        room_id = room
        if room.startswith("#") and not joins:
            room_id = await self._resolve(caller.token, room)
        elif room.startswith("#") and key is not None:
            room_id = await self._found.room_id(caller, room)
        if key is not None:
            permit(room_id, *await self._names(caller, key, room_id))
        if joins and room.startswith("#"):
            found, room_id = room_id, await self._joined.room_id(caller, room)
            if key is not None and room_id != found:  # the alias has moved
                permit(room_id, *await self._names(caller, key, room_id))
        return room_id

    async def _names(self, caller: Caller, key: ApiKey, room_id: str) -> list[str]:
        """Of the aliases that a key is for one that leads to this room, if any does."""
        trouble = None
        for alias in () if room_id in key.rooms else _room_access(key):
            try:
                if await self._found.room_id(caller, alias) == room_id:
                    return [alias]
            except MatrixError as error:
                if error.status not in (400, 403, 404):  # it may well lead there
                    trouble = error
        if trouble is not None:
            raise trouble
        return []


@dataclass(slots=True, eq=False)
class _Lead:
    """Where an alias leads. `until`: monotonic; `asking`: the homeserver, whose answer may come after the task's."""

    until: float
    task: asyncio.Future[str] | None = None
    asking: asyncio.Future[str] | None = None


class _Known:
    """Where aliases lead, for some time.

    Whoever comes while the homeserver is asked waits for the same answer. While it is away or slow, or the bot's token
    is refused, its last answer counts, also one to an earlier process, until there is a newer one: accepting goes on.
    """

    def __init__(self, ask: Ask, seconds: float, kind: str, names: Names | None) -> None:
        self._ask = ask
        self._seconds = seconds
        self._kind = kind
        self._names = names
        self._leads: dict[tuple[str, str], _Lead] = {}
        self._moved: dict[tuple[str, str], None] = {}  # what was known before is wrong

    async def room_id(self, caller: Caller, alias: str) -> str:
        key = (caller.user_id, alias)
        lead, now = self._leads.get(key), time.monotonic()
        if lead is not None and lead.until < now and lead.asking is not None and not lead.asking.done():
            lead.until = now + AGAIN_SECONDS  # one question at a time
        if lead is None or lead.until < now:
            lead = self._lead(key, caller, lead)
        assert lead.task is not None
        try:
            return await asyncio.shield(lead.task)
        except Exception:
            if self._leads.get(key) is lead:
                del self._leads[key]
            raise

    def moved(self, caller: Caller, alias: str) -> None:
        """What was known of it is wrong, the store's answer included."""
        key = (caller.user_id, alias)
        self._leads.pop(key, None)
        if len(self._moved) >= MAX_KNOWN:
            del self._moved[next(iter(self._moved))]
        self._moved[key] = None
        if self._names is not None:
            self._names.forget(self._name(key))

    def _lead(self, key: tuple[str, str], caller: Caller, earlier: _Lead | None) -> _Lead:
        if len(self._leads) >= MAX_KNOWN:
            del self._leads[next(iter(self._leads))]
        lead = self._leads[key] = _Lead(time.monotonic() + self._seconds)
        lead.task = asyncio.ensure_future(self._learn(key, lead, caller, earlier))
        lead.task.add_done_callback(_heard)
        return lead

    def _name(self, key: tuple[str, str]) -> str:
        return f"{self._kind}|{key[0]}|{key[1]}"

    async def _learn(self, key: tuple[str, str], lead: _Lead, caller: Caller, earlier: _Lead | None) -> str:
        alias = key[1]
        if not caller.token:
            if (known := await self._before(key, lead, earlier)) is not None:
                return known
            raise Unavailable(f"where {alias} leads is not known while the bridge's own account has no token")
        asking = lead.asking = asyncio.ensure_future(self._ask(caller.token, alias))
        asking.add_done_callback(partial(self._told, key, lead))
        await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
        if not asking.done() and (known := await self._before(key, lead, earlier)) is not None:
            return known
        try:
            return await asking
        except MatrixError as error:
            is_away = error.status >= 500 or (error.status == 401 and caller.bot)
            if not is_away or (known := await self._before(key, lead, earlier)) is None:
                raise
            return known

    def _told(self, key: tuple[str, str], lead: _Lead, asking: asyncio.Future[str]) -> None:
        """The homeserver has answered, perhaps after an older answer of its was taken."""
        if asking.cancelled() or asking.exception() is not None or self._leads.get(key) is not lead:
            return
        lead.task, lead.until = asking, time.monotonic() + self._seconds
        self._moved.pop(key, None)
        if self._names is not None:
            self._names.note(self._name(key), asking.result())

    async def _before(self, key: tuple[str, str], lead: _Lead, earlier: _Lead | None) -> str | None:
        """Where an alias led when the homeserver said so last. It counts until that is asked again."""
        if key in self._moved:
            return None
        known = None
        if (
            earlier is not None
            and (task := earlier.task)
            and task.done()
            and not (task.cancelled() or task.exception())
        ):
            known = task.result()
        elif self._names is not None:
            known = await self._names.find(self._name(key))
        if known is not None and (lead.asking is None or lead.task is not lead.asking):
            lead.until = time.monotonic() + AGAIN_SECONDS
        return known


def _heard(asking: "asyncio.Future[str]") -> None:
    if not asking.cancelled():
        asking.exception()


def _needs_look(key: ApiKey | None, room: str) -> ApiKey | None:
    """The key, when its scope may have the room under another name than the request."""
    if key is None or not key.rooms or room in key.rooms:
        return None
    return key if room.startswith("#") or _room_access(key) else None


def _room_access(key: ApiKey) -> list[str]:
    return [room for room in key.rooms if room.startswith("#")]
