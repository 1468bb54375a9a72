"""The bot takes the invitations that it is told to take, on a real Synapse."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.conftest import KEY, Room, store_in
from tests.integration.test_waiting import ASYNC, MATRIX, accepted, send, wait_until
from tests.patience import PATIENCE, until
from tests.postgres import LocalPostgres
from tests.sse import listening

QUICK = Timing(invitation_seconds=0.05, absent_pauses=(10 * PATIENCE,))


PUBLIC = {"preset": "public_chat"}


@dataclass(frozen=True)
class World:
    """A bot with a bridge of its own, and others at the same homeserver."""

    synapse: LocalSynapse
    bot: Account
    folder: Path

    @contextmanager
    def bridge(self, auto_join: str = "own", *, timing: Timing = QUICK, **values: Any) -> Iterator[httpx.Client]:
        settings = Settings.load(
            **{
                "base_url": self.synapse.url,
                "access_token": self.bot.access_token,
                "api_keys": [KEY],
                "database_url": store_in(self.folder),
                **values,
            },
            auto_join=auto_join,
        )
        headers = {"X-API-Key": KEY}
        with (
            background(settings, timing=timing) as url,
            httpx.Client(base_url=url, headers=headers, trust_env=False) as caller,
        ):
            yield caller

    def membership(self, room: Room) -> str:
        return str(room.state("m.room.member", self.bot.user_id)["membership"])

    def is_in(self, room: Room) -> None:
        until(lambda: self.membership(room) == "join")


@pytest.fixture
def world(synapse: LocalSynapse, make_account: MakeAccount, tmp_path: Path) -> World:
    return World(synapse, make_account(), tmp_path)


def invitations(caller: httpx.Client) -> list[dict[str, Any]]:
    return list(caller.get("/rooms").raise_for_status().json()["invitations"])


def do(room: Room, action: str, user_id: str, **body: Any) -> None:
    path, headers = f"{MATRIX}{room.path}/{action}", {"Authorization": f"Bearer {room.owner.access_token}"}
    room.direct.post(path, json={"user_id": user_id, **body}, headers=headers).raise_for_status()


def test_invitation_of_the_own_server_is_taken_and_what_waits_for_it_goes_out(
    world: World, new_room: Callable[..., Room]
) -> None:
    room = new_room()
    with world.bridge() as caller:
        queued = accepted(send(caller, room, "queued", **ASYNC))
        until(lambda: "not in this room" in caller.get(queued).json().get("waiting", {}).get("reason", ""))
        do(room, "invite", world.bot.user_id)
        wait_until(caller, queued)
        assert invitations(caller) == []
    assert room.bodies() == ["queued"]


def test_invitation_that_came_while_the_bridge_was_down_is_taken(world: World, new_room: Callable[..., Room]) -> None:
    rooms = [new_room(invite=[world.bot.user_id]) for _ in range(5)]
    with world.bridge():
        for room in rooms:
            world.is_in(room)


@pytest.mark.parametrize("setting", ["off", "elsewhere.example", "@nobody:localhost"])
def test_invitation_that_is_not_taken_is_shown(world: World, new_room: Callable[..., Room], setting: str) -> None:
    room = new_room(name="Kitchen", invite=[world.bot.user_id])
    with world.bridge(setting) as caller:
        (found,) = invitations(caller)
        assert found == {"room_id": room.id, "inviter": room.owner.user_id, "name": "Kitchen"}
        refused = send(caller, room, "x")
        assert refused.json()["error"].startswith(
            f"{world.bot.user_id} is invited to this room, and has not joined it yet: POST /join/{room.id} ("
        )
        assert caller.post(f"/join/{room.id}").json() == {"room_id": room.id}
        assert invitations(caller) == []
        assert send(caller, room, "after").status_code == 200


@pytest.mark.parametrize("setting", ["all", "localhost", "{owner}", "own, @x:elsewhere.example"])
def test_setting_names_whose_invitations_are_taken(
    world: World, new_room: Callable[..., Room], owner: Account, setting: str
) -> None:
    with world.bridge(setting.format(owner=owner.user_id)):
        world.is_in(new_room(invite=[world.bot.user_id]))


def test_join_by_another_client_wakes_what_waits(world: World, new_room: Callable[..., Room]) -> None:
    room = new_room()
    with world.bridge("off") as caller:
        queued = accepted(send(caller, room, "queued", **ASYNC))
        until(lambda: "waiting" in caller.get(queued).json() and caller.get(queued).json()["attempts"])
        do(room, "invite", world.bot.user_id)
        headers = {"Authorization": f"Bearer {world.bot.access_token}"}
        room.direct.post(f"{MATRIX}/join/{quote(room.id)}", json={}, headers=headers).raise_for_status()
        wait_until(caller, queued)
    assert room.bodies() == ["queued"]


def test_withdrawn_invitation_is_not_tried_for_ever(
    world: World, new_room: Callable[..., Room], caplog: pytest.LogCaptureFixture
) -> None:
    """Synapse answers 403 to a join without an invitation, which is the end of it; the next one counts again."""
    room = new_room()
    with world.bridge(timing=Timing(invitation_seconds=0.05)) as caller:
        for _ in range(3):
            do(room, "invite", world.bot.user_id)
            do(room, "kick", world.bot.user_id)
        do(room, "invite", world.bot.user_id)
        world.is_in(room)
        assert invitations(caller) == []


def test_messages_to_the_device_stay_for_a_client_with_the_same_token(
    world: World, new_room: Callable[..., Room], owner: Account
) -> None:
    """A sync with a `since` deletes what came before it: the keys of encrypted messages among them."""
    with world.bridge() as caller, httpx.Client(base_url=world.synapse.url, trust_env=False) as direct:
        world.is_in(new_room(invite=[world.bot.user_id]))
        body = {"messages": {world.bot.user_id: {"*": {"key": "secret"}}}}
        of_owner = {"Authorization": f"Bearer {owner.access_token}"}
        direct.put(f"{MATRIX}/sendToDevice/org.example/1", json=body, headers=of_owner).raise_for_status()
        for _ in range(2):  # each is seen in a look of its own
            world.is_in(new_room(invite=[world.bot.user_id]))
        of_bot = {"Authorization": f"Bearer {world.bot.access_token}"}
        sync = direct.get(f"{MATRIX}/sync", headers=of_bot).raise_for_status().json()
        assert [event["content"] for event in sync["to_device"]["events"]] == [{"key": "secret"}]
        assert invitations(caller) == []


def test_one_of_several_replicas_joins_and_another_goes_on_after_it(
    world: World, new_room: Callable[..., Room], postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flowbridge")
    timing = Timing(invitation_seconds=0.05)
    shared = {"database_url": postgres.fresh_database(), "secret_key": Fernet.generate_key().decode()}
    with ExitStack() as first, world.bridge(timing=timing, **shared) as second:
        one = first.enter_context(world.bridge(timing=timing, **shared))
        for room in [new_room(invite=[world.bot.user_id]) for _ in range(3)]:
            world.is_in(room)
        assert one.get("/readyz").status_code == second.get("/readyz").status_code == 200
        first.close()
        world.is_in(new_room(invite=[world.bot.user_id]))
    with world.bridge(timing=timing, **shared):  # whichever had it before
        world.is_in(new_room(invite=[world.bot.user_id]))
    assert caplog.text.count("invitation_taken") == 5


async def test_live_stream_shows_invitations(world: World, new_room: Callable[..., Room]) -> None:
    home = new_room(**PUBLIC)
    with world.bridge("off") as caller:
        base = str(caller.base_url).rstrip("/")
        await asyncio.to_thread(lambda: caller.post(f"{home.path}/join").raise_for_status())
        async with (
            listening(f"{base}/live", KEY, types="m.room.m*") as stream,
            listening(f"{base}/live", KEY, types="m.room.message") as messages,
        ):
            await asyncio.to_thread(send, caller, home, "before")
            assert await stream.body() == await messages.body() == "before"
            room = await asyncio.to_thread(new_room, name="Kitchen", invite=[world.bot.user_id])
            found = await stream.next()
            assert found is not None
            assert found.event == "invite"
            wanted = {
                "room_id": room.id,
                "inviter": room.owner.user_id,
                "name": "Kitchen",
                "type": "m.room.member",
                "sender": room.owner.user_id,
                "state_key": world.bot.user_id,
            }
            assert wanted.items() <= found.data.items()
            assert found.data["content"]["membership"] == "invite"
            await asyncio.to_thread(send, caller, home, "after")
            assert await messages.body() == "after"  # no invitation came before it
            last_id = stream.last_id
        async with listening(f"{base}/live", KEY, last_id=last_id, types="m.room.m*") as resumed:
            found = await resumed.next()
            assert found is not None
            assert (found.event, found.data["room_id"]) == ("invite", room.id)
            assert await resumed.body() == "after"
