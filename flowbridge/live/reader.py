"""The new events of an account's rooms, read from the homeserver: by long poll, and between any two positions.

/sync lists a room's events unless there are too many of them, or the room was joined in between (`limited`). Those are
read by /messages, page by page from one position to the other, as is everything that a listener missed.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from flowbridge.errors import Errcode, MatrixError
from flowbridge.homeserver import Homeserver, large_json
from flowbridge.homeserver.sync import (
    NOTHING,
    ROOMS_ALONE,
    Invitation,
    Json,
    SyncClient,
    invitations,
    listed,
    section,
)
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.live.position import Position, mark

T = TypeVar("T")

POLL_SECONDS: Final = 30.0
MARGIN_SECONDS: Final = 15.0  # that an answer may be late
SYNC_LIMIT: Final = 32 * 1024 * 1024  # bytes
TIMELINE: Final = 100  # events of a room in one poll
PAGE: Final = 100  # events of a room in one page
MAX_KEPT_BYTES: Final = 2 * 1024 * 1024  # of answers that stay true
MAX_ASKING: Final = 4  # questions at once: listeners that catch up must not be a burden on the homeserver


def _timeline(limit: int) -> Json:
    """A filter: nothing but the last events of rooms."""
    room = {
        "timeline": {"limit": limit, "lazy_load_members": True},
        "state": {**NOTHING, "lazy_load_members": True},
        "ephemeral": NOTHING,
        "account_data": NOTHING,
    }
    return {"room": room, **ROOMS_ALONE}


@dataclass(frozen=True, slots=True)
class Item:
    """An event, and the position behind it; or an invitation, at the position where its batch begins."""

    position: Position
    room: str
    event: Json
    invitation: Invitation | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What one long poll brought. `rooms`: id → its events, or None where they have to be read page by page."""

    since: str
    until: str
    rooms: dict[str, list[Json] | None]
    invitations: list[Invitation]


class Reader:
    """One account's view of its rooms. Every method raises MatrixError when the homeserver does not answer well."""

    def __init__(
        self, homeserver: Homeserver, user_id: str, token: str, *, timeline: int = TIMELINE, page: int = PAGE
    ) -> None:
        self._sync = SyncClient(homeserver.poll)
        self._user_id = user_id
        self._token = token
        self._timeline = timeline
        self._page_size = page
        # Answers that stay true: after a broken connection all listeners ask for the same at once.
        self._kept = Cache[str, Any](MAX_KEPT_BYTES)
        self._asking = Once[str, Any]()
        self._turns = asyncio.Semaphore(MAX_ASKING)

    async def now(self) -> str:
        """The position behind all that has happened so far."""
        batch = await self._sync.sync(self._token, {"room": {"rooms": []}, **ROOMS_ALONE}, patience=MARGIN_SECONDS)
        return batch.next_batch

    async def poll(self, since: str, *, cautious: bool) -> News:
        """Wait for what is new. `cautious`: ask for little, since there may be much, or the homeserver may be away."""
        batch = await self._sync.sync(
            self._token,
            _timeline(1 if cautious else self._timeline),
            since=since,
            wait=0 if cautious else POLL_SECONDS,
            patience=MARGIN_SECONDS,
            fresh=False,
            limit=SYNC_LIMIT,
        )
        rooms, invited = await large_json.aside(
            batch.size, lambda: (self._rooms(batch.value), invitations(batch.value, self._user_id))
        )
        return News(since, batch.next_batch, rooms, invited)

    def _rooms(self, sync: Json) -> dict[str, list[Json] | None]:
        rooms: dict[str, list[Json] | None] = {}
        for room_id, room in sorted(_rooms(sync).items()):
            if section(room, "timeline").get("limited"):
                rooms[room_id] = None
            elif events := [event for event in listed(room, "timeline") if self._counts(event)]:
                rooms[room_id] = events
        return rooms

    async def items(self, news: News) -> AsyncGenerator[Item, None]:
        """The invitations of a poll, then its events in their order."""
        for invitation in news.invitations:
            yield _invited(Position(news.until, news.since), invitation)
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
        """The events between a position and its `until`; where no room is done yet, the invitations before them.

        Nothing of an invitation says when it came: one that is newer than `until` is among them, too, and comes again.
        """
        rooms, invited = await self._difference(position.since, position.until)
        for invitation in () if position.room else invited:
            yield _invited(position, invitation)
        for room_id in rooms:
            if room_id < position.room:
                continue
            begun = room_id == position.room
            async for item in self._pages(position if begun else Position(position.until, position.since, room_id)):
                yield item

    async def changed(self, since: str, until: str) -> list[str]:
        """The rooms, sorted, that have events between two positions, and perhaps some that have not."""
        return (await self._difference(since, until))[0]

    async def _difference(self, since: str, until: str) -> tuple[list[str], list[Invitation]]:
        async def ask() -> tuple[tuple[list[str], list[Invitation]], int]:
            batch = await self._sync.sync(
                self._token, _timeline(1), since=since, patience=MARGIN_SECONDS, limit=SYNC_LIMIT
            )
            found, invited = sorted(_rooms(batch.value)), invitations(batch.value, self._user_id)
            return (found, invited), 1_000 + 100 * len(found) + 1_000 * len(invited)

        return await self._remembered(f"{since} {until}", ask)

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

    async def _page(self, room_id: str, since: str, until: str) -> tuple[list[Json], str]:
        """Some events of a room, and where the next page begins ("" at the end). None in a room that is closed."""

        async def ask() -> tuple[tuple[list[Json], str], int]:
            try:
                page = await self._sync.messages(self._token, room_id, since=since, until=until, limit=self._page_size)
            except MatrixError as error:
                if error.errcode in (Errcode.FORBIDDEN, Errcode.NOT_FOUND):  # left and forgotten, or banned
                    return ([], ""), 100
                raise
            return ([event for event in page.events if self._counts(event)], page.end), page.size

        return await self._remembered(f"{room_id} {since} {until}", ask)

    async def _remembered(self, name: str, ask: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        """The answer to a question that is asked once. `ask` gives it, and its size in bytes."""

        async def look() -> T:
            async with self._turns:
                found, size = await ask()
            self._kept.put(name, found, weight=size)
            return found

        kept = self._kept.get(name)
        answer: T = await self._asking.get(name, look) if kept is None else kept
        return answer

    def _counts(self, event: Json) -> bool:
        """Whether the account was in the room when it happened; how it went out of the room counts, too.

        Without `unsigned.membership` (specification v1.11, MSC4115) every event counts.
        """
        unsigned, content = event.get("unsigned"), event.get("content")
        membership = unsigned.get("membership", "join") if isinstance(unsigned, dict) else "join"
        if membership == "join":
            return True
        is_own = event.get("type") == "m.room.member" and event.get("state_key") == self._user_id
        return is_own and isinstance(content, dict) and content.get("membership") in ("leave", "ban")


def _invited(position: Position, invitation: Invitation) -> Item:
    return Item(position, invitation.room_id, invitation.event, invitation)


def _listed(position: Position, events: list[Json]) -> Iterator[Item]:
    done: tuple[str, ...] = ()
    for event in events:
        done = (*done, mark(str(event.get("event_id"))))
        yield Item(replace(position, done=done), position.room, event)


def _rooms(sync: Json) -> dict[str, Any]:
    """The rooms that the account is in, or was in until just now."""
    return section(sync, "rooms", "leave") | section(sync, "rooms", "join")
