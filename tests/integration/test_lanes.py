"""A room that waits for something says so at once, and goes on when it comes; on a real Synapse."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.delivery import lookup
from flowbridge.homeserver import Homeserver, Locator, tls_context
from flowbridge.store import Row
from flowbridge.store.clock import now_ms
from flowbridge.store.database import Database
from tests.conftest import MakeAccount
from tests.integration.conftest import KEY, Room
from tests.integration.test_waiting import ASYNC, MATRIX, accepted, as_caller, send, text, wait_until
from tests.patience import PATIENCE


@pytest.fixture
def with_key(bridge_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=bridge_url, headers={"X-API-Key": KEY}, trust_env=False) as client:
        yield client


def invite(room: Room, user_id: str) -> None:
    headers = {"Authorization": f"Bearer {room.owner.access_token}"}
    path = f"{MATRIX}{room.path}/invite"
    room.direct.post(path, json={"user_id": user_id}, headers=headers).raise_for_status()


@pytest.mark.parametrize("way", ["/join/{room}", "{path}/join", MATRIX + "/join/{room}", MATRIX + "{path}/join"])
def test_plain_send_behind_an_invitation_is_a_403_at_once_and_a_join_wakes_what_waits(
    bridge_url: str, make_account: MakeAccount, new_room: Callable[..., Room], way: str
) -> None:
    room, guest = new_room(), make_account()
    with as_caller(bridge_url, guest) as caller:
        queued = accepted(send(caller, room, "queued", **ASYNC))
        for _ in range(2):
            began = time.monotonic()
            refused = send(caller, room, "plain")
            assert time.monotonic() - began < PATIENCE / 2, "it did not wait for as long as it may"
            assert (refused.status_code, refused.json()["errcode"]) == (403, "M_FORBIDDEN")
            next_step = f"{guest.user_id} is not in this room: invite {guest.user_id}, or POST /join/{room.id}"
            assert refused.json()["error"].startswith(next_step)
        found = caller.get(queued).json()
        assert found["status"] == "queued"
        assert found["waiting"]["reason"].startswith(next_step)
        assert found["waiting"]["until"].endswith("Z")
        again = caller.post(f"{queued}/replay")
        assert (again.status_code, next_step in again.json()["error"]) == (409, True)
        invite(room, guest.user_id)
        caller.post(way.format(room=room.id, path=room.path), json={}).raise_for_status()
        wait_until(caller, queued)
        assert send(caller, room, "after").status_code == 200
    assert room.bodies() == ["queued", "after"]


def test_key_of_the_bot_hears_it_too(
    with_key: httpx.Client, bridge_url: str, make_account: MakeAccount, synapse: LocalSynapse, owner: Account
) -> None:
    stranger = make_account()
    headers = {"Authorization": f"Bearer {stranger.access_token}"}
    with httpx.Client(base_url=synapse.url, headers=headers, trust_env=False) as direct:
        room_id = direct.post(f"{MATRIX}/createRoom", json={}).json()["room_id"]
        room = Room(room_id, stranger, direct)
        queued = accepted(send(with_key, room, "queued", **ASYNC))
        refused = send(with_key, room, "plain")
        assert refused.status_code == 403
        assert f"invite {owner.user_id}, or POST /join/{room_id}" in refused.json()["error"]
        invite(room, owner.user_id)
        with_key.post(f"/join/{room_id}").raise_for_status()
        wait_until(with_key, queued)
        assert room.bodies() == ["queued"]


def crowd(room: Room, guest: Account) -> str:
    """The guest says something, and others say 300 things; the id of the first."""
    headers = {"Authorization": f"Bearer {guest.access_token}"}
    room.direct.post(f"{MATRIX}{room.path}/join", json={}, headers=headers).raise_for_status()
    path = f"{MATRIX}{room.path}/send/m.room.message"
    mine = room.direct.put(f"{path}/mine", json=text("mine"), headers=headers).json()["event_id"]
    talkative = {"Authorization": f"Bearer {room.owner.access_token}"}
    for number in range(300):
        room.direct.put(f"{path}/{number}", json=text(number), headers=talkative).raise_for_status()
    return str(mine)


async def test_look_for_an_event_behind_hundreds_of_others(
    synapse: LocalSynapse,
    make_account: MakeAccount,
    new_room: Callable[..., Room],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Synapse honours the filter: a page or two, however much others have said."""
    room, guest = new_room(preset="public_chat"), make_account()
    accepted_at = now_ms()
    mine = crowd(room, guest)

    tls = tls_context(None)
    homeserver = Homeserver(Locator(synapse.url, tls), tls, deadline=10.0)
    pages = 0
    recent = homeserver.recent

    async def counted(*what: object, **how: object) -> object:
        nonlocal pages
        pages += 1
        return await recent(*what, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(homeserver, "recent", counted)
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    database.start()
    try:
        looks = lookup.Lookup(homeserver, database)
        row = Row(
            "delivery",
            "lane",
            "account",
            room.id,
            "m.room.message",
            None,
            json.dumps(text("mine")).encode(),
            "mine",
            accepted_at,
        )
        assert await looks.find(row, guest.access_token, guest.user_id) == mine
        assert pages == 1
        absent = row._replace(txn_id="other", content=json.dumps(text("other")).encode(), delivery="other")
        assert await looks.find(absent, guest.access_token, guest.user_id) is None
        assert pages <= 4
    finally:
        homeserver.close()
        await database.stop()
