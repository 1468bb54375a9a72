"""Room upgrades on the real homeserver: an alias is followed into the new room, and a 403 by the old id names it."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import make_key, store_in
from tests.patience import PATIENCE


@dataclass(frozen=True)
class Old:
    """A friend's room that the bot is in, without any power there; and the friend's own connection to it."""

    id: str
    alias: str
    friend: httpx.Client

    def upgrade(self, *, closed: bool = False) -> str:
        """The id of the room that takes its place. `closed`: nobody joins that without an invitation."""
        if closed:
            rules = f"/rooms/{quote(self.id, safe='')}/state/m.room.join_rules"
            self.friend.put(rules, json={"join_rule": "invite"}).raise_for_status()
        answer = self.friend.post(f"/rooms/{quote(self.id, safe='')}/upgrade", json={"new_version": "10"})
        return str(answer.raise_for_status().json()["replacement_room"])

    def bodies(self, room_id: str) -> list[str]:
        page = self.friend.get(f"/rooms/{quote(room_id, safe='')}/messages", params={"dir": "f", "limit": 100})
        chunk = page.raise_for_status().json()["chunk"]
        return [event["content"]["body"] for event in chunk if event["type"] == "m.room.message"]


@pytest.fixture
def direct(synapse: LocalSynapse, friend: Account) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {friend.access_token}"}
    base = f"{synapse.url}/_matrix/client/v3"
    with httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def old(friend: Account, direct: httpx.Client, make_room: MakeRoom) -> Old:
    name = f"upgraded-{secrets.token_hex(4)}"
    room_id = make_room(friend, preset="public_chat", room_version="9", room_alias_name=name)
    return Old(room_id, f"#{name}:localhost", direct)


@dataclass(frozen=True)
class Bridge:
    """A bridge whose bot has no power anywhere."""

    client: httpx.Client

    def send(self, room: str, body: str, **headers: str) -> httpx.Response:
        return self.client.post(f"/rooms/{quote(room, safe='')}/send/m.room.message", json=body, headers=headers)


@pytest.fixture
def new_bridge(synapse: LocalSynapse, bot: Account, tmp_path: Path) -> Iterator[Callable[..., Bridge]]:
    """`new_bridge(**scopes)`: for a key of these scopes."""

    def make(**scopes: Any) -> Bridge:
        headers = {"X-API-Key": make_key(tmp_path, ApiKey("k", **scopes))}
        settings = Settings.load(base_url=synapse.url, access_token=bot.access_token, database_url=store_in(tmp_path))
        url = opened.enter_context(background(settings))
        client = httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE)
        return Bridge(opened.enter_context(client))

    with contextlib.ExitStack() as opened:
        yield make


def test_alias_that_moved_is_followed_at_once(old: Old, new_bridge: Callable[..., Bridge]) -> None:
    bridge = new_bridge(rooms=(old.alias,))
    assert bridge.send(old.alias, "before").status_code == 200
    new = old.upgrade()
    answer = bridge.send(old.alias, "after")
    assert answer.status_code == 200, answer.text
    assert (old.bodies(old.id), old.bodies(new)) == (["before"], ["after"])
    delivery = bridge.client.get(f"/deliveries/{answer.headers['Flowbridge-Delivery']}").json()
    assert (delivery["room_id"], delivery.get("event_id", answer.json()["event_id"])) == (
        new,
        answer.json()["event_id"],
    )
    refused = bridge.client.get("/deliveries", params={"room_id": old.id, "state": "dead"}).json()["deliveries"]
    assert [one["error"]["status"] for one in refused] == [403], "the refusal is in the log"


def test_key_of_a_send_counts_in_the_new_room(old: Old, new_bridge: Callable[..., Bridge]) -> None:
    bridge = new_bridge()
    assert bridge.send(old.alias, "before", **{"Idempotency-Key": "one"}).status_code == 200
    new = old.upgrade()
    answers = [bridge.send(old.alias, "after", **{"Idempotency-Key": "two"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert old.bodies(new) == ["after"]


def test_event_that_nobody_waited_for_shows_the_next_one_the_way(old: Old, new_bridge: Callable[..., Bridge]) -> None:
    bridge = new_bridge()
    assert bridge.send(old.alias, "before").status_code == 200
    new = old.upgrade()
    queued = bridge.send(old.alias, "lost", Prefer="respond-async").json()["delivery_id"]
    deadline = time.monotonic() + PATIENCE
    while bridge.client.get(f"/deliveries/{queued}").json()["status"] != "dead":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while True:  # where the alias leads now is found out beside
        delivery = bridge.send(old.alias, "next", Prefer="respond-async").json()["delivery_id"]
        if bridge.client.get(f"/deliveries/{delivery}").json()["room_id"] == new:
            break
        assert time.monotonic() < deadline
    while "next" not in old.bodies(new):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert bridge.client.get(f"/deliveries/{queued}").json()["room_id"] == old.id, "what is queued keeps its room"


@pytest.mark.parametrize("prefix", ["", "/_matrix/client/v3"])
def test_old_room_by_its_id_is_refused_with_the_name_of_the_new_one(
    old: Old, new_bridge: Callable[..., Bridge], prefix: str
) -> None:
    bridge = new_bridge()
    assert bridge.send(old.alias, "before").status_code == 200
    new = old.upgrade()
    path = f"{prefix}/rooms/{quote(old.id, safe='')}/send/m.room.message"
    answer = bridge.client.put(f"{path}/1", json={"msgtype": "m.text", "body": "x"})
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert f"its replacement is {new}" in answer.json()["error"]
    assert answer.json()["flowbridge"] == {"replacement_room": new}


def test_new_room_that_lets_nobody_in_is_named(old: Old, new_bridge: Callable[..., Bridge]) -> None:
    bridge = new_bridge()
    assert bridge.send(old.alias, "before").status_code == 200
    new = old.upgrade(closed=True)
    answer = bridge.send(old.alias, "after")
    assert (answer.status_code, answer.json()["flowbridge"]) == (403, {"replacement_room": new})
    assert bridge.send(old.alias, "again").status_code == 403, "the homeserver's own refusal of the join"
    assert old.bodies(new) == []


def test_key_of_the_old_room_does_not_follow_its_alias(old: Old, new_bridge: Callable[..., Bridge]) -> None:
    bridge = new_bridge(rooms=(old.id,))
    assert bridge.send(old.alias, "before").status_code == 200
    new = old.upgrade()
    answer = bridge.send(old.alias, "after")
    assert answer.status_code == 403
    assert old.bodies(new) == []


def test_refusal_for_another_reason_names_no_room(
    old: Old, new_bridge: Callable[..., Bridge], make_account: MakeAccount
) -> None:
    bridge = new_bridge()
    levels = f"/rooms/{quote(old.id, safe='')}/state/m.room.power_levels"
    found = old.friend.get(levels).json()
    old.friend.put(levels, json={**found, "events_default": 50}).raise_for_status()
    answer = bridge.send(old.alias, "x")
    assert (answer.status_code, "flowbridge" in answer.json()) == (403, False)
