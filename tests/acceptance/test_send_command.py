"""`flowbridge send` keeps the promise: what it takes is in its room once, now or later."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import upstream as scripted
from tests.processes import free_port, run, serving_at
from tests.upstream import Behaviour, Request, Rooms, Upstream

ROOM = "!room:upstream"
TOKEN = "bot"


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def upstream(rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    monkeypatch.chdir(tmp_path)  # the store is made there
    assert run("init").returncode == 0
    with Upstream(rooms) as server:
        yield server


def settings(upstream: Upstream, **more: str) -> dict[str, str]:
    return {"BASE_URL": upstream.url, "ACCESS_TOKEN": TOKEN, **more}


def test_a_rate_limit_is_waited_out(upstream: Upstream, rooms: Rooms) -> None:
    seen: list[str] = []

    def limited(request: Request) -> Behaviour | None:
        if request.method == "PUT":
            seen.append(request.target)
            if len(seen) == 1:
                return scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Too many", retry_after_ms=300)
        return rooms(request)

    upstream.script(limited)
    done = run("send", ROOM, "m.room.message", "once", **settings(upstream, FLOWBRIDGE_WAIT_SECONDS="60"))
    assert (done.returncode, done.stdout) == (0, "$1\n"), done.stderr
    assert rooms.bodies == ["once"]
    assert len(seen) == 2
    assert len(set(seen)) == 1, "the same transaction id"


def test_what_cannot_be_sent_now_is_queued_and_sent_by_the_next_bridge(upstream: Upstream, rooms: Rooms) -> None:
    assert run("send", ROOM, "m.room.message", "first", **settings(upstream)).returncode == 0
    upstream.always(scripted.html(502))
    done = run("send", ROOM, "m.room.message", "second", **settings(upstream, FLOWBRIDGE_WAIT_SECONDS="1"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "\nqueued: " in f"\n{done.stderr}"  # behind what the log says of the homeserver
    (delivery,) = re.findall(r"flowbridge deliveries show (\S+)`", done.stderr)
    assert '"queued"' in run("deliveries", "show", delivery, "--json", **settings(upstream)).stdout

    upstream.script(rooms)
    with serving_at(free_port(), settings(upstream)):
        rooms.wait_for(2)
    assert rooms.bodies == ["first", "second"]
    assert '"sent"' in run("deliveries", "show", delivery, "--json", **settings(upstream)).stdout


def test_beside_a_running_bridge_it_goes_through_that(upstream: Upstream, rooms: Rooms) -> None:
    soon = settings(
        upstream, FLOWBRIDGE_WAIT_SECONDS="60", FLOWBRIDGE_REQUEST_SECONDS="5", FLOWBRIDGE_LEASE_SECONDS="12"
    )
    with serving_at(free_port(), soon):
        done = run("send", ROOM, "m.room.message", "first", **soon)
        assert (done.returncode, done.stdout) == (0, "$1\n"), done.stderr
        again = run("send", ROOM, "m.room.message", "second", **soon)  # into a lane that the bridge holds
        assert (again.returncode, again.stdout) == (0, "$2\n"), again.stderr
        assert rooms.bodies == ["first", "second"]


def test_a_refusal_is_told_and_nothing_is_queued(upstream: Upstream, rooms: Rooms) -> None:
    def refusing(request: Request) -> Behaviour | None:
        if request.method == "PUT":
            return scripted.matrix_error(403, "M_FORBIDDEN", "You are not allowed to send that")
        return rooms(request)

    upstream.script(refusing)
    done = run("send", ROOM, "m.room.message", "no", **settings(upstream))
    assert (done.returncode, done.stdout) == (1, "")
    assert "M_FORBIDDEN" in done.stderr
    listed = run("deliveries", "list", "--state", "queued", "--json", **settings(upstream))
    assert '"deliveries": []' in listed.stdout
