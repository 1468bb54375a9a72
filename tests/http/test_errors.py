"""Contract §1, "Errors": whatever goes wrong, the answer is a Matrix error with the right status."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.auth.callers import Callers
from flowbridge.models.timing import Timing
from flowbridge.web.server import background
from tests import upstream as scripted
from tests.http.conftest import (
    HASTE_SECONDS,
    HELLO,
    KEY,
    PATIENT,
    REQUEST_SECONDS,
    ROOM,
    SEND,
    SHORT_REQUEST_SECONDS,
    Bridge,
    Elapsed,
    as_caller,
    post,
    running,
    settings_for,
)
from tests.http.sends import MATRIX, check_queued, repeated
from tests.upstream import Behaviour, Rooms, Upstream

STATE = f"/rooms/{ROOM}/state/m.room.name"
WHOAMI = "/_matrix/client/v3/account/whoami"


def check_error(answer: httpx.Response, status: int, errcode: str) -> dict[str, Any]:
    """The answer's body, when it is this Matrix error and nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["errcode"] == errcode
    assert isinstance(found["error"], str)
    assert found["error"]
    assert "detail" not in found
    assert "Traceback" not in answer.text
    assert "<html" not in answer.text
    return dict(found)


def targets(upstream: Upstream) -> list[str]:
    return [request.target for request in upstream.requests]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/healthz/",
        "/healthz/more",
        "/rooms/",
        f"/rooms/{ROOM}/send",
        f"/rooms/{ROOM}/send/m.room.message/1/2",
        "/rooms/%2F/nothing",
        "/" + "a/" * 2_000,
        "/schemas/components/image_info.json/more",
        "/_matrix",
        "/redoc",
        "/nothing?access_token=x",
    ],
)
def test_unknown_path_is_a_404(caller: httpx.Client, upstream: Upstream, method: str, path: str) -> None:
    check_error(caller.request(method, path), 404, "M_UNRECOGNIZED")
    assert upstream.requests == []


@pytest.mark.parametrize("path", ["/healthz//", f"/rooms//{ROOM}/send/m.room.message", "//", "/schemas/components"])
def test_path_that_is_nearly_known_is_a_404(bridge: Bridge, path: str) -> None:
    answer = bridge.post(path, json.dumps(HELLO).encode(), method="GET")
    assert answer.headers["content-type"] == "application/json"
    assert answer.status == 404
    assert answer.json()["errcode"] in ("M_UNRECOGNIZED", "M_NOT_FOUND")
    assert bridge.upstream.requests == []


@pytest.mark.parametrize("path", ["/nothing", "//", "/a/b/c/d/e/f", f"/rooms/{quote(ROOM)}/send"])
def test_head_of_an_unknown_path_is_a_404_without_a_body(bridge: Bridge, path: str) -> None:
    with bridge.connect() as client:
        first = client.send(post(path, method="HEAD")).answer("HEAD")
        second = client.send(post("/healthz", method="GET")).answer()
    assert (first.status, first.headers["content-type"]) == (404, "application/json")
    assert second.status == 200


@pytest.mark.parametrize(
    "target",
    [
        f"/rooms%2F{ROOM}/send/m.room.message",
        f"/rooms/{ROOM}%2Fsend%2Fm.room.message",
        f"/rooms/{ROOM}/send%2Fm.room.message",
        f"/_matrix%2Fclient%2Fv3%2Frooms%2F{ROOM}%2Fsend%2Fm.room.message%2F1",
        "/validate%2Fm.room.message",
    ],
)
def test_encoded_slash_is_no_path_separator(bridge: Bridge, target: str) -> None:
    answer = bridge.post(target, json.dumps(HELLO).encode(), method="PUT")
    assert answer.headers["content-type"] == "application/json"
    assert answer.status == 404
    assert answer.json()["errcode"] == "M_UNRECOGNIZED"
    assert bridge.upstream.requests == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", SEND, {"POST", "PUT"}),
        ("HEAD", SEND, {"POST", "PUT"}),
        ("DELETE", f"{SEND}/1", {"POST", "PUT"}),
        ("PATCH", f"{SEND}/1", {"POST", "PUT"}),
        ("POST", STATE, {"GET", "HEAD", "PUT"}),
        ("DELETE", f"{STATE}/", {"GET", "HEAD", "PUT"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("DELETE", "/schemas", {"GET", "HEAD"}),
        ("GET", "/validate/m.room.message", {"POST"}),
        ("PUT", "/openapi.json", {"GET", "HEAD"}),
        ("OPTIONS", "/readyz", {"GET", "HEAD"}),
    ],
)
def test_wrong_method_is_a_405_that_names_the_right_ones(
    caller: httpx.Client, upstream: Upstream, method: str, path: str, allowed: set[str]
) -> None:
    answer = caller.request(method, path)
    assert set(answer.headers["allow"].split(", ")) == allowed
    if method == "HEAD":
        assert answer.status_code == 405
    else:
        check_error(answer, 405, "M_UNRECOGNIZED")
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("status", "errcode"),
    [(400, "M_BAD_JSON"), (403, "M_FORBIDDEN"), (404, "M_NOT_FOUND"), (413, "M_TOO_LARGE"), (418, "ORG_TEAPOT")],
)
@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_homeservers_own_error_passes(
    caller: httpx.Client, upstream: Upstream, prefix: str, status: int, errcode: str
) -> None:
    upstream.always(scripted.matrix_error(status, errcode, "its own text", room_version="12"), at="/send/")
    found = check_error(caller.post(prefix + SEND, json=HELLO), status, errcode)
    assert found == {"errcode": errcode, "error": "its own text", "room_version": "12"}
    assert len(upstream.events) == 1
    upstream.always(scripted.matrix_error(status, errcode, "its own text"), at="/state/")
    check_error(caller.get(prefix + STATE), status, errcode)
    check_error(caller.put(prefix + STATE, json={"name": "n"}), status, errcode)


@pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])
def test_homeservers_own_500_passes_where_state_is_read(caller: httpx.Client, upstream: Upstream, prefix: str) -> None:
    upstream.always(scripted.matrix_error(500, "M_UNKNOWN", "its own text", room_version="12"), at="/state/")
    found = check_error(caller.get(prefix + STATE), 500, "M_UNKNOWN")
    assert found == {"errcode": "M_UNKNOWN", "error": "its own text", "room_version": "12"}


@pytest.mark.parametrize(
    ("behaviour", "pause_ms"),
    [
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms=1_234), 1_234, id="body"),
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", "Retry-After: 7"), 7_000, id="header"),
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow"), 500, id="not-said"),
        pytest.param(scripted.raw(scripted.encoded(429, b"slow down", "Retry-After: 3")), 3_000, id="by-a-proxy"),
        pytest.param(scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms="soon"), 500, id="a-word"),
        pytest.param(
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slow", retry_after_ms=10**30), 60_000, id="for-ever"
        ),
    ],
)
def test_rate_limit_that_does_not_end_in_time_passes_with_what_is_left_of_it(
    hasty_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, pause_ms: int, elapsed: Elapsed
) -> None:
    upstream.always(behaviour, at="/send/")
    answer = repeated(
        lambda: hasty_caller.post(MATRIX + SEND, json=HELLO), lambda found: found.status_code == 429 and upstream.events
    )
    left_ms = check_error(answer, 429, "M_LIMIT_EXCEEDED")["retry_after_ms"]
    assert answer.headers["retry-after"] == str(-(-left_ms // 1_000))
    assert pause_ms - elapsed() * 1_000 <= left_ms <= pause_ms * 1.02
    assert len(upstream.events) == 1, "nobody asks while it lasts"
    check_queued(hasty_caller.post(SEND, json=HELLO))


@pytest.mark.parametrize("status", [200, 201, 204, 304, 404, 500, 502, 503])
def test_html_from_upstream_is_waited_out(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, status: int
) -> None:
    check_waited_out(hasty, hasty_caller, upstream, scripted.html(status), 502)


def check_waited_out(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, status: int
) -> list[dict[str, Any]]:
    """The event is accepted, and in the room when the fault has passed; the attempts at it, of that status."""
    upstream.always(behaviour, at="/send/")
    delivery = check_queued(caller.post(SEND, json=HELLO))
    upstream.wait_for_events(1)
    rooms = Rooms()
    upstream.script(rooms)
    found = bridge.wait_until(delivery, "sent")
    assert [event.content for event in rooms.events] == [HELLO]
    assert found["event_id"] == "$1"
    failed: list[dict[str, Any]]
    *failed, last = found["history"]
    assert last["status"] == 200
    assert failed
    assert {(attempt["status"], attempt["errcode"]) for attempt in failed} == {(status, "M_UNKNOWN")}
    assert all(attempt["error"] for attempt in failed)
    return failed


@pytest.mark.parametrize("path", [STATE, "/_matrix/client/versions", f"/_matrix/client/v3{STATE}/"])
def test_html_with_a_200_is_a_502_for_reads_too(caller: httpx.Client, upstream: Upstream, path: str) -> None:
    caller.post(SEND, json=HELLO)  # the token is known from here on
    upstream.always(scripted.html(200))
    check_error(caller.get(path), 502, "M_UNKNOWN")


def test_bridge_is_not_ready_when_html_answers_for_the_homeserver(caller: httpx.Client, upstream: Upstream) -> None:
    assert caller.get("/readyz").status_code == 200
    upstream.always(scripted.html(200), at="/versions")
    check_error(caller.get("/readyz"), 503, "M_UNKNOWN")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, status: int) -> None:
    moved = scripted.redirect(f"{upstream.url}/elsewhere", status)
    check_waited_out(hasty, hasty_caller, upstream, moved, 502)
    assert len({request.target for request in upstream.events}) == 1
    assert "/elsewhere" not in targets(upstream)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.hang_up, id="hangs-up"),
        pytest.param(scripted.raw(b"\0" * 64), id="no-http"),
        pytest.param(
            scripted.then_close(scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")), id="breaks-off"
        ),
        pytest.param(scripted.raw(scripted.encoded(200, b"x" * 1_000_000)), id="a-megabyte"),
        pytest.param(scripted.raw(scripted.encoded(200, b"{", "Content-Type: application/json")), id="half-json"),
        pytest.param(scripted.answer([]), id="a-list"),
        pytest.param(scripted.answer(None), id="null"),
        pytest.param(scripted.answer({}), id="no-event-id"),
        pytest.param(scripted.answer({"event_id": 1}), id="event-id-is-a-number"),
        pytest.param(scripted.answer({"event_id": ""}), id="event-id-is-empty"),
        pytest.param(scripted.answer({"errcode": "M_X"}), id="error-with-a-200"),
        pytest.param(scripted.answer({"errcode": 3, "error": "x"}, 403), id="errcode-is-a-number"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 302), id="error-with-a-302"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 600), id="status-600"),
        pytest.param(scripted.answer({"errcode": "M_X", "error": "x"}, 999), id="status-999"),
        pytest.param(scripted.raw(scripted.encoded(403, b"[" * 60_000)), id="deep-json"),
    ],
)
def test_nonsense_from_upstream_is_waited_out(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour
) -> None:
    check_waited_out(hasty, hasty_caller, upstream, behaviour, 502)
    assert hasty_caller.post(SEND, json=HELLO, headers=PATIENT).json() == {"event_id": "$2"}


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        pytest.param(scripted.html(404), "answered 404 with no Matrix error (text/html)", id="html"),
        pytest.param(scripted.html(200), "answered 200 without an event_id", id="no-event-id"),
        pytest.param(scripted.hang_up, "closed the connection without an answer", id="hangs-up"),
        pytest.param(scripted.raw(b"\0" * 64), "is not HTTP/1.1", id="no-http"),
    ],
)
def test_delivery_says_what_came_instead_of_an_answer(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, says: str
) -> None:
    for attempt in check_waited_out(hasty, hasty_caller, upstream, behaviour, 502):
        assert says in attempt["error"]


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.matrix_error(500, "M_UNKNOWN", "Internal server error"), id="500"),
        pytest.param(scripted.matrix_error(503, "ORG_BUSY", "Workers are away"), id="503"),
        pytest.param(scripted.matrix_error(404, "M_UNRECOGNIZED", "Unrecognized request"), id="unrecognized"),
        pytest.param(scripted.html(), id="html"),
        pytest.param(scripted.answer({}), id="no-event-id"),
        pytest.param(scripted.hang_up, id="hangs-up"),
    ],
)
def test_fault_that_passes_in_time_is_not_heard_of(
    quick_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour
) -> None:
    rooms = Rooms()
    for number, path in enumerate((SEND, MATRIX + SEND), 1):
        left = [behaviour, behaviour]

        def script(request: scripted.Request, left: list[Behaviour] = left) -> Behaviour | None:
            return left.pop() if left and "/send/" in request.target else rooms(request)

        upstream.script(script)
        answer = quick_caller.post(path, json=HELLO)
        assert (answer.status_code, answer.json()) == (200, {"event_id": f"${number}"})
        assert left == []


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.matrix_error(500, "M_UNKNOWN", "Internal server error"), id="500"),
        pytest.param(scripted.matrix_error(404, "M_UNRECOGNIZED", "Unrecognized request"), id="unrecognized"),
        pytest.param(scripted.html(), id="html"),
        pytest.param(scripted.answer({}), id="no-event-id"),
        pytest.param(scripted.hang_up, id="hangs-up"),
        pytest.param(scripted.silence, id="silent"),
    ],
)
def test_fault_after_which_nobody_knows_is_a_504_on_the_matrix_surface(
    hasty_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour
) -> None:
    upstream.always(behaviour, at="/send/")
    answer = repeated(
        lambda: hasty_caller.put(f"{MATRIX}{SEND}/txn", json=HELLO), lambda found: found.status_code != 429
    )
    found = check_error(answer, 504, "M_UNKNOWN")
    assert "the same txnId" in found["error"]
    rooms = Rooms()
    upstream.script(rooms)
    upstream.drop()
    again = repeated(
        lambda: hasty_caller.put(f"{MATRIX}{SEND}/txn", json=HELLO), lambda found: found.status_code != 504
    )
    assert again.json() == {"event_id": "$1"}
    assert again.headers["flowbridge-delivery"] == answer.headers["flowbridge-delivery"]
    assert again.headers["idempotent-replayed"] == "true"
    assert len(rooms.events) == 1


@pytest.mark.parametrize(
    "extra",
    [
        {"retry_after_ms": 10**400},
        {"retry_after_ms": -5},
        {"retry_after_ms": True},
        {"retry_after_ms": None},
        {"text": "\ud800"},
        {"self": 1, "status": 2, "errors": 3},
        {"nested": json.loads("[" * 500 + "]" * 500)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_odd_extras_of_an_error_still_give_a_json_answer(
    caller: httpx.Client, upstream: Upstream, extra: dict[str, Any]
) -> None:
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": "no", **extra}, 403), at="/send/")
    answer = caller.post(SEND, json=HELLO)
    check_error(answer, 403, "M_FORBIDDEN")
    assert int(answer.headers.get("retry-after", "0")) >= 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_is_no_json_is_not_passed_on(hasty_caller: httpx.Client, upstream: Upstream, number: float) -> None:
    """This is no answer that a homeserver gives."""
    assert hasty_caller.post(SEND, json=HELLO, headers=PATIENT).status_code == 200
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": "no", "number": number}, 403))
    delivery = check_queued(hasty_caller.post(SEND, json=HELLO))
    for answer in (hasty_caller.get(STATE), hasty_caller.get(f"/deliveries/{delivery}")):
        assert "NaN" not in answer.text
        assert "Infinity" not in answer.text


def test_error_text_that_is_no_text_gives_way_to_the_errcode(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.answer({"errcode": "M_FORBIDDEN", "error": {"a": 1}}, 403), at="/send/")
    assert check_error(caller.post(SEND, json=HELLO), 403, "M_FORBIDDEN")["error"] == "M_FORBIDDEN"


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_dead_upstream_is_told_to_who_cannot_be_known(dead_port: int, tmp_path: Path, elapsed: Elapsed) -> None:
    """A token that was never seen: nobody can tell whose it is."""
    with (
        background(settings_for(f"http://127.0.0.1:{dead_port}", tmp_path)) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer t"}, trust_env=False) as caller,
    ):
        refused = f"cannot connect to http://127.0.0.1:{dead_port}"
        for answer in (
            caller.post(SEND, json=HELLO),
            caller.post(MATRIX + SEND, json=HELLO),
            caller.get(STATE),
        ):
            assert refused in check_error(answer, 503, "M_UNKNOWN")["error"]
            assert answer.headers["retry-after"] == "1"
        assert refused in check_error(caller.get("/_matrix/client/versions"), 502, "M_UNKNOWN")["error"]
        found = check_error(caller.get("/readyz"), 503, "M_UNKNOWN")
        assert refused in found["error"]
        assert found["flowbridge"]["failed"] == "homeserver"
        assert caller.get("/healthz").status_code == 200
        assert caller.post("/validate/m.room.message", json=HELLO).status_code == 200
        assert elapsed() < REQUEST_SECONDS


def test_dead_upstream_is_a_502_on_the_matrix_surface_and_nothing_is_sent_later(tmp_path: Path) -> None:
    rooms = Rooms()
    with (
        Upstream(rooms) as upstream,
        running(upstream, tmp_path, wait_seconds=HASTE_SECONDS) as bridge,
        as_caller(bridge) as caller,
    ):
        assert caller.post(SEND, json=HELLO, headers=PATIENT).status_code == 200
        upstream.refuse()
        upstream.drop()
        answer = repeated(
            lambda: caller.put(f"{MATRIX}{SEND}/txn", json={**HELLO, "body": "withdrawn"}),
            lambda found: found.status_code != 429,  # it was not even tried in time
        )
        assert f"cannot connect to {upstream.url}" in check_error(answer, 502, "M_UNKNOWN")["error"]
        assert answer.headers["flowbridge-delivery"]
        assert bridge.queued() == []
        accepted = check_queued(caller.post(SEND, json={**HELLO, "body": "accepted"}))
        answer = caller.put(f"{MATRIX}{SEND}/txn", json={**HELLO, "body": "withdrawn"})
        check_error(answer, 429, "M_LIMIT_EXCEEDED")  # behind what was accepted, it was not even tried
        assert bridge.queued() == [accepted]
        upstream.listen()
        bridge.wait_until(accepted, "sent")
        assert rooms.bodies == ["hello", "accepted"]
        answer = caller.put(f"{MATRIX}{SEND}/txn", json={**HELLO, "body": "withdrawn"}, headers=PATIENT)
        assert answer.json() == {"event_id": "$3"}
        assert "idempotent-replayed" not in answer.headers


def test_upstream_that_dies_and_comes_back_needs_no_restart(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream
) -> None:
    assert hasty_caller.post(SEND, json=HELLO, headers=PATIENT).status_code == 200
    upstream.always(scripted.hang_up)
    delivery = check_queued(hasty_caller.post(SEND, json=HELLO))
    upstream.script(None)
    hasty.wait_until(delivery, "sent")
    assert hasty_caller.post(SEND, json=HELLO, headers=PATIENT).status_code == 200


SILENT = [
    pytest.param(scripted.silence, id="silent"),
    pytest.param(scripted.drip(b"HTTP/1.1 200 OK\r\n\r\n", 0.1), id="dripping"),
]


@pytest.mark.parametrize("behaviour", SILENT)
def test_silent_upstream_is_a_503_for_who_is_not_known(
    impatient: Bridge, upstream: Upstream, behaviour: Behaviour, elapsed: Elapsed
) -> None:
    upstream.always(behaviour, at="/whoami")
    with as_caller(impatient) as caller:
        answer = caller.post(SEND, json=HELLO)
    assert "did not answer in time" in check_error(answer, 503, "M_UNKNOWN")["error"]
    assert answer.headers["retry-after"] == "1"
    assert "flowbridge-delivery" not in answer.headers
    assert elapsed() >= SHORT_REQUEST_SECONDS
    assert upstream.events == []


@pytest.mark.parametrize("behaviour", SILENT)
def test_silent_upstream_is_answered_within_the_wait(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, elapsed: Elapsed
) -> None:
    upstream.always(behaviour, at="/send/")
    check_queued(hasty_caller.post(SEND, json=HELLO))
    check_error(hasty_caller.post(MATRIX + SEND, json=HELLO), 429, "M_LIMIT_EXCEEDED")  # the first is before it
    assert elapsed() < REQUEST_SECONDS
    upstream.wait_for_events(1)
    assert len(upstream.events) == 1


@pytest.mark.parametrize("behaviour", SILENT)
def test_attempt_at_a_silent_upstream_ends_and_is_made_again(
    impatient: Bridge, upstream: Upstream, behaviour: Behaviour
) -> None:
    upstream.always(behaviour, at="/send/")
    with as_caller(impatient) as caller:
        delivery = check_queued(caller.post(SEND, json=HELLO))
    upstream.wait_for_events(1)
    upstream.script(None)
    attempt, *_ = impatient.wait_until(delivery, "sent")["history"]
    assert (attempt["status"], attempt["error"]) == (504, "the homeserver did not answer in time")
    assert attempt["milliseconds"] >= SHORT_REQUEST_SECONDS * 900


def test_silent_upstream_does_not_hold_up_others(hasty: Bridge, hasty_caller: httpx.Client, elapsed: Elapsed) -> None:
    hasty.upstream.always(scripted.silence, at="/send/")
    with hasty.connect() as other:
        other.send(post(SEND, json.dumps(HELLO).encode(), "Prefer: wait=300"))
        hasty.upstream.wait_for_events(1)
        assert hasty_caller.get(STATE).status_code == 200
        assert hasty_caller.get("/healthz").status_code == 200
        assert elapsed() < REQUEST_SECONDS
        assert not other.is_closed(0.01), "it still waits"


def test_path_of_any_length_makes_a_short_line(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flowbridge"):
        assert bridge.ask(post("/" + "x" * 30_000, method="GET")).status == 404
        assert bridge.ask(post("/healthz", method="GET")).status == 200  # the first line is written by now
    assert max(len(str(getattr(record, "fields", ""))) for record in caplog.records) < 2_000


UNKNOWN_TOKEN = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Access token has expired", soft_logout=True)


def test_whoami_of_a_token_is_asked_once(caller: httpx.Client, upstream: Upstream) -> None:
    for _ in range(5):
        assert caller.post(SEND, json=HELLO).status_code == 200
    assert targets(upstream).count(WHOAMI) == 1


def test_whoami_that_is_asked_by_many_at_once_is_asked_once(bridge: Bridge) -> None:
    go = threading.Event()
    bridge.upstream.always(scripted.when(go, scripted.answer({"user_id": "@a:b"})), at="/whoami")
    request = post(SEND, json.dumps(HELLO).encode(), "Authorization: Bearer asked-by-many")
    clients = [bridge.connect().send(request) for _ in range(10)]
    try:
        bridge.upstream.wait_for_requests(1)
        go.set()
        assert [client.answer().status for client in clients] == [200] * 10
    finally:
        for client in clients:
            client.__exit__()
    assert targets(bridge.upstream).count(WHOAMI) == 1


@pytest.mark.parametrize("at", ["/whoami", "/send/", "/state/"])
def test_401_for_a_callers_token_passes_and_is_asked_again(upstream: Upstream, tmp_path: Path, at: str) -> None:
    timing = Timing(token_pause=HASTE_SECONDS, refusal_seconds=0.0)
    with running(upstream, tmp_path, timing=timing) as bridge, as_caller(bridge) as caller:
        _check_401(caller, upstream, at)


def _check_401(caller: httpx.Client, upstream: Upstream, at: str) -> None:
    def call() -> httpx.Response:
        return caller.get(STATE) if at == "/state/" else caller.post(SEND, json=HELLO)

    def of_its_own() -> int:
        """How often it was asked whose the caller's token is; the bot may be asked for beside it, once."""
        token = caller.headers["Authorization"]
        asking = [request for request in upstream.requests if request.target == WHOAMI]
        return sum(request.header("authorization") == token for request in asking)

    if at != "/whoami":
        assert call().status_code == 200
    upstream.always(UNKNOWN_TOKEN, at=at)
    asked = of_its_own()
    for _ in range(2):
        found = check_error(call(), 401, "M_UNKNOWN_TOKEN")
        assert found["error"] == "Access token has expired"
        assert found["soft_logout"] is True
    upstream.script(None)
    assert call().status_code == 200
    assert of_its_own() == asked + (3 if at == "/whoami" else 2)


@pytest.mark.parametrize("at", ["/whoami", "/state/", "send"])
def test_401_for_the_bot_is_a_502_and_a_503_for_an_event_of_nobody_knows_whom(
    upstream: Upstream, tmp_path: Path, at: str
) -> None:
    headers = {"X-API-Key": KEY}
    with (
        running(upstream, tmp_path) as bridge,
        httpx.Client(base_url=bridge.url, headers=headers, trust_env=False) as caller,
    ):
        upstream.always(UNKNOWN_TOKEN, at="/whoami" if at == "send" else at)
        answer = caller.post(SEND, json=HELLO) if at == "send" else caller.get(STATE)
        found = check_error(answer, 503 if at == "send" else 502, "M_UNKNOWN")
        assert "own account" in found["error"]
        assert "soft_logout" not in found
        upstream.script(None)
        assert caller.post(SEND, json=HELLO).status_code == 200


def test_send_of_a_bot_that_is_refused_waits_until_it_is_not(upstream: Upstream, tmp_path: Path) -> None:
    """Its callers can do nothing about it, and whoever can hears of it at /readyz."""
    rooms, timing = Rooms(), Timing(token_pause=HASTE_SECONDS)
    with (
        running(upstream, tmp_path, wait_seconds=HASTE_SECONDS, timing=timing) as bridge,
        httpx.Client(base_url=bridge.url, headers={"X-API-Key": KEY}, trust_env=False) as caller,
    ):
        upstream.always(UNKNOWN_TOKEN, at="/send/")
        answer = repeated(
            lambda: caller.post(MATRIX + SEND, json={**HELLO, "body": "withdrawn"}),
            lambda found: found.status_code != 429,  # it was not even tried in time
        )
        found = check_error(answer, 502, "M_UNKNOWN")
        assert "own account" in found["error"]
        assert "Access token has expired" in found["error"]
        assert "soft_logout" not in found
        deliveries = [check_queued(caller.post(SEND, json={**HELLO, "body": str(n)})) for n in range(2)]
        not_ready = check_error(caller.get("/readyz"), 503, "M_UNKNOWN")
        assert "own account: Access token has expired" in not_ready["error"]
        assert not_ready["flowbridge"]["failed"] == "bot"
        assert not_ready["flowbridge"]["accounts_paused"] == 1
        upstream.script(rooms)
        for delivery in deliveries:
            bridge.wait_until(delivery, "sent")
        assert rooms.bodies == ["0", "1"]
        assert caller.get("/readyz").json()["accounts_paused"] == 0


def test_403_for_the_bot_in_a_room_passes(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.matrix_error(403, "M_FORBIDDEN", "not in the room"), at="/send/")
    answer = bridge.post(SEND, json.dumps(HELLO).encode(), f"X-API-Key: {KEY}")
    assert (answer.status, answer.json()["error"]) == (403, "not in the room")


@pytest.mark.parametrize(
    ("headers", "errcode"),
    [
        ({}, "M_MISSING_TOKEN"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "M_MISSING_TOKEN"),
        ({"Authorization": "Bearer"}, "M_MISSING_TOKEN"),
        ({"Authorization": "Bearer fb_unknown"}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": "fb_unknown"}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": KEY[:-1]}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": KEY + "x"}, "M_UNKNOWN_TOKEN"),
    ],
)
def test_no_token_or_an_unknown_key_is_a_401(bridge: Bridge, headers: dict[str, str], errcode: str) -> None:
    for path in (SEND, f"/_matrix/client/v3{SEND}"):
        check_error(httpx.post(bridge.url + path, json=HELLO, headers=headers, trust_env=False), 401, errcode)
    assert bridge.upstream.requests == []


def test_matrix_token_in_the_place_of_an_api_key_is_told(bridge: Bridge) -> None:
    answer = httpx.post(bridge.url + SEND, json=HELLO, headers={"X-API-Key": "syt_a_token"}, trust_env=False)
    check_error(answer, 401, "M_UNKNOWN_TOKEN")
    assert answer.json()["error"] == (
        "this is not an API key: one begins with fb_. A Matrix token is sent as `Authorization: Bearer …`"
    )


def test_mistake_of_ours_is_a_500_that_tells_nothing(caller: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("secret innards")

    with monkeypatch.context() as patch:
        patch.setattr(Callers, "credential", broken)
        answer = caller.post(SEND, json=HELLO)
    check_error(answer, 500, "M_UNKNOWN")
    assert "secret innards" not in answer.text
    assert "RuntimeError" not in answer.text


@pytest.mark.parametrize(
    ("body", "headers", "status", "errcode"),
    [
        (b"", {}, 400, "M_NOT_JSON"),
        (b"{", {}, 400, "M_NOT_JSON"),
        (b"\xff", {}, 400, "M_NOT_JSON"),
        (b"[]", {}, 400, "M_BAD_JSON"),
        (b"{}", {}, 400, "M_BAD_JSON"),
        (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "M_NOT_JSON"),
        (b"<a/>", {"Content-Type": "application/xml"}, 415, "M_NOT_JSON"),
        (b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "M_NOT_JSON"),
        (b"hi", {"Content-Type": "text/plain; charset=utf-16"}, 415, "M_NOT_JSON"),
        (b"\xff", {"Content-Type": "text/plain"}, 400, "M_NOT_JSON"),
    ],
)
def test_body_that_is_no_event_is_a_4xx(
    caller: httpx.Client, upstream: Upstream, body: bytes, headers: dict[str, str], status: int, errcode: str
) -> None:
    check_error(caller.post(SEND, content=body, headers=headers), status, errcode)
    assert upstream.requests == []
