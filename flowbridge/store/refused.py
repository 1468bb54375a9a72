"""Sends that were answered with a 4xx, for the delivery log. Each function is work on a connection.

A caller has a share of the rows, all unknown callers together have another one: neither pushes out what others need to
see. So few rows need no index of what they are filtered by.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.models.hooks import owner
from flowbridge.store import contents
from flowbridge.store.delivery_log import EVERYWHERE, Scope, Selection, Whose, is_type
from flowbridge.store.json_columns import to_json
from flowbridge.store.statements import insert
from flowbridge.store.tables import outbox, refused

TOTAL = 10_000
EACH = 1_000

Place = tuple[int, int]  # the position in the log, and the id


@dataclass(frozen=True, slots=True)
class Kept:
    """How many rows there may be, in all and of one caller."""

    total: int = TOTAL
    each: int = EACH


def write(
    connection: Connection, new: Iterable[Mapping[str, Any]], again: Iterable[Mapping[str, Any]], kept: Kept = Kept()
) -> None:
    """Add rows, and raise the numbers of known ones (`b_delivery`, `b_number`, `b_last_at`) by so many."""
    position = connection.scalar(select(func.max(outbox.c.id))) or 0
    rows = [{**row, "position": position} for row in new]
    if rows:
        connection.execute(insert(connection, refused).on_conflict_do_nothing(), rows)  # it may run twice
    if values := list(again):
        connection.execute(_AGAIN, values)
    for caller in {row["caller"] for row in rows}:
        mine = select(refused.c.id).where(refused.c.caller == caller).order_by(refused.c.id.desc())
        last = connection.scalar(mine.offset(kept.each).limit(1))
        connection.execute(delete(refused).where(refused.c.caller == caller, refused.c.id <= (last or 0)))
    while rows and (connection.scalar(select(func.count()).select_from(refused)) or 0) > kept.total:
        _shorten(connection)


_AGAIN = (
    update(refused)
    .where(refused.c.delivery == bindparam("b_delivery"))
    .values(number=refused.c.number + bindparam("b_number"), last_at=bindparam("b_last_at"))
)


def _shorten(connection: Connection) -> None:
    """Delete the older half of the caller's that has most."""
    number = func.count()
    most = select(refused.c.caller, number).group_by(refused.c.caller).order_by(number.desc(), refused.c.caller)
    caller, held = connection.execute(most.limit(1)).one()
    mine = select(refused.c.id).where(refused.c.caller == caller).order_by(refused.c.id.desc())
    last = connection.scalar(mine.offset(held // 2).limit(1))
    connection.execute(delete(refused).where(refused.c.caller == caller, refused.c.id <= last))


def page(connection: Connection, selection: Selection, limit: int, before: Place | None = None) -> list[dict[str, Any]]:
    """Those that match, the newest first; only those before this place in the log."""
    query = select(refused).where(*_chosen(selection)).order_by(refused.c.position.desc(), refused.c.id.desc())
    if before is not None:
        position, id_ = before
        at = and_(refused.c.position == position, refused.c.id < id_)
        query = query.where(or_(refused.c.position < position, at))
    return [_opened(connection, row) for row in connection.execute(query.limit(limit)).mappings()]


def get(connection: Connection, delivery: str, whose: Whose) -> dict[str, Any] | None:
    found = connection.execute(select(refused).where(refused.c.delivery == delivery, *_belongs(whose))).mappings()
    row = found.first()
    return _opened(connection, row) if row else None


def _opened(connection: Connection, row: RowMapping) -> dict[str, Any]:
    """What a caller was told quotes what it sent: it may be encrypted as a content is."""
    error = contents.of(connection).open(row["error"], row["delivery"])
    return {**row, "error": to_json({"error": contents.OTHER_KEY}) if contents.is_sealed(error) else error}


def remove(connection: Connection, delivery: str, whose: Whose) -> bool:
    return connection.execute(delete(refused).where(refused.c.delivery == delivery, *_belongs(whose))).rowcount > 0


def number(connection: Connection, before: int) -> int:
    """How many were refused for the last time before (ms)."""
    return connection.scalar(select(func.count()).select_from(refused).where(refused.c.last_at < before)) or 0


def purge(connection: Connection, before: int) -> int:
    """Delete those that were refused for the last time before (ms)."""
    return connection.execute(delete(refused).where(refused.c.last_at < before)).rowcount


def _chosen(selection: Selection) -> list[ColumnElement[bool]]:
    found = _belongs(selection.whose)
    if selection.names:
        found.append(refused.c.delivery.in_(selection.names))
    if selection.room_id is not None:
        found.append(refused.c.room_id.in_([selection.room_id, selection.alias or selection.room_id]))
    if selection.event_type is not None:
        found.append(refused.c.event_type == selection.event_type)
    if selection.hook is not None:
        found.append(refused.c.api_key == owner(selection.hook))
    if selection.since is not None:
        found.append(refused.c.last_at >= selection.since)
    if selection.until is not None:
        found.append(refused.c.refused_at < selection.until)
    return found


def _belongs(whose: Whose) -> list[ColumnElement[bool]]:
    """As of events. What callers sent who are not known is for a viewer without limits alone."""
    found: list[ColumnElement[bool]] = []
    if whose.user_id is not None:
        found.append(refused.c.user_id == whose.user_id)
    if whose.api_key is not None:
        theirs = and_(refused.c.user_id.in_(whose.users), *_within(whose.scope))
        found.append(or_(refused.c.api_key == whose.api_key, theirs))
    else:
        found += _within(whose.scope)
    return found


def _within(scope: Scope) -> list[ColumnElement[bool]]:
    if scope == EVERYWHERE:
        return []
    found: list[ColumnElement[bool]] = [refused.c.caller != ""]
    if scope.rooms is not None:
        found.append(refused.c.room_id.in_(sorted(scope.rooms)))
    if scope.event_types:
        found.append(or_(*(is_type(refused.c.event_type, scope_) for scope_ in scope.event_types)))
    return found
