"""Reading from a real Synapse: as it is, and with the old endpoints refused as newer homeservers refuse them."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.services import history
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import KEY, make_key, store_in
from tests.patience import PATIENCE

OLD = "/_matrix/client/api/v1"
NEW = "/_matrix/client/v3"
PREFIXES = ["", *(f"/_matrix/client/{name}" for name in ("api/v1", "r0", "v3", "unstable"))]
DIALECTS = ["api/v1", "r0", "v3", "unstable"]


class Refusing(BaseHTTPRequestHandler):
    """A proxy that knows nothing of the old endpoints."""

    upstream: httpx.Client
    refused: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith(("/initialSync", "/events")):
            self.refused.append(path)
            body = json.dumps({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}).encode()
            self._answer(404, body)
            return
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name: value for name, value in self.headers.items() if name.lower() == "authorization"}
        answer = self.upstream.request(self.command, self.path, content=self.rfile.read(length), headers=headers)
        self._answer(answer.status_code, answer.content)

    do_PUT = do_POST = do_GET  # noqa: N815 (the names that the base class asks for)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the bridge gave a long poll up
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        pass


@contextlib.contextmanager
def refusing(url: str) -> Iterator[tuple[str, list[str]]]:
    """The proxy's URL, and the paths that it has refused."""
    refused: list[str] = []
    with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as upstream:
        handler = type("Handler", (Refusing,), {"upstream": upstream, "refused": refused})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", refused
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@contextlib.contextmanager
def bridge_to(url: str, owner: Account, folder: Path) -> Iterator[str]:
    settings = Settings.load(
        base_url=url, access_token=owner.access_token, api_keys=[KEY], database_url=store_in(folder)
    )
    with background(settings) as found:
        yield found


@dataclass(frozen=True)
class User:
    """Somebody who acts past the bridge, and reads through it."""

    id: str
    token: str
    direct: httpx.Client
    bridge: httpx.Client

    def ask(self, path: str, **query: Any) -> httpx.Response:
        """Through the bridge."""
        return self.bridge.get(path, params=query, headers=self._headers)

    def read(self, path: str, **query: Any) -> Any:
        answer = self.ask(path, **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def homeserver(self, path: str, **query: Any) -> Any:
        """What the homeserver itself says."""
        answer = self.direct.get(f"{NEW}{path}", params=query, headers=self._headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def do(self, method: str, path: str, **body: Any) -> Any:
        answer = self.direct.request(method, f"{NEW}{path}", json=body, headers=self._headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def say(self, room: str, *bodies: str) -> None:
        for body in bodies:
            self.do("POST", f"{at(room)}/send/m.room.message", msgtype="m.text", body=body)

    def new_room(self, **body: Any) -> str:
        """The id of a room that is made with this createRoom body."""
        return str(self.do("POST", "/createRoom", **body)["room_id"])

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def at(room: str) -> str:
    return f"/rooms/{quote(room, safe='')}"


def bodies(events: list[dict[str, Any]]) -> list[str]:
    return [event["content"]["body"] for event in events if event["type"] == "m.room.message"]


def ids(events: list[dict[str, Any]]) -> set[str]:
    return {event["event_id"] for event in events}


def assert_refused(answer: httpx.Response, status: int, errcode: str) -> None:
    assert (answer.status_code, answer.json()["errcode"]) == (status, errcode), answer.text


def assert_old(event: dict[str, Any]) -> None:
    """It has the guide's fields beside today's."""
    assert event["ts"] == event["origin_server_ts"]
    assert event["user_id"] == event["sender"]
    assert event["age"] == event["unsigned"]["age"]
    assert event["room_id"]
    if event["type"] == "m.room.member":
        assert event["membership"] == event["content"]["membership"]


NewUser = Callable[[], User]
Kitchen = tuple[User, str]


@pytest.fixture(scope="module")
def served(synapse: LocalSynapse, owner: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bridge."""
    with bridge_to(synapse.url, owner, tmp_path_factory.mktemp("reading")) as url:
        yield url


@pytest.fixture(scope="module")
def user(served: str, synapse: LocalSynapse, make_account: MakeAccount) -> Iterator[NewUser]:
    """`user()`: somebody new."""
    with (
        httpx.Client(base_url=synapse.url, trust_env=False, timeout=PATIENCE) as direct,
        httpx.Client(base_url=served, trust_env=False, timeout=PATIENCE) as bridge,
    ):

        def make() -> User:
            account = make_account()
            return User(account.user_id, account.access_token, direct, bridge)

        yield make


@pytest.fixture
def alice(user: NewUser) -> User:
    return user()


@pytest.fixture
def bob(user: NewUser) -> User:
    return user()


@pytest.fixture
def room(alice: User) -> str:
    """Alice's only one."""
    room = alice.new_room(name="Kitchen", preset="public_chat")
    alice.say(room, "m1", "m2", "m3")
    return room


@pytest.fixture(scope="module")
def kitchen(user: NewUser) -> Kitchen:
    """Carol, and a room of hers with the messages m0 to m19: only to be read."""
    carol = user()
    room = carol.new_room(name="Kitchen")
    carol.say(room, *(f"m{number}" for number in range(20)))
    return carol, room


@pytest.fixture(scope="module")
def shared(user: NewUser) -> Kitchen:
    """Dora, and a room of hers that somebody else is invited to: only to be read."""
    dora, guest = user(), user()
    return dora, dora.new_room(invite=[guest.id])


@pytest.fixture(scope="module")
def refused(
    synapse: LocalSynapse, owner: Account, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, list[str]]]:
    with (
        refusing(synapse.url) as (url, refused),
        bridge_to(url, owner, tmp_path_factory.mktemp("refusing")) as served,
        httpx.Client(base_url=served, trust_env=False, timeout=PATIENCE) as bridge,
    ):
        assert httpx.get(f"{url}{OLD}/initialSync", trust_env=False).status_code == 404
        refused.clear()
        yield bridge, refused


@pytest.fixture(scope="module")
def eve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """On a homeserver that has both."""
    config = {"presence": {"enabled": True}, "room_list_publication_rules": [{"action": "allow"}]}
    with LocalSynapse(config=config) as synapse:
        account = synapse.register("eve")
        with (
            bridge_to(synapse.url, account, tmp_path_factory.mktemp("presence")) as served,
            httpx.Client(base_url=synapse.url, trust_env=False, timeout=PATIENCE) as direct,
            httpx.Client(base_url=served, trust_env=False, timeout=PATIENCE) as bridge,
        ):
            yield User(account.user_id, account.access_token, direct, bridge)


class TestInitialSync:
    @pytest.mark.parametrize("path", ["/initialSync", *(f"/_matrix/client/{name}/initialSync" for name in DIALECTS)])
    def test_shape_is_the_guides(self, kitchen: Kitchen, path: str) -> None:
        carol, room = kitchen
        found = carol.read(path)
        assert {"end", "presence", "rooms", "receipts", "account_data"} == found.keys()
        (only,) = found["rooms"]
        assert (only["room_id"], only["membership"], only["visibility"]) == (room, "join", "private")
        messages = only["messages"]
        assert bodies(messages["chunk"]) == [f"m{number}" for number in range(10, 20)], "ten, the oldest first"
        assert messages["end"] == found["end"] != messages["start"]
        for event in messages["chunk"] + only["state"]:
            assert_old(event)

    @pytest.mark.parametrize("limit", [0, 1, 1000])
    def test_limit_bounds_the_messages_and_the_state_is_whole(self, alice: User, room: str, limit: int) -> None:
        alice.do("PUT", f"{at(room)}/state/m.room.topic/", topic="news")
        (only,) = alice.read(f"{OLD}/initialSync", limit=limit)["rooms"]
        everything = alice.homeserver(f"{at(room)}/messages", dir="b", limit=100)["chunk"]
        heard = [event["event_id"] for event in only["messages"]["chunk"]]
        assert heard == [event["event_id"] for event in everything[:limit]][::-1]
        assert ids(only["state"]) == ids(alice.homeserver(f"{at(room)}/state"))

    def test_history_goes_on_where_the_chunk_begins(self, kitchen: Kitchen) -> None:
        carol, room = kitchen
        (only,) = carol.read(f"{OLD}/initialSync", limit=5)["rooms"]
        before = carol.read(f"{OLD}{at(room)}/messages", **{"from": only["messages"]["start"], "limit": 3})
        assert bodies(only["messages"]["chunk"][:1] + before["chunk"]) == ["m15", "m14", "m13", "m12"]

    def test_end_is_a_token_for_events_messages_and_sync(self, alice: User, room: str) -> None:
        end = alice.read(f"{OLD}/initialSync", limit=1)["end"]
        alice.say(room, "later")
        assert bodies(alice.read(f"{OLD}/events", **{"from": end})["chunk"]) == ["later"]
        assert bodies(alice.read(f"{OLD}{at(room)}/messages", **{"from": end, "dir": "f"})["chunk"]) == ["later"]
        synced = alice.homeserver("/sync", since=end)["rooms"]["join"][room]["timeline"]["events"]
        assert bodies(synced) == ["later"]

    def test_invited_room_has_its_inviter_and_the_invitation(self, alice: User, bob: User, room: str) -> None:
        alice.do("POST", f"{at(room)}/invite", user_id=bob.id)
        (only,) = bob.read(f"{OLD}/initialSync")["rooms"]
        assert (only["room_id"], only["membership"], only["inviter"]) == (room, "invite", alice.id)
        invite = only["invite"]
        assert (invite["type"], invite["state_key"], invite["membership"]) == ("m.room.member", bob.id, "invite")
        assert (invite["user_id"], invite["room_id"]) == (alice.id, room)
        assert {"name": "Kitchen"} in [event["content"] for event in invite["invite_room_state"]]
        assert only == {**bob.read(f"{OLD}{at(room)}/initialSync"), "invite": invite}

    def test_left_room_is_there_when_asked_for(self, alice: User, room: str) -> None:
        alice.do("POST", f"{at(room)}/leave")
        assert alice.read(f"{OLD}/initialSync")["rooms"] == []
        (only,) = alice.read(f"{OLD}/initialSync", archived="true")["rooms"]
        assert (only["room_id"], only["membership"]) == (room, "leave")

    def test_receipts_and_account_data_are_there(self, alice: User, room: str) -> None:
        (event,) = alice.homeserver(f"{at(room)}/messages", dir="b", limit=1)["chunk"]
        alice.do("POST", f"{at(room)}/receipt/m.read/{quote(event['event_id'], safe='')}")
        alice.do("PUT", f"/user/{alice.id}/rooms/{quote(room, safe='')}/tags/u.work", order=0.5)
        alice.do("PUT", f"/user/{alice.id}/account_data/org.example.mine", a=1)
        found = alice.read(f"{OLD}/initialSync")
        assert {"type": "org.example.mine", "content": {"a": 1}} in found["account_data"]
        for answer in (found, alice.read(f"{OLD}{at(room)}/initialSync")):
            assert [(r["type"], r["room_id"]) for r in answer["receipts"]] == [("m.receipt", room)]
        assert [each["type"] for each in found["rooms"][0]["account_data"]] == ["m.tag"]

    @pytest.mark.parametrize(
        "query", [{"limit": "x"}, {"limit": "-1"}, {"limit": "1.5"}, {"archived": "maybe"}], ids=str
    )
    def test_wrong_parameter_is_a_400(self, kitchen: Kitchen, query: dict[str, str]) -> None:
        assert_refused(kitchen[0].ask(f"{OLD}/initialSync", **query), 400, "M_INVALID_PARAM")

    def test_blank_limit_counts_as_absent(self, kitchen: Kitchen) -> None:
        (only,) = kitchen[0].read(f"{OLD}/initialSync", limit="")["rooms"]
        assert len(only["messages"]["chunk"]) == 10


class TestRoomInitialSync:
    @pytest.mark.parametrize("surface", ["", OLD])
    @pytest.mark.parametrize("version", ["10", "12"])
    def test_is_one_room(self, alice: User, room: str, version: str, surface: str) -> None:
        other = alice.new_room(room_version=version)
        alice.say(other, "1", "2")
        found = alice.read(f"{surface}{at(other)}/initialSync", limit=2)
        assert (found["room_id"], found["membership"], found["visibility"]) == (other, "join", "private")
        assert bodies(found["messages"]["chunk"]) == ["1", "2"]
        assert ids(found["state"]) == ids(alice.homeserver(f"{at(other)}/state"))
        assert (found["presence"], found["receipts"], found["account_data"]) == ([], [], [])
        for event in found["messages"]["chunk"] + found["state"]:
            assert_old(event)
        alice.say(other, "3")
        later = alice.read("/events", **{"from": found["messages"]["end"]})["chunk"]
        earlier = alice.read(f"{at(other)}/messages", limit=1, **{"from": found["messages"]["start"]})["chunk"]
        assert bodies(later) == ["3"]
        assert earlier[0]["type"].startswith("m.room.")

    def test_left_room_ends_where_it_was_left(self, alice: User, bob: User, room: str) -> None:
        bob.do("POST", f"/join/{quote(room, safe='')}")
        bob.do("POST", f"{at(room)}/leave")
        alice.say(room, "behind its back")
        found = bob.read(f"{OLD}{at(room)}/initialSync", limit=3)
        assert found["membership"] == "leave"
        assert [event.get("membership") for event in found["messages"]["chunk"]] == [None, "join", "leave"]

    def test_room_that_everybody_may_read(self, alice: User, bob: User, room: str) -> None:
        alice.do("PUT", f"{at(room)}/state/m.room.history_visibility/", history_visibility="world_readable")
        alice.say(room, "to all the world")
        found = bob.read(f"{OLD}{at(room)}/initialSync", limit=1)
        assert "membership" not in found
        assert bodies(found["messages"]["chunk"]) == ["to all the world"]
        assert ids(found["state"]) == ids(alice.homeserver(f"{at(room)}/state"))
        assert_old(found["state"][0])


class TestEvents:
    @pytest.mark.parametrize("path", ["/events", *(f"/_matrix/client/{name}/events" for name in DIALECTS)])
    def test_timeout_of_0_does_not_wait(self, kitchen: Kitchen, path: str) -> None:
        carol, _ = kitchen
        found = carol.read(path, timeout=0)
        assert found == {"chunk": [], "start": found["start"], "end": found["end"]}
        assert carol.read(path, timeout=0, **{"from": found["end"]})["chunk"] == []

    def test_waiting_ends_with_the_event(self, alice: User, bob: User, room: str) -> None:
        bob.do("POST", f"/join/{quote(room, safe='')}")
        end = alice.read("/initialSync", limit=1)["end"]
        with ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(alice.read, f"{OLD}/events", **{"from": end})
            bob.say(room, "hello")
            found = waiting.result(PATIENCE)
        (event,) = found["chunk"]
        assert bodies([event]) == ["hello"]
        assert_old(event)
        assert found["start"] == end != found["end"]
        assert event["user_id"] == bob.id

    def test_waiting_ends_when_the_time_is_up(self, kitchen: Kitchen) -> None:
        found = kitchen[0].ask("/events", timeout=300)
        assert 0.3 <= found.elapsed.total_seconds() < 30, "which it waits unless told otherwise"
        assert found.json()["chunk"] == []

    def test_two_rooms_come_in_order_without_gap_or_repeat(self, alice: User) -> None:
        rooms = [alice.new_room(), alice.new_room()]
        end = alice.read(f"{OLD}/initialSync")["end"]
        heard: list[str] = []
        for part in range(3):
            for number in range(4):
                alice.say(rooms[number % 2], f"{part}.{number}")
            found = alice.read(f"{OLD}/events", timeout=5000, **{"from": end})
            assert found["start"] == end
            heard += bodies(found["chunk"])
            end = found["end"]
        assert heard == [f"{part}.{number}" for part in range(3) for number in range(4)]
        assert alice.read(f"{OLD}/events", timeout=0, **{"from": end})["chunk"] == []

    def test_same_token_gives_the_same_events_again(self, alice: User, room: str) -> None:
        end = alice.read(f"{OLD}/initialSync")["end"]
        alice.say(room, "a", "b")
        first, second = (alice.read(f"{OLD}/events", **{"from": end}) for _ in range(2))
        assert bodies(first["chunk"]) == bodies(second["chunk"]) == ["a", "b"]

    def test_long_absence_leaves_no_gap(self, alice: User, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "MAX_TIMELINE", 3)
        monkeypatch.setattr(history, "PAGE", 5)
        end = alice.read(f"{OLD}/initialSync")["end"]
        said = [f"n{number}" for number in range(13)]
        alice.say(room, *said)
        found = alice.read(f"{OLD}/events", **{"from": end})
        assert bodies(found["chunk"]) == said
        assert alice.read(f"{OLD}/events", timeout=0, **{"from": found["end"]})["chunk"] == []

    def test_too_long_an_absence_is_a_400(self, alice: User, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "MAX_TIMELINE", 1)
        monkeypatch.setattr(history, "MAX_MISSED", 2)
        end = alice.read(f"{OLD}/initialSync")["end"]
        alice.say(room, "a", "b", "c")
        answer = alice.ask(f"{OLD}/events", **{"from": end})
        assert_refused(answer, 400, "M_INVALID_PARAM")
        assert "initialSync" in answer.json()["error"]

    def test_room_just_joined_begins_where_the_token_was(self, alice: User, bob: User, room: str) -> None:
        end = bob.read(f"{OLD}/events", timeout=0)["end"]
        alice.do("POST", f"{at(room)}/invite", user_id=bob.id)
        invited = bob.read(f"{OLD}/events", **{"from": end})
        (invite,) = invited["chunk"]
        assert (invite["room_id"], invite["membership"], invite["state_key"]) == (room, "invite", bob.id)
        bob.do("POST", f"{at(room)}/join")
        alice.say(room, "welcome")
        found = bob.read(f"{OLD}/events", **{"from": invited["end"]})
        assert [event.get("membership") or event["content"]["body"] for event in found["chunk"]] == ["join", "welcome"]

    def test_leaving_is_an_event(self, alice: User, room: str) -> None:
        end = alice.read(f"{OLD}/initialSync")["end"]
        alice.do("POST", f"{at(room)}/leave")
        (event,) = alice.read(f"{OLD}/events", **{"from": end})["chunk"]
        assert (event["membership"], event["room_id"]) == ("leave", room)

    def test_one_room_alone(self, alice: User) -> None:
        wanted, other = alice.new_room(), alice.new_room()
        end = alice.read(f"{OLD}/initialSync")["end"]
        alice.say(other, "not this")
        alice.say(wanted, "this")
        assert bodies(alice.read(f"{OLD}/events", room_id=wanted, **{"from": end})["chunk"]) == ["this"]

    def test_typing_tags_and_receipts_are_events(self, alice: User, room: str) -> None:
        end = alice.read(f"{OLD}/initialSync")["end"]
        alice.do("PUT", f"{at(room)}/typing/{alice.id}", typing=True, timeout=30_000)
        alice.do("PUT", f"/user/{alice.id}/rooms/{quote(room, safe='')}/tags/u.work", order=0.5)
        found = alice.read(f"{OLD}/events", **{"from": end})["chunk"]
        assert {(event["type"], event["room_id"]) for event in found} == {("m.typing", room), ("m.tag", room)}

    @pytest.mark.parametrize(
        "query",
        [
            {"timeout": "x"},
            {"timeout": "-1"},
            {"from": "no-token"},
            {"from": "s1\0"},
            {"from": "€"},
            {"room_id": "room"},
        ],
        ids=str,
    )
    def test_wrong_parameter_is_a_400(self, kitchen: Kitchen, query: dict[str, str]) -> None:
        assert_refused(kitchen[0].ask(f"{OLD}/events", **{"timeout": "0", **query}), 400, "M_INVALID_PARAM")

    def test_token_of_a_page_is_a_place_in_the_stream(self, kitchen: Kitchen) -> None:
        carol, _ = kitchen
        (only,) = carol.read(f"{OLD}/initialSync", limit=2)["rooms"]
        found = carol.read(f"{OLD}/events", timeout=0, **{"from": only["messages"]["start"]})["chunk"]
        assert bodies(found) == ["m18", "m19"]

    def test_without_a_token_it_begins_now(self, alice: User, room: str) -> None:
        for body in ("a", "b"):
            alice.say(room, body)
            assert alice.read(f"{OLD}/events", timeout=0)["chunk"] == []

    def test_empty_answer_does_not_come_again_once_there_is_something(self, alice: User, room: str) -> None:
        found = alice.read(f"{OLD}/initialSync")
        assert alice.read(f"{OLD}/events", timeout=0, **{"from": found["end"]})["chunk"] == []
        alice.say(room, "news")
        assert bodies(alice.read(f"{OLD}/events", timeout=0, **{"from": found["end"]})["chunk"]) == ["news"]
        again = alice.read(f"{OLD}/initialSync")
        assert bodies(again["rooms"][0]["messages"]["chunk"])[-1] == "news"

    @pytest.mark.parametrize("path", ["/events", "/initialSync", "/rooms/%21x:localhost/members"])
    def test_wrong_token_is_the_homeservers_401(self, served: str, path: str) -> None:
        answer = httpx.get(f"{served}{OLD}{path}", params={"access_token": "syt_wrong"}, trust_env=False)
        assert_refused(answer, 401, "M_UNKNOWN_TOKEN")
        assert_refused(httpx.get(f"{served}{OLD}{path}", trust_env=False), 401, "M_MISSING_TOKEN")

    def test_room_of_others_is_a_403(self, bob: User, kitchen: Kitchen) -> None:
        assert_refused(bob.ask(f"{OLD}/events", room_id=kitchen[1]), 403, "M_FORBIDDEN")


class TestPages:
    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_members(self, shared: Kitchen, prefix: str) -> None:
        dora, room = shared
        path = f"{prefix}{at(room)}/members"
        (joined,) = dora.read(path, membership="join")["chunk"]
        assert joined["state_key"] == dora.id
        (invited,) = dora.read(path, not_membership="join")["chunk"]
        assert invited["content"]["membership"] == "invite"
        everybody = dora.read(path, membership="")["chunk"]
        assert ids(everybody) == ids([joined, invited])
        if prefix.endswith("api/v1"):
            assert_old(joined)

    def test_members_at_a_token(self, alice: User, bob: User, room: str) -> None:
        end = alice.read("/initialSync")["end"]
        alice.do("POST", f"{at(room)}/invite", user_id=bob.id)
        assert len(alice.read(f"{OLD}{at(room)}/members", at=end)["chunk"]) == 1
        assert len(alice.read(f"{OLD}{at(room)}/members", at="")["chunk"]) == 2
        assert_refused(alice.ask(f"{OLD}{at(room)}/members", at="no-token"), 400, "M_INVALID_PARAM")

    @pytest.mark.parametrize("name", DIALECTS)
    def test_joined_members(self, kitchen: Kitchen, name: str) -> None:
        carol, room = kitchen
        assert carol.read(f"/_matrix/client/{name}{at(room)}/joined_members")["joined"].keys() == {carol.id}

    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_state(self, kitchen: Kitchen, prefix: str) -> None:
        carol, room = kitchen
        found = carol.read(f"{prefix}{at(room)}/state")
        assert ids(found) == ids(carol.homeserver(f"{at(room)}/state"))
        if prefix.endswith("api/v1"):
            for event in found:
                assert_old(event)

    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("query", [{}, {"from": "END", "dir": "b"}, {"from": "", "dir": "", "limit": ""}], ids=str)
    def test_messages_of_an_old_client_are_the_newest(
        self, kitchen: Kitchen, prefix: str, query: dict[str, str]
    ) -> None:
        carol, room = kitchen
        found = carol.read(f"{prefix}{at(room)}/messages", **query)
        assert bodies(found["chunk"]) == [f"m{number}" for number in range(19, 9, -1)]
        assert found["start"] != found["end"]
        if prefix.endswith("api/v1"):
            for event in found["chunk"]:
                assert_old(event)

    @pytest.mark.parametrize(("dir_", "name"), [("b", "api/v1"), ("f", "api/v1"), ("b", "v3"), ("f", "v3")])
    def test_every_page_with_events_has_an_end(self, kitchen: Kitchen, dir_: str, name: str) -> None:
        carol, room = kitchen
        path = f"/_matrix/client/{name}{at(room)}/messages"
        page = carol.read(path, dir=dir_, limit=7)
        heard = bodies(page["chunk"])
        while page["chunk"]:
            page = carol.read(path, dir=dir_, limit=7, **{"from": page["end"]})
            heard += bodies(page["chunk"])
        assert heard == [f"m{number}" for number in (range(20) if dir_ == "f" else range(19, -1, -1))]
        assert ("end" in page) is (name == "api/v1"), "who is old reads it always"

    def test_messages_up_to_a_token_and_by_filter(self, alice: User, room: str) -> None:
        end = alice.read("/initialSync")["end"]
        alice.say(room, "x")
        alice.do("PUT", f"{at(room)}/state/m.room.topic/", topic="news")
        assert len(alice.read(f"{at(room)}/messages", to=end)["chunk"]) == 2
        found = alice.read(f"{at(room)}/messages", filter='{"types": ["m.room.topic"]}')["chunk"]
        assert [event["content"] for event in found] == [{"topic": "news"}]
        assert alice.read(f"{at(room)}/messages", limit=0)["chunk"] == []

    @pytest.mark.parametrize(
        "query",
        [
            {"limit": "x"},
            {"limit": "-1"},
            {"dir": "up"},
            {"from": "no-token"},
            {"to": "no-token"},
            {"filter": "x"},
            {"filter": '{"limit": 1e400}'},
            {"filter": "[]"},
            {"filter": '{"types": [5]}'},
            {"from": "t99999999999999999999-1_0"},
        ],
        ids=str,
    )
    def test_wrong_parameter_is_a_400(self, kitchen: Kitchen, query: dict[str, str]) -> None:
        carol, room = kitchen
        assert_refused(carol.ask(f"{OLD}{at(room)}/messages", **query), 400, "M_INVALID_PARAM")

    @pytest.mark.parametrize("what", ["members", "joined_members", "messages", "state", "initialSync"])
    def test_room_of_others_is_the_homeservers_403(self, shared: Kitchen, kitchen: Kitchen, what: str) -> None:
        assert_refused(shared[0].ask(f"{OLD}{at(kitchen[1])}/{what}"), 403, "M_FORBIDDEN")

    @pytest.mark.parametrize("what", ["members", "joined_members", "messages", "state", "initialSync"])
    def test_unknown_room_is_the_homeservers_word(self, kitchen: Kitchen, what: str) -> None:
        answer = kitchen[0].ask(f"{OLD}/rooms/%21nowhere:localhost/{what}")
        assert (answer.status_code, answer.json()["errcode"]) in ((403, "M_FORBIDDEN"), (404, "M_NOT_FOUND"))

    @pytest.mark.parametrize("what", ["members", "state/m.room.create"])
    def test_alias_is_looked_up_and_not_joined(self, alice: User, bob: User, what: str) -> None:
        name = f"read-{what[:3]}-{alice.id[1:].partition(':')[0]}"
        room = alice.new_room(room_alias_name=name, preset="public_chat")
        path = f"{OLD}/rooms/%23{name}:localhost/{what}"
        assert alice.read(path)
        assert_refused(bob.ask(path), 403, "M_FORBIDDEN")
        assert alice.homeserver(f"{at(room)}/joined_members")["joined"].keys() == {alice.id}
        assert_refused(bob.ask(f"{OLD}/rooms/%23nowhere:localhost/{what}"), 404, "M_NOT_FOUND")

    @pytest.mark.parametrize("version", ["10", "12"])
    def test_room_id_with_and_without_a_domain(self, alice: User, version: str) -> None:
        room = alice.new_room(room_version=version)
        assert (":" in room) is (version == "10")
        for path in (at(room), f"/rooms/{room}"):
            assert len(alice.read(f"{path}/members")["chunk"]) == 1


class TestKey:
    """The bridge's own account reads."""

    @pytest.mark.parametrize("path", ["/initialSync", "/events?timeout=0", f"{OLD}/initialSync?limit=1"])
    def test_reads_all_rooms(self, served: str, path: str) -> None:
        answer = httpx.get(f"{served}{path}", headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text

    def test_reads_a_room(self, served: str, owner: Account, make_room: MakeRoom) -> None:
        room = make_room(owner)
        for what in ("members", "messages", "state"):
            answer = httpx.get(f"{served}{at(room)}/{what}", headers={"X-API-Key": KEY}, trust_env=False)
            assert answer.status_code == 200, answer.text


class TestWithoutTheOldEndpoints:
    """A homeserver that answers them as one that never had them: the same, and it is not asked twice."""

    @pytest.fixture
    def twice(self, alice: User, refused: tuple[httpx.Client, list[str]]) -> Iterator[tuple[User, User]]:
        """Alice in front of the whole homeserver, and of the other."""
        yield alice, replace(alice, bridge=refused[0])
        assert refused[1] == []

    def test_all_state_is_the_same(self, twice: tuple[User, User], room: str) -> None:
        found = [alice.read(f"{OLD}/initialSync") for alice in twice]
        found += [{"rooms": [alice.read(f"{OLD}{at(room)}/initialSync")]} for alice in twice]
        for answer in found:
            (only,) = answer["rooms"]
            assert bodies(only["messages"]["chunk"]) == ["m1", "m2", "m3"]
            assert ids(only["state"]) == ids(twice[0].homeserver(f"{at(room)}/state"))
        assert found[0].keys() == found[1].keys()
        assert found[2]["rooms"][0].keys() == found[3]["rooms"][0].keys()

    def test_events_go_on_from_one_to_the_other(self, twice: tuple[User, User], room: str) -> None:
        heard: list[str] = []
        end = twice[0].read(f"{OLD}/initialSync", limit=1)["end"]
        for number in range(4):
            alice = twice[number % 2]
            with ThreadPoolExecutor(1) as executor:
                waiting = executor.submit(alice.read, f"{OLD}/events", **{"from": end})
                alice.say(room, f"n{number}")
                found = waiting.result(PATIENCE)
            heard += bodies(found["chunk"])
            end = found["end"]
        assert heard == ["n0", "n1", "n2", "n3"]


class TestRooms:
    def test_are_listed_by_name_with_their_aliases(self, alice: User, bob: User) -> None:
        name = f"list-{alice.id[1:].partition(':')[0]}"
        plain = alice.new_room()
        named = alice.new_room(name="zebra")
        alice.do("PUT", f"{at(named)}/state/m.room.name", name="Zebra")  # the newest event is a name, too
        aliased = alice.new_room(name="apple", room_alias_name=name)
        alice.do("POST", f"{at(alice.new_room(name='left'))}/leave")
        bob.new_room(name="of somebody else")
        assert alice.read("/rooms")["rooms"] == [
            {"room_id": aliased, "name": "apple", "canonical_alias": f"#{name}:localhost"},
            {"room_id": named, "name": "Zebra"},
            {"room_id": plain},
        ]

    def test_key_is_told_of_its_own_rooms(self, synapse: LocalSynapse, alice: User, tmp_path: Path) -> None:
        bot = alice
        name = f"scope-{bot.id[1:].partition(':')[0]}"
        one, aliased, _ = bot.new_room(), bot.new_room(room_alias_name=name), bot.new_room()
        rooms = (one, f"#{name}:localhost", "#nowhere:localhost")
        key = ApiKey("k", "lists", rooms=rooms, event_types=("m.room.message",))
        headers = {"X-API-Key": make_key(tmp_path, key)}
        settings = Settings.load(base_url=synapse.url, access_token=bot.token, database_url=store_in(tmp_path))
        with background(settings) as url, httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
            assert {room["room_id"] for room in client.get("/rooms").json()["rooms"]} == {one, aliased}
            assert client.get("/whoami").json()["flowbridge"]["key"] == {
                "name": "lists",
                "rooms": list(rooms),
                "event_types": ["m.room.message"],
                "admin": False,
                "users": [],
            }


class TestPresenceAndDirectory:
    def test_are_told(self, eve: User) -> None:
        room = eve.new_room(visibility="public")
        end = eve.read(f"{OLD}/initialSync")["end"]
        eve.do("PUT", f"/presence/{eve.id}/status", presence="unavailable", status_msg="out")
        changed = eve.read(f"{OLD}/events", **{"from": end})["chunk"]
        found = eve.read(f"{OLD}/initialSync")
        alone = eve.read(f"{OLD}{at(room)}/initialSync")
        assert found["rooms"][0]["visibility"] == alone["visibility"] == "public"
        for presence in (changed, found["presence"], alone["presence"]):
            assert [status["type"] for status in presence] == ["m.presence"]
            assert presence[0]["content"]["user_id"] == eve.id
            assert "presence" in presence[0]["content"]


class TestGuide:
    """The guide's commands as they stand; only the host, the token and the room are others."""

    @pytest.fixture
    def curl(self, served: str) -> Callable[[User, str], Any]:
        def run(user: User, line: str) -> Any:
            line = line.replace("http://localhost:8008", served).replace("YOUR_ACCESS_TOKEN", user.token)
            done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=PATIENCE, check=True)  # noqa: S602
            return json.loads(done.stdout)

        return run

    def test_all_state(self, curl: Callable[[User, str], Any], kitchen: Kitchen) -> None:
        line = 'curl -XGET "http://localhost:8008/_matrix/client/api/v1/initialSync?access_token=YOUR_ACCESS_TOKEN"'
        found = curl(kitchen[0], line)
        (only,) = found["rooms"]
        assert {"membership", "messages", "room_id", "state"} <= only.keys()
        assert {"chunk", "end", "start"} == only["messages"].keys()
        member = next(event for event in only["state"] if event["type"] == "m.room.member")
        assert {"content", "event_id", "membership", "room_id", "state_key", "ts", "type", "user_id"} <= member.keys()

    def test_most_recent_event_of_each_room(self, curl: Callable[[User, str], Any], kitchen: Kitchen) -> None:
        found = curl(
            kitchen[0],
            'curl -XGET "http://localhost:8008/_matrix/client/api/v1/initialSync'
            '?limit=1&access_token=YOUR_ACCESS_TOKEN"',
        )
        assert bodies(found["rooms"][0]["messages"]["chunk"]) == ["m19"]

    def test_live_state(self, curl: Callable[[User, str], Any], alice: User, room: str) -> None:
        line = 'curl -XGET "http://localhost:8008/_matrix/client/api/v1/events?access_token=YOUR_ACCESS_TOKEN'
        end = curl(alice, f'{line}&timeout=0"')["end"]
        with ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(curl, alice, f'{line}&from={end}"')
            alice.say(room, "live")
            found = waiting.result(PATIENCE)
        assert {"chunk", "start", "end"} == found.keys()
        assert bodies(found["chunk"]) == ["live"]
