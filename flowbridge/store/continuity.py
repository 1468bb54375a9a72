"""Whether the database is the one that was here before, or a backup of it.

What a backup holds as queued may have been sent since, in any order of what was refused, deleted or replayed after it:
each such event is looked for in its room before it is sent, however short the homeserver's memory is.

SQLite: the database and a file beside it hold the same epoch, which changes at each start and, while something is
written, every few seconds; the file beside it also knows the database by its inode. PostgreSQL: a comment on the table
`outbox` names the server, its timeline, the database and the table. All of these differ in a restored dump.
"""

from sqlalchemy import Connection, TextClause, exists, func, or_, select, text, update
from sqlalchemy.exc import DBAPIError

from flowbridge import log
from flowbridge.store import clock
from flowbridge.store.engine import reason
from flowbridge.store.files import Files
from flowbridge.store.leases import recover
from flowbridge.store.statements import HAS_QUEUED, QUEUED, head_accepted_at
from flowbridge.store.tables import lanes

REMEMBERED_MS = 20 * 60_000  # for which a homeserver surely remembers a transaction id: as delivery/attempt.py has it

LOCK = 0x666C6F77627268  # PostgreSQL's advisory lock of a replica that starts ("flowbrh")

_HINT = (
    "the database is a backup, or was moved: what it has queued is looked for in the rooms before it is sent. What was "
    "accepted after the backup is not in it"
)

# The database and the table are others after CREATE DATABASE … TEMPLATE or pg_restore, and so is the server after
# initdb; recovery to a point in time begins a new timeline. TRUNCATE and COPY give the table a new file.
_SERVER = text("SELECT system_identifier FROM pg_control_system()")
_TIMELINE = text("SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")
_TABLE = text(
    "SELECT concat_ws('/', d.oid, t.oid, pg_relation_filenode(t.oid)), obj_description(t.oid, 'pg_class') "
    "FROM pg_database d, pg_class t WHERE d.datname = current_database() AND t.oid = 'outbox'::regclass"
)


def is_continued(connection: Connection, files: Files | None) -> bool:
    """When the database is opened, before anything is accepted: whether no other process can have sent what is queued.

    `files`: of an SQLite database of our own.
    """
    if not connection.scalar(select(exists(select(1).where(QUEUED)))):
        return True
    if files is not None:
        return files.continues
    marker, known = _markers(connection)
    return marker == known


def resume(connection: Connection, files: Files | None, lease_ms: int, *, continued: bool) -> None:
    """At the start, before anything is sent: put lanes in doubt whose events may have been sent already."""
    if files is not None:
        recover(connection, lease_ms)  # no other process has its lanes any more
        files.new_epoch(connection)
    else:
        connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
        # In the order in which replicas lock lanes.
        connection.execute(select(lanes.c.lane).where(HAS_QUEUED).order_by(lanes.c.lane).with_for_update())
        marker, known = _markers(connection)
        if marker == known:
            continued = True  # another replica has done this meanwhile
        else:
            _mark(connection, marker)
    if continued:
        _doubt_old(connection)
    elif number := _doubt_all(connection):
        log.warning("store_restored", rooms=number, hint=_HINT)


def _doubt_all(connection: Connection) -> int:
    """Any queued event may have been sent, or one behind it: a minus tells this from other doubts. How many lanes."""
    doubted = update(lanes).where(HAS_QUEUED).values(uncertain_since=-clock.now_ms(), dirty=1)
    return connection.execute(doubted).rowcount


def _doubt_old(connection: Connection) -> None:
    """What waits for longer than a homeserver remembers: a whole machine may have been put back to an earlier time."""
    now = clock.now_ms()
    accepted_at = head_accepted_at(lanes.c.lane)
    connection.execute(
        update(lanes)
        .where(
            HAS_QUEUED,
            lanes.c.uncertain_since.is_(None),
            or_(lanes.c.owner.is_(None), lanes.c.lease_until < now),
            accepted_at < now - REMEMBERED_MS,
        )
        .values(uncertain_since=accepted_at)
    )


def _markers(connection: Connection) -> tuple[str, str | None]:
    """The marker that PostgreSQL's database should have, and the one that it has."""
    table, known = connection.execute(_TABLE).one()
    return f"flowbridge {_ask(connection, _SERVER)}/{_ask(connection, _TIMELINE)}/{table}", known


def _mark(connection: Connection, marker: str) -> None:
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(f"COMMENT ON TABLE outbox IS '{marker}'")
    except DBAPIError as error:
        hint = "the role has to own the table: else each start looks for what is queued in the rooms first"
        log.warning("store_not_marked", error=reason(error), hint=hint)


def _ask(connection: Connection, question: TextClause) -> str:
    """The server's answer; empty where only administrators may ask."""
    try:
        with connection.begin_nested():
            return str(connection.scalar(question))
    except DBAPIError:
        return ""
