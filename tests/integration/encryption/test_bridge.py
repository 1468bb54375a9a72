"""The whole bridge in encrypted rooms, as callers and other clients see it."""

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.conftest import KEY, store_in
from tests.patience import PATIENCE, until
from tests.peer import Peer

Json = dict[str, Any]


class Bridge:
    """A caller of a bridge with the bot's key, and the bot seen without the bridge."""

    def __init__(self, url: str, synapse: LocalSynapse, account: Account) -> None:
        self.http = httpx.Client(base_url=url, headers={"X-API-Key": KEY}, trust_env=False)
        headers = {"Authorization": f"Bearer {account.access_token}"}
        self.direct = httpx.Client(base_url=f"{synapse.url}/_matrix/client/v3", headers=headers, trust_env=False)

    def room(self, *, encrypted: bool = True, **settings: Any) -> str:
        body: Json = {"preset": "public_chat"}
        if encrypted:
            content = {"algorithm": "m.megolm.v1.aes-sha2", **settings}
            body["initial_state"] = [{"type": "m.room.encryption", "state_key": "", "content": content}]
        answer = self.direct.post("/createRoom", json=body)
        return str(answer.raise_for_status().json()["room_id"])

    def send(self, room: str, content: Json, type_: str = "m.room.message", **headers: str) -> httpx.Response:
        return self.http.post(f"/rooms/{quote(room)}/send/{type_}", json=content, headers=headers)

    def say(self, room: str, text: str) -> str:
        return str(self.send(room, {"msgtype": "m.text", "body": text}).raise_for_status().json()["event_id"])

    def event(self, room: str, event_id: str) -> Json:
        found: Json = self.direct.get(f"/rooms/{quote(room)}/event/{quote(event_id)}").raise_for_status().json()
        return found

    def close(self) -> None:
        self.http.close()
        self.direct.close()


def settings(synapse: LocalSynapse, account: Account, folder: Path, **values: Any) -> Settings:
    values = values or {"access_token": account.access_token}
    return Settings.load(
        base_url=synapse.url,
        api_keys=[KEY],
        wait_seconds=PATIENCE,
        database_url=store_in(folder),
        encrypted_rooms="encrypt",
        **values,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encrypted")


@pytest.fixture(scope="module")
def bridge(synapse: LocalSynapse, make_account: MakeAccount, folder: Path) -> Iterator[Bridge]:
    account = make_account()
    with background(settings(synapse, account, folder)) as url:
        bridge = Bridge(url, synapse, account)
        yield bridge
        bridge.close()


def test_what_is_sent_to_an_encrypted_room_is_read_there_without_a_warning(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    event_id = bridge.say(room, "for your eyes")
    assert bridge.event(room, event_id)["type"] == "m.room.encrypted"
    found = peer.read(event_id)
    assert (found["content"]["body"], found["failure"], found["shield"]) == ("for your eyes", None, 0)


def test_room_that_is_not_encrypted_gets_plain_text(bridge: Bridge) -> None:
    room = bridge.room(encrypted=False)
    assert bridge.event(room, bridge.say(room, "for all"))["content"]["body"] == "for all"


def test_message_as_people_write_it_is_encrypted_whole(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    path = f"/rooms/{quote(room)}/messages"
    first = bridge.http.post(path, json={"markdown": "**one**", "key": "story"}).raise_for_status().json()["event_id"]
    second = bridge.http.post(path, json={"markdown": "*two*", "key": "story"}).raise_for_status().json()["event_id"]
    assert peer.read(first)["content"]["formatted_body"] == "<strong>one</strong>"
    edit = peer.read(second)
    assert edit["relation"] == {"rel_type": "m.replace", "event_id": first}
    assert edit["content"]["m.new_content"]["formatted_body"] == "<em>two</em>"


def test_direct_room_that_the_bridge_makes_is_encrypted_from_the_beginning(bridge: Bridge, friend: Account) -> None:
    path = f"/rooms/{quote(friend.user_id)}/messages"
    answer = bridge.http.post(path, json={"text": "between us"}).raise_for_status()
    me = bridge.http.get("/whoami").raise_for_status().json()["user_id"]
    listed = bridge.direct.get(f"/user/{quote(me)}/account_data/m.direct").raise_for_status().json()
    (room,) = listed[friend.user_id]
    assert bridge.event(room, answer.json()["event_id"])["type"] == "m.room.encrypted"


def test_reactions_redactions_and_state_stay_plain(bridge: Bridge) -> None:
    room = bridge.room()
    event_id = bridge.say(room, "look")
    path = f"/rooms/{quote(room)}"
    answer = bridge.http.post(f"{path}/reactions", json={"target": event_id, "key": "✅"}).raise_for_status()
    assert bridge.event(room, answer.json()["event_id"])["type"] == "m.reaction"
    topic = bridge.send(room, {"topic": "plain"}, "m.room.topic").raise_for_status()
    assert bridge.event(room, topic.json()["event_id"])["content"] == {"topic": "plain"}
    bridge.http.post(f"{path}/redactions", json={"target": event_id}).raise_for_status()
    assert bridge.event(room, event_id)["content"] == {}


def test_every_message_type_of_the_catalogue_goes_in(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    for content in (
        {"msgtype": "m.notice", "body": "n"},
        {"msgtype": "m.emote", "body": "e"},
        {"msgtype": "m.location", "body": "l", "geo_uri": "geo:51.5,-0.1"},
    ):
        event_id = bridge.send(room, content).raise_for_status().json()["event_id"]
        assert peer.read(event_id)["content"] == content


def test_room_that_becomes_encrypted_gets_no_more_plain_text(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room(encrypted=False)
    peer.ask("join", room=room)
    bridge.say(room, "plain")
    content = {"algorithm": "m.megolm.v1.aes-sha2"}
    bridge.direct.put(f"/rooms/{quote(room)}/state/m.room.encryption", json=content).raise_for_status()
    until(lambda: bridge.event(room, bridge.say(room, "sealed"))["type"] == "m.room.encrypted")
    assert bridge.event(room, bridge.say(room, "still"))["type"] == "m.room.encrypted"


def test_room_that_becomes_encrypted_under_load_loses_nothing(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path: Path, peer: Peer
) -> None:
    """A room found plain would be taken to be so for an hour: it is the device's sync that ends it."""
    account = make_account()
    timing = Timing(plain_seconds=3_600.0)
    with background(settings(synapse, account, tmp_path), timing=timing) as url:
        bridge = Bridge(url, synapse, account)
        room = bridge.room(encrypted=False)
        peer.ask("join", room=room)
        texts: dict[str, str] = {}

        def say() -> Json:
            text = str(len(texts))
            event_id = bridge.say(room, text)
            texts[event_id] = text
            return bridge.event(room, event_id)

        assert say()["type"] == "m.room.message"
        with ThreadPoolExecutor(1) as pool:
            target = f"/rooms/{quote(room)}/state/m.room.encryption"
            changed = pool.submit(bridge.direct.put, target, json={"algorithm": "m.megolm.v1.aes-sha2"})
            until(lambda: say()["type"] == "m.room.encrypted")
            changed.result().raise_for_status()
        assert {say()["type"] for _ in range(10)} == {"m.room.encrypted"}
        found: list[Json] = []
        params: Json = {"dir": "f", "limit": 100}
        while "from" not in params or params["from"]:
            page = bridge.direct.get(f"/rooms/{quote(room)}/messages", params=params).raise_for_status().json()
            found += page["chunk"]
            params["from"] = page.get("end", "")
        bridge.close()
    said = [each for each in found if each["type"] in ("m.room.message", "m.room.encrypted")]
    assert [each["event_id"] for each in said] == list(texts)
    sealed = [each["event_id"] for each in said if each["type"] == "m.room.encrypted"]
    assert sealed == list(texts)[-len(sealed) :]  # none is plain after the first that is not
    assert [peer.read(event_id)["content"]["body"] for event_id in sealed] == [texts[each] for each in sealed]


def test_three_hundred_at_once_of_ten_callers_arrive_once_and_each_readable(bridge: Bridge, peer: Peer) -> None:
    rooms = [bridge.room(rotation_period_msgs=30) for _ in range(3)]
    for room in rooms:
        peer.ask("join", room=room)

    def caller(number: int) -> list[tuple[str, str]]:
        with httpx.Client(base_url=bridge.http.base_url, headers={"X-API-Key": KEY}, trust_env=False) as http:
            said = []
            for turn in range(30):
                body = {"msgtype": "m.text", "body": f"{number} {turn}"}
                answer = http.post(f"/rooms/{quote(rooms[turn % 3])}/send/m.room.message", json=body, timeout=PATIENCE)
                said.append((str(answer.raise_for_status().json()["event_id"]), str(body["body"])))
            return said

    with ThreadPoolExecutor(10) as pool:
        said = [each for one in pool.map(caller, range(10)) for each in one]
    assert len({event_id for event_id, _ in said}) == 300
    assert [peer.read(event_id)["content"]["body"] for event_id, _ in said] == [text for _, text in said]


def test_content_that_does_not_fit_is_a_413_with_the_number(bridge: Bridge) -> None:
    room = bridge.room()
    refused = bridge.send(room, {"msgtype": "m.text", "body": "x" * 50_000})
    assert (refused.status_code, refused.json()["errcode"]) == (413, "M_TOO_LARGE")
    assert "bytes fit" in refused.json()["error"]
    bridge.send(room, {"msgtype": "m.text", "body": "x" * 47_000}).raise_for_status()


def test_repeat_with_the_same_key_is_the_same_event(bridge: Bridge) -> None:
    room = bridge.room()
    content = {"msgtype": "m.text", "body": "once"}
    answers = [bridge.send(room, content, **{"Idempotency-Key": "once"}) for _ in range(2)]
    assert len({answer.raise_for_status().json()["event_id"] for answer in answers}) == 1


def test_bridge_that_may_encrypt_makes_a_device_once_it_meets_an_encrypted_room(
    synapse: LocalSynapse, make_account: MakeAccount, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is there, and nobody has said what to do with encrypted rooms."""
    monkeypatch.delenv("FLOWBRIDGE_ENCRYPTED_ROOMS")
    account = make_account()
    by_default = Settings.load(
        base_url=synapse.url,
        api_keys=[KEY],
        wait_seconds=PATIENCE,
        database_url=store_in(tmp_path),
        access_token=account.access_token,
    )

    def keys(bridge: Bridge) -> Json:
        body: Json = {"device_keys": {account.user_id: []}}
        found: Json = bridge.direct.post("/keys/query", json=body).json()["device_keys"].get(account.user_id, {})
        return found

    with background(by_default) as url:
        bridge = Bridge(url, synapse, account)
        bridge.say(bridge.room(encrypted=False), "for all")
        assert bridge.http.get("/readyz").json()["encryption"] == "off"
        assert keys(bridge) == {}
        room = bridge.room()
        peer.ask("join", room=room)
        event_id = bridge.say(room, "for your eyes")
        assert list(keys(bridge)) == [account.device_id]
        bridge.close()
    found = peer.read(event_id)
    assert (found["content"]["body"], found["failure"], found["shield"]) == ("for your eyes", None, 0)
    with background(by_default) as url:  # which has a device now
        bridge = Bridge(url, synapse, account)
        until(lambda: bridge.http.get("/readyz").json()["encryption"] == "signed")
        bridge.close()


def test_caller_with_a_device_of_its_own_is_refused(bridge: Bridge, synapse: LocalSynapse, friend: Account) -> None:
    room = bridge.room()
    with httpx.Client(base_url=bridge.http.base_url, trust_env=False) as http:
        headers = {"Authorization": f"Bearer {friend.access_token}"}
        http.post(f"/rooms/{quote(room)}/join", headers=headers).raise_for_status()
        refused = http.post(
            f"/rooms/{quote(room)}/send/m.room.message", json={"msgtype": "m.text", "body": "x"}, headers=headers
        )
    assert (refused.status_code, refused.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert "API key" in refused.json()["error"]


def test_a_hundred_at_once_arrive_once_and_each_readable(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room(rotation_period_msgs=30)
    peer.ask("join", room=room)
    with ThreadPoolExecutor(10) as pool:
        event_ids = list(pool.map(lambda number: bridge.say(room, str(number)), range(100)))
    assert len(set(event_ids)) == 100
    found = [peer.read(event_id) for event_id in event_ids]
    assert [each["content"]["body"] for each in found] == [str(number) for number in range(100)]
    assert len({each["session"] for each in found}) == 4


# reading


def received(peer: Peer, bridge: Bridge, room: str, text: str) -> tuple[str, Json]:
    """What the bot's callers read of what the peer says, by /messages."""
    event_id = peer.send(room, {"msgtype": "m.text", "body": text})
    found: list[Json] = []

    def there() -> bool:
        page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "b", "limit": 20}).raise_for_status()
        found[:] = [event for event in page.json()["chunk"] if event["event_id"] == event_id]
        return bool(found) and "undecryptable" not in found[0]["flowbridge"]

    until(there)
    return event_id, found[0]


def test_history_is_decrypted_and_says_whose_it_is(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    own = bridge.say(room, "mine")
    event_id, event = received(peer, bridge, room, "yours")
    assert (event["type"], event["content"]) == ("m.room.message", {"msgtype": "m.text", "body": "yours"})
    assert event["flowbridge"] == {"encrypted": True, "verified": True, "sender_device": peer.me["device_id"]}
    page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "b", "limit": 20}).json()["chunk"]
    (mine,) = [each for each in page if each["event_id"] == own]
    assert (mine["content"]["body"], mine["flowbridge"]["verified"]) == ("mine", True)
    assert bridge.event(room, event_id)["type"] == "m.room.encrypted"


@pytest.mark.parametrize("path", ["/initialSync", "/_matrix/client/r0/rooms/{room}/initialSync"])
def test_snapshots_are_decrypted(bridge: Bridge, peer: Peer, path: str) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.say(room, "of mine")
    found = bridge.http.get(path.format(room=quote(room)), params={"limit": "20"}).raise_for_status().json()
    rooms = [found] if "rooms" not in found else [each for each in found["rooms"] if each["room_id"] == room]
    said = [event for event in rooms[0]["messages"]["chunk"] if event["type"] == "m.room.message"]
    assert [event["content"]["body"] for event in said] == ["of mine"]
    assert said[0]["flowbridge"]["verified"]


def test_what_was_said_before_the_bot_came_is_told_with_the_reason(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.http.post(f"/rooms/{quote(room)}/leave").raise_for_status()
    until(lambda: bridge.direct.get("/joined_rooms").json()["joined_rooms"].count(room) == 0)
    event_id = peer.send(room, {"msgtype": "m.text", "body": "not for you"})
    bridge.http.post(f"/rooms/{quote(room)}/join").raise_for_status()
    page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "b", "limit": 20}).json()["chunk"]
    (event,) = [each for each in page if each["event_id"] == event_id]
    assert event["type"] == "m.room.encrypted"
    assert event["flowbridge"]["encrypted"]
    assert "key" in event["flowbridge"]["undecryptable"]


def test_live_events_are_decrypted(bridge: Bridge, peer: Peer) -> None:
    """Also the first one of a session, whose key comes by the same sync as the event: the live stream's own."""
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.say(room, "hello")
    with bridge.http.stream("GET", f"/rooms/{quote(room)}/live", params={"own": "false"}, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        for number in range(3):
            peer.ask("discard", room=room)
            event_id = peer.send(room, {"msgtype": "m.text", "body": str(number)})
            event = next(found for found in events_of(lines) if found.get("event_id") == event_id)
            assert (event["type"], event["content"]["body"]) == ("m.room.message", str(number))
            assert event["flowbridge"] == {"encrypted": True, "verified": True, "sender_device": peer.me["device_id"]}


def events_of(lines: Iterator[str]) -> Iterator[Json]:
    for line in lines:
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def test_events_by_long_poll_are_decrypted(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.say(room, "hello")
    since = bridge.http.get("/events", params={"timeout": 0, "room_id": room}).raise_for_status().json()["end"]
    received(peer, bridge, room, "polled")
    found = bridge.http.get("/events", params={"from": since, "timeout": 10_000, "room_id": room}).json()["chunk"]
    assert [event["content"]["body"] for event in found if event["type"] == "m.room.message"] == ["polled"]


def test_other_syncs_with_the_bot_s_token_take_no_keys_away(bridge: Bridge, peer: Peer) -> None:
    """Matrix deletes a message for a device once a later sync with the same token has passed it."""
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.say(room, "hello")
    since = bridge.http.get("/events", params={"timeout": 0}).json()["end"]
    for number in range(5):
        peer.ask("discard", room=room)
        event_id = peer.send(room, {"msgtype": "m.text", "body": str(number)})
        seen: list[str] = []
        while event_id not in seen:
            answer = bridge.http.get("/events", params={"from": since, "timeout": 10_000}).raise_for_status().json()
            seen, since = [event.get("event_id") for event in answer["chunk"]], answer["end"]
    texts = [str(number) for number in range(5)]

    def read() -> list[str]:
        page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "f", "limit": 50}).json()["chunk"]
        return [each["content"]["body"] for each in page if each["type"] == "m.room.message"][1:]

    until(lambda: read() == texts, else_=read)


def test_readiness_says_how_the_device_stands(bridge: Bridge) -> None:
    bridge.say(bridge.room(), "hello")
    assert bridge.http.get("/readyz").raise_for_status().json()["encryption"] == "signed"


def test_client_that_syncs_with_the_bot_s_token_takes_no_keys_away(bridge: Bridge, peer: Peer) -> None:
    room = bridge.room()
    peer.ask("join", room=room)
    bridge.say(room, "hello")
    since, path = "", "/_matrix/client/v3/sync"
    for number in range(3):
        peer.ask("discard", room=room)
        event_id = peer.send(room, {"msgtype": "m.text", "body": str(number)})
        seen = ""
        while event_id not in seen:
            wanted = {"timeout": "1000", **({"since": since} if since else {})}
            answer = bridge.http.get(path, params=wanted, timeout=PATIENCE).raise_for_status()
            assert "to_device" not in answer.json()
            seen, since = answer.text, answer.json()["next_batch"]
    texts = [str(number) for number in range(3)]

    def read() -> list[str]:
        page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "f", "limit": 50}).json()["chunk"]
        return [each["content"]["body"] for each in page if each["type"] == "m.room.message"][1:]

    until(lambda: read() == texts, else_=read)


def test_recovery_key_is_in_a_file_of_its_owner_alone(bridge: Bridge, folder: Path) -> None:
    bridge.say(bridge.room(), "the device is there")
    path = folder / "flowbridge.db.recovery-key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().split()) == 12


def test_bot_that_logs_in_is_the_same_device_wherever_it_starts(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's name is another one each time, and without a database so is the device's."""
    account, found = make_account(), set()
    for host in ("first", "second"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        own = settings(synapse, account, tmp_path, user=account.user_id, password=account.password)
        with background(own) as url:
            bridge = Bridge(url, synapse, account)
            content = bridge.event(room := bridge.room(), bridge.say(room, "hello"))["content"]
            found.add(content["device_id"])
            bridge.close()
    assert len(found) == 1
    assert found != {account.device_id}


def test_bridge_that_starts_again_is_the_same_device_and_forgets_old_ciphertexts(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path: Path, peer: Peer
) -> None:
    account, sessions = make_account(), set()
    room = ""
    for number in range(2):
        with background(settings(synapse, account, tmp_path)) as url:
            bridge = Bridge(url, synapse, account)
            if not number:
                room = bridge.room()
                peer.ask("join", room=room)
            event_id = bridge.say(room, str(number))
            found = peer.read(event_id)
            assert (found["content"]["body"], found["shield"]) == (str(number), 0)
            content = bridge.event(room, event_id)["content"]
            sessions.add((content["session_id"], content["device_id"]))
            bridge.close()
    assert len(sessions) == 1
    connection = sqlite3.connect(tmp_path / "flowbridge.db")
    assert connection.execute("SELECT count(*) FROM crypto_devices").fetchone() == (1,)
    connection.close()
