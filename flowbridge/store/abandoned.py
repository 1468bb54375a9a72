"""Queued events that are given up: too old, or removed by a command. Each function is work on a connection.

Only in lanes without an owner: what an owner sends at this moment must not be given up while its 200 comes in.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection, bindparam, case, delete, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.store import clock
from flowbridge.store.json_columns import from_json, to_json
from flowbridge.store.leases import ASKED, Fence, mark_dirty, release
from flowbridge.store.statements import HAS_QUEUED, QUEUED
from flowbridge.store.tables import lanes, outbox

LOOK_LANES = 1_000  # whose first events are examined at once
EVENTS = 200  # that are given up in one transaction: up to 12 MB that are written
# A lease that has run out is taken over soon, and the first event is sent or found. Where that has not happened for so
# long (the account is paused, say), nothing of the lane can be in flight any more.
FORSAKEN_MS = 3_600_000

Errors = dict[str, dict[str, object]]  # by delivery, as Outcome has them


def overdue(connection: Connection, before: int, after: int = 0) -> tuple[list[str], int | None]:
    """The lanes whose first event was accepted before (ms), the oldest first, and where to go on; None at the end.

    Only those whose first event has an id above `after`. Ids follow the order of acceptance: where none of a thousand
    lanes is overdue, none behind them is.
    """
    first = func.min(outbox.c.id)
    heads = select(first.label("first")).where(QUEUED).group_by(outbox.c.lane).having(first > after).order_by(first)
    page = heads.limit(LOOK_LANES).subquery()
    query = select(outbox.c.id, outbox.c.lane, outbox.c.accepted_at).join(page, page.c.first == outbox.c.id)
    rows = connection.execute(query.order_by(outbox.c.id)).all()
    found = [row.lane for row in rows if row.accepted_at < before]
    return found, rows[-1].id if found and len(rows) == LOOK_LANES else None


def give_up(
    connection: Connection,
    names: Sequence[str],
    before: int,
    why: str,
    *,
    reasons: Mapping[str, str],
    mine: Iterable[Fence] = (),
    exclude: Collection[str] = (),
) -> Errors:
    """Make dead letters of what was accepted before (ms) in these lanes, up to EVENTS; returns their errors.

    `why` begins the error; `reasons`: what is wrong with accounts. `mine`: lanes of the caller, which sends nothing of
    them and gives them back. `exclude`: deliveries that are settled, and not written to the store so far.
    """
    release(connection, mine)
    doubts = _lock_free(connection, names)
    query = (
        select(outbox.c.delivery, outbox.c.lane, outbox.c.account, outbox.c.history)
        .where(QUEUED, outbox.c.lane.in_(list(doubts)), outbox.c.accepted_at < before)
        .order_by(outbox.c.id)
        .limit(EVENTS)
    )
    errors: Errors = {}
    for delivery, lane, account, history in connection.execute(query) if doubts else ():
        if delivery not in exclude:
            said = _last_error(history) or reasons.get(account) or "its turn did not come"
            told = f"{why}: {said}" + ("; it may be in the room all the same" if doubts[lane] else "")
            errors[delivery] = {"status": 504, "errcode": "M_UNKNOWN", "error": told}
    if errors:
        now = clock.now_ms()
        values = [
            {"b_delivery": delivery, "b_error": to_json(error), "b_settled_at": now}
            for delivery, error in errors.items()
        ]
        connection.execute(_GIVE_UP, values)
    _give_back(connection, doubts)
    return errors


_GIVE_UP = (
    update(outbox)
    .where(outbox.c.delivery == bindparam("b_delivery"), QUEUED)
    .values(state="dead", error=bindparam("b_error"), settled_at=bindparam("b_settled_at"))
)


def owners(connection: Connection, chosen: Sequence[ColumnElement[bool]]) -> dict[str, str | None]:
    """The lanes that chosen queued events are in, and the owner of each: None for a lane that is free."""
    owner = case((lanes.c.lease_until > clock.lease_clock(connection), lanes.c.owner))
    query = select(outbox.c.lane, owner).outerjoin(lanes, lanes.c.lane == outbox.c.lane).where(QUEUED, *chosen)
    return {row[0]: row[1] for row in connection.execute(query.distinct())}


def number(connection: Connection, chosen: Sequence[ColumnElement[bool]]) -> int:
    """How many of the chosen events are queued."""
    return connection.scalar(select(func.count()).select_from(outbox).where(QUEUED, *chosen)) or 0


def ask_for(connection: Connection, names: Sequence[str]) -> None:
    """Ask the owners of these lanes to give them back for a moment, once nothing of them is in flight."""
    connection.execute(update(lanes).where(lanes.c.lane.in_(names), lanes.c.owner.is_not(None)).values(dirty=ASKED))


def remove(connection: Connection, names: Sequence[str], chosen: Sequence[ColumnElement[bool]]) -> int:
    """Delete chosen queued events, up to EVENTS, in those of these lanes that are free; returns how many."""
    doubts = _lock_free(connection, names, forsaken_ms=0)
    if not doubts:
        return 0
    ids = select(outbox.c.id).where(QUEUED, outbox.c.lane.in_(list(doubts)), *chosen)
    some = ids.order_by(outbox.c.id).limit(EVENTS).scalar_subquery()
    gone = connection.execute(delete(outbox).where(outbox.c.id.in_(some))).rowcount
    _give_back(connection, doubts)
    return gone


def _lock_free(connection: Connection, names: Sequence[str], *, forsaken_ms: int = FORSAKEN_MS) -> dict[str, bool]:
    """Lock those of these lanes that are free until the end of the transaction: whether each is in doubt."""
    known = set(connection.scalars(select(lanes.c.lane).where(lanes.c.lane.in_(names))))
    mark_dirty(connection, [(name, name.partition("|")[0]) for name in names if name not in known])
    free = (
        select(lanes.c.lane, lanes.c.owner, lanes.c.uncertain_since)
        .where(
            lanes.c.lane.in_(names),
            or_(lanes.c.owner.is_(None), lanes.c.lease_until < clock.lease_clock(connection) - forsaken_ms),
        )
        .order_by(lanes.c.lane)
        .with_for_update(skip_locked=True)
    )
    found = connection.execute(free).all()
    if forsaken := [row.lane for row in found if row.owner is not None]:
        since = func.coalesce(lanes.c.uncertain_since, lanes.c.lease_until)
        connection.execute(
            update(lanes)
            .where(lanes.c.lane.in_(forsaken))
            .values(owner=None, fence=lanes.c.fence + 1, lease_until=0, uncertain_since=since)
        )
    return {row.lane: row.owner is not None or row.uncertain_since is not None for row in found}


def _give_back(connection: Connection, names: Iterable[str]) -> None:
    """Lanes with queued events may be claimed as before; the others are not in doubt any more."""
    connection.execute(
        update(lanes)
        .where(lanes.c.lane.in_(list(names)))
        .values(dirty=case((HAS_QUEUED, 1), else_=0), uncertain_since=case((HAS_QUEUED, lanes.c.uncertain_since)))
    )


def _last_error(history: str) -> str:
    """The error of the last attempt; empty when there was none since a replay."""
    entries = from_json(history)
    return str(entries[-1].get("error", "")) if entries else ""
