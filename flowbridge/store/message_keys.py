"""What callers call their messages: keys, for each API key or account, and room. Each function is work on a connection.

A key stands for a delivery, and outlives it: `retention` keeps the event id of what it deletes.
"""

from typing import Any

from sqlalchemy import Connection, and_, delete, func, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.store.statements import insert
from flowbridge.store.tables import message_keys

MAX_KEYS = 20_000  # of one API key or account; the one that was used longest ago gives way (counting them takes 1 ms)
KEEP_DAYS = 90
PURGED = 2_500  # keys that are deleted at once


def find(connection: Connection, owner: str, room_id: str, key: str) -> dict[str, Any] | None:
    """What a key stands for: `delivery`, and `event_id` if the delivery may be deleted."""
    columns = (message_keys.c.delivery, message_keys.c.event_id)
    found = connection.execute(select(*columns).where(_is(owner, room_id, key))).mappings().first()
    return dict(found) if found else None


def of_delivery(connection: Connection, delivery: str) -> str | None:
    """The event id of a deleted delivery that a key stands for."""
    found = select(message_keys.c.event_id).where(message_keys.c.delivery == delivery)
    event_id: str | None = connection.scalar(found.where(message_keys.c.event_id.is_not(None)).limit(1))
    return event_id


def assign(connection: Connection, owner: str, room_id: str, key: str, delivery: str, now: int) -> None:
    """Let a key stand for this delivery from now on (ms)."""
    values = {"delivery": delivery, "event_id": None, "used_at": now}
    statement = insert(connection, message_keys).values(owner=owner, room_id=room_id, key=key, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["owner", "room_id", "key"], set_=values))
    _make_room(connection, owner)


def touch(connection: Connection, owner: str, room_id: str, key: str, now: int) -> None:
    """A key was used (ms)."""
    connection.execute(update(message_keys).where(_is(owner, room_id, key)).values(used_at=now))


def forget(connection: Connection, used_before: int) -> int:
    """Delete keys that have not been used since (ms), some at once; returns how many."""
    old = select(message_keys.c.owner, message_keys.c.room_id, message_keys.c.key)
    rows = connection.execute(old.where(message_keys.c.used_at < used_before).limit(PURGED)).all()
    for row in rows:
        connection.execute(delete(message_keys).where(_is(*row), message_keys.c.used_at < used_before))
    return len(rows)


def _is(owner: str, room_id: str, key: str) -> ColumnElement[bool]:
    return and_(message_keys.c.owner == owner, message_keys.c.room_id == room_id, message_keys.c.key == key)


def _make_room(connection: Connection, owner: str) -> None:
    mine = message_keys.c.owner == owner
    if (connection.scalar(select(func.count()).where(mine)) or 0) > MAX_KEYS:
        oldest = select(message_keys.c.room_id, message_keys.c.key).where(mine).order_by(message_keys.c.used_at)
        room_id, key = connection.execute(oldest.limit(1)).one()
        connection.execute(delete(message_keys).where(_is(owner, room_id, key)))
