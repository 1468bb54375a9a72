"""/healthz, /readyz and /metrics: what an operator is told."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowbridge.models.timing import Timing
from flowbridge.web import middleware
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    HELLO,
    KEY,
    ROOM,
    SEND,
    Bridge,
    as_caller,
    post,
    running,
)
from tests.http.sends import ASYNC, BROKEN, MATRIX, STATE, UNKNOWN_TOKEN, check_queued, event_id, first, limited
from tests.patience import until
from tests.upstream import PATIENCE, Behaviour, Request, Rooms, Upstream


def test_readyz_tells_what_there_is(caller: httpx.Client, upstream: Upstream) -> None:
    found = caller.get("/readyz")
    assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
    assert found.json() == {
        "ready": True,
        "queued": 0,
        "accounts_paused": 0,
        "homeserver": upstream.url,
        "bot": scripted.user_of(BOT_TOKEN),
    }


def test_store_that_may_grow_no_more_is_not_ready(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    with running(upstream, tmp_path, max_database_bytes=1) as bridge, as_caller(bridge) as caller:
        answer = caller.post(SEND, json=HELLO, headers=ASYNC)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        not_ready = caller.get("/readyz")
        assert (not_ready.status_code, not_ready.headers["retry-after"]) == (503, "2")
        assert not_ready.json()["flowbridge"]["failed"] == "store"
        assert "1 are allowed" in not_ready.json()["error"]
        assert figures(caller)["flowbridge_store_full", ()] == 1
    assert rooms.events == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/deliveries", STATE, MATRIX + STATE])
def test_head_is_a_get_without_its_body(bridge: Bridge, path: str) -> None:
    with bridge.connect() as client:
        head = client.send(post(path, method="HEAD")).answer("HEAD")
        after = client.send(post("/healthz", method="GET")).answer()
    got = bridge.post(path, method="GET")
    assert (head.status, after.status) == (200, 200)
    assert head.headers["content-type"] == got.headers["content-type"]


def test_probes_do_not_wait_behind_what_else_comes_from_their_address(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 large bodies of strangers kept /healthz waiting for 45 s: an orchestrator would have ended the bridge."""
    monkeypatch.setattr(middleware, "RECEIVED_BYTE_SECONDS", 1e-3)
    with running(upstream, tmp_path, timing=Timing(stop_seconds=1)) as bridge, bridge.connect() as stranger:
        large = post("/nothing", b"x" * 50_000)
        assert bridge.ask(large).status == 404
        stranger.send(large)
        assert stranger.is_silent(0.3), "its answer is yet to be paid for"
        for path in ("/healthz", "/readyz") * 2:
            assert bridge.ask(post(path, method="GET")).status == 200
        assert stranger.is_silent(0.1)


Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def figures(caller: httpx.Client) -> Figures:
    """All of /metrics, as Prometheus reads it, by name and labels."""
    answer = caller.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_figures_show_what_is_stuck(
    upstream: Upstream, rooms: Rooms, go: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(first_pause=0.05, token_pause=60.0, count_seconds=0.05)
    with (
        running(upstream, tmp_path, request_seconds=2 * PATIENCE, timing=timing) as bridge,
        ExitStack() as stack,
    ):
        before = figures(stack.enter_context(as_caller(bridge)))
        held, uncertain, paused, refused = (stack.enter_context(as_caller(bridge)) for _ in range(4))
        upstream.script(first(limited(20), then=rooms))
        assert event_id(held.post(SEND, json=HELLO)) == "$1"
        assert event_id(held.post(MATRIX + SEND, json=HELLO)) == "$2"
        upstream.always(scripted.matrix_error(403, "M_FORBIDDEN", "no"), at="/send/")
        assert refused.post(SEND, json=HELLO).status_code == 403
        upstream.script(first(BROKEN, then=Held(go)))
        check_queued(uncertain.post(SEND, json=HELLO, headers=ASYNC))
        upstream.wait_for_events(6)
        check_queued(held.post(SEND, json=HELLO, headers=ASYNC))
        upstream.wait_for_events(7)
        upstream.always(UNKNOWN_TOKEN, at="/send/")
        check_queued(paused.post(SEND, json=HELLO, headers=ASYNC))
        upstream.wait_for_events(8)
        wanted: Figures = {
            ("flowbridge_queued_events", ()): 3,
            ("flowbridge_dead_events", ()): 1,
            ("flowbridge_uncertain_lanes", ()): 1,
            ("flowbridge_accounts_paused", ()): 1,
            ("flowbridge_homeserver_up", ()): 1,
            ("flowbridge_store_full", ()): 0,
            ("flowbridge_lanes", (("state", "sending"),)): 2,
            ("flowbridge_lanes", (("state", "pause"),)): 1,
            ("flowbridge_lanes", (("state", "idle"),)): 1,
        }
        wait_for_figures(paused, wanted)
        until(lambda: figures(paused)["flowbridge_oldest_queued_seconds", ()])  # known with the next count
        now = figures(paused)
        assert 0 < now["flowbridge_oldest_queued_seconds", ()] < 2 * PATIENCE
        assert now["flowbridge_store_bytes", ()] > 4_096
        grown = {name: now.get(name, 0) - before.get(name, 0) for name in now}
        assert grown["flowbridge_events_accepted_total", (("surface", "flow"),)] == 5
        assert grown["flowbridge_events_accepted_total", (("surface", "matrix"),)] == 1
        assert grown["flowbridge_events_settled_total", (("state", "sent"),)] == 2
        assert grown["flowbridge_events_settled_total", (("state", "dead"),)] == 1
        assert grown["flowbridge_attempts_total", (("verdict", "sent"),)] == 2
        assert grown["flowbridge_attempts_total", (("verdict", "slow"),)] == 1
        assert grown["flowbridge_attempts_total", (("verdict", "again"),)] == 1
        assert grown["flowbridge_attempts_total", (("verdict", "token"),)] == 1
        assert grown["flowbridge_rate_limited_seconds_total", ()] == pytest.approx(0.02)
        assert grown["flowbridge_commit_seconds_count", ()] >= 3
        assert grown["flowbridge_commit_seconds_sum", ()] > 0
        assert grown["flowbridge_leases_lost_total", ()] == 0
        assert grown["flowbridge_commit_failures_total", ()] == 0
        assert grown["flowbridge_http_requests_total", (("status", "202"),)] == 3
        page = paused.get("/metrics").text
        go.set()
    for secret in (ROOM, "room:upstream", "upstream", "@", "token-", KEY, "m.room.message", str(tmp_path)):
        assert secret not in page


class Held:
    """A script: no send is answered before the event."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, request: Request) -> Behaviour | None:
        return scripted.when(self._event, BROKEN) if request.method == "PUT" else None


def wait_for_figures(caller: httpx.Client, wanted: Figures) -> Figures:
    ending = time.monotonic() + PATIENCE
    while True:
        found = figures(caller)
        seen = {name: found.get(name) for name in wanted}
        if seen == wanted:
            return found
        assert time.monotonic() < ending, seen
        time.sleep(0.02)
