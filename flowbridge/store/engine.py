"""The engine: what a database URL means, and opening the database that it names."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from flowbridge import log
from flowbridge.store import files, migrations
from flowbridge.store.errors import StoreError, StoreInUse
from flowbridge.store.files import Files

WAIT_SECONDS = 30.0  # for a PostgreSQL that starts together with us, as in docker-compose
AGAIN_SECONDS = 1.0
BUSY_MS = 5_000  # how long SQLite waits for a lock on the file
LOCKED_SECONDS = 5.0  # and we, where it does not: while another process makes the same file, say

_FORMS = "sqlite:///file or postgresql+psycopg://user:password@host/database"

# What waiting does not mend. libpq gives no error code for a connection that was not made; a server that says it in
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

# A replica that was stopped in the middle of a transaction must not hold its locks for ever; and what is said to be
# accepted is on the disk, whatever this server does for others.
_SESSION = """
SELECT set_config('idle_in_transaction_session_timeout', '5s', false),
       CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END
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
    """The database, for people to read, without secrets: those may be among the parameters, too."""
    if is_sqlite(url):
        return str(url.database)
    shown = URL.create("postgresql", url.username, host=url.host, port=url.port, database=url.database)
    return shown.render_as_string()


def is_sqlite(url: URL) -> bool:
    return url.drivername == "sqlite"


def connect(url: URL, *, shared: bool = False, make: bool = True) -> Engine:
    """Open a database whose schema is up to date by then. Raises StoreError: one line; StoreAbsent.

    A PostgreSQL that does not answer is waited for, though not with `shared`: a command rather says so at once.
    `make`: with `shared`, also where there is none yet.
    """
    with told(url):
        if is_sqlite(url) and shared and make:
            files.make_beside(Path(str(url.database)))
        engine = create_engine(url, **(_sqlite(url, shared=shared) if is_sqlite(url) else _postgres(url)))
    event.listen(engine, "connect", _set_pragmas if is_sqlite(url) else _set_session)
    if is_sqlite(url):
        event.listen(engine, "begin", _begin)
    try:
        with told(url):
            _wait(engine, LOCKED_SECONDS if is_sqlite(url) else 0.0 if shared else WAIT_SECONDS)
            migrations.upgrade(engine, name(url), shared=shared, make=make)
            if is_sqlite(url) and not shared:
                with engine.begin() as connection:  # a file that may only be read is told now, not with an event
                    connection.exec_driver_sql("DELETE FROM outbox WHERE 0")
    except BaseException:
        engine.dispose()
        raise
    return engine


def own(url: URL) -> Files:
    """Keep the SQLite file to this process for as long as the result is open. Raises StoreError: one line.

    A second process fails loudly at its start, not by a race later.
    """
    path = Path(str(url.database)).resolve()
    with told(url):
        try:
            held = files.take_lock(Path(f"{path}.lock"), files.LOCK_SECONDS)
        except BlockingIOError:
            raise StoreInUse(
                f"{name(url)} is in use by another flowbridge: several share one PostgreSQL, not a file"
            ) from None
    try:
        with told(url):
            files.make(path)
            return Files(str(url.database), held)
    except BaseException:
        held.close()
        raise


def reason(error: Exception) -> str:
    """What the engine says, in one line, without the statement."""
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
def told(url: URL) -> Iterator[None]:
    """What goes wrong becomes a StoreError: one line, without secrets."""
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


def _sqlite(url: URL, *, shared: bool) -> dict[str, Any]:
    def creator() -> Any:
        if shared:  # each time: the file may be another one by then
            files.check(Path(str(url.database)))
        return files.connect(str(url.database), BUSY_MS / 1000)

    return {"creator": creator}


def _postgres(url: URL) -> dict[str, Any]:
    wanted = {option: value for option, value in _POSTGRES.items() if option not in url.query}
    # What claims and settles lanes is written for this level, whatever the server's default is.
    return {"connect_args": wanted, "pool_pre_ping": True, "isolation_level": "READ COMMITTED"}


def _wait(engine: Engine, seconds: float) -> None:
    """Until the database answers. Raises OperationalError when it does not in this time, or will not."""
    deadline = time.monotonic() + seconds
    told = ""
    while True:
        try:
            with engine.connect() as connection:
                return _check_encoding(connection)
        except OperationalError as error:
            why = reason(error)
            if _is_final(engine, why) or time.monotonic() >= deadline:
                raise
        if why != told:
            log.warning("store_away", database=name(engine.url), error=why, hint=f"waiting up to {seconds:g} s for it")
            told = why
        time.sleep(min(AGAIN_SECONDS, seconds / 10))


def _is_final(engine: Engine, why: str) -> bool:
    return "locked" not in why if is_sqlite(engine.url) else any(word in why for word in _FINAL)


def _check_encoding(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding not in ("UTF8", b"UTF8"):
        shown = encoding.decode() if isinstance(encoding, bytes) else encoding
        raise StoreError(f"the database's encoding is {shown}: create it with ENCODING 'UTF8' TEMPLATE template0")


def _set_pragmas(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event says BEGIN itself
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")


def _set_session(connection: Any, _: Any) -> None:
    connection.execute(_SESSION)
    connection.commit()
