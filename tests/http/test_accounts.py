"""Accounts in front of a scripted homeserver: stages that a caller must complete, answers that no Synapse gives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Bridge, as_caller, running
from tests.http.test_secrets import everything_logged
from tests.upstream import Behaviour, Request, Upstream

V3 = "/_matrix/client/v3"
OLD = ["/register", "/_matrix/client/api/v1/register", f"{V3}/register"]
WISH = {"user_id": "example", "password": "wordpass"}
DUMMY = "m.login.dummy"
ACCOUNT = {"user_id": "@example:upstream", "access_token": "new-token", "device_id": "NEW"}

Json = dict[str, Any]


@pytest.fixture
def anyone(bridge: Bridge) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=bridge.url, trust_env=False) as client:
        yield client


def asking(*ways: list[str], **more: Any) -> Json:
    return {"session": "the-session", "params": {}, "flows": [{"stages": way} for way in ways], **more}


def registering(first: Json, then: Behaviour) -> scripted.Script:
    """A homeserver that first asks this, and says that to whoever has an answer."""

    def script(request: Request) -> Behaviour | None:
        if not request.target.startswith(f"{V3}/register"):
            return None
        return then if "auth" in request.json() else scripted.answer(first, 401)

    return script


def check_error(answer: httpx.Response, status: int, errcode: str) -> str:
    assert (answer.status_code, answer.json()["errcode"]) == (status, errcode), answer.text
    return str(answer.json()["error"])


@pytest.mark.parametrize("path", OLD)
def test_dummy_stage_is_completed_in_the_session(anyone: httpx.Client, upstream: Upstream, path: str) -> None:
    upstream.script(registering(asking(["m.login.recaptcha"], [DUMMY]), scripted.answer(ACCOUNT)))
    assert anyone.post(path, json=WISH).json() == {**ACCOUNT, "home_server": "upstream"}
    wish = {"username": "example", "password": "wordpass"}
    auth = {"type": DUMMY, "session": "the-session"}
    assert [request.json() for request in upstream.requests] == [wish, {**wish, "auth": auth}]
    assert {request.target for request in upstream.requests} == {f"{V3}/register"}


def test_homeserver_that_asks_nothing_is_asked_once(anyone: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.answer(ACCOUNT), at="/register")
    assert anyone.post("/register", json=WISH).status_code == 200
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("ways", "named"),
    [
        ([["m.login.recaptcha"]], "m.login.recaptcha;"),
        ([["m.login.recaptcha", "m.login.terms"]], "m.login.recaptcha and m.login.terms;"),
        ([["m.login.terms", DUMMY]], "m.login.terms and m.login.dummy;"),
        ([["m.login.registration_token", DUMMY], ["m.login.msisdn"]], "m.login.msisdn, or m.login.registration_token"),
        ([["m.login.email.identity"]], "m.login.email.identity;"),
        ([], "it does not say what;"),
    ],
)
@pytest.mark.parametrize("path", OLD)
def test_stage_that_only_the_caller_can_complete_is_named(
    anyone: httpx.Client, upstream: Upstream, path: str, ways: list[list[str]], named: str
) -> None:
    upstream.script(registering(asking(*ways), scripted.answer(ACCOUNT)))
    assert named in check_error(anyone.post(path, json=WISH), 403, "M_FORBIDDEN")
    assert len(upstream.requests) == 1


def test_stage_that_is_completed_already_counts(anyone: httpx.Client, upstream: Upstream) -> None:
    first = asking(["m.login.terms", DUMMY], completed=["m.login.terms"])
    upstream.script(registering(first, scripted.answer(ACCOUNT)))
    assert anyone.post("/register", json=WISH).status_code == 200


def test_stage_that_comes_behind_is_named(anyone: httpx.Client, upstream: Upstream) -> None:
    more = asking([DUMMY, "m.login.terms"], completed=[DUMMY])
    upstream.script(registering(asking([DUMMY]), scripted.answer(more, 401)))
    assert "m.login.terms;" in check_error(anyone.post("/register", json=WISH), 403, "M_FORBIDDEN")
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("flows", [[5], [{}], [{"stages": 5}], [{"stages": [{}, 5]}], [{"stages": []}]])
def test_stages_that_make_no_sense_are_an_error_all_the_same(
    anyone: httpx.Client, upstream: Upstream, flows: list[Any]
) -> None:
    upstream.script(registering({"flows": flows, "completed": [{}], "session": 5}, scripted.answer(ACCOUNT)))
    check_error(anyone.post("/register", json=WISH), 403, "M_FORBIDDEN")


@pytest.mark.parametrize("name", ["r0", "v1", "v3", "unstable"])
def test_everything_else_goes_to_the_homeserver_as_it_is(anyone: httpx.Client, upstream: Upstream, name: str) -> None:
    first = asking(["m.login.recaptcha"], errcode="M_FORBIDDEN", error="Invalid", completed=[], **{"org.x": 1})
    upstream.script(registering(first, scripted.answer(ACCOUNT)))
    path = f"/_matrix/client/{name}/register?kind=guest&other=1&access_token=as_token"
    bodies: list[Json] = [
        {},
        {"username": "x"},
        {"user_id": "x", "username": "x", "org.x": {"deep": [1]}},
        {"user_id": "x", "auth": {"type": "m.login.recaptcha", "session": "s", "response": "r"}},
        {"type": "m.login.application_service", "username": "x"},
    ]
    for body in bodies:
        answer = anyone.post(path, json=body)
        if "auth" in body:
            assert answer.json() == {**ACCOUNT, "home_server": "upstream"}
        else:
            assert (answer.status_code, answer.json()) == (401, first)
    assert [request.json() for request in upstream.requests] == bodies
    for request in upstream.requests:
        assert request.target == f"{V3}/register?kind=guest"
        assert request.header("authorization") == "Bearer as_token"


def test_homeservers_errors_pass(anyone: httpx.Client, upstream: Upstream) -> None:
    for status, errcode in (
        (400, "M_USER_IN_USE"),
        (400, "M_WEAK_PASSWORD"),
        (403, "M_FORBIDDEN"),
        (429, "M_LIMIT_EXCEEDED"),
    ):
        upstream.always(scripted.matrix_error(status, errcode, "no"), at="/register")
        for path in OLD:
            assert check_error(anyone.post(path, json=WISH), status, errcode) == "no"


@pytest.mark.parametrize("path", [*OLD, "/login"])
def test_proxy_that_answers_html_is_a_502_without_html(anyone: httpx.Client, upstream: Upstream, path: str) -> None:
    upstream.always(scripted.html(401))
    error = check_error(anyone.post(path, json=WISH), 502, "M_UNKNOWN")
    assert "<html" not in error


@pytest.mark.parametrize("path", ["/login", f"{V3}/login"])
def test_login_says_that_the_bridge_is_the_homeserver(
    bridge: Bridge, anyone: httpx.Client, upstream: Upstream, path: str
) -> None:
    well_known = {
        "m.homeserver": {"base_url": "https://hs.example.org"},
        "m.identity_server": {"base_url": "https://id"},
    }
    upstream.always(scripted.answer({**ACCOUNT, "well_known": well_known}), at="/login")

    def told(**headers: str) -> Any:
        return anyone.post(path, json={"type": "x"}, headers=headers).json()["well_known"]

    assert told() == {**well_known, "m.homeserver": {"base_url": bridge.url}}
    assert told(Host="bridge.example.org")["m.homeserver"] == {"base_url": "http://bridge.example.org"}
    assert told(Host="bridge/../x")["m.homeserver"] == {"base_url": bridge.url}


def test_public_url_is_what_the_setting_says(upstream: Upstream, tmp_path: Path) -> None:
    upstream.always(scripted.answer({**ACCOUNT, "well_known": {"m.homeserver": {"base_url": "x"}}}), at="/login")
    with running(upstream, tmp_path, public_url="https://bridge.example.org/x") as bridge:
        found = httpx.post(f"{bridge.url}/login", json={}, trust_env=False).json()
    assert found["well_known"] == {"m.homeserver": {"base_url": "https://bridge.example.org/x"}}


@pytest.mark.parametrize("odd", [None, 5, [], {}])
def test_login_without_a_well_known_gets_none(anyone: httpx.Client, upstream: Upstream, odd: Any) -> None:
    upstream.always(scripted.answer({**ACCOUNT, "well_known": odd}), at="/login")
    assert anyone.post("/login", json={}).json() == {**ACCOUNT, "home_server": "upstream"}


def test_old_user_of_a_login_becomes_an_identifier(anyone: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.answer(ACCOUNT), at="/login")
    anyone.post("/login", json={"type": "m.login.password", "user": "example", "password": "wordpass"})
    assert upstream.requests[0].json()["identifier"] == {"type": "m.id.user", "user": "example"}


def test_name_of_a_homeserver_that_nobody_knows_yet_is_learnt_from_its_answers(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.script(registering(asking([DUMMY]), scripted.answer(ACCOUNT)))
    with running(upstream, tmp_path, access_token=None) as bridge:
        whole = {"user_id": "@example:upstream"}
        answer = httpx.post(f"{bridge.url}/register", json=whole, trust_env=False)
        assert "send the name alone" in check_error(answer, 400, "M_INVALID_USERNAME")
        assert upstream.requests == []
        assert httpx.post(f"{bridge.url}/register", json=WISH, trust_env=False).status_code == 200
        assert httpx.post(f"{bridge.url}/register", json=whole, trust_env=False).status_code == 200
        answer = httpx.post(f"{bridge.url}/register", json={"user_id": "@a:b"}, trust_env=False)
        assert "'upstream'" in check_error(answer, 400, "M_INVALID_USERNAME")


def test_key_stays_here(bridge: Bridge, upstream: Upstream) -> None:
    upstream.script(registering(asking([DUMMY]), scripted.answer(ACCOUNT)))
    with as_caller(bridge, KEY) as caller:
        assert caller.post("/register", json=WISH).status_code == 200
        caller.post(f"{V3}/register", json={"username": "x"})
        caller.post(f"{V3}/register?access_token={KEY}", json={"username": "x"})
        caller.post("/login", json={})
    assert upstream.requests
    for request in upstream.requests:
        assert KEY not in f"{request.target}{request.headers}"
        assert request.header("authorization") == ""


def test_lost_answer_to_a_registration_is_a_504_or_502(impatient: Bridge, upstream: Upstream) -> None:
    with as_caller(impatient) as anyone:
        upstream.script(registering(asking([DUMMY]), scripted.hang_up))
        check_error(anyone.post("/register", json=WISH), 502, "M_UNKNOWN")
        upstream.script(registering(asking([DUMMY]), scripted.silence))
        check_error(anyone.post("/register", json=WISH), 504, "M_UNKNOWN")
    assert len(upstream.requests) == 4, "a POST is not repeated"


def test_page_that_moved_is_followed_by_the_browser(anyone: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.redirect("https://login.example.org/"), at="/_matrix/static/client/login/")
    answer = anyone.get("/login/fallback")
    assert (answer.status_code, answer.headers["location"]) == (302, "https://login.example.org/")
    upstream.script(None)
    check_error(anyone.get("/login/fallback"), 404, "M_UNRECOGNIZED")


def test_neither_passwords_nor_tokens_are_logged_or_stored(upstream: Upstream, tmp_path: Path) -> None:
    upstream.script(registering(asking([DUMMY]), scripted.answer({**ACCOUNT, "access_token": "canary-token"})))
    no_token, query = "Authorization: Basic x", "?access_token=canary-token"
    with everything_logged() as text, running(upstream, tmp_path) as bridge:

        def post(target: str, body: Json) -> int:
            return bridge.post(target, json.dumps(body).encode(), no_token).status

        assert post("/register", {"user_id": "example", "password": "canary-password"}) == 200
        assert post("/register", {"user_id": "example", "password": ["canary-password"]}) == 400
        upstream.always(scripted.answer({**ACCOUNT, "access_token": "canary-token"}), at="/login")
        assert post("/login", {"user": "example", "password": "canary-password"}) == 200
        upstream.script(None)
        assert bridge.post(f"/whoami{query}", b"", no_token, method="GET").status == 200
        upstream.always(scripted.answer({}), at="/logout")
        assert post(f"/logout{query}", {}) == 200
    assert "request" in text.getvalue()
    assert "canary" not in text.getvalue()
    for path in tmp_path.iterdir():
        assert b"canary" not in path.read_bytes(), path


@pytest.mark.parametrize("path", ["/logout", f"{V3}/logout/all"])
@pytest.mark.parametrize("status", [200, 401])
def test_token_that_logged_out_is_nobodys_any_more(
    caller: httpx.Client, upstream: Upstream, path: str, status: int
) -> None:
    """Although it was known a moment before, and the homeserver is away now."""
    assert caller.post(SEND, json=HELLO).status_code == 200
    unknown = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "gone")
    upstream.always(scripted.answer({}) if status == 200 else unknown, at="/logout")
    assert caller.post(path).status_code == status
    upstream.reset()
    upstream.always(scripted.hang_up)
    check_error(caller.post(SEND, json=HELLO), 503, "M_UNKNOWN")
    assert upstream.events == []
