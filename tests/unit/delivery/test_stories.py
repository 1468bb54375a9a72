"""Stories in a lane: one story, one message, whatever comes in which order and whatever dies."""

import asyncio
import json
from typing import Any

import pytest

from flowbridge.delivery import binding
from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.events.relations import Binding
from flowbridge.events.stories import AHEAD_MS, OLDER, SAID, Chapter
from flowbridge.store import clock, delivery_log, message_keys, outbox, retention
from tests.rig import ROOM, MakeRig, Rig, Rooms, accept, after, error, lose, refuse_connection, soon, until

HOOK = "hook:alerts"
BOB = {"user_ids": ["@bob:hs"]}


@pytest.fixture(autouse=True)
def _quick(make: MakeRig) -> None:
    make.tune(first_pause=0.01, max_pause=0.02, rewrite_seconds=0.01, poll_seconds=0.05)


def offer(
    rig: Rig,
    body: str,
    firing: str = "",
    time: int | None = None,
    *,
    state: str = "firing",
    key: str = "k",
    on_update: str = "edit",
    room: str = ROOM,
) -> PendingDelivery:
    """An event of a hook: `firing`: a letter for each alert that fires."""
    chapter = Chapter(state, tuple(firing), time, body)
    told = Binding(key=key, on_update=on_update, chapter=chapter)
    content = {"msgtype": "m.text", "body": body, "m.mentions": BOB}
    return rig.offer(body, room, content=content, binding=told, api_key=HOOK)


async def tell(rig: Rig, body: str, firing: str = "", time: int | None = None, **how: Any) -> str | None:
    """The event id that its caller hears."""
    outcome = await soon(offer(rig, body, firing, time, **how).settled)
    assert isinstance(outcome, Outcome)
    return outcome.event_id


def done(rig: Rig, body: str = "done", time: int | None = None, **how: Any) -> Any:
    return tell(rig, body, "", time, state="resolved", **how)


def shown(rooms: Rooms, room: str = ROOM) -> list[str]:
    """What a room shows, with its edits: the text, or `(text)` of a notice; `!` behind what pings Bob."""
    found: dict[str, str] = {}
    for event in rooms.timeline[room]:
        content = event["content"]
        if (relation := content.get("m.relates_to", {})).get("rel_type") == "m.replace":
            assert not content["m.mentions"]
            assert not content["m.new_content"].get("m.mentions")
            found[relation["event_id"]] = content["m.new_content"]["body"]
        else:
            text = content["body"] if content["msgtype"] == "m.text" else f"({content['body']})"
            found[event["event_id"]] = text + "!" * (content.get("m.mentions") == BOB)
    return list(found.values())


def sent(rooms: Rooms) -> list[str]:
    return [event["content"]["body"] for event in rooms.timeline[ROOM]]


def notes(rig: Rig) -> list[str]:
    return [entry["note"] for history in rig.rows("history") for entry in json.loads(history) if "note" in entry]


async def test_story_is_told_in_one_message_and_what_begins_to_fire_in_another(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        assert await tell(rig, "a fires", "a", 1) == "$1"
        assert await tell(rig, "a fires", "a", 1) == "$1"  # a repeat, or the other of a pair
        assert shown(rooms) == ["a fires!"]
        assert await tell(rig, "a and b fire", "ab", 2) == "$2"
        assert shown(rooms) == ["a fires!", "a and b fire!"]
        assert await tell(rig, "b fires", "b", 3) == "$3"
        assert await done(rig, "all is well", 4) == "$4"
        assert shown(rooms) == ["a fires!", "all is well"]
        assert await done(rig, "all is well", 4) == "$2"  # the message that shows it
        assert await tell(rig, "a fires again", "a", 5) == "$5"
        assert shown(rooms) == ["a fires!", "all is well", "a fires again!"]
        await rig.settled()
        assert notes(rig) == [SAID, SAID]
        assert rig.rows("attempts") == [1, 0, 1, 1, 1, 0, 1]


async def test_event_that_says_nothing_new_does_not_show_that_the_homeserver_takes_events(
    make: MakeRig, rooms: Rooms
) -> None:
    """Else an outage would be taken for the fault of another event, which would be set aside."""
    async with make() as rig:
        for _ in range(3):
            await tell(rig, "a", "a", 1)
        await rig.settled()
        assert rig.states() == ["sent"] * 3
        assert len(await rig.database.run(lambda c: outbox.sent_last(c, 10))) == 1


async def test_run_that_passes_is_edited_and_one_that_fails_pings(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "queued", state="")
        await tell(rig, "runs", state="")
        await tell(rig, "passed", state="")
        assert shown(rooms) == ["passed"]
        await tell(rig, "runs again", state="")
        await tell(rig, "failed")
        assert shown(rooms) == ["runs again", "failed!"]


async def test_resolved_of_what_is_not_known_to_fire_is_a_notice(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await done(rig, "well", 5)
        assert shown(rooms) == ["(well)"]
        await done(rig, "all well", 6)
        assert shown(rooms) == ["all well"]  # in its place
        await tell(rig, "late", "a", 4)
        await tell(rig, "fires", "a", 7)
        assert shown(rooms) == ["all well", "fires!"]


@pytest.mark.parametrize(
    ("on_update", "relation"),
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
async def test_update_by_another_way_pings_nobody_either(
    make: MakeRig, rooms: Rooms, on_update: str, relation: Any
) -> None:
    async with make() as rig:
        await tell(rig, "a and b fire", "ab", 1, on_update=on_update)
        await tell(rig, "a fires", "a", 2, on_update=on_update)
        await done(rig, "done", 3, on_update=on_update)
        assert await done(rig, "done", 3, on_update=on_update) == "$3"
        assert shown(rooms) == ["a and b fire!", "(a fires)", "(done)"]
        assert [event["content"].get("m.relates_to") for event in rooms.timeline[ROOM]] == [None, relation, relation]
        await tell(rig, "c fires", "c", 4, on_update=on_update)
        assert shown(rooms)[3:] == ["c fires!"]
        assert "m.relates_to" not in rooms.timeline[ROOM][3]["content"]


async def test_update_without_a_state_pings_whom_its_template_mentions_but_not_by_an_edit(
    make: MakeRig, rooms: Rooms
) -> None:
    async with make() as rig:
        await tell(rig, "step 1", state="", on_update="thread")
        await tell(rig, "step 2", state="", on_update="thread")
        await tell(rig, "step 3", state="")
        assert shown(rooms) == ["step 3", "step 2!"]


async def test_older_events_overwrite_nothing(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 10)
        await done(rig, "done", 40)
        for body, firing, time in (("a and b", "ab", 20), ("b", "b", 30), ("a again", "a", 39)):
            assert await tell(rig, body, firing, time) == "$1"
        assert shown(rooms) == ["done"]
        await rig.settled()
        assert notes(rig) == [OLDER] * 3


async def test_events_without_times_and_with_equal_ones_go_by_their_order(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "one", "a", 10)
        await tell(rig, "two", "a", 10)
        await tell(rig, "three", "a")
        await tell(rig, "four", "a", 5)  # than three it is not known to be older
        assert shown(rooms) == ["four"]


async def test_what_is_said_again_at_a_later_time_is_not_overwritten_from_between(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 10)
        await tell(rig, "a", "a", 30)
        await tell(rig, "late", "ab", 20)
        assert shown(rooms) == ["a!"]


async def test_clock_of_the_sender_that_is_years_ahead_silences_nothing(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        now = clock.now_ms()
        await tell(rig, "a", "a", now + AHEAD_MS + 10_000_000)
        await done(rig, "done", now)
        assert shown(rooms) == ["done"]


async def test_stories_of_other_keys_rooms_and_hooks_are_others(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1, key="one")
        await tell(rig, "a", "a", 1, key="two")
        await tell(rig, "a", "a", 1, key="one", room="!other:hs")
        binding = Binding(key="one", chapter=Chapter("firing", ("a",), 1, "a"))
        await rig.send("a", binding=binding, api_key="hook:other")
        assert len(rooms.timeline[ROOM]) == 3
        assert len(rooms.timeline["!other:hs"]) == 1


async def test_message_of_no_story_under_its_key_ends_what_was_said(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        plain = Binding(key="k")
        await rig.send("plain", binding=plain, api_key=HOOK)
        await tell(rig, "runs", state="")
        assert shown(rooms) == ["runs"]
        await tell(rig, "fires", "a", 10)
        await rig.send("plain again", binding=plain, api_key=HOOK)
        assert shown(rooms) == ["runs", "plain again"]
        await done(rig, "done", 5)  # nothing is known of its time any more
        assert shown(rooms) == ["runs", "done"]


# what dies


REFUSED = error(403, "M_FORBIDDEN")


async def test_first_message_that_died_was_not_said(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(REFUSED, REFUSED)
        assert await tell(rig, "a", "a", 1) is None
        assert await tell(rig, "a", "a", 1) is None
        assert await tell(rig, "a", "a", 1) == "$1"
        assert await tell(rig, "a", "a", 1) == "$1"
        assert shown(rooms) == ["a!"]


async def test_update_that_died_was_not_said(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a and b", "ab", 1)
        rooms.then(REFUSED, REFUSED)
        await tell(rig, "a", "a", 2)
        await done(rig, "done", 3)
        await tell(rig, "a and b", "ab", 1)  # what the room shows
        assert shown(rooms) == ["a and b!"]
        await done(rig, "done", 3)
        assert shown(rooms) == ["done"]


async def test_event_that_says_it_already_is_named_also_when_another_died_meanwhile(
    make: MakeRig, rooms: Rooms
) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        thread = await done(rig, "well", 2, on_update="thread")
        rooms.then(REFUSED)
        assert await done(rig, "died", 3, on_update="thread") is None
        assert await done(rig, "well", 4, on_update="thread") == thread


async def test_after_a_first_message_that_died_the_one_before_holds(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        rooms.then(REFUSED)
        await tell(rig, "a and b", "ab", 2)
        assert await tell(rig, "a", "a", 1) == "$1"
        await tell(rig, "a, still", "a", 3)
        assert shown(rooms) == ["a, still"]
        rooms.then(REFUSED)
        await tell(rig, "a and c", "ac", 4)
        await done(rig, "done", 5)
        assert shown(rooms) == ["done"]


async def test_notice_that_died_was_not_said(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        rooms.then(REFUSED)
        await done(rig, "done", 1)
        await done(rig, "done", 1)
        assert shown(rooms) == ["(done)"]


async def replay(rig: Rig, pending: PendingDelivery, times: int = 1) -> None:
    """Replay a settled event, and wait for how that ends."""
    delivery = pending.row.delivery
    await rig.settled()
    txn_id = f"{delivery} again {times}"
    assert await rig.database.run(lambda c: delivery_log.replay(c, delivery, txn_id, "me"))
    rig.worker.wake()
    await rig.settled()


@pytest.mark.parametrize("timed", [True, False])
async def test_replayed_dead_letter_overwrites_nothing_newer(make: MakeRig, rooms: Rooms, timed: bool) -> None:
    async with make() as rig:
        await tell(rig, "a and b", "ab", 1 if timed else None)
        rooms.then(REFUSED)
        dead = offer(rig, "a", "a", 2 if timed else None)
        await soon(dead.settled)
        await done(rig, "done", 3 if timed else None)
        await replay(rig, dead)
        assert shown(rooms) == ["done"]
        assert rig.rows("state", "event_id")[-1] == ("sent", "$1")
        assert notes(rig) == [OLDER]
        assert len(rooms.sends) == 3


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("state", ["firing", "resolved"])
async def test_replayed_dead_letter_that_is_news_is_sent(make: MakeRig, rooms: Rooms, timed: bool, state: str) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1 if timed else None)
        rooms.then(REFUSED)
        dead = offer(rig, "b", "b" if state == "firing" else "", 2 if timed else None, state=state)
        await soon(dead.settled)
        await replay(rig, dead)
        assert shown(rooms) == (["a!", "b!"] if state == "firing" else ["b"])
        again = await tell(rig, "b", "b" if state == "firing" else "", 2 if timed else None, state=state)
        assert again == ("$2" if state == "firing" else "$1")
        assert len(rooms.timeline[ROOM]) == 2


async def test_replayed_first_message_is_an_update_when_another_said_meanwhile_that_it_fires(
    make: MakeRig, rooms: Rooms
) -> None:
    async with make() as rig:
        rooms.then(REFUSED)
        dead = offer(rig, "a", "a", 2)
        await soon(dead.settled)
        await tell(rig, "a, earlier", "a", 1)
        await replay(rig, dead)
        assert shown(rooms) == ["a"]  # one first message, and the newer text


async def test_replay_of_what_was_sent_last_is_sent_again(make: MakeRig, rooms: Rooms) -> None:
    """Somebody wants it: it may have been removed from the room."""
    async with make() as rig:
        first = offer(rig, "a", "a", 1)
        await soon(first.settled)
        await replay(rig, first)
        assert shown(rooms) == ["a!", "a!"]
        last = offer(rig, "done", time=2, state="resolved")
        await soon(last.settled)
        await replay(rig, last)
        assert shown(rooms) == ["a!", "done"]
        assert len(rooms.sends) == 4
        await replay(rig, first, 2)
        assert len(rooms.sends) == 4
        assert rig.rows("event_id")[-1] == "$2"  # the message that shows what is newer


async def test_story_outlives_its_deliveries(make: MakeRig, rooms: Rooms) -> None:
    async def purge() -> None:
        await rig.settled()
        assert await rig.database.run(lambda c: retention.purge(c, 2**60, 2**60))

    async with make() as rig:
        await tell(rig, "a", "a", 1)
        await purge()
        assert await tell(rig, "a", "a", 1) == "$1"
        await done(rig, "done", 3)
        await purge()
        await tell(rig, "late", "a", 2)
        await done(rig, "done", 3)  # how its delivery ended is not known any more
        assert await done(rig, "done", 3) == "$1"
        assert shown(rooms) == ["done"]
        rooms.then(REFUSED)
        await tell(rig, "b", "b", 4)
        await purge()
        await tell(rig, "b", "b", 4)
        assert shown(rooms) == ["done", "b!"]
        assert await rig.database.run(lambda c: message_keys.forget(c, 2**60)) == 1
        await tell(rig, "b", "b", 4)
        assert shown(rooms) == ["done", "b!", "b!"]  # after 90 days it is another story


async def test_update_that_died_and_was_deleted_keeps_its_time_and_nothing_else(make: MakeRig, rooms: Rooms) -> None:
    """How it ended is not known then: what is older might overwrite it, and what says the same is said again."""
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        rooms.then(REFUSED)
        await done(rig, "done", 5)
        await rig.settled()
        await rig.database.run(lambda c: retention.purge(c, 0, 2**60))
        await tell(rig, "between", "a", 3)
        assert shown(rooms) == ["a!"]
        await done(rig, "done", 5)
        assert shown(rooms) == ["done"]


# restarts, and what is bound ahead


async def test_first_message_is_the_same_after_a_crash(make: MakeRig, rooms: Rooms) -> None:
    rooms.always(lose)
    async with make() as rig:
        first = offer(rig, "a", "a", 1)
        second = offer(rig, "done", time=2, state="resolved")
        await soon(second.committed)
        await until(lambda: rooms.timeline[ROOM])
        assert not first.settled.done()
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rig.settled()
        assert shown(rooms) == ["done"]
        assert sent(rooms) == ["a", "* done"]
        await tell(rig, "a", "a", 1)
        assert shown(rooms) == ["done"]


async def test_event_that_was_decided_and_not_sent_is_sent_after_a_crash(make: MakeRig, rooms: Rooms) -> None:
    """Its own decision must not tell it that it was said already."""
    rooms.always(refuse_connection)
    async with make() as rig:
        offer(rig, "a", "a", 1)
        await until(lambda: rig.rows("binding") and '"bound_as"' in str(rig.rows("binding")))
        await rig.crash()
    rooms.always(accept)
    async with make() as rig:
        await rig.settled()
        assert shown(rooms) == ["a!"]


async def test_binding_whose_commit_was_not_heard_of_is_done_again(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PendingDelivery, "bind_early", lambda _: None)
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        real = binding.resolve
        lost = iter([True, True])

        def resolve(*asked: Any) -> Any:
            found = real(*asked)
            if not next(lost, False):
                return found
            asked[0].commit()
            raise OSError("the answer got lost")

        monkeypatch.setattr(binding, "resolve", resolve)
        await tell(rig, "a and b", "ab", 2)
        assert next(lost, None) is None
        rooms.then(REFUSED)
        await tell(rig, "done", state="resolved")
        await tell(rig, "a", "a", 3)
        assert shown(rooms) == ["a!", "a"]


async def test_stories_of_a_room_are_bound_together(
    make: MakeRig, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PendingDelivery, "bind_early", lambda _: None)
    go = asyncio.Event()
    async with make() as rig:
        rooms.then(after(go))
        rig.offer("before")
        each = [offer(rig, f"{number}", "a", 1, key=f"{number % 20}") for number in range(40)]
        await soon(each[-1].committed)
        bound = []
        real = binding.resolve

        def resolve(connection: Any, wanted: Any, amended: Any) -> Any:
            bound.append([json.loads(row.content)["body"] for each in wanted for row in each.rows])
            return real(connection, wanted, amended)

        monkeypatch.setattr(binding, "resolve", resolve)
        go.set()
        await soon(asyncio.gather(*(one.settled for one in each)))
        assert shown(rooms)[1:] == [str(number) for number in range(20, 40)]
        assert sent(rooms)[1:] == [*map(str, range(20)), *(f"* {number}" for number in range(20, 40))]
        assert (
            1 <= len(bound) <= 21 + 2
        )  # one for all twenty stories, and one for each update, which waits for its first
        await rig.settled()


async def test_event_behind_one_that_dies_is_decided_when_that_is_known(make: MakeRig, rooms: Rooms) -> None:
    go = asyncio.Event()
    async with make() as rig:
        rooms.then(after(go, REFUSED))
        each = [offer(rig, body, "a", 1) for body in ("a", "a", "a")]
        await soon(each[-1].committed)
        go.set()
        outcomes = await soon(asyncio.gather(*(one.settled for one in each)))
        assert [outcome.event_id for outcome in outcomes] == [None, "$1", "$1"]


async def test_event_that_says_nothing_new_does_not_end_the_others_of_its_request(make: MakeRig, rooms: Rooms) -> None:
    async with make() as rig:
        await tell(rig, "a", "a", 1)
        bound = Binding(key="k", chapter=Chapter("firing", ("a",), 1, "a"))
        message = rig.offer("a", binding=bound, api_key=HOOK, following=["b", "c"])
        outcomes = await soon(asyncio.gather(*(each.settled for each in (message, *message.following))))
        assert [outcome.event_id for outcome in outcomes] == ["$1", "$2", "$3"]
        assert sent(rooms) == ["a", "b", "c"]
