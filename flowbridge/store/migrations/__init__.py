"""The schema and its versions.

A new database is created from the tables at once, an older one is migrated by Alembic. That is imported only then: it
costs 20 MB of memory and 0.3 s.
"""

from pathlib import Path

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    func,
    insert,
    inspect,
    select,
)

from flowbridge import log
from flowbridge.store.errors import MAKING, StoreAbsent, StoreError
from flowbridge.store.tables import metadata

HEAD = "0009"
SCRIPTS = Path(__file__).parent

LOCK = 0x666C6F77627267  # PostgreSQL's advisory lock of a process that creates or migrates the schema ("flowbrg")

_version = Table(  # as Alembic creates it
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def upgrade(
    engine: Engine, name: str, *, shared: bool = False, make: bool = True, scripts: Path = SCRIPTS, head: str = HEAD
) -> None:
    """Create the schema, or bring it up to date; `name` is the database's, for messages.

    Raises StoreError when a newer flowbridge created it, when the tables are not ours, and, with `shared`, when it is
    older: a server of that version may be running on it. StoreAbsent where there is none, unless `make`.
    """
    with engine.connect().execution_options(reads=True) as connection:
        now = version(connection)
    if now == head:
        return
    if now is None and not make:
        raise StoreAbsent(f"{name} has no tables of flowbridge: {MAKING}")
    if now is not None and shared:
        raise StoreError(f"{name} is of version {now}, not {head}: `flowbridge serve` brings an older one up to date")
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # on SQLite, BEGIN IMMEDIATE lets in one at a time
            connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
        now = version(connection)
        if now is None:
            _create(connection, name)
        elif now != head:
            migrate(connection, name, scripts)
    if now != head:
        log.info("store_upgraded", database=name, before=now or "", version=head)


def version(connection: Connection) -> str | None:
    """The version of the schema; None when there is none yet."""
    known = inspect(connection).has_table(_version.name)
    found: str | None = connection.scalar(select(_version.c.version_num)) if known else None
    return found


def migrate(connection: Connection, name: str, scripts: Path = SCRIPTS) -> None:
    """Run Alembic's migrations. Raises StoreError when the version is not one of ours."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    now = version(connection)
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise StoreError(
            f"{name} is of version {now}, made by a newer flowbridge (or by another program): "
            "upgrade flowbridge, or name another database"
        ) from None


def _create(connection: Connection, name: str) -> None:
    found = inspect(connection)
    for table in metadata.sorted_tables:
        if found.has_table(table.name):
            raise StoreError(f"{name} has a table {table.name} that flowbridge did not make: name another database")
    metadata.create_all(connection, checkfirst=False)
    _version.create(connection, checkfirst=True)
    connection.execute(insert(_version), {"version_num": HEAD})
