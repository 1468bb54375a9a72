"""flowbridge.delivery.attempt: one attempt. What it asks, what it sends, and what it makes of the answer."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import insert

from flowbridge.auth.tokens import digest_of
from flowbridge.delivery import encryption
from flowbridge.delivery.account_limits import FIRST
from flowbridge.delivery.attempt import Attempt
from flowbridge.delivery.breaker import FAILURES
from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver import answers as verdicts
from flowbridge.homeserver.answers import Verdict
from flowbridge.homeserver.pool import Answer
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.store import Row, accounts, tables
from flowbridge.store.clock import now_ms
from tests.rig import (
    ALICE,
    BOB,
    DESK,
    KEY,
    PATIENCE,
    ROOM,
    SERVICE,
    Behaviour,
    MakeRig,
    Rig,
    Rooms,
    after,
    cut,
    cut_off,
    error,
    lose,
    raw,
    refuse_connection,
    reply,
    silence,
    slow,
    soon,
    unreachable,
    until,
)

LONG_AGO = 20 * 60 + 1  # seconds after which a homeserver may have forgotten a transaction id
HTML = Answer(404, ((b"content-type", b"text/html"),), b"<html>")


async def carry(rig: Rig, row: Row, since: float | None = None, *, still: bool = True) -> Verdict | None:
    """One attempt; `since`: for how many seconds the event has been in doubt."""
    doubt = None if since is None else time.time() - since
    return await asyncio.wait_for(rig.attempt(Attempt(row, doubt), still=still), PATIENCE)


async def verdict(rig: Rig, body: str = "a", since: float | None = None, **how: Any) -> Verdict:
    found = await carry(rig, rig.pending(body, **how).row, since)
    assert found is not None
    return found


# what an answer means (design, "Verdicts")

AGAIN_PERHAPS_SENT: dict[str, Behaviour] = {
    "200 without an event_id": raw(reply(200, {})),
    "200 with an empty event_id": raw(reply(200, {"event_id": ""})),
    "200 with an event_id that no database holds": raw(reply(200, {"event_id": "$\0\ud800"})),
    "200 of a proxy": raw(Answer(200, (), b"<html>welcome</html>")),
    "302": raw(Answer(302, ((b"location", b"https://elsewhere/"),), b"")),
    "404 of a proxy": raw(HTML),
    "403 of a proxy": raw(replace(HTML, status=403)),
    "401 of a proxy": raw(replace(HTML, status=401)),
    "404 of a path": error(404, "M_UNRECOGNIZED"),
    "405 of a path": error(405, "M_UNRECOGNIZED"),
    "500 M_UNKNOWN": error(500, "M_UNKNOWN"),
    "503 M_FORBIDDEN": error(503, "M_FORBIDDEN"),
    "502 of a proxy": raw(replace(HTML, status=502)),
    "timeout, reset": cut,
}
DEAD: dict[str, Behaviour] = {
    "400 M_BAD_JSON": error(400, "M_BAD_JSON"),
    "400 M_NOT_JSON": error(400, "M_NOT_JSON"),
    "400 M_INVALID_PARAM": error(400, "M_INVALID_PARAM"),
    "413 M_TOO_LARGE": error(413, "M_TOO_LARGE"),
}
TOKEN: dict[str, Behaviour] = {
    name: error(401, name) for name in ("M_UNKNOWN_TOKEN", "M_MISSING_TOKEN", "M_USER_LOCKED")
}


async def test_verdict_over_each_line_of_the_table(make: MakeRig) -> None:
    async with make() as rig:
        assert await verdict(rig) == Verdict("sent", "$1")
        for name, behaviour in AGAIN_PERHAPS_SENT.items():
            rig.rooms.then(behaviour)
            found = await verdict(rig)
            assert (found.kind, found.error and found.error.sent) == ("again", True), name
        rig.rooms.then(refuse_connection)
        found = await verdict(rig)
        assert (found.kind, found.error and found.error.sent) == ("again", False)
        for name, behaviour in DEAD.items():
            rig.rooms.then(behaviour)
            found = await verdict(rig)
            assert found.kind == "dead", name
            assert found.error is not None
            assert found.error.body() == {"errcode": name.split()[1], "error": "no"}


@pytest.mark.parametrize("errcode", TOKEN)
async def test_refused_token_pauses_the_account(make: MakeRig, errcode: str) -> None:
    async with make() as rig:
        rig.rooms.then(TOKEN[errcode])
        assert (await verdict(rig)).kind == "token"
        assert list(rig.account_limits.distrusted) == [accounts.account_of(ALICE.user_id)]
        assert 4 < rig.account_limits.pause_of(accounts.account_of(ALICE.user_id)) <= 5
        assert rig.account_limits.pause_of(accounts.account_of(BOB.user_id)) == 0


@pytest.mark.parametrize(
    ("joined", "kind"), [(True, "forbidden"), (False, "absent"), (cut_off(), "forbidden")], ids=["in", "out", "unknown"]
)
async def test_403_is_final_unless_the_account_is_not_in_the_room(
    make: MakeRig, joined: bool | MatrixError, kind: str
) -> None:
    async with make() as rig:
        rig.rooms.joined = joined
        rig.rooms.then(error(403, "M_FORBIDDEN"))
        assert (await verdict(rig)).kind == kind


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ([], {"retry_after_ms": 1_500}, 1.5),
        ([(b"retry-after", b"2")], {"retry_after_ms": 1_500}, 2.0),
        ([(b"retry-after", b"2")], {}, 2.0),
        ([], {}, 0.5),
        ([], {"retry_after_ms": -1}, 0.5),
        ([], {"retry_after_ms": 10**9}, 600.0),
    ],
)
async def test_429_pauses_the_account_for_as_long_as_it_says_and_a_bit(
    make: MakeRig, headers: list[tuple[bytes, bytes]], body: dict[str, Any], seconds: float
) -> None:
    async with make() as rig:
        rig.rooms.then(raw(reply(429, {"errcode": "M_LIMIT_EXCEEDED", "error": "slow", **body}, *headers)))
        found = await verdict(rig)
        assert (found.kind, found.pause_ms) == ("slow", seconds * 1000)
        assert seconds * 0.9 < rig.account_limits.pause_of(accounts.account_of(ALICE.user_id)) <= seconds * 1.02
        assert rig.account_limits.pause_of(accounts.account_of(BOB.user_id)) == 0
        assert (await verdict(rig, caller=BOB)).kind == "sent"


async def test_no_request_goes_out_between_a_429_and_the_end_of_its_pause(make: MakeRig) -> None:
    async with make() as rig:
        answered = asyncio.Event()
        rig.rooms.script(lambda _: after(answered, slow(60_000)))
        tasks = [asyncio.ensure_future(carry(rig, rig.pending("a").row)) for _ in range(FIRST + 20)]
        await until(lambda: len(rig.rooms.sends) == FIRST)
        answered.set()
        await until(lambda: sum(task.done() for task in tasks) == FIRST)
        assert len(rig.rooms.sends) == FIRST
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# tokens


async def test_account_goes_on_at_once_with_a_new_token(make: MakeRig) -> None:
    make.tune(token_pause=2 * PATIENCE)
    async with make() as rig:
        rig.rooms.script(lambda sent: None if sent.token == "new" else error(401, "M_UNKNOWN_TOKEN"))
        assert (await verdict(rig)).kind == "token"
        waiting = asyncio.ensure_future(carry(rig, rig.pending("a").row))
        await asyncio.sleep(0)
        rig.tokens.remember(replace(ALICE, token="new"))
        found = await soon(waiting)
        assert found.kind == "sent"
        assert rig.account_limits.distrusted == {}


async def test_token_that_another_process_was_given_is_used_after_the_pause(make: MakeRig) -> None:
    async def forget(account: str, token: str) -> None:
        rig.tokens.forget(account)

    make.tune(token_pause=0.05)
    async with make(on_distrust=forget) as rig:
        rig.rooms.script(lambda sent: None if sent.token == "new" else error(401, "M_UNKNOWN_TOKEN"))
        row = rig.pending("a").row
        assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        await write_token(rig, replace(ALICE, token="new"))
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"


async def write_token(rig: Rig, caller: Caller) -> None:
    """As another process does that shares the store."""
    account = {
        "account": accounts.account_of(caller.user_id),
        "user_id": caller.user_id,
        "device_id": caller.device_id,
        "token": Fernet(KEY).encrypt(caller.token.encode()).decode(),
        "token_hash": accounts.token_hash(caller.token),
        "seen_at": now_ms(),
    }
    await rig.database.run(lambda connection: accounts.remember(connection, account))


async def test_account_whose_token_is_not_in_the_store_is_paused(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row._replace(account="nobody")
        found = await carry(rig, row)
        assert found is not None
        assert (found.kind, rig.rooms.sends) == ("token", [])
        assert list(rig.account_limits.distrusted) == ["nobody"]


async def test_refused_token_is_told_once_a_pause_and_not_at_each_answer(make: MakeRig) -> None:
    """Whoever is told logs in anew; if that is refused just so, it must not become a storm of logins."""
    make.tune(token_pause=0.2)
    told: list[float] = []
    numbers = iter(range(10_000))

    async def log_in(account: str, token: str) -> None:
        told.append(time.monotonic())
        rig.tokens.forget(account)
        rig.tokens.remember(replace(ALICE, token=f"new-{next(numbers)}"))

    async with make(on_distrust=log_in) as rig:
        rig.rooms.always(error(401, "M_USER_LOCKED"))
        row = rig.pending("a").row
        answers = 0
        while len(told) < 4:
            await carry(rig, row)
            answers += 1
        pauses = [later - earlier for earlier, later in pairwise(told)]
        assert min(pauses) > 0.2 / 4, pauses
        assert answers > len(told)


async def test_refused_token_is_not_tried_again_until_the_homeserver_has_said_whose_it_is(make: MakeRig) -> None:
    make.tune(token_pause=0.01)
    refused: list[str] = []
    async with make(on_refused=refused.append) as rig:
        rig.rooms.then(error(401, "M_USER_LOCKED", "it is locked"))
        row = rig.pending("a").row
        for _ in range(3):
            assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        assert (len(rig.rooms.sends), refused) == (1, ["alice"])
        assert rig.account_limits.waits_for(row.account) == "no access token of its account is accepted: it is locked"
        rig.tokens.remember(ALICE)  # as whoever asks the homeserver does
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"
        assert rig.account_limits.waits_for(row.account) == ""


async def test_another_token_of_the_user_sends_what_one_that_is_refused_cannot(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        rig.tokens.remember(DESK)
        rig.rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.token == "desk" else None)
        assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        assert rig.account_limits.distrusted == {}
        assert rig.account_limits.pause_of(row.account) == 0
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"
        assert [sent.token for sent in rig.rooms.sends] == ["desk", "alice"]


async def test_event_is_sent_with_the_token_that_its_caller_came_with(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        rig.tokens.remember(DESK)
        for own in ("alice", "desk", "unknown", ""):
            assert await rig.attempt(Attempt(row, own=own))
        assert [sent.token for sent in rig.rooms.sends] == ["alice", "desk", "desk", "desk"]


async def test_caller_who_waits_is_not_sent_with_another_token_when_its_own_is_refused(make: MakeRig) -> None:
    """Else a token that was logged out would go on to send as long as the user has another one."""
    async with make() as rig:
        row = rig.pending("a").row
        rig.tokens.remember(DESK)
        rig.tokens.refuse(row.account, "alice")
        found = await rig.attempt(Attempt(row, own="alice", waits=True))
        assert found is not None
        assert (found.kind, rig.rooms.sends, rig.account_limits.distrusted) == ("token", [], {})


@pytest.mark.parametrize(("sent_with", "looks"), [(None, 0), (digest_of("alice"), 0), (digest_of("desk"), 1), ("", 1)])
async def test_room_is_looked_into_when_another_token_may_have_sent_the_event(
    make: MakeRig, sent_with: str | None, looks: int
) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        found = await rig.attempt(Attempt(row, time.time(), sent_with))
        assert found == Verdict("sent", "$1")
        assert rig.rooms.looks == [("recent", ROOM)] * looks


async def test_store_that_does_not_answer_is_a_reason_to_try_again(make: MakeRig) -> None:
    async with make(deadline=0.05) as rig:
        row = rig.pending("a").row
        await rig.database.run(lambda connection: None)
        rig.tokens.forget(row.account)
        with rig.busy_writer():
            found = await carry(rig, row)
        assert found is not None
        assert (found.kind, found.error and found.error.sent) == ("again", False)
        assert rig.rooms.sends == []


# the circuit


@pytest.fixture
def quick_probe(make: MakeRig) -> None:
    make.tune(first_probe_pause=0.01, max_probe_pause=0.01)


@pytest.mark.usefixtures("quick_probe")
async def test_after_five_failures_to_connect_only_versions_are_asked_for(make: MakeRig) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        rooms.version = unreachable()
        for number in range(FAILURES):
            assert not rig.breaker.is_open, number
            await verdict(rig)
        assert rig.breaker.is_open
        assert rig.account_limits.pause_of("anybody") == float("inf")
        tasks = [asyncio.ensure_future(carry(rig, rig.pending("a", caller=BOB).row)) for _ in range(10)]
        await until(lambda: rooms.looks.count(("versions", "")) >= 3)
        assert len(rooms.sends) == FAILURES
        rooms.always(None)
        rooms.version = None
        for task in tasks:
            assert (await soon(task)).kind == "sent"
        assert not rig.breaker.is_open


@pytest.mark.usefixtures("quick_probe")
async def test_after_an_outage_the_first_goes_alone(make: MakeRig) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        for _ in range(FAILURES):
            await verdict(rig)
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        rooms.sends.clear()
        tasks = [asyncio.ensure_future(carry(rig, rig.pending("a").row)) for _ in range(50)]
        await until(lambda: rooms.sends)
        await until(lambda: not rig.breaker.is_open)
        assert len(rooms.sends) == 1
        answered.set()
        for task in tasks:
            assert (await soon(task)).kind == "sent"


@pytest.mark.parametrize("answer", ["429", "500", "a proxy's", "a timeout"])
async def test_any_answer_shows_that_the_homeserver_is_there(make: MakeRig, answer: str) -> None:
    behaviours = {"429": slow(1), "500": error(500, "M_UNKNOWN"), "a proxy's": raw(HTML), "a timeout": cut}
    async with make() as rig:
        for _ in range(FAILURES - 1):
            rig.rooms.then(refuse_connection)
            await verdict(rig)
        rig.rooms.then(behaviours[answer], refuse_connection)
        await verdict(rig)
        await verdict(rig)
        assert not rig.breaker.is_open


async def test_proxy_that_refuses_a_look_up_does_not_make_the_homeserver_be_away(make: MakeRig) -> None:
    """One room that a firewall does not like must not stop all others."""
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted["!bad:hs"] = verdicts.error(HTML)
        for _ in range(2 * FAILURES):
            assert (await verdict(rig, room="!bad:hs")).kind == "again"
        assert not rig.breaker.is_open


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize("odd", [HomeserverError("slow", errcode="M_LIMIT_EXCEEDED", status=429), RuntimeError("")])
async def test_probing_ends_whatever_the_probe_brings(make: MakeRig, odd: Exception) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        rooms.version = odd  # type: ignore[assignment]
        for _ in range(FAILURES):
            await verdict(rig)
        await until(lambda: rooms.looks)
        rooms.always(None)
        if not isinstance(odd, MatrixError):
            rooms.version = None
        assert (await verdict(rig)).kind == "sent"


# was it sent already?


async def test_within_20_minutes_it_is_sent_again_under_the_same_id(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        rig.rooms.then(lose)
        assert (await carry(rig, row) or Verdict("dead")).kind == "again"
        assert await carry(rig, row, LONG_AGO - 10) == Verdict("sent", "$1")
        assert rig.rooms.bodies() == ["a"]
        assert rig.rooms.looks == []


@pytest.mark.parametrize("shows_txn_ids", [True, False])
async def test_later_the_room_is_looked_into_first(make: MakeRig, shows_txn_ids: bool) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.shows_txn_ids = shows_txn_ids
        row = rig.pending("a").row
        rooms.then(lose)
        await carry(rig, row)
        rooms.forget()
        assert await carry(rig, row, LONG_AGO) == Verdict("sent", "$1")
        assert len(rooms.sends) == 1


async def test_token_without_a_device_looks_however_short_the_doubt_is(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a", caller=SERVICE).row
        rig.rooms.then(lose)
        await carry(rig, row)
        rig.rooms.forget()
        assert await carry(rig, row, 0.0) == Verdict("sent", "$1")
        assert len(rig.rooms.sends) == 1


async def test_what_is_not_in_the_room_is_sent_and_the_lane_hears_that_it_was_looked_for(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        attempts = [Attempt(row, since) for since in (time.time() - LONG_AGO, time.time(), None)]
        for attempt in attempts:
            assert await rig.attempt(attempt) == Verdict("sent", "$1")
        assert [attempt.looked for attempt in attempts] == [True, False, False]


def other_txn(rooms: Rooms, body: str) -> None:
    rooms.put(body, _txn=((ALICE.user_id, ALICE.device_id), "another"))


OTHERS: dict[str, Callable[[Rooms], Any]] = {
    "somebody else's": lambda rooms: rooms.put("a", sender="@mallory:hs"),
    "of another type": lambda rooms: rooms.put("a", type="m.sticker"),
    "with other content": lambda rooms: rooms.put("b"),
    "from before it was accepted": lambda rooms: rooms.put("a", origin_server_ts=now_ms() - 120_000),
    "of ours by another transaction id": lambda rooms: other_txn(rooms, "a"),
    "redacted": lambda rooms: rooms.put("a", content={}),
    "malformed": lambda rooms: rooms.put("a", origin_server_ts="now", type=7, content=None),
    "without a time": lambda rooms: rooms.put("a", origin_server_ts=None),
}


@pytest.mark.parametrize("which", OTHERS)
async def test_another_event_is_not_taken_for_it(make: MakeRig, which: str) -> None:
    async with make() as rig:
        OTHERS[which](rig.rooms)
        assert await carry(rig, rig.pending("a").row, LONG_AGO) == Verdict("sent", "$2")


async def test_redacted_event_is_found_by_its_transaction_id(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        rig.rooms.put("", content={}, _txn=((ALICE.user_id, ALICE.device_id), row.txn_id))
        assert await carry(rig, row, LONG_AGO) == Verdict("sent", "$1")


async def test_equal_event_that_the_lane_has_sent_is_not_taken_for_it(make: MakeRig) -> None:
    async with make() as rig:
        rig.rooms.shows_txn_ids = False
        await rig.send("again and again")
        await rig.settled()
        row = rig.pending("again and again").row
        assert await carry(rig, row, LONG_AGO) == Verdict("sent", "$2")
        assert rig.rooms.bodies() == ["again and again"] * 2


async def test_of_two_equal_events_in_doubt_the_older_is_the_older(make: MakeRig) -> None:
    async with make() as rig:
        for _ in range(2):
            rig.rooms.put("a")
        first = rig.pending("a").row
        assert await carry(rig, first, LONG_AGO) == Verdict("sent", "$1")
        settled = {**rig.pending("a").values(), "state": "sent", "event_id": "$1", "settled_at": now_ms()}
        await rig.database.run(lambda connection: connection.execute(insert(tables.outbox), [settled]))
        assert await carry(rig, rig.pending("a").row, LONG_AGO) == Verdict("sent", "$2")
        assert rig.rooms.sends == []


async def test_look_goes_back_to_where_the_event_was_accepted_and_no_further(make: MakeRig) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.page_size = 10
        for number in range(30):
            rooms.put(str(number), sender="@old:hs", origin_server_ts=now_ms() - 120_000)
        row = rig.pending("a").row
        rooms.put("a")
        for number in range(35):
            rooms.put(str(number), sender="@talkative:hs")
        assert await carry(rig, row, LONG_AGO) == Verdict("sent", "$31")
        assert len(rooms.looks) == 5  # 36 events since then; the first page of 10 older ones is the last that is read


async def test_look_does_not_stop_at_an_event_with_a_wrong_time(make: MakeRig) -> None:
    """Its homeserver gives an event any time it likes: a look that believed it would double ours."""
    async with make() as rig:
        rooms = rig.rooms
        rooms.page_size = 2
        rooms.put("a")
        rooms.put("from 1970", sender="@mallory:hs", origin_server_ts=0)
        rooms.put("new", sender="@bob:hs")
        assert await carry(rig, rig.pending("a").row, LONG_AGO) == Verdict("sent", "$1")
        assert rooms.sends == []


STATES: dict[str, Callable[[Rooms], Any]] = {
    "nothing": lambda rooms: None,
    "of another key": lambda rooms: rooms.put("a", type="m.room.topic", state_key="other"),
    "no state": lambda rooms: rooms.put("a", type="m.room.topic"),
    "another content": lambda rooms: rooms.put("b", type="m.room.topic", state_key=""),
    "somebody else's": lambda rooms: rooms.put("a", type="m.room.topic", state_key="", sender="@mallory:hs"),
}


async def test_state_that_was_set_is_not_set_again_however_short_the_doubt_is(make: MakeRig) -> None:
    """It has no transaction id that would protect it, and something else may have been set since."""
    async with make() as rig:
        row = rig.pending("a", type_="m.room.topic", state_key="").row
        rig.rooms.then(lose)
        await carry(rig, row)
        rig.rooms.put("b", type="m.room.topic", state_key="")
        assert await carry(rig, row, 0.0) == Verdict("sent", "$1")
        assert len(rig.rooms.sends) == 1


@pytest.mark.parametrize("which", STATES)
async def test_state_that_was_not_set_is_set_after_a_look(make: MakeRig, which: str) -> None:
    async with make() as rig:
        STATES[which](rig.rooms)
        row = rig.pending("a", type_="m.room.topic", state_key="").row
        assert (await carry(rig, row, 0.0) or Verdict("dead")).kind == "sent"
        assert [len(rig.rooms.sends), rig.rooms.looks[0]] == [1, ("recent", ROOM)]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (cut_off(), "again"),
        (unreachable(), "again"),
        (HomeserverError("no", errcode="M_UNKNOWN", status=500), "again"),
        (HomeserverError("no", errcode="M_LIMIT_EXCEEDED", status=429, retry_after_ms=10), "slow"),
        (HomeserverError("no", errcode="M_UNKNOWN_TOKEN", status=401), "token"),
        (HomeserverError("no", errcode="M_USER_SUSPENDED", status=403), "account"),
        (HomeserverError("no", errcode="M_INVALID_PARAM", status=400), "again"),
        (HomeserverError("no", errcode="M_NOT_FOUND", status=404), "again"),
        (HomeserverError("no", errcode="M_FORBIDDEN", status=403), "again"),
    ],
)
async def test_nothing_is_sent_while_nobody_can_look(make: MakeRig, trouble: MatrixError, kind: str) -> None:
    async with make() as rig:
        rig.rooms.reading = trouble
        found = await verdict(rig, since=LONG_AGO)
        assert found.kind == kind
        assert rig.rooms.sends == []
        if kind == "again":
            assert found.error is not None
            assert not found.error.sent  # this attempt has sent nothing


@pytest.mark.parametrize(
    ("joined", "kind"), [(False, "absent"), (True, "again"), (cut_off(), "again"), (60.0, "again")]
)
async def test_403_to_a_look_speaks_of_the_room_and_not_of_the_event(
    make: MakeRig, joined: bool | MatrixError | float, kind: str
) -> None:
    async with make(deadline=0.5 if joined == 60.0 else 10.0) as rig:
        rig.rooms.reading = HomeserverError("no", errcode="M_FORBIDDEN", status=403)
        rig.rooms.joined = joined
        found = await verdict(rig, since=LONG_AGO)
        assert (found.kind, found.beforehand) == (kind, True)


async def test_nothing_is_sent_when_the_lease_is_lost_during_the_look_ups(make: MakeRig) -> None:
    async with make(refuse_encrypted=True) as rig:
        row = rig.pending("a").row
        assert await carry(rig, row, LONG_AGO, still=False) is None
        assert {what for what, _ in rig.rooms.looks} == {"recent", "encrypted"}
        assert rig.rooms.sends == []


# encrypted rooms


async def test_plain_text_does_not_go_into_an_encrypted_room(make: MakeRig) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = True
        found = await verdict(rig)
        assert found.kind == "dead"
        assert found.error is not None
        assert (found.error.status, found.error.errcode) == (403, "M_FORBIDDEN")
        assert "FLOWBRIDGE_ENCRYPTED_ROOMS=allow" in found.error.error
        assert rig.rooms.sends == []


async def test_what_was_sent_before_its_room_was_encrypted_is_sent(make: MakeRig) -> None:
    make.tune(plain_seconds=0.0)
    async with make(refuse_encrypted=True) as rig:
        row = rig.pending("a").row
        rig.rooms.then(lose)
        assert (await carry(rig, row) or Verdict("dead")).kind == "again"
        rig.rooms.encrypted[ROOM] = True
        assert await carry(rig, row, 0.0) == Verdict("sent", "$1")
        assert (await verdict(rig, "b", since=0.0)).kind == "dead"
        assert rig.rooms.tries() == ["a"]


async def test_encrypted_room_may_be_allowed(make: MakeRig) -> None:
    async with make() as rig:
        rig.rooms.encrypted[ROOM] = True
        assert (await verdict(rig)).kind == "sent"
        assert rig.rooms.looks == []


@pytest.mark.parametrize(
    ("type_", "state_key"),
    [("m.room.encrypted", None), ("m.room.redaction", None), ("m.reaction", None), ("m.room.topic", "")],
)
async def test_what_is_never_encrypted_or_is_so_already_passes_without_a_look(
    make: MakeRig, type_: str, state_key: str | None
) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = True
        assert (await verdict(rig, type_=type_, state_key=state_key)).kind == "sent"
        assert rig.rooms.looks == []


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (HomeserverError("no", errcode="M_FORBIDDEN", status=403), "again"),
        (HomeserverError("no", errcode="M_INVALID_PARAM", status=400), "again"),
        (HomeserverError("no", errcode="M_UNKNOWN", status=404), "again"),
        (HomeserverError("no", errcode="M_UNKNOWN", status=500), "again"),
        (HomeserverError("no", errcode="M_UNRECOGNIZED", status=404), "again"),
        (verdicts.error(HTML), "again"),
        (cut_off(), "again"),
        (unreachable(), "again"),
    ],
)
async def test_room_is_not_plain_because_nobody_can_tell(make: MakeRig, trouble: MatrixError, kind: str) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = trouble
        for _ in range(2):
            assert (await verdict(rig)).kind == kind
        assert rig.rooms.sends == []


async def test_room_is_taken_to_be_plain_for_ten_seconds_at_most(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Timing().plain_seconds <= 10
    async with make(refuse_encrypted=True) as rig:
        for _ in range(3):
            await verdict(rig)
        await verdict(rig, room="!other:hs")
        assert rig.rooms.looks == [("encrypted", ROOM), ("encrypted", "!other:hs")]
        rig.rooms.encrypted[ROOM] = True
        now = time.monotonic()
        monkeypatch.setattr(encryption, "time", Later(now + 9.9))
        assert (await verdict(rig)).kind == "sent"
        monkeypatch.setattr(encryption, "time", Later(now + 10.1))
        assert (await verdict(rig)).kind == "dead"


class Later:
    """Stands in for `time`, at another moment."""

    time = staticmethod(time.time)

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now


async def test_ten_seconds_begin_with_the_question_and_not_with_its_answer(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.tune(plain_seconds=0.05)
    async with make(refuse_encrypted=True) as rig:
        answers = iter([0.06])
        told = rig.rooms.is_encrypted

        async def late(token: str, room_id: str, query: str = "") -> bool:
            found = await told(token, room_id, query)
            await asyncio.sleep(next(answers, 0.0))
            return found

        monkeypatch.setattr(rig.rooms, "is_encrypted", late)
        await verdict(rig)
        await verdict(rig)
        assert len(rig.rooms.looks) == 2


# the deadline


async def test_deadline_ends_a_send_that_may_have_arrived(make: MakeRig) -> None:
    async with make(deadline=0.05, refuse_encrypted=True) as rig:
        rig.rooms.then(silence)
        found = await verdict(rig)
        assert (found.kind, found.error and found.error.sent) == ("again", True)


async def test_deadline_is_one_for_all_that_an_attempt_asks(make: MakeRig) -> None:
    async with make(deadline=1.0, refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = 0.5
        answered = asyncio.Event()
        rig.rooms.then(after(answered))
        asyncio.get_running_loop().call_later(1.25, answered.set)  # 0.75 s into the send, if that has its own time
        found = await verdict(rig)
        assert (found.kind, found.error and found.error.sent) == ("again", True)


async def test_deadline_in_a_look_up_means_that_nothing_was_sent(make: MakeRig) -> None:
    async with make(deadline=0.05, refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = 60.0
        found = await verdict(rig)
        assert (found.kind, found.error and found.error.sent) == ("again", False)


async def test_deadline_after_a_403_leaves_it_a_403(make: MakeRig) -> None:
    async with make(deadline=0.05, refuse_encrypted=True) as rig:
        rig.rooms.joined = 60.0
        rig.rooms.then(error(403, "M_FORBIDDEN"))
        assert (await verdict(rig)).kind == "forbidden"


async def test_paging_through_a_room_is_within_the_deadline(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(deadline=0.1) as rig:
        rooms = rig.rooms
        rooms.page_size = 1
        for _ in range(1_000):
            rooms.put("x", sender="@talkative:hs")
        page = rooms.recent

        async def slowly(token: str, room_id: str, before: str, **how: Any) -> Any:
            await asyncio.sleep(0.01)
            return await page(token, room_id, before, **how)

        monkeypatch.setattr(rooms, "recent", slowly)
        found = await verdict(rig, since=LONG_AGO)
        assert (found.kind, found.error and found.error.sent) == ("again", False)
        assert len(rooms.looks) <= 10


# memory


async def test_accounts_that_send_no_more_are_forgotten(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(max_accounts=10) as rig:
        rig.rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.body == "bad" else None)
        await verdict(rig, "bad")
        for number in range(100):
            await verdict(rig, caller=Caller(f"@user-{number}:hs", "PHONE", f"token-{number}"))
        assert len(rig.account_limits._limiters) <= 11
        assert rig.account_limits.pause_of(accounts.account_of(ALICE.user_id)) > 0  # a pause is not forgotten
        rig.account_limits._limiters[accounts.account_of(ALICE.user_id)].open()
        for number in range(20):
            await verdict(rig, caller=Caller(f"@other-{number}:hs", "PHONE", f"token-{number}"))
        assert rig.account_limits.distrusted == {}


async def test_rooms_known_to_be_plain_are_bounded(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(refuse_encrypted=True, max_plain=10) as rig:
        for number in range(50):
            await verdict(rig, room=f"!{number}:hs")
        assert len(rig.encryption._plain_until) <= 10


async def test_content_goes_out_as_it_was_accepted(make: MakeRig) -> None:
    async with make() as rig:
        pending = rig.pending("", content={"b": "ü", "a": [1, {"c": None}]})
        await carry(rig, pending.row)
        (sent,) = rig.rooms.sends
        assert sent.content == json.loads(pending.row.content)
        assert (sent.token, sent.room, sent.type, sent.txn_id) == ("alice", ROOM, "m.room.message", pending.row.txn_id)
