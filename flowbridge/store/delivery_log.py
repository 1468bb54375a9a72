"""The only SQL of the delivery log: list, show, replay, remove. Each function is work on a connection."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, literal, or_, select
from sqlalchemy.sql import ColumnElement

from flowbridge.store.outbox import HISTORY, keep_ids, mark_dirty, now_ms
from flowbridge.store.tables import accounts, lanes, outbox


@dataclass(frozen=True, slots=True)
class Scope:
    """The rooms (by id) and event types that an API key is for; a type may end in `*`. None, or no types: all."""

    rooms: frozenset[str] | None = None
    event_types: tuple[str, ...] = ()


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True)
class Whose:
    """Whose events are meant: one user's, from all devices, or one API key's; neither named: everybody's.

    `users`: with a key also the events that these users sent with tokens of their own. `scope` limits what others than
    the viewer itself sent: a key sees its own events also where it may no longer send.
    """

    user_id: str | None = None
    api_key: str | None = None
    users: tuple[str, ...] = ()
    scope: Scope = EVERYWHERE


ALL = Whose()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events are meant: those for which all holds that is given. Times are ms; `until` itself is left out."""

    whose: Whose = ALL
    states: tuple[str, ...] = ()
    room_id: str | None = None
    event_type: str | None = None
    since: int | None = None
    until: int | None = None

    @property
    def is_quick(self) -> bool:
        """Whether nothing, or an index that is kept for it, is between this and its rows."""
        return self.states == ("dead",) or self == Selection()


@dataclass(frozen=True, slots=True)
class Standing:
    """How an event stands in its lane: how many are before it, what was tried of the first one (JSON).

    `rests_until`: when the lane is tried again (ms); None when it does not rest.
    """

    before: int
    history: str
    rests_until: int | None


MAX_OLDER = 1_000  # events that are counted before one

_LISTED = (
    outbox.c.id,
    outbox.c.delivery,
    outbox.c.room_id,
    outbox.c.event_type,
    outbox.c.state_key,
    outbox.c.state,
    outbox.c.txn_id,
    outbox.c.attempts,
    outbox.c.event_id,
    outbox.c.error,
    outbox.c.api_key,
    outbox.c.accepted_at,
    outbox.c.settled_at,
    accounts.c.user_id,
)
_WITH_USER = outbox.outerjoin(accounts, accounts.c.account == outbox.c.account)


def get(connection: Connection, delivery: str, whose: Whose = ALL) -> dict[str, Any] | None:
    """One event with all that is known of it, and its `user_id`."""
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER)
    found = connection.execute(query.where(outbox.c.delivery == delivery, *_belongs(whose))).mappings().first()
    return dict(found) if found else None


def standing(connection: Connection, delivery: str) -> Standing | None:
    """How a queued event stands in its lane; None when it is not queued any more."""
    mine = connection.execute(
        select(outbox.c.id, outbox.c.lane).where(outbox.c.delivery == delivery, outbox.c.state == "queued")
    ).first()
    if mine is None:
        return None
    queued = (outbox.c.lane == mine.lane, outbox.c.state == "queued")
    older = select(outbox.c.id).where(*queued, outbox.c.id < mine.id).limit(MAX_OLDER)
    before = connection.scalar(select(func.count()).select_from(older.subquery())) or 0
    history = connection.scalar(select(outbox.c.history).where(*queued).order_by(outbox.c.id).limit(1))
    lane = connection.execute(
        select(lanes.c.owner, lanes.c.lease_until).where(lanes.c.lane == mine.lane, lanes.c.lease_until > now_ms())
    ).first()
    rests_until = lane.lease_until if lane is not None and lane.owner is None else None
    return Standing(before, history or "[]", rests_until)


def page(
    connection: Connection, selection: Selection, limit: int, before: int | None = None, span: int | None = None
) -> tuple[list[dict[str, Any]], int | None]:
    """Events as a list shows them, the newest first, and the id before which to go on; None when there are no more.

    Only ids below `before`. `span`: how many ids are looked at, so that a search for what is rare can be cut up.
    """
    query = select(*_LISTED).select_from(_WITH_USER).where(*_chosen(selection)).order_by(outbox.c.id.desc())
    if before is None:
        before = (connection.scalar(select(func.max(outbox.c.id))) or 0) + 1
    query = query.where(outbox.c.id < before)
    floor = 0 if span is None or selection.is_quick else before - span
    if floor > 0:
        query = query.where(outbox.c.id >= floor)
    rows = [dict(row) for row in connection.execute(query.limit(limit)).mappings()]
    if len(rows) == limit:
        return rows, rows[-1]["id"]
    older = connection.scalar(select(func.max(outbox.c.id)).where(outbox.c.id < floor)) if floor > 0 else None
    return rows, None if older is None else older + 1


def queued_behind(connection: Connection, row: Mapping[str, Any]) -> str | None:
    """The newest queued event, if there is one, that sets the same state as this row, from the same account."""
    found: str | None = connection.scalar(
        select(outbox.c.delivery)
        .where(
            outbox.c.lane == row["lane"],
            outbox.c.state == literal("queued", literal_execute=True),  # for the index of such events
            outbox.c.event_type == row["event_type"],
            outbox.c.state_key == row["state_key"],
            outbox.c.delivery != row["delivery"],
        )
        .order_by(outbox.c.id.desc())
        .limit(1)
    )
    return found


def state_events(
    connection: Connection, selection: Selection, after: int, last: int, limit: int
) -> list[dict[str, Any]]:
    """State events as `get` gives them, the oldest first. Only ids in `after < id <= last`."""
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER).where(*_chosen(selection))
    query = query.where(outbox.c.state_key.is_not(None), outbox.c.id > after, outbox.c.id <= last)
    return [dict(row) for row in connection.execute(query.order_by(outbox.c.id).limit(limit)).mappings()]


def extent(connection: Connection, selection: Selection) -> tuple[int, int]:
    """How many events there are, and the id of the newest; 0 when there is none."""
    found = connection.execute(select(func.count(), func.max(outbox.c.id)).where(*_chosen(selection))).one()
    return found[0], found[1] or 0


def deliveries(
    connection: Connection, selection: Selection, after: int, last: int, limit: int
) -> list[tuple[int, str]]:
    """The ids and names of events, the oldest first, as they are to be replayed. Only ids in `after < id <= last`."""
    query = select(outbox.c.id, outbox.c.delivery).where(*_chosen(selection), outbox.c.id > after, outbox.c.id <= last)
    return [(id_, delivery) for id_, delivery in connection.execute(query.order_by(outbox.c.id).limit(limit))]


def settled(connection: Connection, before: int) -> dict[str, int]:
    """How many events there are in each state that were settled before (ms)."""
    found = connection.execute(
        select(outbox.c.state, func.count())
        .where(outbox.c.settled_at < before, outbox.c.state != "queued")
        .group_by(outbox.c.state)
    )
    return {str(state): int(number) for state, number in found}


def queued_of(connection: Connection, selection: Selection) -> list[tuple[str, int]]:
    """Of whom there are queued events, and how many: the user, with the API key that sent them if one did."""
    query = select(accounts.c.user_id, outbox.c.api_key, func.count()).select_from(_WITH_USER)
    rows = connection.execute(
        query.where(*chosen(selection)).group_by(accounts.c.user_id, outbox.c.api_key).order_by(func.count().desc())
    )
    return [
        ((user_id or "an unknown user") + (f" (API key {api_key})" if api_key else ""), number)
        for user_id, api_key, number in rows
    ]


def chosen(selection: Selection, last: int | None = None) -> list[ColumnElement[bool]]:
    """What holds for the events of a selection; only ids up to `last`."""
    found = _chosen(selection)
    return found if last is None else [*found, outbox.c.id <= last]


def replay(
    connection: Connection, delivery: str, txn_id: str, by: str, *, whose: Whose = ALL, account: str | None = None
) -> dict[str, Any] | None:
    """Queue a settled event anew, at the tail of its lane. Returns the row as it is now; None when it is not settled.

    `by`: who wants it, for the history. `account`: send it with this account of the same user, if a user sent it.
    Done again with the same `txn_id`, since nobody heard of the first time, it does nothing more.
    """
    settled = [*_settled(delivery, whose), outbox.c.txn_id != txn_id]
    keep_ids(connection, *settled)
    row = connection.execute(delete(outbox).where(*settled).returning(outbox)).mappings().first()
    if row is None:
        mine = select(outbox).where(outbox.c.delivery == delivery, outbox.c.txn_id == txn_id)
        row = connection.execute(mine).mappings().first()
        return None if row is None else dict(row)
    was = {name: row[name] for name in ("state", "txn_id", "event_id", "accepted_at") if row[name] is not None}
    now = now_ms()
    history = [*json.loads(row["history"]), {"at": now, "replayed": {"by": by, **was}}]
    sender = row["account"] if account is None or row["api_key"] is not None else account
    again = {
        **{name: value for name, value in row.items() if name not in ("id", "event_id", "error", "settled_at")},
        "account": sender,
        "lane": f"{sender}|{row['room_id']}",
        "state": "queued",
        "txn_id": txn_id,
        "attempts": 0,
        "history": json.dumps(history[-HISTORY:]),
        "accepted_at": now,
    }
    connection.execute(insert(outbox), [again])
    mark_dirty(connection, [(again["lane"], again["account"])])
    return again


def remove(connection: Connection, delivery: str, whose: Whose = ALL) -> bool:
    """Delete a settled event."""
    keep_ids(connection, *_settled(delivery, whose))
    return connection.execute(delete(outbox).where(*_settled(delivery, whose))).rowcount > 0


def _settled(delivery: str, whose: Whose) -> list[ColumnElement[bool]]:
    return [outbox.c.delivery == delivery, outbox.c.state != "queued", *_belongs(whose)]


def _belongs(whose: Whose) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if whose.user_id is not None:
        theirs = select(accounts.c.account).where(accounts.c.user_id == whose.user_id)
        found.append(outbox.c.account.in_(theirs))
    if whose.api_key is not None:
        own = outbox.c.api_key == whose.api_key
        found.append(or_(own, and_(_of_users(whose.users), *_within(whose.scope))) if whose.users else own)
    else:
        found += _within(whose.scope)
    return found


def _of_users(users: tuple[str, ...]) -> ColumnElement[bool]:
    """What these users sent with tokens of their own."""
    theirs = select(accounts.c.account).where(accounts.c.user_id.in_(users))
    return and_(outbox.c.api_key.is_(None), outbox.c.account.in_(theirs))


def _within(scope: Scope) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if scope.rooms is not None:
        found.append(outbox.c.room_id.in_(sorted(scope.rooms)))
    if scope.event_types:
        found.append(or_(*map(_is_type, scope.event_types)))
    return found


def _is_type(scope: str) -> ColumnElement[bool]:
    """`m.room.*` is whatever begins with `m.room.`; LIKE would not do, which SQLite compares without regard to case."""
    if scope.endswith("*"):
        return func.substr(outbox.c.event_type, 1, len(scope) - 1) == scope[:-1]
    return outbox.c.event_type == scope


def _chosen(selection: Selection) -> list[ColumnElement[bool]]:
    found = _belongs(selection.whose)
    if selection.states:  # written out, not bound: a plan for any state could not use the index of the dead
        states = [literal(state, literal_execute=True) for state in selection.states]
        found.append(outbox.c.state == states[0] if len(states) == 1 else outbox.c.state.in_(states))
    if selection.room_id is not None:
        found.append(outbox.c.room_id == selection.room_id)
    if selection.event_type is not None:
        found.append(outbox.c.event_type == selection.event_type)
    if selection.since is not None:
        found.append(outbox.c.accepted_at >= selection.since)
    if selection.until is not None:
        found.append(outbox.c.accepted_at < selection.until)
    return found
