"""The delivery log: what became of accepted events; sending them anew, and taking them away (contract, `/deliveries`).

Reading asks neither the homeserver nor the writer, so that it goes on while either of them is away or busy.
"""

import base64
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
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
from flowbridge.services.readings import Readings
from flowbridge.services.replays import Replays
from flowbridge.store import Database, StoreUnavailable, delivery_log
from flowbridge.store.delivery_log import ALL, Scope, Selection, Standing, Whose
from flowbridge.store.errors import MISSING_RETRY_MS

STATES = ("sent", "queued", "dead")
SPAN = 10_000  # ids that are looked at in one go: others wait for this long at most, some 10 ms
QUICK_SECONDS = 0.01  # where a go takes less, the next may be twice as long

_DELIVERY = re.compile(r"[A-Za-z0-9_~.-]{1,128}")
_CURSOR = re.compile(r"[A-Za-z0-9_-]{11}")
_TIME = re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}([T ][0-9:.,]{1,20}(Z|[+-][0-9:]{1,10})?)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks, and whose deliveries are shown: `caller` is the one with a Matrix token, else a `key` asks."""

    name: str
    whose: Whose
    caller: Caller | None = None
    key: ApiKey | None = None


class Deliveries:
    """The use case. `cancel`: give a queued delivery up, False when it is on its way just now.

    `wake`: tell the worker that there is something new in a lane.

    `amended`: a row with the outcome that was told and is not on the disk yet: reading does not wait for the writer.
    `waiting`: what an event of an account waits for, as it stands in its lane.
    """

    def __init__(
        self,
        database: Database,
        callers: Callers,
        tokens: Tokens,
        aliases: RoomAccess,
        replays: Replays,
        *,
        cancel: Callable[[str], Awaitable[bool]],
        wake: Callable[[str], None],
        amended: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        waiting: Callable[[str, Standing], Waiting] | None = None,
        readings: Readings | None = None,
    ) -> None:
        self._database = database
        self._callers = callers
        self._tokens = tokens
        self._room_access = aliases
        self._replays = replays
        self._cancel = cancel
        self._wake = wake
        self._amended = amended
        self._waiting = waiting
        self._readings = readings or Readings(database)

    async def viewer(self, credential: Credential) -> Viewer:
        """Keys with `admin` see all in their rooms and of their event types, others what they sent.

        A Matrix token sees what its user sent; a key also what the users sent that it is made for. The homeserver is
        asked only where a scope names an alias.
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
        """A page, the newest first: `{"deliveries": […], "next": cursor}`; without `next` when it is the last."""
        selection = replace(selection, whose=viewer.whose)
        before = _position(cursor) if cursor else None
        if before is None:  # who was just answered 200 finds the event: its row may linger on its way to the disk
            await self._database.flush()
        found: list[dict[str, Any]] = []
        span = SPAN
        while True:
            started = time.monotonic()
            missing = limit + 1 - len(found)
            rows, before = await self._readings.read(
                partial(delivery_log.page, selection=selection, limit=missing, before=before, span=span)
            )
            found += [
                one for one in map(self._amended, rows) if not selection.states or one["state"] in selection.states
            ]
            if before is None or len(found) > limit:
                break
            span *= 2 if time.monotonic() - started < QUICK_SECONDS else 1
        answer: dict[str, Any] = {"deliveries": [summary(row) for row in found[:limit]]}
        if len(found) > limit:
            answer["next"] = _cursor(found[limit - 1]["id"])
        return answer

    async def get(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """All that is known of a delivery. Raises NotFound, also for somebody else's."""
        work = partial(delivery_log.get, delivery=_named(delivery), whose=viewer.whose)
        row = await self._readings.find(work)
        if row is None:
            raise _unknown()
        row = self._amended(row)
        found = detail(row)
        if (waiting := await self._waits_for(row)) is not None:
            reason, until = waiting
            found["waiting"] = _without_none({"reason": reason, "until": _time(until)})
        return found

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
        row = self._amended(await self._row(viewer, delivery))
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
            row = self._amended(await self._row(viewer, delivery))
            if row["state"] != "queued":
                raise StoreUnavailable("how it ended cannot be written down at the moment")
            waiting = await self._waits_for(row)
            why = f", and waits: {waiting[0]}" if waiting is not None else ""
            raise WrongState(f"it is queued already{why}; only what is sent or dead can be replayed")
        log.info("delivery_replayed", delivery=delivery, by=viewer.name)
        self._wake(queued["lane"])  # before the answer: what is sent after that goes behind it

    async def remove(self, viewer: Viewer, delivery: str) -> None:
        """Delete a settled delivery, or give a queued one up. Raises NotFound, or WrongState when it is on its way.

        Raises Forbidden for what another Matrix user sent, unless the viewer is an admin without limits.
        """
        row = await self._row(viewer, delivery)
        if (key := viewer.key) is not None and (key.rooms or key.event_types) and _is_others(key, row):
            raise Forbidden(
                f"a Matrix user sent this: {_sender(row)} deletes it, or an API key made with --user for this user, "
                "or one with `admin` and no limits"
            )
        work = partial(delivery_log.remove, delivery=delivery, whose=viewer.whose)
        removed = await self._database.run(work)
        if not removed:
            await self._row(viewer, delivery)
            # In the moment between, it may have been settled.
            removed = await self._cancel(delivery) or await self._database.run(work)
        if not removed:
            raise WrongState("it is being sent at the moment: try again shortly")
        log.info("delivery_deleted", delivery=delivery, by=viewer.name)

    async def _permit_replay(self, viewer: Viewer, row: Mapping[str, Any]) -> None:
        key = viewer.key
        if key is None:
            return
        if _is_others(key, row):
            raise Forbidden(
                f"a Matrix user sent this: {_sender(row)} sends it again, or an API key made with --user for this user"
            )
        room = row["room_id"]  # of a key's own event it may be one that the key's alias has led to, and does not now
        if key.rooms and room not in key.rooms and room not in await self._rooms(key):
            raise Forbidden("this API key is not for the room of this delivery")

    async def _row(self, viewer: Viewer, delivery: str) -> dict[str, Any]:
        """The delivery as it is in the store. Raises NotFound, also for what the viewer may not see."""
        row = await self._readings.find(partial(delivery_log.get, delivery=_named(delivery), whose=viewer.whose))
        if row is None:
            raise _unknown()
        return row


def _is_others(key: ApiKey, row: Mapping[str, Any]) -> bool:
    """Whether a Matrix user sent this, with a token of its own, for whom the key is not made."""
    return row["api_key"] is None and row["user_id"] not in key.users


def _sender(row: Mapping[str, Any]) -> str:
    return str(row["user_id"] or "the user")


def new_txn_id() -> str:
    """Random: under the old one a homeserver that remembers it would send nothing."""
    return secrets.token_urlsafe(16)


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """A delivery as a list shows it. What it does not have, or not yet, is left out."""
    found = {
        "delivery_id": row["delivery"],
        "status": row["state"],
        "room_id": row["room_id"],
        "event_type": row["event_type"],
        "state_key": row["state_key"],
        "event_id": row["event_id"],
        "error": json.loads(row["error"]) if row["error"] else None,
        "attempts": row["attempts"],
        "accepted_at": _time(row["accepted_at"]),
        "settled_at": _time(row["settled_at"]),
        "user_id": row["user_id"],
        "api_key": row["api_key"],
    }
    return _without_none(found)


def detail(row: Mapping[str, Any]) -> dict[str, Any]:
    """A delivery with its request as it came, the event as it is sent, and every attempt that is remembered."""
    event = {"type": row["event_type"], "state_key": row["state_key"], "content": json.loads(row["content"])}
    return {
        **summary(row),
        "request": row["content"] if row["request"] is None else row["request"],
        "event": _without_none(event),
        "txn_id": row["txn_id"],
        "history": [_happened(entry) for entry in json.loads(row["history"])],
    }


def _happened(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt, or a replay with what the delivery was before."""
    found = {
        "time": _time(entry["at"]),
        "milliseconds": entry.get("ms"),
        "status": entry.get("status"),
        "errcode": entry.get("errcode"),
        "error": entry.get("error"),
    }
    if (was := entry.get("replayed")) is not None:
        found["replayed"] = _without_none(
            {
                "by": was["by"],
                "status": was["state"],
                "event_id": was.get("event_id"),
                "txn_id": was["txn_id"],
                "accepted_at": _time(was["accepted_at"]),
            }
        )
    return _without_none(found)


def states(text: str, name: str) -> tuple[str, ...]:
    """States with commas between them. Raises BadRequest, which names the parameter, as all of these do."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for state in found:
        if state not in STATES:
            raise BadRequest(f"{name}: {state[:80]!r} is none of {', '.join(STATES)}")
    return found


def moment(text: str, name: str) -> int:
    """A time in ISO 8601 as ms since 1970; UTC, where it has no offset."""
    text = text.strip()
    if "T" in text:
        text = text.replace(" ", "+")  # what a + becomes that was not percent-encoded
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        found = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(f"{name}: {text[:80]!r} is not a time: write it like 2026-11-22T10:00:00Z") from None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    return (found - _EPOCH) // timedelta(milliseconds=1)


def _time(ms: int | None) -> str | None:
    """ISO 8601, UTC, with milliseconds."""
    if ms is None:
        return None
    return (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _cursor(id_: int) -> str:
    return base64.urlsafe_b64encode(id_.to_bytes(8, "big")).decode().rstrip("=")


def _position(cursor: str) -> int:
    """The id that a cursor stands for. It says only where to go on, and not what may be seen."""
    if _CURSOR.fullmatch(cursor):
        position = int.from_bytes(base64.urlsafe_b64decode(f"{cursor}="), "big")
        if position < 2**63:
            return position
    raise BadRequest("cursor: this is not the `next` of a page")


def _named(delivery: str) -> str:
    """A delivery's name, if it can be one. Raises NotFound."""
    if not _DELIVERY.fullmatch(delivery):
        raise _unknown()
    return delivery


def _unknown() -> NotFound:
    return NotFound("there is no such delivery", errcode=Errcode.NOT_FOUND)
