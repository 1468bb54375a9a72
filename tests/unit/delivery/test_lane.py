"""flowbridge.delivery.lane: what becomes of an event by the answers that it gets, and of those behind it."""

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flowbridge import log
from flowbridge.delivery import halts, worker
from flowbridge.delivery import lane as module
from flowbridge.delivery.account_limits import FIRST
from flowbridge.delivery.pending import Outcome, PendingDeliveries, PendingDelivery
from flowbridge.errors import HomeserverError
from flowbridge.homeserver.answers import Verdict, judge
from flowbridge.models.timing import Timing
from flowbridge.store import Row
from flowbridge.store.outbox import HISTORY
from tests.patience import PATIENCE
from tests.rig import (
    ALICE,
    BOB,
    DESK,
    ROOM,
    SERVICE,
    Behaviour,
    MakeRig,
    Rig,
    Rooms,
    Sent,
    after,
    cut,
    cut_off,
    error,
    lose,
    refuse_connection,
    reply,
    silence,
    slow,
    soon,
    unreachable,
    until,
)
from tests.unit.delivery import test_attempt as answers

HOUR = 3_600_000  # milliseconds
WEEK = 7 * 24 * HOUR
OTHER = "!other:hs"


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    """Pauses of milliseconds."""
    make.tune(first_pause=0.002, max_pause=0.01, poll_seconds=0.02, token_pause=0.02, first_probe_pause=0.01)


def tell(path: Path, statement: str, *values: object) -> None:
    """Change the store from outside."""
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection, connection:
        connection.execute(statement, values)


def age(path: Path, ms: int) -> None:
    """As if all that was written had been written so much earlier."""
    tell(path, "UPDATE outbox SET accepted_at = accepted_at - ?", ms)
    tell(path, "UPDATE lanes SET lease_until = lease_until - ?, uncertain_since = uncertain_since - ?", ms, ms)


# verdicts


@pytest.mark.parametrize("name", ["400 M_BAD_JSON", "413 M_TOO_LARGE"])
async def test_refused_event_is_dead_and_the_next_one_goes(make: MakeRig, rooms: Rooms, name: str) -> None:
    async with make() as rig:
        rooms.then(answers.DEAD[name])
        await rig.accept("a")
        await rig.accept("b")
        await rig.settled()
        assert rig.rows("state", "attempts") == [("dead", 1), ("sent", 1)]
        told = json.loads(rig.rows("error")[0])
        assert told == {"status": int(name.split()[0]), "errcode": name.split()[1], "error": "no"}
        assert rooms.tries() == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["200 without an event_id", "404 of a proxy", "503 M_FORBIDDEN", "timeout, reset", "connection refused"]
)
async def test_event_is_tried_again_under_the_same_id_and_nothing_overtakes_it(
    make: MakeRig, rooms: Rooms, name: str
) -> None:
    async with make() as rig:
        rooms.then(*[answers.AGAIN_PERHAPS_SENT.get(name, refuse_connection)] * 3)
        await rig.accept("a")
        await rig.accept("b")
        await rig.settled()
        assert rooms.tries() == ["a", "a", "a", "a", "b"]
        assert len({sent.txn_id for sent in rooms.sends}) == 2
        assert rig.rows("state", "attempts") == [("sent", 4), ("sent", 1)]
        history = json.loads(rig.rows("history")[0])
        assert [entry["status"] for entry in history][-1] == 200
        assert len(history) == 4


async def test_event_whose_answer_got_lost_is_in_the_room_once(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(lose, cut, lose)
        assert await rig.send("a") == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]
        assert len(rooms.sends) == 4


async def test_there_is_no_limit_of_attempts_but_one_of_what_is_remembered(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(*[cut] * 30)
        await rig.send("a")
        await rig.settled()
        assert rig.rows("state", "attempts") == [("sent", 31)]
        assert len(json.loads(rig.rows("history")[0])) == HISTORY


async def test_429_is_no_attempt_and_another_account_goes_on(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(slow(2_000), slow(1))
        alice = rig.offer("a")
        await until(lambda: rooms.sends)
        elsewhere = rig.offer("b", OTHER)
        assert await rig.send("c", caller=BOB) == Outcome("sent", "$1")
        assert not alice.settled.done()
        assert not elsewhere.settled.done()
        assert (await soon(alice.settled)).state == (await soon(elsewhere.settled)).state == "sent"
        await rig.settled()
        assert rig.rows("attempts") == [1, 1, 1]
        assert alice.history[0]["status"] == 429


async def test_caller_waits_a_rate_limit_out(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(*[slow(20)] * 3)
        assert await rig.send("a") == Outcome("sent", "$1")


async def test_account_with_a_refused_token_waits_and_goes_on_with_a_new_one(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.script(lambda sent: error(401, "M_USER_LOCKED") if sent.token == "alice" else None)
        await rig.accept("a")
        await rig.accept("b")
        await until(lambda: rig.account_limits.distrusted)
        assert await rig.send("c", OTHER, caller=BOB) == Outcome("sent", "$1")
        assert rig.rows("state", "attempts")[:2] == [("queued", 0), ("queued", 0)]
        await rig.accept("d", caller=replace(ALICE, token="new"))
        await rig.settled()
        assert rooms.bodies() == ["a", "b", "d"]


async def test_who_sends_with_a_bad_token_of_his_own_and_waits_is_told(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.always(error(401, "M_UNKNOWN_TOKEN"))
        outcome = await rig.send("a")
        assert outcome is not None
        assert (outcome.state, outcome.error) == (
            "dead",
            {"status": 401, "errcode": "M_UNKNOWN_TOKEN", "error": "no"},
        )


async def test_who_sends_with_a_key_is_not_told_of_the_bots_token(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.token == "alice" else None)
        pending = rig.offer("a", api_key="key")
        await until(lambda: rig.account_limits.distrusted)
        assert not pending.settled.done()
        rig.tokens.remember(replace(ALICE, token="new"))
        assert await rig.worker.wait(pending, PATIENCE) == Outcome("sent", "$1")


async def test_403_in_a_room_one_is_in_is_dead_at_once(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        await rig.accept("a")
        await rig.accept("b")
        await rig.settled()
        assert rig.states() == ["dead", "sent"]


@pytest.fixture
def absences(make: MakeRig) -> tuple[float, ...]:
    assert Timing().absent_pauses == (60.0, 300.0, 900.0)
    seconds = (0.06, 0.12, 0.18)
    make.tune(absent_pauses=seconds, rest_pause=0.03)
    return seconds


async def test_lane_waits_three_times_for_an_invitation(
    make: MakeRig, rooms: Rooms, absences: tuple[float, ...]
) -> None:
    tried: list[float] = []

    def refuse(sent: Sent) -> Behaviour | None:
        tried.append(time.monotonic())
        return error(403, "M_FORBIDDEN") if sent.body == "a" else None

    rooms.joined = False
    rooms.script(refuse)
    async with make() as rig:
        await rig.accept("a")
        await rig.accept("b")
        await rig.settled()
        assert rig.rows("state", "attempts") == [("dead", 4), ("sent", 1)]
        pauses = [later - earlier for earlier, later in pairwise(tried[:4])]
        assert all(pause >= seconds for pause, seconds in zip(pauses, absences, strict=True)), pauses


@pytest.mark.usefixtures("absences")
async def test_event_is_sent_when_the_invitation_comes(make: MakeRig, rooms: Rooms) -> None:
    rooms.joined = False
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"), error(403, "M_FORBIDDEN"))
        await rig.accept("a")
        await rig.settled()
        assert rig.rows("state", "attempts") == [("sent", 3)]


async def test_lane_that_waits_for_an_invitation_is_held_by_nobody(make: MakeRig, rooms: Rooms) -> None:
    make.tune(absent_pauses=(60.0,))
    rooms.joined = False
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        await rig.accept("a")
        await until(lambda: rig.lane().owner is None and rig.lane().lease_until > time.time() * 1000 + 30_000)
        await rig.accept("b")
        assert await rig.send("c", OTHER)
        assert rooms.tries(ROOM) == ["a"]
        assert sum(rig.worker.lanes()[kind] for kind in ("sending", "pause", "idle")) == 1


@pytest.mark.usefixtures("absences")
async def test_absences_are_counted_over_a_restart(make: MakeRig, rooms: Rooms) -> None:
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rig.rows("attempts") == [2])
    async with make() as rig:
        await rig.settled()
        assert rig.rows("state", "attempts") == [("dead", 4)]


async def test_who_waits_is_told_at_once_that_he_is_not_in_the_room(make: MakeRig, rooms: Rooms) -> None:
    rooms.joined = False
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        outcome = await rig.send("a")
        assert outcome is not None
        assert outcome.error is not None
        assert (outcome.state, outcome.error["errcode"]) == ("dead", "M_FORBIDDEN")


@pytest.mark.parametrize("behaviour", [error(500, "M_UNKNOWN"), error(403, "M_FORBIDDEN"), refuse_connection])
async def test_event_is_dead_after_seven_days(make: MakeRig, rooms: Rooms, path: Path, behaviour: Behaviour) -> None:
    assert worker.KEEP_DAYS * 24 * HOUR == WEEK
    rooms.joined = False
    rooms.always(refuse_connection)
    async with make() as rig:
        await rig.accept("a")
        await rig.accept("b")
        await rig.crash()
    age(path, WEEK)
    tell(path, "UPDATE outbox SET accepted_at = accepted_at + 60000 WHERE content LIKE '%\"b\"%'")
    rooms.script(lambda sent: behaviour if sent.body == "a" else cut if rooms.tries().count("b") == 1 else None)
    rooms.sends.clear()
    async with make() as rig:
        await rig.settled()
        assert rig.states() == ["dead", "sent"]
        assert rooms.tries() == ["a", "b", "b"]


LAST: dict[str, tuple[Behaviour, Behaviour, str, bool]] = {
    # what the first attempt brought, and the last one; the reason that is told; whether it may be in the room
    "never sent": (refuse_connection, refuse_connection, "cannot connect", False),
    "answer lost": (refuse_connection, cut, "the homeserver did not answer in time", True),
    "answer lost earlier": (cut, refuse_connection, "cannot connect", True),
    "5xx": (refuse_connection, error(500, "M_UNKNOWN", "a fault"), "a fault", True),
    "not in the room": (refuse_connection, error(403, "M_FORBIDDEN"), "@alice:hs is not in this room", False),
    "refused account": (refuse_connection, error(403, "M_USER_SUSPENDED", "suspended"), "suspended", False),
    "refused account, answer lost": (cut, error(403, "M_USER_SUSPENDED", "suspended"), "suspended", True),
    "refused token": (refuse_connection, error(401, "M_UNKNOWN_TOKEN"), "no access token of its account", False),
    "refused token, answer lost": (cut, error(401, "M_UNKNOWN_TOKEN"), "no access token of its account", True),
}


@pytest.mark.parametrize("name", LAST)
async def test_dead_letter_by_age_says_so_and_why_and_whether_it_may_be_in_the_room(
    make: MakeRig, rooms: Rooms, name: str
) -> None:
    first, last, reason, is_open = LAST[name]
    rooms.joined = False
    week_over = asyncio.Event()
    rooms.then(first)
    rooms.always(after(week_over, last))
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: len(rooms.sends) == 2)
        (lane,) = rig.worker._lanes
        pending = lane.queue[0]
        pending._row = pending.row._replace(accepted_at=pending.row.accepted_at - WEEK)
        week_over.set()
        await rig.settled()
        told = json.loads(rig.rows("error")[0])
    assert told["status"] == 504
    assert told["error"].startswith(f"it was not delivered within 7 days: {reason}")
    assert told["error"].endswith("; it may be in the room all the same") == is_open


async def test_what_an_outage_of_the_bridge_made_too_old_is_not_given_up_at_its_first_failure(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    make.tune(halt_pauses=(0.02,))
    assert worker.GRACE_SECONDS == 60.0
    rooms.always(refuse_connection)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rooms.sends)
    age(path, WEEK)
    rooms.always(None)
    rooms.then(refuse_connection, error(500, "M_UNKNOWN"), error(403, "M_USER_SUSPENDED", retry_after_ms=1))
    async with make(grace=10 * PATIENCE) as rig:
        await rig.settled()
        assert rig.states() == ["sent"]


async def test_encrypted_room_makes_dead_letters_and_does_not_stop_the_lane(make: MakeRig, rooms: Rooms) -> None:
    rooms.encrypted[ROOM] = True
    async with make(refuse_encrypted=True) as rig:
        await rig.accept("a")
        await rig.accept("b", type_="m.room.encrypted")
        await rig.settled()
        assert rig.states() == ["dead", "sent"]
        assert rooms.tries() == ["b"]


@pytest.mark.parametrize("trouble", [cut_off(), unreachable()])
async def test_event_waits_until_somebody_can_tell_whether_the_room_is_encrypted(
    make: MakeRig, rooms: Rooms, trouble: Any
) -> None:
    rooms.encrypted[ROOM] = trouble
    async with make(refuse_encrypted=True) as rig:
        await rig.accept("a")
        await until(lambda: len(rooms.looks) >= 3)
        assert rooms.sends == []
        rooms.encrypted[ROOM] = False
        await rig.settled()
        assert (rig.states(), rooms.bodies()) == (["sent"], ["a"])
        assert rig.lane().uncertain_since is None


async def test_what_goes_wrong_in_one_lane_stops_neither_it_nor_others(make: MakeRig, rooms: Rooms) -> None:
    async def explode(rooms: Rooms, sent: Sent) -> Any:
        raise RuntimeError("a fault of ours")

    async with make() as rig:
        rooms.then(explode, explode)
        await rig.accept("a")
        await rig.accept("b", OTHER)
        await rig.settled()
        assert (rooms.bodies(), rooms.bodies(OTHER)) == (["a"], ["b"])


def test_pauses_double_up_to_a_minute() -> None:
    pauses = [module.pause_after(number, Timing()) for number in range(200)]
    for pause, middle in zip(pauses, [0.5, 1, 2, 4, 8, 16, 32, *[60] * 193], strict=True):
        assert 0.8 * middle <= pause <= 1.2 * middle
    assert len(set(pauses[7:])) > 100  # not all at the same moment


# doubts


async def test_doubt_is_written_down_and_ends_with_the_event(make: MakeRig, rooms: Rooms) -> None:
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(lose, after(answered))
        before = time.time()
        pending = rig.offer("a")
        await until(lambda: len(rooms.sends) == 2)
        await until(lambda: rig.lane().uncertain_since)
        assert before - 0.1 < rig.lane().uncertain_since / 1000 <= time.time()
        assert rig.worker.lanes()["uncertain"] == 1
        answered.set()
        await soon(pending.settled)
        await until(lambda: rig.lane().uncertain_since is None)
        assert rig.worker.lanes()["uncertain"] == 0


async def test_failure_before_anything_was_sent_is_no_doubt(make: MakeRig, rooms: Rooms) -> None:
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(refuse_connection, slow(1), after(answered))
        pending = rig.offer("a")
        await until(lambda: len(rooms.sends) == 3)
        assert rig.worker.lanes()["uncertain"] == 0
        answered.set()
        await soon(pending.settled)


async def test_doubt_counts_from_the_first_attempt_and_survives_a_crash(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    rooms.always(lose)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rig.lane() and rig.lane().uncertain_since)
        first = rig.lane().uncertain_since
        await until(lambda: len(rooms.sends) >= 5)
        assert rig.lane().uncertain_since == first
        await rig.crash()
    rooms.forget()
    age(path, HOUR)
    rooms.always(None)
    tries = len(rooms.sends)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a"]
    assert len(rooms.sends) == tries  # it was found in the room


async def test_attempt_that_a_stop_cuts_off_does_not_make_an_older_doubt_younger(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    """The homeserver counts its 20 minutes from the first attempt, not from the last."""
    rooms.then(lose, silence)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: len(rooms.sends) == 2 and rig.lane().uncertain_since)
        first = rig.lane().uncertain_since
        tell(path, "UPDATE lanes SET uncertain_since = uncertain_since - ?", HOUR)
        await rig.stop(0.0)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT uncertain_since FROM lanes").fetchall() == [(first - HOUR,)]


async def test_stop_that_cuts_an_attempt_off_leaves_a_doubt(make: MakeRig, rooms: Rooms, path: Path) -> None:
    rooms.then(silence)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rooms.sends)
        await rig.stop(0.0)
    with closing(sqlite3.connect(path)) as connection:
        ((owner, since),) = connection.execute("SELECT owner, uncertain_since FROM lanes").fetchall()
    assert owner is None
    assert abs(since / 1000 - time.time()) < 5


async def sent_but_not_written(rig: Rig, *bodies: str, room: str = ROOM, **how: Any) -> None:
    """Let these be on their way when the process dies: in the room, and queued in the store."""
    rooms = rig.rooms
    rooms.always(refuse_connection)
    deliveries = [await rig.accept(body, room, **how) for body in bodies]
    await until(lambda: rig.lane(room) and rig.lane(room).owner)
    await rig.crash()
    rooms.always(None)
    for pending in deliveries:
        row = pending.row
        rooms.store(Sent(ALICE.token, room, row.event_type, row.state_key, json.loads(row.content), row.txn_id))
    rooms.sends.clear()


async def test_all_that_a_dead_process_may_have_sent_is_looked_for(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """Several events may have gone out before the first of their outcomes was written."""
    async with make() as rig:
        await sent_but_not_written(rig, "a", "b", "c")
    age(path, HOUR)
    rooms.forget()
    async with make() as rig:
        await rig.accept("d")
        await rig.settled()
    assert rooms.bodies() == ["a", "b", "c", "d"]
    assert rooms.tries() == ["d"]


async def test_states_that_a_dead_process_set_are_not_set_back(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await sent_but_not_written(rig, "a", "b", type_="m.room.topic", state_key="")
    async with make() as rig:
        await rig.accept("c", type_="m.room.topic", state_key="")
        await rig.settled()
    assert rooms.bodies() == ["a", "b", "c"]


async def test_event_that_another_replica_accepted_by_a_faster_clock_is_in_doubt_too(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    async with make() as rig:
        await sent_but_not_written(rig, "a", "b")
    age(path, HOUR)
    tell(path, "UPDATE outbox SET accepted_at = ?", int(time.time() * 1000) + 30_000)
    rooms.forget()
    for event in rooms.timeline[ROOM]:
        event["origin_server_ts"] = int(time.time() * 1000)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a", "b"]


async def test_refused_event_says_nothing_of_those_behind_it(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """It was refused, they were sent, and the process died before any of that was written."""
    async with make() as rig:
        rooms.always(refuse_connection)
        await rig.accept("bad")
        await sent_but_not_written(rig, "a", "b")
    rooms.forget()
    age(path, HOUR)
    rooms.then(error(400, "M_BAD_JSON"))
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a", "b"]


async def test_look_ends_with_the_first_event_that_is_not_there(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """Events go in order: if one was not sent, none behind it was."""
    async with make() as rig:
        await sent_but_not_written(rig, "a")
    async with make() as rig:
        rooms.always(refuse_connection)
        for body in "bcdef":
            await rig.accept(body)
        await rig.crash()
    rooms.always(None)
    rooms.looks.clear()
    rooms.forget()
    age(path, HOUR)
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a", "b", "c", "d", "e", "f"]
    assert rooms.looks == [("recent", ROOM)] * 3  # one page for a, which is there, two for b, and no more


async def test_what_was_accepted_since_is_not_looked_for(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.accept("a")
        await rig.settled()
        await rig.crash()
    age(path, HOUR)
    async with make() as rig:
        await until(lambda: rig.lane().fence == 2 and rig.lane().uncertain_since is None)
        assert await rig.send("b")
    assert rooms.looks == []


async def test_lane_with_nothing_in_it_is_in_no_doubt(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        await rig.crash()
    async with make() as rig:
        await until(lambda: rig.lane().fence == 2 and rig.lane().uncertain_since is None)
        assert rig.worker.lanes()["uncertain"] == 0


async def test_fault_of_ours_after_the_request_went_out_leaves_a_doubt(make: MakeRig, rooms: Rooms) -> None:
    async def explode(rooms: Rooms, sent: Sent) -> Any:
        rooms.store(sent)
        rooms.forget()
        raise RuntimeError("a fault of ours")

    async with make() as rig:
        rooms.then(explode)
        await rig.accept("a", caller=SERVICE)
        await rig.settled()
        assert rooms.bodies() == ["a"]


async def test_account_without_a_device_looks_after_a_crash_however_short(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(lose, refuse_connection, refuse_connection)
        await rig.accept("a", caller=SERVICE)
        await until(lambda: rooms.bodies() == ["a"])
        await rig.crash()
    rooms.always(None)
    rooms.forget()
    async with make() as rig:
        await rig.settled()
    assert rooms.bodies() == ["a"]


# in doubt, and refused: no answer to anything but its send ends an event


LOOKS_REFUSED = [(400, "M_INVALID_PARAM"), (403, "M_FORBIDDEN"), (404, "M_NOT_FOUND")]


@pytest.mark.parametrize(("status", "errcode"), LOOKS_REFUSED)
async def test_event_in_doubt_outlives_a_look_that_is_refused(
    make: MakeRig, rooms: Rooms, status: int, errcode: str
) -> None:
    rooms.then(lose)
    rooms.reading = HomeserverError("no", errcode=errcode, status=status)
    async with make() as rig:
        pending = rig.offer("a", caller=SERVICE)
        await until(lambda: len(rooms.looks) > 5)
        assert not pending.settled.done(), "a caller who is told 4xx sends it once more"
        rooms.reading = None
        assert await rig.worker.wait(pending, PATIENCE) == Outcome("sent", "$1")
        assert rooms.tries() == ["a"]


@pytest.mark.usefixtures("absences")
@pytest.mark.parametrize("waits", [True, False])
async def test_event_in_doubt_of_an_account_that_has_left_the_room_may_be_there(
    make: MakeRig, rooms: Rooms, waits: bool
) -> None:
    make.tune(absent_wake_seconds=0.0)
    rooms.joined = False
    rooms.then(lose)
    rooms.reading = HomeserverError("no", errcode="M_FORBIDDEN", status=403)
    async with make() as rig:
        pending = rig.offer("a", caller=SERVICE, waits=waits)
        if waits:
            assert await rig.worker.wait(pending, PATIENCE)
        await rig.settled()
        assert len(rooms.looks) > 4, "nobody is told before the lane has waited for an invitation"
        told = json.loads(rig.rows("error")[0])
        assert told["status"] == 504, "a 4xx says that it is not in the room"
        assert told["error"].startswith("@service:hs is not in this room")
        assert told["error"].endswith("; it may be in the room all the same")


@pytest.mark.parametrize("refusal", [(403, "M_USER_SUSPENDED"), (401, "M_UNKNOWN_TOKEN")])
async def test_who_waits_for_an_event_in_doubt_is_not_told_that_the_account_is_refused(
    make: MakeRig, rooms: Rooms, refusal: tuple[int, str]
) -> None:
    make.tune(halt_pauses=(0.02,))
    rooms.then(lose)
    rooms.script(lambda sent: error(*refusal) if sent.token == "alice" else None)
    async with make() as rig:
        pending = rig.offer("a")
        await until(lambda: len(rooms.sends) > 3 or rig.account_limits.distrusted)
        await until(lambda: pending.history[1:])
        assert not pending.settled.done(), "it is in the room"
        rooms.always(None)
        if refusal[0] == 401:
            rig.tokens.remember(DESK)
        assert await rig.worker.wait(pending, PATIENCE) == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]


async def test_repeat_of_an_event_in_doubt_does_not_hear_that_another_was_refused(
    make: MakeRig, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way when the process died: this one has not tried it yet, and is looking for it."""
    async with make() as rig:
        await sent_but_not_written(rig, "a", key="k")
    age(path, HOUR)
    tell(path, "UPDATE outbox SET attempts = 0, history = '[]'")
    looks, page = asyncio.Event(), rooms.recent

    async def late(*which: Any, **how: Any) -> Any:
        rooms.looks.append(("recent", ROOM))
        await looks.wait()
        return await page(*which, **how)

    monkeypatch.setattr(rooms, "recent", late)
    rooms.script(lambda sent: error(403, "M_USER_SUSPENDED") if sent.room == OTHER else None)
    async with make() as rig:
        await until(lambda: rooms.looks)
        again = await rig.accept("a", key="k", waits=True)
        assert (await rig.send("b", OTHER) or Outcome("sent")).state == "dead"
        looks.set()
        assert await rig.worker.wait(again, PATIENCE) == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]


# outcomes on their way to the disk


async def test_dead_letter_is_written_with_its_time_however_fast_the_writer_is(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the year 1970 would be purged within the minute."""
    async with make() as rig:
        await rig.send("first")
        await rig.settled()
        warn = log.warning

        def slowly(action: str, **fields: Any) -> None:
            """Writing a line takes so long that the writer sees what is there so far."""
            deadline = time.monotonic() + PATIENCE
            while action == "event_dead" and len(rig.states()) < 2 and time.monotonic() < deadline:
                time.sleep(0.002)
            warn(action, **fields)

        monkeypatch.setattr(log, "warning", slowly)
        rooms.then(error(400, "M_BAD_JSON"))
        await rig.send("a")
        await rig.settled()
        assert rig.states() == ["sent", "dead"]
        assert rig.rows("settled_at")[1] > time.time() * 1000 - 60_000


async def test_outcome_that_the_store_refuses_is_tried_again_and_the_event_is_not_sent_again(
    make: MakeRig, rooms: Rooms, path: Path
) -> None:
    make.tune(rewrite_seconds=0.02)
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await rig.accept("a")
        await rig.accept("b")
        await until(lambda: rooms.sends)
        tell(path, "CREATE TRIGGER no BEFORE UPDATE OF state ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END")
        answered.set()
        await until(lambda: len(rig.write_queue.unwritten) == 2)
        tell(path, "UPDATE lanes SET dirty = 1")
        rig.worker.wake()  # the lane looks into the store, and finds them queued
        await until(lambda: not rig.lane().dirty)
        for _ in range(20):
            await asyncio.sleep(0.002)
        assert rig.states() == ["queued", "queued"]
        assert rooms.tries() == ["a", "b"]
        tell(path, "DROP TRIGGER no")
        await rig.settled()
        await until(lambda: not rig.write_queue.unwritten)
        assert await rig.send("c")
        assert rooms.tries() == ["a", "b", "c"]


async def test_refused_outcome_is_tried_once_more_at_the_end(make: MakeRig, rooms: Rooms, path: Path) -> None:
    make.tune(rewrite_seconds=60.0)
    async with make() as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "CREATE TRIGGER no BEFORE UPDATE OF state ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END")
        answered.set()
        await until(lambda: rig.write_queue.unwritten)
        tell(path, "DROP TRIGGER no")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT state FROM outbox").fetchall() == [("sent",)]


@pytest.fixture
def refuses_outcomes(path: Path, make: MakeRig) -> Callable[[bool], None]:
    """`refuses(True)`: the store takes no event that was sent, and all else."""
    make.tune(rewrite_seconds=0.02)

    def refuses(yes: bool) -> None:
        fails = "BEFORE UPDATE OF state ON outbox WHEN NEW.state = 'sent' BEGIN SELECT RAISE(ABORT, 'no'); END"
        tell(path, f"CREATE TRIGGER no {fails}" if yes else "DROP TRIGGER no")

    return refuses


async def test_sent_event_is_not_given_up_while_the_store_has_not_taken_its_outcome(
    make: MakeRig, rooms: Rooms, path: Path, refuses_outcomes: Callable[[bool], None]
) -> None:
    """Its age is over in the moment in which it is sent, and what was told is written behind what gives it up."""
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(after(answered))
        pending = await rig.accept("a")
        await until(lambda: rooms.sends)
        age(path, WEEK)
        tell(path, "UPDATE lanes SET lease_until = lease_until + ?", WEEK)
        refuses_outcomes(True)
        with rig.busy_writer():
            answered.set()
            await until(lambda: rig.worker.lanes()["idle"])
            giving_up = asyncio.ensure_future(rig.worker.give_up([pending.row.lane], pending.row.accepted_at))
            await asyncio.sleep(0)
        assert await soon(giving_up) == 0
        await until(lambda: rig.write_queue.unwritten)
        refuses_outcomes(False)
        await rig.settled()
        assert (rig.states(), rooms.tries()) == (["sent"], ["a"])


@pytest.mark.parametrize("late", [True, False])
async def test_lane_is_not_given_back_before_its_outcomes_are_written(
    make: MakeRig, rooms: Rooms, refuses_outcomes: Callable[[bool], None], late: bool
) -> None:
    """Without the lane they are void: the event would stay queued, and be sent once more."""
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(after(answered))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        refuses_outcomes(True)
        with rig.busy_writer() if late else contextlib.nullcontext():
            answered.set()
            await until(lambda: rig.worker.lanes()["idle"])
            await until(lambda: late or rig.write_queue.unwritten)
            rig.worker._lanes._end_longest_idle(10)
            await until(lambda: not rig.worker.lanes()["idle"])
        await until(lambda: rig.write_queue.unwritten)
        refuses_outcomes(False)
        await until(lambda: not rig.write_queue.unwritten)
        await rig.accept("b")
        rig.worker.wake()
        await rig.settled()
        assert rooms.tries() == ["a", "b"]
        assert set(rig.states()) == {"sent"}


async def test_outcome_that_the_store_refuses_to_the_end_leaves_a_doubt(
    make: MakeRig, rooms: Rooms, refuses_outcomes: Callable[[bool], None]
) -> None:
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(after(answered))
        await rig.accept("a", caller=SERVICE)
        await until(lambda: rooms.sends)
        refuses_outcomes(True)
        answered.set()
        await until(lambda: rig.write_queue.unwritten)
    refuses_outcomes(False)
    rooms.forget()
    async with make() as rig:
        await rig.settled()
        assert (rig.states(), rooms.bodies()) == (["sent"], ["a"])


# the lease


async def test_nothing_is_sent_for_a_lane_that_may_be_anothers(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make(lease=1.0, deadline=0.2) as rig:
        rooms.then(cut)
        await rig.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET owner = 'other', fence = fence + 1, lease_until = ?", (time.time() + 600) * 1000)
        rooms.always(error(500, "M_UNKNOWN"))
        await until(lambda: not rig.worker.lanes()["sending"] and not rig.worker.lanes()["pause"])
        tries = len(rooms.sends)
        await rig.accept("b", OTHER)  # while the worker goes on with others
        await until(lambda: rooms.tries(OTHER))
        assert len(rooms.tries(ROOM)) <= tries
        assert rig.states()[0] == "queued"
        rooms.always(None)


async def test_nothing_is_sent_when_the_lease_ran_out_while_the_account_paused(make: MakeRig, rooms: Rooms) -> None:
    async with make(lease=0.6, deadline=0.1) as rig:
        refused = asyncio.Event()
        rooms.then(after(refused, slow(800)))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        account = rig.tokens.remember(ALICE)
        with rig.busy_writer():  # so nobody prolongs it
            refused.set()
            await until(lambda: rig.account_limits.pause_of(account))
            await until(lambda: not rig.account_limits.pause_of(account))
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert len(rooms.sends) == 1
        await rig.settled()
        assert rooms.bodies() == ["a"]


async def test_lane_that_was_lost_is_taken_up_again_when_nobody_has_it(make: MakeRig, rooms: Rooms, path: Path) -> None:
    """As after a sleep of the whole machine."""
    async with make(lease=0.6, deadline=0.1) as rig:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET lease_until = 1")
        await rig.accept("b")
        answered.set()
        await rig.settled()
        assert rooms.bodies() == ["a", "b"]


@pytest.mark.parametrize("waits", [True, False])
async def test_event_whose_key_was_used_before_is_not_sent(make: MakeRig, rooms: Rooms, waits: bool) -> None:
    async with make() as rig:
        await rig.send("a", key="k")
        again = await rig.accept("a", key="k", waits=waits)
        assert await rig.send("b") == Outcome("sent", "$2")
        assert (again.row.delivery, rooms.tries()) == (rig.rows("delivery")[0], ["a", "b"])


async def test_repeat_after_a_crash_is_not_sent_into_a_lane_in_doubt(make: MakeRig, rooms: Rooms) -> None:
    """The usual case: the process died before it answered, and the caller asks again."""
    async with make() as rig:
        await rig.send("a", key="k")
        await rig.settled()
        await rig.crash()
    async with make() as rig:
        await until(lambda: rig.lane().fence == 2)
        await rig.accept("a", key="k")
        assert await rig.send("b")
    assert rooms.tries() == ["a", "b"]


async def test_keyed_event_is_not_sent_before_it_is_written(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            keyed, plain = rig.offer("b", key="k"), rig.offer("c", OTHER)
            direct = rig.offer("d")
            await asyncio.sleep(0)
            assert await rig.worker.wait(rig.offer("e", OTHER), 0.1) is None
            assert rooms.tries(ROOM) == ["a"]  # neither it, nor what came after it
            connection.execute("ROLLBACK")
        for pending in (keyed, plain, direct):
            assert (await soon(pending.settled)).state == "sent"
        assert rooms.bodies() == ["a", "b", "d"]


async def test_event_without_a_key_need_not_wait_for_the_disk(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await rig.send("a")
        await rig.settled()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            deliveries = [rig.offer(str(number)) for number in range(5)]
            for pending in deliveries:
                assert (await soon(pending.settled)).state == "sent"
            assert rig.states() == ["sent"]
            connection.execute("ROLLBACK")
        await until(lambda: rig.states() == ["sent"] * 6)  # written with their outcomes


async def test_stopping_lane_does_not_wait_for_a_pause_to_end(make: MakeRig, rooms: Rooms) -> None:
    make.tune(first_pause=2 * PATIENCE, max_pause=2 * PATIENCE)
    make.tune(rest_pause=3 * PATIENCE)  # so that the lane is not given back meanwhile
    answered = asyncio.Event()
    async with make() as rig:
        rooms.then(after(answered, cut))
        await rig.accept("a")
        await until(lambda: rooms.sends)
        asyncio.get_running_loop().call_later(0.05, answered.set)
        await soon(rig.stop(3 * PATIENCE))


# callers who wait behind what waits


@pytest.fixture
def invitations(make: MakeRig) -> None:
    """A lane waits a minute for one, and may be woken for callers at once."""
    make.tune(absent_wake_seconds=0.0)


async def asleep(rig: Rig) -> None:
    """Until the lane rests."""
    await until(lambda: rig.lane() is not None and rig.lane().lease_until > time.time() * 1000 + 40_000)
    await until(lambda: rig.lane().owner is None)


@pytest.mark.usefixtures("invitations")
@pytest.mark.parametrize("key", [None, "key"])
@pytest.mark.parametrize("api_key", [None, "bot"])
async def test_caller_who_waits_behind_an_invitation_is_told_at_once(
    make: MakeRig, rooms: Rooms, key: str | None, api_key: str | None
) -> None:
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN", "User not in room"))
    async with make() as rig:
        await rig.accept("queued", api_key=api_key)
        await asleep(rig)
        for number in range(6):  # more than there are waits for an invitation
            began = time.monotonic()
            outcome = await rig.send(f"plain {number}", key=key and f"{key} {number}", api_key=api_key)
            assert outcome is not None
            assert outcome.state == "dead"
            assert outcome.error is not None
            assert (outcome.error["status"], outcome.error["errcode"]) == (403, "M_FORBIDDEN")
            assert outcome.error["error"] == (
                f"@alice:hs is not in this room: invite @alice:hs, or POST /join/{ROOM} (User not in room)"
            )
            assert time.monotonic() - began < PATIENCE / 2
            await asleep(rig)
        assert set(rooms.tries()) == {"queued"}, "what is older goes first"
        await until(lambda: rig.states() == ["queued", *["dead"] * 6])
        rooms.joined = True
        rooms.always(None)
        await rig.accept("last", api_key=api_key)
        await rig.worker.joined(ALICE.user_id, ROOM)
        await rig.settled()
        assert rooms.bodies() == ["queued", "last"]


async def test_join_while_the_403_is_examined_is_not_missed(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.tune(absent_pauses=(10 * PATIENCE,))
    rooms.then(error(403, "M_FORBIDDEN"))
    async with make() as rig:

        async def late(token: str, room_id: str, user_id: str) -> bool:
            await rig.worker.joined(user_id, room_id)
            await until(lambda: not rig.worker._lanes._wanted)  # it is held already
            return False  # as it was when it was asked

        monkeypatch.setattr(rooms, "is_joined", late)
        await rig.accept("a")
        await rig.settled()
        assert rig.rows("state", "attempts") == [("sent", 2)]


async def test_join_before_an_attempt_does_not_keep_the_lane_awake(make: MakeRig, rooms: Rooms) -> None:
    go = asyncio.Event()
    rooms.joined = False
    rooms.then(after(go))
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rooms.sends)
        await rig.worker.joined(ALICE.user_id, ROOM)
        await rig.accept("b")
        go.set()
        await asleep(rig)
        assert rooms.tries() == ["a", "b"]


async def test_lane_is_not_woken_for_callers_more_often_than_every_two_seconds(make: MakeRig, rooms: Rooms) -> None:
    assert Timing().absent_wake_seconds == 2.0
    make.tune(absent_wake_seconds=60.0)
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as rig:
        await rig.accept("queued")
        await asleep(rig)
        for number in range(20):
            assert await rig.send(str(number), seconds=0.02) is None
        assert rooms.tries() == ["queued"]
        await rig.worker.joined("@bob:hs", ROOM)
        await rig.worker.joined(ALICE.user_id, OTHER)
        assert await rig.send("elsewhere", OTHER, caller=BOB, seconds=0.2) is not None
        assert rooms.tries(ROOM) == ["queued"]
        await rig.worker.joined(ALICE.user_id, ROOM)
        await until(lambda: rooms.tries(ROOM) == ["queued"] * 2)


async def test_lane_that_rests_after_failures_goes_on_for_a_caller_who_waits(make: MakeRig, rooms: Rooms) -> None:
    make.tune(wake_seconds=0.0, first_pause=60.0, max_pause=60.0)
    async with make() as rig:
        rooms.then(error(500, "M_UNKNOWN"))
        await rig.accept("a")
        await asleep(rig)
        assert await rig.send("b") == Outcome("sent", "$2")
        assert rooms.bodies() == ["a", "b"]


REFUSALS = [(403, "M_USER_SUSPENDED"), (403, "M_RESOURCE_LIMIT_EXCEEDED"), (401, "M_FORBIDDEN"), (409, "M_UNKNOWN")]


@pytest.mark.parametrize(("status", "errcode"), REFUSALS)
async def test_refusal_of_the_account_kills_nothing_that_is_queued(
    make: MakeRig, rooms: Rooms, status: int, errcode: str
) -> None:
    make.tune(halt_pauses=(0.02, 0.05))
    rooms.script(lambda sent: error(status, errcode, "No.") if sent.token == "alice" else None)
    async with make() as rig:
        for number in range(50):
            await rig.accept(str(number), f"!{number % 5}:hs")
        await until(lambda: len(rooms.sends) >= 5)
        account = rig.tokens.remember(ALICE)
        assert rig.account_limits.refusals() == {account: f"No. ({errcode})"}
        assert await rig.send("b", OTHER, caller=BOB) == Outcome("sent", "$1")
        assert await rig.send("c", OTHER, api_key="key", seconds=0.1) is None, "its key is not at fault"
        rooms.always(None)
        await rig.settled()
        assert set(rig.states()) == {"sent"}
        assert rig.rows("attempts") == [1] * 52
        await until(lambda: rig.account_limits.refusals() == {})


def test_refused_account_is_asked_more_and_more_seldom() -> None:
    found = judge(reply(403, {"errcode": "M_USER_SUSPENDED", "error": "No."}))
    all_halts = halts.Halts()
    pauses = [all_halts.refuse("a", found, again=False) for _ in range(7)]
    assert pauses == [5, 15, 60, 300, 600, 600, 600]
    other = [all_halts.refuse("b", found, again=again) for again in (False, True, True, False)]
    assert other == [5, 5, 5, 15], "what was under way at the same time counts once"
    assert all_halts.lift("a")
    assert not all_halts.lift("a")
    assert all_halts.refuse("a", found, again=False) == 5
    assert all_halts.reasons() == dict.fromkeys(("a", "b"), "No. (M_USER_SUSPENDED)")


async def test_refused_account_waits_for_as_long_as_the_homeserver_asks(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(error(403, "M_CONSENT_NOT_GIVEN", retry_after_ms=90_000))
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rig.account_limits.pause_of(rig.tokens.remember(ALICE)) > 80)


async def test_caller_who_waits_with_a_token_of_its_own_hears_the_refusal_at_once(make: MakeRig, rooms: Rooms) -> None:
    make.tune(halt_retry_seconds=0.01)
    rooms.always(error(403, "M_CONSENT_NOT_GIVEN", "Agree first", consent_uri="https://hs/consent"))
    told = {
        "status": 403,
        "errcode": "M_CONSENT_NOT_GIVEN",
        "error": "Agree first",
        "consent_uri": "https://hs/consent",
    }
    async with make() as rig:
        first = await rig.send("a")
        assert first is not None
        assert first.error == told
        for number in range(30):
            await rig.accept("queued", f"!{number}:hs")
        for room in (ROOM, "!7:hs", "!new:hs"):
            outcome = await rig.send("b", room)
            assert outcome is not None
            assert (outcome.state, outcome.error) == ("dead", told)
        await until(lambda: rig.states().count("queued") == 30)
        rooms.always(None)
        assert (await rig.send("c", "!7:hs") or Outcome("dead")).state == "sent"
        await rig.settled()
        assert rig.states().count("dead") == 4


async def test_refusal_of_an_account_is_told_once_and_only_where_somebody_waits(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the requests that are under way is refused; each time all lanes were gone through for each lane."""
    make.tune(halt_pauses=(2 * PATIENCE,), halt_retry_seconds=2 * PATIENCE)
    told: list[str] = []
    tell = module.Lane.refuse_waiting

    def note(lane: module.Lane, found: Verdict) -> Any:
        told.append(lane.fence.lane.partition("|")[2])
        return tell(lane, found)

    monkeypatch.setattr(module.Lane, "refuse_waiting", note)
    go = asyncio.Event()
    rooms.always(after(go, error(403, "M_USER_SUSPENDED")))
    busy, quiet = [f"!{number}:hs" for number in range(30)], [f"!quiet-{number}:hs" for number in range(30)]
    async with make() as rig:
        deliveries = [rig.offer("a", room) for room in busy for _ in range(3)]
        for room in quiet:
            rig.offer("a", room, waits=False)
        await until(lambda: sum(rig.worker.lanes()[kind] for kind in ("sending", "pause", "idle")) == 60)
        await until(lambda: len(rooms.sends) == FIRST)
        go.set()
        for pending in deliveries:
            outcome = await rig.worker.wait(pending, PATIENCE)
            assert outcome is not None
            assert outcome.error is not None
            assert outcome.error["errcode"] == "M_USER_SUSPENDED"
        assert sorted(told) == sorted(busy)
        await rig.crash()


async def test_thousands_who_wait_are_told_without_holding_up_others(make: MakeRig, rooms: Rooms) -> None:
    go, turns = asyncio.Event(), 0
    rooms.always(after(go, error(403, "M_USER_SUSPENDED")))

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with make() as rig:
        deliveries = [rig.offer(str(number)) for number in range(10 * module.TOLD)]
        await until(lambda: rooms.sends)
        told: list[int] = []
        for pending in deliveries:
            pending.settled.add_done_callback(lambda _: told.append(turns))
        meanwhile = asyncio.ensure_future(others())
        go.set()
        await until(lambda: len(told) == len(deliveries))
        meanwhile.cancel()
        assert len(set(told)) >= 10
        await rig.crash()


async def test_those_who_wait_for_a_lane_are_found_without_looking_at_all_others() -> None:
    """1,500 lanes of an account, each asked for its own among 3,000 deliveries, took five seconds."""

    class Watched(PendingDelivery):
        looked_at = 0

        @property
        def settled(self) -> Any:
            Watched.looked_at += 1
            return self.__dict__["settled"]

        @settled.setter
        def settled(self, future: Any) -> None:
            self.__dict__["settled"] = future

    deliveries = PendingDeliveries()
    for number in range(1_000):
        room = f"!{number % 500}:hs"
        row = Row(str(number), f"alice|{room}", "alice", room, "m.room.message", None, b"{}", str(number), 1)
        deliveries.add(Watched(row)).add_waiter()
    Watched.looked_at = 0
    assert [pending.row.delivery for pending in deliveries.awaited("alice|!7:hs")] == ["7", "507"]
    assert deliveries.awaited("alice|!unknown:hs") == []
    assert Watched.looked_at <= 4
    for pending in deliveries.awaited():
        pending.remove_waiter()
        deliveries.leave(pending)
    assert (deliveries._by_delivery, deliveries._by_lane) == ({}, {})


async def test_refused_account_dies_of_age_only(make: MakeRig, rooms: Rooms, path: Path) -> None:
    rooms.always(error(403, "M_USER_SUSPENDED"))
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rooms.sends)
    age(path, WEEK)
    async with make() as rig:
        await rig.settled()
        assert rig.states() == ["dead"]
