"""The delivery log: list, show, replay, remove. Each function is work on a connection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, or_, select
from sqlalchemy.sql import ColumnElement

from flowbridge.store import clock
from flowbridge.store.json_columns import from_json, to_json
from flowbridge.store.leases import mark_dirty
from flowbridge.store.outbox import HISTORY
from flowbridge.store.retention import keep_ids
from flowbridge.store.statements import QUEUED, is_state
from flowbridge.store.tables import accounts, lanes, outbox


@dataclass(frozen=True, slots=True)
class Scope:
    """The rooms (by id) and event types that an API key is for: all with None, or no types. A type may end in `*`."""

    rooms: frozenset[str] | None = None
    event_types: tuple[str, ...] = ()


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True)
class Whose:
    """The events of one user, from all devices, or of one API key; of all callers with neither.

    `users`: with a key, also the events that these users sent with tokens of their own. `scope` limits what others than
    the viewer itself sent: a key sees its own events also where it may no longer send.
    """

    user_id: str | None = None
    api_key: str | None = None
    users: tuple[str, ...] = ()
    scope: Scope = EVERYWHERE


ALL = Whose()


@dataclass(frozen=True, slots=True)
class Selection:
    """The events that match everything given. Times are ms; `until` itself is excluded.

    `names`: only these deliveries.
    """

    whose: Whose = ALL
    names: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    room_id: str | None = None
    event_type: str | None = None
    since: int | None = None
    until: int | None = None

    @property
    def is_quick(self) -> bool:
        """Whether its rows are found without a search: it selects all events, or has an index of its own."""
        return bool(self.names) or self.states == ("dead",) or self == Selection()


@dataclass(frozen=True, slots=True)
class Standing:
    """The place of an event in its lane: how many are before it, and the history of the first one (JSON).

    `rests_until`: when the lane is tried again (ms); None when it does not rest.
    """

    before: int
    history: str
    rests_until: int | None


MAX_OLDER = 1_000  # events that are counted before one

_UNLISTED = ("lane", "account", "content", "request", "idem", "fingerprint", "history")
_LISTED = (*(column for column in outbox.c if column.name not in _UNLISTED), accounts.c.user_id)
_WITH_USER = outbox.outerjoin(accounts, accounts.c.account == outbox.c.account)


def get(connection: Connection, delivery: str, whose: Whose = ALL) -> dict[str, Any] | None:
    """One event with all its columns, and its `user_id`."""
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER)
    found = connection.execute(query.where(outbox.c.delivery == delivery, *_belongs(whose))).mappings().first()
    return dict(found) if found else None


def standing(connection: Connection, delivery: str) -> Standing | None:
    """The place of a queued event in its lane; None when it is not queued any more."""
    mine = connection.execute(select(outbox.c.id, outbox.c.lane).where(outbox.c.delivery == delivery, QUEUED)).first()
    if mine is None:
        return None
    queued = (outbox.c.lane == mine.lane, QUEUED)
    older = select(outbox.c.id).where(*queued, outbox.c.id < mine.id).limit(MAX_OLDER)
    before = connection.scalar(select(func.count()).select_from(older.subquery())) or 0
    history = connection.scalar(select(outbox.c.history).where(*queued).order_by(outbox.c.id).limit(1))
    resting = (lanes.c.lane == mine.lane, lanes.c.owner.is_(None), lanes.c.lease_until > clock.now_ms())
    return Standing(before, history or "[]", connection.scalar(select(lanes.c.lease_until).where(*resting)))


def page(
    connection: Connection, selection: Selection, limit: int, before: int | None = None, span: int | None = None
) -> tuple[list[dict[str, Any]], int | None]:
    """Events as a list shows them, the newest first, and the id before which to go on; None when there are no more.

    Only ids below `before`. `span`: how many ids are searched, so that a search for rare events can be cut up.
    """
    query = select(*_LISTED).select_from(_WITH_USER).where(*chosen(selection)).order_by(outbox.c.id.desc())
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
            QUEUED,
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
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER).where(*chosen(selection, last))
    query = query.where(outbox.c.state_key.is_not(None), outbox.c.id > after)
    return [dict(row) for row in connection.execute(query.order_by(outbox.c.id).limit(limit)).mappings()]


def extent(connection: Connection, selection: Selection) -> tuple[int, int]:
    """How many events there are, and the id of the newest; 0 when there is none."""
    found = connection.execute(select(func.count(), func.max(outbox.c.id)).where(*chosen(selection))).one()
    return found[0], found[1] or 0


def deliveries(
    connection: Connection, selection: Selection, after: int, last: int, limit: int
) -> list[tuple[int, str]]:
    """The ids and names of events, the oldest first, as they are to be replayed. Only ids in `after < id <= last`."""
    query = select(outbox.c.id, outbox.c.delivery).where(*chosen(selection, last), outbox.c.id > after)
    return [(id_, delivery) for id_, delivery in connection.execute(query.order_by(outbox.c.id).limit(limit))]


def settled(connection: Connection, before: int) -> dict[str, int]:
    """How many events there are in each state that were settled before (ms)."""
    found = connection.execute(
        select(outbox.c.state, func.count()).where(outbox.c.settled_at < before, ~QUEUED).group_by(outbox.c.state)
    )
    return {str(state): int(number) for state, number in found}


def queued_of(connection: Connection, selection: Selection) -> list[tuple[str, int]]:
    """How many events are queued for each user, and for each API key that sent them as that user."""
    query = select(accounts.c.user_id, outbox.c.api_key, func.count()).select_from(_WITH_USER)
    rows = connection.execute(
        query.where(*chosen(selection)).group_by(accounts.c.user_id, outbox.c.api_key).order_by(func.count().desc())
    )
    return [
        ((user_id or "an unknown user") + (f" (API key {api_key})" if api_key else ""), number)
        for user_id, api_key, number in rows
    ]


def replay(
    connection: Connection, delivery: str, txn_id: str, by: str, *, whose: Whose = ALL, account: str | None = None
) -> dict[str, Any] | None:
    """Queue a settled event again, at the tail of its lane. Returns the row as it is now; None when it is not settled.

    `by`: who asked for it, for the history. `account`: send it with this account of the same user, if a user sent it.
    Repeated with the same `txn_id`, because the answer to the first call was lost, it does nothing more.
    """
    settled = [*_settled(delivery, whose), outbox.c.txn_id != txn_id]
    keep_ids(connection, *settled)
    row = connection.execute(delete(outbox).where(*settled).returning(outbox)).mappings().first()
    if row is None:
        mine = select(outbox).where(outbox.c.delivery == delivery, outbox.c.txn_id == txn_id)
        row = connection.execute(mine).mappings().first()
        return None if row is None else dict(row)
    was = {name: row[name] for name in ("state", "txn_id", "event_id", "accepted_at") if row[name] is not None}
    now = clock.now_ms()
    history = [*from_json(row["history"]), {"at": now, "replayed": {"by": by, **was}}]
    sender = row["account"] if account is None or row["api_key"] is not None else account
    again = {
        **{name: value for name, value in row.items() if name not in ("id", "event_id", "error", "settled_at")},
        "account": sender,
        "lane": f"{sender}|{row['room_id']}",
        "state": "queued",
        "txn_id": txn_id,
        "attempts": 0,
        "history": to_json(history[-HISTORY:]),
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
    return [outbox.c.delivery == delivery, ~QUEUED, *_belongs(whose)]


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
    """Events that these users sent with tokens of their own."""
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
    """`m.room.*` is any type that begins with `m.room.`; not by LIKE, which SQLite compares without regard to case."""
    if scope.endswith("*"):
        return func.substr(outbox.c.event_type, 1, len(scope) - 1) == scope[:-1]
    return outbox.c.event_type == scope


def chosen(selection: Selection, last: int | None = None) -> list[ColumnElement[bool]]:
    """The conditions of a selection; only ids up to `last`."""
    found = _belongs(selection.whose)
    if last is not None:
        found.append(outbox.c.id <= last)
    if selection.names:
        found.append(outbox.c.delivery.in_(selection.names))
    if selection.states:
        found.append(or_(*map(is_state, selection.states)))
    if selection.room_id is not None:
        found.append(outbox.c.room_id == selection.room_id)
    if selection.event_type is not None:
        found.append(outbox.c.event_type == selection.event_type)
    if selection.since is not None:
        found.append(outbox.c.accepted_at >= selection.since)
    if selection.until is not None:
        found.append(outbox.c.accepted_at < selection.until)
    return found
