"""Events on their way: order, claims, leases, fences, doubts."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, select, update

from flowbridge.store import Database, Fence, delivery_log, outbox
from flowbridge.store.outbox import Claim
from flowbridge.store.tables import lanes
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import (
    LANE,
    LEASE_MS,
    OTHER,
    claim,
    claim_one,
    event,
    lane,
    let_leases_run_out,
    only_postgresql,
    put,
    settle,
    settlement,
    states,
)
from tests.patience import PATIENCE

LONG_AGO = 1_000_000_000_000
NEVER = 0
ALWAYS = 2**62


def fetched(connection: Connection, name: str = LANE, limit: int = 100) -> list[str]:
    return [row.delivery for row in outbox.fetch(connection, name, limit)]


# append


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
        found = outbox.by_idem(connection, ["key", "other", "unknown"])
    assert {key: row["delivery"] for key, row in found.items()} == {"key": "one", "other": "other"}


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


# claim


@pytest.mark.parametrize("dirty", [0, 1])
@pytest.mark.parametrize("owner", [None, "somebody"])
@pytest.mark.parametrize("expired", [False, True])
def test_claimed_is_what_is_dirty_or_was_held_and_whose_lease_ran_out(
    engine: Engine, dirty: int, owner: str | None, expired: bool
) -> None:
    until = 0 if expired else ALWAYS
    with engine.begin() as connection:
        put(connection, "one")
        connection.execute(update(lanes).values(dirty=dirty, owner=owner, lease_until=until, fence=7))
        found = claim(connection)
        expected = [LANE] if expired and (dirty or owner) else []
        assert [one.fence.lane for one in found] == expected
        assert [one.fence.number for one in found] == [8] * len(expected)


def test_claim_brings_the_lane_with_its_first_events(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two", "three")
        put(connection, "elsewhere", lane=OTHER)
        found = {one.fence.lane: one for one in claim(connection, batch=2)}
        assert [row.delivery for row in found[LANE].rows] == ["one", "two"]
        assert [row.delivery for row in found[OTHER].rows] == ["elsewhere"]
        assert found[LANE].account == "account"
        assert found[LANE].uncertain_since is None
        assert lane(connection).dirty == 0
        assert lane(connection).owner == "me"


def test_claim_takes_no_more_lanes_than_asked_and_none_of_the_accounts_left_out(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(5):
            put(connection, f"one-{number}", lane=f"busy|!{number}")
        put(connection, "two", lane="paused|!room")
        assert len(claim(connection, limit=2, but=["paused"])) == 2
        assert len(claim(connection, but=["paused", "nobody"])) == 3
        assert [one.account for one in claim(connection)] == ["paused"]


def test_lane_that_is_held_is_not_claimed_again(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection)
        put(connection, "two")  # dirty, but held
        assert claim(connection, "other") == []


def test_claims_of_several_processes_never_overlap(url: str) -> None:
    names, rounds = [f"account|!{number}" for number in range(30)], 6
    claims: list[list[Claim]] = []

    def hammer(owner: str, database: Database, together: threading.Barrier) -> None:
        """Each round: all claim at once until there is nothing left, then give back what is held."""
        for _ in range(rounds):
            mine: list[Claim] = []
            together.wait()
            while True:
                with database.engine.begin() as connection:
                    found = claim(connection, owner, limit=4)
                if not found:
                    break
                mine += found
            claims.append(mine)
            together.wait()
            with database.engine.begin() as connection:
                outbox.release(connection, [one.fence for one in sorted(mine, key=lambda one: one.fence.lane)])

    def prepare(connection: Connection) -> None:
        for name in names:
            put(connection, name, lane=name)

    with_databases(url, 3, prepare, hammer)
    taken = Counter((one.fence.lane, one.fence.number) for mine in claims for one in mine)
    assert taken == {(name, number): 1 for name in names for number in range(1, rounds + 1)}
    assert len({one.fence.owner for mine in claims for one in mine}) > 1


def with_databases(
    url: str,
    number: int,
    prepare: Callable[[Connection], None],
    work: Callable[[str, Database, threading.Barrier], None],
) -> None:
    """Run this in so many threads at once, each with a database object, as processes have."""
    databases = [Database(url) for _ in range(number)]
    for one in databases:
        one.open(shared=True, make=True)
    with databases[0].engine.begin() as connection:
        prepare(connection)
    together = threading.Barrier(number, timeout=PATIENCE)
    with ThreadPoolExecutor(number) as threads:
        running = [threads.submit(work, f"owner-{at}", one, together) for at, one in enumerate(databases)]
    for one in databases:
        one.close()
    for done in running:
        done.result()


@only_postgresql  # SQLite lets one write at a time
def test_claim_does_not_wait_for_a_lane_that_another_claims_just_now(url: str) -> None:
    one, other = Database(url), Database(url)
    one.open()
    other.open()
    with one.engine.begin() as connection:
        put(connection, "here")
        put(connection, "there", lane=OTHER)
    with one.engine.begin() as first, other.engine.begin() as second:
        (mine,) = claim(first, "one", limit=1)
        second.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
        (theirs,) = claim(second, "other")
        assert {mine.fence.lane, theirs.fence.lane} == {LANE, OTHER}
    one.close()
    other.close()


@only_postgresql  # SQLite lets one write at a time
def test_replicas_that_write_to_the_same_lanes_do_not_lock_each_other_out(url: str) -> None:
    """Each marks the other's lanes as having something new, doubts and renews its own: one waits in no circle."""
    names = [f"account|!{number:02}" for number in range(40)]

    def prepare(connection: Connection) -> None:
        for name in names:
            put(connection, name, lane=name)

    def hammer(owner: str, database: Database, together: threading.Barrier) -> None:
        with database.engine.begin() as connection:
            mine = claim(connection, owner, limit=len(names) // 2)
        together.wait()
        order = mine if owner == "owner-0" else mine[::-1]
        for turn in range(30):
            with database.engine.begin() as connection:
                outbox.lock(connection, names)
                outbox.mark_dirty(connection, [(name, "account") for name in names])
                for one in order:
                    outbox.doubt(connection, one.fence, turn)
            with database.engine.begin() as connection:
                outbox.renew(connection, owner, LEASE_MS)
        with database.engine.begin() as connection:
            outbox.release_all(connection, owner)

    with_databases(url, 2, prepare, hammer)


# leases


def test_lease_goes_by_the_clock_of_the_database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection)
    in_a_minute = int(time.time() * 1000) + 60_000
    monkeypatch.setattr(outbox, "now_ms", lambda: in_a_minute)
    with engine.begin() as connection:
        found = claim(connection, "other")
    # A replica whose clock is ahead takes nothing; a file has only one clock, and by that the lease has run out.
    assert len(found) == (0 if engine.dialect.name == "postgresql" else 1)


def test_lease_lasts_as_long_as_asked(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        before = int(time.time() * 1000)
        claim_one(connection)
        after = int(time.time() * 1000)
        assert before + LEASE_MS - 5 <= lane(connection).lease_until <= after + LEASE_MS + 5


def test_lane_whose_lease_ran_out_goes_to_the_next_with_its_events(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        old = claim_one(connection)
        settle(connection, old.fence, "one")
        let_leases_run_out(connection)
        new = claim_one(connection, "other")
        assert new.fence == Fence(LANE, "other", old.fence.number + 1)
        assert [row.delivery for row in new.rows] == ["two"]


def test_renewal_prolongs_what_is_held_and_nothing_else(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in ("mine", "lost", "theirs", "free"):
            put(connection, name, lane=f"account|!{name}")
        fences = {one.fence.lane: one.fence for one in claim(connection)}
        soon = int(connection.scalar(select(outbox._clock(connection))) or 0) + 5_000
        for name, owner, until in [
            ("mine", "me", soon),
            ("lost", "me", soon - 10_000),
            ("theirs", "other", soon),
            ("free", None, 0),
        ]:
            where = lanes.c.lane == f"account|!{name}"
            connection.execute(update(lanes).where(where).values(owner=owner, lease_until=until))
        held = outbox.renew(connection, "me", LEASE_MS)
        assert held == {"account|!mine": (fences["account|!mine"].number, False)}
        assert lane(connection, "account|!mine").lease_until > soon + 20_000
        assert lane(connection, "account|!lost").lease_until == soon - 10_000
        assert lane(connection, "account|!theirs").lease_until == soon
        assert lane(connection, "account|!free").lease_until == 0


def test_renewal_tells_once_of_events_that_came(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        number = claim_one(connection).fence.number
        put(connection, "two")
        assert outbox.renew(connection, "me", LEASE_MS) == {LANE: (number, True)}
        assert outbox.renew(connection, "me", LEASE_MS) == {LANE: (number, False)}


@pytest.mark.parametrize("how", ["release", "release_all"])
def test_lane_given_back_with_events_is_claimable_at_once(engine: Engine, how: str) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        fences = {one.fence.lane: one.fence for one in claim(connection)}
        settle(connection, fences[OTHER], "two")
        if how == "release":
            outbox.release(connection, fences.values())
        else:
            outbox.release_all(connection, "me")
        assert lane(connection, OTHER).owner is None
        assert [one.fence.lane for one in claim(connection, "other")] == [LANE]


@pytest.mark.parametrize("how", ["release", "release_all"])
def test_lane_given_back_keeps_that_events_came(engine: Engine, how: str) -> None:
    """They may be in a transaction that is not committed yet: dirty is all that is known of them."""
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        settle(connection, fence, "one")
        outbox.mark_dirty(connection, [(LANE, "account")])
        if how == "release":
            outbox.release(connection, [fence])
        else:
            outbox.release_all(connection, "me")
        assert lane(connection).dirty == 1


def test_lane_given_back_for_a_while_rests(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        outbox.release(connection, [claim_one(connection).fence], 20_000)
        assert claim(connection, "other") == []
        connection.execute(update(lanes).values(lease_until=lanes.c.lease_until - 21_000))
        found = claim_one(connection, "other")
        assert found.uncertain_since is None  # it was not lost


def test_end_of_one_owner_leaves_the_lanes_of_others(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection, "other")
        outbox.release_all(connection, "me")
        assert lane(connection).owner == "other"


# fences


def zombies(current: Fence) -> list[Fence]:
    return [
        Fence(current.lane, "zombie", current.number - 1),
        Fence(current.lane, "zombie", current.number),
        Fence(current.lane, current.owner, current.number - 1),
        Fence(current.lane, current.owner, current.number + 1),
        Fence("account|!nowhere", current.owner, current.number),
    ]


def test_zombie_changes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        claim_one(connection, "zombie")
        let_leases_run_out(connection, "zombie")
        current = claim_one(connection, "me").fence
        outbox.doubt(connection, current, 12)
    for zombie in zombies(current):
        with engine.begin() as connection:
            before = (states(connection), lane(connection))
            settle(connection, zombie, "one", "two")
            outbox.doubt(connection, zombie, 99)
            outbox.doubt(connection, zombie, None)
            outbox.release(connection, [zombie])
            outbox.release(connection, [zombie], 5_000)
            assert (states(connection), lane(connection)) == before
    with engine.begin() as connection:
        settle(connection, current, "one")
        assert states(connection) == {"one": "sent", "two": "queued"}


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


# doubts


def test_lane_whose_owner_was_lost_is_uncertain_since_its_last_sign(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection)
        ended = let_leases_run_out(connection, ago_ms=5_000)
        assert claim_one(connection, "other").uncertain_since == ended - LEASE_MS
        later = let_leases_run_out(connection, "other")
        assert later > ended
        assert claim_one(connection, "third").uncertain_since == ended - LEASE_MS  # the earliest doubt is kept


def test_doubt_stays_with_the_lane_until_it_is_settled(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        outbox.doubt(connection, fence, 1_234)
        outbox.release(connection, [fence])
        again = claim_one(connection, "other")
        assert again.uncertain_since == 1_234
        outbox.doubt(connection, again.fence, None)
        outbox.release(connection, [again.fence])
        assert claim_one(connection, "third").uncertain_since is None


def test_start_on_a_file_of_ones_own_takes_over_all_that_was_held(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        (held,) = claim(connection, limit=1)
        free = OTHER if held.fence.lane == LANE else LANE
        until = lane(connection, held.fence.lane).lease_until
        outbox.recover(connection, LEASE_MS)
        found = {one.fence.lane: one for one in claim(connection, "new")}
        assert found[held.fence.lane].uncertain_since == until - LEASE_MS
        assert found[held.fence.lane].fence.number == held.fence.number + 1
        assert found[free].uncertain_since is None
        settle(connection, held.fence, "one", "two")
        assert set(states(connection).values()) == {"queued"}


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


def test_other_events_of_the_lane_are_known_by_their_ids(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        put(connection, "three", lane=OTHER)
        for one in claim(connection):
            settle(connection, one.fence, *[row.delivery for row in one.rows], b_settled_at=500)
        ids = ["$one", "$two", "$three", "$unknown"]
        assert outbox.sent_before(connection, LANE, 500, ids) == {"$one", "$two"}
        assert outbox.sent_before(connection, LANE, 501, ids) == set()


# what is old, and what is counted


def test_purge_forgets_each_state_by_its_age(engine: Engine) -> None:
    with engine.begin() as connection:
        for state in ("sent", "dead"):
            for at in (10, 20, 30):
                outbox.insert_rows(connection, [event(f"{state}-{at}", state=state, settled_at=at)])
        put(connection, "queued", accepted_at=1)
        assert outbox.purge(connection, sent=30, dead=20) == 3
        assert set(states(connection)) == {"sent-30", "dead-20", "dead-30", "queued"}
        assert outbox.purge(connection, sent=ALWAYS, dead=NEVER) == 1
        assert outbox.purge(connection, sent=ALWAYS, dead=ALWAYS) == 2
        assert set(states(connection)) == {"queued"}


def test_what_a_lane_has_sent_since_its_first_queued_event_is_known_when_its_rows_are_gone(engine: Engine) -> None:
    now = int(time.time() * 1000)
    with engine.begin() as connection:
        for name, lane_ in (("before", LANE), ("since", LANE), ("other", OTHER), ("late", OTHER)):
            at = LONG_AGO + (name == "since") if name != "late" else now
            row = event(name, lane_, state="sent", settled_at=at, event_id=f"${name}")
            outbox.insert_rows(connection, [row, event(state="dead", settled_at=at)])
        put(connection, "queued", accepted_at=LONG_AGO + 1 + outbox.NEEDED_MS)
        put(connection, "newer", accepted_at=now)
        ids = ["$before", "$since", "$other", "$late"]
        assert outbox.purge(connection, ALWAYS, ALWAYS) == 8
        assert set(states(connection)) == {"queued", "newer"}
        assert outbox.sent_before(connection, LANE, 0, ids) == {"$since"}
        assert outbox.sent_before(connection, LANE, LONG_AGO + 2, ids) == set()
        assert outbox.sent_before(connection, OTHER, 0, ids) == {"$late"}
        assert outbox.forget_ids(connection) == 0
        settle(connection, next(one.fence for one in claim(connection)), "queued")
        assert outbox.forget_ids(connection) == 1
        assert outbox.sent_before(connection, LANE, 0, ids) == set()


def test_purge_goes_piece_by_piece(engine: Engine) -> None:
    rows = [event(state="sent", settled_at=at) for at in range(outbox.PURGED + 10)]
    with engine.begin() as connection:
        outbox.insert_rows(connection, rows)
        assert outbox.purge(connection, ALWAYS, ALWAYS) == outbox.PURGED
        assert outbox.purge(connection, ALWAYS, ALWAYS) == 10
        assert outbox.purge(connection, ALWAYS, ALWAYS) == 0


def test_what_goes_before_its_time_is_sent_and_the_oldest(engine: Engine) -> None:
    rows = [event(f"sent-{at}", state="sent", settled_at=at) for at in range(outbox.PURGED + 1, 0, -1)]
    with engine.begin() as connection:
        outbox.insert_rows(connection, [*rows, event("dead", state="dead", settled_at=0)])
        put(connection, "queued")
        assert outbox.purge_oldest(connection) == outbox.PURGED
        assert set(states(connection)) == {f"sent-{outbox.PURGED + 1}", "dead", "queued"}


def test_idle_lanes_are_forgotten_and_no_others(engine: Engine) -> None:
    names = ("idle", "dirty", "held", "queued")
    with engine.begin() as connection:
        for name in names:
            put(connection, name, lane=f"account|!{name}")
        for one in claim(connection):
            if not one.fence.lane.endswith("queued"):
                settle(connection, one.fence, one.rows[0].delivery)
            if not one.fence.lane.endswith("held"):
                outbox.release(connection, [one.fence])
        connection.execute(update(lanes).where(lanes.c.lane == "account|!queued").values(dirty=0))
        outbox.mark_dirty(connection, [("account|!dirty", "account")])
        assert outbox.forget_idle_lanes(connection) == 1
        assert [name for name in names if lane(connection, f"account|!{name}") is None] == ["idle"]
        assert outbox.forget_idle_lanes(connection) == 0


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


def test_only_what_is_in_a_named_state_is_removed(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        settle(connection, claim_one(connection).fence, "one")
        assert not outbox.remove(connection, "one", states=["queued"])
        assert outbox.remove(connection, "two", states=["queued"])
        assert not outbox.remove(connection, "two", states=["queued"])
        assert list(states(connection)) == ["one"]


@pytest.mark.parametrize("state", ["sent", "dead"])
def test_replayed_event_is_the_last_of_its_lane_and_claimable(engine: Engine, state: str) -> None:
    with engine.begin() as connection:
        put(connection, "one", "two")
        fence = claim_one(connection).fence
        settle(connection, fence, "one", state=state, b_attempts=7)
        settle(connection, fence, "two")
        put(connection, "three")
        outbox.release(connection, [fence])
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
        assert outbox.renew(connection, "me", LEASE_MS) == {LANE: (fence.number, True)}
