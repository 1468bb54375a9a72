"""Parts that the statements of several modules share."""

from sqlalchemy import Connection, FromClause, ScalarSelect, Table, exists, literal_column, select
from sqlalchemy.sql import ColumnElement

from flowbridge.store import driver
from flowbridge.store.driver import Insert
from flowbridge.store.tables import lanes, outbox


def insert(connection: Connection, table: Table) -> Insert:
    """As `driver.insert`."""
    return driver.insert(connection.dialect.name, table)


def is_state(state: str, events: FromClause = outbox) -> ColumnElement[bool]:
    """The state is part of the statement's text: a plan for a parameter could not use the index of one state."""
    assert state in ("queued", "sent", "dead")
    return events.c.state == literal_column(f"'{state}'")


QUEUED = is_state("queued")
SENT = is_state("sent")
DEAD = is_state("dead")

HAS_QUEUED = exists(select(1).where(outbox.c.lane == lanes.c.lane, QUEUED))  # of a row of `lanes`


def head_accepted_at(lane: ColumnElement[str]) -> ScalarSelect[int]:
    """When the first queued event of a lane was accepted (ms); NULL for a lane without one."""
    head = outbox.alias()
    first = select(head.c.accepted_at).where(head.c.lane == lane, is_state("queued", head))
    return first.order_by(head.c.id).limit(1).scalar_subquery()
