"""Hooks, their secrets and last requests, and what was last said of a story."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("message_keys", sa.Column("story", sa.Text))
    op.create_table(
        "hooks",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "hook_state",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("used_at", sa.BigInteger),
        sa.Column("failed_at", sa.BigInteger),
        sa.Column("failure", sa.Text),
    )
    op.create_table(
        "hook_secrets",
        sa.Column("id", _Id, primary_key=True, autoincrement=True),
        sa.Column("hook", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False, unique=True),
        sa.Column("secret", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_index("hook_secrets_hook", "hook_secrets", ["hook", "id"])
    op.create_table(
        "hook_requests",
        sa.Column("id", _Id, primary_key=True, autoincrement=True),
        sa.Column("hook", sa.Text, nullable=False),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("hook_requests_hook", "hook_requests", ["hook", "id"])
