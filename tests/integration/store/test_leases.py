"""Lanes and their leases: claims, fences, doubts."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, Engine, select, text, update

from flowbridge.store import Database, Fence, clock, leases, outbox
from flowbridge.store.leases import Claim, Mark
from flowbridge.store.tables import lanes
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
    states,
)
from tests.patience import PATIENCE

ALWAYS = 2**62


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
        assert len(claim(connection, limit=2, exclude=["paused"])) == 2
        assert len(claim(connection, exclude=["paused", "nobody"])) == 3
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
                leases.release(connection, [one.fence for one in sorted(mine, key=lambda one: one.fence.lane)])

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
                leases.lock(connection, names)
                leases.mark_dirty(connection, [(name, "account") for name in names])
                for one in order:
                    leases.doubt(connection, one.fence, turn)
            with database.engine.begin() as connection:
                leases.renew(connection, owner, LEASE_MS)
        with database.engine.begin() as connection:
            leases.release_all(connection, owner)

    with_databases(url, 2, prepare, hammer)


# leases


def test_lease_goes_by_the_clock_of_the_database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection)
    in_a_minute = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: in_a_minute)
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
        soon = int(connection.scalar(select(clock.lease_clock(connection))) or 0) + 5_000
        for name, owner, until in [
            ("mine", "me", soon),
            ("lost", "me", soon - 10_000),
            ("theirs", "other", soon),
            ("free", None, 0),
        ]:
            where = lanes.c.lane == f"account|!{name}"
            connection.execute(update(lanes).where(where).values(owner=owner, lease_until=until))
        held = leases.renew(connection, "me", LEASE_MS)
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
        assert leases.renew(connection, "me", LEASE_MS) == {LANE: (number, True)}
        assert leases.renew(connection, "me", LEASE_MS) == {LANE: (number, False)}


@pytest.mark.parametrize("how", ["release", "release_all"])
def test_lane_given_back_with_events_is_claimable_at_once(engine: Engine, how: str) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        fences = {one.fence.lane: one.fence for one in claim(connection)}
        settle(connection, fences[OTHER], "two")
        if how == "release":
            leases.release(connection, fences.values())
        else:
            leases.release_all(connection, "me")
        assert lane(connection, OTHER).owner is None
        assert [one.fence.lane for one in claim(connection, "other")] == [LANE]


@pytest.mark.parametrize("how", ["release", "release_all"])
def test_lane_given_back_keeps_that_events_came(engine: Engine, how: str) -> None:
    """They may be in a transaction that is not committed yet: dirty is all that is known of them."""
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        settle(connection, fence, "one")
        leases.mark_dirty(connection, [(LANE, "account")])
        if how == "release":
            leases.release(connection, [fence])
        else:
            leases.release_all(connection, "me")
        assert lane(connection).dirty == 1


@only_postgresql
def test_owners_own_events_do_not_mark_its_lane(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        claimed = {one.fence.lane for one in claim(connection, limit=1)}
    (mine,) = claimed
    (free,) = {LANE, OTHER} - claimed
    pairs = [(name, "account") for name in (mine, free, "account|!new")]
    with engine.begin() as connection:
        marks = leases.mark_new(connection, pairs, "me")
        assert marks == {mine: Mark("me", False), free: Mark(None, True), "account|!new": Mark(None, True)}
        assert (lane(connection, mine).dirty, lane(connection, free).dirty) == (0, 1)
    with engine.begin() as connection:
        assert leases.mark_new(connection, [(mine, "account")], "other") == {mine: Mark("me", True)}
    with engine.begin() as connection:
        assert leases.mark_new(connection, [(mine, "account")], "me") == {mine: Mark("me", True)}


@only_postgresql
@pytest.mark.parametrize("how", ["release", "release_all"])
def test_lane_given_back_keeps_events_of_its_owner_that_come_meanwhile(engine: Engine, how: str) -> None:
    """A commit whose answer was lost may be done after the owner has given the lane back on a new connection."""
    with engine.begin() as connection:
        put(connection, "one")
        fence = claim_one(connection).fence
        settle(connection, fence, "one")

    def give_back() -> None:
        with engine.begin() as connection:
            if how == "release":
                leases.release(connection, [fence])
            else:
                leases.release_all(connection, "me")

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            leases.mark_new(connection, [(LANE, "account")], "me")
            outbox.insert_rows(connection, [event("two")])
            giving = pool.submit(give_back)
            with engine.connect() as other:
                deadline = time.monotonic() + PATIENCE
                while not other.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                    assert time.monotonic() < deadline
        giving.result(PATIENCE)
    with engine.begin() as connection:
        assert lane(connection).dirty == 1
        assert [row.delivery for row in claim_one(connection, "other").rows] == ["two"]


def test_lane_given_back_for_a_while_rests(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        leases.release(connection, [claim_one(connection).fence], 20_000)
        assert claim(connection, "other") == []
        connection.execute(update(lanes).values(lease_until=lanes.c.lease_until - 21_000))
        found = claim_one(connection, "other")
        assert found.uncertain_since is None  # it was not lost


def test_end_of_one_owner_leaves_the_lanes_of_others(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        claim_one(connection, "other")
        leases.release_all(connection, "me")
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
        leases.doubt(connection, current, 12)
    for zombie in zombies(current):
        with engine.begin() as connection:
            before = (states(connection), lane(connection))
            settle(connection, zombie, "one", "two")
            leases.doubt(connection, zombie, 99)
            leases.doubt(connection, zombie, None)
            leases.release(connection, [zombie])
            leases.release(connection, [zombie], 5_000)
            assert (states(connection), lane(connection)) == before
    with engine.begin() as connection:
        settle(connection, current, "one")
        assert states(connection) == {"one": "sent", "two": "queued"}


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
        leases.doubt(connection, fence, 1_234)
        leases.release(connection, [fence])
        again = claim_one(connection, "other")
        assert again.uncertain_since == 1_234
        leases.doubt(connection, again.fence, None)
        leases.release(connection, [again.fence])
        assert claim_one(connection, "third").uncertain_since is None


def test_start_on_a_file_of_ones_own_takes_over_all_that_was_held(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "one")
        put(connection, "two", lane=OTHER)
        (held,) = claim(connection, limit=1)
        free = OTHER if held.fence.lane == LANE else LANE
        until = lane(connection, held.fence.lane).lease_until
        leases.recover(connection, LEASE_MS)
        found = {one.fence.lane: one for one in claim(connection, "new")}
        assert found[held.fence.lane].uncertain_since == until - LEASE_MS
        assert found[held.fence.lane].fence.number == held.fence.number + 1
        assert found[free].uncertain_since is None
        settle(connection, held.fence, "one", "two")
        assert set(states(connection).values()) == {"queued"}


def test_idle_lanes_are_forgotten_and_no_others(engine: Engine) -> None:
    names = ("idle", "dirty", "held", "queued")
    with engine.begin() as connection:
        for name in names:
            put(connection, name, lane=f"account|!{name}")
        for one in claim(connection):
            if not one.fence.lane.endswith("queued"):
                settle(connection, one.fence, one.rows[0].delivery)
            if not one.fence.lane.endswith("held"):
                leases.release(connection, [one.fence])
        connection.execute(update(lanes).where(lanes.c.lane == "account|!queued").values(dirty=0))
        leases.mark_dirty(connection, [("account|!dirty", "account")])
        assert leases.forget_idle(connection) == 1
        assert [name for name in names if lane(connection, f"account|!{name}") is None] == ["idle"]
        assert leases.forget_idle(connection) == 0
