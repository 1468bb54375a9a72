"""What callers call their messages: keys, for each API key or account, and room. Each function is work on a connection.

A key stands for a delivery, and outlives it: `retention` keeps the event id of what it deletes.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, and_, delete, func, select
from sqlalchemy.sql import ClauseElement, ColumnElement

from flowbridge.store import driver
from flowbridge.store.driver import Statement
from flowbridge.store.tables import message_keys

MAX_KEYS = 20_000  # of one API key or account, about; those that were used longest ago give way …
COUNTED = 100  # … when they are counted, which takes 1 ms: as many times as this on the way to so many
KEEP_DAYS = 90
PURGED = 2_500  # keys that are deleted at once

Key = tuple[str, str, str]  # owner, room id, and the name


class Known(NamedTuple):
    """What a key stands for. `event_id`: if the delivery may be deleted; `story`: JSON (events/stories.py)."""

    delivery: str
    event_id: str | None = None
    story: str | None = None


# By joins, since neither engine looks a list of rows up in an index.
_READ = {
    "sqlite": "SELECT m.owner, m.room_id, m.key, m.delivery, m.event_id, m.story FROM json_each(:keys) AS k "
    "CROSS JOIN message_keys AS m ON m.owner = json_extract(k.value, '$[0]') "
    "AND m.room_id = json_extract(k.value, '$[1]') AND m.key = json_extract(k.value, '$[2]')",
    "postgresql": "SELECT m.owner, m.room_id, m.key, m.delivery, m.event_id, m.story "
    "FROM json_array_elements(CAST(%(keys)s AS json)) AS k(value) "
    "JOIN message_keys AS m ON m.owner = k.value->>0 AND m.room_id = k.value->>1 AND m.key = k.value->>2",
}


def read(connection: Connection, keys: Iterable[Key]) -> dict[Key, Known]:
    """What these keys stand for."""
    found = driver.execute(connection, _READ[connection.dialect.name], {"keys": driver.to_json(list(keys))})
    return {(owner, room_id, key): Known(*known) for owner, room_id, key, *known in found}


def write(connection: Connection, keys: Mapping[Key, Known], now: int) -> None:
    """What these keys stand for from now on (ms). In one order: no two replicas wait for each other."""
    if not keys:
        return
    rows = [dict(zip(_WRITTEN, (*key, *known, now), strict=True)) for key, known in sorted(keys.items())]
    _WRITE.run_all(connection, rows)
    for owner, number in sorted(Counter(owner for owner, _, _ in keys).items()):
        _make_room(connection, owner, number)


_WRITTEN = ("owner", "room_id", "key", "delivery", "event_id", "story", "used_at")


def _write(dialect: str) -> ClauseElement:
    insertion = driver.insertion(dialect, message_keys, _WRITTEN)
    changed = {name: insertion.excluded[name] for name in ("delivery", "event_id", "story", "used_at")}
    return insertion.on_conflict_do_update(index_elements=["owner", "room_id", "key"], set_=changed)


_WRITE = Statement(_write)


def of_delivery(connection: Connection, delivery: str) -> str | None:
    """The event id of a deleted delivery that a key stands for."""
    found = select(message_keys.c.event_id).where(message_keys.c.delivery == delivery)
    event_id: str | None = connection.scalar(found.where(message_keys.c.event_id.is_not(None)).limit(1))
    return event_id


def forget(connection: Connection, used_before: int) -> int:
    """Delete keys that have not been used since (ms), some at once; returns how many."""
    old = select(message_keys.c.owner, message_keys.c.room_id, message_keys.c.key)
    rows = connection.execute(old.where(message_keys.c.used_at < used_before).limit(PURGED)).all()
    for row in rows:
        connection.execute(delete(message_keys).where(_is(*row), message_keys.c.used_at < used_before))
    return len(rows)


def _is(owner: str, room_id: str, key: str) -> ColumnElement[bool]:
    return and_(message_keys.c.owner == owner, message_keys.c.room_id == room_id, message_keys.c.key == key)


def _make_room(connection: Connection, owner: str, written: int) -> None:
    if random.random() * MAX_KEYS >= written * COUNTED:  # noqa: S311 (no secret)
        return
    mine = message_keys.c.owner == owner
    excess = (connection.scalar(select(func.count()).where(mine)) or 0) - MAX_KEYS
    if excess > 0:
        oldest = select(message_keys.c.room_id, message_keys.c.key).where(mine).order_by(message_keys.c.used_at)
        for room_id, key in connection.execute(oldest.limit(excess).with_for_update(skip_locked=True)).all():
            connection.execute(delete(message_keys).where(_is(owner, room_id, key)))
