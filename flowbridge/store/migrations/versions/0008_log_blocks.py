"""What is in a piece of the delivery log; the bridge fills it beside its work."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "log_blocks",
        sa.Column("block", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("filter", sa.LargeBinary, nullable=False),
    )
