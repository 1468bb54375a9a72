"""Administering hooks over HTTP: making, seeing, changing, rotating, trying and deleting them."""

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from flowbridge.hooks.receiving import Receiving
from flowbridge.models import ApiKey
from flowbridge.store import Database, api_keys
from tests import upstream as scripted
from tests.http.conftest import BOT_TOKEN, KEY, ROOM, Bridge, as_caller, running
from tests.patience import until
from tests.postgres import LocalPostgres
from tests.upstream import PATIENCE, Rooms, Upstream

Json = dict[str, Any]
PAGES = ("/hooks", "/hooks/ci", "/hooks/gh", "/hooks/ci/requests", "/deliveries", "/metrics")
LOOP = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
CANARY = "canary-of-31-visible-characters"
STANDARD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def bridge(upstream: Upstream, tmp_path: Path) -> Iterator[Bridge]:
    with running(upstream, tmp_path, public_url="https://bridge.example.org") as bridge:
        yield bridge


@pytest.fixture
def admin(bridge: Bridge) -> Iterator[httpx.Client]:
    """With a key that has `admin` and no limits."""
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=bridge.url, headers=headers, trust_env=False, timeout=2 * PATIENCE) as client:
        yield client


def made(admin: httpx.Client, name: str = "ci", **definition: Any) -> Json:
    answer = admin.post("/hooks", json={"name": name, "room": ROOM, **definition})
    assert answer.status_code == 201, answer.text
    found: Json = answer.json()
    return found


def tell(bridge: Bridge, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{bridge.url}{path}", json=body, trust_env=False, timeout=2 * PATIENCE)


def problems(answer: httpx.Response) -> dict[str, str]:
    """Pointer → message."""
    assert answer.status_code == 400, answer.text
    assert answer.json()["errcode"] == "M_BAD_JSON"
    return {each["pointer"]: each["message"] for each in answer.json()["flowbridge"]["problems"]}


def refused(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"])


# making them


def test_new_hook_has_a_url_a_secret_and_a_line_to_try_it(bridge: Bridge, admin: httpx.Client, rooms: Rooms) -> None:
    answer = admin.post("/hooks", json={"name": "ci", "room": ROOM})
    assert (answer.status_code, answer.headers["location"]) == (201, "/hooks/ci")
    assert answer.headers["cache-control"] == "no-store"
    hook = answer.json()
    assert hook["secret"].startswith("fh_")
    assert len(hook["secret"]) == 46  # 256 random bits
    assert hook["url"] == f"https://bridge.example.org/hooks/ci/{hook['secret']}"
    assert hook["url"] in hook["curl"]
    assert hook["verification"] == {"scheme": "token"}
    assert hook["warnings"] == []
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "hello"}).status_code == 200
    rooms.wait_for(1)
    assert rooms.bodies == ["hello"]


def test_url_is_where_the_request_came_to_without_a_public_url(upstream: Upstream, tmp_path: Path) -> None:
    with running(upstream, tmp_path) as bridge:
        answer = httpx.post(f"{bridge.url}/hooks", json={"name": "ci", "room": ROOM}, headers={"X-API-Key": KEY})
        assert answer.json()["url"] == f"{bridge.url}/hooks/ci/{answer.json()['secret']}"


def test_all_of_a_definition_is_shown_as_it_was_given(admin: httpx.Client) -> None:
    definition: Json = {
        "source": "generic",
        "verification": {"scheme": "hmac", "header": "X-Signature", "prefix": "sha256=", "encoding": "base64"},
        "template": {"markdown": "**{{ payload.title }}**", "title": "News"},
        "per": "alerts",
        "on_update": "thread",
        "mention": ["@alice:hs", "@room"],
        "mentions": "template",
        "ignore": ["push", "issues.opened"],
        "keep_requests": 3,
    }
    hook = made(admin, **definition)
    assert {name: hook[name] for name in definition} == definition
    assert "secret" not in hook["verification"]
    again = admin.get("/hooks/ci").json()
    assert {name: again[name] for name in definition} == definition
    assert again["fixed"] is False
    (listed,) = admin.get("/hooks").json()["hooks"]
    assert listed == {name: value for name, value in again.items() if name not in ("template", "secrets", "url")}


@pytest.mark.parametrize(
    ("definition", "wrong"),
    [
        ({}, {"/name": "is required: it stands in the hook's URL", "/room": "is required: where its messages go"}),
        ({"name": "Two words"}, {"/name": "must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with"}),
        ({"name": "a" * 65}, {"/name": "must be 1 to 64"}),
        ({"name": ".."}, {"/name": "must be 1 to 64"}),
        ({"name": 5}, {"/name": "must be 1 to 64"}),
        (
            {"room": "ops"},
            {"/room": "names no room: 'ops' is not a room: a room id begins with '!'"},
        ),
        ({"room": "#ops"}, {"/room": "names no room: '#ops' is not a room alias: it has the form #name:server"}),
        ({"room": 7}, {"/room": "must be a string"}),
        ({"source": "grafan"}, {"/source": "must be "}),
        ({"verification": 1}, {"/verification": "must be an object"}),
        ({"verification": {"scheme": "md5"}}, {"/verification/scheme": "must be token, github, "}),
        ({"verification": {"scheme": "hmac"}}, {"/verification/header": "is required with the scheme hmac"}),
        (
            {"verification": {"scheme": "hmac", "header": "X Signature"}},
            {"/verification/header": "is no name of a header: up to 100 letters, digits and -"},
        ),
        (
            {"verification": {"scheme": "hmac", "header": "X-S", "prefix": "é", "encoding": "rot13"}},
            {
                "/verification/prefix": "must be up to 100 characters of visible ASCII, as sha256=",
                "/verification/encoding": "must be hex or base64, not 'rot13'",
            },
        ),
        (
            {"verification": {"scheme": "github", "header": "X-S"}},
            {"/verification/header": "means nothing with the scheme github: it is for hmac"},
        ),
        ({"verification": {"secret": "short"}}, {"/verification/secret": "must have at least 16 characters"}),
        ({"verification": {"secret": "x" * 1_001}}, {"/verification/secret": "must have at most 1000 characters"}),
        ({"verification": {"secret": "with a space in the middle"}}, {"/verification/secret": "must be visible ASCII"}),
        ({"verification": {"secret": 12}}, {"/verification/secret": "must be a string"}),
        ({"verification": {"secret": [CANARY, CANARY]}}, {"/verification/secret": "must be a string"}),
        (
            {"verification": {"scheme": "standard-webhooks", "secret": CANARY}},
            {"/verification/secret": "must be whsec_ and the base64 of 24 to 64 bytes"},
        ),
        (
            {"verification": {"scheme": "standard-webhooks", "secret": "whsec_c2hvcnQ="}},
            {"/verification/secret": "must be whsec_ and the base64 of 24 to 64 bytes"},
        ),
        ({"verification": {"sheme": "token"}}, {"/verification/sheme": "is unknown here: did you mean scheme?"}),
        ({"templat": "x"}, {"/templat": "is unknown here: did you mean template?"}),
        ({"template": 1}, {"/template": "must be a string, or an object of templates for members of a message"}),
        ({"template": {"title": "x"}}, {"/template": "makes no text: give text, markdown or html"}),
        ({"template": {"text": "a", "html": "b"}}, {"/template/html": "is one too many: there is text already"}),
        ({"template": {"text": 1}}, {"/template/text": "must be a string"}),
        ({"template": {"text": "a", "titel": "b"}}, {"/template/titel": "is unknown here: did you mean title?"}),
        ({"template": {"text": "a", "attachments": "b"}}, {"/template/attachments": "is unknown here"}),
        ({"template": "x" * 16_385}, {"/template": "is longer than 16 KiB"}),
        (
            {"template": "line\n{{ payload.x"},
            {"/template/markdown": "unexpected end of input, expected end of variable"},
        ),
        ({"template": "{{ payload|nope }}"}, {"/template/markdown": "filter nope is unknown (line 1)"}),
        (
            {"template": LOOP},
            {"/template/markdown": "takes too many steps: make its loops shorter (line 1)"},
        ),
        ({"per": "day"}, {"/per": "must be notification or alerts, not 'day'"}),
        ({"on_update": "sing"}, {"/on_update": "must be edit, thread, reply or new, not 'sing'"}),
        ({"mentions": "always"}, {"/mentions": "must be never, firing or template, not 'always'"}),
        ({"mention": {"a": 1}}, {"/mention": "must be a list of user ids (@name:server) and @room"}),
        ({"mention": ["@a:hs", "bob"]}, {"/mention/1": "is no user id: write it as @name:server, or @room"}),
        ({"mention": [f"@u{n}:hs" for n in range(51)]}, {"/mention": "are more than 50: @room is for everybody"}),
        ({"ignore": "push"}, {"/ignore": "must be a list of the sender's names of events"}),
        ({"ignore": ["push", ""]}, {"/ignore/1": "is no name of an event: a string of up to 100 characters"}),
        ({"ignore": ["x"] * 101}, {"/ignore": "are more than 100: let the sender send fewer kinds of events"}),
        ({"keep_requests": 21}, {"/keep_requests": "must be a number from 0 to 20, or true or false"}),
        ({"keep_requests": -1}, {"/keep_requests": "must be a number from 0 to 20, or true or false"}),
        ({"keep_requests": "all"}, {"/keep_requests": "must be a number from 0 to 20, or true or false"}),
    ],
)
def test_definition_that_is_wrong_is_refused_with_every_pointer(
    bad: httpx.Client, definition: Json, wrong: dict[str, str]
) -> None:
    value = {"name": "ci", "room": ROOM, **definition} if definition else {}
    answer = bad.post("/hooks", json=value)
    found = problems(answer)
    assert found.keys() == wrong.keys()
    for pointer, message in wrong.items():
        assert message in found[pointer]
    assert CANARY not in answer.text
    assert bad.get("/hooks/ci").status_code == 404


@pytest.fixture
def bad(shared_bridge: Bridge, upstream: Upstream) -> Iterator[httpx.Client]:
    """A bridge in which no hook is made."""
    with httpx.Client(
        base_url=shared_bridge.url, headers={"X-API-Key": KEY}, trust_env=False, timeout=2 * PATIENCE
    ) as client:
        yield client


def test_template_that_loops_is_refused_in_time(bad: httpx.Client) -> None:
    started = time.monotonic()
    loop = "{% set x = namespace(n=[1]) %}{% for i in range(60) %}{% set x.n = x.n + x.n %}{% endfor %}{{ x.n|length }}"
    found = problems(bad.post("/hooks", json={"name": "ci", "room": ROOM, "template": loop}))
    assert len(found) == 1
    assert time.monotonic() - started < PATIENCE


def test_body_that_is_no_object_is_refused(bad: httpx.Client) -> None:
    assert problems(bad.post("/hooks", json=[1])) == {"": "must be a JSON object"}
    assert "is not JSON" in refused(bad.post("/hooks", content=b"{"), 400)
    assert "is not JSON" in refused(bad.post("/hooks", content=b'{"name": NaN}'), 400)
    assert "64 levels" in refused(bad.post("/hooks", content=b"[" * 1_000), 400)


def test_name_that_is_taken_and_token_of_another_hook_are_refused(admin: httpx.Client) -> None:
    made(admin, verification={"secret": CANARY})
    assert refused(admin.post("/hooks", json={"name": "ci", "room": ROOM}), 409) == (
        "there is a hook ci already: PUT /hooks/ci changes it, and so does `flowbridge hooks create ci … --replace`"
    )
    other = {"name": "other", "room": ROOM, "verification": {"secret": CANARY}}
    assert problems(admin.post("/hooks", json=other)) == {
        "/verification/secret": "is the token of another hook: a token says which hook it is"
    }


def test_room_without_the_bot_is_a_warning(admin: httpx.Client, upstream: Upstream) -> None:
    upstream.script(
        lambda request: (
            scripted.matrix_error(403, "M_FORBIDDEN", "not in the room")
            if "/state/m.room.member/" in request.path
            else None
        )
    )
    (warning,) = made(admin)["warnings"]
    bot = scripted.user_of(BOT_TOKEN)
    assert warning == f"{bot} is not in {ROOM}: invite it, or POST /join/{ROOM}; until then messages wait"


def test_homeserver_that_fails_is_a_warning(admin: httpx.Client, upstream: Upstream) -> None:
    upstream.script(
        lambda request: scripted.matrix_error(500, "M_UNKNOWN", "broken") if "/state/" in request.path else None
    )
    (warning,) = made(admin)["warnings"]
    assert warning.startswith(f"whether the bot is in {ROOM} is not known: ")


# who may


def test_only_a_key_with_admin_and_no_limits_administers_hooks(
    bridge: Bridge, admin: httpx.Client, upstream: Upstream, tmp_path: Path
) -> None:
    made(admin)
    calls = [
        ("GET", "/hooks"),
        ("POST", "/hooks"),
        ("GET", "/hooks/ci"),
        ("PUT", "/hooks/ci"),
        ("DELETE", "/hooks/ci"),
        *(("POST", f"/hooks/ci/{each}") for each in ("rotate", "test", "preview")),
        ("GET", "/hooks/ci/requests"),
        ("GET", "/hooks/ci/requests/1"),
    ]
    with as_caller(bridge) as matrix:
        for method, path in calls:
            error = refused(matrix.request(method, path), 403)
            assert error.startswith("hooks act as the bridge's bot, so a Matrix token may not administer them")
    with httpx.Client(base_url=bridge.url, trust_env=False) as nobody:
        for method, path in calls:
            assert nobody.request(method, path).status_code == 401
    assert admin.get("/hooks/ci").status_code == 200


@pytest.mark.parametrize("scopes", [{}, {"admin": True, "rooms": (ROOM,)}, {"admin": True, "event_types": ("m.*",)}])
def test_key_with_limits_administers_none(upstream: Upstream, tmp_path: Path, scopes: Json) -> None:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    secret = api_keys.new_secret()
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("limited", **scopes), secret)
    database.close()
    with running(upstream, tmp_path, api_keys=()) as bridge:
        answer = httpx.get(f"{bridge.url}/hooks", headers={"X-API-Key": secret}, trust_env=False)
        assert "needs `admin`, for all rooms and event types" in refused(answer, 403)


# changing them


def test_changed_hook_keeps_its_secret(bridge: Bridge, admin: httpx.Client, rooms: Rooms) -> None:
    hook = made(admin, template="old: {{ payload.n }}")
    answer = admin.put("/hooks/ci", json={"room": ROOM, "template": "new: {{ payload.n }}"})
    assert answer.status_code == 200, answer.text
    assert not {"secret", "curl"} & answer.json().keys()
    assert answer.json()["template"] == {"markdown": "new: {{ payload.n }}"}
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"n": 1}).status_code == 200
    rooms.wait_for(1)
    assert rooms.bodies == ["new: 1"]


def test_what_is_shown_can_be_changed_and_given_back(admin: httpx.Client) -> None:
    made(admin, template={"markdown": "{{ payload.n }}"}, mention=["@alice:hs"])
    shown = admin.get("/hooks/ci").json()
    answer = admin.put("/hooks/ci", json={**shown, "ignore": ["push"]})
    assert answer.status_code == 200, answer.text
    again = admin.get("/hooks/ci").json()
    assert {**again, "ignore": [], "changed_at": ""} == {**shown, "changed_at": ""}
    assert again["ignore"] == ["push"]


def test_hooks_of_the_file_are_changed_by_the_file_alone(upstream: Upstream, tmp_path: Path, rooms: Rooms) -> None:
    with running(upstream, tmp_path) as bridge:
        body = {"name": "one", "room": "!hidden:upstream"}
        httpx.post(f"{bridge.url}/hooks", json=body, headers={"X-API-Key": KEY}, trust_env=False)
    path = tmp_path / "hooks.yaml"
    path.write_text(
        f"- {{name: one, room: '{ROOM}', verification: {{secret: {CANARY}}}}}\n- {{name: two, room: '{ROOM}'}}\n"
    )
    with (
        running(upstream, tmp_path, hooks_file=path) as bridge,
        httpx.Client(base_url=bridge.url, headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE) as admin,
    ):
        one, two = admin.get("/hooks").json()["hooks"]
        assert (one["room"], one["fixed"], one["hides_another"]) == (ROOM, True, True)
        assert (two["fixed"], "hides_another" in two) == (True, False)
        only = f"the hook one stands in {path}, which alone can change it"
        assert refused(admin.put("/hooks/one", json={"room": ROOM}), 409) == only
        assert refused(admin.delete("/hooks/one"), 409) == only
        assert refused(admin.post("/hooks", json={"name": "two", "room": ROOM}), 409) == (
            f"{path} has a hook two, and alone can change it"
        )
        assert refused(admin.post("/hooks/one/rotate"), 409) == (
            f"{path} has the secret of the hook one, and alone can change it"
        )
        assert CANARY not in admin.get("/hooks/one").text
        assert tell(bridge, f"/hooks/one/{CANARY}", {"text": "one"}).status_code == 200
        assert tell(bridge, f"/hooks/two/{CANARY}", {"text": "two"}).status_code == 401
        secret = admin.post("/hooks/two/rotate").json()["secret"]
        assert tell(bridge, f"/hooks/two/{secret}", {"text": "two"}).status_code == 200
        assert admin.post("/hooks/two/test").status_code == 200
        assert len(admin.get("/hooks/two/requests").json()["requests"]) == 2
        rooms.wait_for(3)


def test_changed_hook_needs_what_a_new_one_needs(admin: httpx.Client) -> None:
    made(admin)
    assert problems(admin.put("/hooks/ci", json={"name": "other", "room": ROOM})) == {
        "/name": "is not the one in the path, 'ci': a hook keeps its name"
    }
    given = {"room": ROOM, "verification": {"secret": CANARY}}
    assert problems(admin.put("/hooks/ci", json=given)) == {
        "/verification/secret": "stays as it is here: POST /hooks/ci/rotate takes another one"
    }
    assert problems(admin.put("/hooks/ci", json={})).keys() == {"/room"}
    assert refused(admin.put("/hooks/other", json={"room": ROOM}), 404) == "there is no hook other"


def test_another_form_of_secret_comes_with_the_scheme_that_needs_it(bridge: Bridge, admin: httpx.Client) -> None:
    hook = made(admin)
    changed = admin.put("/hooks/ci", json={"room": ROOM, "verification": {"scheme": "github"}}).json()
    assert changed["secret"].startswith("fh_")
    assert changed["url"] == "https://bridge.example.org/hooks/ci"
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "x"}).status_code == 401
    assert len(changed["secrets"]) == 1
    same = admin.put("/hooks/ci", json={"room": ROOM, "verification": {"scheme": "gitea"}}).json()
    assert "secret" not in same
    given = {"room": ROOM, "verification": {"scheme": "standard-webhooks", "secret": STANDARD}}
    assert admin.put("/hooks/ci", json=given).json()["secret"] == STANDARD


def test_rotated_secret_holds_beside_the_one_before(bridge: Bridge, admin: httpx.Client) -> None:
    first = made(admin)["secret"]

    def holds(secret: str) -> bool:
        return tell(bridge, f"/hooks/ci/{secret}", {"text": secret[-5:]}).status_code == 200

    second = admin.post("/hooks/ci/rotate").json()["secret"]
    assert (holds(first), holds(second)) == (True, True)
    newest, older = admin.get("/hooks/ci").json()["secrets"]
    assert "until" in older
    assert "until" not in newest
    third = admin.post("/hooks/ci/rotate", json={"secret": CANARY}).json()["secret"]
    assert third == CANARY
    assert (holds(first), holds(second), holds(third)) == (False, True, True)
    fourth = admin.post("/hooks/ci/rotate?now=1").json()["secret"]
    assert (holds(second), holds(third), holds(fourth)) == (False, False, True)
    assert len(admin.get("/hooks/ci").json()["secrets"]) == 1


def test_rotation_refuses_what_is_no_secret(admin: httpx.Client) -> None:
    secret = made(admin)["secret"]
    made(admin, "other", verification={"secret": CANARY})
    assert "at least 16" in problems(admin.post("/hooks/ci/rotate", json={"secret": "short"}))["/secret"]
    assert "must be a string" in problems(admin.post("/hooks/ci/rotate", json={"secret": 5}))["/secret"]
    assert "is unknown here" in problems(admin.post("/hooks/ci/rotate", json={"secrt": "x"}))["/secrt"]
    taken = "is the token of another hook: a token says which hook it is, or this one's already"
    for each in (secret, CANARY):
        assert problems(admin.post("/hooks/ci/rotate", json={"secret": each})) == {"/secret": taken}
    assert "now: must be" in refused(admin.post("/hooks/ci/rotate?now=yes"), 400)
    assert refused(admin.post("/hooks/none/rotate"), 404) == "there is no hook none"


@pytest.mark.parametrize("name", ["%00", "%2e%2e", "CI", "a%2Fb", "%ff", "%F0%9F%98%80", "a" * 65])
def test_name_that_no_hook_can_have_is_not_found(bad: httpx.Client, name: str) -> None:
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/rotate"), ("GET", "/requests")):
        answer = bad.request(method, f"/hooks/{name}{path}", json={"room": ROOM} if method == "PUT" else None)
        assert answer.status_code == 404, answer.text


def test_deleted_hook_takes_nothing_more(bridge: Bridge, admin: httpx.Client) -> None:
    hook = made(admin)
    assert admin.delete("/hooks/ci").json() == {}
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "x"}).status_code == 401
    assert admin.get("/hooks").json() == {"hooks": []}
    assert refused(admin.delete("/hooks/ci"), 404) == "there is no hook ci"
    assert made(admin, verification={"secret": CANARY})["url"].endswith(CANARY)


def test_new_hook_has_no_request_of_an_earlier_one(
    bridge: Bridge, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that came before its hook was deleted, and was done after that."""
    has_come, goes_on = threading.Event(), threading.Event()
    receive = Receiving.receive

    async def late(*arguments: Any) -> Any:
        has_come.set()
        await asyncio.to_thread(goes_on.wait, PATIENCE)
        return await receive(*arguments)

    monkeypatch.setattr(Receiving, "receive", late)
    secret = made(admin)["secret"]
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(tell, bridge, f"/hooks/ci/{secret}", {"text": "x"})
        assert has_come.wait(PATIENCE)
        assert admin.delete("/hooks/ci").json() == {}
        goes_on.set()
        assert answer.result().status_code == 200
    made(admin)
    assert admin.get("/hooks/ci/requests").json() == {"requests": []}


@pytest.fixture
def pair(upstream: Upstream, tmp_path: Path, postgres: LocalPostgres) -> Iterator[tuple[Bridge, Bridge]]:
    """Two replicas on one PostgreSQL."""
    shared: Json = {
        "database_url": SecretStr(postgres.fresh_database()),
        "secret_key": SecretStr(Fernet.generate_key().decode()),
    }
    with running(upstream, tmp_path, **shared) as one, running(upstream, tmp_path, **shared) as other:
        yield one, other


def test_replicas_know_of_each_others_changes(pair: tuple[Bridge, Bridge]) -> None:
    """Of a new hook at once, of all else within 2 s: here within what a busy machine needs."""
    one, other = pair
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=one.url, headers=headers, trust_env=False, timeout=2 * PATIENCE) as admin:
        first = made(admin)["secret"]
        assert tell(other, f"/hooks/ci/{first}", {"text": "first"}).status_code == 200
        second = admin.post("/hooks/ci/rotate").json()["secret"]
        until(lambda: tell(other, f"/hooks/ci/{second}", {"text": "second"}).status_code == 200)
        assert tell(other, f"/hooks/ci/{first}", {"text": "old"}).status_code == 200
        admin.post("/hooks/ci/rotate?now=1")
        until(lambda: tell(other, f"/hooks/ci/{second}", {"text": "gone"}).status_code == 401)
        changed = admin.put("/hooks/ci", json={"room": ROOM, "verification": {"scheme": "gitlab"}}).json()
        own = {"X-Gitlab-Token": changed["secret"]}
        until(
            lambda: (
                httpx.post(f"{other.url}/hooks/ci", json={"text": "x"}, headers=own, trust_env=False).status_code == 200
            )
        )
        assert len(httpx.get(f"{other.url}/hooks/ci/requests", headers=headers, trust_env=False).json()["requests"]) > 2
        admin.delete("/hooks/ci")
        until(
            lambda: (
                httpx.post(f"{other.url}/hooks/ci", json={"text": "x"}, headers=own, trust_env=False).status_code == 401
            )
        )


def test_new_hook_and_new_secret_are_known_at_once_right_after_a_guess(pair: tuple[Bridge, Bridge]) -> None:
    """Guesses look into the store once a second: who comes after one waits for the next look."""
    one, other = pair
    with httpx.Client(base_url=one.url, headers={"X-API-Key": KEY}, trust_env=False, timeout=2 * PATIENCE) as admin:
        assert tell(other, "/hooks/ci/fh_guess", {"text": "guessed"}).status_code == 401
        first = made(admin)["secret"]
        assert tell(other, f"/hooks/ci/{first}", {"text": "first"}).status_code == 200
        assert tell(other, "/hooks/ci/fh_guess", {"text": "guessed"}).status_code == 401
        second = admin.post("/hooks/ci/rotate").json()["secret"]
        assert tell(other, f"/hooks/ci/{second}", {"text": "second"}).status_code == 200
        assert tell(other, "/webhook/fh_guess", {"text": "guessed"}).status_code == 401
        third = admin.post("/hooks/ci/rotate").json()["secret"]
        assert tell(other, f"/webhook/{third}", {"text": "third"}).status_code == 200


def test_another_secret_key_is_a_503_and_no_wrong_secret(upstream: Upstream, tmp_path: Path) -> None:
    headers = {"X-API-Key": KEY}
    with running(upstream, tmp_path) as bridge:
        body = {"name": "ci", "room": ROOM, "verification": {"scheme": "gitlab", "secret": CANARY}}
        assert httpx.post(f"{bridge.url}/hooks", json=body, headers=headers, trust_env=False).status_code == 201
    with running(upstream, tmp_path, secret_key=SecretStr(Fernet.generate_key().decode())) as bridge:
        own = {"X-Gitlab-Token": CANARY}
        answer = httpx.post(f"{bridge.url}/hooks/ci", json={"text": "x"}, headers=own, trust_env=False)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        again = httpx.post(f"{bridge.url}/hooks/ci/rotate", headers=headers, trust_env=False)
        own = {"X-Gitlab-Token": again.json()["secret"]}
        assert httpx.post(f"{bridge.url}/hooks/ci", json={"text": "x"}, headers=own, trust_env=False).status_code == 200


# trying them


@pytest.mark.parametrize("source", ["auto", "generic", "alertmanager", "github"])
def test_sample_is_sent_each_time(bridge: Bridge, admin: httpx.Client, rooms: Rooms, source: str) -> None:
    """Although it tells a story, and has one delivery id."""
    made(admin, source=source)
    answers = [admin.post("/hooks/ci/test") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].json()["messages"] == 1
    assert answers[0].json()["warnings"] == []
    assert answers[0].json()["delivery_id"] != answers[1].json()["delivery_id"]
    events = rooms.wait_for(2)
    assert rooms.bodies[0] == rooms.bodies[1]
    assert not any("m.relates_to" in event.content for event in events)
    assert refused(admin.post("/hooks/none/test"), 404) == "there is no hook none"


def test_preview_shows_what_would_be_sent_and_sends_nothing(admin: httpx.Client, rooms: Rooms) -> None:
    made(admin, template={"markdown": "**{{ payload.title }}** {{ payload.value }}"}, mention=["@alice:hs"])
    found = admin.post("/hooks/ci/preview", json={"body": {"title": "Disk", "value": 0.5}}).json()
    assert found["messages"] == [{"text": "Disk 0.5", "html": "<strong>Disk</strong> 0.5", "event": ""}]
    (event,) = found["events"]
    assert event["type"] == "m.room.message"
    assert event["content"]["formatted_body"] == "<strong>Disk</strong> 0.5"
    assert (found["source"], found["key"], found["state"], found["warnings"]) == ("generic", "", "", [])
    text = admin.post("/hooks/ci/preview", json={"body": '{"title": "Text"}'}).json()
    assert text["messages"][0]["text"].startswith("Text")
    other = {"body": {"title": "Disk"}, "template": {"text": "other: {{ payload.title }}"}}
    assert admin.post("/hooks/ci/preview", json=other).json()["messages"][0]["text"] == "other: Disk"
    assert rooms.bodies == []


def test_template_that_fails_is_refused_in_a_preview_and_in_no_request(
    bridge: Bridge, admin: httpx.Client, rooms: Rooms
) -> None:
    hook = made(admin, template="{{ payload.total / payload.number }}")
    found = problems(admin.post("/hooks/ci/preview", json={"body": {"total": 1, "number": 0}}))
    assert "unable to calculate 1 / 0" in found["/template"]
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"total": 1, "number": 0}).status_code == 200
    assert "unable to calculate" in admin.get("/hooks/ci").json()["failure"]["error"]
    assert tell(bridge, f"/hooks/ci/{hook['secret']}", {"total": 1, "number": 2}).status_code == 200
    assert "failure" not in admin.get("/hooks/ci").json()


def test_request_that_is_not_its_source_s_is_no_failure_of_a_template(bridge: Bridge, admin: httpx.Client) -> None:
    """The line that making a hook prints is such a request."""
    hook = made(admin, source="alertmanager")
    answer = tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "A test of the hook ci"})
    assert "it has no list of alerts" in answer.json()["warnings"][0]
    assert "failure" not in admin.get("/hooks/ci").json()


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({}, {"": "needs one of body and request (the id of a kept request)"}),
        ({"body": 1, "request": "1"}, {"": "needs one of body and request (the id of a kept request)"}),
        ({"bdy": 1}, {"/bdy": "is unknown here: did you mean body?", "": "needs one of body and request"}),
        ({"body": 1, "headers": ["x"]}, {"/headers": "must be an object of strings"}),
        ({"body": 1, "headers": {"x": 1}}, {"/headers": "must be an object of strings"}),
        ({"request": ["1"]}, {"/request": "must be the id of a kept request"}),
        ({"body": 1, "template": "{{"}, {"/template/markdown": "unexpected end of input"}),
    ],
)
def test_preview_of_what_is_none_is_refused(admin: httpx.Client, value: Json, wrong: dict[str, str]) -> None:
    made(admin)
    found = problems(admin.post("/hooks/ci/preview", json=value))
    assert found.keys() == wrong.keys()
    assert all(message in found[pointer] for pointer, message in wrong.items())


# their requests


def test_last_requests_are_kept_and_can_be_previewed(bridge: Bridge, admin: httpx.Client) -> None:
    hook = made(admin, keep_requests=2)
    path = f"/hooks/ci/{hook['secret']}"
    for number in range(3):
        tell(bridge, path, {"text": f"number {number}", "x": CANARY})
    found = admin.get("/hooks/ci/requests").json()["requests"]
    assert len(found) == 2
    newest = admin.get(f"/hooks/ci/requests/{found[0]['id']}").json()
    assert json.loads(newest["body"])["text"] == "number 2"
    assert newest["headers"]["content-type"] == "application/json"
    assert newest["delivery_id"] == admin.get("/deliveries?hook=ci").json()["deliveries"][0]["delivery_id"]
    assert hook["secret"] not in json.dumps(newest)
    previewed = admin.post("/hooks/ci/preview", json={"request": found[1]["id"]}).json()
    assert previewed["messages"][0]["text"] == "number 1"
    for wrong in ("999", "x", "9" * 30):
        assert refused(admin.get(f"/hooks/ci/requests/{wrong}"), 404).startswith("the hook ci has no such request")
        assert admin.post("/hooks/ci/preview", json={"request": wrong}).status_code == 404
    made(admin, "other")
    assert admin.get(f"/hooks/other/requests/{found[0]['id']}").status_code == 404


def test_long_body_is_cut_and_said_so(bridge: Bridge, admin: httpx.Client) -> None:
    hook = made(admin)
    tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "short", "rest": "x" * 100_000})
    (found,) = admin.get("/hooks/ci/requests").json()["requests"]
    assert found["is_cut"] is True
    assert found["size"] > 100_000
    assert len(admin.get(f"/hooks/ci/requests/{found['id']}").json()["body"]) == 64 * 1024


def test_hook_that_keeps_none_has_none(bridge: Bridge, admin: httpx.Client) -> None:
    hook = made(admin, keep_requests=False)
    tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "x"})
    assert admin.get("/hooks/ci/requests").json() == {"requests": []}


# the delivery log


def test_what_came_by_a_hook_is_found_by_its_name(bridge: Bridge, admin: httpx.Client) -> None:
    hook, other = made(admin), made(admin, "other")
    tell(bridge, f"/hooks/ci/{hook['secret']}", {"text": "one"})
    tell(bridge, f"/hooks/other/{other['secret']}", {"text": "two"})
    (found,) = admin.get("/deliveries?hook=ci").json()["deliveries"]
    assert found["hook"] == "ci"
    assert "api_key" not in found
    assert admin.get("/deliveries?hook=none").json()["deliveries"] == []
    assert admin.get(f"/deliveries/{found['delivery_id']}").json()["hook"] == "ci"


# secrets


def test_secrets_are_in_no_answer_but_the_first_and_in_no_log_and_no_file(
    bridge: Bridge, admin: httpx.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    secrets = [made(admin)["secret"], made(admin, "gh", verification={"scheme": "github", "secret": CANARY})["secret"]]
    secrets.append(admin.post("/hooks/ci/rotate").json()["secret"])
    for secret in secrets:
        tell(bridge, f"/hooks/ci/{secret}", {"text": "x"})
    seen = "".join(admin.get(path).text for path in PAGES)
    seen += "".join(str(vars(record)) for record in caplog.records if not record.name.startswith("http"))  # ours
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("flowbridge.db*"))
    for secret in secrets:
        assert secret not in seen
        assert secret.encode() not in stored


def test_line_to_try_it_works_in_a_shell(upstream: Upstream, tmp_path: Path, rooms: Rooms) -> None:
    schemes: list[Json] = [
        {"scheme": "token"},
        *({"scheme": name} for name in ("github", "gitlab", "gitea", "grafana", "slack", "stripe", "pagerduty")),
        {"scheme": "sentry"},
        {"scheme": "standard-webhooks"},
        {"scheme": "gitlab", "secret": STANDARD},
        {"scheme": "grafana", "timestamp_header": "X-Time"},
        {"scheme": "hmac", "header": "X-Own", "prefix": 'v1=$x`"\\', "secret": "it's-a-secret-$of`mine"},
        {"scheme": "hmac", "header": "X-Own", "encoding": "base64", "timestamp_header": "X-Time"},
        {"scheme": "hmac", "header": "X-`false`$HOME", "timestamp_header": "X-`false`$USER"},
        {"scheme": "grafana", "timestamp_header": "X-`false`$HOME"},
    ]
    with running(upstream, tmp_path) as bridge:
        headers = {"X-API-Key": KEY}
        for number, verification in enumerate(schemes):
            body = {"name": f"hook{number}", "room": ROOM, "verification": verification}
            made = httpx.post(f"{bridge.url}/hooks", json=body, headers=headers, trust_env=False, timeout=PATIENCE)
            assert made.status_code == 201, made.text
            assert "\n" not in made.json()["curl"]
            done = subprocess.run(["sh", "-c", made.json()["curl"]], capture_output=True, text=True, timeout=PATIENCE)
            assert json.loads(done.stdout).get("ok") is True, (verification, made.json()["curl"], done.stdout)
        rooms.wait_for(len(schemes))
    assert sorted(rooms.bodies) == sorted(f"A test of the hook hook{number}" for number in range(len(schemes)))
