"""The ids of sent events whose rows are deleted: an event in doubt is not one of these, though of equal content."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "gone",
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("lane", sa.Text, nullable=False),
        sa.Column("settled_at", sa.BigInteger, nullable=False),
    )
    op.create_index("gone_settled", "gone", ["settled_at"])
