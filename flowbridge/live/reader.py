"""What an account's rooms have new, read from the homeserver: by long poll, and between any two positions.

/sync names a room's events unless there are too many of them, or the room was joined in between (`limited`): those are
read by /messages, page by page from one position to the other, as is all that somebody missed.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from flowbridge.errors import BadGateway, Errcode, MatrixError
from flowbridge.homeserver import Homeserver, paths
from flowbridge.homeserver.cache import Memo
from flowbridge.homeserver.client import success
from flowbridge.live.frames import Event
from flowbridge.live.position import Position, mark

POLL_SECONDS: Final = 30.0
MARGIN_SECONDS: Final = 15.0  # that an answer may be late
SYNC_LIMIT: Final = 32 * 1024 * 1024  # bytes
TIMELINE = 100  # events of a room that one poll names
PAGE = 100
PAGE_LIMIT: Final = 16 * 1024 * 1024  # bytes of 100 events of 64 KiB, and what homeservers add to them


def _filter(room: dict[str, Any]) -> str:
    """A /sync filter that leaves out all but rooms."""
    nothing = {"not_types": ["*"]}
    return json.dumps({"room": room, "presence": nothing, "account_data": nothing}, separators=(",", ":"))


def _timeline(limit: int, nonce: str = "") -> str:
    """A filter: nothing but the last events of rooms.

    Synapse keeps its answer to a sync for two minutes and gives it again (`sync_response_cache_duration`); a nonce, the
    name of a room that is nowhere, makes another question of the same.
    """
    nothing = {"not_types": ["*"]}
    room = {
        "timeline": {"limit": limit, "lazy_load_members": True},
        "state": {**nothing, "lazy_load_members": True},
        "ephemeral": nothing,
        "account_data": nothing,
    }
    return _filter({**room, "not_rooms": [nonce]} if nonce else room)


@dataclass(frozen=True, slots=True)
class Item:
    """An event, and the position behind it."""

    position: Position
    room: str
    event: Event


@dataclass(frozen=True, slots=True)
class News:
    """What one long poll brought. `rooms`: id → its events, or None where they have to be read page by page."""

    since: str
    until: str
    rooms: dict[str, list[Event] | None]


class Reader:
    """One account's view of its rooms. Every method raises MatrixError when the homeserver does not answer well."""

    def __init__(self, homeserver: Homeserver, user_id: str, token: str) -> None:
        self._homeserver = homeserver
        self._user_id = user_id
        self._token = token
        self._memo = Memo()

    async def now(self) -> str:
        """The position behind all that has happened so far."""
        return _until(await self._sync("", _filter({"rooms": [], "not_rooms": [paths.nowhere()]}), 0))

    async def poll(self, since: str, *, cautious: bool) -> News:
        """Wait for what is new. `cautious`: ask for little, since there may be much, or nobody there."""
        answer = await self._sync(since, _timeline(1 if cautious else TIMELINE), 0 if cautious else POLL_SECONDS)
        rooms: dict[str, list[Event] | None] = {}
        for room_id, room in sorted(_rooms(answer).items()):
            timeline = room.get("timeline")
            timeline = timeline if isinstance(timeline, dict) else {}
            if timeline.get("limited"):
                rooms[room_id] = None
            elif events := [event for event in _events(timeline.get("events")) if self._counts(event)]:
                rooms[room_id] = events
        return News(since, _until(answer), rooms)

    async def items(self, news: News) -> AsyncGenerator[Item, None]:
        """The events of a poll in their order."""
        last = next(reversed(news.rooms), "")
        for room_id, events in news.rooms.items():
            position = Position(news.until, news.since, room_id)
            if events is None:
                async for item in self._pages(position):
                    yield item
                continue
            for item in _listed(position, events):
                if room_id == last and item.event is events[-1]:
                    item = replace(item, position=Position(news.until))
                yield item

    async def rest(self, position: Position) -> AsyncGenerator[Item, None]:
        """The events between a position and its `until`."""
        for room_id in await self.changed(position.since, position.until):
            if room_id < position.room:
                continue
            begun = room_id == position.room
            async for item in self._pages(position if begun else Position(position.until, position.since, room_id)):
                yield item

    async def changed(self, since: str, until: str) -> list[str]:
        """The rooms, sorted, that have events between two positions, and perhaps some that have not."""

        async def ask() -> tuple[list[str], int]:
            found = sorted(_rooms(await self._sync(since, _timeline(1, paths.nowhere()), 0)))
            return found, 1_000 + 100 * len(found)

        return await self._memo.get(f"{since} {until}", ask)

    async def _pages(self, position: Position) -> AsyncGenerator[Item, None]:
        """The events of the position's room that are not done yet."""
        page, done, missing = position.page, position.done, set(position.done)
        while True:
            events, end = await self._page(position.room, page or position.since, position.until)
            for event in events:
                name = mark(str(event.get("event_id")))
                if name in missing:
                    missing.discard(name)
                    continue
                done = (*done, name)
                yield Item(replace(position, page=page, done=done), position.room, event)
            if not end or end == page:
                return
            page, done = end, tuple(missing)

    async def _page(self, room_id: str, since: str, until: str) -> tuple[list[Event], str]:
        """Up to 100 events of a room, and where the next page begins ("" at the end). None in a room that is closed."""
        query = {"dir": "f", "limit": str(PAGE), "from": since, "to": until}
        target = paths.room_target(room_id, "messages", query)

        async def ask() -> tuple[tuple[list[Event], str], int]:
            answer = await self._homeserver.poll(
                target, token=self._token, deadline=self._homeserver.deadline, limit=PAGE_LIMIT
            )
            try:
                page = await success(answer)
            except MatrixError as error:
                if error.errcode in (Errcode.FORBIDDEN, Errcode.NOT_FOUND):  # left and forgotten, or banned
                    return ([], ""), len(target)
                raise
            events = [event for event in _events(page.get("chunk")) if self._counts(event)]
            end = page.get("end")
            return (events, end if isinstance(end, str) else ""), len(answer.body)

        return await self._memo.get(target, ask)

    async def _sync(self, since: str, filter_: str, seconds: float) -> dict[str, Any]:
        query = {"set_presence": "offline", "timeout": str(round(seconds * 1000)), "filter": filter_}
        target = paths.sync_target({**query, "since": since} if since else query)
        deadline = seconds + MARGIN_SECONDS
        return await success(
            await self._homeserver.poll(target, token=self._token, deadline=deadline, limit=SYNC_LIMIT)
        )

    def _counts(self, event: Event) -> bool:
        """Whether the account was in the room when it happened; how it went out of the room counts, too.

        Without `unsigned.membership` (specification v1.11, MSC4115) every event counts.
        """
        unsigned, content = event.get("unsigned"), event.get("content")
        membership = unsigned.get("membership", "join") if isinstance(unsigned, dict) else "join"
        if membership == "join":
            return True
        is_own = event.get("type") == "m.room.member" and event.get("state_key") == self._user_id
        return is_own and isinstance(content, dict) and content.get("membership") in ("leave", "ban")


def _listed(position: Position, events: list[Event]) -> Iterator[Item]:
    done: tuple[str, ...] = ()
    for event in events:
        done = (*done, mark(str(event.get("event_id"))))
        yield Item(replace(position, done=done), position.room, event)


def _rooms(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rooms that the account is in, or was in until just now."""
    found: dict[str, dict[str, Any]] = {}
    rooms = answer.get("rooms")
    for kind in ("leave", "join"):
        named = rooms.get(kind) if isinstance(rooms, dict) else None
        found |= {id_: room for id_, room in named.items() if isinstance(room, dict)} if isinstance(named, dict) else {}
    return found


def _events(found: Any) -> list[Event]:
    return [event for event in found if isinstance(event, dict)] if isinstance(found, list) else []


def _until(answer: dict[str, Any]) -> str:
    until = answer.get("next_batch")
    if not isinstance(until, str) or not until:
        raise BadGateway("the homeserver's answer to a sync names no next_batch")
    return until
