"""Whatever happens, in whatever order: the store and a simple model of it say the same."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, or_, select, true, update

from flowbridge.store import Fence, clock, delivery_log, leases, outbox, retention
from flowbridge.store.tables import lanes, metadata
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import LEASE_MS, event, settle

# Without Phase.shrink, which takes minutes on a database: add it to see the shortest story that goes wrong.
FAST = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
OWNERS = ("one", "two")
LANES = ("account|!a", "account|!b")
BATCH = 3
ALWAYS = 2**62
DOUBT = 1_000


@dataclass
class Lane:
    """What a lane should be. `doubt`: None, "written" by its owner, or "lost" with an owner that was not heard of."""

    owner: str | None = None
    fence: int = 0
    expired: bool = True
    dirty: bool = False
    doubt: str | None = None
    queue: list[str] = field(default_factory=list)

    @property
    def is_claimable(self) -> bool:
        return self.expired and (self.dirty or self.owner is not None)

    def lose(self) -> None:
        """Its owner is gone."""
        if self.owner is not None:
            self.doubt = self.doubt or "lost"


class Outbox(RuleBasedStateMachine):
    """Owners come, send, crash and come back too late; events are accepted, settled, replayed and forgotten."""

    engine: Engine
    fences = Bundle("fences")

    def __init__(self) -> None:
        super().__init__()
        self.lanes: dict[str, Lane] = {}
        self.settled: dict[str, tuple[str, str]] = {}  # delivery → lane, state
        self.number = 0
        with self.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())

    def do(self, work: Callable[[Connection], object]) -> None:
        with self.engine.begin() as connection:
            work(connection)

    def lane(self, name: str) -> Lane:
        return self.lanes.setdefault(name, Lane())

    def holds(self, fence: Fence) -> Lane | None:
        """The lane of a fence that is not void."""
        lane = self.lanes.get(fence.lane)
        return lane if lane and (lane.owner, lane.fence) == (fence.owner, fence.number) else None

    @initialize(target=fences, limit=st.integers(1, 2))
    def begin(self, limit: int) -> object:
        for name in LANES:
            self.accept(name, 2, known=False)
        return self.claim(OWNERS[0], limit, later=False)

    @rule(name=st.sampled_from(LANES), many=st.integers(1, 4), known=st.booleans())
    def accept(self, name: str, many: int, known: bool) -> None:
        """`known`: by the process that holds the lane, which need not be told."""
        lane = self.lane(name)
        dirty = not (known and lane.owner is not None)
        names = []
        for _ in range(many):
            self.number += 1
            names.append(f"event-{self.number}")

        def work(connection: Connection) -> None:
            outbox.insert_rows(connection, [event(delivery, name) for delivery in names])
            if dirty:
                leases.mark_dirty(connection, [(name, name.partition("|")[0])])

        self.do(work)
        lane.queue += names
        lane.dirty |= dirty

    @rule(target=fences, owner=st.sampled_from(OWNERS), limit=st.integers(1, 2), later=st.booleans())
    def claim(self, owner: str, limit: int, later: bool) -> object:
        if later:
            self.time_passes(owner)
        with self.engine.begin() as connection:
            for rank, name in enumerate(LANES):  # of two that ended at once the engine might take either, by chance
                ended = (lanes.c.lane == name, lanes.c.lease_until <= clock.lease_clock(connection))
                connection.execute(update(lanes).where(*ended).values(lease_until=LEASE_MS + 1 + rank))
            claims = leases.claim(connection, owner, limit, LEASE_MS, batch=BATCH)
        claimable = {name for name, lane in self.lanes.items() if lane.is_claimable}
        assert len(claims) == min(limit, len(claimable))
        for one in claims:
            assert one.fence.lane in claimable
            claimable.remove(one.fence.lane)
            lane = self.lanes[one.fence.lane]
            lane.lose()
            lane.owner, lane.expired, lane.dirty = owner, False, False
            lane.fence += 1
            assert one.fence == Fence(one.fence.lane, owner, lane.fence)
            assert [row.delivery for row in one.rows] == lane.queue[:BATCH]
            assert (one.uncertain_since is not None) == (lane.doubt is not None)
            assert (one.uncertain_since == DOUBT) == (lane.doubt == "written")
        return multiple(*sorted((one.fence for one in claims), key=lambda fence: fence.lane))  # as they come, by chance

    @rule(
        fence=fences,
        zombie=st.booleans(),
        many=st.integers(1, 3),
        state=st.sampled_from(["sent", "dead"]),
        again=st.booleans(),
    )
    def settle(self, fence: Fence, zombie: bool, many: int, state: str, again: bool) -> None:
        """By the owner of the lane, or an earlier one; perhaps a second time, and with another outcome."""
        now = self.lanes.get(fence.lane)
        if now is not None and now.owner is not None and not zombie:
            fence = Fence(fence.lane, now.owner, now.fence)
        queue = now.queue if now else []
        names = queue[:many]
        if again:
            names = [*names, *[name for name, (where, _) in self.settled.items() if where == fence.lane][-2:]]
        self.do(lambda connection: settle(connection, fence, *names, state=state))
        lane = self.holds(fence)
        if lane is not None:
            self.settled |= dict.fromkeys(lane.queue[:many], (fence.lane, state))
            del lane.queue[:many]

    @rule(fence=fences, certain=st.booleans())
    def doubt(self, fence: Fence, certain: bool) -> None:
        self.do(lambda connection: leases.doubt(connection, fence, None if certain else DOUBT))
        if lane := self.holds(fence):
            lane.doubt = None if certain else "written"

    @rule(fence=fences, rests=st.booleans())
    def release(self, fence: Fence, rests: bool) -> None:
        self.do(lambda connection: leases.release(connection, [fence], 60_000 if rests else 0))
        if lane := self.holds(fence):
            self.free(lane)
            lane.expired = not rests

    @rule(owner=st.sampled_from(OWNERS))
    def release_all(self, owner: str) -> None:
        self.do(lambda connection: leases.release_all(connection, owner))
        for lane in self.lanes.values():
            if lane.owner == owner:
                self.free(lane)

    def free(self, lane: Lane) -> None:
        lane.owner, lane.expired = None, True
        lane.dirty = lane.dirty or bool(lane.queue)

    @rule(owner=st.sampled_from(OWNERS))
    def renew(self, owner: str) -> None:
        with self.engine.begin() as connection:
            held = leases.renew(connection, owner, LEASE_MS)
        mine = {name: lane for name, lane in self.lanes.items() if lane.owner == owner and not lane.expired}
        assert held == {name: (lane.fence, lane.dirty) for name, lane in mine.items()}
        for lane in mine.values():
            lane.dirty = False

    @rule(alive=st.sampled_from([*OWNERS, *OWNERS, None]))
    def time_passes(self, alive: str | None) -> None:
        """Leases run out, but for those of one owner; all others have crashed, or stand still."""
        ended = or_(lanes.c.owner != alive, lanes.c.owner.is_(None)) if alive else true()
        self.do(lambda connection: connection.execute(update(lanes).where(ended).values(lease_until=LEASE_MS + 1)))
        for lane in self.lanes.values():
            lane.expired = lane.expired or alive is None or lane.owner != alive

    @rule()
    def restart(self) -> None:
        """Of the only process on a file."""
        self.do(lambda connection: leases.recover(connection, LEASE_MS))
        for lane in self.lanes.values():
            if lane.owner is not None:
                lane.lose()
                lane.owner, lane.expired, lane.dirty = None, True, True

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if not self.settled:
            return
        name = data.draw(st.sampled_from(sorted(self.settled)))
        lane_name, state = self.settled.pop(name)
        with self.engine.begin() as connection:
            self.number += 1
            again = delivery_log.replay(connection, name, f"txn-{self.number}", "somebody")
        assert again is not None
        assert again["lane"] == lane_name
        assert json.loads(again["history"])[-1]["replayed"]["state"] == state
        self.lane(lane_name).queue.append(name)
        self.lane(lane_name).dirty = True

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        queued = sorted(name for lane in self.lanes.values() for name in lane.queue)
        if queued:
            name = data.draw(st.sampled_from(queued))
            self.do(lambda connection: outbox.remove_queued(connection, [name]))
            for lane in self.lanes.values():
                lane.queue = [other for other in lane.queue if other != name]

    @rule(sent=st.booleans(), dead=st.booleans())
    def purge(self, sent: bool, dead: bool) -> None:
        with self.engine.begin() as connection:
            number = retention.purge(connection, ALWAYS if sent else 0, ALWAYS if dead else 0)
        kept = {
            name: (where, state)
            for name, (where, state) in self.settled.items()
            if not (dead if state == "dead" else sent)
        }
        assert number == len(self.settled) - len(kept)
        self.settled = kept

    @rule()
    def forget_idle_lanes(self) -> None:
        self.do(leases.forget_idle)
        self.lanes = {
            name: lane for name, lane in self.lanes.items() if lane.owner is not None or lane.dirty or lane.queue
        }

    @invariant()
    def model_and_store_agree(self) -> None:
        with self.engine.connect().execution_options(reads=True) as connection:
            found = connection.execute(select(events.c.delivery, events.c.lane, events.c.state).order_by(events.c.id))
            rows = [tuple(row) for row in found]
            held = {row.lane: (row.owner, row.fence, row.dirty) for row in connection.execute(select(lanes))}
        queues = {name: [row[0] for row in rows if row[1:] == (name, "queued")] for name in LANES}
        assert queues == {name: self.lanes[name].queue if name in self.lanes else [] for name in LANES}
        assert {row[0]: row[1:] for row in rows if row[2] != "queued"} == self.settled
        assert held == {name: (lane.owner, lane.fence, int(lane.dirty)) for name, lane in self.lanes.items()}

    @invariant()
    def no_queued_event_is_out_of_reach(self) -> None:
        for lane in self.lanes.values():
            assert not lane.queue or lane.dirty or lane.owner is not None


def test_store_does_as_its_model(engine: Engine) -> None:
    machine = type("Outbox", (Outbox,), {"engine": engine})
    run_state_machine_as_test(machine, settings=FAST)
