"""What is deleted after its time, and the event ids that are kept of it. Each function is work on a connection.

An event that is in doubt, and whose transaction id the homeserver does not show, is taken for the event of equal
content that is in its room, unless that one is known to be another event. So the id of an event that was sent outlives
its row for as long as an event that may have to be told from it can be queued.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, FromClause, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.store import clock, contents
from flowbridge.store.statements import DEAD, SENT, head_accepted_at, insert
from flowbridge.store.tables import gone, message_keys, outbox

PURGED = 2_500  # rows that are deleted at once, at most: some 15 ms, for which accepting waits
# The search for an event begins one skew before it was accepted, and asks what was settled since as much before that.
# And once more: for what is accepted and not in the store yet, and for the clocks of other replicas.
NEEDED_MS = 3 * clock.CLOCK_SKEW_MS
BLANK = contents.BLANK
_NEVER = 2**62


def purge(connection: Connection, sent: int, dead: int, limit: int = PURGED) -> int:
    """Delete what was settled before these times (ms), some at once; returns how many rows."""
    old = or_(and_(SENT, outbox.c.settled_at < sent), and_(DEAD, outbox.c.settled_at < dead))
    ids = select(outbox.c.id).where(outbox.c.settled_at < max(sent, dead), old).limit(limit)
    return forget(connection, list(connection.scalars(ids)))


def purge_oldest(connection: Connection, before: int = _NEVER, limit: int = PURGED) -> int:
    """Delete sent events before their time, the oldest first: the disk is needed for what is queued.

    `before`: only of those that were sent before (ms).
    """
    settled = select(outbox.c.id).where(outbox.c.settled_at.is_not(None), outbox.c.settled_at < before, SENT)
    return forget(connection, list(connection.scalars(settled.order_by(outbox.c.settled_at).limit(limit))))


def blank(connection: Connection, before: int, after: int = 0, limit: int = PURGED) -> tuple[int, int]:
    """Blank the contents of what was sent before (ms), the oldest first, some at once.

    `after`: when what was settled earlier has been blanked. Returns how many there were, and where to go on.
    """
    old = (outbox.c.settled_at >= after, outbox.c.settled_at < before, SENT, outbox.c.content != BLANK)
    found = connection.execute(
        select(outbox.c.id, outbox.c.settled_at).where(*old).order_by(outbox.c.settled_at).limit(limit)
    ).all()
    if not found:
        return 0, before
    chosen = outbox.c.id.in_(bindparam("ids", [row.id for row in found], expanding=True, literal_execute=True))
    blanked = update(outbox).where(chosen, SENT).values(content=BLANK, request=None)
    return connection.execute(blanked).rowcount, found[-1].settled_at


def nth_newest(connection: Connection, number: int) -> int:
    """When (ms) the last event was settled that has so many newer ones; 0 when there are not so many.

    Dead letters count, too: they are few.
    """
    settled = select(outbox.c.settled_at).where(outbox.c.settled_at.is_not(None)).order_by(outbox.c.settled_at.desc())
    return connection.scalar(settled.offset(number).limit(1)) or 0


def oldest_sent(connection: Connection) -> int | None:
    """When (ms) the oldest sent event of the log was settled."""
    settled = select(outbox.c.settled_at).where(outbox.c.settled_at.is_not(None), SENT)
    found: int | None = connection.scalar(settled.order_by(outbox.c.settled_at).limit(1))
    return found


def forget(connection: Connection, ids: Sequence[int], states: Sequence[str] = ("sent", "dead")) -> int:
    """Delete those of these events that are in one of these states; returns how many there were."""
    if not ids:
        return 0
    chosen = outbox.c.id.in_(bindparam("ids", ids, expanding=True, literal_execute=True))
    keep_ids(connection, chosen)
    return connection.execute(delete(outbox).where(chosen, outbox.c.state.in_(states))).rowcount


def keep_ids(connection: Connection, *chosen: ColumnElement[bool]) -> None:
    """Keep the needed event ids of rows that are about to be deleted, and those that a caller's key stands for."""
    columns = (outbox.c.event_id, outbox.c.lane, outbox.c.settled_at)
    needed = select(*columns).where(*chosen, outbox.c.event_id.is_not(None), _is_needed(outbox))
    statement = insert(connection, gone).from_select([column.name for column in columns], needed)
    connection.execute(statement.on_conflict_do_nothing())
    if connection.scalar(select(message_keys.c.delivery).limit(1)) is not None:
        keyed = select(outbox.c.delivery).where(*chosen, outbox.c.event_id.is_not(None))
        event_id = select(outbox.c.event_id).where(outbox.c.delivery == message_keys.c.delivery).scalar_subquery()
        connection.execute(update(message_keys).where(message_keys.c.delivery.in_(keyed)).values(event_id=event_id))


def forget_ids(connection: Connection) -> int:
    """Delete the event ids that are not needed any more, some at once; returns how many."""
    ids = select(gone.c.event_id).where(gone.c.settled_at < clock.now_ms() - NEEDED_MS, ~_is_needed(gone)).limit(PURGED)
    return connection.execute(delete(gone).where(gone.c.event_id.in_(ids.scalar_subquery()))).rowcount


def sent_before(connection: Connection, lane: str, since: int, event_ids: Sequence[str]) -> set[str]:
    """Those of these event ids that are known to be other events of the lane, settled since (ms)."""
    found: set[str] = set()
    for table in (outbox, gone):
        settled = (table.c.settled_at >= since, table.c.lane == lane, table.c.event_id.in_(event_ids))
        found.update(map(str, connection.scalars(select(table.c.event_id).where(*settled))))
    return found


def _is_needed(table: FromClause) -> ColumnElement[bool]:
    """Whether an event that is queued in the lane of this one, or will be from now on, may have to be told from it."""
    settled_at = table.c.settled_at
    first = func.coalesce(head_accepted_at(table.c.lane), _NEVER)
    return or_(settled_at >= clock.now_ms() - NEEDED_MS, settled_at >= first - NEEDED_MS)
