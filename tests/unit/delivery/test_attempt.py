"""flowbridge.delivery.attempt: one attempt. What it asks, what it sends, and what it makes of the answer."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import insert

from flowbridge.auth.tokens import digest_of
from flowbridge.delivery.account_limits import FIRST
from flowbridge.delivery.attempt import Attempt
from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver.answers import Verdict
from flowbridge.homeserver.pool import Answer
from flowbridge.store import Row, accounts, tables
from flowbridge.store.clock import now_ms
from tests.rig import (
    ALICE,
    BOB,
    DESK,
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


async def test_content_goes_out_as_it_was_accepted(make: MakeRig) -> None:
    async with make() as rig:
        pending = rig.pending("", content={"b": "ü", "a": [1, {"c": None}]})
        await carry(rig, pending.row)
        (sent,) = rig.rooms.sends
        assert sent.content == json.loads(pending.row.content)
        assert (sent.token, sent.room, sent.type, sent.txn_id) == ("alice", ROOM, "m.room.message", pending.row.txn_id)
