"""What a key with `admin` may do: nothing outside its rooms and event types, and nothing as other people."""

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.conftest import Room, store_in
from tests.patience import PATIENCE


class Setup:
    """A bridge with one operator's key and the keys that a test makes."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._database = Database(store_in(folder))
        self._database.open(shared=True, make=True)
        self._clients: list[httpx.Client] = []
        self.root = self.key(admin=True)

    def key(self, **scopes: Any) -> httpx.Client:
        """A caller with a new key of these scopes."""
        secret = api_keys.new_secret()
        with self._database.engine.begin() as connection:
            api_keys.add(connection, ApiKey(api_keys.new_id(), **scopes), secret)
        return self.caller(secret)

    def caller(self, token: str) -> httpx.Client:
        client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=PATIENCE
        )
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._database.engine.dispose()


@pytest.fixture(scope="module")
def setup(synapse: LocalSynapse, owner: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("scopes")
    settings = Settings.load(base_url=synapse.url, access_token=owner.access_token, database_url=store_in(folder))
    with background(settings) as url:
        found = Setup(url, folder)
        yield found
        found.close()


@pytest.fixture
def alice(make_account: MakeAccount) -> Account:
    return make_account()


def send(caller: httpx.Client, room: Room, body: Any = "hello", type_: str = "m.room.message") -> str:
    """Send an event, however that ends; the delivery's id."""
    answer = caller.post(f"{room.path}/send/{type_}", json=body)
    return answer.headers["Flowbridge-Delivery"]


def until(caller: httpx.Client, delivery: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while (found := caller.get(f"/deliveries/{delivery}").raise_for_status().json())["status"] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return dict(found)


def acts(caller: httpx.Client, delivery: str) -> list[int]:
    """The answers to looking at a delivery, sending it again and deleting it."""
    path = f"/deliveries/{delivery}"
    return [answer.status_code for answer in (caller.get(path), caller.post(f"{path}/replay"), caller.delete(path))]


def listed(caller: httpx.Client, **parameters: Any) -> list[str]:
    page = caller.get("/deliveries", params=parameters).raise_for_status().json()
    return [one["delivery_id"] for one in page["deliveries"]]


def join(room: Room, account: Account) -> None:
    headers = {"Authorization": f"Bearer {account.access_token}"}
    room.direct.post(f"/_matrix/client/v3/join/{quote(room.id, safe='')}", headers=headers).raise_for_status()


@pytest.fixture
def open_room(new_room: Callable[..., Room]) -> Room:
    return new_room(preset="public_chat")


# rooms and event types


def test_admin_of_one_room_neither_sees_nor_touches_another(setup: Setup, new_room: Callable[..., Room]) -> None:
    own, other = new_room(), new_room()
    admin = setup.key(rooms=(own.id,), admin=True)
    inside, outside = send(setup.root, own), send(setup.root, other)
    assert acts(admin, outside) == [404, 404, 404]
    never = admin.post("/deliveries/never-was/replay")
    assert admin.post(f"/deliveries/{outside}/replay").content == never.content
    assert listed(admin) == [inside]
    assert listed(admin, room_id=other.id) == []
    assert listed(admin, state="sent") == [inside]
    assert other.bodies() == ["hello"]
    assert admin.get(f"/deliveries/{inside}").status_code == 200
    assert admin.post(f"/deliveries/{inside}/replay").status_code == 202
    until(admin, inside, "sent")
    assert own.bodies() == ["hello", "hello"]
    assert admin.delete(f"/deliveries/{inside}").status_code == 200


def test_admin_of_a_room_by_its_alias_is_admin_there_and_nowhere_else(
    setup: Setup, new_room: Callable[..., Room], owner: Account
) -> None:
    name = f"ops-{secrets.token_hex(4)}"
    own, other = new_room(room_alias_name=name), new_room()
    admin = setup.key(rooms=(f"#{name}:{owner.user_id.partition(':')[2]}",), admin=True)
    inside, outside = send(setup.root, own), send(setup.root, other)
    assert acts(admin, outside) == [404, 404, 404]
    assert listed(admin) == [inside]
    assert acts(admin, inside)[:2] == [200, 202]


def test_admin_of_some_event_types_acts_on_those_alone(setup: Setup, room: Room) -> None:
    admin = setup.key(rooms=(room.id,), event_types=("m.room.t*", "com.example.alert"), admin=True)
    topic, message = send(setup.root, room, {"topic": "t"}, "m.room.topic"), send(setup.root, room)
    alert = send(setup.root, room, {"n": 1}, "com.example.alert")
    upper = send(setup.root, room, {"n": 1}, "M.ROOM.TALL")
    assert listed(admin) == [alert, topic]
    for delivery in (message, upper):
        assert acts(admin, delivery) == [404, 404, 404]
    assert acts(admin, alert)[0] == 200


def test_admin_reads_and_joins_nothing_outside_its_scope(
    setup: Setup, new_room: Callable[..., Room], owner: Account
) -> None:
    own, other = new_room(), new_room()
    send(setup.root, other, "secret")
    admin = setup.key(rooms=(own.id,), admin=True)
    typed = setup.key(rooms=(own.id,), event_types=("m.room.topic",), admin=True)
    there, matrix = other.path, f"/_matrix/client/v3{other.path}"
    for caller, path in ((admin, there), (admin, matrix), (typed, own.path)):
        for what in ("messages", "members", "state", "initialSync"):
            assert caller.get(f"{path}/{what}").status_code == 403, f"{path}/{what}"
    for path in (
        "/initialSync",
        "/events?timeout=0",
        "/_matrix/client/v3/sync",
        f"/events?timeout=0&room_id={other.id}",
    ):
        assert admin.get(path).status_code == 403, path
    assert admin.get(f"{there}/live").status_code == 403
    assert typed.get(f"{own.path}/live").status_code == 403
    assert [room["room_id"] for room in admin.get("/rooms").json()["rooms"]] == [own.id]
    for path in (f"{there}/leave", f"{there}/join", f"/join/{quote(other.id)}", f"{matrix}/leave", f"{matrix}/invite"):
        assert admin.post(path, json={"user_id": owner.user_id}).status_code == 403, path
    assert typed.post(f"{own.path}/leave").status_code == 403
    assert admin.post("/rooms", json={}).status_code == 403
    assert other.state("m.room.member", owner.user_id)["membership"] == "join"


# other people


def test_key_does_not_send_again_what_a_user_sent(setup: Setup, open_room: Room, alice: Account) -> None:
    join(open_room, alice)
    with setup.caller(alice.access_token) as of_alice:
        delivery = send(of_alice, open_room, "mine")
        scoped = setup.key(rooms=(open_room.id,), admin=True)
        for caller in (setup.root, scoped):
            assert caller.get(f"/deliveries/{delivery}").status_code == 200
            refused = caller.post(f"/deliveries/{delivery}/replay")
            assert (refused.status_code, refused.json()["errcode"]) == (403, "M_FORBIDDEN")
            assert alice.user_id in refused.json()["error"]
        assert scoped.delete(f"/deliveries/{delivery}").status_code == 403
        assert open_room.bodies() == ["mine"]
        assert of_alice.post(f"/deliveries/{delivery}/replay").status_code == 202
        until(of_alice, delivery, "sent")
        assert open_room.bodies() == ["mine", "mine"]
    assert setup.root.delete(f"/deliveries/{delivery}").status_code == 200


def test_key_made_for_a_user_sees_and_sends_again_what_that_user_sent(
    setup: Setup, open_room: Room, new_room: Callable[..., Room], alice: Account, make_account: MakeAccount
) -> None:
    elsewhere, bob = new_room(preset="public_chat"), make_account()
    for account in (alice, bob):
        join(open_room, account)
    join(elsewhere, alice)
    key = setup.key(rooms=(open_room.id,), users=(alice.user_id,))
    with setup.caller(alice.access_token) as of_alice, setup.caller(bob.access_token) as of_bob:
        hers, his, away = send(of_alice, open_room), send(of_bob, open_room), send(of_alice, elsewhere)
        assert listed(key) == [hers]
        for delivery in (his, away):
            assert acts(key, delivery) == [404, 404, 404]
        assert key.post(f"/deliveries/{hers}/replay").status_code == 202
        event_id = until(key, hers, "sent")["event_id"]
    assert open_room.event(event_id)["sender"] == alice.user_id
    assert key.get("/whoami").json()["flowbridge"]["key"]["users"] == [alice.user_id]


# state


@pytest.mark.parametrize("surface", ["send", "state"])
def test_replay_of_state_that_was_set_since_is_refused_and_shows_it(setup: Setup, room: Room, surface: str) -> None:
    answer = setup.root.request(
        "POST" if surface == "send" else "PUT", f"{room.path}/{surface}/m.room.topic", json={"topic": "old"}
    )
    delivery = answer.headers["Flowbridge-Delivery"]
    assert setup.root.post(f"/deliveries/{delivery}/replay").status_code == 202, "nothing else has been set since"
    until(setup.root, delivery, "sent")
    newer = setup.root.put(f"{room.path}/state/m.room.topic", json={"topic": "new"}).json()["event_id"]
    refused = setup.root.post(f"/deliveries/{delivery}/replay")
    assert (refused.status_code, refused.json()["errcode"]) == (409, "M_BAD_STATE")
    assert "overwrite=true" in refused.json()["error"]
    current = refused.json()["flowbridge"]["current"]
    seen = room.event(newer)
    assert current == {name: seen[name] for name in ("event_id", "sender", "origin_server_ts", "content")}
    assert room.state("m.room.topic")["topic"] == "new"
    assert until(setup.root, delivery, "sent")["attempts"] == 1
    assert setup.root.post(f"/deliveries/{delivery}/replay?overwrite=maybe").status_code == 400
    assert setup.root.post(f"/deliveries/{delivery}/replay?overwrite=true").status_code == 202
    until(setup.root, delivery, "sent")
    assert room.state("m.room.topic")["topic"] == "old"


def test_dead_letter_of_state_replaces_what_was_there_before_it_and_nothing_newer(
    setup: Setup, open_room: Room, alice: Account, owner: Account
) -> None:
    join(open_room, alice)
    send(setup.root, open_room, {"topic": "before"}, "m.room.topic")
    with setup.caller(alice.access_token) as of_alice:
        dead = [send(of_alice, open_room, {"topic": f"dead-{n}"}, "m.room.topic") for n in range(2)]
        for delivery in dead:
            until(of_alice, delivery, "dead")
        levels = open_room.state("m.room.power_levels")
        levels["users"][alice.user_id] = 100
        path = f"/_matrix/client/v3{open_room.path}/state/m.room.power_levels"
        headers = {"Authorization": f"Bearer {owner.access_token}"}
        open_room.direct.put(path, json=levels, headers=headers).raise_for_status()
        assert of_alice.post(f"/deliveries/{dead[0]}/replay").status_code == 202
        until(of_alice, dead[0], "sent")
        assert open_room.state("m.room.topic")["topic"] == "dead-0"
        refused = of_alice.post(f"/deliveries/{dead[1]}/replay")
        assert refused.status_code == 409
        assert refused.json()["flowbridge"]["current"]["content"]["topic"] == "dead-0"


def test_replay_of_state_that_nobody_set_before_is_queued(setup: Setup, room: Room) -> None:
    delivery = send(setup.root, room, {"topic": "only"}, "m.room.topic")
    other = setup.root.put(f"{room.path}/state/com.example.state/key", json={"n": 1}).headers["Flowbridge-Delivery"]
    for each in (delivery, other):
        assert setup.root.post(f"/deliveries/{each}/replay").status_code == 202
