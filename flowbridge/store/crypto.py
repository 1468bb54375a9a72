"""Devices of the bridge: their keys, sessions, and what they know of others. Each function is work on a connection.

All that one step changes is written together, by `write`, under the lease of the device: a ratchet that has moved goes
to the disk with what it made. Nothing here is readable without the secret key, but ids.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, and_, bindparam, delete, func, literal_column, or_, select, update
from sqlalchemy.sql import ClauseElement, ColumnElement

from flowbridge.store import driver
from flowbridge.store.clock import lease_clock
from flowbridge.store.driver import Insert, Statement
from flowbridge.store.statements import QUEUED, insert
from flowbridge.store.tables import (
    ciphertexts,
    crypto_devices,
    crypto_inbox,
    crypto_indexes,
    crypto_logins,
    crypto_outbound,
    crypto_room_keys,
    crypto_rooms,
    crypto_sessions,
    crypto_users,
    outbox,
)

MAX_LOGINS = 50  # of one account that are remembered
MAX_SESSIONS = 5  # Olm sessions with one device that are kept: a hostile one could begin any number
_NAMED = 500  # rows that one statement names
_FORGOTTEN = 1_000  # rows that are deleted at once


@dataclass(frozen=True, slots=True)
class DeviceLease:
    """The right to act as a device: void once another owner has raised the fence."""

    account: str
    owner: str
    number: int


class StoredDevice(NamedTuple):
    """`since`: up to where its sync was read."""

    user_id: str
    device_id: str
    pickle: str
    sealed: str
    since: str | None


class StoredSession(NamedTuple):
    peer: str
    session_id: str
    pickle: str
    used_at: int


class StoredOutbound(NamedTuple):
    """`shared`: sealed; None: as it is in the store. `messages`: encrypted with it so far."""

    room_id: str
    session_id: str
    pickle: str
    shared: str | None
    messages: int
    created_at: int


class StoredRoomKey(NamedTuple):
    room_id: str
    session_id: str
    peer: str
    pickle: str
    sealed: str
    first_index: int
    received_at: int


class StoredUser(NamedTuple):
    """`sealed`: None before the homeserver was asked. `outdated`: 1 when it has to be asked again."""

    user_id: str
    sealed: str | None
    outdated: int = 0


class Index(NamedTuple):
    session_id: str
    message_index: int
    mark: str


@dataclass(slots=True)
class Changes:
    """What one step changes. None: stays as it is. `left`: users that are followed no more.
    `read`: entries of the inbox.

    `ciphertext`: a delivery, and the content that the session of the same step made of it. `existing`: set by `write`
    when the delivery has one from before, which stays.
    """

    pickle: str | None = None
    sealed: str | None = None
    since: str | None = None
    sessions: list[StoredSession] = field(default_factory=list)
    outbound: list[StoredOutbound] = field(default_factory=list)
    room_keys: list[StoredRoomKey] = field(default_factory=list)
    users: list[StoredUser] = field(default_factory=list)
    outdated: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    indexes: list[Index] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    ciphertext: tuple[str, str] | None = None
    existing: str | None = None


# the device, and its lease


def create(connection: Connection, account: str, device: StoredDevice, now: int) -> bool:
    """Add a device; False when the account has one already, perhaps from a run of this that was repeated."""
    values = {"account": account, **device._asdict(), "created_at": now}
    new = insert(connection, crypto_devices).values(values).on_conflict_do_nothing()
    return connection.scalar(new.returning(crypto_devices.c.account)) is not None


def has_devices(connection: Connection) -> bool:
    """Whether the bridge has ever encrypted here."""
    return connection.scalar(select(crypto_devices.c.account).limit(1)) is not None


def device(connection: Connection, account: str) -> StoredDevice | None:
    columns = [crypto_devices.c[name] for name in StoredDevice._fields]
    row = connection.execute(select(*columns).where(crypto_devices.c.account == account)).first()
    return StoredDevice(*row) if row else None


def claim(connection: Connection, account: str, owner: str, lease_ms: int, *, alone: bool) -> DeviceLease | None:
    """Become the process that acts as a device; None while another one is, or where there is no device.

    `alone`: no other process has the store, so any other owner is dead. An owner that claims again gets another fence:
    what it began before is void.
    """
    now = lease_clock(connection)
    claims = update(crypto_devices).where(crypto_devices.c.account == account)
    if not alone:
        claims = claims.where(_is_free(connection, owner))
    values = {"owner": owner, "fence": crypto_devices.c.fence + 1, "lease_until": now + lease_ms}
    number = connection.scalar(claims.values(values).returning(crypto_devices.c.fence))
    return None if number is None else DeviceLease(account, owner, number)


def _is_free(connection: Connection, owner: str) -> ColumnElement[bool]:
    """Whether no other owner has the device."""
    mine, nobody = crypto_devices.c.owner == owner, crypto_devices.c.owner.is_(None)
    return or_(mine, nobody, crypto_devices.c.lease_until <= lease_clock(connection))


def renew(connection: Connection, lease: DeviceLease, lease_ms: int) -> bool:
    """Prolong a lease; False when it has ended: another process may act as the device."""
    now = lease_clock(connection)
    renewed = update(crypto_devices).where(_held(lease), crypto_devices.c.lease_until > now)
    return connection.execute(renewed.values(lease_until=now + lease_ms)).rowcount > 0


def release(connection: Connection, lease: DeviceLease) -> None:
    connection.execute(update(crypto_devices).where(_held(lease)).values(owner=None, lease_until=0))


def ask(connection: Connection, account: str, for_ms: int) -> None:
    """Ask the owner of a device to give it back, and not to take it again for so long: for a command."""
    until = lease_clock(connection) + for_ms
    connection.execute(update(crypto_devices).where(crypto_devices.c.account == account).values(asked_until=until))


def is_asked_for(connection: Connection, account: str) -> bool:
    asked = (crypto_devices.c.account == account, crypto_devices.c.asked_until > lease_clock(connection))
    return connection.scalar(select(crypto_devices.c.account).where(*asked)) is not None


def owner(connection: Connection, account: str) -> str | None:
    """The process that acts as a device, if any does."""
    now = lease_clock(connection)
    found = select(crypto_devices.c.owner).where(
        crypto_devices.c.account == account, crypto_devices.c.lease_until > now
    )
    name: str | None = connection.scalar(found)
    return name


def _held(lease: DeviceLease) -> ColumnElement[bool]:
    return and_(
        crypto_devices.c.account == lease.account,
        crypto_devices.c.owner == lease.owner,
        crypto_devices.c.fence == lease.number,
    )


def replace(connection: Connection, account: str, device: StoredDevice, now: int, owner: str) -> bool:
    """Give the account another device; False while another owner acts as the one that it has.

    Room keys stay: the new one reads with them, too. So do ciphertexts: those that may have been sent must not be sent
    as others.
    """
    values = {**device._asdict(), "owner": None, "lease_until": 0, "created_at": now}
    replaced = update(crypto_devices).where(crypto_devices.c.account == account, _is_free(connection, owner))
    if not connection.execute(replaced.values(**values, fence=crypto_devices.c.fence + 1)).rowcount:
        return False
    for table in (crypto_sessions, crypto_outbound, crypto_users):
        connection.execute(delete(table).where(table.c.account == account))
    return True


# devices of callers


def note_login(connection: Connection, account: str, device_id: str, now: int) -> None:
    """A device has logged in through the bridge; of an account the newest are remembered."""
    values = {"account": account, "device_id": device_id, "logged_in_at": now}
    statement = insert(connection, crypto_logins).values(values)
    keys = ["account", "device_id"]
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_={"logged_in_at": now}))
    mine = crypto_logins.c.account == account
    newest = select(crypto_logins.c.device_id).where(mine)
    newest = newest.order_by(crypto_logins.c.logged_in_at.desc(), crypto_logins.c.device_id).limit(MAX_LOGINS)
    connection.execute(delete(crypto_logins).where(mine, crypto_logins.c.device_id.not_in(newest.scalar_subquery())))


def is_login(connection: Connection, account: str, device_id: str) -> bool:
    """Whether a device has logged in through the bridge, and no client has given it keys since."""
    mine = (crypto_logins.c.account == account, crypto_logins.c.device_id == device_id)
    return connection.scalar(select(crypto_logins.c.device_id).where(*mine)) is not None


def forget_device(connection: Connection, account: str, device_id: str) -> None:
    """A device is gone, or a client's from now on: forget its keys, and what it has encrypted with.

    What was encrypted with it already may be in rooms, and stays.
    """
    login = (crypto_logins.c.account == account, crypto_logins.c.device_id == device_id)
    connection.execute(delete(crypto_logins).where(*login))
    own = (crypto_devices.c.account == account, crypto_devices.c.device_id == device_id)
    if connection.execute(delete(crypto_devices).where(*own)).rowcount:
        for table in (crypto_sessions, crypto_outbound, crypto_users, crypto_inbox, crypto_room_keys, crypto_indexes):
            connection.execute(delete(table).where(table.c.account == account))


# writing


def write(connection: Connection, lease: DeviceLease, changes: Changes) -> bool:
    """Write what a step has changed; nothing, and False, when the lease is another's by now.

    It may run twice. On PostgreSQL the device's row is locked until the commit, so that no claim comes between.
    """
    # Always, also without a value: the row is locked, and whose it is is known.
    held = {"account_": lease.account, "owner_": lease.owner, "fence_": lease.number}
    if not _HOLD.run(connection, held).rowcount:
        return False
    values = {name: value for name in ("pickle", "sealed", "since") if (value := getattr(changes, name)) is not None}
    if values:
        connection.execute(update(crypto_devices).where(_held(lease)).values(values))
    account = lease.account
    _upsert(connection, crypto_sessions, account, changes.sessions)
    _drop_oldest(connection, account, {session.peer for session in changes.sessions})
    for each in changes.outbound:
        if each.shared is not None:
            _OUTBOUND.run(connection, {"account": account, **each._asdict()})
            continue
        step = {"room": each.room_id, "session": each.session_id, "pickle_": each.pickle, "messages_": each.messages}
        _STEP.run(connection, {"account_": account, **step})
    _add_room_keys(connection, account, changes.room_keys)
    _upsert(connection, crypto_users, account, changes.users)
    _mark_outdated(connection, account, changes.outdated)
    for names in _pieces(changes.left):
        mine = crypto_users.c.account == account
        connection.execute(delete(crypto_users).where(mine, crypto_users.c.user_id.in_(names)))
    if changes.indexes:
        statement = insert(connection, crypto_indexes).on_conflict_do_nothing()
        connection.execute(statement, [{"account": account, **index._asdict()} for index in changes.indexes])
    if changes.read:
        mine = crypto_inbox.c.account == account
        connection.execute(delete(crypto_inbox).where(mine, crypto_inbox.c.id.in_(changes.read)))
    if changes.ciphertext is not None:
        name, content = changes.ciphertext
        made = _CIPHERTEXT.rows(connection, {"delivery": name, "account": account, "content": content})
        changes.existing = None if made else ciphertext(connection, name)
    return True


# What each message takes: see driver.py.


def _hold(_: str) -> ClauseElement:
    columns = crypto_devices.c
    mine = (columns.account == bindparam("account_"), columns.owner == bindparam("owner_"))
    held = update(crypto_devices).where(*mine, columns.fence == bindparam("fence_"))
    return held.values(fence=literal_column("fence"))


def _set_outbound(dialect: str) -> ClauseElement:
    statement = _insertion(dialect, crypto_outbound, ("account", *StoredOutbound._fields))
    rest = {name: statement.excluded[name] for name in StoredOutbound._fields if name != "room_id"}
    return statement.on_conflict_do_update(index_elements=["account", "room_id"], set_=rest)


def _step_outbound(_: str) -> ClauseElement:
    columns = crypto_outbound.c
    mine = (columns.account == bindparam("account_"), columns.room_id == bindparam("room"))
    step = update(crypto_outbound).where(*mine, columns.session_id == bindparam("session"))
    return step.values(pickle=bindparam("pickle_"), messages=bindparam("messages_"))


def _add_ciphertext(dialect: str) -> ClauseElement:
    statement = _insertion(dialect, ciphertexts, ("delivery", "account", "content"))
    return statement.on_conflict_do_nothing().returning(ciphertexts.c.delivery)


def _insertion(dialect: str, table: Table, names: Sequence[str]) -> Insert:
    return driver.insert(dialect, table).values({name: bindparam(name) for name in names})


_HOLD = Statement(_hold)
_OUTBOUND = Statement(_set_outbound)
_STEP = Statement(_step_outbound)
_CIPHERTEXT = Statement(_add_ciphertext)


def _upsert(connection: Connection, table: Any, account: str, rows: Sequence[Any]) -> None:
    if not rows:
        return
    statement = insert(connection, table)
    keys = [column.name for column in table.primary_key]
    rest = {name: statement.excluded[name] for name in rows[0]._fields if name not in keys}
    values = [{"account": account, **row._asdict()} for row in rows]
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=rest), values)


def _add_room_keys(connection: Connection, account: str, keys: Sequence[StoredRoomKey]) -> None:
    """A key that is there already stays, unless the other one reads more. So no sender can take any of it back."""
    if not keys:
        return
    statement = insert(connection, crypto_room_keys)
    rest = {name: statement.excluded[name] for name in ("pickle", "sealed", "first_index", "received_at")}
    better = statement.on_conflict_do_update(
        index_elements=[column.name for column in crypto_room_keys.primary_key],
        set_=rest,
        where=statement.excluded.first_index < crypto_room_keys.c.first_index,
    )
    connection.execute(better, [{"account": account, **key._asdict()} for key in keys])


def _mark_outdated(connection: Connection, account: str, users: Collection[str]) -> None:
    """Of those that are followed: another user's devices need not be known."""
    for names in _pieces(users):
        mine = crypto_users.c.account == account
        connection.execute(update(crypto_users).where(mine, crypto_users.c.user_id.in_(names)).values(outdated=1))


def _drop_oldest(connection: Connection, account: str, peers: Collection[str]) -> None:
    for peer in peers:
        mine = (crypto_sessions.c.account == account, crypto_sessions.c.peer == peer)
        newest = crypto_sessions.c.used_at.desc(), crypto_sessions.c.session_id
        names = list(connection.scalars(select(crypto_sessions.c.session_id).where(*mine).order_by(*newest)))
        if surplus := names[MAX_SESSIONS:]:
            connection.execute(delete(crypto_sessions).where(*mine, crypto_sessions.c.session_id.in_(surplus)))


# reading


def sessions(connection: Connection, account: str, peers: Collection[str]) -> list[StoredSession]:
    """The sessions with these devices; of each those used last come first."""
    found: list[StoredSession] = []
    for names in _pieces(peers):
        rows = (
            select(*(crypto_sessions.c[name] for name in StoredSession._fields))
            .where(crypto_sessions.c.account == account, crypto_sessions.c.peer.in_(names))
            .order_by(crypto_sessions.c.peer, crypto_sessions.c.used_at.desc(), crypto_sessions.c.session_id)
        )
        found += [StoredSession(*row) for row in connection.execute(rows)]
    return found


def keep_for_device(connection: Connection, account: str, sealed: str) -> None:
    """Messages for a device, for the process that acts as it."""
    connection.execute(insert(connection, crypto_inbox).values(account=account, sealed=sealed))


def inbox(connection: Connection, account: str) -> list[tuple[int, str]]:
    """What was kept for a device, the oldest first: some of it at a time."""
    rows = select(crypto_inbox.c.id, crypto_inbox.c.sealed).where(crypto_inbox.c.account == account)
    return [(id_, sealed) for id_, sealed in connection.execute(rows.order_by(crypto_inbox.c.id).limit(_NAMED))]


def outbound(connection: Connection, account: str, room_id: str) -> StoredOutbound | None:
    columns = [crypto_outbound.c[name] for name in StoredOutbound._fields]
    mine = (crypto_outbound.c.account == account, crypto_outbound.c.room_id == room_id)
    row = connection.execute(select(*columns).where(*mine)).first()
    return StoredOutbound(*row) if row else None


def room_keys(connection: Connection, account: str, room_id: str, session_id: str) -> list[StoredRoomKey]:
    """All that were given under this id: by the device that made the session, and perhaps by others."""
    mine = (
        crypto_room_keys.c.account == account,
        crypto_room_keys.c.room_id == room_id,
        crypto_room_keys.c.session_id == session_id,
    )
    return [StoredRoomKey(*row) for row in connection.execute(select(*_ROOM_KEY).where(*mine))]


def all_room_keys(connection: Connection, account: str, after: tuple[str, str, str], limit: int) -> list[StoredRoomKey]:
    """A page of all room keys, in the order of room, session and peer."""
    key = (crypto_room_keys.c.room_id, crypto_room_keys.c.session_id, crypto_room_keys.c.peer)
    place = or_(
        key[0] > after[0],
        and_(key[0] == after[0], key[1] > after[1]),
        and_(key[0] == after[0], key[1] == after[1], key[2] > after[2]),
    )
    rows = select(*_ROOM_KEY).where(crypto_room_keys.c.account == account, place).order_by(*key).limit(limit)
    return [StoredRoomKey(*row) for row in connection.execute(rows)]


_ROOM_KEY = [crypto_room_keys.c[name] for name in StoredRoomKey._fields]


def users(connection: Connection, account: str, names: Collection[str] | None = None) -> list[StoredUser]:
    """What is known of these users, or of all that are followed."""
    columns = [crypto_users.c[name] for name in StoredUser._fields]
    rows = select(*columns).where(crypto_users.c.account == account)
    pieces = [None] if names is None else list(_pieces(names))
    found: list[StoredUser] = []
    for piece in pieces:
        wanted = rows if piece is None else rows.where(crypto_users.c.user_id.in_(piece))
        found += [StoredUser(*row) for row in connection.execute(wanted)]
    return found


def index_mark(connection: Connection, account: str, session_id: str, message_index: int) -> str | None:
    """Which event this message was when it was first read."""
    mine = (
        crypto_indexes.c.account == account,
        crypto_indexes.c.session_id == session_id,
        crypto_indexes.c.message_index == message_index,
    )
    found: str | None = connection.scalar(select(crypto_indexes.c.mark).where(*mine))
    return found


# rooms


def note_room(connection: Connection, room_id: str, settings: str) -> None:
    """A room is encrypted, so (JSON); from now on, whatever the homeserver may say later."""
    statement = insert(connection, crypto_rooms).values(room_id=room_id, settings=settings)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["room_id"], set_={"settings": statement.excluded.settings})
    )


def room_settings(connection: Connection, room_id: str) -> str | None:
    found: str | None = connection.scalar(select(crypto_rooms.c.settings).where(crypto_rooms.c.room_id == room_id))
    return found


# what was encrypted


def ciphertext(connection: Connection, delivery: str) -> str | None:
    """What a queued event was encrypted to, before an attempt that may have failed."""
    found: str | None = connection.scalar(select(ciphertexts.c.content).where(ciphertexts.c.delivery == delivery))
    return found


def forget_ciphertexts(connection: Connection) -> int:
    """Delete those of events that are queued no more; returns how many."""
    queued = select(outbox.c.delivery).where(outbox.c.delivery == ciphertexts.c.delivery, QUEUED).exists()
    names = select(ciphertexts.c.delivery).where(~queued).limit(_FORGOTTEN)
    return connection.execute(delete(ciphertexts).where(ciphertexts.c.delivery.in_(names.scalar_subquery()))).rowcount


def held(connection: Connection, account: str) -> dict[str, int]:
    """How much of each kind there is, for `device status`."""
    tables = {"room_keys": crypto_room_keys, "sessions": crypto_sessions, "users": crypto_users}
    counts = {
        name: select(func.count()).select_from(table).where(table.c.account == account)
        for name, table in tables.items()
    }
    return {name: connection.scalar(count) or 0 for name, count in counts.items()}


def _pieces(names: Iterable[str]) -> Iterable[list[str]]:
    whole = sorted(set(names))
    return (whole[start : start + _NAMED] for start in range(0, len(whole), _NAMED))
