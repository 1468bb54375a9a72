"""What callers call their messages: keys, for each API key or account, and room. Each function is work on a connection.

A key stands for a delivery, and outlives it: `retention` keeps the event id of what it deletes.
"""

import random
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, func, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.store.statements import insert
from flowbridge.store.tables import message_keys

MAX_KEYS = 20_000  # of one API key or account, about; those that were used longest ago give way …
COUNTED = 100  # … when they are counted, which takes 1 ms: as many times as this on the way to so many
KEEP_DAYS = 90
PURGED = 2_500  # keys that are deleted at once


class Known(NamedTuple):
    """What a key stands for. `event_id`: if the delivery may be deleted; `story`: JSON (events/stories.py)."""

    delivery: str
    event_id: str | None
    story: str | None


def find(connection: Connection, owner: str, room_id: str, key: str) -> dict[str, Any] | None:
    """What a key stands for: `delivery`, and `event_id` if the delivery may be deleted."""
    columns = (message_keys.c.delivery, message_keys.c.event_id)
    found = connection.execute(select(*columns).where(_is(owner, room_id, key))).mappings().first()
    return dict(found) if found else None


def read(connection: Connection, owner: str, room_id: str, key: str) -> Known | None:
    """As `find`, with what was last said of its story, if it is one."""
    columns = (message_keys.c.delivery, message_keys.c.event_id, message_keys.c.story)
    found = connection.execute(select(*columns).where(_is(owner, room_id, key))).first()
    return Known(*found) if found else None


def of_delivery(connection: Connection, delivery: str) -> str | None:
    """The event id of a deleted delivery that a key stands for."""
    found = select(message_keys.c.event_id).where(message_keys.c.delivery == delivery)
    event_id: str | None = connection.scalar(found.where(message_keys.c.event_id.is_not(None)).limit(1))
    return event_id


def assign(
    connection: Connection,
    owner: str,
    room_id: str,
    key: str,
    delivery: str,
    now: int,
    *,
    event_id: str | None = None,
    story: str | None = None,
) -> None:
    """Let a key stand for this delivery from now on (ms)."""
    values = {"delivery": delivery, "event_id": event_id, "used_at": now, "story": story}
    statement = insert(connection, message_keys).values(owner=owner, room_id=room_id, key=key, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["owner", "room_id", "key"], set_=values))
    _make_room(connection, owner)


def touch(connection: Connection, owner: str, room_id: str, key: str, now: int) -> None:
    """A key was used (ms), by a message of no story: what was said of one holds no longer."""
    connection.execute(update(message_keys).where(_is(owner, room_id, key)).values(used_at=now, story=None))


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
    if random.randrange(MAX_KEYS // COUNTED + 1):  # noqa: S311 (no secret)
        return
    mine = message_keys.c.owner == owner
    excess = (connection.scalar(select(func.count()).where(mine)) or 0) - MAX_KEYS
    if excess > 0:
        oldest = select(message_keys.c.room_id, message_keys.c.key).where(mine).order_by(message_keys.c.used_at)
        for room_id, key in connection.execute(oldest.limit(excess)).all():
            connection.execute(delete(message_keys).where(_is(owner, room_id, key)))
