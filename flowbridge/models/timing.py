"""How long things last: the durations that a test, or a chaos run, has to shorten."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations in seconds, handed down from the composition root. The defaults are what production runs with.

    A duration that no test changes stays a constant beside the code that it is about.
    """

    # delivery

    # homeserver and live

    # auth, limits and services

    # store
    sqlite_busy_seconds: float = 5.0  # for which SQLite waits for a lock on its file
    sqlite_locked_seconds: float = 5.0  # for which opening is retried where SQLite does not wait
    postgres_start_seconds: float = 30.0  # for a PostgreSQL that starts together with us, as in docker-compose
    postgres_poll_seconds: float = 1.0
    # A replica that was stopped in the middle of a transaction must not hold its locks for ever.
    idle_transaction_seconds: float = 5.0
    store_retry_seconds: float = 10.0  # for which a commit is retried while the database is away, or locked
    file_check_seconds: float = 2.0  # between two checks of all SQLite files; each commit checks what it went into

    # web
