"""What an account hears in a room that it is not in, or where its power is too low, on a real Synapse."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models.timing import Timing
from tests.conftest import MakeAccount
from tests.integration.conftest import Room
from tests.integration.test_invitations import PUBLIC, World, do
from tests.integration.test_waiting import ASYNC, MATRIX, accepted, send, wait_until

KNOCK = {"initial_state": [{"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "knock"}}]}


@pytest.fixture(scope="module")
def off(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, httpx.Client]]:
    """A bot that joins nothing by itself."""
    world = World(synapse, make_account(), tmp_path_factory.mktemp("off"))
    with world.bridge("off") as caller:
        yield world, caller


def of_bot(world: World, method: str, path: str, **body: Any) -> None:
    headers = {"Authorization": f"Bearer {world.bot.access_token}"}
    with httpx.Client(base_url=world.synapse.url, headers=headers, trust_env=False) as direct:
        direct.request(method, f"{MATRIX}{path}", json=body).raise_for_status()


def private(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room()
    return room.id, (
        "{bot} is not in this room: invite {bot}, or POST /join/{room} once it is invited; the room is private, and so "
        "far it is not"
    )


def public(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    return new_room(**PUBLIC).id, "{bot} is not in this room: POST /join/{room}, since anybody may join it"


def knock(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    return new_room(**KNOCK).id, (
        "{bot} is not in this room: invite {bot}, or knock (POST /_matrix/client/v3/knock/{room}) and have a member "
        "let it in"
    )


def knocked(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room(**KNOCK)
    of_bot(world, "POST", f"/knock/{quote(room.id)}")
    return room.id, "{bot} has knocked on this room, and nobody has let it in yet: a member has to invite {bot}"


def invited(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room(invite=[world.bot.user_id])
    return room.id, "{bot} is invited to this room, and has not joined it yet: POST /join/{room}"


def banned(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room(**PUBLIC)
    of_bot(world, "POST", f"{room.path}/join")
    do(room, "ban", world.bot.user_id, reason="noise")
    return room.id, (
        "{bot} is banned from this room: a moderator has to unban it; after that, POST /join/{room}, since anybody may "
        "join it"
    )


def kicked(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room(invite=[world.bot.user_id])
    of_bot(world, "POST", f"{room.path}/join")
    do(room, "kick", world.bot.user_id, reason="too\nloud")
    return room.id, (
        "{bot} was removed from this room by {owner} (too loud): invite {bot}, or POST /join/{room} once it is invited"
    )


def left(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    room = new_room(**PUBLIC)
    of_bot(world, "POST", f"{room.path}/join")
    of_bot(world, "POST", f"{room.path}/leave")
    return room.id, "{bot} has left this room: POST /join/{room}, since anybody may join it"


def no_such_room(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    return "!nowhere:localhost", (
        "the homeserver of {bot} knows no room {room}: check the id (Element shows it in the room's settings, under "
        "Advanced), or use the room's alias"
    )


def no_such_room_without_a_server(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    return f"!{'A' * 43}", no_such_room(world, new_room)[1]


def room_of_another_server(world: World, new_room: Callable[..., Room]) -> tuple[str, str]:
    return "!abc:elsewhere.example", (
        "the homeserver of {bot} knows no room {room}: check the id, or, for a room of elsewhere.example, "
        "POST /join/{room}?via=elsewhere.example"
    )


MISTAKES = [
    private,
    public,
    knock,
    knocked,
    invited,
    banned,
    kicked,
    left,
    no_such_room,
    no_such_room_without_a_server,
    room_of_another_server,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_flow_surface_says_which_mistake_it_is_and_the_next_step(
    off: tuple[World, httpx.Client], new_room: Callable[..., Room], owner: Account, mistake: Any
) -> None:
    world, caller = off
    room_id, words = mistake(world, new_room)
    words = words.format(bot=world.bot.user_id, room=room_id, owner=owner.user_id)
    path = f"/rooms/{quote(room_id, safe='')}"
    text = {"msgtype": "m.text", "body": "x"}
    calls = {
        "send": ("POST", f"{path}/send/m.room.message", text),
        "state": ("PUT", f"{path}/state/m.room.topic", {"topic": "t"}),
        "read": ("GET", f"{path}/messages", None),
        "members": ("GET", f"{path}/members", None),
        "all state": ("GET", f"{path}/state", None),
        "state event": ("GET", f"{path}/state/m.room.topic", None),
        "live": ("GET", f"{path}/live", None),
        "invite": ("POST", f"{path}/invite", {"user_id": owner.user_id}),
        "join": ("POST", f"/join/{quote(room_id, safe='')}", {}),
        "join there": ("POST", f"{path}/join", {}),
    }
    if mistake in (kicked, left):  # it may still read what happened before
        for name in ("read", "members", "all state", "state event"):
            del calls[name]
    if mistake in (public, invited, left):  # then it joins
        del calls["join"], calls["join there"]
    for name, (method, target, body) in calls.items():
        answer = caller.request(method, target, json=body)
        assert answer.status_code in (403, 404), (name, answer.text)
        found = answer.json()
        assert found["error"].startswith(words), (name, found)
        if name != "live":
            own = found["flowbridge"]["homeserver"]
            assert found["error"] == f"{words} ({own})", name


def test_unknown_alias_is_said_to_be_one(off: tuple[World, httpx.Client]) -> None:
    _, caller = off
    alias = "#nowhere:localhost"
    words = f"no room has the alias {alias}: check its spelling, or use the room's id (Room alias {alias} not found)"
    path = f"/rooms/{quote(alias)}"
    for method, target in (
        ("POST", f"{path}/send/m.room.message"),
        ("GET", f"{path}/messages"),
        ("GET", f"{path}/state/m.room.topic"),
        ("GET", f"{path}/live"),
        ("POST", f"/join/{quote(alias)}"),
        ("POST", f"{path}/join"),
        ("POST", f"{path}/leave"),
    ):
        body = {"msgtype": "m.text", "body": "x"} if method == "POST" and "send" in target else None
        answer = caller.request(method, target, json=body)
        assert (answer.status_code, answer.json()["errcode"], answer.json()["error"]) == (404, "M_NOT_FOUND", words)


def test_power_level_that_is_too_low_is_named(off: tuple[World, httpx.Client], new_room: Callable[..., Room]) -> None:
    world, caller = off
    room = new_room(**PUBLIC, power_level_content_override={"events_default": 37, "invite": 50})
    caller.post(f"/join/{room.id}").raise_for_status()
    bot = world.bot.user_id
    answer = send(caller, room, "x")
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert answer.json()["error"].startswith(
        f"{bot} has power level 0 in this room, and m.room.message needs 37: a moderator has to raise it (You don't"
    )
    topic = caller.put(f"{room.path}/state/m.room.topic", json={"topic": "t"})
    assert topic.json()["error"].startswith(f"{bot} has power level 0 in this room, and m.room.topic needs 50: ")
    invite = caller.post(f"{room.path}/invite", json={"user_id": "@x:localhost"})
    words = f"the power level of {bot} in this room is too low for inviting: a moderator has to raise it ("
    assert invite.json()["error"].startswith(words)
    absent = caller.get(f"{room.path}/state/m.room.topic")
    assert (absent.status_code, absent.json()) == (404, {"errcode": "M_NOT_FOUND", "error": "Event not found."})


@pytest.mark.parametrize("mistake", [private, no_such_room])
def test_matrix_surface_keeps_the_homeservers_words(
    off: tuple[World, httpx.Client], new_room: Callable[..., Room], mistake: Any
) -> None:
    world, caller = off
    room_id, words = mistake(world, new_room)
    path = f"{MATRIX}/rooms/{quote(room_id, safe='')}"
    sent = caller.put(f"{path}/send/m.room.message/1", json={"msgtype": "m.text", "body": "x"})
    assert sent.json()["error"].startswith(f"User {world.bot.user_id} not in room {room_id}")
    assert sent.json()["flowbridge"]["hint"].startswith(words.format(bot=world.bot.user_id, room=room_id))
    for answer in (caller.get(f"{path}/messages"), caller.get(f"{path}/state/m.room.topic")):
        own = f"User {world.bot.user_id} not in room {room_id}, and room previews are disabled"
        assert answer.json() == {"errcode": "M_FORBIDDEN", "error": own}


def test_events_for_a_room_that_never_comes_are_dead_letters_with_the_next_step(
    off: tuple[World, httpx.Client], tmp_path: Path, new_room: Callable[..., Room]
) -> None:
    world, room = replace(off[0], folder=tmp_path), new_room()
    with world.bridge("off", timing=Timing(absent_pauses=(0.1, 0.1, 0.1), rest_pause=0.05)) as caller:
        queued = accepted(send(caller, room, "queued", **ASYNC))
        dead = wait_until(caller, queued, "dead")
        assert dead["error"]["error"].startswith(f"{world.bot.user_id} is not in this room: invite {world.bot.user_id}")
        assert dead["attempts"] == 4
