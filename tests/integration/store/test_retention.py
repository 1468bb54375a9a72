"""What is deleted after its time, and the ids that are kept of it."""

import time
from typing import Any

from sqlalchemy import Engine, select

from flowbridge.store import holdings, outbox, retention
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import (
    LANE,
    OTHER,
    claim,
    event,
    put,
    settle,
    states,
)

LONG_AGO = 1_000_000_000_000
NEVER = 0
ALWAYS = 2**62


def test_other_events_of_the_lane_are_known_by_their_ids(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        put(connection, "three", lane=OTHER)
        for one in claim(connection):
            settle(connection, one.fence, *[row.delivery for row in one.rows], b_settled_at=500)
        ids = ["$one", "$two", "$three", "$unknown"]
        assert retention.sent_before(connection, LANE, 500, ids) == {"$one", "$two"}
        assert retention.sent_before(connection, LANE, 501, ids) == set()


def test_purge_forgets_each_state_by_its_age(engine: Engine) -> None:
    with engine.begin() as connection:
        for state in ("sent", "dead"):
            for at in (10, 20, 30):
                outbox.insert_rows(connection, [event(f"{state}-{at}", state=state, settled_at=at)])
        put(connection, "queued", accepted_at=1)
        assert retention.purge(connection, sent=30, dead=20) == 3
        assert set(states(connection)) == {"sent-30", "dead-20", "dead-30", "queued"}
        assert retention.purge(connection, sent=ALWAYS, dead=NEVER) == 1
        assert retention.purge(connection, sent=ALWAYS, dead=ALWAYS) == 2
        assert set(states(connection)) == {"queued"}


def test_what_a_lane_has_sent_since_its_first_queued_event_is_known_when_its_rows_are_gone(engine: Engine) -> None:
    now = int(time.time() * 1000)
    with engine.begin() as connection:
        for name, lane_ in (("before", LANE), ("since", LANE), ("other", OTHER), ("late", OTHER)):
            at = LONG_AGO + (name == "since") if name != "late" else now
            row = event(name, lane_, state="sent", settled_at=at, event_id=f"${name}")
            outbox.insert_rows(connection, [row, event(state="dead", settled_at=at)])
        put(connection, "queued", accepted_at=LONG_AGO + 1 + retention.NEEDED_MS)
        put(connection, "newer", accepted_at=now)
        ids = ["$before", "$since", "$other", "$late"]
        assert retention.purge(connection, ALWAYS, ALWAYS) == 8
        assert set(states(connection)) == {"queued", "newer"}
        assert retention.sent_before(connection, LANE, 0, ids) == {"$since"}
        assert retention.sent_before(connection, LANE, LONG_AGO + 2, ids) == set()
        assert retention.sent_before(connection, OTHER, 0, ids) == {"$late"}
        assert retention.forget_ids(connection) == 0
        settle(connection, next(one.fence for one in claim(connection)), "queued")
        assert retention.forget_ids(connection) == 1
        assert retention.sent_before(connection, LANE, 0, ids) == set()


def test_purge_goes_piece_by_piece(engine: Engine) -> None:
    rows = [event(state="sent", settled_at=at) for at in range(retention.PURGED + 10)]
    with engine.begin() as connection:
        outbox.insert_rows(connection, rows)
        assert retention.purge(connection, ALWAYS, ALWAYS) == retention.PURGED
        assert retention.purge(connection, ALWAYS, ALWAYS) == 10
        assert retention.purge(connection, ALWAYS, ALWAYS) == 0


def test_what_goes_before_its_time_is_sent_and_the_oldest(engine: Engine) -> None:
    rows = [event(f"sent-{at}", state="sent", settled_at=at) for at in range(retention.PURGED + 1, 0, -1)]
    with engine.begin() as connection:
        outbox.insert_rows(connection, [*rows, event("dead", state="dead", settled_at=0)])
        put(connection, "queued")
        assert retention.purge_oldest(connection) == retention.PURGED
        assert set(states(connection)) == {f"sent-{retention.PURGED + 1}", "dead", "queued"}


def test_contents_of_what_was_sent_are_blanked_piece_by_piece(engine: Engine) -> None:
    kept: dict[str, Any] = {"state": "sent", "request": "as it came", "content": '{"body": "x"}'}
    rows = [event(f"sent-{at}", settled_at=at, **kept) for at in range(retention.PURGED + 10)]
    new = event("new", settled_at=10_000, **kept)
    dead = event("dead", **{**kept, "state": "dead", "settled_at": 1})
    with engine.begin() as connection:
        outbox.insert_rows(connection, [*rows, new, dead])
        number, after = retention.blank(connection, before=5_000)
        assert (number, after) == (retention.PURGED, retention.PURGED - 1)
        assert retention.blank(connection, before=5_000, after=after) == (10, retention.PURGED + 9)
        assert retention.blank(connection, before=5_000, after=after) == (0, 5_000)
        found = connection.execute(select(events.c.delivery, events.c.content, events.c.request))
        left = {row.delivery for row in found if row.content != retention.BLANK and row.request is not None}
        assert left == {"new", "dead"}


def test_bound_of_rows_is_the_time_of_the_newest_beyond_it(engine: Engine) -> None:
    with engine.begin() as connection:
        assert retention.nth_newest(connection, 0) == 0
        outbox.insert_rows(connection, [event(state="sent", settled_at=at) for at in (10, 20, 30)])
        put(connection, "queued")
        assert [retention.nth_newest(connection, number) for number in range(4)] == [30, 20, 10, 0]
        assert retention.oldest_sent(connection) == 10
        assert retention.purge_oldest(connection, before=21) == 2


def test_oldest_are_dropped_with_their_weight(engine: Engine) -> None:
    rows = [event(f"sent-{at}", state="sent", settled_at=at, content="x" * 1_000) for at in (3, 1, 2)]
    with engine.begin() as connection:
        outbox.insert_rows(connection, [*rows, event("dead", state="dead", settled_at=1)])
        number, freed = holdings.drop_oldest(connection, before=3, most=1_000)
        assert number == 1
        assert 1_600 <= freed < 1_700
        assert set(states(connection)) == {"sent-3", "sent-2", "dead"}
        assert holdings.drop_oldest(connection, before=3, most=10_000) == (1, freed)
        assert holdings.drop_oldest(connection, before=3, most=10_000) == (0, 0)
