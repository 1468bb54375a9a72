"""The promise in encrypted rooms: once, in order and readable, through kill -9."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.conftest import MakeRoom, NewDatabase
from tests.integration.conftest import KEY
from tests.patience import PATIENCE, until
from tests.peer import Peer
from tests.processes import free_port, serving_at

EVENTS = 200
KILLS = 4


def send(url: str, room: str, number: int, token: str = KEY) -> bool:
    """Queue an event under a key of its own; whether it was accepted."""
    headers = {"Authorization": f"Bearer {token}", "Prefer": "respond-async", "Idempotency-Key": str(number)}
    content = {"msgtype": "m.text", "body": str(number)}
    try:
        path = f"{url}/rooms/{quote(room)}/send/m.room.message"
        answer = httpx.post(path, json=content, headers=headers, timeout=PATIENCE, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.status_code in (200, 202)


class Room:
    """An encrypted room of the bot's, and how the bridge is to send to it."""

    def __init__(self, synapse: LocalSynapse, bot: Account, room: str, url: str, secret: str) -> None:
        self.id = room
        self.settings = {
            "BASE_URL": synapse.url,
            "ACCESS_TOKEN": bot.access_token,
            "FLOWBRIDGE_API_KEYS": KEY,
            "FLOWBRIDGE_DATABASE_URL": url,
            "FLOWBRIDGE_SECRET_KEY": secret,
            "FLOWBRIDGE_ENCRYPTED_ROOMS": "encrypt",
            "FLOWBRIDGE_REQUEST_SECONDS": "5",
            "FLOWBRIDGE_LEASE_SECONDS": "11",
        }
        self._direct = httpx.Client(
            base_url=f"{synapse.url}/_matrix/client/v3/rooms/{quote(room)}",
            headers={"Authorization": f"Bearer {bot.access_token}"},
            timeout=PATIENCE,
            trust_env=False,
        )

    def arrived(self) -> list[dict[str, Any]]:
        page = self._direct.get("/messages", params={"dir": "f", "limit": 1_000}).raise_for_status().json()["chunk"]
        return [event for event in page if event["type"] in ("m.room.encrypted", "m.room.message")]

    def check(self, peer: Peer, number: int) -> None:
        """Each was encrypted by the same device, and decrypted once and in order."""
        events = self.arrived()
        assert {event["type"] for event in events} == {"m.room.encrypted"}
        assert len({event["content"]["device_id"] for event in events}) == 1
        texts = [peer.read(event["event_id"])["content"]["body"] for event in events]
        assert texts == [str(each) for each in range(number)]

    def close(self) -> None:
        self._direct.close()


@pytest.fixture
def room(
    synapse: LocalSynapse,
    bot: Account,
    make_room: MakeRoom,
    peer: Peer,
    new_database: NewDatabase,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Room]:
    monkeypatch.chdir(tmp_path)
    content = {"algorithm": "m.megolm.v1.aes-sha2", "rotation_period_msgs": 30}
    encryption = {"type": "m.room.encryption", "state_key": "", "content": content}
    room_id = make_room(bot, preset="public_chat", initial_state=[encryption])
    peer.ask("join", room=room_id)
    room = Room(synapse, bot, room_id, new_database(), secret)
    yield room
    room.close()


def test_every_event_is_decrypted_once_and_in_order_by_the_same_device(room: Room, peer: Peer) -> None:
    port, number = free_port(), 0
    for kill in range(KILLS + 1):
        with serving_at(port, room.settings) as (url, process):
            most = EVENTS * (kill + 1) // (KILLS + 1)
            while number < most:
                number += send(url, room.id, number)
            if kill < KILLS:
                seen, deadline = len(room.arrived()), time.monotonic() + PATIENCE
                while len(room.arrived()) < min(seen + 5, most) and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.kill()
                continue
            until(lambda: len(room.arrived()) >= EVENTS, 2 * PATIENCE, else_=lambda: len(room.arrived()))
    room.check(peer, EVENTS)


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_of_two_replicas_one_encrypts_and_the_other_takes_over_when_it_dies(
    room: Room, peer: Peer, make_room: MakeRoom, bot: Account
) -> None:
    plain = make_room(bot, preset="public_chat")
    with serving_at(free_port(), room.settings) as (one, first), serving_at(free_port(), room.settings) as (two, _):
        for number in range(40):
            assert send((one, two)[number % 2], room.id, number)
        until(lambda: len(room.arrived()) >= 40, else_=lambda: len(room.arrived()))
        headers = {"X-API-Key": KEY}
        for url in (one, two):  # each sends to rooms that are not encrypted
            path = f"{url}/rooms/{quote(plain)}/send/m.room.message"
            answer = httpx.post(path, json={"msgtype": "m.text", "body": "plain"}, headers=headers, trust_env=False)
            assert answer.status_code == 200, answer.text
        first.kill()
        for number in range(40, 80):
            assert send(two, room.id, number)
        until(lambda: len(room.arrived()) >= 80, 2 * PATIENCE, else_=lambda: len(room.arrived()))
    room.check(peer, 80)


def test_device_of_a_caller_is_the_same_through_kills(room: Room, open_peer: Peer, friend: Account) -> None:
    open_peer.ask("join", room=room.id)
    port, number, token = free_port(), 0, ""
    for most in (20, 40, 60):
        with serving_at(port, room.settings) as (url, process):
            token = token or log_in(url, friend, room.id)
            while number < most:
                number += send(url, room.id, number, token)
            if most < 60:
                until(lambda most=most: len(room.arrived()) >= most - 10, else_=lambda: len(room.arrived()))  # type: ignore[misc]
                process.kill()
                continue
            until(lambda: len(room.arrived()) >= 60, 2 * PATIENCE, else_=lambda: len(room.arrived()))
    room.check(open_peer, 60)


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_device_of_a_caller_moves_when_its_replica_dies(room: Room, open_peer: Peer, friend: Account) -> None:
    open_peer.ask("join", room=room.id)
    with serving_at(free_port(), room.settings) as (one, first), serving_at(free_port(), room.settings) as (two, _):
        token = log_in(one, friend, room.id)
        for number in range(20):
            assert send((one, two)[number % 2], room.id, number, token)
        until(lambda: len(room.arrived()) >= 20, else_=lambda: len(room.arrived()))
        first.kill()
        for number in range(20, 40):
            assert send(two, room.id, number, token)
        until(lambda: len(room.arrived()) >= 40, 2 * PATIENCE, else_=lambda: len(room.arrived()))
    room.check(open_peer, 40)


def log_in(url: str, account: Account, room: str) -> str:
    """Through the bridge, and into the room; returns the token."""
    identifier = {"type": "m.id.user", "user": account.user_id}
    body = {"type": "m.login.password", "identifier": identifier, "password": account.password}
    token = str(httpx.post(f"{url}/login", json=body, trust_env=False).raise_for_status().json()["access_token"])
    headers = {"Authorization": f"Bearer {token}"}
    httpx.post(f"{url}/join/{quote(room)}", headers=headers, trust_env=False, timeout=PATIENCE).raise_for_status()
    return token
