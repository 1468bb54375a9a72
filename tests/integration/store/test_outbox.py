"""Events on their way: their order, their rows, and their outcomes."""

from typing import Any

import pytest
from sqlalchemy import Connection, Engine, select

from flowbridge.store import Fence, delivery_log, leases, outbox
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import (
    LANE,
    LEASE_MS,
    OTHER,
    claim,
    claim_one,
    event,
    put,
    settle,
    settlement,
    states,
)

LONG_AGO = 1_000_000_000_000


def fetched(connection: Connection, name: str = LANE, limit: int = 100) -> list[str]:
    return [row.delivery for row in outbox.fetch(connection, name, limit)]


def test_events_are_read_in_the_order_of_acceptance_from_the_head(engine: Engine) -> None:
    names = [f"event-{number}" for number in range(20)]
    for name in names:  # by time they would be the other way round
        with engine.begin() as connection:
            put(connection, name, accepted_at=LONG_AGO - int(name.removeprefix("event-")))
            put(connection, f"other-{name}", lane=OTHER)
    with engine.begin() as connection:
        assert fetched(connection) == names
        assert fetched(connection, limit=3) == names[:3]
        settle(connection, next(one.fence for one in claim(connection) if one.fence.lane == LANE), "event-0")
        assert fetched(connection) == names[1:]
        assert len(fetched(connection, OTHER)) == 20


def test_several_lanes_are_read_at_once_each_in_its_order(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(4):
            put(connection, f"one-{number}")
            put(connection, f"other-{number}", lane=OTHER)
        settle(connection, next(one.fence for one in claim(connection) if one.fence.lane == LANE), "one-0")
        found = outbox.fetch_each(connection, {LANE: 2, OTHER: 10, "account|!empty": 10})
        assert found.get("account|!empty", []) == []
        assert [row.delivery for row in found[LANE]] == ["one-1", "one-2"]
        assert [row.delivery for row in found[OTHER]] == [f"other-{number}" for number in range(4)]
        assert found[LANE] == outbox.fetch(connection, LANE, 2)


def test_row_comes_back_as_it_was_accepted(engine: Engine) -> None:
    values: dict[str, Any] = {
        "state_key": "",
        "content": '{"body":"\u2713\\u0000"}',
        "api_key": "key",
        "attempts": 3,
        "history": "[1]",
    }
    row = event("one", **values)
    with engine.begin() as connection:
        outbox.insert_rows(connection, [row])
        (found,) = outbox.fetch(connection, LANE)
        assert outbox.row_of(row) == found
        whole = delivery_log.get(connection, "one")
    assert found.content.decode() == values["content"]
    assert (found.state_key, found.api_key, found.attempts, found.history) == ("", "key", 3, "[1]")
    assert whole is not None
    assert {name: whole[name] for name in row} == row


def test_rows_that_are_there_already_are_left_as_they_are(engine: Engine) -> None:
    rows = [event("one"), event("two")]
    with engine.begin() as connection:
        outbox.insert_rows(connection, rows)
        put(connection, "three")
        settle(connection, claim_one(connection).fence, "one")
    with engine.begin() as connection:
        assert outbox.insert_rows(connection, [*rows, event("four")]) == set()
        assert states(connection) == {"one": "sent", "two": "queued", "three": "queued", "four": "queued"}


def test_key_that_is_there_already_makes_no_second_row(engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.insert_rows(connection, [event("one", idem="key")])
    with engine.begin() as connection:
        outbox.insert_rows(connection, [event("again", idem="key"), event("other", idem="other")])
        assert list(states(connection)) == ["one", "other"]
        found = outbox.taken(connection, ["key", "other", "unknown"])
    assert {key: taken.delivery for key, taken in found.items()} == {"key": "one", "other": "other"}


SURROGATE = pytest.param({"content": '"\ud800"'}, id="surrogate")
NUL = pytest.param({"request": "a\0b"}, id="nul")
NO_CONTENT = pytest.param({"content": None}, id="null")


@pytest.mark.parametrize("poison", [NUL, SURROGATE, NO_CONTENT])
def test_row_that_the_engine_refuses_is_refused_alone(engine: Engine, poison: dict[str, Any]) -> None:
    rows = [event("one"), event("poison", **poison), event("two")]
    with engine.begin() as connection:
        refused = outbox.insert_rows(connection, rows)
    with engine.begin() as connection:
        found = states(connection)
    if (
        poison == {"request": "a\0b"} and engine.dialect.name == "sqlite"
    ):  # SQLite takes it, and must give it back whole
        assert refused == set()
        with engine.begin() as connection:
            assert connection.scalar(select(events.c.request).where(events.c.delivery == "poison")) == "a\0b"
        return
    assert refused == {"poison"}
    assert list(found) == ["one", "two"]


def test_zombie_among_others_in_one_settlement_does_not_stop_them(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        fences = {one.fence.lane: one.fence for one in claim(connection)}
        stale = Fence(LANE, "me", fences[LANE].number - 1)
        outbox.settle(connection, [settlement("one", stale), settlement("two", fences[OTHER])])
        assert states(connection) == {"one": "queued", "two": "sent"}


def test_outcome_is_written_whole_and_only_once(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        settle(connection, fence, "one", state="dead", b_event_id=None, b_error='{"errcode":"M_X"}', b_settled_at=5)
        settle(connection, fence, "one", b_settled_at=6)
        row = delivery_log.get(connection, "one")
        assert row is not None
        assert {name: row[name] for name in ("state", "event_id", "error", "settled_at", "attempts")} == {
            "state": "dead",
            "event_id": None,
            "error": '{"errcode":"M_X"}',
            "settled_at": 5,
            "attempts": 1,
        }
        assert outbox.outcomes(connection, ["one", "unknown"]) == {"one": ("dead", None, {"errcode": "M_X"})}


def test_attempts_are_noted_of_what_is_queued(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        fence = claim_one(connection).fence
        settle(connection, fence, "two")
        for name in ("one", "two"):
            outbox.note(connection, name, 4, "[4]")
        (row,) = outbox.fetch(connection, LANE)
        assert (row.attempts, row.history) == (4, "[4]")
        settled = delivery_log.get(connection, "two")
        assert settled is not None
        assert settled["attempts"] == 1


def test_what_is_queued_is_counted_per_lane(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", accepted_at=111)
        put(connection, "two", accepted_at=222)
        put(connection, "three", lane=OTHER)
        fence = next(one.fence for one in claim(connection) if one.fence.lane == LANE)
        settle(connection, fence, "one", state="dead")
        found = outbox.queued(connection)
        assert {name: number for name, (number, _) in found.items()} == {LANE: 1, OTHER: 1}
        assert outbox.accepted_at(connection, found[LANE][1]) == 222
        assert outbox.dead(connection) == 1


def test_waiting_event_is_found_with_who_holds_its_lane(engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.insert_rows(connection, [event("alone", lane=OTHER)])
        put(connection, "one", "two")
        assert claim_one(connection).fence.lane == LANE
        settle(connection, Fence(LANE, "me", 1), "two")
        found, owner = outbox.waiting(connection, "one") or (None, None)
        assert found is not None
        assert (found.delivery, owner) == ("one", "me")
        alone = outbox.waiting(connection, "alone")
        assert alone is not None
        assert alone[1] is None
        assert outbox.waiting(connection, "two") is None
        assert outbox.waiting(connection, "unknown") is None


def test_only_what_is_queued_is_removed(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        settle(connection, claim_one(connection).fence, "one")
        assert outbox.remove_queued(connection, ["one"]) == 0
        assert outbox.remove_queued(connection, ["two"]) == 1
        assert outbox.remove_queued(connection, ["two"]) == 0
        assert list(states(connection)) == ["one"]


@pytest.mark.parametrize("state", ["sent", "dead"])
def test_replayed_event_is_the_last_of_its_lane_and_claimable(engine: Engine, state: str) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        fence = claim_one(connection).fence
        settle(connection, fence, "one", state=state, b_attempts=7)
        settle(connection, fence, "two")
        put(connection, "three")
        leases.release(connection, [fence])
        again = delivery_log.replay(connection, "one", "txn-anew", "somebody")
        assert again is not None
        assert (again["lane"], again["state"]) == (LANE, "queued")
        (found,) = claim(connection, "other")
        assert [row.delivery for row in found.rows] == ["three", "one"]
        assert found.rows[1].txn_id == "txn-anew"
        assert found.rows[1].attempts == 0
        assert delivery_log.replay(connection, "one", "txn", "somebody") is None  # it is queued
        assert delivery_log.replay(connection, "unknown", "txn", "somebody") is None


def test_event_replayed_into_a_lane_that_is_held_is_told_to_its_owner(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        settle(connection, fence, "one")
        delivery_log.replay(connection, "one", "txn-anew", "somebody")
        assert leases.renew(connection, "me", LEASE_MS) == {LANE: (fence.number, True)}
