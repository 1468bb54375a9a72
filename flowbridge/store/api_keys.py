"""API keys. Only the SHA-256 of a key is kept: whoever reads the database cannot call with what is in it."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flowbridge.models import ApiKey
from flowbridge.store.outbox import now_ms
from flowbridge.store.tables import api_keys

PREFIX = "fb_"
FIRST = "first"  # the id of the key that `serve` makes: there cannot be two of them


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
    """What is kept of a key. Any text has one, even what is no Unicode."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def add(connection: Connection, key: ApiKey, secret: str) -> None:
    connection.execute(api_keys.insert().values(_values(key, secret)))


def add_first(connection: Connection, secret: str) -> bool:
    """Add a key that may do all, when there is no key, not even a revoked one; False when there is.

    Of two replicas that do so at once, the second waits for the first one's commit: both want the same id.
    """
    build = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    values = _values(ApiKey(FIRST, FIRST, admin=True), secret)
    none_yet = ~select(api_keys.c.id).exists()
    row = select(*(literal(value, api_keys.c[name].type) for name, value in values.items())).where(none_yet)
    statement = build(api_keys).from_select(list(values), row).on_conflict_do_nothing().returning(api_keys.c.id)
    return connection.scalar(statement) is not None


def valid(connection: Connection) -> list[tuple[bytes, ApiKey]]:
    """The keys that open something: their SHA-256, and what they may do."""
    found = connection.execute(select(*_KEY, api_keys.c.hash).where(api_keys.c.revoked_at.is_(None)))
    return [(bytes.fromhex(row.hash), _key(*row[:-1])) for row in found]


def every(connection: Connection) -> list[Entry]:
    """All keys, the oldest first."""
    times = (api_keys.c.created_at, api_keys.c.revoked_at, api_keys.c.used_at)
    found = connection.execute(select(*_KEY, *times).order_by(api_keys.c.created_at, api_keys.c.id))
    return [Entry(_key(*row[: len(_KEY)]), *row[len(_KEY) :]) for row in found]


def revoke(connection: Connection, id_: str) -> int | None:
    """Revoke a key; returns when it was revoked (ms), perhaps long ago. None: there is no such key."""
    connection.execute(
        update(api_keys).where(api_keys.c.id == id_, api_keys.c.revoked_at.is_(None)).values(revoked_at=now_ms())
    )
    revoked_at: int | None = connection.scalar(select(api_keys.c.revoked_at).where(api_keys.c.id == id_))
    return revoked_at


def note_use(connection: Connection, used: Mapping[str, int]) -> None:
    """Note when keys were last used: id → ms. Of several replicas the last use counts."""
    for id_, at in sorted(used.items()):  # in one order, so that two replicas do not wait for each other
        older = or_(api_keys.c.used_at.is_(None), api_keys.c.used_at < at)
        connection.execute(update(api_keys).where(api_keys.c.id == id_, older).values(used_at=at))


_KEY = (
    api_keys.c.id,
    api_keys.c.name,
    api_keys.c.rooms,
    api_keys.c.event_types,
    api_keys.c.admin,
    api_keys.c.users,
)


def _key(id_: str, name: str, rooms: str, event_types: str, admin: int, users: str) -> ApiKey:
    limits = [tuple(json.loads(each)) for each in (rooms, event_types)]
    return ApiKey(id_, name, limits[0], limits[1], bool(admin), tuple(json.loads(users)))


def _values(key: ApiKey, secret: str) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "hash": digest(secret).hex(),
        "rooms": json.dumps(key.rooms),
        "event_types": json.dumps(key.event_types),
        "admin": int(key.admin),
        "users": json.dumps(key.users),
        "created_at": now_ms(),
    }
