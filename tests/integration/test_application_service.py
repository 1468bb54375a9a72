"""An application service behind the bridge: it acts as its users, at the times and after the delays that it says."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.integration.conftest import store_in
from tests.patience import PATIENCE

TOKEN = "as_token_of_the_service"
GHOST = "@_irc_ghost:localhost"
CLIENT = "/_matrix/client/v3"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The service's connection to a bridge, in front of a homeserver that knows the service."""
    folder = tmp_path_factory.mktemp("service")
    registration = {
        "id": "irc",
        "url": None,
        "as_token": TOKEN,
        "hs_token": "hs_token_of_the_service",
        "sender_localpart": "_irc_bot",
        "rate_limited": False,
        "namespaces": {"users": [{"exclusive": True, "regex": "@_irc_.*"}], "aliases": [], "rooms": []},
    }
    file: Path = folder / "irc.yaml"
    file.write_text(json.dumps(registration))
    config: dict[str, Any] = {"app_service_config_files": [str(file)], "max_event_delay_duration": "1h"}
    with LocalSynapse(config=config) as homeserver:
        settings = Settings.load(base_url=homeserver.url, database_url=store_in(folder))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with (
            background(settings) as url,
            httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE) as client,
        ):
            body = {"type": "m.login.application_service", "username": "_irc_ghost"}
            client.post(f"{CLIENT}/register", json=body).raise_for_status()
            yield client


@pytest.fixture(scope="module")
def room(service: httpx.Client) -> str:
    """The path of a room that only the ghost is in."""
    made = service.post(f"{CLIENT}/createRoom?user_id={GHOST}", json={"preset": "public_chat"}).raise_for_status()
    return f"{CLIENT}/rooms/{quote(made.json()['room_id'], safe='')}"


def event(service: httpx.Client, room: str, event_id: str) -> dict[str, Any]:
    return dict(service.get(f"{room}/event/{quote(event_id, safe='')}?user_id={GHOST}").raise_for_status().json())


def test_service_sends_as_its_user_at_the_time_that_it_says(service: httpx.Client, room: str) -> None:
    body = {"msgtype": "m.text", "body": "from irc"}
    answer = service.put(f"{room}/send/m.room.message/1?user_id={GHOST}&ts=1234567890123", json=body)
    found = event(service, room, answer.raise_for_status().json()["event_id"])
    assert (found["sender"], found["origin_server_ts"], found["content"]) == (GHOST, 1234567890123, body)
    topic = service.put(f"{room}/state/m.room.topic?user_id={GHOST}&ts=1234567890124", json={"topic": "t"})
    found = event(service, room, topic.raise_for_status().json()["event_id"])
    assert (found["sender"], found["origin_server_ts"]) == (GHOST, 1234567890124)


def test_service_reads_and_is_in_rooms_as_its_user(service: httpx.Client, room: str) -> None:
    as_ghost = {"user_id": GHOST}
    assert service.get(f"{CLIENT}/account/whoami", params=as_ghost).json()["user_id"] == GHOST
    for what in ("members", "joined_members", "messages", "state", "state/m.room.create/"):
        assert service.get(f"{room}/{what}", params=as_ghost).status_code == 200, what
    assert service.get(f"{room}/messages").status_code == 403, "the service itself is not in the room"
    other = service.post(f"{CLIENT}/createRoom", json={"preset": "public_chat"}).json()["room_id"]
    joined = service.post(f"{CLIENT}/join/{quote(other, safe='')}", params=as_ghost, json={})
    assert joined.raise_for_status().json() == {"room_id": other}
    path = f"{CLIENT}/rooms/{quote(other, safe='')}"
    assert GHOST in service.get(f"{path}/joined_members").json()["joined"]
    assert service.post(f"{path}/leave", params=as_ghost, json={}).status_code == 200
    assert GHOST not in service.get(f"{path}/joined_members").json()["joined"]


def test_user_outside_its_namespace_is_the_homeservers_to_refuse(service: httpx.Client, room: str) -> None:
    answer = service.put(
        f"{room}/send/m.room.message/2?user_id=@somebody:localhost", json={"msgtype": "m.text", "body": "x"}
    )
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")


def test_delayed_event_comes_later_and_can_be_cancelled(service: httpx.Client, room: str) -> None:
    delayed = {"org.matrix.msc4140.delay": "3600000", "user_id": GHOST}
    body = {"msgtype": "m.text", "body": "not now"}
    answer = service.put(f"{room}/send/m.room.message/3", params=delayed, json=body)
    delay_id = answer.raise_for_status().json()["delay_id"]
    bodies = [one["content"].get("body") for one in _messages(service, room)]
    assert "not now" not in bodies
    path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
    service.post(path, params={"user_id": GHOST}, json={"action": "send"}).raise_for_status()
    deadline = time.monotonic() + PATIENCE
    while "not now" not in [one["content"].get("body") for one in _messages(service, room)]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_user_the_service_is_itself_and_its_events_are_kept(service: httpx.Client) -> None:
    made = service.post(f"{CLIENT}/createRoom", json={}).json()["room_id"]
    answer = service.put(
        f"{CLIENT}/rooms/{quote(made, safe='')}/send/m.room.message/1", json={"msgtype": "m.text", "body": "x"}
    )
    assert answer.status_code == 200
    delivery = service.get(f"/deliveries/{answer.headers['Flowbridge-Delivery']}").json()
    assert delivery["user_id"] == "@_irc_bot:localhost"


def _messages(service: httpx.Client, room: str) -> list[dict[str, Any]]:
    found = service.get(f"{room}/messages", params={"dir": "b", "limit": 50, "user_id": GHOST}).raise_for_status()
    return [one for one in found.json()["chunk"] if one["type"] == "m.room.message"]
