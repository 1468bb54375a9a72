"""The delivery log: what became of accepted events, replaying them, deleting them (contract, `/deliveries`).

Reading needs neither the homeserver nor the writer, so that it works while either of them is away or busy.
"""

import asyncio
import base64
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from flowbridge import log
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery.pending import Keeps
from flowbridge.delivery.waiting import Waiting
from flowbridge.errors import (
    BadGateway,
    BadRequest,
    Errcode,
    Forbidden,
    GatewayTimeout,
    MatrixError,
    NotFound,
    Unavailable,
    WrongState,
)
from flowbridge.models import ApiKey, Caller
from flowbridge.services.delivery_views import DELIVERY, REFUSED, detail, lost, refused_summary, summary
from flowbridge.services.readings import Readings
from flowbridge.services.refused_calls import PREFIX
from flowbridge.services.replays import Replays
from flowbridge.store import Database, StoreUnavailable, delivery_log, refused
from flowbridge.store.delivery_log import ALL, Scope, Selection, Standing, TooSlow, Whose, at_most
from flowbridge.store.errors import MISSING_RETRY_MS
from flowbridge.store.refused import Place

SPAN = 10_000  # events that one read searches at first, …
TEXT_SPAN = 500  # … and where it reads their contents: others wait for it, some 10 ms
QUICK_SECONDS = 0.02  # after a quicker read the next one may search twice as many, …
SLOW_SECONDS = 0.05  # … after a slower one half as many
READ_SECONDS = 0.25  # after which a read of contents is broken off, and tried with fewer
SEARCH_SECONDS = 5.0  # after which a page is answered as it is: the next one goes on
UNPACED_SECONDS = 0.25  # a longer search for a text leaves the store as much time as it takes

T = TypeVar("T")

_CURSOR = re.compile(r"[A-Za-z0-9_-]{11}|[A-Za-z0-9_-]{22}")


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who reads, and whose deliveries it sees: a `caller` with a Matrix token, or a `key`."""

    name: str
    whose: Whose
    caller: Caller | None = None
    key: ApiKey | None = None


class Deliveries:
    """`cancel`: give a queued delivery up; False while it is being sent. `wake`: tell the worker of news in a lane.

    `amended`: a row with the outcome that its caller has and the disk has not, yet: reading does not wait for the
    writer. `waiting`: what a queued event waits for, by its row and its place in its lane. `flush_refused`: write the
    refused calls that were noted so far. `keeps`: FLOWBRIDGE_KEEP_CONTENTS. `span`, `text_span`: see SPAN.
    """

    def __init__(
        self,
        database: Database,
        callers: Callers,
        tokens: Tokens,
        room_access: RoomAccess,
        replays: Replays,
        *,
        cancel: Callable[[str], Awaitable[bool]],
        wake: Callable[[str], None],
        amended: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        waiting: Callable[[Mapping[str, Any], Standing], Waiting] | None = None,
        flush_refused: Callable[[], Awaitable[None]] | None = None,
        readings: Readings | None = None,
        keeps: Keeps = "all",
        span: int = SPAN,
        text_span: int = TEXT_SPAN,
        quick_seconds: float = QUICK_SECONDS,
        search_seconds: float = SEARCH_SECONDS,
    ) -> None:
        self._database = database
        self._callers = callers
        self._tokens = tokens
        self._room_access = room_access
        self._replays = replays
        self._cancel = cancel
        self._wake = wake
        self._amended = amended
        self._waiting = waiting
        self._flush_refused = flush_refused
        self._keeps = keeps
        self._readings = readings or Readings(database)
        self._span = span
        self._text_span = text_span
        self._quick_seconds = quick_seconds
        self._search_seconds = search_seconds

    async def viewer(self, credential: Credential) -> Viewer:
        """Keys with `admin` see all in their rooms and of their event types, other keys what they sent.

        A key made for users also sees what these sent, a Matrix token what its user sent. The homeserver is asked only
        where a scope names an alias.
        """
        if (key := credential.key) is None:
            caller = await self._callers.identify(credential)
            return Viewer(caller.user_id, Whose(user_id=caller.user_id), caller)
        whose = Whose(api_key=key.id)
        if key.admin or key.users:
            scope = Scope(await self._rooms(key) if key.rooms else None, key.event_types)
            whose = replace(ALL if key.admin else whose, users=key.users, scope=scope)
        return Viewer(f"key:{key.id}", whose, key=key)

    async def _rooms(self, key: ApiKey) -> frozenset[str]:
        """The ids of a key's rooms. Raises Unavailable when it is not known where one of its aliases leads."""
        if not any(room.startswith("#") for room in key.rooms):
            return frozenset(key.rooms)
        try:
            caller = await self._callers.identify(Credential(None, key))
            return await self._room_access.scope(caller, key, strict=True)
        except (BadGateway, GatewayTimeout) as error:
            raise Unavailable(f"where this key's room aliases lead is not known: {error.error}") from None

    async def room(self, viewer: Viewer, room: str, name: str) -> str:
        """The id of a room that is named by it, or by an alias.

        Raises BadRequest, which names the parameter, for an alias that leads nowhere.
        """
        if not room.startswith("#"):
            return room
        try:
            caller = viewer.caller or await self._callers.identify(Credential(None, viewer.key))
            return await self._room_access.room_id(caller, room)
        except (BadGateway, GatewayTimeout, Unavailable) as error:
            raise Unavailable(f"{name}: where {room} leads is not known, name the room's id: {error.error}") from None
        except MatrixError as error:
            raise BadRequest(f"{name}: {room} leads to no room, or not for this account: {error.error}") from None

    async def page(self, viewer: Viewer, selection: Selection, limit: int, cursor: str = "") -> dict[str, Any]:
        """A page, the newest first: `{"deliveries": […], "next": cursor}`; the last page has no `next`.

        One with a `next` may hold fewer than `limit`, even none: after some seconds the next page goes on searching.
        """
        selection = replace(selection, whose=viewer.whose)
        place = _place(cursor) if cursor else None
        if place is None:  # a caller that was just answered 200 finds its event: the row may not be on the disk yet
            await self._database.flush()
            if self._flush_refused is not None:
                await self._flush_refused()
        calls = [] if has_no_calls(selection) else await self._calls(selection, limit + 1, place)
        found, before = await self._search(selection, limit + 1, place)
        # Calls that come behind what was not searched so far are for the next page.
        rows = [*found, *(call for call in calls if before is None or call["position"] >= before)]
        rows.sort(key=place_of, reverse=True)
        shown = rows[:limit]
        waiting = await self._all_wait_for(shown)
        answer: dict[str, Any] = {"deliveries": [self._summary(row, waiting.get(row["delivery"])) for row in shown]}
        if len(rows) > limit:
            answer["next"] = _cursor(*place_of(shown[-1]))
        elif before is not None:
            answer["next"] = _cursor(before)
        return answer

    async def _calls(self, selection: Selection, limit: int, place: Place | None) -> list[dict[str, Any]]:
        before = None if place is None else (place[0], place[1])
        return await self._readings.read(partial(refused.page, selection=selection, limit=limit, before=before))

    async def _search(
        self, selection: Selection, limit: int, place: Place | None
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Events, and the id before which to go on; None when there are no more.

        In steps, between which other reads of the store have their turn, and for some seconds at most.
        """
        if selection.states == (REFUSED,):
            return [], None
        states = tuple(state for state in selection.states if state != REFUSED)
        selection = replace(selection, states=states)
        before = None if place is None else place[0] + (place[1] > 0)  # behind a call come the events at its place
        found: list[dict[str, Any]] = []
        is_text = selection.text is not None
        span = self._text_span if is_text else self._span
        ends = time.monotonic() + self._search_seconds
        taken_in_all = 0.0
        while True:
            started = time.monotonic()
            work = partial(delivery_log.page, selection=selection, limit=limit - len(found), before=before, span=span)
            try:
                rows, before = await self._readings.read(partial(_within, work) if is_text and span > 1 else work)
            except TooSlow:  # some contents are long, or made for that
                span = max(1, span // 8)
                continue
            amended = map(self._amended, rows)
            found += [row for row in amended if not states or row["state"] in states]
            now = time.monotonic()
            if before is None or len(found) >= limit or now > ends:
                return found, before
            taken = now - started
            taken_in_all += taken
            if taken < self._quick_seconds:
                span *= 2
            elif taken > SLOW_SECONDS:
                span = max(1, span // 2)
            if is_text and taken_in_all > UNPACED_SECONDS:
                await asyncio.sleep(min(taken, SLOW_SECONDS))

    async def _all_wait_for(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Waiting]:
        """What those of these rows wait for that are queued."""
        queued = {row["delivery"]: row for row in rows if row.get("state") == "queued"}
        if not queued or self._waiting is None:
            return {}
        places = await self._readings.read(partial(delivery_log.standings, deliveries=list(queued)))
        return {name: self._waiting(queued[name], standing) for name, standing in places.items()}

    def _summary(self, row: Mapping[str, Any], waiting: Waiting | None) -> dict[str, Any]:
        return refused_summary(row) if "position" in row else summary(row, waiting)

    async def get(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """All that is known of a delivery. Raises NotFound, also for another caller's."""
        if (call := await self._refused(viewer, delivery)) is not None:
            return refused_summary(call)
        row = await self._row(viewer, delivery)
        return detail(row, (await self._all_wait_for([row])).get(delivery))

    async def _refused(self, viewer: Viewer, delivery: str) -> dict[str, Any] | None:
        """A refused call by its id; None for any other. Raises NotFound."""
        if not delivery.startswith(PREFIX):
            return None
        row = None
        if DELIVERY.fullmatch(delivery):
            row = await self._readings.read(partial(refused.get, delivery=delivery, whose=viewer.whose))
        if row is None:
            raise NotFound("there is no such delivery", errcode=Errcode.NOT_FOUND)
        return row

    async def _row(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """The delivery with its latest outcome. Raises NotFound, also for one that the viewer may not see."""
        row = None
        if DELIVERY.fullmatch(delivery):
            row = await self._readings.find(partial(delivery_log.get, delivery=delivery, whose=viewer.whose))
        if row is None:
            raise NotFound("there is no such delivery", errcode=Errcode.NOT_FOUND)
        return self._amended(row)

    async def replay(self, viewer: Viewer, delivery: str, *, overwrite: bool = False) -> None:
        """Queue a settled delivery again. Raises NotFound; Forbidden for what another Matrix user sent.

        Raises WrongState when it is queued already or, unless `overwrite`, when it is a state event and the room's
        state has changed since; Unavailable when that cannot be known; StoreUnavailable.
        """
        if self._database.missing:
            raise StoreUnavailable(self._database.missing, retry_after_ms=MISSING_RETRY_MS)
        if await self._refused(viewer, delivery) is not None:
            raise WrongState("this call was refused, and nothing of its body is kept: send it again")
        row = await self._row(viewer, delivery)
        await self._permit_replay(viewer, row)
        if why := lost(row, self._keeps):
            raise WrongState(f"{why}, so it cannot be sent again")
        if row["state_key"] is not None and row["state"] != "queued" and not overwrite:
            await self._replays.check(row, viewer.caller)
        account = self._tokens.remember(viewer.caller) if viewer.caller else None
        work = partial(
            delivery_log.replay,
            delivery=delivery,
            txn_id=new_txn_id(),
            by=viewer.name,
            whose=viewer.whose,
            account=account,
        )
        if (queued := await self._database.run(work, alone=True)) is None:
            row = await self._row(viewer, delivery)
            if row["state"] != "queued":
                raise StoreUnavailable("how it ended cannot be written down at the moment")
            waiting = (await self._all_wait_for([row])).get(delivery)
            why = f", and waits: {waiting.reason}" if waiting is not None else ""
            raise WrongState(f"it is queued already{why}; only what is sent or dead can be replayed")
        log.info("delivery_replayed", delivery=delivery, by=viewer.name)
        self._wake(queued["lane"])  # before the answer: events that are sent after it go behind this one

    async def _permit_replay(self, viewer: Viewer, row: Mapping[str, Any]) -> None:
        key = viewer.key
        if key is None:
            return
        if (sender := _other_sender(key, row)) is not None:
            raise Forbidden(
                f"a Matrix user sent this: {sender} sends it again, or an API key made with --user for this user"
            )
        room = row["room_id"]  # it may be where an alias of the key led when the key sent this, and leads no longer
        if key.rooms and room not in key.rooms and room not in await self._rooms(key):
            raise Forbidden("this API key is not for the room of this delivery")

    async def remove(self, viewer: Viewer, delivery: str) -> None:
        """Delete a settled delivery, or give a queued one up. Raises NotFound, or WrongState while it is being sent.

        Raises Forbidden for what another Matrix user sent, unless the viewer is an admin without limits.
        """
        if await self._refused(viewer, delivery) is not None:
            await self._database.run(partial(refused.remove, delivery=delivery, whose=viewer.whose))
            return
        row = await self._row(viewer, delivery)
        key = viewer.key
        if key is not None and (key.rooms or key.event_types) and (sender := _other_sender(key, row)) is not None:
            raise Forbidden(
                f"a Matrix user sent this: {sender} deletes it, or an API key made with --user for this user, "
                "or one with `admin` and no limits"
            )
        work = partial(delivery_log.remove, delivery=delivery, whose=viewer.whose)
        removed = await self._database.run(work)
        if not removed:
            await self._row(viewer, delivery)
            # It may have been settled in between.
            removed = await self._cancel(delivery) or await self._database.run(work)
        if not removed:
            raise WrongState("it is being sent at the moment: try again shortly")
        log.info("delivery_deleted", delivery=delivery, by=viewer.name)


def _other_sender(key: ApiKey, row: Mapping[str, Any]) -> str | None:
    """The Matrix user that sent this, with a token of its own, unless the key is made for this user."""
    is_others = row["api_key"] is None and row["user_id"] not in key.users
    return (row["user_id"] or "the user") if is_others else None


def new_txn_id() -> str:
    """A random one: under the old one a homeserver that remembers it would send nothing."""
    return secrets.token_urlsafe(16)


def _within(work: Callable[[Connection], T], connection: Connection) -> T:
    with at_most(READ_SECONDS, connection):
        return work(connection)


def has_no_calls(selection: Selection) -> bool:
    """Whether no refused call can match: of these neither the key nor anything of the body is kept."""
    is_other = bool(selection.states) and REFUSED not in selection.states
    return is_other or selection.key is not None or selection.text is not None


def place_of(row: Mapping[str, Any]) -> Place:
    """Where an event or a refused call stands in the log: a call behind the events that were accepted before it."""
    return (row["position"], row["id"]) if "position" in row else (row["id"], 0)


def _cursor(position: int, call: int = 0) -> str:
    data = position.to_bytes(8, "big") + (call.to_bytes(8, "big") if call else b"")
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _place(cursor: str) -> Place:
    """The place that a cursor stands for, before which to go on; it grants nothing. Raises BadRequest."""
    if _CURSOR.fullmatch(cursor):
        data = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        position, call = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
        if max(position, call) < 2**63:
            return position, call
    raise BadRequest("cursor: this is not the `next` of a page")
