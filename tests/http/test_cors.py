"""Web pages and the flow surface: FLOWBRIDGE_CORS_ORIGINS, and what is told without it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, ROOM, SEND, Bridge, RawClient, as_caller, running
from tests.http.sends import UNKNOWN_TOKEN
from tests.processes import free_port
from tests.upstream import Upstream

PAGE = "https://app.example.org"
OTHER = "https://evil.example.org"
LIVE = f"/rooms/{ROOM}/live"
EXPOSED = {"Flowbridge-Delivery", "Idempotent-Replayed", "Location", "Retry-After"}
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key,x-api-key"}


@pytest.fixture
def open_bridge(upstream: Upstream, tmp_path: Path) -> Iterator[Bridge]:
    with running(upstream, tmp_path, cors_origins=(PAGE, "http://localhost:3000")) as bridge:
        yield bridge


@pytest.fixture
def anyone(open_bridge: Bridge) -> Iterator[httpx.Client]:
    with as_caller(open_bridge) as client:
        yield client


def check_readable(answer: httpx.Response, origin: str = PAGE) -> None:
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    assert {*answer.headers["access-control-expose-headers"].split(", ")} == EXPOSED
    assert "access-control-allow-credentials" not in answer.headers
    assert [value for value in answer.headers.get_list("vary") if "Origin" in value] == ["Origin"]


def check_unreadable(answer: httpx.Response) -> None:
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (SEND, "OPTIONS, POST, PUT"),
        (f"{SEND}/txn%2F1", "OPTIONS, PUT"),
        (LIVE, "GET, HEAD, OPTIONS"),
        ("/whoami", "GET, HEAD, OPTIONS"),
        ("/validate/m.room.message", "OPTIONS, POST"),
        ("/media", "OPTIONS, POST"),
        ("/hooks/ci", "DELETE, GET, HEAD, OPTIONS, POST, PUT"),  # where CloudEvents' OPTIONS is answered, too
        ("/healthz", "GET, HEAD, OPTIONS"),
    ],
)
def test_preflight_is_answered_without_a_token(open_bridge: Bridge, path: str, methods: str) -> None:
    answer = httpx.options(f"{open_bridge.url}{path}", headers={"Origin": PAGE, **ASKS}, trust_env=False)
    assert (answer.status_code, answer.content) == (204, b"")
    check_readable(answer)
    assert {*answer.headers["access-control-allow-methods"].split(", ")} >= {*methods.split(", ")}
    allowed = {*answer.headers["access-control-allow-headers"].lower().split(", ")}
    wanted = ("authorization", "x-api-key", "idempotency-key", "prefer", "last-event-id", "content-type")
    assert allowed.issuperset(wanted)
    assert answer.headers["access-control-max-age"] == "600"
    assert open_bridge.upstream.requests == []


def test_preflight_of_another_page_names_the_setting(anyone: httpx.Client) -> None:
    for origin in (OTHER, "null", f"{PAGE}.evil.example.org", f"{PAGE}:8443", "http://app.example.org"):
        answer = anyone.options(SEND, headers={"Origin": origin, **ASKS})
        assert (answer.status_code, answer.json()["errcode"]) == (403, "M_FORBIDDEN")
        text = f"web pages of {origin} may not call this: FLOWBRIDGE_CORS_ORIGINS does not name it"
        assert answer.json()["error"] == text
        check_unreadable(answer)


def test_options_that_no_browser_sends_names_the_methods(anyone: httpx.Client) -> None:
    answer = anyone.options(SEND)
    assert (answer.status_code, answer.headers["allow"]) == (204, "OPTIONS, POST, PUT")
    check_unreadable(answer)


def test_page_may_read_a_send_and_others_may_not(anyone: httpx.Client) -> None:
    answer = anyone.post(SEND, json=HELLO, headers={"Origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["flowbridge-delivery"]
    check_readable(answer)
    check_readable(anyone.get("/whoami", headers={"Origin": "http://localhost:3000"}), "http://localhost:3000")
    for headers in ({"Origin": OTHER}, {}):
        answer = anyone.get("/whoami", headers=headers)
        assert answer.status_code == 200
        check_unreadable(answer)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", SEND, "{", 400),
        ("GET", "/nothing/here", "", 404),
        ("PUT", "/whoami", "", 405),
        ("GET", "/rooms/nonsense/live", "", 400),
        ("POST", SEND, "x" * 600_000, 413),
        ("POST", "/rooms/nonsense/send/m.room.message", '{"body": "x"}', 400),
    ],
)
def test_page_may_read_an_error(anyone: httpx.Client, method: str, path: str, body: str, status: int) -> None:
    answer = anyone.request(method, path, content=body, headers={"Origin": PAGE})
    assert answer.status_code == status
    assert answer.json()["errcode"].startswith("M_")
    check_readable(answer)


def test_page_may_read_a_refusal(open_bridge: Bridge, upstream: Upstream) -> None:
    answer = httpx.post(f"{open_bridge.url}{SEND}", json=HELLO, headers={"Origin": PAGE}, trust_env=False)
    assert answer.status_code == 401
    check_readable(answer)
    upstream.always(UNKNOWN_TOKEN, at="/whoami")
    with as_caller(open_bridge) as caller:
        answer = caller.get(LIVE, headers={"Origin": PAGE})
    assert answer.status_code == 401
    check_readable(answer)


def test_page_may_read_that_it_asks_too_often(upstream: Upstream, tmp_path: Path) -> None:
    with running(upstream, tmp_path, cors_origins=(PAGE,), wrong_keys_per_minute=1) as bridge:
        for _ in range(3):
            answer = httpx.get(
                f"{bridge.url}/whoami", headers={"Origin": PAGE, "X-API-Key": "fb_wrong"}, trust_env=False
            )
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        check_readable(answer)


def test_page_may_read_what_is_refused_before_it_is_a_request(open_bridge: Bridge) -> None:
    with RawClient(open_bridge.url) as client:
        answer = client.send(b"nonsense\r\n\r\n").answer()
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (400, "*")


def test_live_stream_is_readable_from_its_first_byte(open_bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.answer({"next_batch": "s1"}), at="/sync")
    with as_caller(open_bridge) as caller, caller.stream("GET", "/live", headers={"Origin": PAGE}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        check_readable(answer)


def test_all_pages_may_call_when_it_says_so(upstream: Upstream, tmp_path: Path) -> None:
    with running(upstream, tmp_path, cors_origins=("*",)) as bridge, as_caller(bridge) as caller:
        for headers in ({"Origin": OTHER}, {"Origin": "null"}, {}):
            answer = caller.get("/whoami", headers=headers)
            assert answer.headers.get_list("access-control-allow-origin") == ["*"]
            assert "vary" not in answer.headers
        assert caller.options(SEND, headers={"Origin": OTHER, **ASKS}).status_code == 204


def test_matrix_surface_is_open_to_all_pages_whatever_the_setting_is(anyone: httpx.Client) -> None:
    for path in ("/_matrix/client/versions", "/.well-known/matrix/client"):
        for answer in (anyone.get(path, headers={"Origin": OTHER}), anyone.options(path, headers={"Origin": OTHER})):
            assert answer.headers.get_list("access-control-allow-origin") == ["*"]


def test_port_for_operators_is_for_no_page(upstream: Upstream, tmp_path: Path) -> None:
    port = free_port()
    with running(upstream, tmp_path, cors_origins=("*",), operations_port=port):
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Origin": PAGE}, trust_env=False)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_without_the_setting_options_names_it(caller: httpx.Client) -> None:
    answer = caller.options(SEND, headers={"Origin": PAGE, **ASKS})
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST, PUT")
    assert answer.json()["error"] == (
        "OPTIONS is not served on this path; POST, PUT is; web pages of other origins may call it when "
        "FLOWBRIDGE_CORS_ORIGINS names them"
    )
    assert "vary" not in answer.headers
    assert "access-control-allow-origin" not in caller.get("/whoami", headers={"Origin": PAGE}).headers


def test_key_of_a_page_may_lie_in_the_address(open_bridge: Bridge) -> None:
    """An EventSource sends no headers of its own."""
    url = f"{open_bridge.url}/whoami?access_token={KEY}"
    assert httpx.get(url, headers={"Origin": PAGE}, trust_env=False).status_code == 200
