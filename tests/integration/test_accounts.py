"""Accounts on a real Synapse: registering, logging in and out, whoami; and what bad input gets."""

import secrets
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.integration.conftest import KEY, store_in

OLD = ["/register", "/_matrix/client/api/v1/register"]
NEW = [f"/_matrix/client/{name}/register" for name in ("r0", "v1", "v3", "unstable")]
PREFIXES = ["", *(f"/_matrix/client/{name}" for name in ("api/v1", "r0", "v1", "v3", "unstable"))]

HOSTILE = {
    "fraction": '{"a": 1.5}',
    "infinity": '{"a": 1e400}',
    "surrogate": '{"user_id": "\\ud800", "user": "\\ud800", "password": "\\ud800"}',
    "nul": '{"user_id": "a\\u0000b", "user": "a\\u0000b", "password": "x", "type": "m.login.password"}',
    "nul-in-password": '{"user_id": "u", "user": "u", "password": "a\\u0000b", "type": "m.login.password"}',
    "number": '{"user_id": 5, "user": 5, "password": "x", "type": "m.login.password"}',
    "number-as-password": '{"user_id": "u", "user": "u", "password": 5, "type": "m.login.password"}',
    "list-as-identifier": '{"identifier": [], "auth": [], "password": "x", "type": "m.login.password"}',
    "list-inside": '{"identifier": {"type": "m.id.user", "user": []}, "auth": {"type": 5}, "password": "x", "type": 5}',
    "list": "[]",
    "string": '"x"',
    "deep": "[" * 1000,
    "duplicate": '{"user_id": "a", "user_id": "b", "user": "a", "user": "b"}',
    "not-json": "{",
    "form": "user=example&password=wordpass",
    "not-utf8": b"\xff",
}


def name() -> str:
    return f"user-{secrets.token_hex(6)}"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def check_error(answer: httpx.Response, status: int, errcode: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["errcode"]) == (status, errcode), answer.text
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


@pytest.mark.parametrize("path", [*OLD, *NEW])
def test_guides_registration_makes_an_account_in_one_call(anyone: httpx.Client, path: str) -> None:
    wish = {"user_id": name(), "password": "wordpass"}
    found = anyone.post(path, json=wish).raise_for_status().json()
    assert found["user_id"] == f"@{wish['user_id']}:localhost"
    assert found["home_server"] == "localhost"
    assert anyone.get("/whoami", headers=bearer(found["access_token"])).json()["device_id"] == found["device_id"]
    login = {"type": "m.login.password", "user": wish["user_id"], "password": "wordpass"}
    assert anyone.post("/login", json=login).json()["user_id"] == found["user_id"]


@pytest.mark.parametrize("path", OLD)
@pytest.mark.parametrize("body", [b"", b"{}", b"null", b'{"user_id": null}', b'{"password": "wordpass"}'])
def test_without_a_name_the_homeserver_chooses_one(anyone: httpx.Client, path: str, body: bytes) -> None:
    first, second = (anyone.post(path, content=body).raise_for_status().json() for _ in range(2))
    assert first["user_id"] != second["user_id"]
    assert anyone.get("/whoami", headers=bearer(first["access_token"])).json()["user_id"] == first["user_id"]


def test_without_a_password_nobody_can_log_in_later(anyone: httpx.Client) -> None:
    found = anyone.post("/register", json={"user_id": name()}).raise_for_status().json()
    for password in ("", "None", "null"):
        login = {"type": "m.login.password", "user": found["user_id"], "password": password}
        assert anyone.post("/login", json=login).status_code == 403


@pytest.mark.parametrize("pattern", ["@{}:localhost", "@{}:LOCALHOST", "@{}"])
def test_whole_user_id_of_this_homeserver_is_a_name(anyone: httpx.Client, pattern: str) -> None:
    user = name()
    found = anyone.post("/register", json={"user_id": pattern.format(user)}).raise_for_status().json()
    assert found["user_id"] == f"@{user}:localhost"


def test_user_of_another_homeserver_is_not_registered(anyone: httpx.Client) -> None:
    answer = anyone.post("/register", json={"user_id": f"@{name()}:example.org"})
    assert "'localhost'" in check_error(answer, 400, "M_INVALID_USERNAME")["error"]


@pytest.mark.parametrize("path", [*OLD, NEW[0]])
def test_taken_name_is_told(anyone: httpx.Client, friend: Account, path: str) -> None:
    taken = friend.user_id[1:].partition(":")[0]
    check_error(anyone.post(path, json={"user_id": taken, "password": "x"}), 400, "M_USER_IN_USE")


def test_wish_for_a_device_is_kept(anyone: httpx.Client) -> None:
    wish = {"user_id": name(), "device_id": "TOASTER", "initial_device_display_name": "a toaster"}
    found = anyone.post("/register", json=wish).raise_for_status().json()
    assert found["device_id"] == "TOASTER"


@pytest.mark.parametrize("path", NEW)
@pytest.mark.parametrize("extra", [{}, {"username": "x"}, {"user_id": "x", "username": "y"}])
def test_other_registrations_are_asked_what_the_homeserver_asks(
    anyone: httpx.Client, path: str, extra: dict[str, str]
) -> None:
    if "username" in extra:
        extra["username"] = name()
    answer = anyone.post(path, json={**extra, "password": "wordpass"})
    assert answer.status_code == 401
    asked = answer.json()
    assert {"stages": ["m.login.dummy"]} in asked["flows"]
    assert "errcode" not in asked
    auth = {"type": "m.login.dummy", "session": asked["session"]}
    done = anyone.post(path, json={**extra, "password": "wordpass", "auth": auth})
    assert done.status_code == 200, done.text
    if "username" in extra:
        assert done.json()["user_id"] == f"@{extra['username']}:localhost"


def test_homeserver_that_registers_nobody_says_so(owner: Account, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("closed")
    config = {"enable_registration": False, "enable_registration_without_verification": False}
    with (
        LocalSynapse(config=config) as homeserver,
        background(Settings.load(base_url=homeserver.url, database_url=store_in(folder))) as url,
    ):
        for path in (*OLD, NEW[0]):
            answer = httpx.post(url + path, json={"user_id": "x", "password": "x"}, trust_env=False)
            check_error(answer, 403, "M_FORBIDDEN")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_logs_in_and_out(anyone: httpx.Client, friend: Account, prefix: str) -> None:
    flows = anyone.get(f"{prefix}/login").json()["flows"]
    assert {"type": "m.login.password"} in flows
    identifier = {"identifier": {"type": "m.id.user", "user": friend.user_id}}
    for who in ({"user": friend.user_id[1:].partition(":")[0]}, {"user": friend.user_id}, identifier):
        login = {"type": "m.login.password", **who, "password": friend.password}
        found = anyone.post(f"{prefix}/login", json=login).raise_for_status().json()
        assert (found["user_id"], found["home_server"]) == (friend.user_id, "localhost")
    whoami = f"{prefix}/account/whoami" if prefix else "/whoami"
    headers = bearer(found["access_token"])
    seen = anyone.get(whoami, headers=headers).raise_for_status().json()
    assert seen == {"user_id": friend.user_id, "device_id": found["device_id"], "is_guest": False}
    assert anyone.post(f"{prefix}/logout", headers=headers).json() == {}
    check_error(anyone.get(whoami, headers=headers), 401, "M_UNKNOWN_TOKEN")
    check_error(anyone.post(f"{prefix}/logout", headers=headers), 401, "M_UNKNOWN_TOKEN")


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"anything"])
def test_body_of_a_logout_is_not_looked_at(anyone: httpx.Client, friend: Account, body: bytes) -> None:
    headers = bearer(log_in(anyone, friend))
    assert anyone.post("/logout", content=body, headers=headers).status_code == 200


def test_logout_everywhere_ends_all_tokens(anyone: httpx.Client, friend: Account) -> None:
    first, second = log_in(anyone, friend), log_in(anyone, friend)
    assert anyone.post(f"/logout/all?access_token={first}").json() == {}
    for token in (first, second, friend.access_token):
        check_error(anyone.get("/whoami", headers=bearer(token)), 401, "M_UNKNOWN_TOKEN")


def test_token_that_logged_out_sends_nothing_more(anyone: httpx.Client, friend: Account) -> None:
    headers = bearer(log_in(anyone, friend))
    room = anyone.post("/rooms", headers=headers).raise_for_status().json()["room_id"]
    send = f"/rooms/{room}/send/m.room.message"
    assert anyone.post(send, json={"msgtype": "m.text", "body": "hi"}, headers=headers).status_code == 200
    assert anyone.post("/logout", headers=headers).status_code == 200
    check_error(anyone.post(send, json={"msgtype": "m.text", "body": "hi"}, headers=headers), 401, "M_UNKNOWN_TOKEN")


def test_wrong_password_is_the_homeservers_403(anyone: httpx.Client, friend: Account) -> None:
    login = {"type": "m.login.password", "user": friend.user_id, "password": "wrong"}
    check_error(anyone.post("/login", json=login), 403, "M_FORBIDDEN")


def test_unknown_way_to_log_in_is_a_400(anyone: httpx.Client) -> None:
    check_error(anyone.post("/login", json={"type": "m.login.magic", "user": "x"}), 400, "M_UNKNOWN")


@pytest.mark.parametrize("path", ["/whoami", "/logout", "/logout/all"])
def test_no_token_or_a_wrong_one_is_a_401(anyone: httpx.Client, path: str) -> None:
    method = "GET" if path == "/whoami" else "POST"
    check_error(anyone.request(method, path), 401, "M_MISSING_TOKEN")
    check_error(anyone.request(method, f"{path}?access_token=syt_wrong"), 401, "M_UNKNOWN_TOKEN")
    check_error(anyone.request(method, f"{path}?access_token=%00"), 401, "M_UNKNOWN_TOKEN")
    check_error(anyone.request(method, path, headers=bearer("fb_wrong")), 401, "M_UNKNOWN_TOKEN")


def test_key_is_the_bot_and_does_not_log_it_out(anyone: httpx.Client, owner: Account) -> None:
    assert anyone.get("/whoami", headers=bearer(KEY)).json()["user_id"] == owner.user_id
    for path in ("/logout", "/logout/all"):
        check_error(anyone.post(path, headers=bearer(KEY)), 403, "M_FORBIDDEN")
    assert anyone.get("/whoami", headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize("path", [*OLD, NEW[0], NEW[2], "/login", "/_matrix/client/v3/login"])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_body_is_a_400(anyone: httpx.Client, path: str, body: str | bytes) -> None:
    answer = anyone.post(path, content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["errcode"] in ("M_BAD_JSON", "M_NOT_JSON")


@pytest.mark.parametrize(
    "user", ["", " ", "ä", "a b", "a:b", "a" * 300, "_x", "1234", "@", "@:localhost", "a/../b", "🙂"]
)
def test_name_that_cannot_be_is_a_400(anyone: httpx.Client, user: str) -> None:
    answer = anyone.post("/register", json={"user_id": user, "password": "x"})
    if user != "a/../b":  # a name all the same
        check_error(answer, 400, "M_INVALID_USERNAME")


@pytest.mark.parametrize("password", ["", "x" * 73, "x" * 513, "ü" * 100, "🙂"])
def test_any_password_is_no_5xx(anyone: httpx.Client, password: str) -> None:
    answer = anyone.post("/register", json={"user_id": name(), "password": password})
    assert answer.status_code in (200, 400), answer.text
    login = {"type": "m.login.password", "user": "nobody", "password": password}
    check_error(anyone.post("/login", json=login), 403, "M_FORBIDDEN")


@pytest.fixture(scope="module")
def page_of_synapse(synapse: LocalSynapse) -> str:
    return httpx.get(f"{synapse.url}/_matrix/static/client/login/", trust_env=False).raise_for_status().text


@pytest.mark.parametrize("prefix", PREFIXES)
def test_login_page_is_the_homeservers(anyone: httpx.Client, page_of_synapse: str, prefix: str) -> None:
    answer = anyone.get(f"{prefix}/login/fallback?device_id=X")
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/html")
    before, base, after = answer.text.partition(
        f'<base href="{"../" * (prefix.count("/") + 1)}_matrix/static/client/login/">'
    )
    assert base
    assert before + after == page_of_synapse
    links = httpx.URL(str(answer.url)).join("../" * (prefix.count("/") + 1) + "_matrix/static/client/login/")
    assert links.path == "/_matrix/static/client/login/"


def test_clients_are_told_to_come_back_to_the_bridge(
    synapse: LocalSynapse, bridge_url: str, anyone: httpx.Client, friend: Account
) -> None:
    login = {"type": "m.login.password", "user": friend.user_id, "password": friend.password}
    direct = httpx.post(f"{synapse.url}/_matrix/client/v3/login", json=login, trust_env=False).json()
    assert direct["well_known"]["m.homeserver"]["base_url"].startswith(synapse.url)
    for path in ("/login", "/_matrix/client/v3/login"):
        assert anyone.post(path, json=login).json()["well_known"] == {"m.homeserver": {"base_url": bridge_url}}


def log_in(client: httpx.Client, account: Account) -> str:
    login = {"type": "m.login.password", "user": account.user_id, "password": account.password}
    return str(client.post("/login", json=login).raise_for_status().json()["access_token"])
