"""Hooks with a real homeserver, and on two replicas with a real PostgreSQL."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeRoom
from tests.http.conftest import running
from tests.http.hooked import HOOKS, PATH, SECRET, alert
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres
from tests.upstream import Rooms, Upstream


@pytest.fixture
def room(make_room: MakeRoom, owner: Account) -> str:
    return make_room(owner)


@pytest.fixture
def hook_url(synapse: LocalSynapse, owner: Account, room: str, tmp_path: Path) -> Iterator[str]:
    """A hook into a room of its own."""
    file = tmp_path / "hooks.yaml"
    file.write_text(json.dumps([{"name": "any", "room": room, "verification": {"secret": SECRET}}]))
    settings = Settings.load(
        base_url=synapse.url,
        access_token=owner.access_token,
        database_url=f"sqlite:///{tmp_path}/flowbridge.db",
        hooks_file=file,
    )
    with background(settings) as url:
        yield url + PATH


def events(synapse: LocalSynapse, owner: Account, room: str, number: int) -> list[dict[str, Any]]:
    """The messages of the room, the oldest first, once there are so many."""
    headers = {"Authorization": f"Bearer {owner.access_token}"}
    url = f"{synapse.url}/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=50"
    ending = time.monotonic() + PATIENCE
    while True:
        found = httpx.get(url, headers=headers, trust_env=False).json()["chunk"]
        messages = [event for event in reversed(found) if event["type"] == "m.room.message"]
        if len(messages) >= number:
            return messages
        assert time.monotonic() < ending, messages
        time.sleep(0.1)


def test_alert_that_ends_edits_its_message(synapse: LocalSynapse, owner: Account, room: str, hook_url: str) -> None:
    for body in (alert("web-1"), alert("web-1"), alert("web-1", status="resolved")):
        assert httpx.post(hook_url, json=body, trust_env=False).json()["ok"] is True
    first, second = events(synapse, owner, room, 2)
    assert "web-1 is down" in first["content"]["body"]
    assert second["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": first["event_id"]}


def test_curl_says_a_text(synapse: LocalSynapse, owner: Account, room: str, hook_url: str) -> None:
    type_ = {"Content-Type": "application/x-www-form-urlencoded"}
    assert httpx.post(hook_url, content="backup done", headers=type_, trust_env=False).json()["ok"] is True
    (found,) = events(synapse, owner, room, 1)
    assert found["content"]["body"] == "backup done"


def test_duplicates_at_two_replicas_at_once_are_one_message(postgres: LocalPostgres, tmp_path: Path) -> None:
    """As an HA pair of Alertmanagers behind a balancer sends them."""
    file = tmp_path / "hooks.yaml"
    file.write_text(json.dumps(HOOKS))
    url = SecretStr(postgres.fresh_database())
    with Upstream(rooms := Rooms()) as upstream:
        key = SecretStr(Fernet.generate_key().decode())
        more: dict[str, Any] = {"hooks_file": file, "database_url": url, "secret_key": key}
        with running(upstream, tmp_path, **more) as one, running(upstream, tmp_path, **more) as other:

            def tell(number: int) -> str:
                bridge = (one, other)[number % 2]
                answer = httpx.post(
                    bridge.url + PATH, json={"text": f"text {number // 8}"}, trust_env=False, timeout=60
                )
                assert answer.status_code == 200, answer.text
                return str(answer.json()["delivery_id"])

            with ThreadPoolExecutor(16) as threads:
                deliveries = list(threads.map(tell, range(80)))
            assert [len(set(deliveries[at : at + 8])) for at in range(0, 80, 8)] == [1] * 10
            one.wait_until_idle()
    assert sorted(event.content["body"] for event in rooms.events) == sorted(f"text {number}" for number in range(10))
