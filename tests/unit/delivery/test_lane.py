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
from flowbridge.delivery import attempt, halts, write_queue
from flowbridge.delivery import lane as module
from flowbridge.delivery import worker as courier
from flowbridge.delivery.pending import Tickets
from flowbridge.delivery.write_queue import Outcome, Ticket
from flowbridge.errors import HomeserverError
from flowbridge.homeserver.answers import Verdict, judge
from flowbridge.store import Row
from flowbridge.store.outbox import HISTORY
from tests.patience import PATIENCE
from tests.unit.delivery import test_attempt as answers
from tests.worker import (
    ALICE,
    BOB,
    DESK,
    ROOM,
    SERVICE,
    Behaviour,
    MakeWorker,
    Rooms,
    Sent,
    Worker,
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

HOUR = 3_600_000  # milliseconds
WEEK = 7 * 24 * HOUR
OTHER = "!other:hs"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(module, "MAX_PAUSE", 0.01)
    monkeypatch.setattr(courier, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(attempt, "TOKEN_PAUSE", 0.02)
    monkeypatch.setattr(attempt, "FIRST_PROBE_PAUSE", 0.01)


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
async def test_refused_event_is_dead_and_the_next_one_goes(make: MakeWorker, rooms: Rooms, name: str) -> None:
    async with make() as worker:
        rooms.then(answers.DEAD[name])
        await worker.accept("a")
        await worker.accept("b")
        await worker.settled()
        assert worker.rows("state", "attempts") == [("dead", 1), ("sent", 1)]
        told = json.loads(worker.rows("error")[0])
        assert told == {"status": int(name.split()[0]), "errcode": name.split()[1], "error": "no"}
        assert rooms.tries() == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["200 without an event_id", "404 of a proxy", "503 M_FORBIDDEN", "timeout, reset", "connection refused"]
)
async def test_event_is_tried_again_under_the_same_id_and_nothing_overtakes_it(
    make: MakeWorker, rooms: Rooms, name: str
) -> None:
    async with make() as worker:
        rooms.then(*[answers.AGAIN_PERHAPS_SENT.get(name, refuse_connection)] * 3)
        await worker.accept("a")
        await worker.accept("b")
        await worker.settled()
        assert rooms.tries() == ["a", "a", "a", "a", "b"]
        assert len({sent.txn_id for sent in rooms.sends}) == 2
        assert worker.rows("state", "attempts") == [("sent", 4), ("sent", 1)]
        history = json.loads(worker.rows("history")[0])
        assert [entry["status"] for entry in history][-1] == 200
        assert len(history) == 4


async def test_event_whose_answer_got_lost_is_in_the_room_once(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(lose, cut, lose)
        assert await worker.send("a") == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]
        assert len(rooms.sends) == 4


async def test_there_is_no_limit_of_attempts_but_one_of_what_is_remembered(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(*[cut] * 30)
        await worker.send("a")
        await worker.settled()
        assert worker.rows("state", "attempts") == [("sent", 31)]
        assert len(json.loads(worker.rows("history")[0])) == HISTORY


async def test_429_is_no_attempt_and_another_account_goes_on(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(slow(2_000), slow(1))
        alice = worker.offer("a")
        await until(lambda: rooms.sends)
        elsewhere = worker.offer("b", OTHER)
        assert await worker.send("c", caller=BOB) == Outcome("sent", "$1")
        assert not alice.settled.done()
        assert not elsewhere.settled.done()
        assert (await soon(alice.settled)).state == (await soon(elsewhere.settled)).state == "sent"
        await worker.settled()
        assert worker.rows("attempts") == [1, 1, 1]
        assert alice.history[0]["status"] == 429


async def test_caller_waits_a_rate_limit_out(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(*[slow(20)] * 3)
        assert await worker.send("a") == Outcome("sent", "$1")


async def test_account_with_a_refused_token_waits_and_goes_on_with_a_new_one(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.script(lambda sent: error(401, "M_USER_LOCKED") if sent.token == "alice" else None)
        await worker.accept("a")
        await worker.accept("b")
        await until(lambda: worker.carrier.distrusted)
        assert await worker.send("c", OTHER, caller=BOB) == Outcome("sent", "$1")
        assert worker.rows("state", "attempts")[:2] == [("queued", 0), ("queued", 0)]
        await worker.accept("d", caller=replace(ALICE, token="new"))
        await worker.settled()
        assert rooms.bodies() == ["a", "b", "d"]


async def test_who_sends_with_a_bad_token_of_his_own_and_waits_is_told(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.always(error(401, "M_UNKNOWN_TOKEN"))
        outcome = await worker.send("a")
        assert outcome is not None
        assert (outcome.state, outcome.error) == (
            "dead",
            {"status": 401, "errcode": "M_UNKNOWN_TOKEN", "error": "no"},
        )


async def test_who_sends_with_a_key_is_not_told_of_the_bots_token(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.token == "alice" else None)
        ticket = worker.offer("a", api_key="key")
        await until(lambda: worker.carrier.distrusted)
        assert not ticket.settled.done()
        worker.tokens.remember(replace(ALICE, token="new"))
        assert await worker.courier.wait(ticket, PATIENCE) == Outcome("sent", "$1")


async def test_403_in_a_room_one_is_in_is_dead_at_once(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(error(403, "M_FORBIDDEN"))
        await worker.accept("a")
        await worker.accept("b")
        await worker.settled()
        assert worker.states() == ["dead", "sent"]


@pytest.fixture
def absences(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    assert module.ABSENT_SECONDS == (60.0, 300.0, 900.0)
    seconds = (0.06, 0.12, 0.18)
    monkeypatch.setattr(module, "ABSENT_SECONDS", seconds)
    monkeypatch.setattr(module, "REST_SECONDS", 0.03)
    return seconds


async def test_lane_waits_three_times_for_an_invitation(
    make: MakeWorker, rooms: Rooms, absences: tuple[float, ...]
) -> None:
    tried: list[float] = []

    def refuse(sent: Sent) -> Behaviour | None:
        tried.append(time.monotonic())
        return error(403, "M_FORBIDDEN") if sent.body == "a" else None

    rooms.joined = False
    rooms.script(refuse)
    async with make() as worker:
        await worker.accept("a")
        await worker.accept("b")
        await worker.settled()
        assert worker.rows("state", "attempts") == [("dead", 4), ("sent", 1)]
        pauses = [later - earlier for earlier, later in pairwise(tried[:4])]
        assert all(pause >= seconds for pause, seconds in zip(pauses, absences, strict=True)), pauses


@pytest.mark.usefixtures("absences")
async def test_event_is_sent_when_the_invitation_comes(make: MakeWorker, rooms: Rooms) -> None:
    rooms.joined = False
    async with make() as worker:
        rooms.then(error(403, "M_FORBIDDEN"), error(403, "M_FORBIDDEN"))
        await worker.accept("a")
        await worker.settled()
        assert worker.rows("state", "attempts") == [("sent", 3)]


async def test_lane_that_waits_for_an_invitation_is_held_by_nobody(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABSENT_SECONDS", (60.0,))
    rooms.joined = False
    async with make() as worker:
        rooms.then(error(403, "M_FORBIDDEN"))
        await worker.accept("a")
        await until(lambda: worker.lane().owner is None and worker.lane().lease_until > time.time() * 1000 + 30_000)
        await worker.accept("b")
        assert await worker.send("c", OTHER)
        assert rooms.tries(ROOM) == ["a"]
        assert sum(worker.courier.lanes()[kind] for kind in ("sending", "pause", "idle")) == 1


@pytest.mark.usefixtures("absences")
async def test_absences_are_counted_over_a_restart(make: MakeWorker, rooms: Rooms) -> None:
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: worker.rows("attempts") == [2])
    async with make() as worker:
        await worker.settled()
        assert worker.rows("state", "attempts") == [("dead", 4)]


async def test_who_waits_is_told_at_once_that_he_is_not_in_the_room(make: MakeWorker, rooms: Rooms) -> None:
    rooms.joined = False
    async with make() as worker:
        rooms.then(error(403, "M_FORBIDDEN"))
        outcome = await worker.send("a")
        assert outcome is not None
        assert outcome.error is not None
        assert (outcome.state, outcome.error["errcode"]) == ("dead", "M_FORBIDDEN")


@pytest.mark.parametrize("behaviour", [error(500, "M_UNKNOWN"), error(403, "M_FORBIDDEN"), refuse_connection])
async def test_event_is_dead_after_seven_days(make: MakeWorker, rooms: Rooms, path: Path, behaviour: Behaviour) -> None:
    assert module.DEAD_SECONDS * 1000 == WEEK
    rooms.joined = False
    rooms.always(refuse_connection)
    async with make() as worker:
        await worker.accept("a")
        await worker.accept("b")
        await worker.crash()
    age(path, WEEK)
    tell(path, "UPDATE outbox SET accepted_at = accepted_at + 60000 WHERE content LIKE '%\"b\"%'")
    rooms.script(lambda sent: behaviour if sent.body == "a" else cut if rooms.tries().count("b") == 1 else None)
    rooms.sends.clear()
    async with make() as worker:
        await worker.settled()
        assert worker.states() == ["dead", "sent"]
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
    make: MakeWorker, rooms: Rooms, name: str
) -> None:
    first, last, reason, is_open = LAST[name]
    rooms.joined = False
    week_over = asyncio.Event()
    rooms.then(first)
    rooms.always(after(week_over, last))
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: len(rooms.sends) == 2)
        (lane,) = worker.courier._lanes.values()
        ticket = lane.tickets[0]
        ticket.row = ticket.row._replace(accepted_at=ticket.row.accepted_at - WEEK)
        week_over.set()
        await worker.settled()
        told = json.loads(worker.rows("error")[0])
    assert told["status"] == 504
    assert told["error"].startswith(f"it was not delivered within 7 days: {reason}")
    assert told["error"].endswith("; it may be in the room all the same") == is_open


async def test_what_an_outage_of_the_bridge_made_too_old_is_not_given_up_at_its_first_failure(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halts, "PAUSES", (0.02,))
    assert courier.GRACE_SECONDS == 60.0
    rooms.always(refuse_connection)
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: rooms.sends)
    age(path, WEEK)
    rooms.always(None)
    rooms.then(refuse_connection, error(500, "M_UNKNOWN"), error(403, "M_USER_SUSPENDED", retry_after_ms=1))
    async with make(grace=10 * PATIENCE) as worker:
        await worker.settled()
        assert worker.states() == ["sent"]


async def test_encrypted_room_makes_dead_letters_and_does_not_stop_the_lane(make: MakeWorker, rooms: Rooms) -> None:
    rooms.encrypted[ROOM] = True
    async with make(refuse_encrypted=True) as worker:
        await worker.accept("a")
        await worker.accept("b", type_="m.room.encrypted")
        await worker.settled()
        assert worker.states() == ["dead", "sent"]
        assert rooms.tries() == ["b"]


@pytest.mark.parametrize("trouble", [cut_off(), unreachable()])
async def test_event_waits_until_somebody_can_tell_whether_the_room_is_encrypted(
    make: MakeWorker, rooms: Rooms, trouble: Any
) -> None:
    rooms.encrypted[ROOM] = trouble
    async with make(refuse_encrypted=True) as worker:
        await worker.accept("a")
        await until(lambda: len(rooms.looks) >= 3)
        assert rooms.sends == []
        rooms.encrypted[ROOM] = False
        await worker.settled()
        assert (worker.states(), rooms.bodies()) == (["sent"], ["a"])
        assert worker.lane().uncertain_since is None


async def test_what_goes_wrong_in_one_lane_stops_neither_it_nor_others(make: MakeWorker, rooms: Rooms) -> None:
    async def explode(rooms: Rooms, sent: Sent) -> Any:
        raise RuntimeError("a fault of ours")

    async with make() as worker:
        rooms.then(explode, explode)
        await worker.accept("a")
        await worker.accept("b", OTHER)
        await worker.settled()
        assert (rooms.bodies(), rooms.bodies(OTHER)) == (["a"], ["b"])


def test_pauses_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [module.pause_after(number) for number in range(200)]
    for pause, middle in zip(pauses, [0.5, 1, 2, 4, 8, 16, 32, *[60] * 193], strict=True):
        assert 0.8 * middle <= pause <= 1.2 * middle
    assert len(set(pauses[7:])) > 100  # not all at the same moment


# doubts


async def test_doubt_is_written_down_and_ends_with_the_event(make: MakeWorker, rooms: Rooms) -> None:
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(lose, after(answered))
        before = time.time()
        ticket = worker.offer("a")
        await until(lambda: len(rooms.sends) == 2)
        await until(lambda: worker.lane().uncertain_since)
        assert before - 0.1 < worker.lane().uncertain_since / 1000 <= time.time()
        assert worker.courier.lanes()["uncertain"] == 1
        answered.set()
        await soon(ticket.settled)
        await until(lambda: worker.lane().uncertain_since is None)
        assert worker.courier.lanes()["uncertain"] == 0


async def test_failure_before_anything_was_sent_is_no_doubt(make: MakeWorker, rooms: Rooms) -> None:
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(refuse_connection, slow(1), after(answered))
        ticket = worker.offer("a")
        await until(lambda: len(rooms.sends) == 3)
        assert worker.courier.lanes()["uncertain"] == 0
        answered.set()
        await soon(ticket.settled)


async def test_doubt_counts_from_the_first_attempt_and_survives_a_crash(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    rooms.always(lose)
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: worker.lane() and worker.lane().uncertain_since)
        first = worker.lane().uncertain_since
        await until(lambda: len(rooms.sends) >= 5)
        assert worker.lane().uncertain_since == first
        await worker.crash()
    rooms.forget()
    age(path, HOUR)
    rooms.always(None)
    tries = len(rooms.sends)
    async with make() as worker:
        await worker.settled()
    assert rooms.bodies() == ["a"]
    assert len(rooms.sends) == tries  # it was found in the room


async def test_attempt_that_a_stop_cuts_off_does_not_make_an_older_doubt_younger(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """The homeserver counts its 20 minutes from the first attempt, not from the last."""
    rooms.then(lose, silence)
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: len(rooms.sends) == 2 and worker.lane().uncertain_since)
        first = worker.lane().uncertain_since
        tell(path, "UPDATE lanes SET uncertain_since = uncertain_since - ?", HOUR)
        await worker.stop(0.0)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT uncertain_since FROM lanes").fetchall() == [(first - HOUR,)]


async def test_stop_that_cuts_an_attempt_off_leaves_a_doubt(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    rooms.then(silence)
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: rooms.sends)
        await worker.stop(0.0)
    with closing(sqlite3.connect(path)) as connection:
        ((owner, since),) = connection.execute("SELECT owner, uncertain_since FROM lanes").fetchall()
    assert owner is None
    assert abs(since / 1000 - time.time()) < 5


async def sent_but_not_written(worker: Worker, *bodies: str, room: str = ROOM, **how: Any) -> None:
    """Let these be on their way when the process dies: in the room, and queued in the store."""
    rooms = worker.rooms
    rooms.always(refuse_connection)
    tickets = [await worker.accept(body, room, **how) for body in bodies]
    await until(lambda: worker.lane(room) and worker.lane(room).owner)
    await worker.crash()
    rooms.always(None)
    for ticket in tickets:
        row = ticket.row
        rooms.store(Sent(ALICE.token, room, row.event_type, row.state_key, json.loads(row.content), row.txn_id))
    rooms.sends.clear()


async def test_all_that_a_dead_process_may_have_sent_is_looked_for(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    """Several events may have gone out before the first of their outcomes was written."""
    async with make() as worker:
        await sent_but_not_written(worker, "a", "b", "c")
    age(path, HOUR)
    rooms.forget()
    async with make() as worker:
        await worker.accept("d")
        await worker.settled()
    assert rooms.bodies() == ["a", "b", "c", "d"]
    assert rooms.tries() == ["d"]


async def test_states_that_a_dead_process_set_are_not_set_back(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        await sent_but_not_written(worker, "a", "b", type_="m.room.topic", state_key="")
    async with make() as worker:
        await worker.accept("c", type_="m.room.topic", state_key="")
        await worker.settled()
    assert rooms.bodies() == ["a", "b", "c"]


async def test_event_that_another_replica_accepted_by_a_faster_clock_is_in_doubt_too(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    async with make() as worker:
        await sent_but_not_written(worker, "a", "b")
    age(path, HOUR)
    tell(path, "UPDATE outbox SET accepted_at = ?", int(time.time() * 1000) + 30_000)
    rooms.forget()
    for event in rooms.timeline[ROOM]:
        event["origin_server_ts"] = int(time.time() * 1000)
    async with make() as worker:
        await worker.settled()
    assert rooms.bodies() == ["a", "b"]


async def test_refused_event_says_nothing_of_those_behind_it(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    """It was refused, they were sent, and the process died before any of that was written."""
    async with make() as worker:
        rooms.always(refuse_connection)
        await worker.accept("bad")
        await sent_but_not_written(worker, "a", "b")
    rooms.forget()
    age(path, HOUR)
    rooms.then(error(400, "M_BAD_JSON"))
    async with make() as worker:
        await worker.settled()
    assert rooms.bodies() == ["a", "b"]


async def test_look_ends_with_the_first_event_that_is_not_there(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    """Events go in order: if one was not sent, none behind it was."""
    async with make() as worker:
        await sent_but_not_written(worker, "a")
    async with make() as worker:
        rooms.always(refuse_connection)
        for body in "bcdef":
            await worker.accept(body)
        await worker.crash()
    rooms.always(None)
    rooms.looks.clear()
    rooms.forget()
    age(path, HOUR)
    async with make() as worker:
        await worker.settled()
    assert rooms.bodies() == ["a", "b", "c", "d", "e", "f"]
    assert rooms.looks == [("recent", ROOM)] * 3  # one page for a, which is there, two for b, and no more


async def test_what_was_accepted_since_is_not_looked_for(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.accept("a")
        await worker.settled()
        await worker.crash()
    age(path, HOUR)
    async with make() as worker:
        await until(lambda: worker.lane().fence == 2 and worker.lane().uncertain_since is None)
        assert await worker.send("b")
    assert rooms.looks == []


async def test_lane_with_nothing_in_it_is_in_no_doubt(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.send("a")
        await worker.settled()
        await worker.crash()
    async with make() as worker:
        await until(lambda: worker.lane().fence == 2 and worker.lane().uncertain_since is None)
        assert worker.courier.lanes()["uncertain"] == 0


async def test_fault_of_ours_after_the_request_went_out_leaves_a_doubt(make: MakeWorker, rooms: Rooms) -> None:
    async def explode(rooms: Rooms, sent: Sent) -> Any:
        rooms.store(sent)
        rooms.forget()
        raise RuntimeError("a fault of ours")

    async with make() as worker:
        rooms.then(explode)
        await worker.accept("a", caller=SERVICE)
        await worker.settled()
        assert rooms.bodies() == ["a"]


async def test_account_without_a_device_looks_after_a_crash_however_short(make: MakeWorker, rooms: Rooms) -> None:
    async with make() as worker:
        rooms.then(lose, refuse_connection, refuse_connection)
        await worker.accept("a", caller=SERVICE)
        await until(lambda: rooms.bodies() == ["a"])
        await worker.crash()
    rooms.always(None)
    rooms.forget()
    async with make() as worker:
        await worker.settled()
    assert rooms.bodies() == ["a"]


# in doubt, and refused: no answer to anything but its send ends an event


LOOKS_REFUSED = [(400, "M_INVALID_PARAM"), (403, "M_FORBIDDEN"), (404, "M_NOT_FOUND")]


@pytest.mark.parametrize(("status", "errcode"), LOOKS_REFUSED)
async def test_event_in_doubt_outlives_a_look_that_is_refused(
    make: MakeWorker, rooms: Rooms, status: int, errcode: str
) -> None:
    rooms.then(lose)
    rooms.reading = HomeserverError("no", errcode=errcode, status=status)
    async with make() as worker:
        ticket = worker.offer("a", caller=SERVICE)
        await until(lambda: len(rooms.looks) > 5)
        assert not ticket.settled.done(), "a caller who is told 4xx sends it once more"
        rooms.reading = None
        assert await worker.courier.wait(ticket, PATIENCE) == Outcome("sent", "$1")
        assert rooms.tries() == ["a"]


@pytest.mark.usefixtures("absences")
@pytest.mark.parametrize("waits", [True, False])
async def test_event_in_doubt_of_an_account_that_has_left_the_room_may_be_there(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(courier, "ABSENT_WAKE_SECONDS", 0.0)
    rooms.joined = False
    rooms.then(lose)
    rooms.reading = HomeserverError("no", errcode="M_FORBIDDEN", status=403)
    async with make() as worker:
        ticket = worker.offer("a", caller=SERVICE, waits=waits)
        if waits:
            assert await worker.courier.wait(ticket, PATIENCE)
        await worker.settled()
        assert len(rooms.looks) > 4, "nobody is told before the lane has waited for an invitation"
        told = json.loads(worker.rows("error")[0])
        assert told["status"] == 504, "a 4xx says that it is not in the room"
        assert told["error"].startswith("@service:hs is not in this room")
        assert told["error"].endswith("; it may be in the room all the same")


@pytest.mark.parametrize("refusal", [(403, "M_USER_SUSPENDED"), (401, "M_UNKNOWN_TOKEN")])
async def test_who_waits_for_an_event_in_doubt_is_not_told_that_the_account_is_refused(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str]
) -> None:
    monkeypatch.setattr(halts, "PAUSES", (0.02,))
    rooms.then(lose)
    rooms.script(lambda sent: error(*refusal) if sent.token == "alice" else None)
    async with make() as worker:
        ticket = worker.offer("a")
        await until(lambda: len(rooms.sends) > 3 or worker.carrier.distrusted)
        await until(lambda: ticket.history[1:])
        assert not ticket.settled.done(), "it is in the room"
        rooms.always(None)
        if refusal[0] == 401:
            worker.tokens.remember(DESK)
        assert await worker.courier.wait(ticket, PATIENCE) == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]


async def test_repeat_of_an_event_in_doubt_does_not_hear_that_another_was_refused(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way when the process died: this one has not tried it yet, and is looking for it."""
    async with make() as worker:
        await sent_but_not_written(worker, "a", key="k")
    age(path, HOUR)
    tell(path, "UPDATE outbox SET attempts = 0, history = '[]'")
    looks, page = asyncio.Event(), rooms.recent

    async def late(*which: Any, **how: Any) -> Any:
        rooms.looks.append(("recent", ROOM))
        await looks.wait()
        return await page(*which, **how)

    monkeypatch.setattr(rooms, "recent", late)
    rooms.script(lambda sent: error(403, "M_USER_SUSPENDED") if sent.room == OTHER else None)
    async with make() as worker:
        await until(lambda: rooms.looks)
        again = await worker.accept("a", key="k", waits=True)
        assert (await worker.send("b", OTHER) or Outcome("sent")).state == "dead"
        looks.set()
        assert await worker.courier.wait(again, PATIENCE) == Outcome("sent", "$1")
        assert rooms.bodies() == ["a"]


# outcomes on their way to the disk


async def test_dead_letter_is_written_with_its_time_however_fast_the_writer_is(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the year 1970 would be purged within the minute."""
    async with make() as worker:
        await worker.send("first")
        await worker.settled()
        warn = log.warning

        def slowly(action: str, **fields: Any) -> None:
            """Writing a line takes so long that the writer sees what is there so far."""
            deadline = time.monotonic() + PATIENCE
            while action == "event_dead" and len(worker.states()) < 2 and time.monotonic() < deadline:
                time.sleep(0.002)
            warn(action, **fields)

        monkeypatch.setattr(log, "warning", slowly)
        rooms.then(error(400, "M_BAD_JSON"))
        await worker.send("a")
        await worker.settled()
        assert worker.states() == ["sent", "dead"]
        assert worker.rows("settled_at")[1] > time.time() * 1000 - 60_000


async def test_outcome_that_the_store_refuses_is_tried_again_and_the_event_is_not_sent_again(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_queue, "AGAIN_SECONDS", 0.02)
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await worker.accept("a")
        await worker.accept("b")
        await until(lambda: rooms.sends)
        tell(path, "CREATE TRIGGER no BEFORE UPDATE OF state ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END")
        answered.set()
        await until(lambda: len(worker.write_queue.unwritten) == 2)
        tell(path, "UPDATE lanes SET dirty = 1")
        worker.courier.wake()  # the lane looks into the store, and finds them queued
        await until(lambda: not worker.lane().dirty)
        for _ in range(20):
            await asyncio.sleep(0.002)
        assert worker.states() == ["queued", "queued"]
        assert rooms.tries() == ["a", "b"]
        tell(path, "DROP TRIGGER no")
        await worker.settled()
        await until(lambda: not worker.write_queue.unwritten)
        assert await worker.send("c")
        assert rooms.tries() == ["a", "b", "c"]


async def test_refused_outcome_is_tried_once_more_at_the_end(
    make: MakeWorker, rooms: Rooms, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_queue, "AGAIN_SECONDS", 60.0)
    async with make() as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "CREATE TRIGGER no BEFORE UPDATE OF state ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END")
        answered.set()
        await until(lambda: worker.write_queue.unwritten)
        tell(path, "DROP TRIGGER no")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT state FROM outbox").fetchall() == [("sent",)]


@pytest.fixture
def refuses_outcomes(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`refuses(True)`: the store takes no event that was sent, and all else."""
    monkeypatch.setattr(write_queue, "AGAIN_SECONDS", 0.02)

    def refuses(yes: bool) -> None:
        fails = "BEFORE UPDATE OF state ON outbox WHEN NEW.state = 'sent' BEGIN SELECT RAISE(ABORT, 'no'); END"
        tell(path, f"CREATE TRIGGER no {fails}" if yes else "DROP TRIGGER no")

    return refuses


async def test_sent_event_is_not_given_up_while_the_store_has_not_taken_its_outcome(
    make: MakeWorker, rooms: Rooms, path: Path, refuses_outcomes: Callable[[bool], None]
) -> None:
    """Its age is over in the moment in which it is sent, and what was told is written behind what gives it up."""
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(after(answered))
        ticket = await worker.accept("a")
        await until(lambda: rooms.sends)
        age(path, WEEK)
        tell(path, "UPDATE lanes SET lease_until = lease_until + ?", WEEK)
        refuses_outcomes(True)
        with worker.busy_writer():
            answered.set()
            await until(lambda: worker.courier.lanes()["idle"])
            giving_up = asyncio.ensure_future(worker.courier.give_up([ticket.row.lane], ticket.row.accepted_at))
            await asyncio.sleep(0)
        assert await soon(giving_up) == 0
        await until(lambda: worker.write_queue.unwritten)
        refuses_outcomes(False)
        await worker.settled()
        assert (worker.states(), rooms.tries()) == (["sent"], ["a"])


@pytest.mark.parametrize("late", [True, False])
async def test_lane_is_not_given_back_before_its_outcomes_are_written(
    make: MakeWorker, rooms: Rooms, refuses_outcomes: Callable[[bool], None], late: bool
) -> None:
    """Without the lane they are void: the event would stay queued, and be sent once more."""
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(after(answered))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        refuses_outcomes(True)
        with worker.busy_writer() if late else contextlib.nullcontext():
            answered.set()
            await until(lambda: worker.courier.lanes()["idle"])
            await until(lambda: late or worker.write_queue.unwritten)
            worker.courier._end_longest_idle(10)
            await until(lambda: not worker.courier.lanes()["idle"])
        await until(lambda: worker.write_queue.unwritten)
        refuses_outcomes(False)
        await until(lambda: not worker.write_queue.unwritten)
        await worker.accept("b")
        worker.courier.wake()
        await worker.settled()
        assert rooms.tries() == ["a", "b"]
        assert set(worker.states()) == {"sent"}


async def test_outcome_that_the_store_refuses_to_the_end_leaves_a_doubt(
    make: MakeWorker, rooms: Rooms, refuses_outcomes: Callable[[bool], None]
) -> None:
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(after(answered))
        await worker.accept("a", caller=SERVICE)
        await until(lambda: rooms.sends)
        refuses_outcomes(True)
        answered.set()
        await until(lambda: worker.write_queue.unwritten)
    refuses_outcomes(False)
    rooms.forget()
    async with make() as worker:
        await worker.settled()
        assert (worker.states(), rooms.bodies()) == (["sent"], ["a"])


# the lease


async def test_nothing_is_sent_for_a_lane_that_may_be_anothers(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make(lease=1.0, deadline=0.2) as worker:
        rooms.then(cut)
        await worker.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET owner = 'other', fence = fence + 1, lease_until = ?", (time.time() + 600) * 1000)
        rooms.always(error(500, "M_UNKNOWN"))
        await until(lambda: not worker.courier.lanes()["sending"] and not worker.courier.lanes()["pause"])
        tries = len(rooms.sends)
        await worker.accept("b", OTHER)  # while the worker goes on with others
        await until(lambda: rooms.tries(OTHER))
        assert len(rooms.tries(ROOM)) <= tries
        assert worker.states()[0] == "queued"
        rooms.always(None)


async def test_nothing_is_sent_when_the_lease_ran_out_while_the_account_paused(make: MakeWorker, rooms: Rooms) -> None:
    async with make(lease=0.6, deadline=0.1) as worker:
        refused = asyncio.Event()
        rooms.then(after(refused, slow(800)))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        account = worker.tokens.remember(ALICE)
        with worker.busy_writer():  # so nobody prolongs it
            refused.set()
            await until(lambda: worker.carrier.pause_of(account))
            await until(lambda: not worker.carrier.pause_of(account))
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert len(rooms.sends) == 1
        await worker.settled()
        assert rooms.bodies() == ["a"]


async def test_lane_that_was_lost_is_taken_up_again_when_nobody_has_it(
    make: MakeWorker, rooms: Rooms, path: Path
) -> None:
    """As after a sleep of the whole machine."""
    async with make(lease=0.6, deadline=0.1) as worker:
        answered = asyncio.Event()
        rooms.then(after(answered))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        tell(path, "UPDATE lanes SET lease_until = 1")
        await worker.accept("b")
        answered.set()
        await worker.settled()
        assert rooms.bodies() == ["a", "b"]


@pytest.mark.parametrize("waits", [True, False])
async def test_event_whose_key_was_used_before_is_not_sent(make: MakeWorker, rooms: Rooms, waits: bool) -> None:
    async with make() as worker:
        await worker.send("a", key="k")
        again = await worker.accept("a", key="k", waits=waits)
        assert await worker.send("b") == Outcome("sent", "$2")
        assert (again.row.delivery, rooms.tries()) == (worker.rows("delivery")[0], ["a", "b"])


async def test_repeat_after_a_crash_is_not_sent_into_a_lane_in_doubt(make: MakeWorker, rooms: Rooms) -> None:
    """The usual case: the process died before it answered, and the caller asks again."""
    async with make() as worker:
        await worker.send("a", key="k")
        await worker.settled()
        await worker.crash()
    async with make() as worker:
        await until(lambda: worker.lane().fence == 2)
        await worker.accept("a", key="k")
        assert await worker.send("b")
    assert rooms.tries() == ["a", "b"]


async def test_keyed_event_is_not_sent_before_it_is_written(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.send("a")
        await worker.settled()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            keyed, plain = worker.offer("b", key="k"), worker.offer("c", OTHER)
            direct = worker.offer("d")
            await asyncio.sleep(0)
            assert await worker.courier.wait(worker.offer("e", OTHER), 0.1) is None
            assert rooms.tries(ROOM) == ["a"]  # neither it, nor what came after it
            connection.execute("ROLLBACK")
        for ticket in (keyed, plain, direct):
            assert (await soon(ticket.settled)).state == "sent"
        assert rooms.bodies() == ["a", "b", "d"]


async def test_event_without_a_key_need_not_wait_for_the_disk(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    async with make() as worker:
        await worker.send("a")
        await worker.settled()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            tickets = [worker.offer(str(number)) for number in range(5)]
            for ticket in tickets:
                assert (await soon(ticket.settled)).state == "sent"
            assert worker.states() == ["sent"]
            connection.execute("ROLLBACK")
        await until(lambda: worker.states() == ["sent"] * 6)  # written with their outcomes


async def test_stopping_lane_does_not_wait_for_a_pause_to_end(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 2 * PATIENCE)
    monkeypatch.setattr(module, "MAX_PAUSE", 2 * PATIENCE)
    monkeypatch.setattr(module, "REST_SECONDS", 3 * PATIENCE)  # so that the lane is not given back meanwhile
    answered = asyncio.Event()
    async with make() as worker:
        rooms.then(after(answered, cut))
        await worker.accept("a")
        await until(lambda: rooms.sends)
        asyncio.get_running_loop().call_later(0.05, answered.set)
        await soon(worker.stop(3 * PATIENCE))


# callers who wait behind what waits


@pytest.fixture
def invitations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane waits a minute for one, and may be woken for callers at once."""
    monkeypatch.setattr(courier, "ABSENT_WAKE_SECONDS", 0.0)


async def asleep(worker: Worker) -> None:
    """Until the lane rests."""
    await until(lambda: worker.lane() is not None and worker.lane().lease_until > time.time() * 1000 + 40_000)
    await until(lambda: worker.lane().owner is None)


@pytest.mark.usefixtures("invitations")
@pytest.mark.parametrize("key", [None, "key"])
@pytest.mark.parametrize("api_key", [None, "bot"])
async def test_caller_who_waits_behind_an_invitation_is_told_at_once(
    make: MakeWorker, rooms: Rooms, key: str | None, api_key: str | None
) -> None:
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN", "User not in room"))
    async with make() as worker:
        await worker.accept("queued", api_key=api_key)
        await asleep(worker)
        for number in range(6):  # more than there are waits for an invitation
            began = time.monotonic()
            outcome = await worker.send(f"plain {number}", key=key and f"{key} {number}", api_key=api_key)
            assert outcome is not None
            assert outcome.state == "dead"
            assert outcome.error is not None
            assert (outcome.error["status"], outcome.error["errcode"]) == (403, "M_FORBIDDEN")
            assert outcome.error["error"] == (
                f"@alice:hs is not in this room: invite @alice:hs, or POST /join/{ROOM} (User not in room)"
            )
            assert time.monotonic() - began < PATIENCE / 2
            await asleep(worker)
        assert set(rooms.tries()) == {"queued"}, "what is older goes first"
        await until(lambda: worker.states() == ["queued", *["dead"] * 6])
        rooms.joined = True
        rooms.always(None)
        await worker.accept("last", api_key=api_key)
        await worker.courier.joined(ALICE.user_id, ROOM)
        await worker.settled()
        assert rooms.bodies() == ["queued", "last"]


async def test_join_while_the_403_is_examined_is_not_missed(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABSENT_SECONDS", (10 * PATIENCE,))
    rooms.then(error(403, "M_FORBIDDEN"))
    async with make() as worker:

        async def late(token: str, room_id: str, user_id: str) -> bool:
            await worker.courier.joined(user_id, room_id)
            await until(lambda: not worker.courier._wanted)  # it is held already
            return False  # as it was when it was asked

        monkeypatch.setattr(rooms, "is_joined", late)
        await worker.accept("a")
        await worker.settled()
        assert worker.rows("state", "attempts") == [("sent", 2)]


async def test_join_before_an_attempt_does_not_keep_the_lane_awake(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    rooms.joined = False
    rooms.then(after(go))
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: rooms.sends)
        await worker.courier.joined(ALICE.user_id, ROOM)
        await worker.accept("b")
        go.set()
        await asleep(worker)
        assert rooms.tries() == ["a", "b"]


async def test_lane_is_not_woken_for_callers_more_often_than_every_two_seconds(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert courier.ABSENT_WAKE_SECONDS == 2.0
    monkeypatch.setattr(courier, "ABSENT_WAKE_SECONDS", 60.0)
    rooms.joined = False
    rooms.always(error(403, "M_FORBIDDEN"))
    async with make() as worker:
        await worker.accept("queued")
        await asleep(worker)
        for number in range(20):
            assert await worker.send(str(number), seconds=0.02) is None
        assert rooms.tries() == ["queued"]
        await worker.courier.joined("@bob:hs", ROOM)
        await worker.courier.joined(ALICE.user_id, OTHER)
        assert await worker.send("elsewhere", OTHER, caller=BOB, seconds=0.2) is not None
        assert rooms.tries(ROOM) == ["queued"]
        await worker.courier.joined(ALICE.user_id, ROOM)
        await until(lambda: rooms.tries(ROOM) == ["queued"] * 2)


async def test_lane_that_rests_after_failures_goes_on_for_a_caller_who_waits(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "WAKE_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(module, "MAX_PAUSE", 60.0)
    async with make() as worker:
        rooms.then(error(500, "M_UNKNOWN"))
        await worker.accept("a")
        await asleep(worker)
        assert await worker.send("b") == Outcome("sent", "$2")
        assert rooms.bodies() == ["a", "b"]


REFUSALS = [(403, "M_USER_SUSPENDED"), (403, "M_RESOURCE_LIMIT_EXCEEDED"), (401, "M_FORBIDDEN"), (409, "M_UNKNOWN")]


@pytest.mark.parametrize(("status", "errcode"), REFUSALS)
async def test_refusal_of_the_account_kills_nothing_that_is_queued(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, status: int, errcode: str
) -> None:
    monkeypatch.setattr(halts, "PAUSES", (0.02, 0.05))
    rooms.script(lambda sent: error(status, errcode, "No.") if sent.token == "alice" else None)
    async with make() as worker:
        for number in range(50):
            await worker.accept(str(number), f"!{number % 5}:hs")
        await until(lambda: len(rooms.sends) >= 5)
        account = worker.tokens.remember(ALICE)
        assert worker.carrier.refusals() == {account: f"No. ({errcode})"}
        assert await worker.send("b", OTHER, caller=BOB) == Outcome("sent", "$1")
        assert await worker.send("c", OTHER, api_key="key", seconds=0.1) is None, "its key is not at fault"
        rooms.always(None)
        await worker.settled()
        assert set(worker.states()) == {"sent"}
        assert worker.rows("attempts") == [1] * 52
        await until(lambda: worker.carrier.refusals() == {})


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


async def test_refused_account_waits_for_as_long_as_the_homeserver_asks(make: MakeWorker, rooms: Rooms) -> None:
    rooms.always(error(403, "M_CONSENT_NOT_GIVEN", retry_after_ms=90_000))
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: worker.carrier.pause_of(worker.tokens.remember(ALICE)) > 80)


async def test_caller_who_waits_with_a_token_of_its_own_hears_the_refusal_at_once(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halts, "KNOCK_SECONDS", 0.01)
    rooms.always(error(403, "M_CONSENT_NOT_GIVEN", "Agree first", consent_uri="https://hs/consent"))
    told = {
        "status": 403,
        "errcode": "M_CONSENT_NOT_GIVEN",
        "error": "Agree first",
        "consent_uri": "https://hs/consent",
    }
    async with make() as worker:
        first = await worker.send("a")
        assert first is not None
        assert first.error == told
        for number in range(30):
            await worker.accept("queued", f"!{number}:hs")
        for room in (ROOM, "!7:hs", "!new:hs"):
            outcome = await worker.send("b", room)
            assert outcome is not None
            assert (outcome.state, outcome.error) == ("dead", told)
        await until(lambda: worker.states().count("queued") == 30)
        rooms.always(None)
        assert (await worker.send("c", "!7:hs") or Outcome("dead")).state == "sent"
        await worker.settled()
        assert worker.states().count("dead") == 4


async def test_refusal_of_an_account_is_told_once_and_only_where_somebody_waits(
    make: MakeWorker, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the requests that are under way is refused; each time all lanes were gone through for each lane."""
    monkeypatch.setattr(halts, "PAUSES", (2 * PATIENCE,))
    monkeypatch.setattr(halts, "KNOCK_SECONDS", 2 * PATIENCE)
    told: list[str] = []
    tell = module.Lane.refuse_waiting

    def note(lane: module.Lane, found: Verdict) -> Any:
        told.append(lane.fence.lane.partition("|")[2])
        return tell(lane, found)

    monkeypatch.setattr(module.Lane, "refuse_waiting", note)
    go = asyncio.Event()
    rooms.always(after(go, error(403, "M_USER_SUSPENDED")))
    busy, quiet = [f"!{number}:hs" for number in range(30)], [f"!quiet-{number}:hs" for number in range(30)]
    async with make() as worker:
        tickets = [worker.offer("a", room) for room in busy for _ in range(3)]
        for room in quiet:
            worker.offer("a", room, waits=False)
        await until(lambda: sum(worker.courier.lanes()[kind] for kind in ("sending", "pause", "idle")) == 60)
        await until(lambda: len(rooms.sends) == attempt.FIRST)
        go.set()
        for ticket in tickets:
            outcome = await worker.courier.wait(ticket, PATIENCE)
            assert outcome is not None
            assert outcome.error is not None
            assert outcome.error["errcode"] == "M_USER_SUSPENDED"
        assert sorted(told) == sorted(busy)
        await worker.crash()


async def test_thousands_who_wait_are_told_without_holding_up_others(make: MakeWorker, rooms: Rooms) -> None:
    go, turns = asyncio.Event(), 0
    rooms.always(after(go, error(403, "M_USER_SUSPENDED")))

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with make() as worker:
        tickets = [worker.offer(str(number)) for number in range(10 * module.TOLD)]
        await until(lambda: rooms.sends)
        told: list[int] = []
        for ticket in tickets:
            ticket.settled.add_done_callback(lambda _: told.append(turns))
        meanwhile = asyncio.ensure_future(others())
        go.set()
        await until(lambda: len(told) == len(tickets))
        meanwhile.cancel()
        assert len(set(told)) >= 10
        await worker.crash()


def test_those_who_wait_for_a_lane_are_found_without_looking_at_all_others() -> None:
    """1,500 lanes of an account, each asked for its own among 3,000 tickets, took five seconds."""

    class Watched(Ticket):
        looked_at = 0

        @property
        def settled(self) -> Any:
            Watched.looked_at += 1
            return self.__dict__["settled"]

        @settled.setter
        def settled(self, future: Any) -> None:
            self.__dict__["settled"] = future

    tickets, loop = Tickets(), asyncio.new_event_loop()
    for number in range(1_000):
        room = f"!{number % 500}:hs"
        row = Row(str(number), f"alice|{room}", "alice", room, "m.room.message", None, b"{}", str(number), 1)
        tickets.know(Watched(row, loop.create_future(), loop.create_future(), waiters=1))
    Watched.looked_at = 0
    assert [ticket.row.delivery for ticket in tickets.waiting_in("alice|!7:hs")] == ["7", "507"]
    assert tickets.waiting_in("alice|!unknown:hs") == []
    assert Watched.looked_at <= 4
    for ticket in tickets.waiting():
        ticket.waiters = 0
        tickets.leave(ticket)
    assert (tickets._by_delivery, tickets._by_lane) == ({}, {})
    loop.close()


async def test_refused_account_dies_of_age_only(make: MakeWorker, rooms: Rooms, path: Path) -> None:
    rooms.always(error(403, "M_USER_SUSPENDED"))
    async with make() as worker:
        await worker.accept("a")
        await until(lambda: rooms.sends)
    age(path, WEEK)
    async with make() as worker:
        await worker.settled()
        assert worker.states() == ["dead"]
