"""An account is a user, with one token for each device; what names led to; the users of an API key.

Before, an account was a user on a device, and so was half of a lane's name. Both change in every row, which takes about
10 s for a million rows, and as much free disk as they occupy. Lanes of one user in one room become one lane, in the
order of `outbox.id`. Tables that change are created again, since SQLite cannot add a column without a default.
"""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_QUEUED = sa.text("state = 'queued'")
_WAITING = sa.text("dirty = 1 OR owner IS NOT NULL")


def upgrade() -> None:
    _keep()
    _create()
    _users()
    _rename()
    _lanes()
    op.execute(
        "INSERT INTO api_keys (id, name, hash, rooms, event_types, admin, created_at, revoked_at, used_at) "
        "SELECT id, name, hash, rooms, event_types, admin, created_at, revoked_at, used_at FROM old_api_keys"
    )
    for table in ("old_accounts", "old_lanes", "old_api_keys", "renamed"):
        op.drop_table(table)


def _keep() -> None:
    """Keep the rows of the tables that are created again."""
    op.execute("CREATE TEMPORARY TABLE old_accounts AS SELECT * FROM accounts")
    op.execute("CREATE TEMPORARY TABLE old_lanes AS SELECT * FROM lanes")
    op.execute("CREATE TEMPORARY TABLE old_api_keys AS SELECT * FROM api_keys")
    for table in ("accounts", "lanes", "api_keys"):
        op.drop_table(table)


def _create() -> None:
    op.create_table(
        "accounts",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("token_hash", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("device_id", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.Column("refused_at", sa.BigInteger),
    )
    op.create_index("tokens_account", "tokens", ["account"])
    op.create_table(
        "resolved",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "lanes",
        sa.Column("lane", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_until", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("dirty", sa.Integer, nullable=False, server_default="0"),
        sa.Column("uncertain_since", sa.BigInteger),
        sa.Column("sent_with", sa.Text, nullable=False),
    )
    op.create_index("lanes_waiting", "lanes", ["lease_until"], sqlite_where=_WAITING, postgresql_where=_WAITING)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False, unique=True),
        sa.Column("rooms", sa.Text, nullable=False),
        sa.Column("event_types", sa.Text, nullable=False),
        sa.Column("admin", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("used_at", sa.BigInteger),
        sa.Column("users", sa.Text, nullable=False, server_default="[]"),
    )


def _users() -> None:
    """The accounts of the users, their tokens, and what each old account is called now."""
    connection = op.get_bind()
    op.execute("CREATE TEMPORARY TABLE renamed (old TEXT PRIMARY KEY, new TEXT NOT NULL)")
    found = connection.execute(sa.text("SELECT account, user_id FROM old_accounts")).all()
    rows = [{"old": old, "new": account_of(user_id), "user_id": user_id} for old, user_id in found]
    if rows:
        connection.execute(sa.text("INSERT INTO renamed VALUES (:old, :new)"), rows)
        users = list({row["new"]: row for row in rows}.values())
        connection.execute(sa.text("INSERT INTO accounts VALUES (:new, :user_id)"), users)
    op.execute(
        "INSERT INTO tokens (token_hash, account, device_id, token, seen_at) "
        "SELECT token_hash, new, device_id, token, seen_at FROM old_accounts JOIN renamed ON old = account "
        "WHERE token_hash IS NOT NULL"
    )


def account_of(user_id: str) -> str:
    """As in flowbridge.store.accounts when this was written."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:24]


def _rename() -> None:
    """Move every event to its user's account and lane. Without the index: it is faster to create it again."""
    op.drop_index("outbox_queued", "outbox")
    op.execute(
        """
        UPDATE outbox SET
            account = (SELECT new FROM renamed WHERE old = outbox.account),
            lane = (SELECT new FROM renamed WHERE old = outbox.account) || '|' || room_id
        WHERE account IN (SELECT old FROM renamed)
        """
    )
    op.create_index("outbox_queued", "outbox", ["lane", "id"], sqlite_where=_QUEUED, postgresql_where=_QUEUED)


def _lanes() -> None:
    """Make one lane for each user and room with queued events, which waits for the end of all leases that it replaces.

    The token that was used last is unknown: in doubt, the room is searched; for each event of a lane that was several,
    since more than the first may have been sent. A lane that had an owner is in doubt since the beginning of its lease,
    as when its owner died. FLOWBRIDGE_LEASE_SECONDS allows 600 s at most. Until the lease ends the lane keeps an owner,
    under no other replica's name: a lane without one only rests, and is woken for a caller that waits.
    """
    op.execute(
        """
        INSERT INTO lanes (lane, account, owner, fence, lease_until, dirty, uncertain_since, sent_with)
        SELECT lane, account, max(holder), max(fence) + 1, max(lease_until), 1, min(doubt),
            CASE WHEN count(*) > 1 THEN 'merged' ELSE '' END
        FROM (
            SELECT coalesce(new || substr(lane, length(old) + 1), lane) AS lane, coalesce(new, account) AS account,
                CASE WHEN owner IS NOT NULL THEN 'a replica of the older version' END AS holder, fence, lease_until,
                coalesce(uncertain_since, CASE WHEN owner IS NOT NULL THEN lease_until - 600000 END) AS doubt
            FROM old_lanes LEFT JOIN renamed ON old = account
        ) AS lanes_now
        GROUP BY lane, account
        """
    )
    op.execute(
        "DELETE FROM lanes "
        "WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.lane = lanes.lane AND outbox.state = 'queued')"
    )
    if op.get_bind().dialect.name == "sqlite":  # the owners of leases are gone
        op.execute("UPDATE lanes SET owner = NULL, lease_until = 0")
