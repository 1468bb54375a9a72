"""Every accepted event once and in order: offers, failures, crashes and repeats in any interleaving."""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowbridge.delivery.lanes import Bounds
from flowbridge.delivery.pending import PendingDelivery
from flowbridge.homeserver.pool import Answer
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.store import outbox
from tests.rig import (
    ALICE,
    SERVICE,
    Behaviour,
    Rig,
    Rooms,
    Sent,
    accept,
    cut,
    error,
    lose,
    refuse_connection,
    slow,
    until,
)
from tests.unit.delivery.test_lane import age

HOUR = 3_600_000
STATE = "!state:hs"  # here each event is a state, which no transaction id protects
NAMES = ("!a:hs", "!b:hs", STATE)
FAILURES: dict[str, Behaviour] = {
    "lost answer": lose,
    "lost request": cut,
    "no connection": refuse_connection,
    "429": slow(3),
    "500": error(500, "M_UNKNOWN"),
}

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def step(name: str, *how: st.SearchStrategy[Any], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), st.tuples(*how), st.fixed_dictionaries(options))


room_ids = st.sampled_from(NAMES)
failures = st.lists(st.sampled_from(["400", *FAILURES]), min_size=1, max_size=4)
STEPS = st.lists(
    st.one_of(
        step("offer", room_ids, st.integers(1, 12), keyed=st.booleans()),
        step("offer", room_ids, st.integers(1, 3), keyed=st.booleans()),
        step("repeat", st.integers(0, 1_000)),
        step("fail", room_ids, failures),
        step("withdraw", st.integers(0, 1_000)),
        step("work", st.integers(1, 6)),
        step("turn", st.integers(1, 30)),
        step("commit"),
        step("lease"),
        step("end", st.sampled_from(["crash", "stop"]), forgets=st.booleans()),
    ),
    min_size=20,
    max_size=40,
)


TIMING = Timing(first_pause=0.001, max_pause=0.002, first_probe_pause=0.001, max_probe_pause=0.001, poll_seconds=0.02)
BOUNDS = Bounds(batch=5)  # so that a few events already go by way of the store


@dataclass
class Play:
    """What has been accepted so far, and what of that must be in the rooms at the end."""

    path: Path
    caller: Caller
    rooms: Rooms = field(default_factory=Rooms)
    deliveries: list[PendingDelivery] = field(default_factory=list)
    withdrawn: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)  # transaction ids of what the homeserver will never take

    def __post_init__(self) -> None:
        self.rooms.script(lambda _: self.behaviour(accept))
        self.rig = self.start()

    def behaviour(self, otherwise: Behaviour, *, refuses: bool = False) -> Behaviour:
        """That, but what was refused once is refused again."""

        async def behave(rooms: Rooms, sent: Sent) -> Answer:
            if refuses:
                self.refused.add(sent.txn_id)
            found = error(400, "M_BAD_JSON") if sent.txn_id in self.refused else otherwise
            return await found(rooms, sent)

        return behave

    def start(self) -> Rig:
        return Rig(f"sqlite:///{self.path}", self.rooms, timing=TIMING, bounds=BOUNDS)

    async def run(self, todo: list[Step]) -> None:
        await self.rig.__aenter__()
        for what, how, options in todo:
            await getattr(self, what)(*how, **options)
        await self.end("stop", forgets=False)
        number = len(self.deliveries) - len(self.withdrawn)
        await until(lambda: len(self.rig.states()) == number and "queued" not in self.rig.states())
        self.dead = {name for name, state in self.rig.rows("delivery", "state") if state == "dead"}
        await self.rig.stop()

    def expected(self, room: str) -> list[str]:
        names = [(str(number), pending.row) for number, pending in enumerate(self.deliveries)]
        gone = self.withdrawn | self.dead
        return [name for name, row in names if row.room_id == room and row.delivery not in gone]

    def seen(self, room: str) -> list[str]:
        """What is in the room, without what the homeserver both took and refused."""
        return [name for name in self.rooms.bodies(room) if self.deliveries[int(name)].row.delivery not in self.dead]

    async def offer(self, room: str, number: int, *, keyed: bool) -> None:
        for _ in range(number):
            name = str(len(self.deliveries))
            key = f"key-{name}" if keyed else None
            self.deliveries.append(self.rig.offer(name, room, key=key, **self.how(room)))

    def how(self, room: str) -> dict[str, Any]:
        state = {"type_": "m.room.topic", "state_key": ""} if room == STATE else {}
        return {"caller": self.caller, "waits": False, **state}

    async def repeat(self, which: int) -> None:
        """The same once more, as a caller does who got no answer."""
        keyed = [pending for pending in self.deliveries if pending.idem and pending.row.delivery not in self.withdrawn]
        if keyed:
            pending = keyed[which % len(keyed)]
            content = pending.row.content.decode()
            room = pending.row.room_id
            again = self.rig.pending(str(self.deliveries.index(pending)), room, key="key", **self.how(room))
            assert again.row.content.decode() == content
            again.idem = pending.idem
            self.rig.worker.offer(again)

    async def fail(self, room: str, names: list[str]) -> None:
        behaviours = [self.behaviour(FAILURES.get(name, accept), refuses=name == "400") for name in names]
        self.rooms.then(*behaviours, room=room)

    async def withdraw(self, which: int) -> None:
        if self.deliveries:
            pending = self.deliveries[which % len(self.deliveries)]
            name = pending.row.delivery
            found = await self.rig.database.run(lambda connection: outbox.waiting(connection, name))
            if found is not None:
                joined = await self.rig.worker.join(found[0], waits=True)
                await self.rig.worker.wait(joined, 0)
                if await self.rig.worker.withdraw(joined):
                    self.withdrawn.add(name)

    async def turn(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    async def work(self, number: int) -> None:
        """Until so many more sends were tried, if there is something to send."""
        before = len(self.rooms.sends)
        await until(lambda: len(self.rooms.sends) >= before + number or "queued" not in self.rig.states())

    async def commit(self) -> None:
        await self.rig.database.run(lambda connection: None)

    async def lease(self) -> None:
        """The clock on the wall makes a step."""
        age(self.path, 60_000)

    async def end(self, how: str, *, forgets: bool) -> None:
        """A process ends, and another begins; with `forgets` an hour later."""
        await (self.rig.crash() if how == "crash" else self.rig.stop())
        if forgets:
            age(self.path, HOUR)
            self.rooms.forget()
        self.rig = self.start()
        await self.rig.__aenter__()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(todo=STEPS, caller=st.sampled_from([ALICE, SERVICE]), shows=st.booleans())
async def test_every_accepted_event_is_in_its_room_once_and_in_order(
    todo: list[Step], caller: Caller, shows: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        play = Play(Path(place) / "flowbridge.db", caller)
        play.rooms.shows_txn_ids = shows
        await play.run(todo)
        for room in NAMES:
            assert play.seen(room) == play.expected(room)
