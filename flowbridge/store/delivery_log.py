"""The delivery log: list, show, replay, remove. Each function is work on a connection."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, case, delete, exists, func, insert, or_, select, union_all
from sqlalchemy.exc import OperationalError
from sqlalchemy.sql import ColumnElement

from flowbridge.models.hooks import owner
from flowbridge.store import clock, contents, log_blocks
from flowbridge.store.contents import BLANK
from flowbridge.store.json_columns import from_json, to_json
from flowbridge.store.leases import mark_dirty
from flowbridge.store.log_blocks import Value
from flowbridge.store.outbox import HISTORY
from flowbridge.store.retention import keep_ids
from flowbridge.store.statements import QUEUED, is_state
from flowbridge.store.tables import accounts, lanes, outbox, tokens


@dataclass(frozen=True, slots=True)
class Scope:
    """The rooms (by id) and event types that an API key is for: all with None, or no types. A type may end in `*`."""

    rooms: frozenset[str] | None = None
    event_types: tuple[str, ...] = ()


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True)
class Whose:
    """The events of one user, from all devices, or of one API key; of all callers with neither.

    `users`: with a key, also the events that these users sent with tokens of their own. `scope` limits what others than
    the viewer itself sent: a key sees its own events also where it may no longer send.
    """

    user_id: str | None = None
    api_key: str | None = None
    users: tuple[str, ...] = ()
    scope: Scope = EVERYWHERE


ALL = Whose()


@dataclass(frozen=True, slots=True)
class Selection:
    """The events that match everything given. Times are ms; `until` itself is excluded.

    `names`: only these deliveries. `key`: the caller's Idempotency-Key or txnId. `hook`: the name of the hook that it
    came by. `text`: part of the content, in any case of ASCII letters. `alias`: of the room, if it was named by one;
    refused calls have what they named.
    """

    whose: Whose = ALL
    names: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    room_id: str | None = None
    event_type: str | None = None
    since: int | None = None
    until: int | None = None
    key: str | None = None
    text: str | None = None
    alias: str | None = None
    hook: str | None = None

    @property
    def is_quick(self) -> bool:
        """Whether its rows are found without a search: it selects all events, or has an index of its own."""
        return self.text is None and (bool(self.names) or self.states == ("dead",) or self == Selection())


@dataclass(frozen=True, slots=True)
class Standing:
    """The place of an event in its lane: how many are before it, and the first one's id and history (JSON).

    `rests_until`: when the lane is tried again (ms); None when it does not rest. `owner`: the process that sends for
    the lane; None when none does. `is_locked_out`: the homeserver has refused every known token of the account.
    """

    before: int
    history: str
    rests_until: int | None
    first: str = ""
    owner: str | None = None
    is_locked_out: bool = False


class TooSlow(Exception):
    """The reading took longer than it may."""


MAX_OLDER = 1_000  # events that are counted before one
STEPS = 1_000  # of SQLite, between two looks at the clock: some 50 events
OPENED = 200  # contents that are encrypted, and read at once by a search
FEW_QUEUED = 10_000  # up to so many, all are read rather than searched for among what is settled

_UNLISTED = ("lane", "content", "request", "idem", "fingerprint", "history")
_LISTED = (*(column for column in outbox.c if column.name not in _UNLISTED), accounts.c.user_id)
_WITH_USER = outbox.outerjoin(accounts, accounts.c.account == outbox.c.account)


def get(connection: Connection, delivery: str, whose: Whose = ALL) -> dict[str, Any] | None:
    """One event with all its columns, and its `user_id`."""
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER)
    found = connection.execute(query.where(outbox.c.delivery == delivery, *_belongs(whose))).mappings().first()
    return contents.of(connection).opened(dict(found)) if found else None


def standings(connection: Connection, deliveries: Sequence[str]) -> dict[str, Standing]:
    """The places in their lanes of those of these deliveries that are queued."""
    mine, older, first = outbox.alias(), outbox.alias(), outbox.alias()
    before = select(older.c.id).where(older.c.lane == mine.c.lane, is_state("queued", older), older.c.id < mine.c.id)
    head = select(func.min(first.c.id)).where(first.c.lane == mine.c.lane, is_state("queued", first)).correlate(mine)
    known = select(tokens.c.token_hash).where(tokens.c.account == mine.c.account)
    query = (
        select(
            mine.c.delivery,
            select(func.count())
            .select_from(before.limit(MAX_OLDER).correlate(mine).subquery())
            .scalar_subquery()
            .label("before"),
            outbox.c.delivery.label("first"),
            outbox.c.history,
            lanes.c.owner,
            lanes.c.lease_until,
            and_(exists(known), ~exists(known.where(tokens.c.refused_at.is_(None)))).label("is_locked_out"),
            clock.lease_clock(connection).label("now"),
        )
        .select_from(
            mine.join(outbox, outbox.c.id == head.scalar_subquery()).outerjoin(lanes, lanes.c.lane == mine.c.lane)
        )
        .where(mine.c.delivery.in_(deliveries), is_state("queued", mine))
    )
    found = {}
    for row in connection.execute(query):
        is_leased = (row.lease_until or 0) > row.now
        found[row.delivery] = Standing(
            row.before,
            row.history,
            row.lease_until if is_leased and row.owner is None else None,
            row.first,
            row.owner if is_leased else None,
            bool(row.is_locked_out),
        )
    return found


def page(
    connection: Connection, selection: Selection, limit: int, before: int | None = None, span: int | None = None
) -> tuple[list[dict[str, Any]], int | None]:
    """Events as a list shows them, the newest first, and the id before which to go on; None when there are no more.

    Only ids below `before`. `span`: how many events are searched, so that a search for rare ones can be cut up.
    """
    end = (connection.scalar(select(func.max(outbox.c.id))) or 0) + 1
    before = end if before is None else min(before, end)
    floor = 0 if selection.since is None else _first_since(connection, selection.since - 2 * clock.CLOCK_SKEW_MS)
    if selection.until is not None:
        before = min(before, _first_since(connection, selection.until + 2 * clock.CLOCK_SKEW_MS))
    is_few = _is_few(connection, selection)
    if selection.is_quick or is_few:
        return _found(connection, selection, limit, floor, before, is_few=is_few)
    if wanted := _values(connection, selection):
        return _among_blocks(connection, selection, wanted, limit, floor, before, span)
    floor, is_more = _cut(connection, floor, before, span)
    rows, last = _found(connection, selection, limit, floor, before)
    return rows, floor if is_more and last is None else last


def _cut(connection: Connection, floor: int, before: int, span: int | None) -> tuple[int, bool]:
    """An id from which on there are `span` events, and whether there are more before it."""
    if span is None:
        return floor, False
    searched = select(outbox.c.id).where(outbox.c.id < before, outbox.c.id >= floor).order_by(outbox.c.id.desc())
    ends = list(connection.scalars(searched.offset(span - 1).limit(2)))
    return (ends[0] if ends else floor), len(ends) == 2


def _among_blocks(
    connection: Connection,
    selection: Selection,
    wanted: Sequence[Collection[Value]],
    limit: int,
    floor: int,
    before: int,
    span: int | None,
) -> tuple[list[dict[str, Any]], int | None]:
    """As `page`, without the blocks that have none of these values."""
    floor = max(floor, connection.scalar(select(func.min(outbox.c.id))) or 0)
    rows: list[dict[str, Any]] = []
    searched = 0
    for low, high in log_blocks.windows(connection, wanted, floor, before):
        cut, is_more = _cut(connection, low, high, None if span is None else span - searched)
        found, end = _found(connection, selection, limit - len(rows), cut, high)
        rows += found
        searched += high - low
        if end is not None:
            return rows, end
        if is_more:
            return rows, cut
        if span is not None and searched >= span and low > floor:
            return rows, low
    return rows, None


def _found(
    connection: Connection, selection: Selection, limit: int, floor: int, before: int, *, is_few: bool = False
) -> tuple[list[dict[str, Any]], int | None]:
    """Events with `floor <= id < before`, and the id before which there may be more of them."""
    among = [outbox.c.id < before, outbox.c.id >= floor]
    indexed = _in_index(selection)
    if is_few:
        few = [select(outbox.c.id).where(is_state(state)) for state in selection.states]
        among += [outbox.c.id.in_(union_all(*few)), *indexed]
    elif selection.names:
        among += indexed
    elif indexed:  # alone, so that no event is read that the index rules out
        among.append(outbox.c.id.in_(select(outbox.c.id).where(*among, *indexed)))
    query = select(*_LISTED).select_from(_WITH_USER).where(*_not_in_index(selection))
    if selection.text is not None:
        return _with_text(connection, query.where(*among), selection.text, limit, before)
    query = query.where(*among).order_by(outbox.c.id.desc())
    rows = [dict(row) for row in connection.execute(query.limit(limit)).mappings()]
    return rows, rows[-1]["id"] if len(rows) == limit else None


def _with_text(
    connection: Connection, query: Select[Any], text: str, limit: int, before: int
) -> tuple[list[dict[str, Any]], int | None]:
    """As `_found`: the engine searches what is plain, and what is encrypted is read here (4 µs an event)."""
    wanted, open_ = _in_json(text).encode().lower(), contents.of(connection).open  # of bytes: ASCII letters alone
    matches = or_(_contains(connection, text), contents.are_sealed(outbox.c.content))
    sealed = case((contents.are_sealed(outbox.c.content), outbox.c.content))
    query = query.add_columns(sealed.label("sealed")).where(matches).order_by(outbox.c.id.desc())
    rows: list[dict[str, Any]] = []
    last: int | None = before
    number = limit
    while last is not None:
        some = connection.execute(query.where(outbox.c.id < last).limit(number)).mappings().all()
        last = some[-1]["id"] if len(some) == number else None
        for each in some:
            row = dict(each)
            content = row.pop("sealed")
            if content is None or wanted in open_(content, row["delivery"]).encode().lower():
                rows.append(row)
                if len(rows) == limit:
                    return rows, row["id"]
        number = min(OPENED, 2 * number)  # many are encrypted
    return rows, None


def _values(connection: Connection, selection: Selection) -> list[set[Value]]:
    """Of each of these sets an event of the selection has a value."""
    found: list[set[Value]] = []
    whose = selection.whose
    if whose.user_id is not None:
        found.append(_accounts_of(connection, [whose.user_id]))
    if whose.api_key is not None:
        found.append({("a", whose.api_key)} | (_accounts_of(connection, whose.users) if whose.users else set()))
    else:
        if whose.scope.rooms is not None:
            found.append({("r", room) for room in whose.scope.rooms})
        types = whose.scope.event_types
        if types and not any(type_.endswith("*") for type_ in types):
            found.append({("t", type_) for type_ in types})
    for letter, value in (
        ("r", selection.room_id),
        ("t", selection.event_type),
        ("k", selection.key),
        ("a", selection.hook and owner(selection.hook)),
    ):
        if value is not None:
            found.append({(letter, value)})
    return found


def _accounts_of(connection: Connection, users: Collection[str]) -> set[Value]:
    theirs = select(accounts.c.account).where(accounts.c.user_id.in_(users))
    return {("u", account) for account in connection.scalars(theirs)}


def _first_since(connection: Connection, since: int) -> int:
    """An id below which nothing was accepted since then (ms), but for what is out of order.

    Ids follow the order of acceptance, but for what another replica, by another clock, accepted at the same time:
    callers allow for that.
    """
    # Two questions: for both at once SQLite reads the whole index.
    low = connection.scalar(select(func.min(outbox.c.id))) or 0
    high = (connection.scalar(select(func.max(outbox.c.id))) or 0) + 1
    while low < high:
        middle = (low + high) // 2
        at = select(outbox.c.id, outbox.c.accepted_at).where(outbox.c.id >= middle, outbox.c.id < high)
        found = connection.execute(at.order_by(outbox.c.id).limit(1)).first()
        if found is None or found.accepted_at >= since:
            high = middle
        else:
            low = found.id + 1
    return low


def _is_few(connection: Connection, selection: Selection) -> bool:
    """Whether its states have indexes of their own, with few entries: all of them are read."""
    if not selection.states or not {"queued", "dead"}.issuperset(selection.states):
        return False
    if selection.text is not None or "queued" not in selection.states:
        return selection.text is None
    some = select(outbox.c.id).where(QUEUED).limit(FEW_QUEUED + 1).subquery()
    return (connection.scalar(select(func.count()).select_from(some)) or 0) <= FEW_QUEUED


def queued_behind(connection: Connection, row: Mapping[str, Any]) -> str | None:
    """The newest queued event, if there is one, that sets the same state as this row, from the same account."""
    found: str | None = connection.scalar(
        select(outbox.c.delivery)
        .where(
            outbox.c.lane == row["lane"],
            QUEUED,
            outbox.c.event_type == row["event_type"],
            outbox.c.state_key == row["state_key"],
            outbox.c.delivery != row["delivery"],
        )
        .order_by(outbox.c.id.desc())
        .limit(1)
    )
    return found


def state_events(
    connection: Connection, selection: Selection, after: int, last: int, limit: int
) -> list[dict[str, Any]]:
    """State events as `get` gives them, the oldest first. Only ids in `after < id <= last`."""
    query = select(outbox, accounts.c.user_id).select_from(_WITH_USER).where(*chosen(selection, last))
    query = query.where(outbox.c.state_key.is_not(None), outbox.c.id > after)
    opened = contents.of(connection).opened
    return [opened(dict(row)) for row in connection.execute(query.order_by(outbox.c.id).limit(limit)).mappings()]


def extent(connection: Connection, selection: Selection) -> tuple[int, int]:
    """How many events there are, and the id of the newest; 0 when there is none."""
    found = connection.execute(select(func.count(), func.max(outbox.c.id)).where(*chosen(selection))).one()
    return found[0], found[1] or 0


def deliveries(
    connection: Connection, selection: Selection, after: int, last: int, limit: int
) -> list[tuple[int, str]]:
    """The ids and names of events, the oldest first, as they are to be replayed. Only ids in `after < id <= last`."""
    query = select(outbox.c.id, outbox.c.delivery).where(*chosen(selection, last), outbox.c.id > after)
    return [(id_, delivery) for id_, delivery in connection.execute(query.order_by(outbox.c.id).limit(limit))]


def settled(connection: Connection, before: int) -> dict[str, int]:
    """How many events there are in each state that were settled before (ms)."""
    found = connection.execute(
        select(outbox.c.state, func.count()).where(outbox.c.settled_at < before, ~QUEUED).group_by(outbox.c.state)
    )
    return {str(state): int(number) for state, number in found}


def queued_of(connection: Connection, selection: Selection) -> list[tuple[str, int]]:
    """How many events are queued for each user, and for each API key that sent them as that user."""
    query = select(accounts.c.user_id, outbox.c.api_key, func.count()).select_from(_WITH_USER)
    rows = connection.execute(
        query.where(*chosen(selection)).group_by(accounts.c.user_id, outbox.c.api_key).order_by(func.count().desc())
    )
    return [
        ((user_id or "an unknown user") + (f" (API key {api_key})" if api_key else ""), number)
        for user_id, api_key, number in rows
    ]


def replay(
    connection: Connection, delivery: str, txn_id: str, by: str, *, whose: Whose = ALL, account: str | None = None
) -> dict[str, Any] | None:
    """Queue a settled event again, at the tail of its lane. Returns the row as it is now; None when it is not settled,
    or its content is not kept any more.

    `by`: who asked for it, for the history. `account`: send it with this account of the same user, if a user sent it.
    Repeated with the same `txn_id`, because the answer to the first call was lost, it does nothing more.
    """
    settled = [*_settled(delivery, whose), outbox.c.txn_id != txn_id, outbox.c.content != BLANK]
    keep_ids(connection, *settled)
    row = connection.execute(delete(outbox).where(*settled).returning(outbox)).mappings().first()
    if row is None:
        mine = select(outbox).where(outbox.c.delivery == delivery, outbox.c.txn_id == txn_id)
        row = connection.execute(mine).mappings().first()
        return None if row is None else dict(row)
    was = {name: row[name] for name in ("state", "txn_id", "event_id", "accepted_at") if row[name] is not None}
    now = clock.now_ms()
    history = [*from_json(row["history"]), {"at": now, "replayed": {"by": by, **was}}]
    sender = row["account"] if account is None or row["api_key"] is not None else account
    again = {
        **{name: value for name, value in row.items() if name not in ("id", "event_id", "error", "settled_at")},
        "account": sender,
        "lane": f"{sender}|{row['room_id']}",
        "state": "queued",
        "txn_id": txn_id,
        "attempts": 0,
        "history": to_json(history[-HISTORY:]),
        "accepted_at": now,
    }
    connection.execute(insert(outbox), [again])
    mark_dirty(connection, [(again["lane"], again["account"])])
    return again


def remove(connection: Connection, delivery: str, whose: Whose = ALL) -> bool:
    """Delete a settled event."""
    keep_ids(connection, *_settled(delivery, whose))
    return connection.execute(delete(outbox).where(*_settled(delivery, whose))).rowcount > 0


def _settled(delivery: str, whose: Whose) -> list[ColumnElement[bool]]:
    return [outbox.c.delivery == delivery, ~QUEUED, *_belongs(whose)]


def _belongs(whose: Whose) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if whose.user_id is not None:
        theirs = select(accounts.c.account).where(accounts.c.user_id == whose.user_id)
        found.append(outbox.c.account.in_(theirs))
    if whose.api_key is not None:
        own = outbox.c.api_key == whose.api_key
        found.append(or_(own, and_(_of_users(whose.users), *_within(whose.scope))) if whose.users else own)
    else:
        found += _within(whose.scope)
    return found


def _of_users(users: tuple[str, ...]) -> ColumnElement[bool]:
    """Events that these users sent with tokens of their own."""
    theirs = select(accounts.c.account).where(accounts.c.user_id.in_(users))
    return and_(outbox.c.api_key.is_(None), outbox.c.account.in_(theirs))


def _within(scope: Scope) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if scope.rooms is not None:
        found.append(outbox.c.room_id.in_(sorted(scope.rooms)))
    if scope.event_types:
        found.append(or_(*(is_type(outbox.c.event_type, scope_) for scope_ in scope.event_types)))
    return found


def is_type(column: ColumnElement[str], scope: str) -> ColumnElement[bool]:
    """`m.room.*` is any type that begins with `m.room.`; not by LIKE, which SQLite compares without regard to case."""
    if scope.endswith("*"):
        return func.substr(column, 1, len(scope) - 1) == scope[:-1]
    return column == scope


def chosen(selection: Selection, last: int | None = None) -> list[ColumnElement[bool]]:
    """The conditions of a selection, which has no text; only ids up to `last`."""
    assert selection.text is None
    found = [*_in_index(selection), *_not_in_index(selection)]
    return found if last is None else [*found, outbox.c.id <= last]


def _in_index(selection: Selection) -> list[ColumnElement[bool]]:
    """The conditions on what the index `outbox_log` has."""
    found = _belongs(selection.whose)
    if selection.room_id is not None:
        found.append(outbox.c.room_id == selection.room_id)
    if selection.event_type is not None:
        found.append(outbox.c.event_type == selection.event_type)
    if selection.key is not None:
        found.append(outbox.c.caller_key == selection.key)
    if selection.hook is not None:
        found.append(outbox.c.api_key == owner(selection.hook))
    return found


def _not_in_index(selection: Selection) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if selection.names:  # which have an index of their own
        found.append(outbox.c.delivery.in_(selection.names))
    if selection.states:
        found.append(or_(*map(is_state, selection.states)))
    if selection.since is not None:
        found.append(outbox.c.accepted_at >= selection.since)
    if selection.until is not None:
        found.append(outbox.c.accepted_at < selection.until)
    return found


def _contains(connection: Connection, text: str) -> ColumnElement[bool]:
    """Whether the content has this text, as JSON writes it. SQLite's LIKE knows no case of ASCII letters, as ILIKE.

    200 times the letter a, searched in 60 kB of it, takes 40 ms: see `at_most`. lower() and instr() need one, but twice
    as long for what people write.
    """
    for_like = str.maketrans({letter: f"\\{letter}" for letter in "\\%_"})
    pattern = f"%{_in_json(text).translate(for_like)}%"
    if connection.dialect.name == "postgresql":
        return outbox.c.content.ilike(pattern, escape="\\")
    return outbox.c.content.like(pattern, escape="\\")


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@contextmanager
def at_most(seconds: float, connection: Connection) -> Iterator[None]:
    """Some reading that is broken off after so many seconds: the store has one reader. Raises TooSlow."""
    is_sqlite = connection.dialect.name == "sqlite"
    raw: Any = connection.connection.driver_connection
    ends = time.monotonic() + seconds
    if is_sqlite:
        raw.set_progress_handler(lambda: time.monotonic() > ends, STEPS)
    else:
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}")
    try:
        yield
    except OperationalError as error:
        if time.monotonic() < ends:
            raise
        raise TooSlow from error
    finally:
        if is_sqlite:
            raw.set_progress_handler(None, STEPS)
