"""Query parameters: passed on, or refused by name; none is dropped without a word."""

import json
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, ROOM, SEND, Bridge
from tests.http.sends import MATRIX, STATE
from tests.upstream import Request, Upstream

TOPIC = {"topic": "t"}
OF_SENDS: list[tuple[str, str]] = [
    ("user_id", "@ghost:upstream"),
    ("ts", "1234567890123"),
    ("org.matrix.msc4140.delay", "60000"),
    ("org.matrix.msc4140.delay_parent_delay_id", "abc"),
    ("org.matrix.msc4354.sticky_duration_ms", "1000"),
    ("com.example.thing", "a b&c=é"),
]
DIALECTS = ["v3", "r0", "api/v1", "unstable"]


def sent(request: Request) -> tuple[str, str, list[tuple[str, str]], Any]:
    """What went to the homeserver: method, path, parameters, body."""
    parts = urlsplit(request.target)
    return request.method, parts.path, parse_qsl(parts.query), request.json()


# sends on the Matrix surface


@pytest.mark.parametrize(("name", "value"), OF_SENDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_send_with_a_parameter_passes_on_with_it(
    upstream: Upstream, caller: httpx.Client, dialect: str, name: str, value: str
) -> None:
    answer = caller.put(f"/_matrix/client/{dialect}{SEND}/m%2F1", params={name: value}, json=HELLO)
    assert (answer.status_code, answer.json()) == (200, {"event_id": "$event"})
    assert "flowbridge-delivery" not in answer.headers, "the homeserver keeps it, not the bridge"
    path = f"/_matrix/client/{'unstable' if dialect == 'unstable' else 'v3'}{SEND}/m%2F1"
    assert [sent(request) for request in upstream.events] == [("PUT", path, [(name, value)], HELLO)]
    assert upstream.events[0].header("authorization") == caller.headers["authorization"]
    assert upstream.events[0].header("content-type") == "application/json"


@pytest.mark.parametrize(("name", "value"), OF_SENDS)
def test_state_with_a_parameter_passes_on_with_it(
    upstream: Upstream, caller: httpx.Client, name: str, value: str
) -> None:
    answer = caller.put(f"{MATRIX}{STATE}/", params={name: value}, json=TOPIC)
    assert (answer.status_code, answer.json()) == (200, {"event_id": "$event"})
    assert [sent(request) for request in upstream.events] == [("PUT", f"{MATRIX}{STATE}/", [(name, value)], TOPIC)]


def test_what_passes_on_is_checked_before(upstream: Upstream, caller: httpx.Client) -> None:
    wrong = caller.put(f"{MATRIX}{SEND}/1?user_id=@ghost:upstream", json={"msgtype": "m.image", "body": "x"})
    assert (wrong.status_code, wrong.json()["errcode"]) == (400, "M_BAD_JSON")
    assert upstream.events == []
    whole = {"type": "m.room.message", "content": HELLO, "event_id": "$other"}
    assert caller.put(f"{MATRIX}{SEND}/1?ts=1", json=whole).status_code == 200
    assert upstream.events[0].json() == HELLO, "what is checked is what is sent"


def test_what_the_homeserver_says_of_it_is_the_answer(upstream: Upstream, caller: httpx.Client) -> None:
    refusal = scripted.matrix_error(403, "M_FORBIDDEN", "Application service cannot masquerade as this user")
    upstream.script(lambda request: refusal if request.method == "PUT" else None)
    answer = caller.put(f"{MATRIX}{SEND}/1?user_id=@ghost:upstream", json=HELLO)
    assert (answer.status_code, answer.json()["error"]) == (403, "Application service cannot masquerade as this user")
    assert caller.get("/deliveries").json() == {"deliveries": []}


def test_deliveries_are_asked_for_by_their_ids(caller: httpx.Client, rooms: scripted.Rooms) -> None:
    first, _, third = (caller.post(SEND, json=HELLO).headers["flowbridge-delivery"] for _ in range(3))
    found = caller.get(f"/deliveries?id={first},never-was&id={third}").json()["deliveries"]
    assert [each["delivery_id"] for each in found] == [third, first]
    refused = caller.get("/deliveries?id=not%20one")
    assert (refused.status_code, refused.json()["error"]) == (400, "id: 'not one' is not the id of a delivery")


def test_delayed_event_is_answered_as_the_homeserver_does(upstream: Upstream, caller: httpx.Client) -> None:
    upstream.script(lambda request: scripted.answer({"delay_id": "d1"}) if request.method == "PUT" else None)
    answer = caller.put(f"{MATRIX}{SEND}/1?org.matrix.msc4140.delay=60000", json=HELLO)
    assert (answer.status_code, answer.json()) == (200, {"delay_id": "d1"})


def test_encrypted_room_gets_no_plain_text_that_way_either(upstream: Upstream, caller: httpx.Client) -> None:
    encrypted = scripted.answer({"algorithm": "m.megolm.v1.aes-sha2"})
    upstream.always(encrypted, at="m.room.encryption")
    path = "/rooms/!secret:upstream/send/m.room.message"  # of other rooms it is known that they are not
    answer = caller.put(f"{MATRIX}{path}/1?user_id=@ghost:upstream", json=HELLO)
    assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
    assert "encrypted" in answer.json()["error"]
    assert upstream.events == []
    look = next(request for request in upstream.requests if "m.room.encryption" in request.target)
    assert dict(parse_qsl(urlsplit(look.target).query)) == {"user_id": "@ghost:upstream"}, "as who sends"


def test_state_by_the_path_of_messages_takes_no_parameters(upstream: Upstream, caller: httpx.Client) -> None:
    """As a message the homeserver refuses it, or takes it without effect."""
    answer = caller.put(f"{MATRIX}/rooms/{ROOM}/send/m.room.topic/1?ts=1", json=TOPIC)
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_INVALID_PARAM")
    assert answer.json()["error"].startswith("ts: ")
    assert upstream.events == []


@pytest.mark.parametrize("query", ["user_id=", "ts=&user_id=", "user_id", "ts= "])
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_blank_parameter_is_absent(upstream: Upstream, caller: httpx.Client, prefix: str, query: str) -> None:
    answer = caller.put(f"{prefix}{SEND}/1?{query}", json=HELLO)
    assert answer.status_code == 200, answer.text
    assert answer.headers["flowbridge-delivery"]
    assert [urlsplit(request.target).query for request in upstream.events] == [""]


@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_token_in_the_query_is_no_other_parameter(bridge: Bridge, upstream: Upstream, prefix: str) -> None:
    answer = httpx.put(f"{bridge.url}{prefix}{SEND}/1?access_token=tok", json=HELLO, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert all("tok" not in request.target for request in upstream.requests)


@pytest.mark.parametrize(
    "raw", ["user_id=%00", "user_id=%ff", "user_id=%ed%a0%80", "ts=1%0a", f"user_id={'x' * 5_000}"]
)
def test_value_that_no_homeserver_could_read_is_refused(bridge: Bridge, upstream: Upstream, raw: str) -> None:
    for path in (f"{SEND}/1", f"{STATE}/"):
        answer = bridge.post(f"{MATRIX}{path}?{raw}", b'{"body": "x", "msgtype": "m.text", "topic": "t"}', method="PUT")
        assert (answer.status, answer.json()["errcode"]) == (400, "M_INVALID_PARAM"), answer.body
    assert upstream.events == []


def test_no_query_is_too_long_to_be_read(bridge: Bridge) -> None:
    for prefix in ("", MATRIX):
        answer = bridge.post(f"{prefix}{SEND}/1?{'&'.join(['a=b'] * 10_000)}", b'"x"', method="PUT")
        assert answer.status == 400, answer.body


# API keys


def test_api_key_acts_as_nobody_else(bridge: Bridge, upstream: Upstream) -> None:
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=bridge.url, headers=headers, trust_env=False) as key:
        for method, path in (
            ("PUT", f"{SEND}/1"),
            ("PUT", f"{STATE}/"),
            ("GET", f"{STATE}/"),
            ("POST", f"/rooms/{ROOM}/leave"),
            ("POST", f"/join/{ROOM}"),
            ("POST", "/createRoom"),
            ("GET", f"/rooms/{ROOM}/messages"),
            ("GET", "/account/whoami"),
            ("GET", "/initialSync"),
            ("GET", "/events"),
            ("GET", "/sync"),
        ):
            body: Any = None if method == "GET" else {**HELLO, **TOPIC}
            answer = key.request(method, f"{MATRIX}{path}?user_id=@ghost:upstream", json=body)
            assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN"), f"{method} {path}"
        assert upstream.events == []
        assert key.put(f"{MATRIX}{SEND}/1?ts=1", json=HELLO).status_code == 200
        assert urlsplit(upstream.events[0].target).query == "ts=1"


@pytest.mark.parametrize("query", ["x=1;user_id=@ghost:upstream", "ts=1&x;user_id=@ghost:upstream;y=1"])
def test_nothing_hides_behind_a_semicolon(bridge: Bridge, upstream: Upstream, query: str) -> None:
    """Synapse splits a query there."""
    answer = bridge.post(f"{MATRIX}{SEND}/1?{query}", json.dumps(HELLO).encode(), f"X-API-Key: {KEY}", method="PUT")
    assert answer.status == 200
    assert "@ghost" in upstream.events[0].target
    assert ";" not in upstream.events[0].target


# other endpoints of the Matrix surface


@pytest.mark.parametrize(
    ("method", "path", "at"),
    [
        ("GET", "/account/whoami", "/account/whoami"),
        ("GET", f"/rooms/{ROOM}/members", "/members"),
        ("GET", f"/rooms/{ROOM}/joined_members", "/joined_members"),
        ("GET", f"/rooms/{ROOM}/messages", "/messages"),
        ("GET", f"/rooms/{ROOM}/state", "/state"),
        ("GET", f"/rooms/{ROOM}/state/m.room.topic/", "/state/m.room.topic/"),
        ("GET", f"/rooms/{ROOM}/initialSync", "/initialSync"),
        ("GET", "/initialSync", "/initialSync"),
        ("GET", "/events", "/events"),
        ("POST", f"/rooms/{ROOM}/join", ""),
        ("POST", f"/rooms/{ROOM}/leave", "/leave"),
        ("POST", f"/rooms/{ROOM}/invite", "/invite"),
        ("POST", f"/join/{ROOM}", "/join/"),
        ("POST", "/createRoom", "/createRoom"),
        ("POST", "/logout", "/logout"),
        ("POST", "/logout/all", "/logout/all"),
    ],
)
def test_who_asks_as_somebody_is_asked_for_as_that(
    upstream: Upstream, caller: httpx.Client, method: str, path: str, at: str
) -> None:
    parameters = {"user_id": "@ghost:upstream", "org.matrix.msc3202.device_id": "GHOST"}
    body: Any = None if method == "GET" else {}
    caller.request(method, f"{MATRIX}{path}", params=parameters, json=body)
    asked = [request for request in upstream.requests if at in request.target and "ghost" in request.target]
    assert len(asked) == 1, upstream.requests
    assert dict(parse_qsl(urlsplit(asked[0].target).query)).items() >= parameters.items()


def test_parameters_that_we_do_not_know_break_no_client(upstream: Upstream, caller: httpx.Client) -> None:
    upstream.always(scripted.answer({"chunk": []}), at="/messages")
    found = caller.get(f"{MATRIX}/rooms/{ROOM}/messages?dir=b&org.example.thing=1&via=a&via=b")
    assert found.status_code == 200, found.text
    asked = next(request for request in upstream.requests if "/messages" in request.target)
    assert "org.example.thing=1" in asked.target
    assert caller.get(f"{MATRIX}/versions?x=1").status_code == 200
    assert caller.get(f"{MATRIX}/account/whoami?x=1").status_code == 200


# the flow surface


@pytest.mark.parametrize(("name", "value"), [*OF_SENDS, ("acess_token", "x"), ("<script>", "1"), ("\x1b[31m", "1")])
def test_send_on_the_flow_surface_refuses_what_it_does_not_know(
    upstream: Upstream, caller: httpx.Client, name: str, value: str
) -> None:
    for method, path, body in (("POST", SEND, HELLO), ("PUT", f"{SEND}/1", HELLO), ("PUT", STATE, TOPIC)):
        answer = caller.request(method, path, params={name: value}, json=body)
        assert (answer.status_code, answer.json()["errcode"]) == (400, "M_INVALID_PARAM")
        assert name.isprintable() is (name in answer.json()["error"])
        assert "access_token" in answer.json()["error"], "what is known is listed"
        assert ("/_matrix/client/v3" in answer.json()["error"]) is (name in dict(OF_SENDS[:4]))
    assert upstream.events == []


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", STATE, "format"),
        ("GET", "/deliveries", "state"),
        ("GET", "/deliveries/x", ""),
        ("POST", "/deliveries/x/replay", "overwrite"),
        ("DELETE", "/deliveries/x", ""),
        ("GET", "/rooms", ""),
        ("POST", "/rooms", ""),
        ("POST", f"/rooms/{ROOM}/invite", ""),
        ("POST", f"/join/{ROOM}", "server_name"),
        ("GET", f"/rooms/{ROOM}/messages", "from"),
        ("GET", "/initialSync", "limit"),
        ("GET", "/events", "timeout"),
        ("GET", "/live", "types"),
        ("GET", f"/rooms/{ROOM}/live", "types"),
        ("POST", "/media", "filename"),
        ("GET", "/media/a/b", "allow_remote"),
        ("GET", "/media/a/b/thumbnail", "width"),
        ("GET", "/whoami", ""),
        ("POST", "/logout", ""),
        ("POST", "/register", ""),
        ("GET", "/schemas", ""),
        ("POST", "/validate/m.room.message", ""),
    ],
)
def test_endpoint_of_ours_refuses_a_parameter_by_name(
    caller: httpx.Client, upstream: Upstream, method: str, path: str, known: str
) -> None:
    answer = caller.request(method, f"{path}?foo=bar")
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_INVALID_PARAM"), answer.text
    assert answer.json()["error"].startswith("foo: ")
    assert known in answer.json()["error"]
    assert upstream.events == []


def test_probes_and_pages_may_add_what_they_like(caller: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/swagger-ui.css"):
        assert caller.get(f"{path}?v=1").status_code == 200, path
    assert caller.get("/login/fallback?device_id=D").json()["errcode"] != "M_INVALID_PARAM"


def test_parameters_of_the_flow_surface_may_come_twice_or_encoded(caller: httpx.Client) -> None:
    assert caller.get(f"/deliveries?{quote('state', safe='')}=dead&state=sent").status_code == 200
