"""Accounts: the user of each, and its tokens, one per device, encrypted, for as long as a queued event needs them.

A token that the homeserver refused is not used again until the homeserver has said whose it is.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, func, select, update

from flowbridge.store.statements import QUEUED, insert
from flowbridge.store.tables import accounts, outbox, tokens


class Stored(NamedTuple):
    """A token of an account. `token` is encrypted."""

    user_id: str
    device_id: str | None
    token: str


def account_of(user_id: str) -> str:
    """The account of a user: the same on all of its devices."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:24]


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write(connection: Connection, note: Mapping[str, Any]) -> None:
    """Record what was learnt of an account: its user, a token that was seen, or that one, or all, were refused."""
    if "refused_at" in note:
        refused = [tokens.c.account == note["account"]]
        if "token_hash" in note:
            refused.append(tokens.c.token_hash == note["token_hash"])
        connection.execute(update(tokens).where(*refused).values(refused_at=note["refused_at"]))
    elif "token_hash" in note:
        remember(connection, note)
    else:
        _remember_user(connection, note)


def remember(connection: Connection, seen: Mapping[str, Any]) -> None:
    """Insert or update: account, user_id, device_id, token (encrypted), token_hash, seen_at (ms).

    The account comes first: its row keeps two replicas from waiting for each other in a circle.
    """
    _remember_user(connection, seen)
    if seen["device_id"] is not None:  # a device has one token
        connection.execute(
            delete(tokens).where(
                tokens.c.account == seen["account"],
                tokens.c.device_id == seen["device_id"],
                tokens.c.token_hash != seen["token_hash"],
            )
        )
    values = {name: seen[name] for name in ("account", "device_id", "token", "seen_at")}
    connection.execute(
        insert(connection, tokens)
        .values(token_hash=seen["token_hash"], **values)
        .on_conflict_do_update(index_elements=["token_hash"], set_={**values, "refused_at": None})
    )


def _remember_user(connection: Connection, seen: Mapping[str, Any]) -> None:
    user = {"user_id": seen["user_id"]}
    statement = insert(connection, accounts).values(account=seen["account"], **user)
    connection.execute(statement.on_conflict_do_update(index_elements=["account"], set_=user))


def by_token(connection: Connection, token: str) -> tuple[str, str | None] | None:
    """User id and device id of a token that was seen before, and not refused since."""
    row = connection.execute(
        select(accounts.c.user_id, tokens.c.device_id)
        .join(accounts, accounts.c.account == tokens.c.account)
        .where(tokens.c.token_hash == token_hash(token), tokens.c.refused_at.is_(None))
    ).first()
    return (row.user_id, row.device_id) if row else None


def tokens_of(connection: Connection, account: str, *, refused: bool = False) -> list[Stored]:
    """The tokens of an account that may be good, or those that were refused; the one seen last comes first."""
    wanted = tokens.c.refused_at.is_not(None) if refused else tokens.c.refused_at.is_(None)
    found = connection.execute(
        select(accounts.c.user_id, tokens.c.device_id, tokens.c.token)
        .join(tokens, tokens.c.account == accounts.c.account)
        .where(accounts.c.account == account, tokens.c.token.is_not(None), wanted)
        .order_by(tokens.c.seen_at.desc(), tokens.c.token_hash)
    )
    return [Stored(*row) for row in found]


def queued(connection: Connection) -> list[tuple[str, str | None, int]]:
    """The accounts with queued events: the user, if it is known, and how many; those with the most first."""
    number = func.count().label("number")
    found = connection.execute(
        select(outbox.c.account, accounts.c.user_id, number)
        .outerjoin(accounts, accounts.c.account == outbox.c.account)
        .where(QUEUED)
        .group_by(outbox.c.account, accounts.c.user_id)
        .order_by(number.desc(), outbox.c.account)
    )
    return [(account, user_id, int(number)) for account, user_id, number in found]


def drop_idle_tokens(connection: Connection, seen_before: int) -> int:
    """Blank the tokens that no queued event needs; whose they are stays known."""
    needed = select(outbox.c.account).where(QUEUED)
    idle = and_(tokens.c.token.is_not(None), tokens.c.seen_at < seen_before, tokens.c.account.not_in(needed))
    return connection.execute(update(tokens).where(idle).values(token=None)).rowcount


def forget_tokens(connection: Connection, seen_before: int) -> int:
    """Delete blank tokens that have not been seen since (ms)."""
    old = and_(tokens.c.token.is_(None), tokens.c.seen_at < seen_before)
    return connection.execute(delete(tokens).where(old)).rowcount
