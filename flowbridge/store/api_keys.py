"""API keys. Only the SHA-256 of a key is kept: a reader of the database cannot call with what is in it."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, literal, or_, select, update

from flowbridge.models import ApiKey
from flowbridge.store import clock
from flowbridge.store.json_columns import from_json, to_json
from flowbridge.store.statements import insert
from flowbridge.store.tables import api_keys

PREFIX = "fb_"
FIRST = "first"  # the id of the key that `serve` creates: there cannot be two of them


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as it is listed. Times are milliseconds since 1970; None: never."""

    key: ApiKey
    created_at: int
    revoked_at: int | None
    used_at: int | None


def new_secret() -> str:
    """A key as its holder sends it: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def new_id() -> str:
    return secrets.token_hex(4)


def digest(secret: str) -> bytes:
    """What is kept of a key. Any text has one, even one that is not valid Unicode."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def add(connection: Connection, key: ApiKey, secret: str) -> None:
    connection.execute(api_keys.insert().values(_values(key, secret)))


def add_first(connection: Connection, secret: str) -> bool:
    """Add a key without limits when there is no key, not even a revoked one; False when there is.

    Of two replicas that do so at once, the second waits for the first one's commit: both want the same id.
    """
    values = _values(ApiKey(FIRST, FIRST, admin=True), secret)
    none_yet = ~select(api_keys.c.id).exists()
    row = select(*(literal(value, api_keys.c[name].type) for name, value in values.items())).where(none_yet)
    statement = insert(connection, api_keys).from_select(list(values), row).on_conflict_do_nothing()
    return connection.scalar(statement.returning(api_keys.c.id)) is not None


def version(connection: Connection) -> tuple[int, ...]:
    """Another one after each change. Of 20,000 keys it is read in 2 ms, the keys themselves in 130.

    Keys are added and revoked, and nothing else of them that counts ever changes.
    """
    columns = (api_keys.c.created_at, api_keys.c.revoked_at)
    found = [func.count(), *(of(column) for column in columns for of in (func.count, func.max))]
    return tuple(value or 0 for value in connection.execute(select(*found).select_from(api_keys)).one())


def valid(connection: Connection) -> list[tuple[bytes, ApiKey]]:
    """The keys that are not revoked: their SHA-256, and what they may do."""
    found = connection.execute(select(*_KEY, api_keys.c.hash).where(api_keys.c.revoked_at.is_(None)))
    return [(bytes.fromhex(row.hash), _key(*row[:-1])) for row in found]


def every(connection: Connection) -> list[Entry]:
    """All keys, the oldest first."""
    times = (api_keys.c.created_at, api_keys.c.revoked_at, api_keys.c.used_at)
    found = connection.execute(select(*_KEY, *times).order_by(api_keys.c.created_at, api_keys.c.id))
    return [Entry(_key(*row[: len(_KEY)]), *row[len(_KEY) :]) for row in found]


def revoke(connection: Connection, id_: str) -> int | None:
    """Revoke a key; returns when it was revoked (ms), perhaps long ago. None: there is no such key."""
    valid = update(api_keys).where(api_keys.c.id == id_, api_keys.c.revoked_at.is_(None))
    connection.execute(valid.values(revoked_at=clock.now_ms()))
    revoked_at: int | None = connection.scalar(select(api_keys.c.revoked_at).where(api_keys.c.id == id_))
    return revoked_at


def note_use(connection: Connection, used: Mapping[str, int]) -> None:
    """Record when keys were last used: id → ms. Of several replicas the last use counts."""
    older = or_(api_keys.c.used_at.is_(None), api_keys.c.used_at < bindparam("at"))
    note = update(api_keys).where(api_keys.c.id == bindparam("key"), older).values(used_at=bindparam("at"))
    # In one order, so that two replicas do not wait for each other.
    connection.execute(note, [{"key": id_, "at": at} for id_, at in sorted(used.items())])


_KEY = tuple(api_keys.c[name] for name in ("id", "name", "rooms", "event_types", "admin", "users"))


def _key(id_: str, name: str, rooms: str, event_types: str, admin: int, users: str) -> ApiKey:
    limits = (tuple(from_json(rooms)), tuple(from_json(event_types)))
    return ApiKey(id_, name, *limits, bool(admin), tuple(from_json(users)))


def _values(key: ApiKey, secret: str) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "hash": digest(secret).hex(),
        "rooms": to_json(key.rooms),
        "event_types": to_json(key.event_types),
        "admin": int(key.admin),
        "users": to_json(key.users),
        "created_at": clock.now_ms(),
    }
