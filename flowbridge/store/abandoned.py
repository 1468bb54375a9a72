"""The only SQL of queued events that are given up: too old, or removed by a command. Each is work on a connection.

Only in lanes without a holder: what a holder sends at this moment must not be given up while its 200 comes in.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection, bindparam, case, delete, exists, func, literal, or_, select, update
from sqlalchemy.sql import ColumnElement

from flowbridge.store.outbox import ASKED, Fence, _clock, mark_dirty, now_ms, release
from flowbridge.store.tables import lanes, outbox

LOOK_LANES = 1_000  # whose first events are looked at in one go
EVENTS = 200  # that are given up in one transaction: up to 12 MB that are written
# A lease that has run out is taken over soon, and the first event is sent or found. Where that has not happened for so
# long (the account is paused, say), nothing of the lane can be under way any more.
FORSAKEN_MS = 3_600_000

Errors = dict[str, dict[str, object]]  # by delivery, as Outcome has them


def overdue(connection: Connection, before: int, after: int = 0) -> tuple[list[str], int | None]:
    """The lanes whose first event was accepted before (ms), the oldest first, and where to go on; None at the end.

    Only those whose first event has an id above `after`. Ids follow the order of acceptance: where none of a thousand
    lanes is overdue, none behind them is.
    """
    first = func.min(outbox.c.id)
    heads = (
        select(first.label("first")).where(_is_queued()).group_by(outbox.c.lane).having(first > after).order_by(first)
    )
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
    but: Collection[str] = (),
) -> Errors:
    """Make dead letters of what was accepted before (ms) in these lanes: one piece; what they are told.

    `why` begins the error; `reasons`: what is wrong with accounts. `mine`: lanes of the asker, who sends nothing of
    them and gives them back. `but`: deliveries that are settled, which the store has not taken so far.
    """
    release(connection, mine)
    doubts = _take(connection, names)
    query = (
        select(outbox.c.delivery, outbox.c.lane, outbox.c.account, outbox.c.history)
        .where(_is_queued(), outbox.c.lane.in_(list(doubts)), outbox.c.accepted_at < before)
        .order_by(outbox.c.id)
        .limit(EVENTS)
    )
    errors: Errors = {}
    for delivery, lane, account, history in connection.execute(query) if doubts else ():
        if delivery not in but:
            said = _last_error(history) or reasons.get(account) or "its turn did not come"
            told = f"{why}: {said}" + ("; it may be in the room all the same" if doubts[lane] else "")
            errors[delivery] = {"status": 504, "errcode": "M_UNKNOWN", "error": told}
    if errors:
        now = now_ms()
        values = [
            {"b_delivery": delivery, "b_error": json.dumps(error), "b_settled_at": now}
            for delivery, error in errors.items()
        ]
        connection.execute(_GIVE_UP, values)
    _put_back(connection, doubts)
    return errors


def holders(connection: Connection, chosen: Sequence[ColumnElement[bool]]) -> dict[str, str | None]:
    """The lanes that chosen queued events lie in, and the holder of each: None for a lane that is free."""
    now = _clock(connection)
    held = case((lanes.c.lease_until > now, lanes.c.owner))
    query = select(outbox.c.lane, held).outerjoin(lanes, lanes.c.lane == outbox.c.lane).where(_is_queued(), *chosen)
    return {row[0]: row[1] for row in connection.execute(query.distinct())}


def number(connection: Connection, chosen: Sequence[ColumnElement[bool]]) -> int:
    """How many of the chosen events are queued."""
    return connection.scalar(select(func.count()).select_from(outbox).where(_is_queued(), *chosen)) or 0


def ask_for(connection: Connection, names: Sequence[str]) -> None:
    """Ask the holders of these lanes to give them back for a moment, once nothing of them is on its way."""
    connection.execute(update(lanes).where(lanes.c.lane.in_(names), lanes.c.owner.is_not(None)).values(dirty=ASKED))


def remove(connection: Connection, names: Sequence[str], chosen: Sequence[ColumnElement[bool]]) -> int:
    """Delete chosen queued events in those of these lanes that are free: one piece; returns how many."""
    doubts = _take(connection, names, forsaken_ms=0)
    if not doubts:
        return 0
    ids = (
        select(outbox.c.id)
        .where(_is_queued(), outbox.c.lane.in_(list(doubts)), *chosen)
        .order_by(outbox.c.id)
        .limit(EVENTS)
    )
    gone = connection.execute(delete(outbox).where(outbox.c.id.in_(ids.scalar_subquery()))).rowcount
    _put_back(connection, doubts)
    return gone


def _take(connection: Connection, names: Sequence[str], *, forsaken_ms: int = FORSAKEN_MS) -> dict[str, bool]:
    """Lock those of these lanes that are free: whether each is in doubt. Until the end of the transaction."""
    there = set(connection.scalars(select(lanes.c.lane).where(lanes.c.lane.in_(names))))
    mark_dirty(connection, [(name, name.partition("|")[0]) for name in names if name not in there])
    free = (
        select(lanes.c.lane, lanes.c.owner, lanes.c.uncertain_since)
        .where(
            lanes.c.lane.in_(names),
            or_(lanes.c.owner.is_(None), lanes.c.lease_until < _clock(connection) - forsaken_ms),
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


def _put_back(connection: Connection, names: Iterable[str]) -> None:
    """Those with queued events are up for a claim as before; of the others nothing is in doubt."""
    waiting = exists(select(1).where(outbox.c.lane == lanes.c.lane, _is_queued()))
    connection.execute(
        update(lanes)
        .where(lanes.c.lane.in_(list(names)))
        .values(dirty=case((waiting, 1), else_=0), uncertain_since=case((waiting, lanes.c.uncertain_since)))
    )


_GIVE_UP = (
    update(outbox)
    .where(outbox.c.delivery == bindparam("b_delivery"), outbox.c.state == "queued")
    .values(state="dead", error=bindparam("b_error"), settled_at=bindparam("b_settled_at"))
)


def _is_queued() -> ColumnElement[bool]:
    return outbox.c.state == literal("queued", literal_execute=True)


def _last_error(history: str) -> str:
    """What the last attempt brought; empty when there was none since a replay."""
    entries = json.loads(history)
    return str(entries[-1].get("error", "")) if entries else ""
