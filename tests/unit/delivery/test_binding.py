"""flowbridge.delivery.binding, in a lane: events that refer to others which are not sent yet, and whole messages."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.events.relations import Binding, Target
from flowbridge.store import delivery_log, message_keys, retention
from flowbridge.store.errors import ShareTaken, StoreFull, StoreUnavailable
from tests.rig import BOB, PLENTY, ROOM, MakeRig, Rig, Rooms, accept, after, error, lose, refuse_connection, soon, until


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.01, max_pause=0.02, rewrite_seconds=0.01, poll_seconds=0.05)


def to(pending: PendingDelivery) -> Target:
    return Target("delivery", pending.row.delivery)


KEYED = Binding(key="build 1")


def contents(rooms: Rooms) -> list[Any]:
    return [event["content"] for event in rooms.timeline[ROOM]]


def relations(rooms: Rooms) -> list[Any]:
    return [content.get("m.relates_to") for content in contents(rooms)]


def ids(rooms: Rooms) -> list[str]:
    return [event["event_id"] for event in rooms.timeline[ROOM]]


def notes(rig: Rig) -> list[str]:
    return [entry["note"] for history in rig.rows("history") for entry in json.loads(history) if "note" in entry]


async def test_reply_to_what_is_not_sent_yet_gets_its_id(make: MakeRig, rooms: Rooms) -> None:
    go = asyncio.Event()
    async with make() as rig:
        rooms.then(after(go))
        first = rig.offer("first")
        second = rig.offer("second", binding=Binding(reply_to=to(first)))
        third = rig.offer("third", binding=Binding(edit=to(first)))
        await soon(asyncio.gather(second.committed, third.committed))
        go.set()
        assert (await soon(third.settled)).state == "sent"
        first_id = ids(rooms)[0]
        assert relations(rooms) == [
            None,
            {"m.in_reply_to": {"event_id": first_id}},
            {"rel_type": "m.replace", "event_id": first_id},
        ]
        assert contents(rooms)[2]["body"] == "* third"
        assert contents(rooms)[2]["m.new_content"]["body"] == "third"
        await rig.settled()
        assert rig.rows("binding") == [None] * 3
        assert [json.loads(content) for content in rig.rows("content")] == contents(
            rooms
        )  # the log shows what was sent


async def test_message_whose_target_died_is_sent_by_itself_and_the_log_says_so(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        first = rig.offer("first")
        assert (await soon(first.settled)).state == "dead"
        assert (await rig.send("second", binding=Binding(edit=to(first)))) == Outcome("sent", "$1")
        assert relations(rooms) == [None]
        await rig.settled()
        assert notes(rig) == [f"edit: {first.row.delivery} was not sent: sent as a new message"]


async def test_reaction_to_what_died_dies_and_the_lane_goes_on(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        first = rig.offer("first")
        reaction = rig.offer(
            "",
            type_="m.reaction",
            content={"m.relates_to": {"rel_type": "m.annotation", "key": "x"}},
            binding=Binding(reacts=to(first)),
        )
        redaction = rig.offer("", type_="m.room.redaction", content={}, binding=Binding(redacts=Target("key", "k")))
        last = rig.offer("last")
        assert (await soon(last.settled)).state == "sent"
        dead = {"status": 404, "errcode": "M_NOT_FOUND"}
        for pending, why in ((reaction, f"{first.row.delivery} was not sent"), (redaction, "key:k is not known")):
            outcome = await soon(pending.settled)
            assert outcome == Outcome("dead", error={**dead, "error": f"target: {why}"})
        assert rooms.tries() == ["first", "last"]


async def test_second_message_with_a_key_edits_the_first(make: MakeRig, rooms: Rooms) -> None:
    go = asyncio.Event()
    async with make() as rig:
        rooms.then(after(go))
        sends = [rig.offer(str(number), binding=KEYED) for number in range(4)]  # all before the first is sent
        other = rig.offer("other", binding=KEYED, caller=BOB)
        go.set()
        await soon(asyncio.gather(*(pending.settled for pending in (*sends, other))))
        mine = [event for event in rooms.timeline[ROOM] if event["sender"] == "@alice:hs"]
        first = mine[0]["event_id"]
        assert [event["content"].get("m.relates_to") for event in mine] == [
            None,
            *[{"rel_type": "m.replace", "event_id": first}] * 3,
        ]
        (others,) = [event for event in rooms.timeline[ROOM] if event["sender"] == "@bob:hs"]
        assert "m.relates_to" not in others["content"]


@pytest.mark.parametrize(
    ("on_update", "expected"),
    [
        ("reply", {"m.in_reply_to": {"event_id": "$1"}}),
        (
            "thread",
            {
                "rel_type": "m.thread",
                "event_id": "$1",
                "is_falling_back": True,
                "m.in_reply_to": {"event_id": "$1"},
            },
        ),
        ("new", None),
    ],
)
async def test_key_says_what_an_update_is(make: MakeRig, rooms: Rooms, on_update: str, expected: Any) -> None:
    binding = Binding(key="k", on_update=on_update)
    async with make() as rig:
        await rig.send("first", binding=binding)
        await rig.send("second", binding=binding)
        assert relations(rooms) == [None, expected]
        # A message that replaced it under the key is the one that later ones refer to.
        await rig.send("third", binding=Binding(key="k"))
        assert relations(rooms)[2] == {"rel_type": "m.replace", "event_id": "$2" if on_update == "new" else "$1"}


async def test_key_of_a_message_that_died_goes_to_the_next(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(error(403, "M_FORBIDDEN"))
        for body in ("dead", "second", "third"):
            await rig.send(body, binding=KEYED)
        assert relations(rooms) == [None, {"rel_type": "m.replace", "event_id": "$1"}]
        await rig.settled()
        assert notes(rig) == []  # the first message with a key is nothing special


async def test_key_outlives_its_delivery(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        first = rig.offer("first", binding=KEYED)
        await soon(first.settled)
        await rig.settled()
        assert await rig.database.run(lambda connection: retention.purge(connection, 2**60, 2**60)) == 1
        await rig.send("second", binding=KEYED)
        await rig.send("third", binding=Binding(reply_to=to(first)))
        assert relations(rooms)[1:] == [
            {"rel_type": "m.replace", "event_id": "$1"},
            {"m.in_reply_to": {"event_id": "$1"}},
        ]
        gone = 2**60
        assert await rig.database.run(lambda connection: message_keys.forget(connection, gone)) == 1
        await rig.send("fourth", binding=KEYED)
        assert relations(rooms)[3] is None


async def test_keys_of_one_owner_are_bounded(make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_keys, "MAX_KEYS", 3)
    async with make() as rig:
        for number in range(5):
            await rig.send(str(number), binding=Binding(key=str(number)))
        kept = await rig.database.run(lambda c: c.execute(text("SELECT key FROM message_keys ORDER BY key")).all())
        assert [row[0] for row in kept] == ["2", "3", "4"]


async def test_bound_event_is_the_same_event_after_a_crash(make: MakeRig, rooms: Rooms) -> None:
    rooms.script(lambda sent: lose if "m.relates_to" in sent.content else accept)
    async with make() as rig:
        await rig.send("first", binding=KEYED)
        second = rig.offer("second", binding=KEYED)
        await until(lambda: len(rooms.timeline[ROOM]) == 2)
        await soon(second.committed)
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rig.settled()
        assert len(rooms.timeline[ROOM]) == 2
        assert rig.states() == ["sent", "sent"]
        assert rig.rows("event_id") == ids(rooms)


async def test_binding_waits_for_the_store(make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make() as rig:
        await rig.send("first", binding=KEYED)
        broken = iter([True, True])
        real = message_keys.read

        def find(*args: Any) -> Any:
            if next(broken, False):
                raise StoreUnavailable("away")
            return real(*args)

        monkeypatch.setattr(message_keys, "read", find)
        assert (await rig.send("second", binding=KEYED)) == Outcome("sent", "$2")
        assert relations(rooms)[1] == {"rel_type": "m.replace", "event_id": "$1"}


async def test_replay_of_an_event_keeps_its_relation(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await rig.send("first", binding=KEYED)
        rooms.then(error(403, "M_FORBIDDEN"))
        second = rig.offer("second", binding=KEYED)
        assert (await soon(second.settled)).state == "dead"
        await rig.settled()
        assert await rig.database.run(lambda c: delivery_log.replay(c, second.row.delivery, "again", "me"))
        rig.worker.wake()
        await rooms.reads(2)
        assert relations(rooms)[1] == {"rel_type": "m.replace", "event_id": "$1"}


# messages of several events


def sent_as(pending: PendingDelivery) -> str | None:
    outcome = pending.settled.result()
    return outcome.event_id if outcome else None


async def test_events_of_a_message_are_sent_in_order_and_together(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await rig.send("before")
        message = rig.offer("text", following=["a", "b"])
        after_it = rig.offer("after")
        await soon(after_it.settled)
        assert rooms.bodies() == ["before", "text", "a", "b", "after"]
        assert [sent_as(each) for each in (message, *message.following)] == ids(rooms)[1:4]
        await rig.settled()
        assert rig.rows("delivery")[1:4] == [message.row.delivery, *(f"{message.row.delivery}.{n}" for n in (1, 2))]


async def test_message_is_written_by_one_commit_or_not_at_all(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        with rig.busy_writer():
            message = rig.offer("text", following=["a", "b"])
            others = [rig.offer(str(number)) for number in range(5)]
        await soon(asyncio.gather(*(each.committed for each in (message, *message.following, *others))))
        await rig.settled(8)
        bodies = rooms.bodies()
        at = bodies.index("text")
        assert bodies[at : at + 3] == ["text", "a", "b"]


async def test_message_with_an_event_that_the_store_refuses_is_refused_as_a_whole(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await rig.send("before")
        message = rig.pending("text", following=["a", "b"])
        last = message.following[1]
        last._row = last._row._replace(txn_id=None)  # type: ignore[arg-type]
        rig.worker.offer(message)
        for each in (message, *message.following):
            with pytest.raises(StoreUnavailable):
                await soon(each.committed)
        await rig.send("after")
        assert rooms.bodies() == ["before", "after"]
        await rig.settled(2)
        assert len(rig.states()) == 2
        assert rig.backpressure.queued == 0


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
async def test_repeated_message_is_not_sent_again(make: MakeRig, rooms: Rooms, same: bool) -> None:
    async with make() as rig:
        first = rig.offer("text", key="k", following=["a"])
        await soon(first.following[0].settled)
        again = rig.offer("text" if same else "other", key="k", following=["a", "b"])
        await soon(again.committed)
        assert again.existing is not None
        assert again.existing["delivery"] == first.row.delivery
        await rig.send("after")
        assert rooms.bodies() == ["text", "a", "after"]
        await rig.settled(3)
        assert len(rig.states()) == 3
        await until(lambda: rig.backpressure.queued == 0)
        assert rig.remembered == 0


async def test_message_for_which_there_is_no_room_leaves_nothing_behind(make: MakeRig, rooms: Rooms) -> None:
    async with make(limits=replace(PLENTY, queued=2)) as rig:
        with pytest.raises((StoreFull, ShareTaken)):
            rig.offer("text", following=["a", "b", "c"])
        assert rig.backpressure.queued == 0
        await rig.send("after")
        assert rooms.bodies() == ["after"]


async def test_message_survives_a_crash_as_a_whole(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(refuse_connection)
    async with make() as rig:
        message = rig.offer("text", following=["a", "b"], binding=KEYED)
        await soon(message.committed)
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rooms.reads(3)
        await rig.settled()
        assert rooms.bodies() == ["text", "a", "b"]
        assert rig.states() == ["sent"] * 3
