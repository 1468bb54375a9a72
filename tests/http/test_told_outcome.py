"""An outcome that was told is what the delivery log shows, although it is on its way to the disk still."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, SEND, Bridge, as_caller, running
from tests.http.sends import event_id
from tests.upstream import PATIENCE, Request, Rooms, Upstream

TIMES = 10


@pytest.fixture
def sent(caller: httpx.Client, rooms: Rooms) -> Callable[[], str]:
    """`sent()`: the delivery of a keyed send that was answered 200 a moment ago."""
    numbers = iter(range(1_000))

    def send() -> str:
        number = next(numbers)
        answer = caller.post(SEND, json=HELLO, headers={"Idempotency-Key": f"told-{number}"})
        assert event_id(answer) == f"${number + 1}"
        return answer.headers["Flowbridge-Delivery"]

    return send


def test_delivery_is_sent_right_after_the_200(caller: httpx.Client, sent: Callable[[], str]) -> None:
    for number in range(TIMES):
        delivery = sent()
        shown = caller.get(f"/deliveries/{delivery}").json()
        assert (shown["status"], shown.get("event_id")) == ("sent", f"${number + 1}")
        assert shown["settled_at"] >= shown["accepted_at"]
        assert [attempt["status"] for attempt in shown["history"]] == [200]
        assert shown["attempts"] == 1


def test_lists_have_it_as_sent_right_after_the_200(caller: httpx.Client, sent: Callable[[], str]) -> None:
    for _ in range(TIMES):
        delivery = sent()
        assert caller.get("/deliveries?state=queued").json()["deliveries"] == []
        assert caller.get("/deliveries?state=sent&limit=1").json()["deliveries"][0]["delivery_id"] == delivery


def test_it_can_be_replayed_and_deleted_right_after_the_200(caller: httpx.Client, sent: Callable[[], str]) -> None:
    for _ in range(TIMES // 2):
        assert caller.delete(f"/deliveries/{sent()}").status_code == 200
    delivery = sent()
    assert caller.post(f"/deliveries/{delivery}/replay").status_code == 202


def test_replayed_one_is_queued_again_at_once(
    bridge: Bridge, caller: httpx.Client, rooms: Rooms, sent: Callable[[], str], go: threading.Event
) -> None:
    delivery = sent()

    def held(request: Request) -> scripted.Behaviour | None:
        return scripted.when(go, rooms(request) or scripted.healthy(request)) if request.method == "PUT" else None

    bridge.upstream.script(held)
    assert caller.post(f"/deliveries/{delivery}/replay").status_code == 202
    assert caller.get(f"/deliveries/{delivery}").json()["status"] == "queued"
    go.set()
    assert bridge.wait_until(delivery, "sent")["event_id"] == "$2"


@pytest.fixture
def own(upstream: Upstream, tmp_path: Path) -> Iterator[tuple[Bridge, Path]]:
    """A bridge with a file that the test may lock."""
    with running(upstream, tmp_path) as bridge:
        yield bridge, tmp_path / "flowbridge.db"


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}], ids=["plain", "keyed"])
def test_reading_it_does_not_wait_for_the_writer(
    own: tuple[Bridge, Path], rooms: Rooms, go: threading.Event, key: dict[str, str]
) -> None:
    bridge, file = own

    def held(request: Request) -> scripted.Behaviour | None:
        return scripted.when(go, rooms(request) or scripted.healthy(request)) if request.method == "PUT" else None

    bridge.upstream.script(held)
    with as_caller(bridge) as caller, ThreadPoolExecutor(1) as threads:
        sending = threads.submit(lambda: caller.post(SEND, json=HELLO, headers=key))
        bridge.upstream.wait_for_events(1)
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            go.set()
            delivery = sending.result(PATIENCE).headers["Flowbridge-Delivery"]
            shown = caller.get(f"/deliveries/{delivery}").json()
            assert (shown["status"], shown["event_id"]) == ("sent", "$1")
            other.execute("ROLLBACK")
        assert bridge.wait_until(delivery, "sent")["event_id"] == "$1"
