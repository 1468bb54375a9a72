"""End-to-end encryption: devices, their sessions and keys, and what was encrypted."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _text(name: str, *, null: bool = False, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=True) if key else sa.Column(name, sa.Text, nullable=null)


def _number(name: str, *, default: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=default)


def upgrade() -> None:
    op.create_table(
        "crypto_devices",
        _text("account", key=True),
        _text("user_id"),
        _text("device_id"),
        _text("pickle"),
        _text("sealed"),
        _text("since", null=True),
        _text("owner", null=True),
        _number("fence", default="0"),
        _number("lease_until", default="0"),
        _number("asked_until", default="0"),
        _number("created_at"),
    )
    op.create_table(
        "crypto_sessions",
        _text("account", key=True),
        _text("peer", key=True),
        _text("session_id", key=True),
        _text("pickle"),
        _number("used_at"),
    )
    op.create_table(
        "crypto_inbox",
        sa.Column("id", _Id, primary_key=True, autoincrement=True),
        _text("account"),
        _text("sealed"),
        sqlite_autoincrement=True,
    )
    op.create_index("crypto_inbox_account", "crypto_inbox", ["account", "id"])
    op.create_table(
        "crypto_outbound",
        _text("account", key=True),
        _text("room_id", key=True),
        _text("session_id"),
        _text("pickle"),
        _text("shared"),
        _number("messages"),
        _number("created_at"),
    )
    op.create_table(
        "crypto_room_keys",
        _text("account", key=True),
        _text("room_id", key=True),
        _text("session_id", key=True),
        _text("peer", key=True),
        _text("pickle"),
        _text("sealed"),
        _number("first_index"),
        _number("received_at"),
    )
    op.create_table(
        "crypto_users",
        _text("account", key=True),
        _text("user_id", key=True),
        _text("sealed", null=True),
        sa.Column("outdated", sa.Integer, nullable=False),
    )
    outdated = sa.text("outdated = 1")
    op.create_index(
        "crypto_users_outdated", "crypto_users", ["account"], sqlite_where=outdated, postgresql_where=outdated
    )
    op.create_table(
        "crypto_indexes",
        _text("account", key=True),
        _text("session_id", key=True),
        sa.Column("message_index", sa.BigInteger, primary_key=True),
        _text("mark"),
    )
    op.create_table(
        "crypto_logins",
        _text("account", key=True),
        _text("device_id", key=True),
        _number("logged_in_at"),
    )
    op.create_table("crypto_rooms", _text("room_id", key=True), _text("settings"))
    op.create_table("ciphertexts", _text("delivery", key=True), _text("account"), _text("content"))
