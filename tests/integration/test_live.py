"""Live events from a real Synapse."""

import asyncio
import contextlib
import random
import re
import secrets
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.live import Listener, feeds
from flowbridge.live.reader import Reader
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database
from flowbridge.store import api_keys as keys
from flowbridge.web import server
from flowbridge.web.server import background
from tests.conftest import MakeRoom
from tests.integration.conftest import store_in
from tests.patience import PATIENCE
from tests.processes import serving
from tests.proxy import Proxy
from tests.sse import listening

API = "/_matrix/client/v3"


class User:
    """Somebody who talks to the homeserver itself."""

    def __init__(self, url: str, account: Account) -> None:
        self.account = account
        self._url = url
        self._headers = {"Authorization": f"Bearer {account.access_token}"}

    def say(self, room_id: str, body: str, type_: str = "m.room.message") -> str:
        """Send an event; its id."""
        path = f"rooms/{quote(room_id, safe='')}/send/{type_}/{secrets.token_hex(8)}"
        return str(self.call("PUT", path, {"msgtype": "m.text", "body": body})["event_id"])

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer = httpx.request(
            method,
            f"{self._url}{API}/{path}",
            json=body or {},
            headers=self._headers,
            trust_env=False,
            timeout=PATIENCE,
        )
        return dict(answer.raise_for_status().json())

    async def say_all(self, room_id: str, bodies: list[str]) -> list[str]:
        """Send messages one after another; their ids."""
        found = []
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE, headers=self._headers) as client:
            for body in bodies:
                path = f"rooms/{quote(room_id, safe='')}/send/m.room.message/{secrets.token_hex(8)}"
                answer = await client.put(f"{self._url}{API}/{path}", json={"msgtype": "m.text", "body": body})
                found.append(str(answer.raise_for_status().json()["event_id"]))
        return found


@pytest.fixture
def bot_user(synapse: LocalSynapse, bot: Account) -> User:
    """Whose token the streams are opened with: another one in each test, with a long poll of its own."""
    return User(synapse.url, bot)


@pytest.fixture
def friend_user(synapse: LocalSynapse, friend: Account) -> User:
    return User(synapse.url, friend)


@pytest.fixture
def new_shared_room(make_room: MakeRoom, bot_user: User, friend_user: User) -> Callable[[], str]:
    """`new_shared_room()`: a room of the friend's that the bot is in; its id."""

    def make() -> str:
        room_id = make_room(friend_user.account, preset="public_chat")
        bot_user.call("POST", f"join/{quote(room_id, safe='')}")
        return room_id

    return make


@pytest.fixture
def shared_room(new_shared_room: Callable[[], str]) -> str:
    return new_shared_room()


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    return lambda url, **more: Settings.load(base_url=url, database_url=store_in(tmp_path), **more)


def live(url: str, room_id: str = "") -> str:
    return f"{url}/rooms/{quote(room_id, safe='')}/live" if room_id else f"{url}/live"


def ask(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False, timeout=PATIENCE)


def figure(url: str, name: str) -> float:
    """One of the bridge's figures."""
    lines = ask(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"flowbridge_{name} "))


def dice(seed: float) -> random.Random:
    return random.Random(seed)  # noqa: S311 - chance, no secret


def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that some events are many: a sync tells 4 of a room, a page holds 5."""
    monkeypatch.setattr(feeds, "Reader", partial(Reader, timeline=4, page=5))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads
            await asyncio.sleep(0.01)


async def test_event_comes_in_todays_form_with_its_room(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str
) -> None:
    async with listening(live(bridge_url, shared_room), bot_user.account.access_token) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        assert stream.response.headers["x-accel-buffering"] == "no"
        event_id = friend_user.say(shared_room, "hello")
        seen = await stream.message()
    keys_ = {"type", "content", "sender", "event_id", "origin_server_ts", "room_id", "unsigned"}
    assert set(seen) == keys_
    assert (seen["event_id"], seen["room_id"]) == (event_id, shared_room)
    assert seen["content"] == {"msgtype": "m.text", "body": "hello"}


async def test_state_events_come_too_and_so_does_a_room_that_is_joined_later(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str, make_room: MakeRoom
) -> None:
    async with listening(live(bridge_url), bot_user.account.access_token) as stream:
        friend_user.call("PUT", f"rooms/{quote(shared_room, safe='')}/state/m.room.topic", {"topic": "tea"})
        seen = await stream.message()
        assert (seen["type"], seen["state_key"], seen["content"]) == ("m.room.topic", "", {"topic": "tea"})
        later = make_room(friend_user.account, preset="public_chat")
        friend_user.say(later, "before the bot came")
        bot_user.call("POST", f"join/{quote(later, safe='')}")
        seen = await stream.message()
        assert (seen["room_id"], seen["type"], seen["content"]["membership"]) == (later, "m.room.member", "join")
        friend_user.say(later, "welcome")
        assert await stream.body() == "welcome"
        bot_user.call("POST", f"rooms/{quote(later, safe='')}/leave")
        seen = await stream.message()
        assert (seen["room_id"], seen["content"]["membership"]) == (later, "leave")
        friend_user.say(later, "behind its back")
        friend_user.say(shared_room, "last")
        assert await stream.body() == "last"


async def test_room_that_was_left_and_joined_again_tells_what_happened_while_one_was_in_it(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str
) -> None:
    token, room_id = bot_user.account.access_token, quote(shared_room, safe="")
    friend_user.say(shared_room, "long ago")
    async with listening(live(bridge_url), token) as stream:
        last_id = await stream.until_id()
    friend_user.say(shared_room, "one")
    bot_user.call("POST", f"rooms/{room_id}/leave")
    friend_user.say(shared_room, "behind its back")
    bot_user.call("POST", f"join/{room_id}")
    friend_user.say(shared_room, "two")
    async with listening(live(bridge_url), token, last_id=last_id) as stream:
        seen = [(await stream.message())["content"] for _ in range(4)]
    assert [content.get("body") or content["membership"] for content in seen] == ["one", "leave", "join", "two"]


async def test_alias_names_the_room(bridge_url: str, bot_user: User, friend_user: User, make_room: MakeRoom) -> None:
    name = secrets.token_hex(4)
    room_id = make_room(friend_user.account, preset="public_chat", room_alias_name=name)
    async with listening(live(bridge_url, f"#{name}:localhost"), bot_user.account.access_token) as stream:
        friend_user.say(room_id, "hello")
        seen = await stream.message()
    assert (seen["room_id"], seen["content"]["body"]) == (room_id, "hello")


async def test_token_of_a_page_is_a_place_to_go_on_from(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str
) -> None:
    """Synapse fails on it as on no other; whoever reads the history has one at hand."""
    page = bot_user.call("GET", f"rooms/{quote(shared_room, safe='')}/messages?dir=b&limit=1")
    assert page["start"].startswith("t")
    friend_user.say(shared_room, "after it")
    position = quote(page["start"], safe="")
    async with listening(live(bridge_url), bot_user.account.access_token, last_id=position) as stream:
        assert await stream.body() == "after it"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, ["friend", "org.example.a", "org.example.b", "bot", "end"]),
        ({"types": "m.room.message"}, ["friend", "bot", "end"]),
        (
            {"types": "org.example.*, m.room.message", "own": "false"},
            ["friend", "org.example.a", "org.example.b", "end"],
        ),
        ({"own": "true", "types": ""}, ["friend", "org.example.a", "org.example.b", "bot", "end"]),
        ({"types": "org.example.b,org.example.end"}, ["org.example.b", "end"]),
    ],
)
async def test_filters_leave_out_what_is_not_wanted(
    bridge_url: str,
    bot_user: User,
    friend_user: User,
    new_shared_room: Callable[[], str],
    choice: dict[str, str],
    expected: list[str],
) -> None:
    room_id, other = new_shared_room(), new_shared_room()
    async with listening(live(bridge_url, room_id), bot_user.account.access_token, **choice) as stream:
        friend_user.say(other, "another room")
        friend_user.say(room_id, "friend")
        for type_ in ("org.example.a", "org.example.b"):
            friend_user.say(room_id, type_, type_)
        bot_user.say(room_id, "bot")
        friend_user.say(room_id, "end", "org.example.end" if "org.example.end" in str(choice) else "m.room.message")
        assert [await stream.body() for _ in expected] == expected


async def test_senders_can_be_left_out(bridge_url: str, bot_user: User, friend_user: User, shared_room: str) -> None:
    choice = {"not_senders": f"@nobody:localhost,{friend_user.account.user_id}"}
    async with listening(live(bridge_url), bot_user.account.access_token, **choice) as stream:
        friend_user.say(shared_room, "noise")
        bot_user.say(shared_room, "news")
        assert await stream.body() == "news"


async def test_two_listeners_share_one_long_poll_which_ends_after_them(
    synapse: LocalSynapse,
    bot_user: User,
    friend_user: User,
    shared_room: str,
    settings_for: Callable[..., Settings],
) -> None:
    token = bot_user.account.access_token
    async with Proxy(synapse.url) as proxy:
        with background(settings_for(proxy.url), timing=Timing(linger_seconds=0.2)) as url:
            async with listening(live(url), token) as one, listening(live(url, shared_room), token) as other:
                for number in range(3):
                    await until(lambda expected=number + 1: proxy.polls == expected)  # type: ignore[misc]
                    friend_user.say(shared_room, str(number))
                    assert (await one.body(), await other.body()) == (str(number), str(number))
                await until(lambda: proxy.polls == 4)
                assert sum("/sync?" in target for target in proxy.targets) == 5, "one more, to learn where things stand"
                assert not any("access_token" in target for target in proxy.targets)
            await until(lambda: figure(url, "live_accounts") == 0)
            assert proxy.polls == 4


async def test_reconnect_goes_on_where_the_stream_broke_off(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str
) -> None:
    url, token = live(bridge_url, shared_room), bot_user.account.access_token
    async with listening(url, token) as stream:
        first = await stream.until_id()
        friend_user.say(shared_room, "one")
        assert await stream.body() == "one"
        last_id = stream.last_id
    for body in ("two", "three"):
        friend_user.say(shared_room, body)
    async with listening(url, token, last_id=last_id) as stream:
        assert [await stream.body() for _ in range(2)] == ["two", "three"]
        friend_user.say(shared_room, "four")
        assert await stream.body() == "four"
    async with listening(url, token, last_event_id=first) as stream:
        assert [await stream.body() for _ in range(4)] == ["one", "two", "three", "four"]


async def test_restart_of_the_bridge_loses_and_repeats_nothing(
    synapse: LocalSynapse, bot_user: User, friend_user: User, shared_room: str, tmp_path: Path
) -> None:
    token = bot_user.account.access_token
    store = store_in(tmp_path)
    log = tmp_path / "log"
    with serving(log=log, BASE_URL=synapse.url, FLOWBRIDGE_DATABASE_URL=store) as (url, process):
        async with listening(live(url), token) as stream:
            friend_user.say(shared_room, "one")
            assert await stream.body() == "one"
            process.terminate()
            assert await stream.next() is None, "the stream ends when the bridge is told to stop"
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
            assert "shutdown exceeded" not in log.read_text(), "it does not hold it up"
        last_id = stream.last_id
    friend_user.say(shared_room, "two")
    with serving(BASE_URL=synapse.url, FLOWBRIDGE_DATABASE_URL=store) as (url, _):
        async with listening(live(url), token, last_id=last_id) as stream:
            friend_user.say(shared_room, "three")
            assert [await stream.body() for _ in range(2)] == ["two", "three"]


async def test_more_than_a_sync_tells_is_read_page_by_page(
    bridge_url: str,
    bot_user: User,
    friend_user: User,
    new_shared_room: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_at_once(monkeypatch)
    chance, rooms = dice(secrets.randbits(32)), [new_shared_room(), new_shared_room()]
    url, token = live(bridge_url), bot_user.account.access_token
    async with listening(url, token) as stream:
        last_id = await stream.until_id()
    bodies = {room_id: [f"{number}" for number in range(25)] for room_id in rooms}
    await asyncio.gather(*(friend_user.say_all(room_id, bodies[room_id]) for room_id in rooms))
    found: dict[str, list[str]] = {room_id: [] for room_id in rooms}
    while sum(map(len, found.values())) < 50:
        async with listening(url, token, last_id=last_id) as stream:
            for _ in range(min(chance.randint(1, 20), 50 - sum(map(len, found.values())))):
                seen = await stream.message()
                found[seen["room_id"]].append(seen["content"]["body"])
            last_id = stream.last_id
    assert found == bodies


async def test_cut_at_random_points_nothing_is_lost_and_nothing_comes_twice(
    synapse: LocalSynapse,
    bot_user: User,
    friend_user: User,
    new_shared_room: Callable[[], str],
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_at_once(monkeypatch)
    seed = secrets.randbits(32)
    chance = dice(seed)
    rooms = [new_shared_room() for _ in range(4)]
    token = bot_user.account.access_token
    found: dict[str, list[str]] = {room_id: [] for room_id in rooms}
    sent: dict[str, list[str]] = {}

    def number_of(events: dict[str, list[str]]) -> int:
        return sum(map(len, events.values()))

    async def talk(room_id: str, chance: random.Random) -> None:
        sent[room_id] = []
        for _ in range(6):
            number = chance.choice((1, 3, 12))
            sent[room_id] += await friend_user.say_all(room_id, ["x"] * number)
            await asyncio.sleep(chance.random() / 2)

    async def read(url: str, last_id: str, seconds: float) -> str:
        """Listen for a while; the last id."""
        async with listening(live(url), token, last_id=last_id) as stream:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    for _ in range(chance.choice((1, 2, 10, 60))):
                        seen = await stream.message()
                        found[seen["room_id"]].append(seen["event_id"])
            return stream.last_id

    with contextlib.ExitStack() as stack:
        url = stack.enter_context(background(settings_for(synapse.url)))
        async with listening(live(url), token) as stream:
            last_id = await stream.until_id()
        talking = asyncio.gather(*(talk(room_id, dice(chance.random())) for room_id in rooms))
        quiet = 0
        while (not talking.done() or number_of(found) < number_of(sent)) and quiet < 20:
            before = number_of(found)
            last_id = await read(url, last_id, chance.random() * min(1 + quiet, 10))
            quiet = quiet + 1 if number_of(found) == before else 0
            if chance.random() < 0.15:
                stack.close()
                url = stack.enter_context(background(settings_for(synapse.url)))
        await talking
        last = friend_user.say(rooms[0], "last")
        async with listening(live(url), token, last_id=last_id) as stream:
            assert (await stream.message())["event_id"] == last, f"seed {seed}"
    for room_id in rooms:
        assert found[room_id] == sent[room_id], f"seed {seed}"


async def test_homeserver_that_is_away_for_a_while_ends_no_stream(
    synapse: LocalSynapse, bot_user: User, friend_user: User, shared_room: str, settings_for: Callable[..., Settings]
) -> None:
    token = bot_user.account.access_token
    async with Proxy(synapse.url) as proxy:
        with background(settings_for(proxy.url)) as url:
            async with listening(live(url), token) as stream:
                friend_user.say(shared_room, "one")
                assert await stream.body() == "one"
                proxy.unplug()
                for body in ("two", "three"):
                    friend_user.say(shared_room, body)
                async with listening(live(url), token, last_id=stream.last_id) as other:
                    await proxy.plug()
                    assert [await stream.body() for _ in range(2)] == ["two", "three"]
                    assert [await other.body() for _ in range(2)] == ["two", "three"]
                friend_user.say(shared_room, "four")
                assert await stream.body() == "four"


async def test_restarted_homeserver_goes_on_telling(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalSynapse() as homeserver, background(settings_for(homeserver.url)) as url:
        user = User(homeserver.url, homeserver.register("bot"))
        room_id = str(user.call("POST", "createRoom")["room_id"])
        async with listening(live(url, room_id), user.account.access_token) as stream:
            user.say(room_id, "one")
            assert await stream.body() == "one"
            await asyncio.to_thread(homeserver.stop)
            await asyncio.to_thread(homeserver.start)
            user.say(room_id, "two")
            assert await stream.body() == "two"


async def test_token_that_is_logged_out_ends_its_streams(
    bridge_url: str, bot_user: User, friend_user: User, shared_room: str
) -> None:
    async with listening(live(bridge_url), bot_user.account.access_token) as stream:
        friend_user.say(shared_room, "one")
        assert await stream.body() == "one"
        bot_user.call("POST", "logout")
        last = await stream.next()
        assert last is not None
        assert (last.event, last.data["errcode"]) == ("error", "M_UNKNOWN_TOKEN")
        assert await stream.next() is None


async def test_slow_listener_is_dropped_and_may_come_again_while_another_goes_on(
    synapse: LocalSynapse,
    bot_user: User,
    friend_user: User,
    shared_room: str,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listen = server.listen

    def narrow(host: str, port: int) -> socket.socket:
        made = listen(host, port)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)  # for its connections, too
        return made

    monkeypatch.setattr(feeds, "Listener", partial(Listener, max_bytes=200_000))
    monkeypatch.setattr(server, "listen", narrow)
    token, number = bot_user.account.access_token, 0
    with background(settings_for(synapse.url)) as url:
        async with listening(live(url), token) as quick:
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                slow.connect((urlsplit(url).hostname, urlsplit(url).port))
                slow.sendall(f"GET /live HTTP/1.1\r\nHost: bridge\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
                seen = b""
                while b"\nid: " not in seen:
                    seen += await asyncio.to_thread(slow.recv, 4_096)
                dropped = figure(url, "live_dropped_total")
                while figure(url, "live_dropped_total") == dropped:
                    friend_user.say(shared_room, f"{number} {'x' * 50_000}")
                    assert (await quick.body()).startswith(f"{number} ")
                    number += 1
                while not seen.endswith(b"0\r\n\r\n"):
                    seen += await asyncio.to_thread(slow.recv, 65_536)
        *_, last = seen.split(b"event: error\ndata: ")
        assert b'"errcode":"M_LIMIT_EXCEEDED"' in last
        last_id = re.findall(rb"^id: (\S+)\n", seen, re.MULTILINE)[-1].decode()
        async with listening(live(url), token, last_id=last_id) as stream:
            for missed in range(seen.count(b'"body":"'), number):
                assert (await stream.body()).startswith(f"{missed} ")


@pytest.mark.parametrize(
    ("path", "headers", "status", "errcode"),
    [
        ("/live", {}, 401, "M_MISSING_TOKEN"),
        ("/live", {"Authorization": "Bearer syt_wrong"}, 401, "M_UNKNOWN_TOKEN"),
        ("/live", {"Last-Event-ID": "s1,"}, 400, "M_INVALID_PARAM"),
        ("/live", {"Last-Event-ID": "no position"}, 400, "M_INVALID_PARAM"),
        ("/live", {"Last-Event-ID": "what"}, 400, "M_INVALID_PARAM"),
        ("/live", {"Last-Event-ID": "s99999999999999999999999"}, 400, "M_INVALID_PARAM"),
        ("/live?last_event_id=%00", {}, 400, "M_INVALID_PARAM"),
        ("/live?own=maybe", {}, 400, "M_INVALID_PARAM"),
        ("/live?types=m.*.x", {}, 400, "M_INVALID_PARAM"),
        ("/rooms/{of_others}/live", {}, 403, "M_FORBIDDEN"),
        ("/rooms/{left}/live", {}, 403, "M_FORBIDDEN"),
        ("/rooms/nothing/live", {}, 400, "M_INVALID_PARAM"),
        ("/rooms/%23nowhere:localhost/live", {}, 404, "M_NOT_FOUND"),
    ],
)
def test_what_cannot_be_listened_to_is_refused(
    bridge_url: str,
    bot_user: User,
    friend_user: User,
    shared_room: str,
    make_room: MakeRoom,
    path: str,
    headers: dict[str, str],
    status: int,
    errcode: str,
) -> None:
    bot_user.call("POST", f"rooms/{quote(shared_room, safe='')}/leave")
    path = path.format(of_others=make_room(friend_user.account), left=shared_room)
    if errcode != "M_MISSING_TOKEN":
        headers = {"Authorization": f"Bearer {bot_user.account.access_token}", **headers}
    answer = ask(f"{bridge_url}{path}", **headers)
    assert (answer.status_code, answer.json()["errcode"]) == (status, errcode), answer.text


async def test_key_listens_to_what_it_is_for_and_no_longer_than_it_lives(
    synapse: LocalSynapse,
    bot_user: User,
    friend_user: User,
    new_shared_room: Callable[[], str],
    settings_for: Callable[..., Settings],
) -> None:
    mine, other = new_shared_room(), new_shared_room()
    settings = settings_for(synapse.url, access_token=bot_user.account.access_token)
    database = Database(settings.database_url.get_secret_value())
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        keys.add(connection, ApiKey("room", rooms=(mine,)), "fb_room")
        keys.add(connection, ApiKey("type", event_types=("m.room.*",)), "fb_type")
        keys.add(connection, ApiKey("none", rooms=("#nowhere:localhost",)), "fb_none")
    name, others = (f"#key{secrets.token_hex(4)}:localhost" for _ in range(2))
    for alias, room_id in ((name, mine), (others, other)):
        friend_user.call("PUT", f"directory/room/{quote(alias, safe='')}", {"room_id": room_id})
    with background(settings) as url:
        async with listening(live(url, name), "fb_room") as by_alias:
            friend_user.say(mine, "by alias")
            assert await by_alias.body() == "by alias"
        refused = {
            (live(url, other), "fb_room"),
            (live(url, others), "fb_room"),
            (live(url, mine), "fb_type"),
            (live(url), "fb_type"),
            (f"{live(url)}?types=m.room.message,m.reaction", "fb_type"),
            (f"{live(url)}?types=m.*", "fb_type"),
        }
        for path, secret in refused:
            answer = ask(path, **{"X-API-Key": secret})
            assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN"), path
        async with (
            listening(live(url), "fb_room") as room,
            listening(live(url), "fb_type", types="m.room.message") as type_,
            listening(live(url), "fb_none") as none,
        ):
            friend_user.say(other, "other", "m.reaction")
            friend_user.say(other, "one")
            friend_user.say(mine, "two")
            assert await room.body() == "two"
            assert [await type_.body() for _ in range(2)] == ["one", "two"]
            with database.engine.begin() as connection:
                keys.revoke(connection, "none")
                keys.revoke(connection, "type")
            for stream in (none, type_):
                async with asyncio.timeout(Timing().key_refresh_seconds + 5):  # a sign of life comes after 15 s
                    last = await stream.next()
                assert last is not None
                assert (last.event, last.data["errcode"]) == ("error", "M_UNKNOWN_TOKEN")
            friend_user.say(mine, "three")
            assert await room.body() == "three"
            assert await type_.next() is None, "nothing is told after the revocation is known"
    database.engine.dispose()
