"""The engine: what a database URL means, and opening the database that it names."""

import contextlib
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from flowbridge import log
from flowbridge.models.timing import Timing
from flowbridge.store import driver, file_check, lock_file, migrations, sqlite_file
from flowbridge.store.errors import StoreError, StoreInUse
from flowbridge.store.files import Files

_FORMS = "sqlite:///file or postgresql+psycopg://user:password@host/database"

# What waiting does not repair. libpq gives no error code for a connection that was not made; a server that answers in
# another language is waited for, and its words are shown all the same.
_FINAL = ("password", "authentication", "does not exist", "pg_hba.conf", "permission denied", "invalid")

# libpq's own defaults would wait for minutes for a host that is gone.
_POSTGRES = {
    "application_name": "flowbridge",
    "client_encoding": "utf8",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",  # with several hosts: the one that is no standby
}

# What is acknowledged is on the disk, whatever this server does for others.
_SESSION = """
SELECT set_config('idle_in_transaction_session_timeout', '{idle_ms}', false),
       CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END,
       pg_backend_pid()
"""


def parse(url: str) -> URL:
    """A database URL, with its driver. Raises StoreError, which never quotes it: it may hold a password."""
    try:
        found = make_url(url)
    except (SQLAlchemyError, ValueError):
        raise StoreError(f"it is not a database URL: {_FORMS}") from None
    if found.drivername in ("postgres", "postgresql"):
        found = found.set(drivername="postgresql+psycopg")
    if found.drivername not in ("sqlite", "postgresql+psycopg"):
        raise StoreError(f"{found.drivername} is not supported: {_FORMS}")
    if found.drivername == "sqlite":
        _check_file(found)
    return found


def name(url: URL) -> str:
    """The database as people read it, without secrets: those may be among the parameters, too."""
    if is_sqlite(url):
        return str(url.database)
    shown = URL.create("postgresql", url.username, host=url.host, port=url.port, database=url.database)
    return shown.render_as_string()


def place(url: URL) -> str:
    """The same, with a file's folder: which of several databases it is may depend on the working directory."""
    return str(Path(name(url)).absolute()) if is_sqlite(url) else name(url)


def is_sqlite(url: URL) -> bool:
    return url.drivername == "sqlite"


def connect(url: URL, timing: Timing, *, shared: bool = False, make: bool = True) -> Engine:
    """Open a database, and bring its schema up to date. Raises StoreError: one line; StoreAbsent.

    A PostgreSQL that does not answer is waited for, but not with `shared`: a command reports that at once.
    `make`: create the database when there is none.
    """
    with reported(url):
        if is_sqlite(url) and shared and make:
            file_check.create_for_command(Path(str(url.database)))
        engine = _sqlite(url, timing, shared=shared) if is_sqlite(url) else _postgres(url, timing)
    try:
        with reported(url):
            if is_sqlite(url):
                _wait(engine, timing.sqlite_locked_seconds, timing)
            else:
                _wait(engine, 0.0 if shared else timing.postgres_start_seconds, timing)
            migrations.upgrade(engine, name(url), shared=shared, make=make)
            if is_sqlite(url) and not shared:
                with engine.begin() as connection:  # a read-only file fails now, not with the first event
                    connection.exec_driver_sql("DELETE FROM outbox WHERE 0")
    except BaseException:
        engine.dispose()
        raise
    return engine


def own(url: URL) -> Files:
    """Keep the SQLite file to this process for as long as the result is open. Raises StoreError: one line.

    A second process fails at its start, not by a race later.
    """
    path = Path(str(url.database)).resolve()
    with reported(url):
        try:
            held = lock_file.take(lock_file.path_of(path), lock_file.LOCK_SECONDS)
        except BlockingIOError:
            raise StoreInUse(
                f"{name(url)} is in use by another flowbridge: several share one PostgreSQL, not a file"
            ) from None
    try:
        with reported(url):
            with contextlib.suppress(FileExistsError):
                sqlite_file.create(path)
            return Files(str(url.database), held)
    except BaseException:
        held.close()
        raise


def reason(error: Exception) -> str:
    """The engine's message, in one line, without the statement."""
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return next(iter(str(said).splitlines()), type(error).__name__)


def _check_file(url: URL) -> None:
    if url.host or not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise StoreError(
            "it names no file: sqlite:///flowbridge.db, or sqlite:////var/lib/flowbridge.db (four slashes)"
        )
    if url.query:
        raise StoreError("an SQLite file takes no parameters: sqlite:///flowbridge.db")


@contextlib.contextmanager
def reported(url: URL) -> Iterator[None]:
    """Turn errors into a StoreError: one line, without secrets."""
    try:
        yield
    except ImportError:
        if is_sqlite(url):
            raise
        raise StoreError("PostgreSQL needs a driver: pip install 'flowbridge[postgresql]'") from None
    except SQLAlchemyError as error:
        raise StoreError(f"cannot open {name(url)}: {reason(error)}") from None
    except OSError as error:
        raise StoreError(f"cannot open {name(url)}: {error.strerror or error}") from None


def _sqlite(url: URL, timing: Timing, *, shared: bool) -> Engine:
    path, busy = Path(str(url.database)), timing.sqlite_busy_seconds

    def creator() -> Any:
        if shared:  # each time: the file may be another one by then
            file_check.check(path)
        return sqlite_file.connect(path, busy)

    def set_pragmas(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={int(busy * 1000)}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    engine = create_engine(url, creator=creator)
    event.listen(engine, "connect", set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    driver.execute(connection, "BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")


def _postgres(url: URL, timing: Timing) -> Engine:
    session = _SESSION.format(idle_ms=int(timing.idle_transaction_seconds * 1000))

    def set_session(connection: Any, _: Any) -> None:
        *_, pid = connection.execute(session).fetchone()
        connection.commit()
        if pid != connection.info.backend_pid:
            connection.prepare_threshold = None

    wanted = {option: value for option, value in _POSTGRES.items() if option not in url.query}
    # The statements that claim and settle lanes are written for this level, whatever the server's default is.
    engine = create_engine(url, connect_args=wanted, pool_pre_ping=True, isolation_level="READ COMMITTED")
    event.listen(engine, "connect", set_session)
    return engine


def is_pooled(raw: Any) -> bool:
    """Whether a connection of psycopg's may have another session for each transaction.

    A pooler names a process of its own as the other end of a connection (PgBouncer 1.18). What was prepared in one
    session may be another statement in the next, and notifications reach nobody: neither is done there.
    """
    return raw.prepare_threshold is None


def is_quiet(connection: Connection) -> bool:
    """Whether the server has said nothing unasked on an idle connection: that would be, most likely, that it ends it.

    SQLAlchemy's question before a connection is used again is a round trip for each commit; this is a system call.
    """
    if connection.dialect.name == "sqlite":
        return True
    raw = driver.of(connection)
    if raw.closed:
        return False
    socket = select.poll()
    socket.register(raw.fileno(), select.POLLIN)
    return not socket.poll(0)


def _wait(engine: Engine, seconds: float, timing: Timing) -> None:
    """Until the database answers. Raises OperationalError when it does not in this time, or will not."""
    deadline = time.monotonic() + seconds
    logged = ""
    while True:
        try:
            with engine.connect() as connection:
                return _check_encoding(connection)
        except OperationalError as error:
            why = reason(error)
            if _is_final(engine, why) or time.monotonic() >= deadline:
                raise
        if why != logged:
            log.warning("store_away", database=name(engine.url), error=why, hint=f"waiting up to {seconds:g} s for it")
            logged = why
        time.sleep(min(timing.postgres_poll_seconds, seconds / 10))


def _is_final(engine: Engine, why: str) -> bool:
    return "locked" not in why if is_sqlite(engine.url) else any(word in why for word in _FINAL)


def _check_encoding(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding not in ("UTF8", b"UTF8"):
        shown = encoding.decode() if isinstance(encoding, bytes) else encoding
        raise StoreError(f"the database's encoding is {shown}: create it with ENCODING 'UTF8' TEMPLATE template0")
