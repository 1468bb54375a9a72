"""Contract §1, "Waiting", against a real Synapse: what is promised is in the room, once and in order."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.conftest import Room, store_in
from tests.patience import PATIENCE, until
from tests.processes import Running, serving

ASYNC = {"Prefer": "respond-async"}
MATRIX = "/_matrix/client/v3"
ENCRYPTION = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
RATE = {"rc_message": {"per_second": 5, "burst_count": 3}}


def text(body: object) -> dict[str, Any]:
    return {"msgtype": "m.text", "body": str(body)}


def send(caller: httpx.Client, room: Room, body: object, **headers: str) -> httpx.Response:
    return caller.post(f"{room.path}/send/m.room.message", json=text(body), headers=headers)


def accepted(answer: httpx.Response) -> str:
    """Where the delivery is."""
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == delivery_of(answer)
    return delivery_of(answer)


def wait_until(caller: httpx.Client, location: str, status: str = "sent") -> dict[str, Any]:
    """The delivery, once it is so: the store is written a moment after the answer."""
    ending = time.monotonic() + PATIENCE
    while (found := caller.get(location).raise_for_status().json())["status"] != status:
        assert found["status"] == "queued", found
        assert time.monotonic() < ending, found
        time.sleep(0.02)
    return dict(found)


def delivery_of(answer: httpx.Response) -> str:
    return f"/deliveries/{answer.headers['flowbridge-delivery']}"


def as_caller(url: str, account: Account) -> httpx.Client:
    headers = {"Authorization": f"Bearer {account.access_token}"}
    return httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE)


@contextmanager
def serving_in(folder: Path, homeserver: LocalSynapse, bot: Account) -> Iterator[tuple[str, Running]]:
    """A bridge that is a process of its own, with its store in this folder."""
    with serving(cwd=folder, BASE_URL=homeserver.url, ACCESS_TOKEN=bot.access_token) as found:
        yield found


def test_async_sends_arrive_in_order(bridge: httpx.Client, room: Room) -> None:
    locations = [accepted(send(bridge, room, number, **ASYNC)) for number in range(50)]
    last = wait_until(bridge, locations[-1])
    assert room.bodies() == [str(number) for number in range(50)]
    assert room.event(last["event_id"])["content"] == text(49)
    for location in locations:
        wait_until(bridge, location)


def test_default_sends_of_many_callers_arrive_in_the_order_of_each(
    bridge_url: str, owner: Account, new_room: Callable[..., Room]
) -> None:
    room = new_room()

    def run(name: int) -> None:
        with as_caller(bridge_url, owner) as caller:
            for number in range(10):
                assert send(caller, room, f"{name}-{number}").status_code == 200

    with ThreadPoolExecutor(5) as callers:
        list(callers.map(run, range(5)))
    bodies = room.bodies()
    assert len(bodies) == 50
    for name in range(5):
        assert [body for body in bodies if body.startswith(f"{name}-")] == [f"{name}-{number}" for number in range(10)]


def test_same_key_is_one_event_in_the_room(bridge: httpx.Client, room: Room) -> None:
    key = {"Idempotency-Key": "order 17"}
    answers = [send(bridge, room, "shipped", **key) for _ in range(3)]
    other = send(bridge, room, "cancelled", **key)
    assert [answer.status_code for answer in (*answers, other)] == [200, 200, 200, 422]
    assert len({answer.json()["event_id"] for answer in answers}) == 1
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, True, True]
    assert room.bodies() == ["shipped"]


def test_same_key_twenty_times_at_once_is_one_event_in_the_room(bridge: httpx.Client, room: Room) -> None:
    with ThreadPoolExecutor(20) as callers:
        key = {"Idempotency-Key": "k"}
        answers = list(callers.map(lambda _: send(bridge, room, "once", **key), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    (event,) = room.messages()
    assert {answer.json()["event_id"] for answer in answers} == {event["event_id"]}


def test_reused_txn_id_loses_no_message_on_the_matrix_surface(bridge: httpx.Client, room: Room) -> None:
    """Synapse itself would answer the first event's id, and send nothing."""
    path = f"{MATRIX}{room.path}/send/m.room.message/1"
    answers = [bridge.put(path, json=text(body)) for body in ("first", "first", "second")]
    first, again, second = (answer.json()["event_id"] for answer in answers)
    assert first == again != second
    assert room.bodies() == ["first", "second"]


def test_same_state_set_twice_is_a_success(bridge: httpx.Client, room: Room) -> None:
    path = f"{room.path}/state/m.room.topic"
    first = bridge.put(path, json={"topic": "t"})
    second = bridge.put(path, json={"topic": "t"}, headers={"Idempotency-Key": "k"})
    third = bridge.put(path, json={"topic": "t"}, headers={"Idempotency-Key": "k"})
    assert {answer.json()["event_id"] for answer in (first, second, third)} == {first.json()["event_id"]}
    assert ["idempotent-replayed" in answer.headers for answer in (first, second, third)] == [False, False, True]
    location = accepted(bridge.put(path, json={"topic": "async"}, headers=ASYNC))
    wait_until(bridge, location)
    assert room.state("m.room.topic") == {"topic": "async"}


def test_token_that_is_logged_out_in_between_is_a_401_at_once(
    bridge_url: str, synapse: LocalSynapse, make_account: MakeAccount, new_room: Callable[..., Room]
) -> None:
    room, guest = new_room(preset="public_chat"), make_account()
    with as_caller(synapse.url, guest) as direct, as_caller(bridge_url, guest) as caller:
        direct.post(f"{MATRIX}{room.path}/join", json={}).raise_for_status()
        assert send(caller, room, "while it was good").status_code == 200
        direct.post(f"{MATRIX}/logout", json={}).raise_for_status()
        for _ in range(2):
            answer = send(caller, room, "too late")
            assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert room.bodies() == ["while it was good"]


def test_refusal_of_the_room_comes_at_once(bridge: httpx.Client, bridge_url: str, room: Room, friend: Account) -> None:
    started = time.monotonic()
    with as_caller(bridge_url, friend) as stranger:
        answer = send(stranger, room, "not a member")
        assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
        assert wait_until(stranger, delivery_of(answer), "dead")["error"] == {"status": 403, **answer.json()}
    assert time.monotonic() - started < PATIENCE / 2
    assert send(bridge, room, "the next one is not held up").status_code == 200


@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_plain_text_is_refused_at_once_in_an_encrypted_room(
    bridge: httpx.Client, new_room: Callable[..., Room], prefix: str
) -> None:
    room = new_room(initial_state=[ENCRYPTION])
    answer = bridge.post(f"{prefix}{room.path}/send/m.room.message", json=text("plain"))
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert answer.json()["error"] == (
        "the room is encrypted, and this would go into it as plain text: send it to another room, or allow it with "
        "FLOWBRIDGE_ENCRYPTED_ROOMS=allow"
    )
    assert room.messages() == []
    wait_until(bridge, delivery_of(answer), "dead")


def test_state_and_reactions_pass_into_an_encrypted_room(bridge: httpx.Client, new_room: Callable[..., Room]) -> None:
    room = new_room(initial_state=[ENCRYPTION])
    topic = bridge.put(f"{room.path}/state/m.room.topic", json={"topic": "secret"})
    assert topic.status_code == 200
    relation = {"rel_type": "m.annotation", "event_id": topic.json()["event_id"], "key": "👍"}
    for path, content in {
        f"{room.path}/send/m.room.name": {"name": "by send"},
        f"{room.path}/send/m.reaction": {"m.relates_to": relation},
        f"{room.path}/send/m.room.encrypted": {
            "algorithm": "m.megolm.v1.aes-sha2",
            "ciphertext": "c",
            "session_id": "s",
        },
    }.items():
        answer = bridge.post(path, json=content)
        assert answer.status_code == 200, answer.text
        assert room.event(answer.json()["event_id"])["content"] == content


def test_setting_lets_plain_text_into_an_encrypted_room(
    synapse: LocalSynapse, owner: Account, new_room: Callable[..., Room], tmp_path: Path
) -> None:
    room = new_room(initial_state=[ENCRYPTION])
    settings = Settings.load(base_url=synapse.url, encrypted_rooms="allow", database_url=store_in(tmp_path))
    with background(settings) as url, as_caller(url, owner) as caller:
        assert send(caller, room, "plain").status_code == 200
    assert room.bodies() == ["plain"]


def test_what_was_answered_202_survives_kill_9(
    synapse: LocalSynapse, owner: Account, room: Room, tmp_path: Path
) -> None:
    with serving_in(tmp_path, synapse, owner) as (url, process), as_caller(url, owner) as caller:
        locations = [accepted(send(caller, room, number, **ASYNC)) for number in range(20)]
        process.kill()
        process.wait(PATIENCE)
    with serving_in(tmp_path, synapse, owner) as (url, _), as_caller(url, owner) as caller:
        for location in locations:
            wait_until(caller, location)
    assert room.bodies() == [str(number) for number in range(20)]


@pytest.fixture(scope="module")
def own_synapse() -> Iterator[LocalSynapse]:
    """One that limits the rate, and may be stopped."""
    with LocalSynapse(config=RATE) as homeserver:
        yield homeserver


@pytest.fixture(scope="module")
def sender(own_synapse: LocalSynapse) -> Account:
    return own_synapse.register("sender")


@pytest.fixture
def own_room(own_synapse: LocalSynapse, sender: Account) -> Iterator[Room]:
    with as_caller(own_synapse.url, sender) as direct:
        room_id = direct.post(f"{MATRIX}/createRoom", json={}).raise_for_status().json()["room_id"]
        yield Room(room_id, sender, direct)


def test_rate_limit_is_waited_out(own_synapse: LocalSynapse, sender: Account, own_room: Room, tmp_path: Path) -> None:
    settings = Settings.load(base_url=own_synapse.url, wait_seconds=PATIENCE, database_url=store_in(tmp_path))
    with background(settings) as url, as_caller(url, sender) as caller:
        started = time.monotonic()
        answers = [send(caller, own_room, number) for number in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert time.monotonic() - started > 1, "there was no limit"
    assert own_room.bodies() == [str(number) for number in range(10)]


def test_what_is_accepted_while_the_homeserver_is_away_is_sent_when_it_is_back(
    own_synapse: LocalSynapse, sender: Account, own_room: Room, tmp_path: Path
) -> None:
    settings = Settings.load(
        base_url=own_synapse.url, access_token=sender.access_token, wait_seconds=0.3, database_url=store_in(tmp_path)
    )
    with background(settings) as url, as_caller(url, sender) as caller:
        assert send(caller, own_room, "before", Prefer="wait=60").status_code == 200
        own_synapse.stop()
        locations = [accepted(send(caller, own_room, number, **ASYNC)) for number in range(5)]
        locations.append(accepted(send(caller, own_room, "waited for")))
        assert caller.get("/readyz").status_code == 503
        refused = caller.put(f"{MATRIX}{own_room.path}/send/m.room.message/1", json=text("withdrawn"))
        assert refused.status_code in (429, 502)
        own_synapse.start()
        for location in locations:
            wait_until(caller, location)
        assert send(caller, own_room, "after", Prefer="wait=60").status_code == 200
        until(lambda: caller.get("/readyz").status_code == 200)  # what it found is told for a second
        assert caller.get("/readyz").json()["bot"] == sender.user_id
    assert own_room.bodies() == ["before", "0", "1", "2", "3", "4", "waited for", "after"]
