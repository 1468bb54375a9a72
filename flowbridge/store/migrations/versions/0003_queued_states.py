"""An index of queued state events: a replay checks whether a newer one is queued."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_QUEUED_STATE = sa.text("state = 'queued' AND state_key IS NOT NULL")


def upgrade() -> None:
    op.create_index(
        "outbox_queued_states",
        "outbox",
        ["lane", "event_type", "state_key", "id"],
        sqlite_where=_QUEUED_STATE,
        postgresql_where=_QUEUED_STATE,
    )
