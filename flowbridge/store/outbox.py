"""The only SQL about events on their way: append, claim, settle. Each function is work on a connection."""

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    FromClause,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.sql import ColumnElement

from flowbridge.store.tables import accounts, gone, lanes, outbox, tokens

BATCH = 50  # rows of one lane that are held in memory, at most
MERGED = "merged"  # in `sent_with`: a lane that was several (migration 0002), of which each had a head
NAMED = 500  # deliveries that one statement asks of
HISTORY = 20  # attempts that are remembered of one event
ASKED = 2  # of lanes.dirty: a command asks the holder to give the lane back for a moment
PURGED = 2_500  # rows that go at once: some 15 ms, for which accepting waits
CLOCK_SKEW_MS = 60_000  # between our clock and a homeserver's, at most
# A look for an event begins so much before it was accepted, and asks what was settled since as much before that. And
# once more: for what is accepted and not in the store yet, and for the clocks of other replicas.
NEEDED_MS = 3 * CLOCK_SKEW_MS
_NEVER = 2**62
ROW_BYTES = 600  # of an event beside its texts, with its share of the indexes


_REFUSALS = (DataError, IntegrityError, UnicodeEncodeError)  # what is wrong with one row, and not with the store


class Row(NamedTuple):
    """A queued event, as the worker needs it."""

    delivery: str
    lane: str
    account: str
    room_id: str
    event_type: str
    state_key: str | None
    content: bytes
    txn_id: str
    accepted_at: int
    api_key: str | None = None  # the id of the key that sent it; None for a caller's own token
    attempts: int = 0
    history: str = "[]"


@dataclass(frozen=True, slots=True)
class Fence:
    """The right to send for a lane: void once another owner has raised it."""

    lane: str
    owner: str
    number: int


@dataclass(frozen=True, slots=True)
class Claim:
    fence: Fence
    account: str
    uncertain_since: int | None
    sent_with: str  # digest of the token that all that is in doubt was sent with; "" unknown, or several
    rows: list[Row]


_ROW = (
    outbox.c.delivery,
    outbox.c.lane,
    outbox.c.account,
    outbox.c.room_id,
    outbox.c.event_type,
    outbox.c.state_key,
    outbox.c.content,
    outbox.c.txn_id,
    outbox.c.accepted_at,
    outbox.c.api_key,
    outbox.c.attempts,
    outbox.c.history,
)


def dumps(history: Sequence[Mapping[str, Any]]) -> str:
    """As JSON. Most events are sent at the first try: an encoder for that entry would cost 3 µs of each send."""
    if len(history) == 1 and len(entry := history[0]) == 3 and entry.get("status") == 200:
        return f'[{{"at": {entry["at"]}, "ms": {entry["ms"]}, "status": 200}}]'
    return json.dumps(history)


def now_ms() -> int:
    return int(time.time() * 1000)


def _clock(connection: Connection) -> ColumnElement[int]:
    """Leases go by one clock: the database's, where several machines share it."""
    if connection.dialect.name == "postgresql":
        return func.cast(func.extract("epoch", func.statement_timestamp()) * 1000, lanes.c.lease_until.type)
    return literal(now_ms())


def insert_rows(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Append; returns the deliveries that the engine refused. Rows that are there already are left as they are."""
    if not rows:
        return set()
    try:
        with connection.begin_nested():
            _insert(connection, rows)
        return set()
    except _REFUSALS:
        refused = set()
        for row in rows:
            try:
                with connection.begin_nested():
                    _insert(connection, [row])
            except _REFUSALS:
                refused.add(row["delivery"])
        return refused


def insert_one(connection: Connection, row: Mapping[str, Any]) -> bool:
    """Append a row to PostgreSQL; False when it is there already."""
    statement = postgresql.insert(outbox).on_conflict_do_nothing().returning(outbox.c.id)
    return connection.scalar(statement, row) is not None


def _insert(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(postgresql.insert(outbox).on_conflict_do_nothing(), list(rows))
        return
    # One call for all rows, which SQLite works on beside the event loop. With a call for each, this thread would have
    # to win the interpreter back from the loop as many times, by up to 5 ms each.
    values = json.dumps([[row[name] for name in _INSERTED] for row in rows], ensure_ascii=False)
    if "\\u0000" in values:  # perhaps a NUL, at which SQLite ends a text that comes in JSON
        connection.execute(sqlite.insert(outbox).on_conflict_do_nothing(), list(rows))
    else:
        connection.execute(_INSERT_ALL, {"rows": values})


_INSERTED = tuple(column.name for column in outbox.c if column.name != "id")
_GIVEN = func.json_each(bindparam("rows")).table_valued("key", "value")
_INSERT_ALL = (
    sqlite.insert(outbox)
    .from_select(
        _INSERTED,
        select(*(func.json_extract(_GIVEN.c.value, f"$[{at}]") for at in range(len(_INSERTED))))
        .where(true())  # without it, ON CONFLICT would be read as part of a join
        .order_by(_GIVEN.c.key),
    )
    .on_conflict_do_nothing()
)


def by_idem(connection: Connection, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows that were accepted under these keys."""
    found = connection.execute(select(outbox).where(outbox.c.idem.in_(list(keys)))).mappings()
    return {row["idem"]: dict(row) for row in found}


def mark_dirty(connection: Connection, pairs: Iterable[tuple[str, str]], *, but: Collection[str] = ()) -> None:
    """Say that a lane (with its account) has events that its owner may not know; of those in `but`, nothing new.

    A lane that is not there is made, and all of them are locked in one order until the end of the transaction.
    """
    values = [
        {"lane": lane, "account": account, "dirty": int(lane not in but), "sent_with": ""}
        for lane, account in sorted(set(pairs))
    ]
    if values:
        build = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        statement = build(lanes)
        dirty = case((statement.excluded.dirty == 1, 1), else_=lanes.c.dirty) if but else 1
        connection.execute(statement.on_conflict_do_update(index_elements=["lane"], set_={"dirty": dirty}), values)


def lock(connection: Connection, names: Iterable[str]) -> None:
    """Lock these lanes where several processes write, all in one order: none waits for another in a circle.

    Also a single one: whoever holds nothing of it, and waits for a row of it that another one inserts, would be waited
    for in turn. A lane that is not there yet cannot be locked so: see `mark_dirty`.
    """
    wanted = sorted(set(names))
    if connection.dialect.name == "postgresql" and wanted:
        rows = select(lanes.c.lane).where(lanes.c.lane.in_(wanted)).order_by(lanes.c.lane)
        connection.execute(rows.with_for_update())


def _owned(connection: Connection, owner: str) -> list[str]:
    return list(connection.scalars(select(lanes.c.lane).where(lanes.c.owner == owner)))


def claim(
    connection: Connection,
    owner: str,
    limit: int,
    lease_ms: int,
    *,
    batch: int = BATCH,
    but: Iterable[str] = (),
    only: Iterable[str] = (),
) -> list[Claim]:
    """Lease up to `limit` lanes that have something to send and nobody who does; none of the accounts `but`.

    Those that were served longest ago come first. `only`: of these lanes, also those that rest.

    A lane that is not in doubt is from here on sent with the token that the account used last, unless `use_token` says
    another one; which one a lane in doubt was sent with stays as it is.
    """
    now = _clock(connection)
    wanted = list(only)
    is_free = lanes.c.lease_until <= now
    found = (
        select(lanes.c.lane)
        .where(or_(lanes.c.dirty == 1, lanes.c.owner.is_not(None)))
        .where(or_(is_free, lanes.c.owner.is_(None)) if wanted else is_free)
        .order_by(lanes.c.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    if wanted:
        found = found.where(lanes.c.lane.in_(wanted))
    if excluded := list(but):
        found = found.where(lanes.c.account.not_in(excluded))
    names = list(connection.scalars(found))
    if not names:
        return []
    taken = connection.execute(
        update(lanes)
        .where(lanes.c.lane.in_(names))
        .values(
            # An owner that did not give its lane back died, or lost it, with the head perhaps on its way.
            uncertain_since=case((lanes.c.owner.is_not(None), _last_sign(lease_ms)), else_=lanes.c.uncertain_since),
            sent_with=case(
                (or_(lanes.c.owner.is_not(None), lanes.c.uncertain_since.is_not(None)), lanes.c.sent_with),
                else_=func.coalesce(_newest_token(), ""),
            ),
            owner=owner,
            fence=lanes.c.fence + 1,
            lease_until=now + lease_ms,
            dirty=0,
        )
        .returning(lanes.c.lane, lanes.c.fence, lanes.c.account, lanes.c.uncertain_since, lanes.c.sent_with)
    ).all()
    return [
        Claim(Fence(lane, owner, fence), account, uncertain, sent_with, fetch(connection, lane, batch))
        for lane, fence, account, uncertain, sent_with in taken
    ]


def free(connection: Connection, whose: Sequence[str], limit: int) -> int:
    """How many lanes of these accounts could be claimed: `limit` at most, since it only matters whether many can."""
    waiting = (
        select(lanes.c.lane)
        .where(or_(lanes.c.dirty == 1, lanes.c.owner.is_not(None)), lanes.c.lease_until <= _clock(connection))
        .where(lanes.c.account.in_(whose))
        .limit(limit)
    )
    return connection.scalar(select(func.count()).select_from(waiting.subquery())) or 0


def lanes_in(connection: Connection, user_id: str, room_id: str) -> list[str]:
    """The lanes of a user in a room, also those that rest."""
    theirs = connection.scalars(select(accounts.c.account).where(accounts.c.user_id == user_id))
    names = [f"{account}|{room_id}" for account in theirs]
    return list(connection.scalars(select(lanes.c.lane).where(lanes.c.lane.in_(names)))) if names else []


def _newest_token() -> ColumnElement[str]:
    good = and_(tokens.c.account == lanes.c.account, tokens.c.token.is_not(None), tokens.c.refused_at.is_(None))
    newest = select(tokens.c.token_hash).where(good).order_by(tokens.c.seen_at.desc(), tokens.c.token_hash)
    return newest.limit(1).scalar_subquery()


def _last_sign(lease_ms: int) -> ColumnElement[int]:
    """When an owner that is gone may have sent something, at the earliest: earlier doubts are written down."""
    return func.coalesce(lanes.c.uncertain_since, lanes.c.lease_until - lease_ms)


def fetch(connection: Connection, lane: str, limit: int = BATCH) -> list[Row]:
    """The first queued events of a lane."""
    found = connection.execute(
        select(*_ROW).where(outbox.c.lane == lane, outbox.c.state == "queued").order_by(outbox.c.id).limit(limit)
    )
    return [_row(values) for values in found]


def row_of(values: Mapping[str, Any]) -> Row:
    """The event of a whole table row."""
    return _row([values[column.name] for column in _ROW])


def _row(values: Sequence[Any]) -> Row:
    fields = list(values)
    fields[6] = fields[6].encode()
    return Row(*fields)


def renew(connection: Connection, owner: str, lease_ms: int) -> dict[str, tuple[int, int]]:
    """Prolong all leases of an owner: lane → fence, and 1 when events came that it may not know, or ASKED."""
    lock(connection, _owned(connection, owner))
    now = _clock(connection)
    connection.execute(
        update(lanes).where(lanes.c.owner == owner, lanes.c.lease_until > now).values(lease_until=now + lease_ms)
    )
    found = connection.execute(
        select(lanes.c.lane, lanes.c.fence, lanes.c.dirty).where(lanes.c.owner == owner, lanes.c.lease_until > now)
    )
    held = {lane: (fence, dirty) for lane, fence, dirty in found}
    known = [lane for lane, (_, dirty) in held.items() if dirty]
    if known:
        connection.execute(update(lanes).where(lanes.c.lane.in_(known), lanes.c.owner == owner).values(dirty=0))
    return held


def release(connection: Connection, fences: Iterable[Fence], rest_ms: int = 0) -> None:
    """Give lanes back; those with queued events are up for the next claim, once `rest_ms` are over.

    Also those that need no rest come behind those that wait already: a room never waits for another one.
    """
    waiting = exists(select(1).where(outbox.c.lane == lanes.c.lane, outbox.c.state == "queued"))
    until = _clock(connection) + rest_ms
    for fence in sorted(fences, key=lambda fence: fence.lane):
        connection.execute(
            update(lanes)
            .where(_holds(fence))
            .values(owner=None, lease_until=until, dirty=case((or_(lanes.c.dirty == 1, waiting), 1), else_=0))
        )


def release_all(connection: Connection, owner: str) -> None:
    """Give all lanes of an owner back: it ends, and nothing of it is under way any more."""
    lock(connection, _owned(connection, owner))
    waiting = exists(select(1).where(outbox.c.lane == lanes.c.lane, outbox.c.state == "queued"))
    connection.execute(
        update(lanes)
        .where(lanes.c.owner == owner)
        .values(owner=None, lease_until=0, dirty=case((or_(lanes.c.dirty == 1, waiting), 1), else_=0))
    )


def recover(connection: Connection, lease_ms: int) -> None:
    """At the start on a file of our own: whoever held a lane is dead."""
    connection.execute(
        update(lanes)
        .where(lanes.c.owner.is_not(None))
        .values(owner=None, lease_until=0, dirty=1, uncertain_since=_last_sign(lease_ms))
    )


def is_restored(uncertain_since: int | None) -> bool:
    """Whether a lane is in doubt since a backup was restored (then, with a minus): see `continuity`."""
    return uncertain_since is not None and uncertain_since < 0


def doubt(connection: Connection, fence: Fence, since: int | None) -> None:
    """Since when (ms) the head of a lane may have been sent; None once that is known."""
    connection.execute(update(lanes).where(_holds(fence)).values(uncertain_since=since))


def use_token(connection: Connection, fence: Fence, digest: str) -> bool:
    """Say which token a lane is sent with from here on: before that is done. False when the lane is lost."""
    return connection.execute(update(lanes).where(_holds(fence)).values(sent_with=digest)).rowcount > 0


def note(connection: Connection, delivery: str, attempts: int, history: str) -> None:
    """Keep what has been tried so far of an event that is still queued."""
    connection.execute(
        update(outbox)
        .where(outbox.c.delivery == delivery, outbox.c.state == "queued")
        .values(attempts=attempts, history=history)
    )


def sent_before(connection: Connection, lane: str, since: int, event_ids: Sequence[str]) -> set[str]:
    """Those of these event ids that are known to be other events of the lane, settled since (ms)."""
    found: set[str] = set()
    for table in (outbox, gone):
        settled = (table.c.settled_at >= since, table.c.lane == lane, table.c.event_id.in_(event_ids))
        found.update(map(str, connection.scalars(select(table.c.event_id).where(*settled))))
    return found


def sent_last(connection: Connection, limit: int) -> list[tuple[int, int]]:
    """When events were sent (ms), the last first, and how many attempts each took."""
    found = connection.execute(
        select(outbox.c.settled_at, outbox.c.attempts)
        .where(outbox.c.settled_at.is_not(None), outbox.c.state == "sent")
        .order_by(outbox.c.settled_at.desc())
        .limit(limit)
    )
    return [(settled_at, attempts) for settled_at, attempts in found]


def _holds(fence: Fence) -> ColumnElement[bool]:
    return and_(lanes.c.lane == fence.lane, lanes.c.owner == fence.owner, lanes.c.fence == fence.number)


_SETTLE = (
    update(outbox)
    .where(
        outbox.c.delivery == bindparam("b_delivery"),
        outbox.c.state == "queued",
        exists(
            select(1).where(
                lanes.c.lane == bindparam("b_lane"),
                lanes.c.owner == bindparam("b_owner"),
                lanes.c.fence == bindparam("b_fence"),
            )
        ),
    )
    .values(
        state=bindparam("b_state"),
        attempts=bindparam("b_attempts"),
        history=bindparam("b_history"),
        event_id=bindparam("b_event_id"),
        error=bindparam("b_error"),
        settled_at=bindparam("b_settled_at"),
    )
)


def settle(connection: Connection, settlements: Sequence[Mapping[str, Any]]) -> None:
    """Record outcomes. A row whose lane has another owner by now is left alone."""
    if settlements:
        connection.execute(_SETTLE, list(settlements))


def waiting(connection: Connection, delivery: str) -> tuple[Row, str | None] | None:
    """A queued event, and who holds its lane."""
    found = connection.execute(
        select(*_ROW, lanes.c.owner)
        .outerjoin(lanes, lanes.c.lane == outbox.c.lane)
        .where(outbox.c.delivery == delivery, outbox.c.state == "queued")
    ).first()
    return (_row(found[:-1]), found[-1]) if found else None


def purge(connection: Connection, sent: int, dead: int) -> int:
    """Forget what was settled before these times (ms), some at once; returns how many rows went."""
    old = or_(
        and_(outbox.c.state == literal("sent", literal_execute=True), outbox.c.settled_at < sent),
        and_(outbox.c.state == literal("dead", literal_execute=True), outbox.c.settled_at < dead),
    )
    ids = select(outbox.c.id).where(outbox.c.settled_at < max(sent, dead), old).limit(PURGED)
    return forget(connection, list(connection.scalars(ids)))


def purge_oldest(connection: Connection) -> int:
    """Forget sent events before their time, the oldest first: the disk is needed for what is queued."""
    oldest = (
        select(outbox.c.id)
        .where(outbox.c.settled_at.is_not(None), outbox.c.state == "sent")
        .order_by(outbox.c.settled_at)
        .limit(PURGED)
    )
    return forget(connection, list(connection.scalars(oldest)))


def forget(connection: Connection, ids: Sequence[int], states: Sequence[str] = ("sent", "dead")) -> int:
    """Delete those of these events that are in one of these states; returns how many they were."""
    if not ids:
        return 0
    chosen = outbox.c.id.in_(bindparam("ids", ids, expanding=True, literal_execute=True))
    keep_ids(connection, chosen)
    return connection.execute(delete(outbox).where(chosen, outbox.c.state.in_(states))).rowcount


def keep_ids(connection: Connection, *chosen: ColumnElement[bool]) -> None:
    """To be called before rows go: keep the event ids of those that were sent, where these are needed.

    An event that is in doubt, and whose transaction id the homeserver does not show, is taken to be the one of equal
    content that is in its room, unless that is known to be another one. So it would be lost with the row of that one.
    """
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    columns = (outbox.c.event_id, outbox.c.lane, outbox.c.settled_at)
    needed = select(*columns).where(*chosen, outbox.c.event_id.is_not(None), _is_needed(outbox))
    statement = insert(gone).from_select([column.name for column in columns], needed)
    connection.execute(statement.on_conflict_do_nothing())


def forget_ids(connection: Connection) -> int:
    """Forget the event ids that are not needed any more, some at once; returns how many."""
    ids = select(gone.c.event_id).where(gone.c.settled_at < now_ms() - NEEDED_MS, ~_is_needed(gone)).limit(PURGED)
    return connection.execute(delete(gone).where(gone.c.event_id.in_(ids.scalar_subquery()))).rowcount


def _is_needed(table: FromClause) -> ColumnElement[bool]:
    """Whether an event that is queued in the lane of this one, or will be from now on, may have to be told from it."""
    head = outbox.alias()
    first = (
        select(head.c.accepted_at)
        .where(head.c.lane == table.c.lane, head.c.state == literal("queued", literal_execute=True))
        .order_by(head.c.id)
        .limit(1)
        .scalar_subquery()
    )
    settled_at = table.c.settled_at
    return or_(settled_at >= now_ms() - NEEDED_MS, settled_at >= func.coalesce(first, _NEVER) - NEEDED_MS)


def forget_idle_lanes(connection: Connection) -> int:
    """Lanes with nothing in them are made anew when they are needed; returns how many went."""
    queued = exists(select(1).where(outbox.c.lane == lanes.c.lane, outbox.c.state == "queued"))
    idle = and_(lanes.c.owner.is_(None), lanes.c.dirty == 0, ~queued)
    names = select(lanes.c.lane).where(idle).limit(1_000).with_for_update(skip_locked=True)
    return connection.execute(delete(lanes).where(idle, lanes.c.lane.in_(names.scalar_subquery()))).rowcount


def queued(connection: Connection) -> dict[str, tuple[int, int]]:
    """Per lane with queued events: how many, and the id of the first."""
    found = connection.execute(
        select(outbox.c.lane, func.count(), func.min(outbox.c.id))
        .where(outbox.c.state == "queued")
        .group_by(outbox.c.lane)
    )
    return {lane: (number, first) for lane, number, first in found}


def queued_of(connection: Connection, deliveries: Sequence[str]) -> set[str]:
    """Those of these deliveries that are queued."""
    found: set[str] = set()
    for start in range(0, len(deliveries), NAMED):
        chosen = outbox.c.delivery.in_(deliveries[start : start + NAMED])
        found.update(connection.scalars(select(outbox.c.delivery).where(chosen, outbox.c.state == "queued")))
    return found


def accepted_at(connection: Connection, id_: int) -> int | None:
    """When an event was accepted (ms)."""
    found: int | None = connection.scalar(select(outbox.c.accepted_at).where(outbox.c.id == id_))
    return found


def dead(connection: Connection) -> int:
    """How many dead letters there are."""
    return connection.scalar(select(func.count()).where(outbox.c.state == "dead")) or 0


def withdraw(connection: Connection, delivery: str, owner: str) -> bool:
    """Delete a queued event, unless its lane is somebody else's: it may be on its way."""
    lane = select(outbox.c.lane).where(outbox.c.delivery == delivery).scalar_subquery()
    holder = connection.scalar(select(lanes.c.owner).where(lanes.c.lane == lane).with_for_update())
    return holder in (None, owner) and remove(connection, delivery, states=["queued"])


def remove(connection: Connection, delivery: str, *, states: Sequence[str]) -> bool:
    """Delete an event that is in one of these states."""
    done = connection.execute(delete(outbox).where(outbox.c.delivery == delivery, outbox.c.state.in_(states)))
    return done.rowcount > 0


def remove_queued(connection: Connection, deliveries: Sequence[str]) -> None:
    """Delete those of these events that are queued."""
    connection.execute(delete(outbox).where(outbox.c.delivery.in_(deliveries), outbox.c.state == "queued"))


def outcomes(connection: Connection, deliveries: Sequence[str]) -> dict[str, tuple[Any, str | None, Any]]:
    """Those of these deliveries that are settled: state, event id, error."""
    found = connection.execute(
        select(outbox.c.delivery, outbox.c.state, outbox.c.event_id, outbox.c.error).where(
            outbox.c.delivery.in_(deliveries), outbox.c.state != "queued"
        )
    )
    return {row.delivery: (row.state, row.event_id, json.loads(row.error) if row.error else None) for row in found}
