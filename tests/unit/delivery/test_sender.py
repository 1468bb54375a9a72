"""Which token of an account its lanes are sent with, and that none of them doubles what another one sent."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from flowbridge.auth.tokens import digest_of
from flowbridge.delivery.pending import Outcome
from flowbridge.models import Caller
from flowbridge.store.accounts import account_of
from tests.rig import (
    ALICE,
    DESK,
    ROOM,
    Behaviour,
    MakeRig,
    Rig,
    Rooms,
    Sent,
    accept,
    cut,
    error,
    lose,
    refuse_connection,
    until,
)

ACCOUNT = account_of(ALICE.user_id)
WEEK = 7 * 86_400_000
BAD = error(401, "M_UNKNOWN_TOKEN", "it was logged out")


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flowbridge.db"


@pytest.fixture
def make(rooms: Rooms, path: Path) -> MakeRig:
    return MakeRig(f"sqlite:///{path}", rooms)


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.01, token_pause=0.05)


def only(rooms: Rooms, *good: Caller, first: Behaviour | None = None) -> None:
    """From now on the homeserver accepts these alone; the first send of theirs behaves like this."""
    tokens, ahead = {caller.token for caller in good}, [first] if first else []

    def script(sent: Sent) -> Behaviour:
        if sent.token not in tokens:
            return BAD
        return ahead.pop() if ahead else accept

    rooms.script(script)


def looks(rooms: Rooms) -> int:
    return rooms.looks.count(("recent", ROOM))


def sent_with(rig: Rig) -> str:
    return str(rig.lane().sent_with)


async def test_events_of_a_logged_out_device_go_out_with_another_one_of_the_user(make: MakeRig, rooms: Rooms) -> None:
    only(rooms)
    async with make() as rig:
        for body in "abc":
            await rig.accept(body)
        await until(lambda: rig.account_limits.distrusted)
        only(rooms, DESK)
        rig.tokens.remember(DESK)
        await rig.settled()
        assert rooms.bodies() == ["a", "b", "c"]


async def test_events_of_a_token_that_was_renewed_go_out_after_a_restart(make: MakeRig, rooms: Rooms) -> None:
    only(rooms)
    async with make() as rig:
        for body in "abc":
            await rig.accept(body)
        await until(lambda: rig.account_limits.distrusted)
        await rig.stop()
    only(rooms, DESK)
    async with make() as rig:
        await rig.accept("d", caller=DESK)
        await rig.settled()
        assert rooms.bodies() == ["a", "b", "c", "d"]
        assert rooms.tries()[-4:] == ["a", "b", "c", "d"]


async def test_refused_token_stays_refused_over_a_restart(make: MakeRig, rooms: Rooms) -> None:
    only(rooms)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rig.account_limits.distrusted)
        await rig.stop()
    only(rooms, ALICE)
    async with make() as rig:
        await until(lambda: rig.account_limits.distrusted)
        assert await rig.tokens.identity(ALICE.token) is None
        assert len(rooms.sends) == 1
        rig.tokens.remember(ALICE)
        await rig.settled()
        assert rooms.bodies() == ["a"]


@pytest.mark.parametrize("txn_ids", [True, False])
async def test_event_that_the_old_token_may_have_sent_is_looked_for_by_the_new_one(
    make: MakeRig, rooms: Rooms, *, txn_ids: bool
) -> None:
    rooms.shows_txn_ids = txn_ids
    rooms.then(lose, BAD)
    async with make() as rig:
        await rig.accept("a")
        await rig.accept("b")
        await until(lambda: rig.account_limits.distrusted)
        rig.tokens.remember(DESK)
        await rig.settled()
        assert rooms.bodies() == ["a", "b"]
        assert rooms.tries() == ["a", "a", "b"]
        assert looks(rooms) >= 1


async def test_event_that_the_old_token_did_not_send_after_all_is_sent_by_the_new_one(
    make: MakeRig, rooms: Rooms
) -> None:
    rooms.then(cut, BAD)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: rig.account_limits.distrusted)
        rig.tokens.remember(DESK)
        await rig.settled()
        assert rooms.bodies() == ["a"]
        assert looks(rooms) >= 1


@pytest.mark.parametrize("first", [lose, cut])
async def test_lost_answers_to_two_tokens_in_turn_double_nothing_over_a_crash(
    make: MakeRig, rooms: Rooms, first: Behaviour
) -> None:
    rooms.then(first, BAD)
    async with make() as rig:
        await rig.accept("a")
        await rig.accept("b")
        await until(lambda: rig.account_limits.distrusted)
        rooms.reading = None
        only(rooms, DESK, first=lose)
        rig.tokens.remember(DESK)
        await until(lambda: len(rooms.timeline[ROOM]) >= 1)
        await rig.crash()
    only(rooms, replace(ALICE, token="third"))
    rooms.users["third"] = (ALICE.user_id, "THIRD")
    async with make() as rig:
        rig.tokens.remember(replace(ALICE, token="third", device_id="THIRD"))
        await rig.settled()
        assert rooms.bodies() == ["a", "b"]


async def test_crash_between_request_and_answer_is_looked_into_by_another_token(make: MakeRig, rooms: Rooms) -> None:
    async with make(lease=6.0, deadline=0.5) as rig:
        await rig.send("before")
        await rig.settled()
        rooms.then(lose)
        rooms.always(refuse_connection)
        await rig.accept("a")
        await until(lambda: len(rooms.timeline[ROOM]) == 2)
        await rig.crash()
    only(rooms, DESK)
    async with make() as rig:
        rig.tokens.remember(DESK)
        await rig.settled()
        assert rooms.bodies() == ["before", "a"]
        assert looks(rooms) >= 1


async def test_same_token_goes_on_after_a_crash_without_a_look(make: MakeRig, rooms: Rooms) -> None:
    """The homeserver's memory of transactions is enough then: a look at each start would cost a page for each room."""
    rooms.then(lose, *[refuse_connection] * 3)
    async with make() as rig:
        await rig.accept("a")
        await until(lambda: len(rooms.sends) >= 2)
        await rig.crash()
    async with make() as rig:
        await rig.settled()
        assert rooms.bodies() == ["a"]
        assert looks(rooms) == 0


async def test_token_is_in_the_store_before_the_first_event_that_it_sends(make: MakeRig, rooms: Rooms) -> None:
    seen: list[str] = []
    async with make() as rig:

        def look(sent: Sent) -> None:
            seen.append(sent_with(rig))

        rooms.script(look)
        assert await rig.send("a") == Outcome("sent", "$1")
        assert await rig.send("b", caller=DESK) == Outcome("sent", "$2")
        assert await rig.send("c", caller=DESK) == Outcome("sent", "$3")
        assert await rig.send("d") == Outcome("sent", "$4")
        assert seen == [digest_of(token) for token in ("alice", "desk", "desk", "alice")]


async def test_event_without_a_good_token_for_a_week_is_dead_and_says_why(
    make: MakeRig, rooms: Rooms, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only(rooms)
    async with make() as rig:
        for body in "abc":
            await rig.accept(body)
        await until(lambda: rig.account_limits.distrusted)
        await rig.stop()
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        connection.execute("UPDATE outbox SET accepted_at = accepted_at - ? WHERE content NOT LIKE '%\"c\"%'", [WEEK])
    async with make() as rig:
        await until(lambda: rig.states() == ["dead", "dead", "queued"])
        for told in rig.rows("error")[:2]:
            problem = json.loads(told)
            assert problem["status"] == 504
            assert problem["error"].startswith("it was not delivered within 7 days: ")
            assert "no access token of its account is accepted" in problem["error"]
    assert [record.message for record in caplog.records].count("event_dead") == 2
