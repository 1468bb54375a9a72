"""What one caller, or a client that nobody has authenticated, may take of what all share."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

from flowbridge.auth import identities
from flowbridge.homeserver import client, relay
from flowbridge.limits import processor
from flowbridge.live import feeds
from flowbridge.models.timing import Timing
from flowbridge.services import rooms
from flowbridge.web import middleware
from tests import upstream as scripted
from tests.http.conftest import KEY, ROOM, SEND, Answer, Bridge, RawClient, new_token, post, running
from tests.http.sends import UNKNOWN_TOKEN
from tests.http.test_bounds import BODY
from tests.patience import until
from tests.upstream import PATIENCE, Behaviour, Request, Upstream

FLOOD = 40  # more than any share below, and than the pools that they are of


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def error_of(answer: Answer, status: int) -> str:
    assert (answer.status, answer.json()["errcode"]) == (status, "M_LIMIT_EXCEEDED"), answer
    assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["error"])


def arrived(upstream: Upstream, part: str, number: int) -> int:
    """How many of these requests have come, once there are so many."""
    ending = time.monotonic() + PATIENCE
    while (found := sum(part in request.target for request in upstream.requests)) < number:
        assert time.monotonic() < ending, f"{found} of {number}"
        time.sleep(0.01)
    return found


def slow(part: str, go: threading.Event, behaviour: Behaviour) -> Callable[[Request], Behaviour | None]:
    return lambda request: scripted.when(go, behaviour) if part in request.target else None


def flood(stack: ExitStack, bridge: Bridge, request: Callable[[], bytes], number: int = FLOOD) -> list[RawClient]:
    clients = [stack.enter_context(bridge.connect()) for _ in range(number)]
    for found in clients:
        found.send(request())
    return clients


def test_joins_of_one_caller_leave_places_for_others(bridge: Bridge, upstream: Upstream, go: threading.Event) -> None:
    hog = bearer(new_token())
    upstream.script(lambda request: _slow_for(hog, request, go))
    with ExitStack() as stack:
        clients = flood(stack, bridge, lambda: post("/join/!slow:upstream", b"", hog), rooms.MAX_AT_ONCE)
        arrived(upstream, "/join", rooms.MAX_OF_ONE)
        assert bridge.post("/join/!other:upstream").status == 200
        assert arrived(upstream, "/join", 1) == rooms.MAX_OF_ONE + 1
        go.set()
        assert {found.answer().status for found in clients} == {200}


def _slow_for(token: str, request: Request, go: threading.Event) -> Behaviour | None:
    if not request.target.endswith("/join"):
        return None
    joined = scripted.answer({"room_id": "!slow:upstream"})
    return scripted.when(go, joined) if request.header("authorization") == token.partition(": ")[2] else joined


def test_known_tokens_and_keys_do_not_wait_for_look_ups_of_unknown_ones(
    upstream: Upstream, tmp_path: Path, go: threading.Event
) -> None:
    known = bearer(new_token())
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        assert bridge.post(SEND, BODY, known).status == 200
        assert bridge.post(SEND, BODY, f"X-API-Key: {KEY}", "Authorization: Basic x").status == 200
        upstream.script(slow("/whoami", go, UNKNOWN_TOKEN))
        clients = flood(stack, bridge, lambda: post(SEND, BODY), 140)  # there are 128 connections for sends
        arrived(upstream, "/whoami", identities.MAX_LOOKUPS_OF_ONE + 2)
        for _ in range(5):
            assert bridge.post(SEND, BODY, known).status == 200
            assert bridge.post(SEND, BODY, f"X-API-Key: {KEY}", "Authorization: Basic x").status == 200
        assert arrived(upstream, "/whoami", 1) == identities.MAX_LOOKUPS_OF_ONE + 2
        go.set()
        assert {found.answer().status for found in clients} <= {401, 429, 503}


def test_calls_without_a_token_have_connections_of_their_own(
    bridge: Bridge, upstream: Upstream, go: threading.Event
) -> None:
    upstream.script(slow("/login", go, scripted.answer({"flows": []})))
    with ExitStack() as stack:
        clients = flood(stack, bridge, lambda: post("/login", b"", "Authorization: Basic x", method="GET"))
        arrived(upstream, "/login", client.GUESTS_OF_ONE)
        assert bridge.post(SEND, BODY).status == 200
        assert arrived(upstream, "/login", 1) == client.GUESTS_OF_ONE
        go.set()
        assert {found.answer().status for found in clients} <= {200, 429, 503}


def passing(path: str, *headers: str) -> bytes:
    return post(f"/_matrix/client/v3/{path}", b"", *headers, method="GET")


def answered(clients: list[RawClient], number: int) -> list[RawClient]:
    """Those that have an answer, once there are so many."""
    ending = time.monotonic() + PATIENCE
    while len(found := [one for one in clients if one.has_answer()]) < number:
        assert time.monotonic() < ending, f"{len(found)} of {number}"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("who", ["no token", "wrong token", "known"])
def test_what_passes_through_of_one_caller_leaves_places_for_others(
    upstream: Upstream, tmp_path: Path, go: threading.Event, who: str
) -> None:
    """300 requests of an address without a token had 300 connections to the homeserver."""
    known = bearer(new_token())
    hog = {"no token": "Authorization: Basic x", "wrong token": bearer(new_token()), "known": bearer(new_token())}[who]
    share, beyond = (relay.MAX_OF_ONE, "64 of the 2048") if who == "known" else (relay.GUESTS_OF_ONE, "32 of the 256")

    def script(request: Request) -> Behaviour | None:
        is_hogs = request.header("authorization") == hog.partition(": ")[2]
        if who == "wrong token" and is_hogs and request.target.endswith("/whoami"):
            return UNKNOWN_TOKEN
        return scripted.when(go, scripted.answer({})) if "/slow" in request.target else None

    timing = Timing(relay_turn_seconds=0.2)
    with running(upstream, tmp_path, timing=timing, wrong_keys_per_minute=1_000) as bridge, ExitStack() as stack:
        for header in {known, hog} if who == "known" else {known}:
            assert bridge.post(SEND, BODY, header).status == 200
        upstream.script(script)
        clients = flood(stack, bridge, lambda: passing("slow", hog), share + 5)
        arrived(upstream, "/slow", share)
        for client in answered(clients, 5):
            assert beyond in error_of(client.answer(), 429)
            clients.remove(client)
        upstream.always(scripted.answer({}), at="/quick")
        assert bridge.ask(passing("quick", known)).status == 200
        with RawClient(bridge.url, "127.0.0.2") as elsewhere:
            assert elsewhere.send(passing("quick", "Authorization: Basic x")).answer().status == 200
        assert arrived(upstream, "/slow", 1) == share
        go.set()
        assert [client.answer().status for client in clients] == [200] * share
        assert bridge.ask(passing("quick", hog)).status == 200


def test_caller_whose_requests_all_pass_through_is_no_guest_after_the_first(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        middleware, "ANSWER_SECONDS", 100.0
    )  # after one answer guests wait for longer than any test does
    upstream.always(scripted.answer({}), at="/capabilities")
    known = bearer(new_token())
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:

        def is_answered() -> bool:
            client = stack.enter_context(bridge.connect()).send(passing("capabilities", known))
            client.is_closed(1.0)
            return client.has_answer()

        assert bridge.ask(passing("capabilities", known)).status == 200
        arrived(upstream, "/whoami", 1)
        until(is_answered)
        for _ in range(10):
            assert bridge.ask(passing("capabilities", known)).status == 200
        assert arrived(upstream, "/whoami", 1) == 1, "it is asked once whose the token is"


def test_many_users_behind_one_address_have_a_long_poll_each(
    upstream: Upstream, tmp_path: Path, go: threading.Event
) -> None:
    assert relay.GUESTS_OF_ONE < FLOOD
    upstream.script(slow("/sync", go, scripted.answer({"next_batch": "s"})))
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        clients = flood(stack, bridge, lambda: passing("sync?timeout=30000&since=s"))
        assert arrived(upstream, "/sync", FLOOD) == FLOOD
        go.set()
        assert {client.answer().status for client in clients} == {200}


def test_uploads_and_downloads_count_in_the_same_share(upstream: Upstream, tmp_path: Path, go: threading.Event) -> None:
    hog = bearer(new_token())
    uri = scripted.answer({"content_uri": "mxc://a/b"})
    upstream.script(lambda request: scripted.when(go, uri) if "load" in request.target else None)
    with running(upstream, tmp_path, timing=Timing(relay_turn_seconds=0.2)) as bridge, ExitStack() as stack:
        requests = [
            post("/media", b"x", hog, "Content-Type: image/png"),
            post("/media/upstream/abc", b"", hog, method="GET"),
            post("/_matrix/media/v3/download/upstream/abc", b"", hog, method="GET"),
        ]
        assert bridge.post("/whoami", b"", hog, method="GET").status == 200
        share = relay.MAX_OF_ONE
        clients = flood(stack, bridge, partial(next, cycle(requests)), share)
        arrived(upstream, "load", share)
        assert f"{share} of the 2048" in error_of(bridge.ask(passing("quick", hog)), 429)
        go.set()
        assert {client.answer().status for client in clients} == {200}


@pytest.mark.parametrize("body", [b'{"msgtype": "m.image", "url": 5}', b"{"], ids=["wrong payload", "no JSON"])
def test_refused_requests_of_a_known_caller_take_a_part_of_the_processor(bridge: Bridge, body: bytes) -> None:
    """Each waits for its answer until it is paid for; a send that is right does not."""
    known = bearer(new_token())
    assert bridge.post(SEND, BODY, known).status == 200
    debt = 0.2
    number = int((processor.SAVED_SECONDS + debt) / processor.READ_SECONDS)
    began = time.monotonic()
    with bridge.connect() as client:
        for _ in range(number):
            assert 400 <= client.send(post(SEND, body, known)).answer().status < 500
    assert time.monotonic() - began >= 0.9 * debt / processor.GUESTS_SHARE
    assert bridge.post(SEND, BODY, known).status == 200


def test_readiness_and_versions_ask_the_homeserver_once_a_second(
    upstream: Upstream, tmp_path: Path, go: threading.Event
) -> None:
    upstream.script(slow("/versions", go, scripted.answer({"versions": ["v1.11"]})))
    with running(upstream, tmp_path, readiness_seconds=60.0) as bridge, ExitStack() as stack:
        paths = ["/readyz", "/_matrix/client/versions"] * 20
        clients = flood(stack, bridge, lambda: post(paths.pop(), method="GET"))
        arrived(upstream, "/versions", 1)
        go.set()
        assert {found.answer().status for found in clients} == {200}
        assert bridge.post("/readyz", method="GET").status == 200
        assert arrived(upstream, "/versions", 1) == 1


def test_wrong_keys_of_an_address_are_slowed_and_right_ones_are_not(upstream: Upstream, tmp_path: Path) -> None:
    with running(upstream, tmp_path, wrong_keys_per_minute=5) as bridge:

        def send(key: str) -> Answer:
            return bridge.post(SEND, BODY, f"X-API-Key: {key}", "Authorization: Basic x")

        known = bearer(new_token())
        assert bridge.post(SEND, BODY, known).status == 200
        assert [send(f"fb_{number}").status for number in range(5)] == [401] * 5
        assert "127.0.0.1" in error_of(send("fb_another"), 429)
        assert send(KEY).status == 200
        assert bridge.post(SEND, BODY, known).status == 200
        asked = len(upstream.requests)
        assert "wrong keys or tokens" in error_of(bridge.post(SEND, BODY), 429)
        assert len(upstream.requests) == asked, "no look-up for it"


def test_burst_of_wrong_keys_is_slowed_too_and_is_over_soon(upstream: Upstream, tmp_path: Path) -> None:
    """They wait together until the keys have been read again."""
    most = 60
    with running(upstream, tmp_path, wrong_keys_per_minute=most, api_keys=()) as bridge, ExitStack() as stack:
        secrets = [f"X-API-Key: fb_{number}" for number in range(2 * most)]
        clients = flood(stack, bridge, lambda: post(SEND, BODY, secrets.pop(), "Authorization: Basic x"), 2 * most)
        found = Counter(client.answer().status for client in clients)
        assert found[401] + found[429] == 2 * most
        # As time goes on more are earned, one a second.
        assert most <= found[401] < 2 * most - 10
        ending = time.monotonic() + 10  # of 60 s if the whole burst had to be earned
        while bridge.post(SEND, BODY, bearer(new_token())).status == 429:
            assert time.monotonic() < ending
            time.sleep(0.1)


def test_wrong_tokens_are_looked_up_once_and_slowed(upstream: Upstream, tmp_path: Path) -> None:
    upstream.always(UNKNOWN_TOKEN, at="/whoami")
    with running(upstream, tmp_path, wrong_keys_per_minute=5) as bridge:
        tokens = [bearer(new_token()) for _ in range(5)]
        for token in tokens:
            assert bridge.post(SEND, BODY, token).status == 401
        error_of(bridge.post(SEND, BODY), 429)
        assert arrived(upstream, "/whoami", 5) == 5


def test_refusal_of_a_token_is_kept_for_some_seconds(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(UNKNOWN_TOKEN, at="/whoami")
    token = bearer(new_token())
    answers = [bridge.post(SEND, BODY, token) for _ in range(5)]
    assert {(answer.status, answer.body) for answer in answers} == {(401, answers[0].body)}
    assert arrived(upstream, "/whoami", 1) == 1


def test_live_streams_of_one_caller_leave_places_for_others(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_STREAMS_OF_ONE", 3)
    upstream.script(lambda request: scripted.silence if "since" in request.target else _now(request))
    hog = bearer(new_token())
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        streams = flood(stack, bridge, lambda: post("/live", b"", hog, method="GET"), 3)
        for stream in streams:
            assert stream.head().startswith("HTTP/1.1 200 ")
        assert "3 of the 3072 live streams" in error_of(bridge.post("/live", b"", hog, method="GET"), 429)
        (other,) = flood(stack, bridge, lambda: post("/live", method="GET"), 1)
        assert other.head().startswith("HTTP/1.1 200 ")
        streams[0].send(b"").end()
        ending = time.monotonic() + PATIENCE
        while True:  # until the place is given back
            again = stack.enter_context(bridge.connect())
            again.send(post("/live", b"", hog, method="GET"))
            if again.head().startswith("HTTP/1.1 200 "):
                break
            assert time.monotonic() < ending


def _now(request: Request) -> Behaviour | None:
    return scripted.answer({"next_batch": "s1"}) if "/sync" in request.target else None


def test_tokens_of_one_user_take_only_so_many_long_polls(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_FEEDS_OF_ONE", 2)

    def script(request: Request) -> Behaviour | None:
        if request.target.endswith("/whoami"):
            return scripted.answer({"user_id": "@hog:upstream", "device_id": new_token()})
        return scripted.silence if "since" in request.target else _now(request)

    upstream.script(script)
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        streams = flood(stack, bridge, lambda: post("/live", method="GET"), 2)
        for stream in streams:
            assert stream.head().startswith("HTTP/1.1 200 ")
        assert "devices" in error_of(bridge.post("/live", method="GET"), 429)


def test_slow_look_ups_of_one_callers_aliases_leave_connections_to_sends(
    bridge: Bridge, upstream: Upstream, go: threading.Event
) -> None:
    hog = bearer(new_token())
    upstream.script(slow("/join/", go, scripted.answer({"room_id": ROOM})))
    names = iter(range(140))
    with ExitStack() as stack:
        send = "/rooms/%23alias{}:upstream/send/m.room.message"
        clients = flood(stack, bridge, lambda: post(send.format(next(names)), BODY, hog), 140)
        arrived(upstream, "/join/", client.QUESTIONS_OF_ONE)
        assert bridge.post(SEND, BODY).status == 200
        go.set()
        for found in clients:
            assert found.answer().status < 600


@pytest.mark.parametrize("path", ["/healthz", "/schemas", "/docs/swagger-ui-bundle.js", SEND])
def test_answers_without_a_token_wait_for_their_share_of_the_processor(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(middleware, "ANSWER_SECONDS", 1.0)  # more than may be saved, by far
    known = bearer(new_token())
    guest = post(path, b"", "Authorization: Basic x", method="GET" if path != SEND else "POST")
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        assert bridge.post(SEND, BODY, known).status == 200
        bridge.ask(guest)
        waiting = stack.enter_context(bridge.connect())
        waiting.send(guest)
        for _ in range(20):
            assert bridge.post(SEND, BODY, known).status == 200
        assert waiting.is_silent(0.3), "it is not refused, and not answered yet"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_reads_of_a_known_caller_wait_for_its_own_share(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(middleware, "READ_SECONDS", 1.0)
    hog, other = bearer(new_token()), bearer(new_token())
    state = f"/rooms/{ROOM}/state/m.room.name"
    with running(upstream, tmp_path) as bridge, ExitStack() as stack:
        assert bridge.post(state, b"", hog, method="GET").status == 200
        waiting = stack.enter_context(bridge.connect())
        waiting.send(post(state, b"", hog, method=method))
        assert bridge.post(state, b"", other, method="GET").status == 200
        assert bridge.post(SEND, BODY, hog).status == 200
        assert waiting.is_silent(0.3), "it is not refused, and not answered yet"


def test_a_wrong_key_is_refused_also_where_a_timer_rings_early(upstream: Upstream, tmp_path: Path) -> None:
    """uvloop counts in whole milliseconds: a wait of 10.4 ms ends after 10, when the store may not be read yet."""
    timing = Timing(key_lookup_seconds=0.0104)
    with running(upstream, tmp_path, timing=timing, wrong_keys_per_minute=1_000, api_keys=()) as bridge:
        answers = [bridge.post(SEND, BODY, f"X-API-Key: fb_{number}") for number in range(200)]
        assert Counter(answer.status for answer in answers) == {401: 200}
