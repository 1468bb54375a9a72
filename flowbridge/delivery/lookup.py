"""Look-up: is an event in its room already, when it is not known whether it was sent.

Only the account's own events of that type are asked for: without a filter, a room with 100,000 newer events by others
took 1,256 pages, again and again from the start. A homeserver may ignore the filter. So each event is checked, and the
place that was reached is kept: an attempt has a deadline, and the next one goes on where it ended.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from flowbridge.errors import HomeserverError
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.client import REDACTION
from flowbridge.store import Database, Row, clock, retention
from flowbridge.store.clock import CLOCK_SKEW_MS

PAGE = 100
PEEK = 10  # events behind an empty page that are read for their time
MAX_PLACES = 1_000  # look-ups that hit their deadline


@dataclass(slots=True)
class _Place:
    """How far a look-up has come."""

    before: str = ""  # where the next page begins; "": at the newest event
    newest: str | None = None  # the id of the newest event that was checked
    mark: str | None = None  # likewise of any sender's, where a page was empty
    seen_at: int = field(default_factory=clock.now_ms)  # older events (ms) were checked, or will be
    alike: list[str] = field(default_factory=list)  # events with the same content


class Lookup:
    """For one event loop. Raises MatrixError when the homeserver does not answer."""

    def __init__(self, homeserver: Homeserver, database: Database, *, max_places: int = MAX_PLACES) -> None:
        self._homeserver = homeserver
        self._database = database
        self._max_places = max_places
        self.places: OrderedDict[str, _Place] = OrderedDict()

    async def find(self, row: Row, token: str, user_id: str) -> str | None:
        """The id of the event, by its transaction id, or by equal content since it was accepted; None: not there.

        A state event has no transaction id, but sent once more it would undo later changes.
        """
        looking = _Search(self._homeserver, row, token, user_id)
        place = self.places.pop(row.delivery, None)
        try:
            if place is None:
                place = _Place()
            elif found := await self._newer(looking, place):
                return found
            found = await self._older(looking, place)
        except BaseException as error:
            if place is not None and not _is_refused(error):
                self._keep(row.delivery, place)
            raise
        return found or await self._by_content(row, looking.since, place.alike)

    async def _older(self, looking: "_Search", place: _Place) -> str | None:
        """From the place backwards, to the time when the event was accepted."""
        while True:
            events, before = await looking.page(place.before)
            if found := looking.match(events, place.alike):
                return found
            if place.newest is None and events:
                place.newest = _id(events[0])
            if before in ("", place.before):
                return None
            tells = events or await looking.behind(before, PEEK)
            if place.mark is None and not events and tells:
                place.mark = _id(tells[0])
            if _are_older(tells, looking.since):
                return None
            place.before = before

    async def _newer(self, looking: "_Search", place: _Place) -> str | None:
        """Events since the look-up began: the request whose answer was lost may have been late."""
        before, alike, now = "", list[str](), clock.now_ms()
        newest: str | None = None
        mark: str | None = None
        while True:
            events, following = await looking.page(before)
            ids = list(map(_id, events))
            known = ids.index(place.newest) if place.newest in ids else None
            if found := looking.match(events[:known], alike):
                return found
            newest = newest or next(iter(ids), None)
            if known is not None or following in ("", before):
                break
            tells = events or await looking.behind(following, PAGE)
            if not events:
                ids = list(map(_id, tells))
                mark = mark or next(iter(ids), None)
            if place.mark in ids or _are_older(tells, place.seen_at - CLOCK_SKEW_MS):
                break
            before = following
        place.alike[:0] = alike
        place.newest, place.mark, place.seen_at = newest or place.newest, mark or place.mark, now
        return None

    async def _by_content(self, row: Row, since: int, alike: list[str]) -> str | None:
        if not alike:
            return None
        others = await self._database.run(
            lambda connection: retention.sent_before(connection, row.lane, since - CLOCK_SKEW_MS, alike)
        )
        return next((event_id for event_id in reversed(alike) if event_id not in others), None)

    def _keep(self, delivery: str, place: _Place) -> None:
        self.places[delivery] = place
        if len(self.places) > self._max_places:
            self.places.popitem(last=False)


class _Search:
    """The event that is looked for."""

    def __init__(self, homeserver: Homeserver, row: Row, token: str, user_id: str) -> None:
        self._homeserver = homeserver
        self._row = row
        self._token = token
        self._user_id = user_id
        self._content = json.loads(row.content)
        self.since = row.accepted_at - CLOCK_SKEW_MS

    async def page(self, before: str) -> tuple[list[dict[str, Any]], str]:
        only = {"senders": [self._user_id], "types": [self._row.event_type]}
        return await self._homeserver.recent(self._token, self._row.room_id, before, only=only)

    def match(self, events: list[dict[str, Any]], alike: list[str]) -> str | None:
        """The id of the event with its transaction id; events with the same content are added to `alike`."""
        row = self._row
        for event in events:
            if event.get("sender") != self._user_id or event.get("type") != row.event_type:
                continue
            if event.get("state_key") != row.state_key:
                continue
            txn_id = (event.get("unsigned") or {}).get("transaction_id")
            if txn_id == row.txn_id:
                return str(event.get("event_id"))
            if txn_id is None and self._is_equal(event) and sent_at(event) >= self.since:
                alike.append(str(event.get("event_id")))
        return None

    def _is_equal(self, event: dict[str, Any]) -> bool:
        content = event.get("content")
        if self._row.event_type == REDACTION and isinstance(content, dict):
            content = {
                "redacts": event.get("redacts"),
                **content,
            }  # before room version 11 it stands beside the content
        return bool(content == self._content)

    async def behind(self, before: str, limit: int) -> list[dict[str, Any]]:
        """Events of any sender behind an empty page, which does not show how far back it is.

        It may be empty because the homeserver has filtered a hundred events of others out.
        """
        events, _ = await self._homeserver.recent(self._token, self._row.room_id, before, limit=limit)
        return events


def _are_older(events: list[dict[str, Any]], since: int) -> bool:
    """Whether all are older than this (ms): a single old one proves nothing, since homeservers choose the time."""
    return bool(events) and all(sent_at(event) < since for event in events)


def _id(event: dict[str, Any]) -> str:
    return str(event.get("event_id"))


def _is_refused(error: BaseException) -> bool:
    """Whether the homeserver may not know the place itself any more."""
    return isinstance(error, HomeserverError) and error.status in (400, 404)


def sent_at(event: dict[str, Any]) -> int:
    """A homeserver's time of an event, in milliseconds."""
    at = event.get("origin_server_ts")
    return at if isinstance(at, int) else 0
