"""The clocks that the store goes by. Times are milliseconds since 1970, UTC."""

import time

from sqlalchemy import BigInteger, Connection, cast, func, literal, literal_column
from sqlalchemy.sql import ColumnElement

CLOCK_SKEW_MS = 60_000  # between our clock and a homeserver's, at most


def now_ms() -> int:
    return int(time.time() * 1000)


def lease_clock(connection: Connection) -> ColumnElement[int]:
    """Leases go by one clock: PostgreSQL's where several machines share it, this machine's for a file."""
    return postgres_clock() if connection.dialect.name == "postgresql" else literal(now_ms())


def postgres_clock() -> ColumnElement[int]:
    return cast(func.extract("epoch", func.statement_timestamp()) * literal_column("1000"), BigInteger)
