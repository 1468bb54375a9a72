"""What passes through to a real Synapse: sync and long polls, media of any size, old dialects, paths as they come."""

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import KEY, Room, make_key, store_in
from tests.patience import PATIENCE
from tests.processes import serving

V3 = "/_matrix/client/v3"
SIZE = 20_000_000
GROWTH = 5_000_000  # bytes of memory


def png(side: int) -> bytes:
    """A grey square."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = zlib.compress((b"\0" + b"\x80" * side) * side)
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Member:
    """An account of its own, since Synapse remembers the answer to a first sync for two minutes."""

    client: httpx.Client
    room_id: str

    def say(self, body: str) -> str:
        path = f"/rooms/{self.room_id}/send/m.room.message"
        return str(self.client.post(path, json={"msgtype": "m.text", "body": body}).json()["event_id"])

    def heard(self, answer: httpx.Response) -> list[str]:
        """The events of the room that a sync brought."""
        return [event["event_id"] for event in answer.json()["rooms"]["join"][self.room_id]["timeline"]["events"]]

    def settled(self) -> str:
        """Where to go on from when there is no news."""
        since = self.client.get(f"{V3}/sync?timeout=0").json()["next_batch"]
        while (now := self.client.get(f"{V3}/sync?timeout=0&since={since}").json()["next_batch"]) != since:
            since = now
        return str(since)


@pytest.fixture
def member(bridge_url: str, make_account: MakeAccount, make_room: MakeRoom) -> Iterator[Member]:
    account = make_account()
    headers = {"Authorization": f"Bearer {account.access_token}"}
    with httpx.Client(base_url=bridge_url, headers=headers, trust_env=False, timeout=PATIENCE) as client:
        yield Member(client, make_room(account))


def test_sync_begins_and_goes_on(member: Member) -> None:
    first = member.client.get(f"{V3}/sync?timeout=0")
    assert list(first.json()["rooms"]["join"]) == [member.room_id]
    event_id = member.say("new")
    assert member.heard(member.client.get(f"{V3}/sync?timeout=0&since={first.json()['next_batch']}")) == [event_id]


def test_long_poll_is_ended_by_an_event_and_not_before(member: Member) -> None:
    since = member.settled()
    with ThreadPoolExecutor(1) as executor:
        poll = executor.submit(member.client.get, f"{V3}/sync?timeout=30000&since={since}")
        done, _ = wait([poll], timeout=1)
        assert not done, "it waits"
        event_id = member.say("at last")
        assert member.heard(poll.result(PATIENCE)) == [event_id]


def test_long_poll_lasts_as_long_as_it_asked_to(member: Member) -> None:
    since = member.settled()
    began = time.monotonic()
    assert member.client.get(f"{V3}/sync?timeout=1500&since={since}").status_code == 200
    assert time.monotonic() - began > 1.4


def test_large_upload_and_download_are_whole_and_take_no_memory(
    tmp_path: Path, synapse: LocalSynapse, owner: Account
) -> None:
    data = os.urandom(SIZE)
    headers = {"Authorization": f"Bearer {owner.access_token}", "Content-Type": "application/octet-stream"}
    with (
        serving(cwd=tmp_path, BASE_URL=synapse.url) as (url, process),
        httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE) as client,
    ):

        def up(content: bytes) -> str:
            return str(
                client.post("/_matrix/media/v3/upload?filename=a%2Fb.bin", content=content).json()["content_uri"]
            )

        def down(uri: str) -> str:
            digest = hashlib.sha256()
            with client.stream("GET", f"/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}") as answer:
                assert answer.headers["content-length"] == str(SIZE)
                for chunk in answer.iter_raw():
                    digest.update(chunk)
            return digest.hexdigest()

        up(b"x" * 100_000)
        before = rss(process.pid)
        uri = up(data)
        assert rss(process.pid) - before < GROWTH
        assert down(uri) == hashlib.sha256(data).hexdigest()
        assert rss(process.pid) - before < GROWTH


def test_thumbnail_is_made(bridge: httpx.Client) -> None:
    uri = bridge.post("/_matrix/media/r0/upload", content=png(200), headers={"Content-Type": "image/png"}).json()
    path = uri["content_uri"].removeprefix("mxc://")
    answer = bridge.get(f"/_matrix/client/v1/media/thumbnail/{path}?width=32&height=32&method=scale")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("dialect", ["v3", "r0", "api/v1", "unstable"])
@pytest.mark.parametrize("path", ["capabilities", "pushrules/", "account/3pid", "voip/turnServer"])
def test_path_is_served_in_every_dialect(bridge: httpx.Client, dialect: str, path: str) -> None:
    """Synapse has the first and the third not under `api/v1`, nor all of them without their slash."""
    if (dialect, path) == ("unstable", "pushrules/"):
        path = "pushrules/global/"
    answer = bridge.get(f"/_matrix/client/{dialect}/{path}")
    assert answer.status_code == 200, answer.text


def test_encoded_slash_arrives(bridge: httpx.Client, room: Room) -> None:
    alias = f"#a/b-{room.id[1:9]}:localhost"
    path = f"/_matrix/client/api/v1/directory/room/{quote(alias, safe='')}"
    assert bridge.put(path, json={"room_id": room.id}).json() == {}
    assert bridge.get(path).json()["room_id"] == room.id
    assert bridge.request("DELETE", path).json() == {}


def test_blank_value_is_absent_and_a_body_of_a_get_is_ignored(member: Member) -> None:
    answer = member.client.request("GET", f"{V3}/sync?since=&timeout=0&filter=", content=b'{"x":')
    assert list(answer.json()["rooms"]["join"]) == [member.room_id]


def test_token_in_the_query_is_enough(anyone: httpx.Client, owner: Account) -> None:
    answer = anyone.get(f"{V3}/profile/{quote(owner.user_id)}/displayname?access_token={owner.access_token}")
    assert "displayname" in answer.json()
    assert anyone.get(f"{V3}/devices?access_token={owner.access_token}").json()["devices"]
    refused = anyone.get(f"{V3}/devices?access_token=syt_wrong")
    assert (refused.status_code, refused.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert anyone.get(f"{V3}/devices").json()["errcode"] == "M_MISSING_TOKEN"


def test_json_that_makes_synapse_fail_is_a_400(bridge: httpx.Client, owner: Account) -> None:
    path = f"{V3}/user/{quote(owner.user_id)}/account_data/org.example.x"
    answer = bridge.put(path, content=b'{"a":1e400}')
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_NOT_JSON")
    assert bridge.put(path, content=b'{"a":0.25}').status_code == 200
    assert bridge.get(path).json() == {"a": 0.25}


@pytest.mark.parametrize(
    "path", ["/_matrix/nothing", f"{V3}/nothing", "/_matrix/client/v9/rooms/x", "/_matrix/media/x"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_path_that_nobody_knows_is_a_404(bridge: httpx.Client, method: str, path: str) -> None:
    answer = bridge.request(method, path)
    assert (answer.status_code, answer.json()["errcode"]) == (404, "M_UNRECOGNIZED")


def test_each_cors_header_is_there_once(anyone: httpx.Client) -> None:
    answer = anyone.get(f"{V3}/login", headers={"Origin": "https://app.example"})
    names = ["origin", "methods", "headers"]
    assert [len(answer.headers.get_list(f"access-control-allow-{name}")) for name in names] == [1, 1, 1]


def test_key_for_everything_asks_as_the_bot(anyone: httpx.Client, owner: Account) -> None:
    answer = anyone.get(f"{V3}/devices", headers={"X-API-Key": KEY})
    assert {device["user_id"] for device in answer.json()["devices"]} == {owner.user_id}


@pytest.mark.parametrize(
    ("key", "status"),
    [
        pytest.param(ApiKey("k"), 403, id="no-admin"),
        pytest.param(ApiKey("k", rooms=("!a:localhost",), admin=True), 403, id="admin-of-a-room"),
        pytest.param(ApiKey("k", event_types=("m.room.*",), admin=True), 403, id="admin-of-some-types"),
        pytest.param(ApiKey("k", admin=True), 200, id="admin"),
    ],
)
def test_only_a_key_for_everything_passes(
    synapse: LocalSynapse, owner: Account, tmp_path: Path, key: ApiKey, status: int
) -> None:
    headers = {"X-API-Key": make_key(tmp_path, key)}
    settings = Settings.load(base_url=synapse.url, access_token=owner.access_token, database_url=store_in(tmp_path))
    with background(settings) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for path in (f"{V3}/devices", f"{V3}/pushrules/", "/_matrix/media/v3/config"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == status, answer.text
            if status == 403:
                assert answer.json()["errcode"] == "M_FORBIDDEN"
                assert "admin" in answer.json()["error"]


@pytest.mark.parametrize("version", ["v3", "r0", "v1"])
def test_key_for_one_room_uploads_as_matrix_clients_do(
    synapse: LocalSynapse, owner: Account, room: Room, tmp_path: Path, version: str
) -> None:
    """As by `POST /media`: a picture of Apprise or n8n goes there before the message that shows it."""
    key = ApiKey("k", rooms=(room.id,), event_types=("m.room.message",))
    headers = {"X-API-Key": make_key(tmp_path, key), "Content-Type": "image/png"}
    settings = Settings.load(base_url=synapse.url, access_token=owner.access_token, database_url=store_in(tmp_path))
    path = f"/_matrix/media/{version}/upload"
    with background(settings) as url, httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        found = client.post(path, params={"filename": "a.png"}, content=b"png").raise_for_status().json()
        assert found["content_uri"].startswith("mxc://")
        assert client.post(path, params={"user_id": "@other:localhost"}, content=b"png").status_code == 403
        elsewhere = ("PUT", f"{path}/localhost/abc"), ("POST", f"{path}/"), ("GET", path)
        for method, other in elsewhere:
            answer = client.request(method, other, content=b"" if method == "GET" else b"png")
            assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN"), (method, other)
