"""Which caller holds how much of the store, and what of it is deleted before its time. Each is work on a connection.

Bytes are added up in pieces: SQLite reads a text to tell its length, and 15,000 events of 60 kB took 4 s (on two busy
cores), 300,000 of 1 kB as long.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, LargeBinary, Select, cast, func, literal, select, tuple_
from sqlalchemy.sql import ColumnElement

from flowbridge.store.outbox import ROW_BYTES
from flowbridge.store.retention import forget
from flowbridge.store.statements import DEAD, QUEUED, SENT, is_state
from flowbridge.store.tables import outbox

DROP_ROWS = 2_000  # in one transaction, for which accepting waits
DROP_BYTES = 16 * 1024 * 1024

Place = tuple[str, int]  # a lane, and an id

_caller = func.coalesce(outbox.c.api_key, outbox.c.account)  # as in PendingDelivery.caller
_ID = outbox.c.id


@dataclass(frozen=True, slots=True)
class Piece:
    """Of some events: lane ("" where it does not matter), caller, how many, how many bytes.

    `end`: where the next piece begins; None after the last.
    """

    held: list[tuple[str, str, int, int]]
    end: Place | None


def newest(connection: Connection) -> int:
    """The id of the newest event; 0 when there is none."""
    return connection.scalar(select(func.max(_ID))) or 0


def queued(connection: Connection, after: Place, last: int, limit: int) -> Piece:
    """The next `limit` queued events with ids up to `last`; by lane, as the index has them."""
    is_next = tuple_(outbox.c.lane, _ID) > tuple_(literal(after[0]), literal(after[1]))
    events = select(outbox.c.lane, *_weighed(connection)).where(QUEUED, last >= _ID, is_next)
    return _piece(connection, events.order_by(outbox.c.lane, _ID).limit(limit))


def dead(connection: Connection, after: Place, last: int, limit: int) -> Piece:
    """The next dead letters, by id."""
    events = select(literal("").label("lane"), *_weighed(connection)).where(DEAD, last >= _ID, after[1] < _ID)
    return _piece(connection, events.order_by(_ID).limit(limit))


def _piece(connection: Connection, events: Select[Any]) -> Piece:
    inner = events.subquery()
    columns = (inner.c.lane, inner.c.caller)
    query = select(*columns, func.count(), func.sum(inner.c.weight), func.max(inner.c.id)).group_by(*columns)
    rows = connection.execute(query.order_by(inner.c.lane)).all()
    if not rows:
        return Piece([], None)
    end = (rows[-1][0], max(row[4] for row in rows if row[0] == rows[-1][0]))
    return Piece([(lane, caller, number, int(weight)) for lane, caller, number, weight, _ in rows], end)


def _weighed(connection: Connection) -> tuple[ColumnElement[Any], ...]:
    return _ID, _caller.label("caller"), _weight(connection).label("weight")


def sent(connection: Connection, after: Place, last: int, limit: int) -> Piece:
    """What was sent among the next `limit` ids: there is no index of sent events alone."""
    first = connection.scalar(select(func.min(_ID)).where(after[1] < _ID))
    if first is None or first > last:
        return Piece([], None)
    until = min(first + limit - 1, last)
    query = select(_caller, func.count(), func.sum(_weight(connection)))
    rows = connection.execute(query.where(first <= _ID, until >= _ID, SENT).group_by(_caller)).all()
    return Piece([("", caller, number, int(weight)) for caller, number, weight in rows], ("", until))


def oldest(connection: Connection, caller: str, state: str, most: float = DROP_BYTES) -> list[tuple[int, int]]:
    """The settled events of a caller that are deleted first: id and bytes; at least one, and up to `most` bytes."""
    query = select(_ID, _weight(connection)).where(_caller == caller, is_state(state))
    if state == "sent":
        query = query.where(outbox.c.settled_at.is_not(None)).order_by(outbox.c.settled_at)
    found: list[tuple[int, int]] = []
    weight = 0
    for id_, bytes_ in connection.execute(query.order_by(_ID).limit(DROP_ROWS)):
        if found and weight + bytes_ > most:
            break
        found.append((id_, bytes_))
        weight += bytes_
    return found


def drop_oldest(connection: Connection, before: int, most: float) -> tuple[int, int]:
    """Delete the oldest of what was sent before (ms), until so many bytes are free; returns how many, and their bytes.

    Some at once: more may have to follow.
    """
    settled = (SENT, outbox.c.settled_at.is_not(None), outbox.c.settled_at < before)
    query = select(_ID, _weight(connection)).where(*settled).order_by(outbox.c.settled_at)
    ids, weight = [], 0
    for id_, bytes_ in connection.execute(query.limit(DROP_ROWS)):
        ids.append(id_)
        weight += bytes_
        if weight >= min(most, DROP_BYTES):
            break
    return forget(connection, ids, ["sent"]), weight


def drop(connection: Connection, ids: list[int], state: str) -> int:
    """Delete those of these events that are still in this state; returns how many there were."""
    return forget(connection, ids, [state])


def _weight(connection: Connection) -> ColumnElement[int]:
    """Bytes of an event in the store, about. A text's length is characters: 15,000 of them may be 60,000 bytes."""
    columns = (outbox.c.content, outbox.c.history, outbox.c.request)
    if connection.dialect.name == "postgresql":
        content, history, request = (func.octet_length(column) for column in columns)
    else:
        content, history, request = (func.length(cast(column, LargeBinary)) for column in columns)
    weight: ColumnElement[int] = content + history + func.coalesce(request, 0) + ROW_BYTES
    return weight
