"""The guide's commands for accounts and rooms, in its order, on a Synapse that nobody else uses."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.curl import curl
from tests.integration.conftest import store_in

REGISTER = """curl -XPOST -d '{"user_id":"example", "password":"wordpass"}' \
"http://localhost:8008/_matrix/client/api/v1/register\""""
FLOWS = 'curl -XGET "http://localhost:8008/_matrix/client/api/v1/login"'
LOGIN = """curl -XPOST -d '{"type":"m.login.password", "user":"example", "password":"wordpass"}' \
"http://localhost:8008/_matrix/client/api/v1/login\""""
CREATE = """curl -XPOST -d '{"room_alias_name":"tutorial"}' \
"http://localhost:8008/_matrix/client/api/v1/createRoom?access_token=YOUR_ACCESS_TOKEN\""""
SEND = """curl -XPOST -d '{"msgtype":"m.text", "body":"hello"}' \
"http://localhost:8008/_matrix/client/api/v1/rooms/%21CvcvRuDYDzTOzfKKgh%3Alocalhost/send/m.room.message\
?access_token=YOUR_ACCESS_TOKEN\""""
INVITE = """curl -XPOST -d '{"user_id":"@myfriend:localhost"}' \
"http://localhost:8008/_matrix/client/api/v1/rooms/%21CvcvRuDYDzTOzfKKgh%3Alocalhost/invite\
?access_token=YOUR_ACCESS_TOKEN\""""
JOIN = """curl -XPOST -d '{}' \
"http://localhost:8008/_matrix/client/api/v1/rooms/%21CvcvRuDYDzTOzfKKgh%3Alocalhost/join\
?access_token=YOUR_ACCESS_TOKEN\""""
JOIN_BY_ALIAS = """curl -XPOST -d '{}' \
"http://localhost:8008/_matrix/client/api/v1/join/%23tutorial%3Alocalhost?access_token=YOUR_ACCESS_TOKEN\""""
GUIDE_ROOM = "%21CvcvRuDYDzTOzfKKgh%3Alocalhost"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def homeserver() -> Iterator[LocalSynapse]:
    with LocalSynapse() as found:
        yield found


@pytest.fixture(scope="module")
def url(homeserver: LocalSynapse, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("guide")
    with background(Settings.load(base_url=homeserver.url, database_url=store_in(folder))) as found:
        yield found


@pytest.fixture(scope="module")
def example(url: str) -> Json:
    return dict(curl(REGISTER, url))


@pytest.fixture(scope="module")
def tutorial(url: str, example: Json) -> Json:
    return dict(curl(CREATE, url, YOUR_ACCESS_TOKEN=example["access_token"]))


@pytest.fixture(scope="module")
def friend(url: str, tutorial: Json, example: Json) -> Json:
    """@myfriend, invited."""
    found = dict(curl(REGISTER.replace("example", "myfriend"), url))
    room = quote(tutorial["room_id"], safe="")
    assert curl(INVITE, url, **{GUIDE_ROOM: room}, YOUR_ACCESS_TOKEN=example["access_token"]) == {}
    return found


def test_registers(example: Json, url: str) -> None:
    assert example["user_id"] == "@example:localhost"
    assert example["home_server"] == "localhost"
    assert example.keys() == {"access_token", "device_id", "home_server", "user_id"}
    assert whoami(url, example)["user_id"] == "@example:localhost"


def test_lists_the_ways_to_log_in(url: str) -> None:
    assert {"type": "m.login.password"} in curl(FLOWS, url)["flows"]


def test_logs_in(url: str, example: Json) -> None:
    found = curl(LOGIN, url)
    assert (found["user_id"], found["home_server"]) == ("@example:localhost", "localhost")
    assert found["access_token"] != example["access_token"]
    assert whoami(url, found)["device_id"] == found["device_id"]


def test_makes_a_room_with_an_alias(tutorial: Json, url: str, homeserver: LocalSynapse) -> None:
    assert tutorial.keys() == {"room_id", "room_alias"}
    assert tutorial["room_alias"] == "#tutorial:localhost"
    found = httpx.get(f"{homeserver.url}/_matrix/client/v3/directory/room/%23tutorial:localhost", trust_env=False)
    assert found.json()["room_id"] == tutorial["room_id"]


def test_sends_a_message(url: str, example: Json, tutorial: Json) -> None:
    room = quote(tutorial["room_id"], safe="")
    found = curl(SEND, url, **{GUIDE_ROOM: room}, YOUR_ACCESS_TOKEN=example["access_token"])
    assert found.keys() == {"event_id"}


def test_joins_by_an_invitation_and_again(url: str, friend: Json, tutorial: Json) -> None:
    room = quote(tutorial["room_id"], safe="")
    for _ in range(2):
        found = curl(JOIN, url, **{GUIDE_ROOM: room}, YOUR_ACCESS_TOKEN=friend["access_token"])
        assert found == {"room_id": tutorial["room_id"]}


def test_joins_by_the_alias(url: str, friend: Json, tutorial: Json) -> None:
    found = curl(JOIN_BY_ALIAS, url, YOUR_ACCESS_TOKEN=friend["access_token"])
    assert found == {"room_id": tutorial["room_id"]}


def whoami(url: str, account: Json) -> Json:
    headers = {"Authorization": f"Bearer {account['access_token']}"}
    return dict(httpx.get(f"{url}/whoami", headers=headers, trust_env=False).raise_for_status().json())
