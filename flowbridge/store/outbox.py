"""The queued events: append, fetch, settle, withdraw. Each function is work on a connection."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Integer, Update, bindparam, delete, exists, func, null, select, true, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.sql import ClauseElement

from flowbridge.store import contents, driver
from flowbridge.store.driver import Statement
from flowbridge.store.json_columns import from_json
from flowbridge.store.statements import DEAD, QUEUED, SENT, insert
from flowbridge.store.tables import lanes, outbox

BATCH = 50  # rows of one lane that are held in memory, at most
HISTORY = 20  # attempts that are remembered of one event
ROW_BYTES = 600  # of an event beside its texts, with its share of the indexes

_NAMED = 500  # deliveries that one statement names
_ROW_ERRORS = (DataError, IntegrityError, UnicodeEncodeError)  # the fault of one row, not of the store


# What becomes of a content when its event has ended: it is not kept any more, or kept encrypted.
Fate = Literal["blank", "seal"]


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
    binding: str | None = None  # JSON: the relations that its content is yet to get
    is_sealed: bool = False  # its content is encrypted in the store: see `contents`; here only under another secret key


_COLUMNS: tuple[str, ...] = Row._fields[:-1]
_ROW = tuple(outbox.c[name] for name in _COLUMNS)
_DELIVERY, _CONTENT = _COLUMNS.index("delivery"), _COLUMNS.index("content")


def insert_rows(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Append; returns the deliveries that the engine refused. Rows that exist already are left as they are."""
    if not rows:
        return set()
    try:
        with _whole(connection):
            _insert(connection, rows)
        return set()
    except _ROW_ERRORS:
        refused = set()
        for row in rows:
            try:
                with _whole(connection):
                    _insert(connection, [row])
            except _ROW_ERRORS:
                refused.add(row["delivery"])
        return refused


@contextmanager
def _whole(connection: Connection) -> Iterator[None]:
    """After an error of a statement PostgreSQL goes on with a savepoint only. The commit releases it.

    SQLite takes back what the statement did by itself, and a savepoint would cost it more than an event's insertion.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    driver.execute(connection, "SAVEPOINT whole")
    try:
        yield
    except _ROW_ERRORS:
        driver.execute(connection, "ROLLBACK TO whole")
        raise


def insert_one(connection: Connection, row: Mapping[str, Any]) -> bool:
    """Append a row; False when it exists already. For PostgreSQL."""
    statement = insert(connection, outbox).on_conflict_do_nothing().returning(outbox.c.id)
    return connection.scalar(statement, row) is not None


def _insert(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if connection.dialect.name == "postgresql":
        _INSERT_ALL.run_all(connection, rows)
        return
    # One call for many rows, which SQLite executes without the interpreter lock. With a call for each, this thread
    # would have to win the lock back from the event loop as many times, by up to 5 ms each.
    for start in range(0, len(rows), _TOGETHER):
        some = rows[start : start + _TOGETHER]
        driver.execute(connection, _insertion(len(some)), [row[name] for row in some for name in _INSERTED])


_INSERTED = tuple(column.name for column in outbox.c if column.name != "id")
_TOGETHER = 25  # rows of one statement, which SQLite keeps for each number of them


@cache
def _insertion(number: int) -> str:
    """For SQLite. As JSON the same rows would take it twice as long, and it would end a text at a NUL."""
    columns, row = ", ".join(_INSERTED), ", ".join("?" * len(_INSERTED))
    rows = "), (".join([row] * number)
    return f"INSERT INTO outbox ({columns}) VALUES ({rows}) ON CONFLICT DO NOTHING"  # noqa: S608 (our own names)


_INSERT_ALL = Statement(lambda dialect: driver.insertion(dialect, outbox, _INSERTED).on_conflict_do_nothing())


class Taken(NamedTuple):
    """What was accepted under a key, and when (ms)."""

    delivery: str
    accepted_at: int


_TAKEN = Statement(
    lambda dialect: select(outbox.c.idem, outbox.c.delivery, outbox.c.accepted_at).where(
        driver.is_one_of(dialect, outbox.c.idem, "keys")
    )
)


def taken(connection: Connection, keys: Sequence[str]) -> dict[str, Taken]:
    """What was accepted under these keys."""
    found = _TAKEN.rows(connection, {"keys": driver.texts(connection, keys)})
    return {idem: Taken(delivery, accepted_at) for idem, delivery, accepted_at in found}


def fetch(connection: Connection, lane: str, limit: int = BATCH) -> list[Row]:
    """The first queued events of a lane."""
    return [_row(connection, values) for values in _FETCH.rows(connection, {"lane_": lane, "limit_": limit})]


_FETCH = Statement(
    lambda _: (
        select(*_ROW)
        .where(outbox.c.lane == bindparam("lane_"), QUEUED)
        .order_by(outbox.c.id)
        .limit(bindparam("limit_", type_=Integer))
    )
)


def fetch_each(connection: Connection, limits: Mapping[str, int]) -> dict[str, list[Row]]:
    """The first queued events of each of these lanes, up to its limit."""
    if connection.dialect.name == "sqlite":
        return {lane: fetch(connection, lane, limit) for lane, limit in limits.items()}
    found: dict[str, list[Row]] = {}
    wanted = [{"lane": lane, "id": limit} for lane, limit in limits.items()]
    for values in _FETCH_EACH.run_all(connection, wanted):
        found.setdefault(values[1], []).append(_row(connection, values))
    return found


def _fetch_each(dialect: str) -> ClauseElement:
    wanted = driver.given(dialect, {"lane": outbox.c.lane, "id": outbox.c.id})
    first = select(*_ROW, outbox.c.id).where(outbox.c.lane == wanted("lane"), QUEUED).order_by(outbox.c.id)
    found = first.limit(wanted("id")).lateral()
    columns = (found.c[name] for name in _COLUMNS)
    return select(*columns).select_from(wanted("lane").table.join(found, true())).order_by(found.c.lane, found.c.id)


_FETCH_EACH = Statement(_fetch_each)


def waiting(connection: Connection, delivery: str) -> tuple[Row, str | None] | None:
    """A queued event, and the owner of its lane."""
    found = connection.execute(
        select(*_ROW, lanes.c.owner)
        .outerjoin(lanes, lanes.c.lane == outbox.c.lane)
        .where(outbox.c.delivery == delivery, QUEUED)
    ).first()
    return (_row(connection, found[:-1]), found[-1]) if found else None


def row_of(values: Mapping[str, Any]) -> Row:
    """The event of a whole row, as `by_delivery` gives it."""
    fields = [values[name] for name in _COLUMNS]
    fields[_CONTENT] = fields[_CONTENT].encode()
    fields.append(values.get("is_sealed", False))
    return Row(*fields)


def _row(connection: Connection, values: Sequence[Any]) -> Row:
    fields = list(values)
    is_sealed = contents.is_sealed(fields[_CONTENT])
    if is_sealed:
        fields[_CONTENT] = contents.of(connection).open(fields[_CONTENT], fields[_DELIVERY])
    fields[_CONTENT] = fields[_CONTENT].encode()
    fields.append(is_sealed)
    return Row(*fields)


def note(connection: Connection, delivery: str, attempts: int, history: str) -> None:
    """Record the attempts so far of an event that is still queued."""
    _NOTE.run_all(connection, [{"b_delivery": delivery, "b_attempts": attempts, "b_history": history}])


def _change(dialect: str, names: Sequence[str], *, is_fenced: bool = False) -> Update:
    """An update of these columns of queued events, by values that are named for them with b_ before.

    `is_fenced`: only where the lane still has the owner that says so.
    """
    columns = {name: outbox.c[name] for name in ("delivery", *names)}
    if is_fenced:
        columns.update((name, lanes.c[name]) for name in ("lane", "owner", "fence"))
    value = driver.given(dialect, {f"b_{name}": column for name, column in columns.items()})
    changed = update(outbox).where(outbox.c.delivery == value("b_delivery"), QUEUED)
    if is_fenced:
        holds = (lanes.c[name] == value(f"b_{name}") for name in ("lane", "owner", "fence"))
        changed = changed.where(exists(select(lanes.c.lane).where(*holds)))
    changed = changed.values({name: value(f"b_{name}") for name in names})
    return changed.returning(outbox.c.delivery) if dialect == "postgresql" else changed


_NOTE = Statement(lambda dialect: _change(dialect, ("attempts", "history")))
_BIND = Statement(lambda dialect: _change(dialect, ("content", "history", "binding")))


def bind(connection: Connection, bound: Sequence[Mapping[str, Any]]) -> None:
    """Give events that are still queued their contents with their relations."""
    if bound:
        _BIND.run_all(connection, [{f"b_{name}": value for name, value in row.items()} for row in bound])


_ENDED_COLUMNS = ("delivery", "state", "txn_id", "event_id", "content", "binding")


def unbound(connection: Connection, names: Iterable[str]) -> list[dict[str, Any]]:
    """What is queued in these lanes and not bound yet (`relations.is_bound`). For SQLite."""
    found = driver.execute(connection, _UNBOUND, {"lanes": driver.to_json(list(names))})
    return [dict(zip(("lane", "delivery", "state", "txn_id"), row, strict=True)) for row in found]


_UNBOUND = (
    "SELECT lane, delivery, state, txn_id FROM outbox WHERE state = 'queued' AND lane IN (SELECT value FROM "
    "json_each(:lanes)) AND binding IS NOT NULL AND instr(binding, '{\"bound_as\": \"' || txn_id || '\",') <> 1"
)

_ENDED = Statement(
    lambda dialect: select(*(outbox.c[name] for name in _ENDED_COLUMNS)).where(
        driver.is_one_of(dialect, outbox.c.delivery, "deliveries")
    )
)


def ended(connection: Connection, deliveries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How these deliveries have ended, if they have, and what they said."""
    rows = _ENDED.rows(connection, {"deliveries": driver.texts(connection, deliveries)})
    opened = contents.of(connection).opened
    return {row[0]: opened(dict(zip(_ENDED_COLUMNS, row, strict=True))) for row in rows}


def by_delivery(connection: Connection, deliveries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Whole rows, and how the store has their contents."""
    found = connection.execute(select(outbox).where(outbox.c.delivery.in_(deliveries))).mappings()
    opened = contents.of(connection).opened
    return {row["delivery"]: opened(dict(row)) for row in found}


_OUTCOME = ("state", "attempts", "history", "event_id", "error", "settled_at")
_SETTLE = Statement(lambda dialect: _change(dialect, _OUTCOME, is_fenced=True))


def settle(connection: Connection, settlements: Sequence[Mapping[str, Any]]) -> set[str]:
    """Record outcomes. A row whose lane has another owner by now is left as it is.

    Returns the deliveries that are settled by this, on PostgreSQL: only there another process asks for them.
    """
    if not settlements:
        return set()
    done = _SETTLE.run_all(connection, settlements)
    if fates := {each["b_delivery"]: each["b_fate"] for each in settlements if "b_fate" in each}:
        _conceal(connection, fates)
    return {delivery for (delivery,) in done} if connection.dialect.name == "postgresql" else set()


def _conceal(connection: Connection, fates: Mapping[str, Fate]) -> None:
    """Do with contents of settled events what is to become of them; to do it once more does no harm."""
    if blanked := [delivery for delivery, fate in fates.items() if fate == "blank"]:
        _BLANK.run(connection, {"deliveries": driver.texts(connection, blanked)})
    plain = [delivery for delivery, fate in fates.items() if fate == "seal"]
    if not plain:
        return
    seal = contents.of(connection).seal
    chosen = outbox.c.delivery.in_(plain)
    rows = connection.execute(select(outbox.c.delivery, outbox.c.content, outbox.c.request).where(chosen, ~QUEUED))
    for delivery, content, request in rows.all():
        if content != contents.BLANK and not contents.is_sealed(content):
            values = {"content": seal(content, delivery), "request": request and seal(request, delivery)}
            connection.execute(update(outbox).where(outbox.c.delivery == delivery, ~QUEUED).values(values))


_BLANK = Statement(
    lambda dialect: (
        update(outbox)
        .where(driver.is_one_of(dialect, outbox.c.delivery, "deliveries"), SENT)
        .values(content=contents.BLANK, request=null())
    )
)

_OUTCOMES = Statement(
    lambda dialect: select(outbox.c.delivery, outbox.c.state, outbox.c.event_id, outbox.c.error).where(
        driver.is_one_of(dialect, outbox.c.delivery, "deliveries"), ~QUEUED
    )
)


def outcomes(connection: Connection, deliveries: Sequence[str]) -> dict[str, tuple[Any, str | None, Any]]:
    """State, event id and error of those of these deliveries that are settled."""
    found = _OUTCOMES.rows(connection, {"deliveries": driver.texts(connection, deliveries)})
    return {name: (state, event_id, from_json(error) if error else None) for name, state, event_id, error in found}


def sent_last(connection: Connection, limit: int) -> list[tuple[int, int]]:
    """When events were sent (ms), the last one first, and how many attempts each took.

    Without those that had nothing new to say: the homeserver was not asked.
    """
    found = connection.execute(
        select(outbox.c.settled_at, outbox.c.attempts)
        .where(outbox.c.settled_at.is_not(None), SENT, outbox.c.attempts > 0)
        .order_by(outbox.c.settled_at.desc())
        .limit(limit)
    )
    return [(settled_at, attempts) for settled_at, attempts in found]


def queued(connection: Connection) -> dict[str, tuple[int, int]]:
    """For each lane with queued events: how many there are, and the id of the first."""
    counts = select(outbox.c.lane, func.count(), func.min(outbox.c.id)).where(QUEUED).group_by(outbox.c.lane)
    return {lane: (number, first) for lane, number, first in connection.execute(counts)}


def queued_of(connection: Connection, deliveries: Sequence[str]) -> set[str]:
    """Those of these deliveries that are queued."""
    found: set[str] = set()
    for start in range(0, len(deliveries), _NAMED):
        named = outbox.c.delivery.in_(deliveries[start : start + _NAMED])
        found.update(connection.scalars(select(outbox.c.delivery).where(named, QUEUED)))
    return found


def accepted_at(connection: Connection, id_: int) -> int | None:
    """When an event was accepted (ms)."""
    found: int | None = connection.scalar(select(outbox.c.accepted_at).where(outbox.c.id == id_))
    return found


def dead(connection: Connection) -> int:
    """The number of dead letters."""
    return connection.scalar(select(func.count()).where(DEAD)) or 0


def withdraw(connection: Connection, delivery: str, owner: str) -> bool:
    """Delete a queued event, unless another owner has its lane, which may be sending it."""
    lane = select(outbox.c.lane).where(outbox.c.delivery == delivery).scalar_subquery()
    holder = connection.scalar(select(lanes.c.owner).where(lanes.c.lane == lane).with_for_update())
    return holder in (None, owner) and remove_queued(connection, [delivery]) > 0


def remove_queued(connection: Connection, deliveries: Sequence[str]) -> int:
    """Delete those of these events that are queued; returns how many there were."""
    return connection.execute(delete(outbox).where(outbox.c.delivery.in_(deliveries), QUEUED)).rowcount
