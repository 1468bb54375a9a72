"""Events that are bound by the transaction that inserts them, and those that are not."""

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from flowbridge.delivery import binding
from flowbridge.events.relations import is_bound
from flowbridge.store import message_keys
from tests.rig import MakeRig, Rig, Rooms, accept, after, refuse_connection, soon
from tests.unit.delivery.test_stories import REFUSED, offer, sent, shown, tell


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.01, max_pause=0.02, rewrite_seconds=0.01, poll_seconds=0.05)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was not bound early."""
    found: list[str] = []
    real = binding.resolve

    def resolve(connection: Any, wanted: Any, amended: Any) -> Any:
        found.extend(json.loads(row.content)["body"] for each in wanted for row in each.rows)
        return real(connection, wanted, amended)

    monkeypatch.setattr(binding, "resolve", resolve)
    return found


def is_early(rig: Rig, text: str) -> bool:
    """Whether the row of an event whose lane is held up is bound."""
    rows = zip(rig.rows("content"), rig.rows("binding"), rig.rows("txn_id"), strict=True)
    return next(is_bound(bound, txn_id) for content, bound, txn_id in rows if json.loads(content)["body"] == text)


async def test_events_of_a_lane_that_is_held_are_bound_when_they_are_inserted(
    make: MakeRig, rooms: Rooms, late: list[str]
) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        assert late == ["a"]  # its lane was not held yet
        await tell(rig, "a", "a", 1)
        await tell(rig, "a and b", "ab", 2)
        await tell(rig, "b", "b", 3)
        await tell(rig, "another", "a", key="l")
        assert late == ["a"]
        assert shown(rooms) == ["a!", "b", "another!"]
        await rig.settled()
        assert rig.rows("attempts") == [1, 0, 1, 1, 1]


async def test_what_depends_on_how_another_ends_waits_and_so_does_what_is_behind_it(
    make: MakeRig, rooms: Rooms, late: list[str]
) -> None:
    go = asyncio.Event()
    async with make() as rig:
        await tell(rig, "before", key="l")
        late.clear()
        rooms.then(after(go, REFUSED))
        each = [offer(rig, "a", "a", 1), offer(rig, "other", "a", 1, key="m")]
        each += [offer(rig, "a again", "a", 2), offer(rig, "behind", "a", 1, key="n")]
        await soon(each[-1].committed)
        assert [is_early(rig, body) for body in ("a", "other", "a again", "behind")] == [True, True, False, False]
        go.set()
        await soon(asyncio.gather(*(one.settled for one in each)))
        assert shown(rooms) == ["before!", "other!", "a again!", "behind!"]
        assert "a" not in late
        assert "other" not in late


async def test_event_behind_one_that_waits_in_an_earlier_commit_is_not_bound_before_it(
    make: MakeRig, rooms: Rooms
) -> None:
    go = asyncio.Event()
    async with make() as rig:
        await tell(rig, "before", key="l")
        rooms.then(after(go))
        each = []
        for text, time, state in (("a", 1, "firing"), ("a again", 2, "firing"), ("done", 3, "resolved")):
            each.append(offer(rig, text, "a" * (state == "firing"), time, state=state))
            await soon(each[-1].committed)
        assert [is_early(rig, body) for body in ("a", "a again", "done")] == [True, False, False]
        go.set()
        await soon(asyncio.gather(*(one.settled for one in each)))
        assert shown(rooms) == ["before!", "done"]


async def test_repeat_and_what_is_behind_it_survive_a_crash(make: MakeRig, rooms: Rooms) -> None:
    go = asyncio.Event()
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        rooms.then(after(go))
        first = rig.offer("in the way")
        repeat, new = offer(rig, "a", "a", 1), offer(rig, "a and b", "ab", 2)
        await soon(new.committed)
        assert is_early(rig, "a and b")
        assert not any(each.settled.done() for each in (first, repeat))
        await rig.crash()
    async with make() as rig:
        await rig.settled()
        assert shown(rooms) == ["a!", "in the way", "a and b!"]
        await tell(rig, "a and b", "ab", 2)
        assert shown(rooms) == ["a!", "in the way", "a and b!"]


async def test_event_that_was_bound_early_and_not_sent_is_sent_after_a_crash(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "before", key="l")
        rooms.always(refuse_connection)
        await soon(offer(rig, "a", "a", 1).committed)
        assert is_early(rig, "a")
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rig.settled()
        assert shown(rooms) == ["before!", "a!"]


async def test_transaction_that_is_taken_back_takes_the_decisions_back(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as rig:
        await tell(rig, "before", key="l")
        real = binding.resolve_inserted
        fails = iter([OperationalError("", {}, Exception("database is locked"))])

        def resolve(*asked: Any) -> None:
            real(*asked)
            if error := next(fails, None):
                raise error

        monkeypatch.setattr(binding, "resolve_inserted", resolve)
        each = [offer(rig, "a", "a", 1), offer(rig, "a", "a", 1), offer(rig, "b", "b", 2)]
        await soon(asyncio.gather(*(one.settled for one in each)))
        assert next(fails, None) is None
        assert sent(rooms) == ["before", "a", "b"]


async def test_binding_that_fails_keeps_nothing_from_being_accepted(
    make: MakeRig, rooms: Rooms, late: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as rig:
        await tell(rig, "before", key="l")
        late.clear()
        real = message_keys.write
        fails = iter([ValueError("a fault")])

        def write(*asked: Any) -> None:
            if error := next(fails, None):
                raise error
            real(*asked)

        monkeypatch.setattr(message_keys, "write", write)
        await tell(rig, "a", "a", 1)
        assert late == ["a"]
        await tell(rig, "b", "b", 2)
        assert late == ["a"]
        assert shown(rooms) == ["before!", "a!", "b!"]


async def test_event_that_its_lane_does_not_know_of_is_before_it_all_the_same(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command has added it; or the lane is reading the store, and what it finds comes before what is offered then."""
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        lane = next(iter(rig.worker._lanes))
        monkeypatch.setattr(lane, "expect_more", lambda: None)
        with monkeypatch.context() as context:
            context.setattr(lane, "may_enqueue", lambda: False)
            unknown = offer(rig, "a and b", "ab", 2)
            await soon(unknown.committed)
        rooms.always(refuse_connection)
        late = offer(rig, "a and b, said again", "ab", 2)
        await soon(late.committed)
        assert not is_early(rig, "a and b, said again")
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rig.settled()
        assert shown(rooms) == ["a!", "a and b, said again"]
