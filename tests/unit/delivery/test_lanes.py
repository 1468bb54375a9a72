"""flowbridge.delivery.lanes: a lane that was given back with nothing in it is reopened without asking the store."""

import asyncio
from pathlib import Path

import pytest

from flowbridge.delivery import lanes
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.metrics import leases_lost
from flowbridge.store import StoreUnavailable, StoreUnsure, leases, outbox
from tests.patience import PATIENCE
from tests.rig import ROOM, MakeRig, Rig, Rooms, silence, soon, until
from tests.statements import Heard, heard
from tests.unit.delivery.test_lane import tell

OTHER = "!other:hs"


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.002, max_pause=0.01, poll_seconds=0.02)


async def given_back(rig: Rig, number: int = 1) -> None:
    """End all lanes, and wait until they are known to be clean."""
    rig.worker._lanes._end_longest_idle(number)
    await until(lambda: len(rig.worker._lanes._clean) >= number and not sum(rig.worker.lanes().values()))


async def begun(rig: Rig) -> None:
    """A lane that has sent an event, and was given back."""
    await rig.send("before")
    await rig.settled()
    await until(lambda: rig.worker.lanes()["idle"])
    await given_back(rig)


def beside(rig: Rig, body: str) -> PendingDelivery:
    """An event that a command writes into the same store."""
    pending = rig.pending(body, waits=False)
    with rig.database.engine.begin() as connection:
        outbox.insert_rows(connection, [pending.values()])
        leases.mark_dirty(connection, [(pending.row.lane, pending.row.account)])
    return pending


async def test_send_into_a_reopened_lane_asks_the_store_for_nothing(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await begun(rig)
        assert rig.lane().owner is None
        with heard(rig.database.engine) as seen:
            await rig.send("after")
            await rig.settled(2)
        about = [text.split()[0] for text, values in seen.asked if ROOM in str(values)]
        assert set(about) == {"INSERT"}
        assert (rig.lane().owner, rig.lane().fence) == (rig.worker.owner, 2)
        await until(lambda: rig.worker.lanes()["idle"])
        await given_back(rig)
        assert rig.lane().owner is None
    assert rooms.bodies() == ["before", "after"]


def claims(seen: Heard) -> list[str]:
    return [text for text, _ in seen.asked if text.startswith("UPDATE lanes SET owner=") and "fence=(" in text]


async def test_sends_into_more_rooms_than_are_held_cost_no_claim_once_they_are_known(
    make: MakeRig, rooms: Rooms
) -> None:
    make.tune(lanes=10, claims=5)
    names = [f"!{number}:hs" for number in range(40)]
    async with make() as rig:
        with heard(rig.database.engine) as seen:
            for name in names:
                await rig.send("1", name)
            await until(lambda: len(rig.worker._lanes._clean) >= 30)
        assert claims(seen)
        with heard(rig.database.engine) as seen:
            for _ in range(3):
                for name in names:
                    await rig.send("2", name)
                await until(lambda: sum(rig.worker.lanes().values()) <= 6)
            await rig.settled()
        assert len(claims(seen)) < 20  # of 120 sends; those whose release was still on its way
        assert rig.worker.lanes()["sending"] == 0
    assert {name: rooms.bodies(name) for name in names} == {name: ["1", "2", "2", "2"] for name in names}


async def test_lane_that_was_reopened_is_in_doubt_after_a_crash(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await begun(rig)
        rooms.then(silence)
        lost = rig.offer("on its way")
        await until(lambda: len(rooms.sends) == 2)
        await soon(lost.committed)
        assert rig.lane().owner == rig.worker.owner
        await rig.crash()
    async with make() as rig:
        await rig.settled()
        assert rig.lane().fence == 3
    assert len({sent.txn_id for sent in rooms.sends}) == 2, "under the same transaction id"
    assert rooms.bodies() == ["before", "on its way"]


async def test_lane_that_is_reopened_while_leases_are_renewed_is_not_lost(make: MakeRig, rooms: Rooms) -> None:
    lost = leases_lost._value.get()
    async with make() as rig:
        await begun(rig)
        await rig.send("x", OTHER)
        with rig.busy_writer():
            renewing = asyncio.ensure_future(rig.worker._lanes.renew())
            await until(lambda: list(rig.worker._lanes._renewing))
            pending = rig.offer("after")
        await rig.worker.wait(pending, 10)
        await soon(renewing)
        await rig.worker._lanes.renew()
        await rig.settled()
        await rig.send("still")
        assert rig.lane().fence == 2
    assert leases_lost._value.get() == lost
    assert rooms.bodies() == ["before", "after", "still"]


async def test_lane_that_is_reopened_while_it_is_claimed_for_a_command_is_held_once(
    make: MakeRig, rooms: Rooms
) -> None:
    make.tune(poll_seconds=PATIENCE)  # the claim is the test's
    async with make() as rig:
        await begun(rig)
        beside(rig, "of a command")
        with rig.busy_writer():
            claiming = asyncio.ensure_future(rig.worker._lanes._claim_some(5))
            await asyncio.sleep(0)  # it is queued, and what follows comes behind it
            pending = rig.offer("after")
        await rig.worker.wait(pending, 10)
        assert [claim.fence.number for claim in await soon(claiming)] == [2]
        await rig.settled(3)
        assert rig.lane().fence == 2
        await rig.send("last")
    assert sorted(rooms.bodies()[:3]) == ["after", "before", "of a command"]
    assert rooms.bodies()[3:] == ["last"]
    assert len(rooms.sends) == 4


async def test_event_behind_one_of_a_command_is_not_forgotten(make: MakeRig, rooms: Rooms) -> None:
    make.tune(idle_seconds=0.05)  # its lane is given back then, and claimed again
    async with make() as rig:
        await begun(rig)
        beside(rig, "of a command")
        await rig.send("after")
        await rig.settled(3)
    assert sorted(rooms.bodies()) == ["after", "before", "of a command"]


async def test_lane_whose_claim_cannot_be_written_is_claimed_from_the_store(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as rig:
        await begun(rig)
        rooms.then(silence)

        def refuse(*_: object) -> None:
            raise ValueError("a claim that the store refuses")

        monkeypatch.setattr(leases, "reclaim", refuse)
        pending = rig.offer("refused", waits=False)
        with pytest.raises((StoreUnavailable, StoreUnsure)):
            await soon(pending.committed)
        monkeypatch.undo()
        await until(lambda: not sum(rig.worker.lanes().values()))
        assert rig.lane().owner is None
        await rig.send("after")
        await rig.settled()
        assert rig.lane().owner == rig.worker.owner
    assert rooms.bodies()[-1] == "after"
    assert rig.states() == ["sent", "sent"]


async def test_lane_with_an_event_in_doubt_is_not_reopened(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await begun(rig)
        await rig.send("a", OTHER)
        rooms.then(silence, room=OTHER)
        rig.offer("hangs", OTHER, waits=False)
        await until(lambda: rig.worker.lanes()["sending"])
        lane = next(lane for lane in rig.worker._lanes if OTHER in lane.fence.lane)
        rig.worker._lanes.drop(lane)
        await until(lambda: rig.lane(OTHER).uncertain_since)
        assert lane.fence.lane not in rig.worker._lanes._clean
        await rig.crash()


async def test_only_so_many_lanes_are_remembered(make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_CLEAN", 3)
    async with make() as rig:
        for number in range(5):
            await rig.send("a", f"!{number}:hs")
        await until(lambda: rig.worker.lanes()["idle"] == 5)
        rig.worker._lanes._end_longest_idle(5)
        await until(lambda: len(rig.worker._lanes._clean) == 3 and not sum(rig.worker.lanes().values()))
        for number in range(5):
            await rig.send("b", f"!{number}:hs")
    assert all(rooms.bodies(f"!{number}:hs") == ["a", "b"] for number in range(5))


async def test_replay_into_a_lane_that_was_given_back_is_not_overtaken(make: MakeRig, rooms: Rooms, path: Path) -> None:
    async with make() as rig:
        await begun(rig)
        tell(path, "UPDATE outbox SET state = 'queued', settled_at = NULL, txn_id = 'again'")
        name = rig.lane().lane
        tell(path, "UPDATE lanes SET dirty = 1")
        rig.worker.wake(name)
        await rig.send("after")
    assert rooms.bodies() == ["before", "before", "after"]


def test_lanes_that_are_remembered_are_those_of_the_documentation() -> None:
    assert lanes.MAX_CLEAN == 50_000
