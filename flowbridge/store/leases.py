"""The lanes, and the leases under which one owner at a time sends for a lane. Each function is work on a connection."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from flowbridge.store import driver, outbox
from flowbridge.store.clock import lease_clock, now_ms, postgres_clock
from flowbridge.store.driver import Statement
from flowbridge.store.statements import HAS_QUEUED
from flowbridge.store.tables import accounts, crypto_devices, crypto_rooms, lanes, tokens

MERGED = "merged"  # in `sent_with`: a lane that was several (migration 0002), of which each had a head
ASKED = 2  # in `dirty`: a command asks the owner to give the lane back for a moment
_FORGOTTEN = 1_000  # idle lanes that are deleted at once


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
    sent_with: str  # digest of the token that everything in doubt was sent with; "" when unknown, or several
    rows: list[outbox.Row]


@dataclass(frozen=True, slots=True)
class Reclaim:
    """A lane of a file of our own that was given back with nothing in it, and is held again."""

    fence: Fence
    account: str
    sent_with: str
    lease_ms: int


def mark_dirty(connection: Connection, pairs: Iterable[tuple[str, str]], *, exclude: Collection[str] = ()) -> None:
    """Record that lanes (each with its account) have events that their owners may not know; not those in `exclude`.

    A lane that does not exist is created. All lanes are locked in one order until the end of the transaction.
    """
    values = _marks(pairs, exclude)
    if values:
        _MARK_DIRTY.run_all(connection, values)


class Mark(NamedTuple):
    """A lane with new events: its owner, and whether there may be others that the owner does not know."""

    owner: str | None
    dirty: bool


def mark_new(
    connection: Connection, pairs: Iterable[tuple[str, str]], me: str, *, exclude: Collection[str] = ()
) -> dict[str, Mark]:
    """As `mark_dirty`, but for lanes of this owner, who knows what it inserts itself. For PostgreSQL.

    It must see to them after the commit. Whatever becomes of it and them, they can be claimed: they have an owner.
    """
    values = _marks(pairs, exclude)
    if not values:
        return {}
    found = _MARK_NEW.rows(connection, {"rows": driver.to_json(values), "me": me})
    return {lane: Mark(owner, bool(dirty)) for lane, owner, dirty in found}


def _marks(pairs: Iterable[tuple[str, str]], exclude: Collection[str]) -> list[dict[str, Any]]:
    return [
        {"lane": lane, "account": account, "dirty": int(lane not in exclude), "sent_with": ""}
        for lane, account in sorted(set(pairs))
    ]


def _mark(dialect: str, *kept: tuple[ColumnElement[bool], ColumnElement[int]]) -> driver.Insert:
    insertion = driver.insertion(dialect, lanes, ("lane", "account", "dirty", "sent_with"))
    one: ColumnElement[int] = literal_column("1")
    dirty = case(*kept, (insertion.excluded.dirty == one, one), else_=lanes.c.dirty)
    return insertion.on_conflict_do_update(index_elements=["lane"], set_={"dirty": dirty})


_MARK_DIRTY = Statement(_mark)
_MARK_NEW = Statement(
    lambda dialect: _mark(dialect, (lanes.c.owner == bindparam("me"), lanes.c.dirty)).returning(
        lanes.c.lane, lanes.c.owner, lanes.c.dirty
    )
)


def lock(connection: Connection, names: Iterable[str]) -> None:
    """Lock these lanes on PostgreSQL, in one order: of several processes that write, none waits in a circle.

    Also a single lane: a process that holds nothing of it, and waits for a row that another one inserts, would be
    waited for in turn. A lane that does not exist cannot be locked so: see `mark_dirty`.
    """
    wanted = sorted(set(names))
    if connection.dialect.name == "postgresql" and wanted:
        _HOLDERS.run(connection, {"lanes": wanted})


def claim(
    connection: Connection,
    owner: str,
    limit: int,
    lease_ms: int,
    *,
    batch: int = outbox.BATCH,
    exclude: Iterable[str] = (),
    only: Iterable[str] = (),
    encrypts: bool = False,
) -> list[Claim]:
    """Lease up to `limit` lanes that have something to send and no owner; those that were served longest ago first.

    `exclude`: no lanes of these accounts. `only`: of these lanes alone, also those that rest.
    `encrypts`: none of encrypted rooms for which another owner has the account's device.

    A lane that is not in doubt is from here on sent with the token that the account used last, unless `use_token` names
    another one. A lane in doubt keeps the token that it was sent with.
    """
    now = lease_clock(connection)
    wanted = list(only)
    values = {"limit_": limit, "now": now_ms(), "exclude": driver.texts(connection, exclude)}
    if wanted:
        values["only"] = driver.texts(connection, wanted)
    if encrypts:
        values["me"] = owner
    found = _FREE[bool(wanted), encrypts].rows(connection, values)
    names = [name for (name,) in found]
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
        Claim(Fence(lane, owner, fence), account, uncertain, sent_with, outbox.fetch(connection, lane, batch))
        for lane, fence, account, uncertain, sent_with in taken
    ]


_RECLAIM = """
INSERT INTO lanes (lane, account, owner, fence, lease_until, sent_with) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (lane) DO UPDATE SET owner = excluded.owner, fence = excluded.fence, lease_until = excluded.lease_until,
    sent_with = excluded.sent_with
"""


def reclaim(connection: Connection, reclaims: Iterable[Reclaim]) -> None:
    """Claim lanes of an SQLite file that no other process can have claimed meanwhile.

    `dirty` stays: a command may have added an event.
    """
    now = now_ms()
    if values := [
        (one.fence.lane, one.account, one.fence.owner, one.fence.number, now + one.lease_ms, one.sent_with)
        for one in reclaims
    ]:
        connection.exec_driver_sql(_RECLAIM, values)


_HAS_WORK = or_(lanes.c.dirty == literal_column("1"), lanes.c.owner.is_not(None))


def _free(dialect: str, *, only: bool, encrypts: bool) -> Select[Any]:
    """Lanes that can be claimed; of some lanes `only`, also those that rest. `encrypts`: see `claim`."""
    is_free = lanes.c.lease_until <= _now(dialect)
    found = select(lanes.c.lane).where(_HAS_WORK, or_(is_free, lanes.c.owner.is_(None)) if only else is_free)
    if only:
        found = found.where(driver.is_one_of(dialect, lanes.c.lane, "only"))
    found = found.where(not_(driver.is_one_of(dialect, lanes.c.account, "exclude")))
    if encrypts:
        found = found.where(not_(_is_another_s(dialect)))
    limit = bindparam("limit_", type_=Integer)
    return found.order_by(lanes.c.lease_until).limit(limit).with_for_update(skip_locked=True)


def _is_another_s(dialect: str) -> ColumnElement[bool]:
    """Whether a lane's room is encrypted, and another process has the device of its account."""
    one: ColumnElement[int] = literal_column("1")
    device = select(one).where(
        crypto_devices.c.account == lanes.c.account,
        crypto_devices.c.owner != bindparam("me"),
        crypto_devices.c.lease_until > _now(dialect),
    )
    room = func.substr(lanes.c.lane, func.length(lanes.c.account) + literal_column("2"))
    encrypted = select(one).where(crypto_rooms.c.room_id == room)
    return and_(device.exists(), encrypted.exists())


_BOTH = (False, True)
_FREE = {
    (only, encrypts): Statement(partial(_free, only=only, encrypts=encrypts)) for only in _BOTH for encrypts in _BOTH
}


def _now(dialect: str) -> ColumnElement[int]:
    """As `lease_clock`; a value `now` on SQLite."""
    return postgres_clock() if dialect == "postgresql" else bindparam("now", type_=BigInteger)


def _newest_token() -> ColumnElement[str]:
    good = and_(tokens.c.account == lanes.c.account, tokens.c.token.is_not(None), tokens.c.refused_at.is_(None))
    newest = select(tokens.c.token_hash).where(good).order_by(tokens.c.seen_at.desc(), tokens.c.token_hash)
    return newest.limit(1).scalar_subquery()


def _last_sign(lease_ms: int) -> ColumnElement[int]:
    """When an owner that is gone may have sent something, at the earliest: earlier doubts are recorded."""
    return func.coalesce(lanes.c.uncertain_since, lanes.c.lease_until - lease_ms)


def free(connection: Connection, whose: Sequence[str], limit: int) -> int:
    """How many lanes of these accounts could be claimed: `limit` at most, since it only matters whether many can."""
    claimable = select(lanes.c.lane).where(_HAS_WORK, lanes.c.lease_until <= lease_clock(connection))
    some = claimable.where(lanes.c.account.in_(whose)).limit(limit)
    return connection.scalar(select(func.count()).select_from(some.subquery())) or 0


def lanes_in(connection: Connection, user_id: str, room_id: str) -> list[str]:
    """The lanes of a user in a room, also those that rest."""
    theirs = connection.scalars(select(accounts.c.account).where(accounts.c.user_id == user_id))
    names = [f"{account}|{room_id}" for account in theirs]
    return list(connection.scalars(select(lanes.c.lane).where(lanes.c.lane.in_(names)))) if names else []


def renew(connection: Connection, owner: str, lease_ms: int) -> dict[str, tuple[int, int]]:
    """Prolong all leases of an owner: lane → fence, and 1 when events came that it may not know, or ASKED."""
    _lock_owned(connection, owner)
    found = _RENEW.rows(connection, {"owner_": owner, "now": now_ms(), "lease_ms": lease_ms})
    renewed = {lane: (fence, dirty) for lane, fence, dirty in found}
    if known := [lane for lane, (_, dirty) in renewed.items() if dirty]:
        _CLEAN.run(connection, {"owner_": owner, "lanes": driver.texts(connection, known)})
    return renewed


_MINE = lanes.c.owner == bindparam("owner_")
_RENEW = Statement(
    lambda dialect: (
        update(lanes)
        .where(_MINE, lanes.c.lease_until > _now(dialect))
        .values(lease_until=_now(dialect) + bindparam("lease_ms", type_=BigInteger))
        .returning(lanes.c.lane, lanes.c.fence, lanes.c.dirty)
    )
)
_CLEAN = Statement(
    lambda dialect: (
        update(lanes).where(driver.is_one_of(dialect, lanes.c.lane, "lanes"), _MINE).values(dirty=literal_column("0"))
    )
)


def release(connection: Connection, fences: Iterable[Fence], rest_ms: int = 0) -> None:
    """Give lanes back; those with queued events may be claimed again, once `rest_ms` are over.

    A lane that needs no rest comes behind those that wait already, too: no room keeps another one waiting.
    """
    until = lease_clock(connection) + rest_ms
    fences = sorted(fences, key=lambda fence: fence.lane)
    # By a statement of its own: one that waits for a lane does not see the events that came with it meanwhile.
    lock(connection, [fence.lane for fence in fences])
    if fences:
        given_back = [{"b_lane": fence.lane, "b_owner": fence.owner, "b_fence": fence.number} for fence in fences]
        connection.execute(_RELEASE.values(lease_until=until), given_back)


def release_all(connection: Connection, owner: str) -> None:
    """Give all lanes of an owner back: it ends, and nothing of it is in flight any more."""
    _lock_owned(connection, owner)
    held = update(lanes).where(lanes.c.owner == owner)
    connection.execute(held.values(owner=None, lease_until=0, dirty=_STILL_DIRTY))


_STILL_DIRTY = case((or_(lanes.c.dirty == 1, HAS_QUEUED), 1), else_=0)
_RELEASE = (
    update(lanes)
    .where(
        lanes.c.lane == bindparam("b_lane"),
        lanes.c.owner == bindparam("b_owner"),
        lanes.c.fence == bindparam("b_fence"),
    )
    .values(owner=None, dirty=_STILL_DIRTY)
)


def _lock_owned(connection: Connection, owner: str) -> None:
    """`lock` for all lanes of an owner."""
    if connection.dialect.name == "postgresql":
        _OWNED.run(connection, {"owner_": owner})


_OWNED = Statement(lambda _: select(lanes.c.lane).where(_MINE).order_by(lanes.c.lane).with_for_update())


def recover(connection: Connection, lease_ms: int) -> None:
    """At the start on a file of our own: any owner of a lane is dead."""
    owned = update(lanes).where(lanes.c.owner.is_not(None))
    connection.execute(owned.values(owner=None, lease_until=0, dirty=1, uncertain_since=_last_sign(lease_ms)))


def is_restored(uncertain_since: int | None) -> bool:
    """Whether a lane is in doubt since a backup was restored, which a minus says: see `continuity`."""
    return uncertain_since is not None and uncertain_since < 0


def doubt(connection: Connection, fence: Fence, since: int | None) -> None:
    """Record since when (ms) the head of a lane may have been sent; None once that is known."""
    connection.execute(update(lanes).where(holds(fence)).values(uncertain_since=since))


def use_token(connection: Connection, fence: Fence, digest: str) -> bool:
    """Record which token a lane is sent with from here on, before that is done. False when the lane is lost."""
    return connection.execute(update(lanes).where(holds(fence)).values(sent_with=digest)).rowcount > 0


def held(connection: Connection, fences: Iterable[Fence]) -> set[Fence]:
    """Those of these leases that are still the same; they stay so until the end of the transaction.

    All lanes are locked in one order.
    """
    wanted = {fence.lane: fence for fence in fences}
    found = _HOLDERS.rows(connection, {"lanes": driver.texts(connection, wanted)})
    return {fence for lane, *holder in found if (fence := wanted[lane]) == Fence(lane, *holder)}


_HOLDERS = Statement(
    lambda dialect: (
        select(lanes.c.lane, lanes.c.owner, lanes.c.fence)
        .where(driver.is_one_of(dialect, lanes.c.lane, "lanes"))
        .order_by(lanes.c.lane)
        .with_for_update()
    )
)


def holds(fence: Fence) -> ColumnElement[bool]:
    """Whether the lease is still this one."""
    return and_(lanes.c.lane == fence.lane, lanes.c.owner == fence.owner, lanes.c.fence == fence.number)


def forget_idle(connection: Connection) -> int:
    """Delete lanes with nothing in them, which are created again when they are needed; returns how many."""
    idle = and_(lanes.c.owner.is_(None), lanes.c.dirty == 0, ~HAS_QUEUED)
    names = select(lanes.c.lane).where(idle).limit(_FORGOTTEN).with_for_update(skip_locked=True)
    return connection.execute(delete(lanes).where(idle, lanes.c.lane.in_(names.scalar_subquery()))).rowcount
