"""What a message refers to, until its turn comes, and callers' keys for messages."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("outbox", sa.Column("binding", sa.Text))
    op.create_table(
        "message_keys",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("room_id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("delivery", sa.Text, nullable=False),
        sa.Column("event_id", sa.Text),
        sa.Column("used_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("owner", "room_id", "key"),
    )
    op.create_index("message_keys_delivery", "message_keys", ["delivery"])
    op.create_index("message_keys_owner", "message_keys", ["owner", "used_at"])
    op.create_index("message_keys_used", "message_keys", ["used_at"])
