"""`flowbridge serve` whose database file is removed, moved, replaced or overwritten while it runs."""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models.timing import Timing
from tests.conftest import MakeRoom
from tests.integration.conftest import Room
from tests.patience import PATIENCE
from tests.processes import Running, free_port, run, serving_at
from tests.upstream import Request, Upstream, answer, matrix_error

KEY = "fb_missing-file-of-32-characters-and-more"
BOT = "bot-token"
ROOM = "!room:upstream"
ASYNC = {"Prefer": "respond-async"}


@dataclass
class Bridge:
    """A running process on `folder/flowbridge.db`."""

    http: httpx.Client
    process: Running
    file: Path
    log: Path
    room: str = ROOM

    def send(self, body: str, **headers: str) -> httpx.Response:
        content = {"msgtype": "m.text", "body": body}
        return self.http.post(f"/rooms/{self.room}/send/m.room.message", json=content, headers=headers)

    def accept(self, body: str) -> None:
        assert self.send(body, **ASYNC).status_code == 202

    def must_refuse(self, reason: str, body: str = "refused") -> None:
        """Nothing is accepted, and the callers and the operator are told why."""
        refused = self.send(body, **ASYNC)
        assert refused.status_code == 503, refused.text
        assert reason in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) >= 1
        ready = self.http.get("/readyz")
        assert (ready.status_code, ready.json()["flowbridge"]["failed"]) == (503, "store")
        assert reason in ready.json()["error"]
        assert str(self.file) not in refused.text + ready.text
        self.said("store_missing", level="error")

    def until_ready(self, ready: bool) -> None:
        self.until(lambda: (self.http.get("/readyz").status_code == 200) == ready)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def lines(self, action: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["action"] == action]

    def said(self, action: str, level: str) -> None:
        self.until(lambda: self.lines(action))
        line = self.lines(action)[-1]
        assert line["level"] == level
        assert line["hint"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


@contextmanager
def started(folder: Path, homeserver: str, token: str = BOT, *, room: str = ROOM, **more: str) -> Iterator[Bridge]:
    file, log = folder / "flowbridge.db", folder.parent / f"log-{time.monotonic_ns()}"
    settings = {
        "BASE_URL": homeserver,
        "ACCESS_TOKEN": token,
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{file}",
        "FLOWBRIDGE_API_KEYS": KEY,
        "FLOWBRIDGE_LOG_FORMAT": "json",
        "FLOWBRIDGE_REQUEST_SECONDS": "5",
        **more,
    }
    with (
        serving_at(free_port(), settings, log=log, cwd=folder.parent) as (url, process),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE) as client,
    ):
        yield Bridge(client, process, file, log, room)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "store"
    found.mkdir()
    return found


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def bridge(folder: Path, upstream: Upstream) -> Iterator[Bridge]:
    with started(folder, upstream.url) as bridge:
        assert bridge.send("first").status_code == 200
        yield bridge


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    for each in file.parent.glob("flowbridge.db*"):
        each.unlink()


def move(file: Path) -> None:
    file.rename(file.with_name("elsewhere.db"))


def remove_wal(file: Path) -> None:
    file.with_name("flowbridge.db-wal").unlink()


def replace(file: Path) -> None:
    other = file.with_name("other.db")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE other (id int)")
    connection.close()
    other.rename(file)


def truncate(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize(
    ("harm", "reason"), [(replace, "another file was put in the place"), (truncate, "was overwritten")]
)
def test_nothing_is_accepted_from_the_moment_the_file_is_gone(
    bridge: Bridge, harm: Callable[[Path], None], reason: str, upstream: Upstream
) -> None:
    harm(bridge.file)
    first = bridge.send("next", **ASYNC)  # and not after some seconds: 504 when it was on its way already
    assert first.status_code in (503, 504), first.text
    bridge.must_refuse(reason)
    assert bridge.send("keyed", **{"Idempotency-Key": "1"}).status_code == 503
    assert bodies(upstream) == ["first", "next"][: 1 + (first.status_code == 504)]


def test_idle_bridge_notices_within_seconds(bridge: Bridge) -> None:
    bridge.file.with_name("flowbridge.db-shm").unlink()
    bridge.until_ready(False)
    bridge.until(lambda: bridge.lines("store_missing"))
    bridge.must_refuse("-shm file")


def test_it_goes_on_when_its_folder_is_back(bridge: Bridge) -> None:
    folder = bridge.file.parent
    folder.rename(folder.with_name("elsewhere"))
    bridge.until_ready(False)
    bridge.until(lambda: bridge.lines("store_missing"))  # else one more may be on its way to its room
    bridge.must_refuse("removed or moved")
    folder.with_name("elsewhere").rename(folder)
    bridge.until_ready(True)
    bridge.accept("goes on")
    bridge.until(lambda: bridge.lines("store_back"))


@pytest.mark.parametrize("harm", [remove, remove_all, move, remove_wal])
def test_what_was_queued_is_sent_once_and_what_was_refused_never(
    folder: Path, upstream: Upstream, harm: Callable[[Path], None]
) -> None:
    """By the process that has the file still, or after its end by the next one, which finds all that was there."""
    upstream.script(unless_named("a"))
    with started(folder, upstream.url) as bridge:
        bridge.accept("a")
        for number in range(10):
            bridge.accept(f"number {number}")
        harm(bridge.file)
        bridge.must_refuse("removed")
        bridge.until(lambda: "a" in bodies(upstream))
        bridge.stop()
        assert (bridge.file.stat().st_mode & 0o777) == 0o600
    upstream.script(empty_rooms)
    with started(folder, upstream.url) as bridge:
        bridge.until(lambda: len(bodies(upstream)) == 11)
        assert bridge.send("last").status_code == 200
    assert bodies(upstream) == ["a", *(f"number {number}" for number in range(10)), "last"]


def test_lock_file_that_is_removed_is_made_again(bridge: Bridge, folder: Path, upstream: Upstream) -> None:
    lock = folder / "flowbridge.db.lock"
    lock.unlink()
    bridge.until(lock.exists)
    bridge.said("store_lock_made_again", level="warning")
    refused = run("serve", "--port", "0", BASE_URL=upstream.url, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{bridge.file}")
    assert "is in use by another flowbridge" in refused.stderr
    bridge.accept("goes on")


def test_two_that_run_on_one_file_all_the_same_are_told_and_the_first_one_stops(
    bridge: Bridge, folder: Path, upstream: Upstream
) -> None:
    upstream.script(empty_rooms)
    stop_between_transactions(bridge)  # else it would make the lock file again
    try:
        (folder / "flowbridge.db.lock").unlink()
        with started(folder, upstream.url) as second:
            bridge.process.send_signal(signal.SIGCONT)
            bridge.until_ready(False)
            bridge.until(lambda: bridge.lines("store_missing"))  # else one more may be on its way to its room
            bridge.must_refuse("another flowbridge")
            assert second.send("second").status_code in (200, 202)  # later, where the lane is left to the first one
            second.until(lambda: bodies(upstream) == ["first", "second"])
    finally:
        bridge.process.send_signal(signal.SIGCONT)


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which files there are, and what would tell that one was written or replaced."""
    stats = {each.name: each.stat() for each in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


COMMANDS = [
    ("doctor",),
    ("keys", "list"),
    ("keys", "revoke", "first"),
    ("keys", "create"),
    ("deliveries", "list"),
    ("deliveries", "show", "some"),
    ("deliveries", "replay", "some"),
    ("deliveries", "replay", "--dead"),
    ("deliveries", "purge", "--yes"),
    ("deliveries", "purge", "--queued", "--all", "--yes"),
    ("backup", "copy.db"),
]


@pytest.mark.parametrize("harm", [remove, remove_all, replace, truncate])
def test_no_command_makes_a_file_or_uses_another_ones_wal_in_the_place_of_the_bridges(
    folder: Path, upstream: Upstream, harm: Callable[[Path], None]
) -> None:
    """What was accepted would be written beside it at the end, and the next start would know nothing of it."""
    upstream.script(lambda request: matrix_error(502, "M_UNKNOWN", "away") if request.method == "PUT" else None)
    with started(folder, upstream.url) as bridge:
        for number in range(10):
            bridge.accept(f"number {number}")
        harm(bridge.file)
        bridge.until_ready(False)
        bridge.until(bridge.file.with_name("flowbridge.db.lock").exists)
        for arguments in COMMANDS if harm is remove else COMMANDS[:3]:
            before = contents(folder)
            done = run(
                *arguments,
                BASE_URL=upstream.url,
                ACCESS_TOKEN=BOT,
                FLOWBRIDGE_DATABASE_URL=f"sqlite:///{bridge.file}",
            )
            assert done.returncode in (1, 2), (arguments, done)
            assert "stop that" in done.stdout + done.stderr, (arguments, done)
            assert "Traceback" not in done.stderr
            now = contents(folder)
            assert now.keys() == before.keys(), arguments
            assert now.get("flowbridge.db") == before.get("flowbridge.db"), arguments
        assert not Path("copy.db").exists()
        if harm in (remove, remove_all):
            bridge.stop()
            assert [each.name for each in folder.glob("*rescued*")] == []
            with sqlite3.connect(bridge.file) as connection:
                assert connection.execute("SELECT count(*) FROM outbox WHERE state = 'queued'").fetchone() == (10,)
            connection.close()
        else:
            bridge.kill()


@pytest.mark.parametrize("arguments", COMMANDS)
def test_no_command_writes_what_another_database_left_into_a_new_one(
    folder: Path, upstream: Upstream, arguments: tuple[str, ...]
) -> None:
    """After kill -9 the file was removed, or a backup put in its place, and the -wal of the old one is there still."""
    with started(folder, upstream.url) as bridge:
        assert bridge.send("first").status_code == 200
        assert (
            run("backup", str(folder / "backup.db"), FLOWBRIDGE_DATABASE_URL=f"sqlite:///{bridge.file}").returncode == 0
        )
        bridge.accept("second")
        bridge.kill()
    wal = bridge.file.with_name("flowbridge.db-wal")
    left, copy = wal.read_bytes(), (folder / "backup.db").read_bytes()
    settings = {"BASE_URL": upstream.url, "ACCESS_TOKEN": BOT, "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{bridge.file}"}
    bridge.file.unlink()
    done = run(*arguments, **settings)
    assert done.returncode in (1, 2), done
    assert "flowbridge.db-wal" in done.stdout + done.stderr, done
    assert not bridge.file.exists()
    bridge.file.write_bytes(copy)
    done = run(*arguments, **settings)
    assert done.returncode in (1, 2), done
    assert "flowbridge.db-wal belongs to another database" in done.stdout + done.stderr, done
    assert (wal.read_bytes(), bridge.file.read_bytes()) == (left, copy)


def stop_between_transactions(bridge: Bridge) -> None:
    """Let it stand still, without SQLite's own lock on the database: with it no other process could open that."""
    ending = time.monotonic() + PATIENCE
    while True:
        bridge.process.send_signal(signal.SIGSTOP)
        with closing(sqlite3.connect(bridge.file, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                assert time.monotonic() < ending
            else:
                connection.execute("ROLLBACK")
                return
        bridge.process.send_signal(signal.SIGCONT)


def test_commands_beside_do_not_make_a_bridge_unready(bridge: Bridge) -> None:
    url = f"sqlite:///{bridge.file}"
    for arguments in (["deliveries", "list"], ["keys", "list"], ["deliveries", "purge", "--yes"]):
        assert bridge.http.get("/readyz").status_code == 200
        assert run(*arguments, FLOWBRIDGE_DATABASE_URL=url).returncode == 0
    with sqlite3.connect(bridge.file) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    began = time.monotonic()
    while time.monotonic() < began + 2 * Timing().file_check_seconds:
        bridge.accept("goes on")
    assert bridge.http.get("/readyz").status_code == 200
    assert not bridge.lines("store_missing")


def test_real_homeserver_has_what_was_accepted_and_nothing_else(
    folder: Path, synapse: LocalSynapse, bot: Account, make_room: MakeRoom
) -> None:
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        room = Room(make_room(bot), bot, direct)
        with started(folder, synapse.url, bot.access_token, room=room.id) as bridge:
            assert bridge.send("one").status_code == 200
            bridge.accept("two")
            remove(bridge.file)
            bridge.until_ready(False)
            bridge.until(lambda: bridge.lines("store_missing"))
            bridge.must_refuse("removed or moved", "three")
            bridge.until(lambda: room.bodies() == ["one", "two"])
            bridge.stop()
        with started(folder, synapse.url, bot.access_token, room=room.id) as bridge:
            assert bridge.send("four").status_code == 200
            listed = bridge.http.get("/deliveries").json()["deliveries"]
            assert [one["status"] for one in listed] == ["sent"] * 3
        assert room.bodies() == ["one", "two", "four"]


def unless_named(body: str) -> Callable[[Request], Any]:
    """A script: all sends but of this message fail for now."""

    def script(request: Request) -> Any:
        fails = request.method == "PUT" and request.json()["body"] != body
        return matrix_error(502, "M_UNKNOWN", "away") if fails else None

    return script


def empty_rooms(request: Request) -> Any:
    """A script: nothing is found that was sent before."""
    return answer({"chunk": []}) if "/messages" in request.target else None


def bodies(upstream: Upstream) -> list[str]:
    """What was sent, by the first try of each: repeats have the same transaction id."""
    return list({event.target: event.json()["body"] for event in upstream.events}.values())
