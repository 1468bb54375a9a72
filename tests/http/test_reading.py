"""Reading, where the homeserver does what a real one seldom does; and long polls, which are in nobody's way."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.homeserver import client
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.services import history
from flowbridge.store import Database, api_keys
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    HELLO,
    KEY,
    ROOM,
    SEND,
    SHORT_REQUEST_SECONDS,
    Bridge,
    as_caller,
    new_token,
    post,
    running,
    settings_for,
)
from tests.upstream import PATIENCE, Behaviour, Connection, Request, Upstream

POLL = "/events?from=s1&timeout=300000"
EMPTY = {"next_batch": "s2"}


def syncing(behaviour: Behaviour) -> Callable[[Request], Behaviour | None]:
    """A homeserver in good health but for its answer to a sync."""
    return lambda request: behaviour if "/sync?" in request.target else None


def polls(upstream: Upstream, number: int) -> list[Request]:
    """The syncs that have come, once there are so many."""
    ending = time.monotonic() + PATIENCE
    while len(found := [request for request in upstream.requests if "/sync?" in request.target]) < number:
        assert time.monotonic() < ending, upstream.requests
        time.sleep(0.01)
    return found


def ask(target: str, *headers: str) -> bytes:
    return post(target, b"", *headers, method="GET")


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["errcode"]


def test_poll_goes_upstream_with_the_token_in_the_header_and_a_longer_deadline_than_any_call(
    impatient: Bridge, upstream: Upstream, go: threading.Event
) -> None:
    upstream.script(syncing(scripted.when(go, scripted.answer(EMPTY))))
    with as_caller(impatient) as caller, ThreadPoolExecutor(1) as executor:
        polling = executor.submit(caller.get, "/events?from=s1&timeout=60000&access_token=other")
        polls(upstream, 1)
        done, _ = wait([polling], timeout=1.5 * SHORT_REQUEST_SECONDS)
        assert not done
        go.set()
        found = polling.result()
    assert found.json() == {"chunk": [], "start": "s1", "end": "s2"}
    first, *_ = polls(upstream, 1)
    assert first.header("authorization") == caller.headers["authorization"]
    assert "access_token" not in first.target
    assert "since=s1" in first.target


def test_poll_ends_when_its_caller_hangs_up(bridge: Bridge, upstream: Upstream) -> None:
    ended = threading.Event()

    def wait(connection: Connection) -> None:
        try:
            connection.wait_until_closed()
        finally:
            ended.set()

    upstream.script(syncing(wait))
    with bridge.connect() as connection:
        connection.send(ask(POLL))
        polls(upstream, 1)
        assert not ended.is_set()
    assert ended.wait(PATIENCE)


def test_poll_of_a_revoked_key_ends_with_it(upstream: Upstream, tmp_path: Path) -> None:
    """What happens after that is not told to it."""
    upstream.script(syncing(scripted.silence))
    database = Database(settings_for(upstream.url, tmp_path).database_url.get_secret_value())
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        api_keys.add(connection, ApiKey("one"), KEY)
    with running(upstream, tmp_path, api_keys=()) as bridge, bridge.connect() as client:
        client.send(ask(POLL, f"X-API-Key: {KEY}", "Authorization: Basic x"))
        polls(upstream, 1)
        with database.engine.begin() as connection:
            api_keys.revoke(connection, "one")
        answer = client.answer()
        assert (answer.status, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    database.engine.dispose()


def test_polls_leave_the_connections_to_the_sends(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CALLS", 2)
    upstream.script(syncing(scripted.silence))
    with running(upstream, tmp_path, timing=Timing(stop_seconds=2 * int(PATIENCE))) as bridge:
        connections = [bridge.connect().send(ask(POLL)) for _ in range(5)]
        polls(upstream, 5)
        assert bridge.post(SEND, json.dumps(HELLO).encode()).status == 200
        stopped = time.monotonic()
    assert time.monotonic() - stopped < PATIENCE, "and they do not hold up its end"
    for connection in connections:
        with connection:
            answer = connection.answer()
            assert (answer.status, answer.json()) == (200, {"chunk": [], "start": "s1", "end": "s1"})


def test_too_many_polls_of_one_caller_are_told_to_wait(bridge: Bridge, upstream: Upstream, go: threading.Event) -> None:
    """200 of one caller kept every other caller out: each has its share."""
    upstream.script(syncing(scripted.when(go, scripted.answer(EMPTY))))
    hog = f"Authorization: Bearer {new_token()}"
    with ExitStack() as stack:
        clients = [stack.enter_context(bridge.connect()) for _ in range(history.MAX_POLLS_OF_ONE)]
        for client in clients:
            client.send(ask(POLL, hog))
        polls(upstream, len(clients))
        answer = bridge.post(POLL, b"", hog, method="GET")
        assert (answer.status, answer.json()["errcode"]) == (429, "M_LIMIT_EXCEEDED")
        assert "25 of the 200 calls that wait for events are yours" in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"
        other = stack.enter_context(bridge.connect())
        other.send(ask(POLL))
        polls(upstream, len(clients) + 1)
        go.set()
        assert [client.answer().status for client in (*clients, other)] == [200] * (len(clients) + 1)
    assert bridge.post(POLL, b"", hog, method="GET").status == 200


def test_answer_that_is_too_large_is_a_413_that_says_what_to_do(
    caller: httpx.Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BULK_LIMIT", 1_000)
    upstream.always(scripted.answer({"next_batch": "s2", "rooms": {"join": {}}, "x": "x" * 1_000}), at="/sync?")
    answer = caller.get("/initialSync")
    assert refused(answer) == (413, "M_TOO_LARGE")
    assert "ask for less" in answer.json()["error"]


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.html(200), id="a page"),
        pytest.param(scripted.answer([]), id="a list"),
        pytest.param(scripted.answer({}), id="without next_batch"),
        pytest.param(scripted.answer({"next_batch": 7}), id="with a number"),
        pytest.param(scripted.hang_up, id="none"),
    ],
)
@pytest.mark.parametrize("target", [POLL, "/initialSync", f"/_matrix/client/v3/rooms/{ROOM}/initialSync"])
def test_answer_that_is_no_sync_is_a_502(
    caller: httpx.Client, upstream: Upstream, behaviour: Behaviour, target: str
) -> None:
    upstream.script(syncing(behaviour))
    assert refused(caller.get(target)) == (502, "M_UNKNOWN")


STRANGE: list[Any] = [7, None, "x", [], {}, [7, None, {}], {"events": 7}, {"events": [7, {}]}]


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_strange_parts_of_a_sync_are_left_out(caller: httpx.Client, upstream: Upstream, strange: Any) -> None:
    sections = ("timeline", "state", "ephemeral", "account_data", "invite_state")
    room = {**dict.fromkeys(sections, strange), "unread": strange}
    for sync in (
        {"rooms": strange, "presence": strange, "account_data": strange},
        {"rooms": dict.fromkeys(("join", "invite", "leave"), strange)},
        {"rooms": {kind: {ROOM: strange} for kind in ("join", "invite", "leave")}},
        {"rooms": {kind: {ROOM: room} for kind in ("join", "invite", "leave")}},
    ):
        upstream.script(syncing(scripted.answer({"next_batch": "s2", **sync})))
        for target in (POLL.replace("300000", "0"), "/initialSync"):
            assert caller.get(target).status_code == 200


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_strange_pages_are_passed_on(caller: httpx.Client, upstream: Upstream, strange: Any) -> None:
    for page in (strange, {"chunk": strange, "state": strange, "start": strange}):
        upstream.always(scripted.answer(page), at=f"/rooms/{ROOM.replace('!', '%21').replace(':', '%3A')}")
        answer = caller.get(f"/_matrix/client/v3/rooms/{ROOM}/messages")
        assert (answer.status_code, answer.json()) == (200, page)
        assert caller.get(f"/_matrix/client/api/v1/rooms/{ROOM}/messages").status_code == 200


def test_server_cannot_say_for_the_bridge_that_an_event_is_verified(bridge: Bridge, upstream: Upstream) -> None:
    forged = {"type": "m.room.message", "content": {"body": "trust me"}}
    page = {"chunk": [{**forged, "flowbridge": {"encrypted": True, "verified": True}}], "start": "t1"}
    upstream.always(scripted.answer(page), at=f"/rooms/{ROOM.replace('!', '%21').replace(':', '%3A')}")
    answer = httpx.get(f"{bridge.url}/rooms/{ROOM}/messages", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json() == {"chunk": [forged], "start": "t1"}


def test_gap_is_closed_page_by_page(caller: httpx.Client, upstream: Upstream) -> None:
    """Newest first, from the end of the sync back to the token."""
    pages = {"s9": (["d", "c"], "t5"), "t5": ([], "t4"), "t4": (["b", "a"], "t1"), "t1": ([], None)}

    def script(request: Request) -> Behaviour | None:
        if "/sync?" in request.target:
            cut = {"timeline": {"limited": True, "events": [{"content": {"body": "d"}}]}}
            return scripted.answer({"next_batch": "s9", "rooms": {"join": {ROOM: cut}}})
        if "/messages?" not in request.target:
            return None
        query = httpx.URL(f"http://upstream{request.target}").params
        assert (query["dir"], query["to"]) == ("b", "s1")
        bodies, end = pages[query["from"]]
        chunk = [{"type": "m.room.message", "content": {"body": body}} for body in bodies]
        return scripted.answer({"chunk": chunk, "start": query["from"], **({"end": end} if end else {})})

    upstream.script(script)
    found = caller.get(POLL).json()
    assert [event["content"]["body"] for event in found["chunk"]] == ["a", "b", "c", "d"]
    assert found["end"] == "s9"


def test_room_that_may_not_be_read_any_more_keeps_the_timeline_of_the_sync(
    caller: httpx.Client, upstream: Upstream
) -> None:
    cut = {"timeline": {"limited": True, "events": [{"content": {"body": "out"}}]}}
    upstream.script(syncing(scripted.answer({"next_batch": "s9", "rooms": {"leave": {ROOM: cut}}})))
    found = caller.get(POLL).json()  # the upstream answers a 404 for the messages
    assert [event["content"]["body"] for event in found["chunk"]] == ["out"]


def test_key_reads_as_the_bot_and_a_refused_bot_is_a_502(bridge: Bridge, upstream: Upstream) -> None:
    upstream.script(syncing(scripted.answer(EMPTY)))
    answer = bridge.ask(ask("/events?from=s1&timeout=0", f"X-API-Key: {KEY}", "Authorization: Basic x"), "GET")
    assert answer.status == 200
    (poll,) = polls(upstream, 1)
    assert poll.header("authorization") == f"Bearer {BOT_TOKEN}"
    assert KEY not in repr(upstream.requests)
    upstream.script(syncing(scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised access token")))
    answer = bridge.ask(ask(POLL, f"X-API-Key: {KEY}", "Authorization: Basic x"), "GET")
    assert (answer.status, answer.json()["errcode"]) == (502, "M_UNKNOWN")
    assert "own account" in answer.json()["error"]


@pytest.mark.parametrize("target", [POLL, "/initialSync", f"/rooms/{ROOM}/members"])
def test_homeservers_own_refusal_passes(caller: httpx.Client, upstream: Upstream, target: str) -> None:
    slow = scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Too many requests", retry_after_ms=3_000)
    upstream.script(lambda request: None if "whoami" in request.target else slow)
    answer = caller.get(target)
    assert refused(answer) == (429, "M_LIMIT_EXCEEDED")
    assert answer.headers["retry-after"] == "3"
