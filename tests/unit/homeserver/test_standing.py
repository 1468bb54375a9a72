"""flowbridge.homeserver.standing: what homeservers say of an account and a room, in words."""

from typing import Any

import pytest

from flowbridge.errors import HomeserverError
from flowbridge.homeserver import standing
from flowbridge.homeserver.standing import Standing

BOT, ROOM = "@bot:hs", "!r:hs"


def error(text: str, status: int = 403, errcode: str = "M_FORBIDDEN", **extra: Any) -> HomeserverError:
    return HomeserverError(text, status=status, errcode=errcode, **extra)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (error("Missing via to query remote room", 400, "M_UNKNOWN"), "none"),
        (error("Room not found or is not accessible", 404, "M_NOT_FOUND"), "private"),
        (error("Room is unknown to this server", 404, "M_NOT_FOUND"), "none"),
        (error("You are not allowed", 403), "private"),
        (error("Unrecognized request", 404, "M_UNRECOGNIZED"), ""),
    ],
)
def test_room_without_a_summary_is_private_or_none(found: HomeserverError, expected: str) -> None:
    assert standing.of_refusal(BOT, ROOM, found) == Standing(BOT, ROOM, "", expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "membership", "access"),
    [
        ({"membership": "leave", "join_rule": "public"}, "leave", "public"),
        ({"membership": "ban", "join_rule": "invite"}, "ban", "private"),
        ({"membership": "leave", "join_rule": "knock_restricted"}, "leave", "knock"),
        ({"membership": "leave", "join_rule": "restricted"}, "leave", "private"),
        ({"join_rule": ["odd"], "membership": {"odd": 1}}, "", ""),
        ({}, "", ""),
    ],
)
def test_summary_says_who_may_join(found: dict[str, Any], membership: Any, access: Any) -> None:
    assert standing.of_summary(BOT, ROOM, found) == Standing(BOT, ROOM, membership, access)


@pytest.mark.parametrize(
    ("found", "by", "reason"),
    [
        ({"sender": "@mod:hs", "content": {"membership": "leave", "reason": "x" * 999}}, "@mod:hs", "x" * 200),
        ({"sender": "@mod:hs", "content": {"membership": "leave", "reason": ["odd"]}}, "@mod:hs", ""),
        ({"membership": "leave", "reason": "content alone"}, "", "content alone"),
        ({"sender": 5, "content": {"membership": "leave"}}, "", ""),
    ],
)
def test_member_event_says_who_removed_the_account(found: dict[str, Any], by: str, reason: str) -> None:
    known = Standing(BOT, ROOM, "", "public")
    assert standing.as_member(known, found) == Standing(BOT, ROOM, "leave", "public", by, reason)
    assert standing.as_member(known, {"content": "odd"}) == known


def test_what_is_not_known_is_not_said() -> None:
    assert str(Standing(BOT, ROOM)) == f"{BOT} is not in this room: invite {BOT}, or POST /join/{ROOM}"
    assert str(Standing(BOT, ROOM, "leave")) == str(Standing(BOT, ROOM))
    assert str(Standing(BOT, ROOM, "join")) == ""


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            "You don't have permission to post that to the room. user_level (0) < send_level (50)",
            f"{BOT} has power level 0 in this room, and m.room.topic needs 50: a moderator has to raise it",
        ),
        (
            "You don't have permission to invite users",
            f"the power level of {BOT} in this room is too low for m.room.topic: a moderator has to raise it",
        ),
        ("something else", ""),
    ],
)
def test_power_level_is_read_from_the_homeservers_text(found: str, expected: str) -> None:
    assert standing.of_power(BOT, "m.room.topic", found) == expected


def test_homeservers_words_stay_beside_ours() -> None:
    came = error("You are not in the room", flowbridge={"replacement_room": "!new:hs"}, soft_logout=True)
    ours = standing.in_words(came, "join it first")
    assert (ours.status, ours.body()) == (
        403,
        {
            "errcode": "M_FORBIDDEN",
            "error": "join it first (You are not in the room)",
            "soft_logout": True,
            "flowbridge": {"replacement_room": "!new:hs", "homeserver": "You are not in the room"},
        },
    )
    assert standing.as_it_came(ours.body()) == {
        "errcode": "M_FORBIDDEN",
        "error": "You are not in the room",
        "soft_logout": True,
        "flowbridge": {"replacement_room": "!new:hs", "hint": "join it first (You are not in the room)"},
    }
    assert standing.in_words(came, "") is came
    assert standing.as_it_came(came.body()) == came.body()
