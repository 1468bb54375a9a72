"""Whatever comes, in whatever order, and whatever dies: one story, one message, and nothing older above the newest."""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine

from flowbridge.delivery.binding import Resolved, Wanted, is_due, resolve
from flowbridge.events.relations import Binding
from flowbridge.events.stories import Chapter
from flowbridge.store import Fence, Row, delivery_log, leases, outbox, retention
from flowbridge.store.tables import metadata
from tests.integration.store.events import LANE, claim_one, event, let_leases_run_out, settle
from tests.integration.store.test_model import ALWAYS, FAST

KEYS = {"timed": "edit", "in a thread": "thread", "untimed": "edit", "answered": "reply"}
PINGS = {"user_ids": ["@bob:hs"]}


@dataclass(frozen=True)
class Told:
    """An event of a hook. `number`: in the order of acceptance."""

    number: int
    key: str
    chapter: Chapter

    @property
    def age(self) -> tuple[int, int]:
        """Of two, that with the greater one is newer."""
        return self.chapter.time or 0, self.number


@dataclass(frozen=True)
class Shown:
    """An event in the room."""

    id: str
    told: Told
    content: dict[str, Any]

    @property
    def is_first(self) -> bool:
        return self.content["msgtype"] == "m.text" and "m.relates_to" not in self.content


class Stories(RuleBasedStateMachine):
    """A lane and its room. The homeserver takes an event, or refuses it for good; processes come and go."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Told] = {}  # by delivery
        self.room: list[Shown] = []
        self.txn_ids: dict[str, str] = {}
        self.ended: dict[str, Told] = {}  # those that were sent, or say nothing new
        self.dead: list[str] = []
        self.owners = self.replays = 0
        with self.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())

    @initialize()
    def begin(self) -> None:
        self.accept("timed", "firing", "a", 1, 0)
        self.take_over()

    @rule(
        key=st.sampled_from(list(KEYS)),
        state=st.sampled_from(["firing", "firing", "resolved", ""]),
        firing=st.sampled_from(["a", "b", "ab", "abc"]),
        time=st.integers(1, 6),
        variant=st.integers(0, 1),
    )
    def accept(self, key: str, state: str, firing: str, time: int, variant: int) -> None:
        number = len(self.told)
        body = f"{state} {firing if state == 'firing' else ''} {variant}"
        fires = tuple(firing) if state == "firing" else ()
        chapter = Chapter(state, fires, time if key in ("timed", "in a thread") else None, body)
        content = {"msgtype": "m.text", "body": body, "m.mentions": PINGS}
        binding = Binding(key=key, on_update=KEYS[key], chapter=chapter).to_json()
        row = event(f"event-{number}", content=json.dumps(content), binding=binding, api_key="hook:h")
        with self.engine.begin() as connection:
            outbox.insert_rows(connection, [row])
            leases.mark_dirty(connection, [(LANE, "account")])
        self.told[row["delivery"]] = Told(number, key, chapter)

    @rule()
    def take_over(self) -> None:
        """Another process: the last one was killed, or lost its lease."""
        self.owners += 1
        with self.engine.begin() as connection:
            if self.owners > 1:
                let_leases_run_out(connection, f"owner {self.owners - 1}")
            self.fence = claim_one(connection, f"owner {self.owners}").fence

    @precondition(lambda self: len(self.ended) + len(self.dead) < len(self.told))
    @rule(
        ahead=st.integers(0, 4),
        ends=st.sampled_from(["sent", "sent", "sent", "dead", "killed before", "killed after"]),
        twice=st.booleans(),
    )
    def turn(self, ahead: int, ends: str, twice: bool) -> None:
        """Of the head. `twice`: it is bound again, since the answer to the commit got lost."""
        rows = self.queue()
        row = rows[0]
        if is_due(row):
            wanted = [Wanted([row, *(each for each in rows[1 : 1 + ahead] if is_due(each))], self.fence)]
            found = self.resolve(wanted)
            if twice:
                again = self.resolve(wanted)
                assert [(each.content, each.said) for each in again] == [(each.content, each.said) for each in found]
            assert not any(each.missing for each in found)
            if found[0].said:
                if ends != "killed before":
                    assert found[0].said in {shown.id for shown in self.room}
                    self.end(row, "sent", found[0].said)
                return
            row = self.queue()[0]
            assert not is_due(row)
            assert row.content == found[0].content
        if ends == "dead" and row.txn_id not in self.txn_ids:
            self.dead.append(row.delivery)
            with self.engine.begin() as connection:
                settle(connection, self.fence, row.delivery, state="dead", b_event_id=None)
        elif ends != "killed before":
            event_id = self.send(row)
            if ends != "killed after":
                self.end(row, "sent", event_id)

    @rule()
    def zombie(self) -> None:
        """A process that lost its lease decides nothing."""
        before = self.queue()
        with self.engine.begin() as connection:
            stale = Fence(LANE, "owner 0", self.fence.number)
            assert resolve(connection, [Wanted(before[:1], stale)], lambda row: row) == [None]
        assert self.queue() == before

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        delivery = data.draw(st.sampled_from(self.dead))
        self.replays += 1
        with self.engine.begin() as connection:
            assert delivery_log.replay(connection, delivery, f"replay {self.replays}", "me")
        self.dead.remove(delivery)

    @rule()
    def purge(self) -> None:
        """Dead letters stay: of what is deleted it is not known how it ended, and is taken for sent."""
        with self.engine.begin() as connection:
            retention.purge(connection, ALWAYS, 0)

    def queue(self) -> list[Row]:
        with self.engine.connect().execution_options(reads=True) as connection:
            return outbox.fetch(connection, LANE)

    def resolve(self, wanted: list[Wanted]) -> list[Resolved]:
        with self.engine.begin() as connection:
            (found,) = resolve(connection, wanted, lambda row: row)
        assert found
        return found

    def send(self, row: Row) -> str:
        """As a homeserver does, which knows a transaction id for long enough."""
        if row.txn_id not in self.txn_ids:
            self.txn_ids[row.txn_id] = f"${len(self.room)}"
            self.room.append(Shown(f"${len(self.room)}", self.told[row.delivery], json.loads(row.content)))
        return self.txn_ids[row.txn_id]

    def end(self, row: Row, state: str, event_id: str) -> None:
        self.ended[row.delivery] = self.told[row.delivery]
        with self.engine.begin() as connection:
            settle(connection, self.fence, row.delivery, state=state, b_event_id=event_id)

    @invariant()
    def each_first_message_says_that_something_begins_to_fire(self) -> None:
        for key in KEYS:
            said = [shown for shown in self.room if shown.told.key == key]
            for before, shown in pairwise(said):
                if shown.is_first:
                    assert shown.told.chapter.fires - before.told.chapter.fires
            assert not said or said[0].is_first or said[0].told.chapter.state == "resolved"

    @invariant()
    def nothing_else_pings(self) -> None:
        """But what a template mentions in a story without states."""
        for shown in self.room:
            if not shown.told.chapter.state and "m.new_content" not in shown.content:
                continue
            new = shown.content.get("m.new_content", shown.content)
            assert shown.content["m.mentions"] == new["m.mentions"] == (PINGS if shown.is_first else {})
            assert shown.is_first or "m.new_content" in shown.content or new["msgtype"] == "m.notice"

    @invariant()
    def updates_are_of_the_newest_first_message(self) -> None:
        newest: dict[str, str] = {}
        for shown in self.room:
            relation = shown.content.get("m.relates_to")
            if relation is None:
                newest[shown.told.key] = shown.id
            else:
                reply = relation.get("m.in_reply_to", {}).get("event_id")
                assert relation.get("event_id", reply) == newest[shown.told.key]

    @invariant()
    def nothing_older_follows(self) -> None:
        for key in KEYS:
            times = [shown.told.chapter.time or 0 for shown in self.room if shown.told.key == key]
            assert times == sorted(times)

    @invariant()
    def newest_of_what_was_not_refused_is_shown(self) -> None:
        """Said is what is in the room, though its outcome is not in the store; and what ended."""
        for key in KEYS:
            said = [shown for shown in self.room if shown.told.key == key]
            ended = [told for told in (*self.ended.values(), *(shown.told for shown in said)) if told.key == key]
            if ended:
                shown = said[-1].content.get("m.new_content", said[-1].content)
                assert shown["body"] == max(ended, key=lambda told: told.age).chapter.digest


def test_stories_are_told_as_their_model(engine: Engine) -> None:
    machine = type("Stories", (Stories,), {"engine": engine})
    run_state_machine_as_test(machine, settings=FAST)


def test_event_that_said_nothing_new_forgets_none_behind_it_after_a_crash(engine: Engine) -> None:
    """Both were bound in one commit, and the process ended before the first of them was settled."""
    machine = type("Stories", (Stories,), {"engine": engine})()
    machine.accept("timed", "firing", "a", 1, 0)
    machine.take_over()
    machine.turn(0, "sent", twice=False)
    machine.accept("timed", "resolved", "a", 2, 0)
    machine.turn(0, "sent", twice=False)
    machine.accept("timed", "resolved", "a", 2, 0)  # the other one of an HA pair, late
    machine.accept("timed", "firing", "b", 3, 0)
    machine.turn(1, "killed before", twice=False)
    machine.take_over()
    machine.turn(0, "sent", twice=True)
    machine.turn(0, "sent", twice=False)
    machine.accept("timed", "firing", "b", 3, 0)
    machine.turn(0, "sent", twice=False)
    assert [shown.content["body"] for shown in machine.room if shown.is_first] == ["firing a 0", "firing b 0"]
    assert not machine.queue()
