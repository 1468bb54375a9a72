"""flowbridge.cli.bot_rooms: what `doctor` makes of a sync, also of an odd one."""

from typing import Any

import pytest

from flowbridge.cli import findings
from flowbridge.cli.bot_rooms import MAX_ROOMS, lines
from flowbridge.cli.findings import Finding

BOT = "@bot:hs"


def state(type_: str, content: Any, state_key: str = "", sender: str = "@admin:hs") -> dict[str, Any]:
    return {"type": type_, "state_key": state_key, "sender": sender, "content": content}


def levels(**content: Any) -> dict[str, Any]:
    return state("m.room.power_levels", content)


def joined(*events: dict[str, Any], refuses: bool = True, room_id: str = "!a:hs") -> Finding:
    (found,) = lines({"join": {room_id: {"state": {"events": list(events)}}}}, BOT, refuses=refuses)
    assert found.what == "room"
    return found


V12 = state("m.room.create", {"room_version": "12"}, sender=BOT)
QUIET = levels(events_default=50, users={"@admin:hs": 100})
ENCRYPTED = state("m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"})


@pytest.mark.parametrize(
    "events",
    [
        (),
        (levels(),),
        (levels(users_default=0, events_default=0),),
        (levels(events_default=50, users={BOT: 50}),),
        (levels(events_default="50", users={BOT: " 50 "}),),
        (levels(events_default=50, users_default=50),),
        (levels(events_default=50, events={"m.room.message": 0}),),
        (levels(events_default=[], users="nonsense"),),
        (V12, QUIET),
        (state("m.room.create", {"room_version": "12", "additional_creators": [BOT]}), QUIET),
    ],
)
def test_room_that_takes_messages(events: tuple[dict[str, Any], ...]) -> None:
    assert joined(*events) == Finding("room", True, "!a:hs: joined, takes messages")


@pytest.mark.parametrize(
    "events",
    [
        (QUIET,),
        (levels(events={"m.room.message": 1}),),
        (levels(events_default=50, users={BOT: 49.0}),),
        (state("m.room.create", {"room_version": "11"}, sender=BOT), QUIET),
        (state("m.room.create", {"room_version": "12", "additional_creators": "nonsense"}), QUIET),
    ],
)
def test_room_in_which_it_may_not_send(events: tuple[dict[str, Any], ...]) -> None:
    says = "!a:hs: joined, but @bot:hs may not send m.room.message: a moderator has to raise its power level"
    assert joined(*events) == Finding("room", None, says)


def test_encrypted_room_is_told_by_what_the_setting_says() -> None:
    assert joined(ENCRYPTED) == Finding(
        "room",
        None,
        "!a:hs: joined, but it is encrypted, and messages would go out as plain text: they are refused, unless "
        "FLOWBRIDGE_ENCRYPTED_ROOMS=allow",
    )
    says = "!a:hs: joined, takes messages, in plain text although it is encrypted"
    assert joined(ENCRYPTED, refuses=False) == Finding("room", True, says)


def test_replaced_room_names_the_next_one() -> None:
    found = joined(state("m.room.tombstone", {"replacement_room": "!b:hs"}))
    assert found == Finding("room", None, "!a:hs: joined, but replaced by !b:hs: send there")


def test_room_is_named_as_people_know_it() -> None:
    found = joined(state("m.room.name", {"name": "Ops"}), state("m.room.canonical_alias", {"alias": "#ops:hs"}))
    assert found.says.startswith("!a:hs (Ops, #ops:hs): ")
    assert len(joined(state("m.room.name", {"name": "x" * 10_000})).says) < 150


def test_invitation_names_who_invites_and_the_next_step() -> None:
    invite = {"invite_state": {"events": [state("m.room.member", {"membership": "invite"}, BOT, "@alice:hs")]}}
    assert lines({"invite": {"!a:hs": invite, "!b:hs": {}}}, BOT, refuses=True) == [
        Finding("room", None, "!a:hs: invited by @alice:hs, and not joined yet: POST /join/!a:hs"),
        Finding("room", None, "!b:hs: invited, and not joined yet: POST /join/!b:hs"),
    ]


def test_many_rooms_are_counted_and_those_with_something_to_do_come_first() -> None:
    room: dict[str, Any] = {"state": {"events": []}}
    rooms = {f"!good-{number}:hs": room for number in range(50)}
    rooms["!quiet:hs"] = {"state": {"events": [QUIET]}}
    found = lines({"join": rooms}, BOT, refuses=True)
    assert len(found) == MAX_ROOMS + 1
    assert "!quiet:hs" in found[0].says
    assert found[-1] == Finding("rooms", None, "31 more: 31 take messages, 0 do not")


@pytest.mark.parametrize(
    "room", [{}, {"state": 7}, {"state": {"events": ["x", 1, {}, {"type": "m.room.name", "state_key": ""}]}}]
)
def test_odd_answer_is_no_fault(room: Any) -> None:
    found = lines({"join": {"!a:hs": room}}, BOT, refuses=True)
    assert found == [Finding("room", True, "!a:hs: joined, takes messages")]
    assert lines({}, BOT, refuses=True) == []


def test_name_of_a_room_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = joined(state("m.room.name", {"name": "\x1b[31mred\nok   token"}))
    findings.show([found], in_json=False)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
