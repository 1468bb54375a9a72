"""What is right by itself is taken as long as the store takes it, whatever the homeserver says meanwhile."""

import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.conftest import MakeAccount, MakeRoom
from tests.integration import test_renewed_tokens as tokens
from tests.integration.conftest import Room
from tests.integration.test_renewed_tokens import (
    ASYNC,
    MATRIX,
    Door,
    arrive,
    bridge,
    keep,
    login,
    logout,
    send,
    status,
)
from tests.patience import until

door, room, user = tokens.door, tokens.room, tokens.user
TEXT = {"msgtype": "m.text", "body": "x"}


def store(folder: Path) -> str:
    return f"sqlite:///{folder}/flowbridge.db"


def localpart(account: Account) -> str:
    return account.user_id[1:].partition(":")[0]


def comes_again(answer: httpx.Response) -> None:
    """Nothing is kept, and the caller is told to come again."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert "flowbridge-delivery" not in answer.headers


def test_events_are_taken_while_the_bots_token_is_refused(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path
) -> None:
    with bridge(synapse.url, store(tmp_path), access_token=user.access_token) as caller:
        assert send(caller, room, "before").status_code == 200
        logout(synapse, user)
        began = time.monotonic()
        waited = [send(caller, room, f"waits {number}", Prefer="wait=1") for number in range(3)]
        assert [answer.status_code for answer in waited] == [202] * 3, [answer.text for answer in waited]
        assert time.monotonic() - began >= 3
        kept = keep(caller, room, "async 0", "async 1")
        kept += [answer.headers["location"] for answer in waited]
        assert {status(caller, location) for location in kept} == {"queued"}
        assert caller.get("/readyz").json()["flowbridge"]["failed"] == "bot"
        matrix = caller.post(f"{MATRIX}{room.path}/send/m.room.message", json=TEXT, headers={"Prefer": "wait=1"})
        assert matrix.status_code == 502  # a Matrix client hears that it is not sent, and nothing is kept
        assert len(caller.get("/deliveries?state=queued").json()["deliveries"]) == 5
    with bridge(synapse.url, store(tmp_path), access_token=user.access_token) as caller:
        keep(caller, room, "after a restart")
    with bridge(synapse.url, store(tmp_path), access_token=login(synapse, user).access_token):
        waits = [f"waits {number}" for number in range(3)]
        arrive(room, "before", *waits, "async 0", "async 1", "after a restart")


@pytest.mark.parametrize("who", ["token", "user id", "localpart"])
def test_events_are_taken_by_a_bridge_that_starts_while_the_homeserver_is_away(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, tmp_path: Path, who: str
) -> None:
    account: dict[str, Any] = {"access_token": user.access_token}
    if who != "token":
        name = user.user_id if who == "user id" else localpart(user)
        account = {"user": name, "password": user.password}
    with bridge(door.url, store(tmp_path), **account) as caller:
        assert send(caller, room, "before").status_code == 200
    door.shut()
    with bridge(door.url, store(tmp_path), **account) as caller:
        keep(caller, room, "one")
        assert send(caller, room, "two", Prefer="wait=1").status_code == 202
        door.open()
        arrive(room, "before", "one", "two")
        assert send(caller, room, "three").status_code == 200


def test_bot_is_known_by_its_user_id_before_it_has_ever_logged_in(
    door: Door, user: Account, room: Room, tmp_path: Path
) -> None:
    door.shut()
    with bridge(door.url, store(tmp_path), user=user.user_id, password=user.password) as caller:
        keep(caller, room, "one")
        door.open()
        arrive(room, "one")
        delivery = caller.get("/deliveries").json()["deliveries"][0]
        assert delivery["user_id"] == user.user_id


@pytest.mark.parametrize("who", ["localpart", "token"])
def test_nothing_is_taken_while_nobody_knows_who_the_bot_is(
    door: Door, user: Account, room: Room, tmp_path: Path, who: str
) -> None:
    account: dict[str, Any] = {"access_token": user.access_token}
    if who == "localpart":
        account = {"user": localpart(user), "password": user.password}
    door.shut()
    with bridge(door.url, store(tmp_path), **account) as caller:
        comes_again(send(caller, room, "one"))
        comes_again(send(caller, room, "one", **ASYNC))
        door.open()
        until(lambda: send(caller, room, "two").status_code == 200)
        assert room.bodies() == ["two"]


def test_token_that_was_never_seen_is_nobodys_while_the_homeserver_is_away(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, tmp_path: Path
) -> None:
    with bridge(door.url, store(tmp_path), access_token=user.access_token) as caller:
        assert send(caller, room, "before").status_code == 200
    renewed = login(synapse, user)
    door.shut()
    with bridge(door.url, store(tmp_path), access_token=renewed.access_token) as caller:
        comes_again(send(caller, room, "one", **ASYNC))


def test_room_by_an_alias_that_was_seen_is_found_while_the_homeserver_is_away(
    synapse: LocalSynapse, door: Door, user: Account, make_account: MakeAccount, make_room: MakeRoom, tmp_path: Path
) -> None:
    known, unknown = (f"alias-{secrets.token_hex(6)}" for _ in range(2))
    watcher = make_account()
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        room = Room(make_room(watcher, preset="public_chat", room_alias_name=known), watcher, direct)
        make_room(watcher, preset="public_chat", room_alias_name=unknown)

        def by_alias(caller: httpx.Client, alias: str, body: str, **headers: str) -> httpx.Response:
            path = f"/rooms/{quote(f'#{alias}:localhost', safe='')}/send/m.room.message"
            return caller.post(path, json={"msgtype": "m.text", "body": body}, headers=headers)

        account = {"user": user.user_id, "password": user.password}
        with bridge(door.url, store(tmp_path), **account) as caller:
            assert by_alias(caller, known, "before").status_code == 200
            door.shut()
            assert by_alias(caller, known, "one", **ASYNC).status_code == 202
            comes_again(by_alias(caller, unknown, "nothing", **ASYNC))
        with bridge(door.url, store(tmp_path), **account) as caller:
            assert by_alias(caller, known, "two", **ASYNC).status_code == 202
            comes_again(by_alias(caller, unknown, "nothing", **ASYNC))
            own = {"Authorization": f"Bearer {watcher.access_token}", "X-API-Key": "", **ASYNC}
            comes_again(by_alias(caller, known, "nothing", **own))  # this token was never seen
            door.open()
            arrive(room, "before", "one", "two")
            until(lambda: by_alias(caller, unknown, "there").status_code == 200)
