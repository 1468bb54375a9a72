"""Events and lanes for the tests of the store, and short ways to them."""

import itertools
import time
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from flowbridge.store import Fence, clock, leases, outbox
from flowbridge.store.leases import Claim
from flowbridge.store.tables import lanes
from flowbridge.store.tables import outbox as events

LANE = "account|!room:example.org"
OTHER = "account|!other:example.org"
LEASE_MS = 30_000

only_sqlite = pytest.mark.parametrize("kept_url", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize("kept_url", ["postgresql"], indirect=True)

_numbers = itertools.count(1)


def event(delivery: str = "", lane: str = LANE, **values: Any) -> dict[str, Any]:
    """A row as it is inserted."""
    number = next(_numbers)
    account, _, room_id = lane.partition("|")
    return {
        "delivery": delivery or f"delivery-{number}",
        "lane": lane,
        "account": account,
        "room_id": room_id,
        "event_type": "m.room.message",
        "state_key": None,
        "content": "{}",
        "request": None,
        "txn_id": f"txn-{number}",
        "idem": None,
        "fingerprint": None,
        "state": "queued",
        "attempts": 0,
        "history": "[]",
        "event_id": None,
        "error": None,
        "api_key": None,
        "accepted_at": int(time.time() * 1000),
        "settled_at": None,
        "caller_key": None,
        "binding": None,
        **values,
    }


def put(connection: Connection, *deliveries: str, lane: str = LANE, **values: Any) -> None:
    """Accept events, as a process does that does not hold the lane."""
    assert outbox.insert_rows(connection, [event(name, lane, **values) for name in deliveries]) == set()
    leases.mark_dirty(connection, [(lane, lane.partition("|")[0])])


def claim(connection: Connection, owner: str = "me", limit: int = 100, **options: Any) -> list[Claim]:
    return leases.claim(connection, owner, limit, LEASE_MS, **options)


def claim_one(connection: Connection, owner: str = "me") -> Claim:
    (found,) = claim(connection, owner)
    return found


def settlement(delivery: str, fence: Fence, state: str = "sent", **values: Any) -> dict[str, Any]:
    return {
        "b_delivery": delivery,
        "b_lane": fence.lane,
        "b_owner": fence.owner,
        "b_fence": fence.number,
        "b_state": state,
        "b_attempts": 1,
        "b_history": "[]",
        "b_event_id": f"${delivery}",
        "b_error": None,
        "b_settled_at": int(time.time() * 1000),
        **values,
    }


def settle(connection: Connection, fence: Fence, *deliveries: str, state: str = "sent", **values: Any) -> None:
    outbox.settle(connection, [settlement(name, fence, state, **values) for name in deliveries])


def states(connection: Connection) -> dict[str, str]:
    """The state of each event, in the order of acceptance."""
    found = connection.execute(select(events.c.delivery, events.c.state).order_by(events.c.id))
    return {row.delivery: row.state for row in found}


def lane(connection: Connection, name: str = LANE) -> Any:
    """A lane's row; None when there is none."""
    return connection.execute(select(lanes).where(lanes.c.lane == name)).first()


def let_leases_run_out(connection: Connection, owner: str = "me", *, ago_ms: int = 1) -> int:
    """As if the time had passed since `owner` was last heard of. Returns when its leases ended."""
    now = connection.scalar(select(clock.lease_clock(connection)))
    ended = int(now or 0) - ago_ms
    connection.execute(update(lanes).where(lanes.c.owner == owner).values(lease_until=ended))
    return ended
