"""Accounts: whose token is whose, and the token itself, encrypted, for as long as a queued event needs it."""

import hashlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, exists, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flowbridge.store.tables import accounts, outbox


def account_of(user_id: str, device_id: str | None) -> str:
    """A user on a device: what transaction ids are counted by."""
    return hashlib.sha256(f"{user_id}\0{device_id or ''}".encode()).hexdigest()[:24]


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def remember(connection: Connection, account: Mapping[str, Any]) -> None:
    """Insert or update: account, user_id, device_id, token (encrypted), token_hash, seen_at (ms)."""
    build = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    # The same token on another account cannot be, but for one that was deleted and made anew.
    connection.execute(
        update(accounts)
        .where(accounts.c.token_hash == account["token_hash"], accounts.c.account != account["account"])
        .values(token_hash=None, token=None)
    )
    changed = {key: value for key, value in account.items() if key != "account"}
    connection.execute(
        build(accounts).values(**account).on_conflict_do_update(index_elements=["account"], set_=changed)
    )


def by_token(connection: Connection, token: str) -> tuple[str, str | None] | None:
    """User id and device id of a token that was seen before."""
    row = connection.execute(
        select(accounts.c.user_id, accounts.c.device_id).where(accounts.c.token_hash == token_hash(token))
    ).first()
    return (row.user_id, row.device_id) if row else None


def token_of(connection: Connection, account: str) -> tuple[str, str | None, str | None] | None:
    """User id, device id and encrypted token of an account."""
    row = connection.execute(
        select(accounts.c.user_id, accounts.c.device_id, accounts.c.token).where(accounts.c.account == account)
    ).first()
    return (row.user_id, row.device_id, row.token) if row else None


def drop_idle_tokens(connection: Connection, seen_before: int) -> int:
    """Blank the tokens that no queued event needs; whose they are stays known."""
    needed = exists(select(1).where(outbox.c.account == accounts.c.account, outbox.c.state == "queued"))
    done = connection.execute(
        update(accounts)
        .where(accounts.c.token.is_not(None), accounts.c.seen_at < seen_before, ~needed)
        .values(token=None)
    )
    return done.rowcount
