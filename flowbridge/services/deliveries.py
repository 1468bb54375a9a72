"""The delivery log: what became of accepted events, replaying them, deleting them (contract, `/deliveries`).

Reading needs neither the homeserver nor the writer, so that it works while either of them is away or busy.
"""

import base64
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flowbridge import log
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens
from flowbridge.delivery.waiting import Waiting
from flowbridge.errors import (
    BadGateway,
    BadRequest,
    Errcode,
    Forbidden,
    GatewayTimeout,
    NotFound,
    Unavailable,
    WrongState,
)
from flowbridge.models import ApiKey, Caller
from flowbridge.services.delivery_views import DELIVERY, detail, iso, summary, without_none
from flowbridge.services.readings import Readings
from flowbridge.services.replays import Replays
from flowbridge.store import Database, StoreUnavailable, delivery_log
from flowbridge.store.delivery_log import ALL, Scope, Selection, Standing, Whose
from flowbridge.store.errors import MISSING_RETRY_MS

SPAN = 10_000  # ids that one read searches: others wait for it at most, some 10 ms
QUICK_SECONDS = 0.01  # after a quicker read the next one may search twice as many

_CURSOR = re.compile(r"[A-Za-z0-9_-]{11}")


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
    writer. `waiting`: what an event of an account waits for, by its position in its lane. `span`: see SPAN.
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
        waiting: Callable[[str, Standing], Waiting] | None = None,
        readings: Readings | None = None,
        span: int = SPAN,
        quick_seconds: float = QUICK_SECONDS,
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
        self._readings = readings or Readings(database)
        self._span = span
        self._quick_seconds = quick_seconds

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

    async def page(self, viewer: Viewer, selection: Selection, limit: int, cursor: str = "") -> dict[str, Any]:
        """A page, the newest first: `{"deliveries": […], "next": cursor}`; the last page has no `next`."""
        selection = replace(selection, whose=viewer.whose)
        before = _position(cursor) if cursor else None
        if before is None:  # a caller that was just answered 200 finds its event: the row may not be on the disk yet
            await self._database.flush()
        found: list[dict[str, Any]] = []
        span = self._span
        while True:
            started = time.monotonic()
            missing = limit + 1 - len(found)
            rows, before = await self._readings.read(
                partial(delivery_log.page, selection=selection, limit=missing, before=before, span=span)
            )
            amended = map(self._amended, rows)
            found += [row for row in amended if not selection.states or row["state"] in selection.states]
            if before is None or len(found) > limit:
                break
            span *= 2 if time.monotonic() - started < self._quick_seconds else 1
        answer: dict[str, Any] = {"deliveries": [summary(row) for row in found[:limit]]}
        if len(found) > limit:
            answer["next"] = _cursor(found[limit - 1]["id"])
        return answer

    async def get(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """All that is known of a delivery. Raises NotFound, also for another caller's."""
        row = await self._row(viewer, delivery)
        found = detail(row)
        if (waiting := await self._waits_for(row)) is not None:
            reason, until = waiting
            found["waiting"] = without_none({"reason": reason, "until": iso(until)})
        return found

    async def _row(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """The delivery with its latest outcome. Raises NotFound, also for one that the viewer may not see."""
        row = None
        if DELIVERY.fullmatch(delivery):
            row = await self._readings.find(partial(delivery_log.get, delivery=delivery, whose=viewer.whose))
        if row is None:
            raise NotFound("there is no such delivery", errcode=Errcode.NOT_FOUND)
        return self._amended(row)

    async def _waits_for(self, row: Mapping[str, Any]) -> Waiting | None:
        """What a queued delivery waits for, and until when; None for any other."""
        if row["state"] != "queued" or self._waiting is None:
            return None
        standing = await self._readings.read(partial(delivery_log.standing, delivery=row["delivery"]))
        return None if standing is None else self._waiting(row["account"], standing)

    async def replay(self, viewer: Viewer, delivery: str, *, overwrite: bool = False) -> None:
        """Queue a settled delivery again. Raises NotFound; Forbidden for what another Matrix user sent.

        Raises WrongState when it is queued already or, unless `overwrite`, when it is a state event and the room's
        state has changed since; Unavailable when that cannot be known; StoreUnavailable.
        """
        if self._database.missing:
            raise StoreUnavailable(self._database.missing, retry_after_ms=MISSING_RETRY_MS)
        row = await self._row(viewer, delivery)
        await self._permit_replay(viewer, row)
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
            waiting = await self._waits_for(row)
            why = f", and waits: {waiting[0]}" if waiting is not None else ""
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


def _cursor(id_: int) -> str:
    return base64.urlsafe_b64encode(id_.to_bytes(8, "big")).decode().rstrip("=")


def _position(cursor: str) -> int:
    """The id that a cursor stands for: where to go on; it grants nothing. Raises BadRequest."""
    if _CURSOR.fullmatch(cursor):
        position = int.from_bytes(base64.urlsafe_b64decode(f"{cursor}="), "big")
        if position < 2**63:
            return position
    raise BadRequest("cursor: this is not the `next` of a page")
