"""Every accepted event once and in order: offers, failures, crashes and repeats in any interleaving."""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowbridge.delivery import attempt, lane, worker
from flowbridge.delivery.write_queue import Ticket
from flowbridge.homeserver.pool import Answer
from flowbridge.models import Caller
from flowbridge.store import outbox
from tests.unit.delivery.test_lane import age
from tests.worker import (
    ALICE,
    SERVICE,
    Behaviour,
    Rooms,
    Sent,
    Worker,
    accept,
    cut,
    error,
    lose,
    refuse_connection,
    slow,
    until,
)

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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(lane, "MAX_PAUSE", 0.002)
    monkeypatch.setattr(attempt, "FIRST_PROBE_PAUSE", 0.001)
    monkeypatch.setattr(attempt, "MAX_PROBE_PAUSE", 0.001)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(worker, "BATCH", 5)  # so that a few events already go by way of the store


@dataclass
class Play:
    """What has been accepted so far, and what of that must be in the rooms at the end."""

    path: Path
    caller: Caller
    rooms: Rooms = field(default_factory=Rooms)
    tickets: list[Ticket] = field(default_factory=list)
    withdrawn: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)  # transaction ids of what the homeserver will never take

    def __post_init__(self) -> None:
        self.rooms.script(lambda _: self.behaviour(accept))
        self.worker = self.start()

    def behaviour(self, otherwise: Behaviour, *, refuses: bool = False) -> Behaviour:
        """That, but what was refused once is refused again."""

        async def behave(rooms: Rooms, sent: Sent) -> Answer:
            if refuses:
                self.refused.add(sent.txn_id)
            found = error(400, "M_BAD_JSON") if sent.txn_id in self.refused else otherwise
            return await found(rooms, sent)

        return behave

    def start(self) -> Worker:
        return Worker(f"sqlite:///{self.path}", self.rooms)

    async def run(self, todo: list[Step]) -> None:
        await self.worker.__aenter__()
        for what, how, options in todo:
            await getattr(self, what)(*how, **options)
        await self.end("stop", forgets=False)
        number = len(self.tickets) - len(self.withdrawn)
        await until(lambda: len(self.worker.states()) == number and "queued" not in self.worker.states())
        self.dead = {name for name, state in self.worker.rows("delivery", "state") if state == "dead"}
        await self.worker.stop()

    def expected(self, room: str) -> list[str]:
        names = [(str(number), ticket.row) for number, ticket in enumerate(self.tickets)]
        gone = self.withdrawn | self.dead
        return [name for name, row in names if row.room_id == room and row.delivery not in gone]

    def seen(self, room: str) -> list[str]:
        """What is in the room, without what the homeserver both took and refused."""
        return [name for name in self.rooms.bodies(room) if self.tickets[int(name)].row.delivery not in self.dead]

    async def offer(self, room: str, number: int, *, keyed: bool) -> None:
        for _ in range(number):
            name = str(len(self.tickets))
            key = f"key-{name}" if keyed else None
            self.tickets.append(self.worker.offer(name, room, key=key, **self.how(room)))

    def how(self, room: str) -> dict[str, Any]:
        state = {"type_": "m.room.topic", "state_key": ""} if room == STATE else {}
        return {"caller": self.caller, "waits": False, **state}

    async def repeat(self, which: int) -> None:
        """The same once more, as a caller does who got no answer."""
        keyed = [ticket for ticket in self.tickets if ticket.idem and ticket.row.delivery not in self.withdrawn]
        if keyed:
            ticket = keyed[which % len(keyed)]
            content = ticket.row.content.decode()
            room = ticket.row.room_id
            again = self.worker.ticket(str(self.tickets.index(ticket)), room, key="key", **self.how(room))
            assert again.row.content.decode() == content
            again.idem = ticket.idem
            self.worker.courier.offer(again)

    async def fail(self, room: str, names: list[str]) -> None:
        behaviours = [self.behaviour(FAILURES.get(name, accept), refuses=name == "400") for name in names]
        self.rooms.then(*behaviours, room=room)

    async def withdraw(self, which: int) -> None:
        if self.tickets:
            ticket = self.tickets[which % len(self.tickets)]
            name = ticket.row.delivery
            found = await self.worker.database.run(lambda connection: outbox.waiting(connection, name))
            if found is not None:
                joined = await self.worker.courier.join(found[0], waits=True)
                await self.worker.courier.wait(joined, 0)
                if await self.worker.courier.withdraw(joined):
                    self.withdrawn.add(name)

    async def turn(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    async def work(self, number: int) -> None:
        """Until so many more sends were tried, if there is something to send."""
        before = len(self.rooms.sends)
        await until(lambda: len(self.rooms.sends) >= before + number or "queued" not in self.worker.states())

    async def commit(self) -> None:
        await self.worker.database.run(lambda connection: None)

    async def lease(self) -> None:
        """The clock on the wall makes a step."""
        age(self.path, 60_000)

    async def end(self, how: str, *, forgets: bool) -> None:
        """A process ends, and another begins; with `forgets` an hour later."""
        await (self.worker.crash() if how == "crash" else self.worker.stop())
        if forgets:
            age(self.path, HOUR)
            self.rooms.forget()
        self.worker = self.start()
        await self.worker.__aenter__()


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
