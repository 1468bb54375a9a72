"""Hooks: their definitions, secrets and states. Each function is work on a connection.

`hooks.yaml` has hooks, too: their states, and secrets that do not stand there, are found by name like the others'.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, case, delete, func, or_, select, update

from flowbridge.models.hooks import Hook, Verification
from flowbridge.store.statements import insert
from flowbridge.store.tables import hook_requests, hook_secrets, hook_state, hooks

MAX_HOOKS = 1_000
HOLDING = 2  # secrets of one hook

Added = Literal["added", "exists", "taken", "full"]
Replaced = Literal["replaced", "absent", "taken"]


@dataclass(frozen=True, slots=True)
class NewSecret:
    """As it is kept. `hash`: of a token, its SHA-256; of a text that signs, random: that is found by its hook alone.

    `sealed`: encrypted; None for a token.
    """

    hash: str
    sealed: str | None = None


@dataclass(frozen=True, slots=True)
class StoredSecret:
    """`until`: when it ends (ms); None while no newer one has come."""

    hook: str
    hash: str
    sealed: str | None
    created_at: int
    until: int | None


@dataclass(frozen=True, slots=True)
class State:
    """What became of a hook's requests. Times are milliseconds since 1970; None: never. `failure`: of its template."""

    used_at: int | None = None
    failed_at: int | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    hook: Hook
    created_at: int
    changed_at: int


def digest(secret: str) -> bytes:
    """What is kept of a token. Any text has one, even one that is not valid Unicode."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def add(connection: Connection, hook: Hook, secret: NewSecret, now: int) -> Added:
    """Add a hook with its first secret. What there was of an earlier one of this name goes.

    `taken`: another hook has this token. It may run twice: the hook that the first run made is not another one.
    """
    values = {"name": hook.name, "definition": definition(hook), "created_at": now, "changed_at": now}
    if (connection.scalar(select(func.count()).select_from(hooks)) or 0) >= MAX_HOOKS:
        return "full"
    others = hook_secrets.c.hook != hook.name
    if connection.scalar(select(hook_secrets.c.id).where(hook_secrets.c.hash == secret.hash, others)) is not None:
        return "taken"
    new = insert(connection, hooks).values(values).on_conflict_do_nothing().returning(hooks.c.name)
    if connection.scalar(new) is None:
        mine = select(hooks.c.name).where(*(hooks.c[name] == value for name, value in values.items()))
        return "added" if connection.scalar(mine) is not None else "exists"
    _forget(connection, hook.name)
    if not _add_secret(connection, hook.name, secret, now):  # another replica was faster
        connection.execute(delete(hooks).where(hooks.c.name == hook.name))
        return "taken"
    return "added"


def replace(connection: Connection, hook: Hook, now: int, secret: NewSecret | None = None) -> Replaced:
    """Give a hook another definition. Its template may work again.

    `secret`: instead of those that it has, which its new scheme cannot use.
    """
    if connection.scalar(select(hooks.c.name).where(hooks.c.name == hook.name)) is None:
        return "absent"
    if secret is not None and not rotate(connection, hook.name, secret, now, now):
        return "taken"
    changed = update(hooks).where(hooks.c.name == hook.name)
    later = case((hooks.c.changed_at < now, now), else_=hooks.c.changed_at + 1)  # never the same twice: see `versions`
    connection.execute(changed.values(definition=definition(hook), changed_at=later))
    worked = update(hook_state).where(hook_state.c.name == hook.name)
    connection.execute(worked.values(failed_at=None, failure=None))
    keep(connection, [], {hook.name: hook.keep_requests})
    return "replaced"


def remove(connection: Connection, name: str) -> bool:
    """Delete a hook with its secrets, its state and its requests; False when there was none."""
    was_there = connection.execute(delete(hooks).where(hooks.c.name == name)).rowcount > 0
    if was_there:
        _forget(connection, name)
    return was_there


def rotate(connection: Connection, name: str, secret: NewSecret, now: int, until: int) -> bool:
    """Add a secret, the hook's newest. The one before it holds until then (ms), no other one; False: it is taken."""
    mine = hook_secrets.c.hook == name
    newest = connection.scalar(select(func.max(hook_secrets.c.id)).where(mine, hook_secrets.c.hash != secret.hash))
    if not _add_secret(connection, name, secret, now):
        return False
    connection.execute(delete(hook_secrets).where(mine, hook_secrets.c.id < (newest or 0)))
    if newest is not None:
        before = update(hook_secrets).where(hook_secrets.c.id == newest)
        sooner = or_(hook_secrets.c.until.is_(None), hook_secrets.c.until > until)
        connection.execute(before.where(sooner).values(until=until))
    connection.execute(delete(hook_secrets).where(mine, hook_secrets.c.until <= now))
    return True


def every(connection: Connection) -> list[Entry]:
    """All hooks of the store, by name."""
    return [_entry(row) for row in connection.execute(select(hooks).order_by(hooks.c.name)).mappings()]


def get(connection: Connection, name: str) -> Entry | None:
    row = connection.execute(select(hooks).where(hooks.c.name == name)).mappings().first()
    return _entry(row) if row else None


def versions(connection: Connection) -> dict[str, int]:
    """When each was changed last: what tells whether a definition has to be read again."""
    return {row.name: row.changed_at for row in connection.execute(select(hooks.c.name, hooks.c.changed_at))}


def some(connection: Connection, names: Sequence[str]) -> list[Hook]:
    found = connection.execute(select(hooks).where(hooks.c.name.in_(names))).mappings()
    return [_entry(row).hook for row in found]


def secrets(connection: Connection, now: int, name: str | None = None) -> list[StoredSecret]:
    """Those that hold, the newest of each hook first; of one hook alone, if it is named."""
    wanted = [or_(hook_secrets.c.until.is_(None), hook_secrets.c.until > now)]
    if name is not None:
        wanted.append(hook_secrets.c.hook == name)
    columns = [hook_secrets.c[each] for each in ("hook", "hash", "secret", "created_at", "until")]
    found = connection.execute(select(*columns).where(*wanted).order_by(hook_secrets.c.id.desc()))
    return [StoredSecret(*row) for row in found]


def states(connection: Connection) -> dict[str, State]:
    return {row.name: _state(row) for row in connection.execute(select(hook_state))}


def state(connection: Connection, name: str) -> State:
    row = connection.execute(select(hook_state).where(hook_state.c.name == name)).first()
    return _state(row) if row else State()


def failing(connection: Connection) -> dict[str, str]:
    """The hooks whose template failed, and how."""
    failed = select(hook_state.c.name, hook_state.c.failure).where(hook_state.c.failure.is_not(None))
    return {row.name: row.failure for row in connection.execute(failed)}


def note(connection: Connection, used: Mapping[str, int], failures: Mapping[str, str], now: int) -> None:
    """Record when hooks were last used: name → ms, and how their templates failed; "": one works again."""
    for name in sorted({*used, *failures}):  # in one order, so that two replicas do not wait for each other
        values: dict[str, Any] = {}
        if name in used:
            values["used_at"] = used[name]
        if name in failures:
            failure = failures[name]
            values |= {"failed_at": now if failure else None, "failure": failure or None}
        new = insert(connection, hook_state).values(name=name, **values)
        connection.execute(new.on_conflict_do_update(index_elements=["name"], set_=values))


def purge(connection: Connection, now: int, requests: int) -> int:
    """Delete secrets that have ended, and requests that were received before (ms); returns how many."""
    ended = connection.execute(delete(hook_secrets).where(hook_secrets.c.until <= now)).rowcount
    return ended + connection.execute(delete(hook_requests).where(hook_requests.c.received_at < requests)).rowcount


def keep(connection: Connection, rows: Iterable[Mapping[str, Any]], most: Mapping[str, int]) -> None:
    """Add requests (`hook`, `received_at`, `request`, `outcome`), and keep the last ones of each hook alone."""
    if values := list(rows):
        connection.execute(hook_requests.insert(), values)
    place = func.row_number().over(partition_by=hook_requests.c.hook, order_by=hook_requests.c.id.desc())
    for number in sorted(set(most.values())):  # mostly there is one: a statement for each hook took the writer 20 ms
        names = sorted(name for name, mine in most.items() if mine == number)
        ranked = select(hook_requests.c.id, place.label("place")).where(hook_requests.c.hook.in_(names)).subquery()
        old = select(ranked.c.id).where(ranked.c.place > number)
        connection.execute(delete(hook_requests).where(hook_requests.c.id.in_(old)))


def requests(connection: Connection, name: str, id_: int | None = None) -> list[dict[str, Any]]:
    """The kept requests of a hook, the newest first; or the one with this id."""
    wanted = [hook_requests.c.hook == name]
    if id_ is not None:
        wanted.append(hook_requests.c.id == id_)
    found = connection.execute(select(hook_requests).where(and_(*wanted)).order_by(hook_requests.c.id.desc()))
    return [dict(row) for row in found.mappings()]


def definition(hook: Hook) -> str:
    """A hook as it is kept: without its name."""
    found = asdict(hook)
    del found["name"], found["is_fixed"]
    return json.dumps(found, ensure_ascii=False, sort_keys=True)


def _entry(row: Mapping[Any, Any]) -> Entry:
    found: dict[str, Any] = json.loads(row["definition"])
    found |= {name: tuple(found[name]) for name in ("mention", "ignore")}
    found["verification"] = Verification(**found["verification"])
    return Entry(Hook(row["name"], **found), row["created_at"], row["changed_at"])


def _state(row: Any) -> State:
    return State(row.used_at, row.failed_at, row.failure or "")


def _add_secret(connection: Connection, name: str, secret: NewSecret, now: int) -> bool:
    values = {"hook": name, "hash": secret.hash, "secret": secret.sealed, "created_at": now}
    new = insert(connection, hook_secrets).values(values).on_conflict_do_nothing().returning(hook_secrets.c.id)
    if connection.scalar(new) is not None:
        return True
    mine = select(hook_secrets.c.id).where(hook_secrets.c.hash == secret.hash, hook_secrets.c.hook == name)
    return connection.scalar(mine.where(hook_secrets.c.created_at == now)) is not None  # of a run before this one


def _forget(connection: Connection, name: str) -> None:
    """Its secrets, its state and its requests."""
    connection.execute(delete(hook_secrets).where(hook_secrets.c.hook == name))
    connection.execute(delete(hook_state).where(hook_state.c.name == name))
    connection.execute(delete(hook_requests).where(hook_requests.c.hook == name))
