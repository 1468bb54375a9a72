"""The promise in encrypted rooms: once, in order and readable, through kill -9."""

import time
from pathlib import Path
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


def send(url: str, room: str, number: int) -> bool:
    """Queue an event under a key of its own; whether it was accepted."""
    headers = {"X-API-Key": KEY, "Prefer": "respond-async", "Idempotency-Key": str(number)}
    content = {"msgtype": "m.text", "body": str(number)}
    try:
        path = f"{url}/rooms/{quote(room)}/send/m.room.message"
        answer = httpx.post(path, json=content, headers=headers, timeout=PATIENCE, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.status_code in (200, 202)


def test_every_event_is_decrypted_once_and_in_order_by_the_same_device(
    synapse: LocalSynapse,
    bot: Account,
    make_room: MakeRoom,
    peer: Peer,
    new_database: NewDatabase,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"algorithm": "m.megolm.v1.aes-sha2", "rotation_period_msgs": 30}
    encryption = {"type": "m.room.encryption", "state_key": "", "content": content}
    room = make_room(bot, preset="public_chat", initial_state=[encryption])
    peer.ask("join", room=room)
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_API_KEYS": KEY,
        "FLOWBRIDGE_DATABASE_URL": new_database(),
        "FLOWBRIDGE_SECRET_KEY": secret,
        "FLOWBRIDGE_ENCRYPTED_ROOMS": "encrypt",
        "FLOWBRIDGE_REQUEST_SECONDS": "5",
        "FLOWBRIDGE_LEASE_SECONDS": "11",
    }
    port, number = free_port(), 0
    direct = httpx.Client(
        base_url=f"{synapse.url}/_matrix/client/v3/rooms/{quote(room)}",
        headers={"Authorization": f"Bearer {bot.access_token}"},
        trust_env=False,
    )

    def arrived() -> list[dict[str, str]]:
        page = direct.get("/messages", params={"dir": "f", "limit": 1_000}).raise_for_status().json()["chunk"]
        return [event for event in page if event["type"] in ("m.room.encrypted", "m.room.message")]

    for kill in range(KILLS + 1):
        with serving_at(port, settings) as (url, process):
            until_number = EVENTS * (kill + 1) // (KILLS + 1)
            while number < until_number:
                number += send(url, room, number)
            if kill < KILLS:
                seen = len(arrived())
                deadline = time.monotonic() + PATIENCE
                while len(arrived()) < min(seen + 5, until_number) and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.kill()
                continue
            until(lambda: len(arrived()) >= EVENTS, 2 * PATIENCE, else_=lambda: len(arrived()))
    events = arrived()
    direct.close()
    assert {event["type"] for event in events} == {"m.room.encrypted"}
    assert len({event["content"]["device_id"] for event in events}) == 1  # type: ignore[index]
    texts = [peer.read(event["event_id"])["content"]["body"] for event in events]
    assert texts == [str(number) for number in range(EVENTS)]
