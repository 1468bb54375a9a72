"""flowbridge.store.abandoned, on each engine: what is given up, and what its lane is like then."""

import json
import time

from sqlalchemy import Connection, Engine, select, update

from flowbridge.store import abandoned, leases, outbox
from flowbridge.store.tables import lanes
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import LANE, LEASE_MS, OTHER, claim_one, event, put, settlement

NOW = int(time.time() * 1000)
WEEK_AGO = NOW - 7 * 86_400_000
OLD = WEEK_AGO - 60_000


def give_up(connection: Connection, *names: str, **how: object) -> abandoned.Errors:
    return abandoned.give_up(connection, names or [LANE], WEEK_AGO, "too late", reasons={"account": "no token"}, **how)  # type: ignore[arg-type]


def states(engine: Engine) -> dict[str, str]:
    with engine.connect().execution_options(reads=True) as connection:
        return {row.delivery: row.state for row in connection.execute(select(events.c.delivery, events.c.state))}


def lane(engine: Engine, name: str = LANE) -> tuple[object, ...]:
    """Owner, fence, dirty, uncertain_since."""
    columns = (lanes.c.owner, lanes.c.fence, lanes.c.dirty, lanes.c.uncertain_since)
    with engine.connect().execution_options(reads=True) as connection:
        return tuple(connection.execute(select(*columns).where(lanes.c.lane == name)).one())


def test_old_events_die_with_the_reason_and_young_ones_stay(engine: Engine) -> None:
    history = json.dumps([{"at": 1, "error": "first"}, {"at": 2, "error": "You are not in the room"}])
    with engine.begin() as connection:
        put(connection, "tried", accepted_at=OLD, history=history)
        put(connection, "old", accepted_at=OLD)
        put(connection, "young", accepted_at=NOW)
        errors = give_up(connection)
    assert {name: error["error"] for name, error in errors.items()} == {
        "tried": "too late: You are not in the room",
        "old": "too late: no token",
    }
    assert states(engine) == {"tried": "dead", "old": "dead", "young": "queued"}
    assert lane(engine) == (None, 0, 1, None)
    with engine.begin() as connection:
        assert give_up(connection) == {}
        assert [row.delivery for row in claim_one(connection).rows] == ["young"]
        assert outbox.outcomes(connection, ["old"])["old"][2] == errors["old"]


def test_lane_of_which_nothing_is_left_is_idle_and_not_in_doubt(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "old", accepted_at=OLD)
        connection.execute(update(lanes).values(uncertain_since=OLD))
        assert give_up(connection)["old"]["error"] == "too late: no token; it may be in the room all the same"
    assert lane(engine) == (None, 0, 0, None)


def test_lane_that_is_held_is_left_alone_and_its_late_outcome_counts(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "old", accepted_at=OLD)
        fence = claim_one(connection).fence
        assert give_up(connection) == {}
        outbox.settle(connection, [settlement("old", fence)])
    assert states(engine) == {"old": "sent"}


def test_holder_gives_its_lane_back_with_the_same_commit(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "old", accepted_at=OLD)
        fence = claim_one(connection).fence
        assert list(give_up(connection, mine=[fence])) == ["old"]
        outbox.settle(connection, [settlement("old", fence)])
    assert states(engine) == {"old": "dead"}
    assert lane(engine) == (None, 1, 0, None)


def test_lane_whose_lease_has_run_out_recently_is_left_to_its_next_holder(engine: Engine) -> None:
    """The last holder may still be sending; the next one looks. After an hour nothing of it can be under way."""
    with engine.begin() as connection:
        put(connection, "old", accepted_at=OLD)
        fence = claim_one(connection).fence
        connection.execute(update(lanes).values(lease_until=NOW - LEASE_MS))
        assert give_up(connection) == {}
        connection.execute(update(lanes).values(lease_until=NOW - abandoned.FORSAKEN_MS - LEASE_MS))
        assert list(give_up(connection)) == ["old"]
        outbox.settle(connection, [settlement("old", fence)])
    assert states(engine) == {"old": "dead"}
    assert lane(engine) == (None, 2, 0, None)


def test_event_without_a_lane_is_given_up_too(engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.insert_rows(connection, [event("old", accepted_at=OLD)])
        assert list(give_up(connection)) == ["old"]


def test_overdue_lanes_are_found(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(5):
            put(connection, f"old-{number}", lane=f"account|!{number}", accepted_at=OLD)
        put(connection, "behind an old one", lane="account|!0", accepted_at=NOW)
        put(connection, "young", lane=OTHER, accepted_at=NOW)
        put(connection, "settled", lane="account|!9", accepted_at=OLD, state="sent", settled_at=NOW)
        assert abandoned.overdue(connection, WEEK_AGO) == ([f"account|!{number}" for number in range(5)], None)
        assert abandoned.overdue(connection, OLD) == ([], None)


def test_events_of_a_lane_that_is_asked_for_stay_until_it_is_given_back(engine: Engine) -> None:
    chosen = [events.c.room_id == "!room:example.org"]
    with engine.begin() as connection:
        put(connection, "a", "b")
        put(connection, "other", lane=OTHER)
        fence = claim_one_of(connection, LANE)
        assert abandoned.owners(connection, chosen) == {LANE: "me"}
        assert abandoned.remove(connection, [LANE], chosen) == 0
        abandoned.ask_for(connection, [LANE, OTHER])
        assert leases.renew(connection, "me", LEASE_MS)[LANE] == (fence.number, leases.ASKED)
        leases.release(connection, [fence], 1_000)
        assert abandoned.owners(connection, chosen) == {LANE: None}
        assert abandoned.remove(connection, [LANE, OTHER], chosen) == 2
        assert abandoned.number(connection, chosen) == 0
    assert states(engine) == {"other": "queued"}
    assert lane(engine) == (None, 1, 0, None)


def claim_one_of(connection: Connection, name: str) -> leases.Fence:
    return next(one.fence for one in leases.claim(connection, "me", 10, LEASE_MS) if one.fence.lane == name)
