"""flowbridge.live.listener"""

import asyncio
import json

import pytest

from flowbridge.errors import Unauthorized
from flowbridge.homeserver.sync import Invitation
from flowbridge.live import frames
from flowbridge.live.frames import EventFilter, Frame
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position
from flowbridge.models import Caller

ME = "@me:hs"


def frame(name: str, *, room: str = "!r:hs", type_: str = "m.room.message", sender: str = "@you:hs") -> Frame:
    return Frame(name.encode(), room, type_, sender)


def listening(**bounds: int) -> Listener:
    return Listener(Caller(ME, "DEVICE", "token"), EventFilter(), lambda _: None, **bounds)


async def rest(of: Listener) -> bytes:
    """All that it still has to say."""
    found = b""
    while data := await of.take(0):
        if data == frames.COMMENT:
            break
        found += data
    return found


async def test_what_is_told_comes_in_order_and_at_once() -> None:
    one = listening()
    taking = asyncio.ensure_future(one.take(60))
    await asyncio.sleep(0)
    for name in "abc":
        one.notify(frame(name))
    assert await taking == b"abc"


async def test_idle_listener_hears_a_comment_and_once_a_newer_position() -> None:
    one = listening()
    one.reach(Position("s2"))
    assert [await one.take(0) for _ in range(2)] == [b"id: s2\n\n", frames.COMMENT]
    one.notify(frame("a"))
    assert [await one.take(0) for _ in range(2)] == [b"a", frames.COMMENT], "the event brought its own"


async def test_what_is_new_waits_for_what_was_missed() -> None:
    one = listening()
    one.hold()
    one.notify(frame("c"))
    one.reach(Position("s9"))
    await one.replay(frame("a"))
    assert await one.take(0) == b"a"
    assert await one.take(0) == frames.COMMENT, "s9 would leave out what is still missing"
    await one.replay(frame("b"))
    one.release()
    assert await one.take(0) == b"bc"


async def test_what_was_missed_comes_no_faster_than_it_is_read() -> None:
    one = listening(slow_bytes=3)
    for name in "abcd":
        await one.replay(frame(name))
    fifth = asyncio.ensure_future(one.replay(frame("e")))
    await asyncio.sleep(0)
    assert not fifth.done()
    assert await one.take(0) == b"abcd"
    await fifth
    assert await one.take(0) == b"e"


@pytest.mark.parametrize("bound", [{"max_frames": 3}, {"max_bytes": 3}])
@pytest.mark.parametrize("held", [False, True])
async def test_one_who_does_not_read_is_told_why_it_ends(bound: dict[str, int], held: bool) -> None:
    one = listening(**bound)
    if held:
        one.hold()
    for letter in "abc":
        one.notify(frame(letter))
    assert not one.ended
    one.notify(frame("d"))
    assert one.ended
    one.notify(frame("e"))
    said = (await rest(one)).decode()
    assert said.startswith("event: error\ndata: ")
    assert json.loads(said.split("data: ")[1])["errcode"] == "M_LIMIT_EXCEEDED"


async def test_end_says_what_is_left_and_why() -> None:
    one = listening()
    one.notify(frame("a"))
    one.end(Unauthorized("no more"))
    one.end()
    assert await rest(one) == b'aevent: error\ndata: {"errcode":"M_UNKNOWN_TOKEN","error":"no more"}\n\n'


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (EventFilter(), True),
        (EventFilter(rooms=frozenset()), False),
        (EventFilter(rooms=frozenset({"!r:hs"})), True),
        (EventFilter(rooms=frozenset({"!s:hs"})), False),
        (EventFilter(types=("m.room.message",)), True),
        (EventFilter(types=("m.room.mess",)), False),
        (EventFilter(types=("m.reaction", "m.room.*")), True),
        (EventFilter(not_senders=frozenset({"@you:hs"})), False),
        (EventFilter(not_senders=frozenset({ME})), True),
    ],
)
def test_filter_chooses_by_room_type_and_sender(wanted: EventFilter, matches: bool) -> None:
    assert wanted.matches(frame("a")) is matches


def test_event_is_one_line_of_json_with_its_room_in_todays_form() -> None:
    event = {
        "type": "m.room.message",
        "sender": "@you:hs",
        "content": {"body": "a\r\nb\u2028"},
        "age": 7,
        "user_id": "x",
    }
    made = frames.event(Position("s2"), "!r:hs", event)
    first, second, *end = made.data.decode().split("\n")
    assert (first, end) == ("id: s2", ["", ""])
    assert json.loads(second.removeprefix("data: ")) == {
        "type": "m.room.message",
        "sender": "@you:hs",
        "content": {"body": "a\r\nb\u2028"},
        "room_id": "!r:hs",
    }
    assert "\r" not in second
    assert (made.room, made.type, made.sender) == ("!r:hs", "m.room.message", "@you:hs")


def test_invitation_is_a_message_of_its_own_type_and_filtered_as_a_membership() -> None:
    event = {"type": "m.room.member", "state_key": "@me:hs", "sender": "@a:hs", "content": {"membership": "invite"}}
    found = Invitation("!r:hs", "@a:hs", "Ops", "", {**event, "unsigned": {"invite_room_state": []}})
    made = frames.invitation(found)
    kind, data, *rest = made.data.split(b"\n")
    assert (kind, rest) == (b"event: invite", [b"", b""])
    assert json.loads(data.removeprefix(b"data: ")) == {**event, "room_id": "!r:hs", "inviter": "@a:hs", "name": "Ops"}
    assert EventFilter(types=("m.room.member",)).matches(made)
    assert not EventFilter(types=("m.room.message",)).matches(made)
    assert not EventFilter(rooms=frozenset({"!other:hs"})).matches(made)
    assert not EventFilter(not_senders=frozenset({"@a:hs"})).matches(made)
