"""Programs that speak Matrix, with the bridge as their homeserver and a real Synapse behind it."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nio
import pytest
from apprise import Apprise, AppriseAttachment

from flowbridge.cli.demo.synapse import Account
from tests import node
from tests.conftest import MakeAccount
from tests.integration.conftest import Room
from tests.integration.test_media import png
from tests.patience import PATIENCE

JS = Path(__file__).parents[1] / "clients" / "js"


@dataclass(frozen=True)
class Place:
    """A public room with an alias, and somebody who is not in it yet."""

    room: Room
    alias: str
    visitor: Account

    @property
    def name(self) -> str:
        """The visitor's name without the server."""
        return self.visitor.user_id[1:].partition(":")[0]


@pytest.fixture
def place(new_room: Callable[..., Room], make_account: MakeAccount) -> Place:
    visitor = make_account()
    name = f"meeting-{visitor.user_id[1:].partition(':')[0]}"
    return Place(new_room(room_alias_name=name, preset="public_chat"), f"#{name}:localhost", visitor)


# matrix-nio


@asynccontextmanager
async def nio_client(url: str, place: Place) -> AsyncIterator[nio.AsyncClient]:
    client = nio.AsyncClient(url, place.visitor.user_id)
    try:
        answer = await client.login(place.visitor.password)
        assert isinstance(answer, nio.LoginResponse), answer
        yield client
    finally:
        await client.close()


@pytest.mark.parametrize("by", ["id", "alias"])
async def test_nio_joins_talks_and_reads_back(bridge_url: str, place: Place, by: str) -> None:
    async with nio_client(bridge_url, place) as client:
        joined = await client.join(place.room.id if by == "id" else place.alias)
        assert isinstance(joined, nio.JoinResponse), joined
        assert joined.room_id == place.room.id
        for text in ("one", "two"):
            sent = await client.room_send(place.room.id, "m.room.message", {"msgtype": "m.text", "body": text})
            assert isinstance(sent, nio.RoomSendResponse), sent
        synced = await client.sync(timeout=0, full_state=True)
        assert isinstance(synced, nio.SyncResponse), synced
        timeline = synced.rooms.join[place.room.id].timeline.events
        assert [event.body for event in timeline if isinstance(event, nio.RoomMessageText)] == ["one", "two"]
        page = await client.room_messages(place.room.id, synced.next_batch, limit=2)
        assert isinstance(page, nio.RoomMessagesResponse), page
        assert [event.body for event in page.chunk if isinstance(event, nio.RoomMessageText)] == ["two", "one"]
        members = await client.joined_members(place.room.id)
        assert isinstance(members, nio.JoinedMembersResponse), members
        assert {member.user_id for member in members.members} == {place.room.owner.user_id, place.visitor.user_id}


async def test_nio_uploads_and_reads_back(bridge_url: str, place: Place, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(png())
    async with nio_client(bridge_url, place) as client:
        with picture.open("rb") as file:
            uploaded, _ = await client.upload(
                file, content_type="image/png", filename="red.png", filesize=picture.stat().st_size
            )
        assert isinstance(uploaded, nio.UploadResponse), uploaded
        back = await client.download(uploaded.content_uri)
        assert isinstance(back, nio.MemoryDownloadResponse), back
        assert (back.body, back.content_type, back.filename) == (png(), "image/png", "red.png")
        small = await client.thumbnail("localhost", uploaded.content_uri.rpartition("/")[2], 32, 32)
        assert isinstance(small, nio.ThumbnailResponse), small


async def test_nio_waits_in_a_sync_until_something_happens(bridge_url: str, place: Place) -> None:
    async with nio_client(bridge_url, place) as client:
        await client.join(place.room.id)
        first = await client.sync(timeout=0)
        assert isinstance(first, nio.SyncResponse), first
        nothing = await client.sync(timeout=100, since=first.next_batch)
        assert isinstance(nothing, nio.SyncResponse), nothing
        waiting = asyncio.create_task(client.sync(timeout=int(PATIENCE * 1000), since=nothing.next_batch))
        sent = await client.room_send(place.room.id, "m.room.message", {"msgtype": "m.text", "body": "wake up"})
        assert isinstance(sent, nio.RoomSendResponse), sent
        seen = await waiting
        assert isinstance(seen, nio.SyncResponse), seen
        (event,) = seen.rooms.join[place.room.id].timeline.events
        assert isinstance(event, nio.RoomMessageText)
        assert event.body == "wake up"


async def test_nio_is_told_what_is_wrong(bridge_url: str, place: Place) -> None:
    client = nio.AsyncClient(bridge_url, place.visitor.user_id)
    try:
        refused = await client.login("wrong")
        assert isinstance(refused, nio.LoginError), refused
        assert refused.status_code == "M_FORBIDDEN"
    finally:
        await client.close()


# Apprise


def apprise_url(url: str, place: Place, who: str, target: str, version: int) -> str:
    address = url.removeprefix("http://")
    # hsreq: ids of new rooms name no server; cto and rto: seconds, 4 unless named
    options = f"?discovery=no&hsreq=no&image=no&v={version}&cto={PATIENCE}&rto={PATIENCE}"
    secret = f"{place.name}:{place.visitor.password}" if who == "password" else place.visitor.access_token
    return f"matrix://{secret}@{address}/{quote(target, safe='')}{options}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, when it loads its plugins
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("by", ["id", "alias"])
@pytest.mark.parametrize("who", ["password", "token"])
def test_both_messages_of_one_apprise_arrive(bridge_url: str, place: Place, who: str, by: str, version: int) -> None:
    """With a token it uses one txnId for all it ever says: past the bridge, Synapse swallows the second message."""
    target = place.room.id if by == "id" else place.alias
    apprise = Apprise()
    assert apprise.add(apprise_url(bridge_url, place, who, target, version))
    assert apprise.notify(body="first")
    assert apprise.notify(body="second")
    assert place.room.bodies() == ["first", "second"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("who", ["password", "token"])
def test_picture_and_text_of_apprise_arrive(bridge_url: str, place: Place, who: str, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(png())
    apprise = Apprise()
    assert apprise.add(apprise_url(bridge_url, place, who, place.alias, 3))
    assert apprise.notify(body="look", attach=AppriseAttachment(str(picture)))
    image, message = place.room.messages()
    assert (image["content"]["msgtype"], message["content"]["body"]) == ("m.image", "look")
    address = image["content"]["url"].removeprefix("mxc://")
    headers = {"Authorization": f"Bearer {place.room.owner.access_token}"}
    back = place.room.direct.get(f"/_matrix/client/v1/media/download/{address}", headers=headers)
    assert back.content == png()


# matrix-js-sdk


@pytest.fixture(scope="session")
def js_folder() -> Path:
    """Where matrix-js-sdk is installed, as its lock file says, beside the script that uses it."""
    node.installed(JS, "matrix-js-sdk")
    return JS


@pytest.mark.parametrize("by", ["id", "alias"])
def test_js_sdk_joins_talks_uploads_and_reads_back(
    bridge_url: str, place: Place, js_folder: Path, tmp_path: Path, by: str
) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(png())
    environment = {
        "BRIDGE": bridge_url,
        "NAME": place.name,
        "PASSWORD": place.visitor.password,
        "ROOM": place.room.id if by == "id" else place.alias,
        "FILE": str(picture),
    }
    command = [str(node.PROGRAMS / "node"), "conversation.mjs"]
    done = subprocess.run(
        command,
        cwd=js_folder,
        env=node.environment(**environment),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["room"] == place.room.id
    assert seen["arrived"] == ["one", "two", "red.png"]
    assert seen["history"] == ["red.png", "two", "one"]
    assert set(seen["members"]) == {place.room.owner.user_id, place.visitor.user_id}
    assert seen["created_in_version"] == place.room.state("m.room.create")["room_version"]
    assert seen["file_is_the_same"]
    assert seen["file_type"] == "image/png"
    assert (seen["well_known"] or bridge_url).rstrip("/") == bridge_url, "login must lead to the bridge, not round it"
    assert place.room.bodies() == ["one", "two", "red.png"]
