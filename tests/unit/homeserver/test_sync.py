"""flowbridge.homeserver.sync: the invitations of a sync, of which strangers say everything."""

from typing import Any

import pytest

from flowbridge.homeserver.sync import Invitation, invitations

ME = "@bot:hs"


def sync(*state: Any) -> dict[str, Any]:
    return {"next_batch": "s1", "rooms": {"invite": {"!r:hs": {"invite_state": {"events": list(state)}}}}}


def event(type_: Any, content: Any, state_key: Any = "", **more: Any) -> dict[str, Any]:
    return {"type": type_, "content": content, "state_key": state_key, "sender": "@alice:hs", **more}


INVITES = event("m.room.member", {"membership": "invite"}, ME)


def test_invitation_has_its_inviter_and_what_it_says_of_the_room() -> None:
    host = event("m.room.member", {"membership": "join"}, "@alice:hs", sender="@mallory:hs")
    name, alias = event("m.room.name", {"name": "Ops"}), event("m.room.canonical_alias", {"alias": "#ops:hs"})
    (found,) = invitations(sync(name, host, alias, INVITES), ME)
    assert found == Invitation("!r:hs", "@alice:hs", "Ops", "#ops:hs", INVITES)
    assert found.shown() == {
        "room_id": "!r:hs",
        "inviter": "@alice:hs",
        "name": "Ops",
        "canonical_alias": "#ops:hs",
    }


def test_what_is_not_told_is_left_out() -> None:
    (found,) = invitations(sync(INVITES), ME)
    assert found.shown() == {"room_id": "!r:hs", "inviter": "@alice:hs"}


@pytest.mark.parametrize(
    "state",
    [
        (),
        ("odd", 5, None),
        (event(["odd"], {}), event("m.room.name", "odd")),
        (event("m.room.name", {"name": {"odd": 1}}), event("m.room.member", {"membership": "invite"}, ME, sender=5)),
        (event("m.room.member", {"membership": "invite"}, "@another:hs"),),
    ],
)
def test_odd_state_names_nobody(state: tuple[Any, ...]) -> None:
    (found,) = invitations(sync(*state), ME)
    assert (found.inviter, found.name, found.canonical_alias) == ("", "", "")


def test_long_name_is_cut() -> None:
    (found,) = invitations(sync(event("m.room.name", {"name": "x" * 60_000}), INVITES), ME)
    assert found.name == "x" * 255
