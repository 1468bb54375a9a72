"""Callers with tokens of their own in encrypted rooms: the bridge makes keys for devices that logged in through it."""

import secrets
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.encryption.test_bridge import Bridge, settings
from tests.patience import PATIENCE
from tests.peer import Peer

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callers")


@pytest.fixture(scope="module")
def bridge(synapse: LocalSynapse, make_account: MakeAccount, folder: Path) -> Iterator[Bridge]:
    account = make_account()
    with background(settings(synapse, account, folder)) as url:
        bridge = Bridge(url, synapse, account)
        yield bridge
        bridge.close()


@pytest.fixture
def account(make_account: MakeAccount) -> Account:
    return make_account()


@pytest.fixture
def room(bridge: Bridge, open_peer: Peer) -> str:
    room = bridge.room()
    open_peer.ask("join", room=room)
    return room


def log_in(bridge: Bridge, account: Account, path: str = "/_matrix/client/v3/login", **more: str) -> Json:
    """Through the bridge."""
    identifier = {"type": "m.id.user", "user": account.user_id}
    body: Json = {"type": "m.login.password", "identifier": identifier, "password": account.password, **more}
    answer = httpx.post(f"{bridge.http.base_url}{path}", json=body, trust_env=False, timeout=PATIENCE)
    found: Json = answer.raise_for_status().json()
    return found


def caller(bridge: Bridge, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=bridge.http.base_url, headers=headers, trust_env=False, timeout=PATIENCE)


def send(client: httpx.Client, room: str, text: str) -> httpx.Response:
    return client.post(f"/rooms/{quote(room)}/send/m.room.message", json={"msgtype": "m.text", "body": text})


def keys_of(bridge: Bridge, user_id: str) -> Json:
    body: Json = {"device_keys": {user_id: []}}
    found: Json = bridge.direct.post("/keys/query", json=body).raise_for_status().json()["device_keys"].get(user_id, {})
    return found


@pytest.mark.parametrize("path", ["/login", "/_matrix/client/v3/login", "/_matrix/client/r0/login"])
def test_who_logged_in_through_the_bridge_sends_encrypted(
    bridge: Bridge, open_peer: Peer, account: Account, room: str, path: str
) -> None:
    session = log_in(bridge, account, path)
    with caller(bridge, session["access_token"]) as client:
        assert session["device_id"] not in keys_of(bridge, account.user_id)  # not before it is needed
        client.post(f"/join/{quote(room)}").raise_for_status()
        event_ids = [send(client, room, f"{number}").raise_for_status().json()["event_id"] for number in range(3)]
    assert bridge.event(room, event_ids[0])["type"] == "m.room.encrypted"
    assert bridge.event(room, event_ids[0])["content"]["device_id"] == session["device_id"]
    found = [open_peer.read(event_id) for event_id in event_ids]
    assert [each["content"]["body"] for each in found] == ["0", "1", "2"]
    assert {each["sender"] for each in found} == {account.user_id}
    assert list(keys_of(bridge, account.user_id)) == [session["device_id"]]


def test_who_registered_through_the_bridge_sends_encrypted(bridge: Bridge, open_peer: Peer, room: str) -> None:
    body = {"user": f"r{secrets.token_hex(4)}", "password": secrets.token_hex(8)}
    session = httpx.post(f"{bridge.http.base_url}/register", json=body, trust_env=False).raise_for_status().json()
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        event_id = send(client, room, "new here").raise_for_status().json()["event_id"]
    assert open_peer.read(event_id)["content"]["body"] == "new here"


def test_token_of_another_login_is_told_what_to_do(bridge: Bridge, account: Account, room: str) -> None:
    with caller(bridge, account.access_token) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        refused = send(client, room, "plain")
        assert (refused.status_code, "`POST /login` of the bridge" in refused.json()["error"]) == (403, True)
        file = {"attachments": [{"data": "aGVsbG8=", "filename": "a.txt"}]}
        assert client.post(f"/rooms/{quote(room)}/messages", json=file).status_code == 403
    assert keys_of(bridge, account.user_id) == {}


def test_device_of_an_encrypting_client_is_never_used(
    bridge: Bridge, make_account: MakeAccount, room: str, synapse: LocalSynapse
) -> None:
    """matrix-js-sdk logs in through the bridge, and gives its device keys at once."""
    account = make_account()
    with Peer(str(bridge.http.base_url).rstrip("/"), account) as client:
        client.ask("join", room=room)
        before = keys_of(bridge, account.user_id)
        with caller(bridge, client.me["access_token"]) as http:
            assert send(http, room, "plain").status_code == 403
        assert keys_of(bridge, account.user_id) == before
        event_id = client.send(room, {"msgtype": "m.text", "body": "by itself"})
    assert bridge.event(room, event_id)["type"] == "m.room.encrypted"


def test_client_that_takes_the_device_over_has_it_from_then_on(bridge: Bridge, account: Account, room: str) -> None:
    session = log_in(bridge, account)
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        send(client, room, "by the bridge").raise_for_status()
        client.post("/_matrix/client/v3/keys/upload", json={}).raise_for_status()
        assert send(client, room, "plain").status_code == 403


def test_keys_uploaded_past_the_bridge_are_noticed(
    bridge: Bridge, account: Account, room: str, synapse: LocalSynapse
) -> None:
    session = log_in(bridge, account)
    name = session["device_id"]
    headers = {"Authorization": f"Bearer {session['access_token']}"}
    signed = _device_keys(account.user_id, name)
    url = f"{synapse.url}/_matrix/client/v3/keys/upload"
    httpx.post(url, json={"device_keys": signed}, headers=headers, trust_env=False).raise_for_status()
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        assert send(client, room, "plain").status_code == 403
    assert keys_of(bridge, account.user_id)[name]["keys"] == signed["keys"]


def test_other_tokens_of_the_user_send_with_the_device_that_there_is(
    bridge: Bridge, open_peer: Peer, account: Account, room: str
) -> None:
    session = log_in(bridge, account)
    with caller(bridge, session["access_token"]) as client, caller(bridge, account.access_token) as other:
        client.post(f"/join/{quote(room)}").raise_for_status()
        send(client, room, "one").raise_for_status()
        event_id = send(other, room, "two").raise_for_status().json()["event_id"]
    assert bridge.event(room, event_id)["content"]["device_id"] == session["device_id"]
    assert open_peer.read(event_id)["content"]["body"] == "two"


def test_logout_ends_the_device(bridge: Bridge, account: Account, room: str, folder: Path) -> None:
    session = log_in(bridge, account)
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        send(client, room, "one").raise_for_status()
        assert _stored(folder, session["device_id"])
        client.post("/logout").raise_for_status()
    assert not _stored(folder, session["device_id"])
    again = log_in(bridge, account)
    with caller(bridge, again["access_token"]) as client:
        event_id = send(client, room, "two").raise_for_status().json()["event_id"]
    assert bridge.event(room, event_id)["content"]["device_id"] == again["device_id"]


def test_logout_of_all_the_bot_s_tokens_leaves_its_room_keys(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path: Path
) -> None:
    account = make_account()
    with background(settings(synapse, account, tmp_path)) as url:
        bridge = Bridge(url, synapse, account)
        bridge.say(bridge.room(), "hello")
        with caller(bridge, account.access_token) as client:
            client.post("/_matrix/client/v3/logout/all").raise_for_status()
        bridge.close()
    assert _stored(tmp_path, account.device_id)


def test_syncs_of_the_caller_bring_no_messages_for_its_device(bridge: Bridge, account: Account, room: str) -> None:
    session = log_in(bridge, account)
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        send(client, room, "one").raise_for_status()
        message = {"messages": {account.user_id: {session["device_id"]: {"hello": 1}}}}
        bridge.direct.put(f"/sendToDevice/m.test/{secrets.token_hex(8)}", json=message).raise_for_status()
        sync = client.get("/_matrix/client/v3/sync", params={"timeout": "0"}).raise_for_status().json()
    assert room in sync["rooms"]["join"]
    assert "to_device" not in sync


def test_files_of_callers_are_encrypted(bridge: Bridge, open_peer: Peer, account: Account, room: str) -> None:
    session = log_in(bridge, account)
    with caller(bridge, session["access_token"]) as client:
        client.post(f"/join/{quote(room)}").raise_for_status()
        message = {"attachments": [{"data": "aGVsbG8=", "filename": "a.txt"}]}
        answer = client.post(f"/rooms/{quote(room)}/messages", json=message)
    content = open_peer.read(answer.raise_for_status().json()["event_id"])["content"]
    assert open_peer.ask("file", file=content["file"])["data"] == "aGVsbG8="


def test_many_callers_at_once_each_send_in_order(
    bridge: Bridge, open_peer: Peer, make_account: MakeAccount, room: str
) -> None:
    sessions = [log_in(bridge, make_account()) for _ in range(5)]
    clients = [caller(bridge, session["access_token"]) for session in sessions]
    for client in clients:
        client.post(f"/join/{quote(room)}").raise_for_status()

    def burst(number: int) -> list[str]:
        return [send(clients[number], room, f"{number}-{n}").raise_for_status().json()["event_id"] for n in range(10)]

    with ThreadPoolExecutor(len(clients)) as pool:
        sent = list(pool.map(burst, range(len(clients))))
    for number, event_ids in enumerate(sent):
        assert [open_peer.read(each)["content"]["body"] for each in event_ids] == [f"{number}-{n}" for n in range(10)]
    for client in clients:
        client.close()


def _stored(folder: Path, device_id: str) -> bool:
    with sqlite3.connect(folder / "flowbridge.db") as connection:
        found = connection.execute("SELECT count(*) FROM crypto_devices WHERE device_id = ?", (device_id,)).fetchone()
    return bool(found[0])


def _device_keys(user_id: str, device_id: str) -> Json:
    """As a client signs and publishes them."""
    from flowbridge.encryption import signatures
    from flowbridge.encryption.identities import ALGORITHMS
    from flowbridge.encryption.olm import Account as OlmAccount

    olm = OlmAccount()
    named = {f"curve25519:{device_id}": olm.curve25519, f"ed25519:{device_id}": olm.ed25519}
    keys = {"user_id": user_id, "device_id": device_id, "algorithms": ALGORITHMS, "keys": named}
    return signatures.add(keys, user_id, device_id, olm.sign(signatures.signed_part(keys)))


def test_device_outlives_a_restart(
    synapse: LocalSynapse, make_account: MakeAccount, open_peer: Peer, tmp_path: Path
) -> None:
    account, bot = make_account(), make_account()
    sent = []
    token = room = ""
    for number in range(2):
        with background(settings(synapse, bot, tmp_path)) as url:
            bridge = Bridge(url, synapse, bot)
            if not room:
                room, token = bridge.room(), log_in(bridge, account)["access_token"]
                open_peer.ask("join", room=room)
            with caller(bridge, token) as client:
                client.post(f"/join/{quote(room)}").raise_for_status()
                sent.append(send(client, room, f"{number}").raise_for_status().json()["event_id"])
            content = bridge.event(room, sent[-1])["content"]
            bridge.close()
    assert [open_peer.read(event_id)["content"]["body"] for event_id in sent] == ["0", "1"]
    assert content["device_id"]
