"""What names led to: an account's alias to a room id, the bot's login to its user id. Each is work on a connection."""

from sqlalchemy import Connection, delete, or_, select

from flowbridge.store.clock import lease_clock
from flowbridge.store.statements import insert
from flowbridge.store.tables import resolved


def find(connection: Connection, name: str) -> str | None:
    found: str | None = connection.scalar(select(resolved.c.value).where(resolved.c.name == name))
    return found


def leads(connection: Connection, alias: str) -> set[str]:
    """Where an alias led, for whichever account."""
    found = select(resolved.c.name, resolved.c.value).where(resolved.c.name.endswith(f"|{alias}", autoescape=True))
    return {value for name, value in connection.execute(found) if name.endswith(f"|{alias}")}  # LIKE knows no case


def note(connection: Connection, name: str, value: str, seen_at: int) -> None:
    """Insert or update; `seen_at` (ms): when the homeserver said so."""
    values = {"value": value, "seen_at": seen_at}
    statement = insert(connection, resolved).values(name=name, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))


def claim(connection: Connection, name: str, owner: str, lease_ms: int) -> bool:
    """Whether this process is the one among all replicas that does what is named so, from now on for `lease_ms`.

    An owner prolongs its claim by claiming again.
    """
    now = lease_clock(connection)
    values = {"value": owner, "seen_at": now}
    is_free = or_(resolved.c.value == owner, resolved.c.seen_at < now - lease_ms)
    statement = insert(connection, resolved).values(name=name, **values)
    statement = statement.on_conflict_do_update(index_elements=["name"], set_=values, where=is_free)
    return connection.scalar(statement.returning(resolved.c.name)) is not None


def release(connection: Connection, name: str, owner: str) -> None:
    """Give a claim up, if it is this owner's."""
    connection.execute(delete(resolved).where(resolved.c.name == name, resolved.c.value == owner))


def remove(connection: Connection, name: str) -> None:
    connection.execute(delete(resolved).where(resolved.c.name == name))


def forget(connection: Connection, seen_before: int) -> int:
    """Delete what has not been seen since (ms)."""
    return connection.execute(delete(resolved).where(resolved.c.seen_at < seen_before)).rowcount
