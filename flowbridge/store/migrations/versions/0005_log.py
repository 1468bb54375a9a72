"""The delivery log: callers' own keys, an index of what it is filtered by, and calls that were refused."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("outbox", sa.Column("caller_key", sa.Text))
    op.create_index("outbox_log", "outbox", ["id", "room_id", "event_type", "account", "api_key", "caller_key"])
    op.create_table(
        "refused",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("delivery", sa.Text, nullable=False, unique=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text),
        sa.Column("api_key", sa.Text),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("room_id", sa.Text, nullable=False),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("refused_at", sa.BigInteger, nullable=False),
        sa.Column("last_at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("refused_callers", "refused", ["caller", "id"])
