"""Files in encrypted rooms, both ways, with a client that encrypts and decrypts by itself."""

import base64
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.integration.encryption.test_bridge import Bridge, settings
from tests.integration.test_media import png
from tests.patience import PATIENCE, until
from tests.peer import Peer

Json = dict[str, Any]
TEXT = base64.b64encode(b"for your eyes").decode()


@pytest.fixture(scope="module")
def bridge(
    synapse: LocalSynapse, make_account: MakeAccount, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bridge]:
    account = make_account()
    with background(settings(synapse, account, tmp_path_factory.mktemp("files"))) as url:
        bridge = Bridge(url, synapse, account)
        yield bridge
        bridge.close()


@pytest.fixture
def room(bridge: Bridge, peer: Peer) -> str:
    room = bridge.room()
    peer.ask("join", room=room)
    return room


def say(bridge: Bridge, room: str, **message: Any) -> str:
    answer = bridge.http.post(f"/rooms/{quote(room)}/messages", json=message, timeout=PATIENCE)
    return str(answer.raise_for_status().json()["event_id"])


def get(bridge: Bridge, uri: str, **query: str) -> httpx.Response:
    return bridge.http.get(f"/media/{uri.removeprefix('mxc://')}", params=query, timeout=PATIENCE)


def decrypted(peer: Peer, content: Json) -> Json:
    found = peer.ask("file", file=content["file"])
    return {**found, "data": base64.b64decode(found["data"])}


def test_picture_is_shown_by_another_client(bridge: Bridge, peer: Peer, room: str) -> None:
    picture = png()
    attachment = {"data": base64.b64encode(picture).decode(), "filename": "secret.png", "caption": "look"}
    content = peer.read(say(bridge, room, attachments=[attachment]))["content"]
    assert (content["msgtype"], content["body"], content["filename"]) == ("m.image", "look", "secret.png")
    assert (content["info"]["mimetype"], content["info"]["size"]) == ("image/png", len(picture))
    assert "url" not in content
    found = decrypted(peer, content)
    assert found["data"] == picture
    assert found["type"] == "application/octet-stream"
    assert "secret" not in str(found["disposition"])


def test_large_file_of_a_form_is_encrypted(bridge: Bridge, peer: Peer, room: str) -> None:
    data = os.urandom(20_000_000)
    path = f"/rooms/{quote(room)}/messages"
    answer = bridge.http.post(path, files={"file": ("a.bin", data)}, timeout=4 * PATIENCE)
    content = peer.read(answer.raise_for_status().json()["event_id"])["content"]
    assert decrypted(peer, content)["data"] == data


def test_text_too_long_becomes_an_encrypted_file(bridge: Bridge, peer: Peer, room: str) -> None:
    text = "word " * 20_000
    path = f"/rooms/{quote(room)}/messages"
    answer = bridge.http.post(path, json={"text": text, "overflow": "file"}, timeout=PATIENCE).raise_for_status()
    content = peer.read(answer.json()["events"][1])["content"]
    assert decrypted(peer, content)["data"] == text.encode()


@pytest.mark.parametrize("encrypted", [True, False])
def test_text_that_fits_a_plain_room_alone_becomes_a_file_in_an_encrypted_one(
    bridge: Bridge, peer: Peer, encrypted: bool
) -> None:
    room, text = bridge.room(encrypted=encrypted), "word " * 10_000
    path = f"/rooms/{quote(room)}/messages"
    answer = bridge.http.post(path, json={"text": text, "overflow": "file"}, timeout=PATIENCE).raise_for_status()
    assert len(answer.json()["events"]) == 1 + encrypted
    refused = bridge.http.post(path, json={"text": text}, timeout=PATIENCE)
    assert refused.status_code == (413 if encrypted else 200)


def test_same_message_again_uploads_nothing_again(bridge: Bridge, peer: Peer, room: str) -> None:
    key = {"Idempotency-Key": secrets.token_hex(8)}
    message = {"attachments": [{"data": TEXT, "filename": "a.txt"}]}
    path = f"/rooms/{quote(room)}/messages"
    first, again = (bridge.http.post(path, json=message, headers=key, timeout=PATIENCE) for _ in range(2))
    assert first.raise_for_status().json() == again.raise_for_status().json()
    assert again.headers["Idempotent-Replayed"] == "true"


def test_plain_room_gets_a_plain_file(bridge: Bridge) -> None:
    room = bridge.room(encrypted=False)
    content = bridge.event(room, say(bridge, room, attachments=[{"data": TEXT, "filename": "a.txt"}]))["content"]
    assert get(bridge, content["url"]).content == b"for your eyes"


def test_file_of_a_hook_is_encrypted(bridge: Bridge, peer: Peer, room: str) -> None:
    made = bridge.http.post("/hooks", json={"name": f"h{secrets.token_hex(4)}", "room": room}).raise_for_status().json()
    attachment = {"data": TEXT, "filename": "a.txt"}
    told = bridge.http.post(httpx.URL(made["url"]).path, json={"text": "log", "attachments": [attachment]})
    assert told.status_code == 200

    def of_the_file() -> list[Json]:
        page = bridge.http.get(f"/rooms/{quote(room)}/messages", params={"dir": "b"}).raise_for_status().json()["chunk"]
        return [event["content"] for event in page if event["content"].get("msgtype") == "m.file"]

    until(lambda: len(of_the_file()) == 1)
    (content,) = of_the_file()
    assert decrypted(peer, content)["data"] == b"for your eyes"


@pytest.mark.parametrize("size", [0, 13, 300_000])
def test_file_of_another_client_is_decrypted_for_who_names_its_event(
    bridge: Bridge, peer: Peer, room: str, size: int
) -> None:
    bridge.say(room, "hello")
    data = os.urandom(size)
    content = {"msgtype": "m.file", "body": "ü.bin", "filename": "ü.bin", "info": {"mimetype": "text/plain"}}
    sent = peer.ask("attach", room=room, data=base64.b64encode(data).decode(), content=content)
    named = {"room_id": room, "event_id": sent["event_id"]}
    uri = sent["file"]["url"]
    found = get(bridge, uri, **named)
    assert (found.status_code, found.content) == (200, data)
    assert found.headers["content-type"] == "text/plain"
    assert found.headers["content-disposition"] == "inline; filename*=utf-8''%C3%BC.bin"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in found.headers["content-security-policy"]
    assert bridge.http.head(f"/media/{uri.removeprefix('mxc://')}", params=named).headers["content-length"] == str(size)
    if size:
        assert get(bridge, uri).content != data


@pytest.mark.parametrize("size", [13, 300_000])
def test_file_that_is_not_the_one_that_was_sent_is_never_whole(
    bridge: Bridge, peer: Peer, room: str, size: int
) -> None:
    bridge.say(room, "hello")
    data = base64.b64encode(bytes(size)).decode()
    sent = peer.ask("attach", room=room, data=data, content={"msgtype": "m.file", "body": "a"}, broken=True)
    ask = {"room_id": room, "event_id": sent["event_id"]}
    if size == 13:
        answer = get(bridge, sent["file"]["url"], **ask)
        assert (answer.status_code, "its hash is another one" in answer.json()["error"]) == (502, True)
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            get(bridge, sent["file"]["url"], **ask)


def test_what_is_asked_wrongly_is_told(bridge: Bridge, peer: Peer, room: str) -> None:
    event_id = bridge.say(room, "no file")
    uri = "mxc://localhost/abcdef"
    assert get(bridge, uri, event_id=event_id).status_code == 400
    assert get(bridge, uri, room_id=room).status_code == 400
    assert get(bridge, uri, room_id=room, event_id=event_id).status_code == 404
    assert get(bridge, uri, room_id=room, event_id="$nothing").status_code == 404
    assert get(bridge, f"{uri}/thumbnail", room_id=room, event_id=event_id, width="8", height="8").status_code == 400


def test_key_for_another_room_gets_nothing(bridge: Bridge, peer: Peer, room: str, tmp_path: Path) -> None:
    sent = peer.ask("attach", room=room, data=TEXT, content={"msgtype": "m.file", "body": "a"})
    path = f"/media/{sent['file']['url'].removeprefix('mxc://')}"
    ask = {"room_id": room, "event_id": sent["event_id"]}
    headers = {"Authorization": f"Bearer {peer.me['access_token']}"}
    own = httpx.get(f"{bridge.http.base_url}{path}", params=ask, headers=headers, trust_env=False)
    assert own.status_code == 404  # the bridge does not have this caller's keys
    assert httpx.get(f"{bridge.http.base_url}{path}", params=ask, trust_env=False).status_code == 401
