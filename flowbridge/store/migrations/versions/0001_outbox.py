"""The outbox, its lanes and accounts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_QUEUED = sa.text("state = 'queued'")
_SETTLED = sa.text("settled_at IS NOT NULL")
_DEAD = sa.text("state = 'dead'")
_WAITING = sa.text("dirty = 1 OR owner IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("delivery", sa.Text, nullable=False, unique=True),
        sa.Column("lane", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("room_id", sa.Text, nullable=False),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("state_key", sa.Text),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("request", sa.Text),
        sa.Column("txn_id", sa.Text, nullable=False),
        sa.Column("idem", sa.Text, unique=True),
        sa.Column("fingerprint", sa.Text),
        sa.Column("state", sa.Text, nullable=False, server_default="queued"),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("history", sa.Text, nullable=False, server_default="[]"),
        sa.Column("event_id", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("api_key", sa.Text),
        sa.Column("accepted_at", sa.BigInteger, nullable=False),
        sa.Column("settled_at", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_index("outbox_queued", "outbox", ["lane", "id"], sqlite_where=_QUEUED, postgresql_where=_QUEUED)
    op.create_index("outbox_settled", "outbox", ["settled_at"], sqlite_where=_SETTLED, postgresql_where=_SETTLED)
    op.create_index("outbox_dead", "outbox", ["id"], sqlite_where=_DEAD, postgresql_where=_DEAD)
    op.create_table(
        "lanes",
        sa.Column("lane", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_until", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("dirty", sa.Integer, nullable=False, server_default="0"),
        sa.Column("uncertain_since", sa.BigInteger),
    )
    op.create_index("lanes_waiting", "lanes", ["lease_until"], sqlite_where=_WAITING, postgresql_where=_WAITING)
    op.create_table(
        "accounts",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("device_id", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("token_hash", sa.Text, unique=True),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
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
    )
