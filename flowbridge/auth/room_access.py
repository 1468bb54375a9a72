"""Which room is meant, by its id or by an alias, and whether an API key covers it.

A key's scope and a request may call one room by different names: its id, or one of its aliases.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from flowbridge.auth.bot import later
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.identities import RETRY_SECONDS
from flowbridge.auth.names import Names
from flowbridge.errors import MatrixError, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.models import ApiKey, Caller
from flowbridge.models.timing import Timing

FOUND_SECONDS = 60.0  # how long the answer counts for an alias of a key's scope
JOINED_SECONDS = 600.0  # likewise for an alias that was joined
MAX_KNOWN = 10_000

Ask = Callable[[str, str], Awaitable[str]]  # token and alias → room id
Permit = Callable[..., None]  # names of one room; raises Forbidden unless the key covers one of them


class RoomAccess:
    """Every method raises MatrixError with what the homeserver says."""

    def __init__(
        self,
        callers: Callers,
        homeserver: Homeserver,
        names: Names,
        *,
        timing: Timing = Timing(),
        max_known: int = MAX_KNOWN,
    ) -> None:
        self._callers = callers
        self._resolve = homeserver.resolve
        self._found = _Aliases(homeserver.resolve, FOUND_SECONDS, "found", names, timing, max_known)
        self._joined = _Aliases(homeserver.join, JOINED_SECONDS, "joined", names, timing, max_known)
        self._doubts = Once[tuple[str, str], bool]()

    @staticmethod
    def is_plain(key: ApiKey | None, room: str) -> bool:
        """Whether `enter` has nothing to ask: the room is named by its id, and so it is in the key's scope."""
        return not room.startswith("#") and (key is None or not _needs_look_up(key, room))

    async def enter(
        self, credential: Credential, room: str, permit: Permit, *, joins: bool = False, writes: bool = False
    ) -> tuple[Caller, str]:
        """The caller, and the id of the room. `joins`: the caller joins an alias, once.

        `writes`: for an event that is kept until it can be sent. Then no homeserver is needed where the names are
        known from before; raises Unavailable where one is not.

        The homeserver is asked for other names of the room only when the key's scope does not have the room as the
        request names it. A key that does not cover the room joins nothing.
        """
        key = credential.key
        if key is not None and not _needs_look_up(key, room):
            permit(room)
            key = None
        caller = await (self._callers.author if writes else self._callers.identify)(credential)
        if key is None and not room.startswith("#"):
            return caller, room
        try:
            return caller, await self._enter(caller, room, key, permit, joins=joins)
        except MatrixError as error:
            error = self._callers.refused(caller, error)
            raise later(error) if writes else error from None

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
        """One of the key's aliases that leads to this room, if any does."""
        trouble = None
        for alias in () if room_id in key.rooms else _aliases(key):
            try:
                if await self._found.room_id(caller, alias) == room_id:
                    return [alias]
            except MatrixError as error:
                if error.status not in (400, 403, 404):  # it may well lead there
                    trouble = error
        if trouble is not None:
            raise trouble
        return []

    async def room_id(self, caller: Caller, alias: str) -> str:
        """Where an alias leads, without joining."""
        return await self._found.room_id(caller, alias)

    async def scope(self, caller: Caller, key: ApiKey, *, joins: bool = False, strict: bool = False) -> frozenset[str]:
        """The ids of the rooms that a key covers, without aliases that currently lead nowhere.

        `strict`: raise MatrixError when it is not known where an alias leads.
        """
        known = self._joined if joins else self._found
        found = {room for room in key.rooms if not room.startswith("#")}
        for alias in _aliases(key):
            try:
                found.add(await known.room_id(caller, alias))
            except MatrixError as error:
                if strict and error.status not in (400, 403, 404):
                    raise
        return frozenset(found)

    async def moved(self, caller: Caller, alias: str, room_id: str) -> bool:
        """Whether an alias leads to another room by now; if so, what was known of it is forgotten.

        To be asked when a room refuses an event that came by its alias: rooms are upgraded, and their aliases move on.
        """
        if await self._resolve(caller.token, alias) == room_id:
            return False
        self.forget(caller, alias)
        return True

    def doubt(self, caller: Caller, alias: str, room_id: str) -> None:
        """As `moved`, in the background."""
        self._doubts.task((caller.user_id, alias), partial(self.moved, caller, alias, room_id))

    def forget(self, caller: Caller, alias: str) -> None:
        """What is known of this alias is wrong."""
        self._found.forget(caller, alias)
        self._joined.forget(caller, alias)


@dataclass(slots=True, eq=False)
class _Lead:
    """Where an alias leads for one user. `room_id` counts until `until` (monotonic); older ones during an outage."""

    room_id: str = ""
    until: float = 0.0
    is_moved: bool = False  # what the store says is wrong


class _Aliases:
    """Where aliases lead, for `seconds`. A question is asked once, however many callers wait for its answer.

    While the homeserver is away or slow, or the bot's token is refused, its last answer counts, also one to an earlier
    process, until there is a newer one: accepting goes on.
    """

    def __init__(self, ask: Ask, seconds: float, kind: str, names: Names, timing: Timing, max_known: int) -> None:
        self._ask = ask
        self._seconds = seconds
        self._kind = kind
        self._names = names
        self._patience = timing.patience_seconds
        self._clock = timing.clock
        self._leads = Cache[tuple[str, str], _Lead](max_known)
        self._learning = Once[_Lead, str]()
        self._asking = Once[_Lead, str]()

    async def room_id(self, caller: Caller, alias: str) -> str:
        key = (caller.user_id, alias)
        lead = self._leads.get(key) or self._leads.put(key, _Lead())
        if lead.room_id and self._clock() < lead.until:
            return lead.room_id
        if lead.room_id and lead in self._asking and lead not in self._learning:  # it hangs: one question at a time
            lead.until = self._clock() + RETRY_SECONDS
            return lead.room_id
        try:
            return await self._learning.get(lead, partial(self._learn, lead, caller, alias))
        except MatrixError:
            if self._leads.get(key) is lead and not lead.is_moved:
                self._leads.pop(key)
            raise

    def forget(self, caller: Caller, alias: str) -> None:
        """What is known of it is wrong, the store's answer and one that is still in flight included."""
        self._leads.put((caller.user_id, alias), _Lead(is_moved=True))
        self._names.forget(self._name(caller, alias))

    def _name(self, caller: Caller, alias: str) -> str:
        return f"{self._kind}|{caller.user_id}|{alias}"

    async def _learn(self, lead: _Lead, caller: Caller, alias: str) -> str:
        if not caller.token:
            if known := await self._before(lead, caller, alias):
                return known
            raise Unavailable(f"where {alias} leads is not known while the bridge's own account has no token")
        asking = self._asking.task(lead, partial(self._question, lead, caller, alias))
        await asyncio.wait({asking}, timeout=self._patience)
        if not asking.done() and (known := await self._before(lead, caller, alias)):
            return known
        try:
            return await asyncio.shield(asking)
        except MatrixError as error:
            is_away = error.status >= 500 or (error.status == 401 and caller.bot)
            if not is_away or not (known := await self._before(lead, caller, alias)):
                raise
            return known

    async def _question(self, lead: _Lead, caller: Caller, alias: str) -> str:
        room_id = await self._ask(caller.token, alias)
        if self._leads.get((caller.user_id, alias)) is lead:  # otherwise the alias has moved meanwhile
            lead.room_id, lead.until, lead.is_moved = room_id, self._clock() + self._seconds, False
            self._names.note(self._name(caller, alias), room_id)
        return room_id

    async def _before(self, lead: _Lead, caller: Caller, alias: str) -> str:
        """Where an alias led by the homeserver's last answer; "" when there is none. It counts for a short time."""
        if lead.is_moved:
            return ""
        known = lead.room_id or await self._names.find(self._name(caller, alias)) or ""
        if lead.until <= self._clock():  # otherwise the homeserver has answered meanwhile
            lead.room_id, lead.until = known, self._clock() + RETRY_SECONDS
        return lead.room_id


def _needs_look_up(key: ApiKey, room: str) -> bool:
    """Whether the key's scope may have the room under another name than the request."""
    return bool(key.rooms) and room not in key.rooms and (room.startswith("#") or bool(_aliases(key)))


def _aliases(key: ApiKey) -> list[str]:
    return [room for room in key.rooms if room.startswith("#")]
