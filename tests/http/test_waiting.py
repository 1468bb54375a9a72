"""Contract §1, "Waiting": how long a caller waits, and what it is told."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    HASTE_SECONDS,
    HELLO,
    KEY,
    PATIENT,
    SEND,
    SHORT_REQUEST_SECONDS,
    WAIT_SECONDS,
    Answer,
    Bridge,
    Elapsed,
    as_caller,
    new_token,
    post,
    running,
)
from tests.http.sends import (
    ASYNC,
    BROKEN,
    ELSEWHERE,
    KEYED,
    MATRIX,
    NOW,
    STATE,
    SURFACES,
    UNKNOWN_TOKEN,
    check_queued,
    event_id,
    first,
    held,
    is_replayed,
    limited,
    repeated,
    text,
)
from tests.patience import until
from tests.processes import Running, serving
from tests.upstream import PATIENCE, Behaviour, Request, Rooms, Upstream

pytestmark = pytest.mark.usefixtures("way")

# How long


@SURFACES
def test_send_waits_until_the_event_is_in_its_room(caller: httpx.Client, rooms: Rooms, prefix: str) -> None:
    answers = [
        caller.post(prefix + SEND, json=text("by post")),
        caller.put(f"{prefix}{SEND}/txn", json=text("by put")),
        caller.put(prefix + STATE, json={"topic": "set"}),
    ]
    assert [event_id(answer) for answer in answers] == ["$1", "$2", "$3"]
    assert len({answer.headers["flowbridge-delivery"] for answer in answers}) == 3
    assert not any(is_replayed(answer) or "preference-applied" in answer.headers for answer in answers)
    assert [(event.type, event.content) for event in rooms.events] == [
        ("m.room.message", text("by post")),
        ("m.room.message", text("by put")),
        ("m.room.topic", {"topic": "set"}),
    ]


def test_what_is_not_in_its_room_in_time_is_accepted(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event, elapsed: Elapsed
) -> None:
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$late"})), at="/send/")
    answer = hasty_caller.post(SEND, json=HELLO)
    delivery = check_queued(answer)
    assert HASTE_SECONDS <= elapsed() < WAIT_SECONDS / 2
    assert "preference-applied" not in answer.headers
    found = hasty_caller.get(answer.headers["location"]).json()
    assert (found["delivery_id"], found["status"]) == (delivery, "queued")
    go.set()
    assert hasty.wait_until(delivery, "sent")["event_id"] == "$late"


def test_respond_async_is_answered_202_however_fast_it_goes(bridge: Bridge, caller: httpx.Client, rooms: Rooms) -> None:
    for number in range(10):
        answer = caller.post(SEND, json=text(str(number)), headers=ASYNC)
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == "respond-async"
        delivery = answer.headers["flowbridge-delivery"]
        assert answer.json()["delivery_id"] == delivery
        assert answer.headers["location"] == f"/deliveries/{delivery}"
        assert bridge.wait_until(delivery, "sent")["event_id"] == f"${number + 1}"
    state = caller.put(STATE, json={"topic": "async"}, headers=ASYNC)
    assert state.status_code == 202
    bridge.wait_until(state.headers["flowbridge-delivery"], "sent")
    assert rooms.events[-1].content == {"topic": "async"}


def test_respond_async_does_not_wait(caller: httpx.Client, upstream: Upstream, go: threading.Event) -> None:
    upstream.always(scripted.when(go, BROKEN), at="/send/")
    for _ in range(3):
        check_queued(caller.post(SEND, json=HELLO, headers=ASYNC))


@pytest.mark.parametrize(
    ("prefer", "is_async"),
    [
        (["wait=0"], False),
        (["WAIT=0"], False),
        (['wait="0"'], False),
        (["wait = 0"], False),
        (["wait=0;x=y"], False),
        (["wait=0, wait=9"], False),
        (["handling=lenient, wait=0"], False),
        (["return=minimal", "wait=0"], False),
        (["respond-async"], True),
        (["Respond-Async"], True),
        (["respond-async; x=y"], True),
        (["return=minimal, respond-async"], True),
        (["respond-async", "return=minimal"], True),
        (["respond-async, wait=0"], True),
        (["wait=0, respond-async"], True),
        (["wait=0", "respond-async"], True),
        (["respond-async, wait=soon"], True),
    ],
    ids=lambda value: " | ".join(value) if isinstance(value, list) else "",
)
def test_preference_is_understood(
    bridge: Bridge, upstream: Upstream, go: threading.Event, prefer: list[str], is_async: bool, elapsed: Elapsed
) -> None:
    upstream.always(scripted.when(go, BROKEN), at="/send/")
    answer = bridge.post(SEND, json.dumps(HELLO).encode(), *(f"Prefer: {line}" for line in prefer))
    assert answer.status == 202
    assert answer.json()["status"] == "queued"
    assert answer.headers.get("preference-applied") == ("respond-async" if is_async else None)
    assert elapsed() < WAIT_SECONDS / 2


@pytest.mark.parametrize(
    "prefer",
    ["wait=soon", "wait=-1", "wait=0.5", "wait=", "wait", "wait=0x0", "wait=²", "=0", "", ",;,=", "async", "waits=0"],
)
def test_malformed_preference_is_ignored(bridge: Bridge, upstream: Upstream, rooms: Rooms, prefer: str) -> None:
    slow = threading.Event()
    timer = threading.Timer(0.1, slow.set)
    upstream.script(held(slow, rooms))
    timer.start()
    answer = bridge.post(SEND, json.dumps(HELLO).encode(), f"Prefer: {prefer}")
    timer.join()
    assert (answer.status, answer.json()) == (200, {"event_id": "$1"})
    assert "preference-applied" not in answer.headers


@SURFACES
def test_wait_may_be_longer_than_the_bridges_own(
    hasty_caller: httpx.Client, upstream: Upstream, rooms: Rooms, prefix: str, elapsed: Elapsed
) -> None:
    slow = threading.Event()
    timer = threading.Timer(2 * HASTE_SECONDS, slow.set)
    upstream.script(held(slow, rooms))
    timer.start()
    answer = hasty_caller.post(prefix + SEND, json=HELLO, headers={"Prefer": "wait=999999999999"})
    timer.join()
    assert event_id(answer) == "$1"
    assert elapsed() > 2 * HASTE_SECONDS - 0.05


def test_asynchronous_caller_may_wait_first(
    hasty_caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event, elapsed: Elapsed
) -> None:
    """RFC 7240, section 4.3: answered at once when it is done in this time, else with a 202."""
    headers = {"Prefer": "respond-async, wait=300"}
    assert event_id(hasty_caller.post(SEND, json=HELLO, headers=headers)) == "$1"
    headers = {"Prefer": "respond-async, wait=1"}
    upstream.always(scripted.when(go, BROKEN), at="/send/")
    started = elapsed()
    answer = hasty_caller.post(SEND, json=HELLO, headers=headers)
    check_queued(answer)
    assert answer.headers["preference-applied"] == "respond-async"
    assert 1 <= elapsed() - started < WAIT_SECONDS / 2


def test_matrix_client_is_never_answered_202(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    answer = caller.post(MATRIX + SEND, json=HELLO, headers=ASYNC)
    assert event_id(answer) == "$1"
    assert "preference-applied" not in answer.headers
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$2"})), at="/send/")
    for headers in ({"Prefer": "respond-async, wait=0"}, NOW):
        assert caller.post(MATRIX + SEND, json=HELLO, headers=headers).status_code in (429, 504)


def test_who_goes_away_while_it_waits_has_sent_all_the_same(
    bridge: Bridge, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    token = new_token()
    for number in range(2):
        with bridge.connect() as client:
            client.send(post(SEND, json.dumps(text(str(number))).encode(), f"Authorization: Bearer {token}"))
            rooms.wait_for(1)
            if number:
                wait_for_queued(bridge, 2)
    go.set()
    rooms.wait_for(2)
    assert rooms.bodies == ["0", "1"]
    with as_caller(bridge, token) as caller:
        assert event_id(caller.post(SEND, json=text("2"))) == "$3"


def wait_for_queued(bridge: Bridge, number: int) -> None:
    ending = time.monotonic() + PATIENCE
    while len(bridge.queued()) < number:
        assert time.monotonic() < ending
        time.sleep(0.01)


# What is told


@SURFACES
@pytest.mark.parametrize(
    ("status", "errcode"),
    [(400, "M_BAD_JSON"), (403, "M_FORBIDDEN"), (404, "M_NOT_FOUND"), (413, "M_TOO_LARGE"), (401, "M_UNKNOWN_TOKEN")],
)
def test_refusal_for_good_comes_at_once_and_names_its_delivery(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, prefix: str, status: int, errcode: str
) -> None:
    upstream.always(scripted.matrix_error(status, errcode, "its own text", more=[1]), at="/send/")
    answer = caller.post(prefix + SEND, json=HELLO)
    assert (answer.status_code, answer.json()) == (status, {"errcode": errcode, "error": "its own text", "more": [1]})
    found = bridge.wait_until(answer.headers["flowbridge-delivery"], "dead")
    assert found["error"] == {"status": status, **answer.json()}
    assert len(upstream.events) == 1


@SURFACES
def test_each_answer_to_an_accepted_event_names_its_delivery(
    hasty: Bridge, hasty_caller: httpx.Client, upstream: Upstream, prefix: str
) -> None:
    each: list[tuple[Behaviour | None, dict[str, str], int, int]] = [
        (None, PATIENT, 200, 200),
        (limited(60_000), {}, 202, 429),
        (BROKEN, {}, 202, 504),
        (scripted.html(), {}, 202, 504),
        (scripted.silence, {}, 202, 504),
        (UNKNOWN_TOKEN, PATIENT, 401, 401),
    ]
    for behaviour, headers, on_flow, on_matrix in each:
        upstream.script(None)
        if behaviour:
            upstream.always(behaviour, at="/send/")
        status = on_matrix if prefix else on_flow
        with as_caller(hasty) as caller:
            call = partial(caller.post, prefix + SEND, json=HELLO, headers=headers)
            answer = repeated(call, lambda found, status=status: found.status_code == status)  # type: ignore[misc]
        assert len(answer.headers["flowbridge-delivery"]) > 16


@SURFACES
def test_answer_to_what_was_not_accepted_names_no_delivery(bridge: Bridge, rooms: Rooms, prefix: str) -> None:
    answers = [
        bridge.post(prefix + SEND, b"{"),
        bridge.post(prefix + SEND, b"{}"),
        bridge.post(prefix + SEND, json.dumps(HELLO).encode(), "Authorization: Basic x"),
        bridge.post(f"{prefix}/rooms/nowhere/send/m.room.message", json.dumps(HELLO).encode()),
    ]
    assert [answer.status for answer in answers] == [400, 400, 401, 400]
    assert not any("flowbridge-delivery" in answer.headers for answer in answers)
    assert rooms.events == []


@SURFACES
def test_pause_that_ends_in_time_is_waited_out(
    caller: httpx.Client, upstream: Upstream, rooms: Rooms, prefix: str, elapsed: Elapsed
) -> None:
    upstream.script(first(limited(300), then=rooms))
    assert event_id(caller.post(prefix + SEND, json=HELLO)) == "$1"
    assert elapsed() >= 0.3
    assert len(upstream.events) == 2


def test_pause_of_one_account_is_not_that_of_another(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    long = scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Too many requests", retry_after_ms=60_000)
    upstream.script(first(long, then=rooms))
    check_queued(caller.post(SEND, json=text("paused"), headers=ASYNC))
    upstream.wait_for_events(1)
    check_queued(caller.post(ELSEWHERE, json=text("paused, too"), headers=NOW))
    with as_caller(bridge) as other:
        assert event_id(other.post(SEND, json=text("free"))) == "$1"
    assert rooms.bodies == ["free"]


def test_what_a_matrix_client_was_told_not_to_be_sent_is_not_sent_later(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    under_way = check_queued(caller.post(SEND, json=text("under way"), headers=NOW))
    rooms.wait_for(1)
    for _ in range(3):
        answer = caller.put(f"{MATRIX}{SEND}/txn", json=text("withdrawn"), headers=NOW)
        assert (answer.status_code, answer.json()["errcode"]) == (429, "M_LIMIT_EXCEEDED")
        assert answer.json()["retry_after_ms"] >= 1
        assert int(answer.headers["retry-after"]) >= 1
        assert not is_replayed(answer)
        withdrawn = answer.headers["flowbridge-delivery"]
        assert caller.get(f"/deliveries/{withdrawn}").status_code == 404
    go.set()
    bridge.wait_until(under_way, "sent")
    assert event_id(caller.put(f"{MATRIX}{SEND}/txn", json=text("at last"))) == "$2"
    assert rooms.bodies == ["under way", "at last"]


def test_matrix_client_that_repeats_what_nobody_knows_joins_it(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(held(go, rooms))
    path = f"{MATRIX}{SEND}/txn"
    first_answer = repeated(
        lambda: caller.put(path, json=HELLO, headers={"Prefer": "wait=1"}), lambda found: found.status_code != 429
    )
    second = caller.put(path, json=HELLO, headers=NOW)
    assert [answer.status_code for answer in (first_answer, second)] == [504, 504]
    threading.Timer(0.1, go.set).start()
    third = caller.put(path, json=HELLO)
    assert event_id(third) == "$1"
    assert [is_replayed(answer) for answer in (first_answer, second, third)] == [False, True, True]
    assert len({answer.headers["flowbridge-delivery"] for answer in (first_answer, second, third)}) == 1
    assert len(rooms.events) == 1


def test_token_that_is_revoked_in_between_is_a_401_at_once(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    assert event_id(caller.post(SEND, json=text("while it was good"))) == "$1"
    upstream.script(lambda request: None if request.target.endswith("/versions") else UNKNOWN_TOKEN)
    answer = caller.post(SEND, json=text("revoked"))
    assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    bridge.wait_until(answer.headers["flowbridge-delivery"], "dead")
    again = caller.post(SEND, json=text("revoked"))
    assert (again.status_code, again.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert "flowbridge-delivery" not in again.headers, "whoever has a bad token is not known"
    upstream.script(rooms)
    assert bridge.queued() == []
    assert rooms.bodies == ["while it was good"]


def test_what_was_accepted_waits_for_a_token_that_works(
    bridge: Bridge, upstream: Upstream, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same user on the same device, who has logged in again."""
    old, new = new_token(), new_token()
    alice = scripted.answer({"user_id": "@alice:upstream", "device_id": "PHONE"})

    def script(request: Request) -> Behaviour | None:
        if old in request.header("authorization") and request.method == "PUT":
            return UNKNOWN_TOKEN
        return alice if request.target.endswith("/whoami") else rooms(request)

    upstream.script(script)
    with as_caller(bridge, old) as caller:
        delivery = check_queued(caller.post(SEND, json=text("with the old one"), headers=ASYNC))
    upstream.wait_for_events(1)
    with as_caller(bridge, new) as caller:
        assert event_id(caller.post(SEND, json=text("with the new one"))) == "$2"
    assert bridge.wait_until(delivery, "sent")["event_id"] == "$1"
    assert rooms.bodies == ["with the old one", "with the new one"]


# Order


def test_events_of_a_room_arrive_in_the_order_of_their_acceptance(
    quick_caller: httpx.Client, upstream: Upstream, rooms: Rooms
) -> None:
    faults = itertools.cycle([None] * 6 + [BROKEN, limited(20), scripted.hang_up, "lost"])

    def script(request: Request) -> Behaviour | None:
        fault = next(faults) if request.method == "PUT" else None
        if fault == "lost":
            rooms(request)
            return scripted.hang_up
        return fault if callable(fault) else rooms(request)

    upstream.script(script)
    for number in range(49):
        assert quick_caller.post(SEND, json=text(str(number)), headers=ASYNC).status_code == 202
    assert quick_caller.post(SEND, json=text("49")).status_code == 200
    assert rooms.bodies == [str(number) for number in range(50)]


def test_room_does_not_wait_for_another(
    bridge: Bridge, caller: httpx.Client, upstream: Upstream, rooms: Rooms, go: threading.Event
) -> None:
    upstream.script(lambda request: scripted.when(go, BROKEN) if "elsewhere" in request.target else rooms(request))
    for _ in range(20):
        check_queued(caller.post(ELSEWHERE, json=HELLO, headers=ASYNC))
    for number in range(5):
        assert event_id(caller.post(SEND, json=text(str(number)))) == f"${number + 1}"


# While the homeserver is away


def test_what_is_accepted_while_the_homeserver_is_away_is_sent_when_it_is_back(tmp_path: Path) -> None:
    rooms = Rooms()
    token = new_token()
    with Upstream(rooms) as upstream:
        with running(upstream, tmp_path, wait_seconds=HASTE_SECONDS) as bridge, as_caller(bridge, token) as caller:
            assert event_id(caller.post(SEND, json=text("before"), headers=PATIENT)) == "$1"
            upstream.refuse()
            upstream.drop()
            for number in range(10):
                check_queued(caller.post(SEND, json=text(str(number)), headers=ASYNC))
            check_queued(caller.post(SEND, json=text("waited for")))
        # Even a bridge that starts now knows whose token it is.
        with running(upstream, tmp_path, wait_seconds=HASTE_SECONDS) as bridge, as_caller(bridge, token) as caller:
            check_queued(caller.post(SEND, json=text("after a restart"), headers=ASYNC))
            stranger = bridge.post(SEND, json.dumps(HELLO).encode(), "Prefer: respond-async")
            assert (stranger.status, stranger.headers["retry-after"]) == (503, "1")
            not_ready = caller.get("/readyz")
            assert (not_ready.status_code, not_ready.json()["flowbridge"]["failed"]) == (503, "homeserver")
            assert not_ready.json()["flowbridge"]["queued"] == 12
            upstream.listen()
            assert len(rooms.wait_for(13)) == 13
            assert rooms.bodies == ["before", *map(str, range(10)), "waited for", "after a restart"]
            bridge.clear()
            until(lambda: caller.get("/readyz").status_code == 200)  # what it found is told for a second
            assert caller.get("/readyz").json()["queued"] == 0


# Full


def test_full_store_is_a_503_and_nothing_is_half_accepted(
    upstream: Upstream, rooms: Rooms, go: threading.Event, tmp_path: Path
) -> None:
    upstream.script(held(go, rooms))
    with running(upstream, tmp_path, max_queued=3, max_share=1.0) as bridge, as_caller(bridge) as caller:
        for number in range(3):
            check_queued(caller.post(SEND, json=text(str(number)), headers=ASYNC))
        for path, headers in itertools.product((SEND, ELSEWHERE, MATRIX + SEND), (ASYNC, KEYED, {})):
            answer = caller.post(path, json=text("too much"), headers=headers)
            assert (answer.status_code, answer.json()["errcode"]) == (503, "M_UNKNOWN")
            assert "queued already" in answer.json()["error"]
            assert (answer.headers["retry-after"], answer.json()["retry_after_ms"]) == ("10", 10_000)
            assert "flowbridge-delivery" not in answer.headers
        assert len(bridge.queued()) == 3
        go.set()
        last = repeated(
            lambda: caller.post(SEND, json=text("3"), headers=KEYED), lambda found: found.status_code != 503
        )
        assert event_id(last) == "$4"
        assert not is_replayed(last)
    assert rooms.bodies == ["0", "1", "2", "3"]


def test_full_room_is_a_503_and_other_rooms_are_not(
    upstream: Upstream, rooms: Rooms, go: threading.Event, tmp_path: Path
) -> None:
    slow = held(go, rooms)
    upstream.script(lambda request: slow(request) if "%21room" in request.target else rooms(request))
    with running(upstream, tmp_path, max_queued_per_room=2) as bridge, as_caller(bridge) as caller:
        for number in range(2):
            check_queued(caller.post(SEND, json=text(str(number)), headers=ASYNC))
        answer = caller.post(SEND, json=text("too much"), headers=ASYNC)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert "for this room" in answer.json()["error"]
        assert caller.post(ELSEWHERE, json=text("elsewhere")).status_code == 200
        go.set()
        bridge.clear()
    assert sorted(rooms.bodies) == ["0", "1", "elsewhere"]


# The end of the bridge


def test_bridge_that_ends_answers_who_waits(
    upstream: Upstream, rooms: Rooms, go: threading.Event, tmp_path: Path
) -> None:
    upstream.script(held(go, rooms))
    with (
        ThreadPoolExecutor(2) as callers,
        running(upstream, tmp_path, timing=Timing(stop_seconds=3), request_seconds=SHORT_REQUEST_SECONDS) as bridge,
    ):
        flow, matrix = (
            callers.submit(bridge.post, target, json.dumps(text(name)).encode(), f"Authorization: Bearer {name}")
            for name, target in (("flow", SEND), ("matrix", MATRIX + SEND))
        )
        rooms.wait_for(2)
    assert flow.result().status == 202
    assert matrix.result().status == 504
    go.set()
    with running(upstream, tmp_path) as bridge:
        bridge.wait_until(flow.result().headers["flowbridge-delivery"], "sent")
        bridge.wait_until(matrix.result().headers["flowbridge-delivery"], "sent")
    assert sorted(rooms.bodies) == ["flow", "matrix"]


@contextmanager
def serving_in(folder: Path, upstream: Upstream) -> Iterator[tuple[Bridge, Running]]:
    """A bridge that is a process of its own, with its store in this folder."""
    log = folder / "log"
    with serving(cwd=folder, log=log, BASE_URL=upstream.url, ACCESS_TOKEN=BOT_TOKEN, FLOWBRIDGE_API_KEYS=KEY) as (
        url,
        process,
    ):
        yield Bridge(url, upstream), process
    assert "Traceback" not in log.read_text()


def test_what_was_answered_202_survives_kill_9(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    """The answer to the first is lost besides: the homeserver has it, and is asked once more."""

    def script(request: Request) -> Behaviour | None:
        rooms(request)
        return scripted.silence if request.method == "PUT" else None

    upstream.script(script)
    with serving_in(tmp_path, upstream) as (bridge, process), as_caller(bridge) as caller:
        deliveries = [check_queued(caller.post(SEND, json=text(str(number)), headers=ASYNC)) for number in range(20)]
        process.kill()
        process.wait(PATIENCE)
    upstream.drop()
    upstream.script(rooms)
    with serving_in(tmp_path, upstream) as (bridge, _):
        rooms.wait_for(20)
        for delivery in deliveries:
            bridge.wait_until(delivery, "sent")
    assert rooms.bodies == [str(number) for number in range(20)]


def test_bridge_that_is_told_to_end_under_load_breaks_no_promise(
    upstream: Upstream, rooms: Rooms, tmp_path: Path
) -> None:
    answers: list[tuple[str, Answer]] = []
    ends = threading.Event()

    def load(bridge: Bridge, name: int) -> None:
        for number in itertools.count():
            body = f"{name}-{number}"
            prefer = ["Prefer: respond-async"] if number % 2 else []
            request = post(SEND, json.dumps(text(body)).encode(), f"Authorization: Bearer loader-{name}", *prefer)
            try:
                client = bridge.connect()
            except OSError:
                return  # nobody listens any more
            with client:
                if not client.try_to_send(request):
                    return
                try:
                    answers.append((body, client.answer()))
                except (OSError, AssertionError):
                    # Whoever was not taken in yet is hung up on; but not who was, and not before it is told to end.
                    assert ends.is_set()
                    return

    with serving_in(tmp_path, upstream) as (bridge, process), ThreadPoolExecutor(8) as callers:
        loading = [callers.submit(load, bridge, name) for name in range(8)]
        rooms.wait_for(100)
        ends.set()
        process.terminate()
        for done in loading:
            done.result(PATIENCE + Timing().stop_seconds)
        assert process.wait(PATIENCE + Timing().stop_seconds) == 0
    assert {answer.status for _, answer in answers} <= {200, 202, 503}
    accepted = [body for body, answer in answers if answer.status in (200, 202)]
    assert len(accepted) >= 100
    with serving_in(tmp_path, upstream) as (bridge, _):
        bridge.wait_until_idle()
    assert len(rooms.bodies) == len(set(rooms.bodies))
    assert set(accepted) <= set(rooms.bodies)
    for name in range(8):
        mine = [int(body.split("-")[1]) for body in rooms.bodies if body.startswith(f"{name}-")]
        assert mine == sorted(mine)
