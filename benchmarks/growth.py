"""What a send costs as the bridge grows: into 20,000 rooms, and beside a million events of history."""

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from threading import Event, Thread
from urllib.request import Request, urlopen

from benchmarks import load
from benchmarks.load import Load
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import Command, PeerError, Server, running

FEW, MANY, QUICK_MANY = 10, 20_000, 3_000
EVENTS, QUICK_EVENTS = 1_000_000, 100_000
ROUNDS = 4
BLOCKS_SECONDS = 120  # for which the bridge may take to learn what is in its history
FILTERS = {
    "no filter": "",
    "state=queued, with none": "state=queued",
    "a room that has none": "room=!nowhere:example.org",
    "a type that has none": "type=org.rare",
    "a key that has none": "key=nothing",
    "until before all": "until=2020-01-01T00:00:00Z",
    "until 10 days ago": "until=10d",
}
FILL = """
WITH RECURSIVE numbers(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM numbers WHERE n < :events)
INSERT INTO outbox (delivery, lane, account, room_id, event_type, content, txn_id, state, attempts, history, event_id,
    accepted_at, settled_at)
SELECT 'history-' || n, 'a|!old' || n % 1000 || ':example.org', 'a', '!old' || n % 1000 || ':example.org',
    'm.room.message', '{"body":"Build ' || n || ' passed in 3:12","msgtype":"m.text"}', 'history-' || n, 'sent', 1,
    '[{"at":1,"ms":12,"status":200}]', '$' || n, :first + n * :step, :first + n * :step
FROM numbers
"""
DAY_MS = 86_400_000
ROOMS_ABOUT = f"""\
Synchronous sends over 32 connections into {FEW} rooms and into {MANY:,} in turns, one bridge for each (SQLite), in
turns; median of the rounds, and of their ratios. Each send into a room that was quiet for 10 s asks the homeserver
first whether the room is encrypted: "not asked" is with FLOWBRIDGE_ENCRYPTED_ROOMS=allow. --quick has {QUICK_MANY:,}
rooms."""
HISTORY_ABOUT = f"""\
A page of GET /deliveries over {EVENTS:,} sent events (SQLite), median of five; sends beside one client that reads page
after page; and sends while the bridge deletes all that history, which has become too old. --quick has {QUICK_EVENTS:,}
events."""


def rooms(run: Run) -> Section:
    """Processor time of a send into many rooms, against that into few."""
    number = QUICK_MANY if run.quick else MANY
    rows, targets = [], []
    for name, settings in (("", {}), (", not asked", {"FLOWBRIDGE_ENCRYPTED_ROOMS": "allow"})):
        few, many, ratio = _rooms(run, settings, number)
        rows.append([f"{FEW} rooms{name}", f"{few:,.0f}", "1"])
        rows.append([f"{number:,} rooms{name}", f"{many:,.0f}", f"{ratio:.2f}"])
        targets.append(Target(f"{number:,} rooms: processor time of a send into {FEW}{name}", ratio, 1.3, " times"))
    return Section("Rooms", ROOMS_ABOUT, ["sends into", "processor µs of a send", "ratio"], rows, targets)


def _rooms(run: Run, settings: dict[str, str], many: int) -> tuple[float, float, float]:
    with (
        running(_command(run, settings), run.directory) as one,
        running(_command(run, settings), run.directory) as other,
    ):
        bridges = {FEW: one, many: other}
        for number, bridge in bridges.items():
            sent, path = 0, bridge.url + load.SEND_PATH
            while sent < 2 * number:  # until each room is known
                sent += load.run(path, run.seconds, rooms=number, prefer="respond-async").requests
            _drained(bridge)
        pairs = []
        for _ in range(2 if run.quick else ROUNDS):
            pairs.append([_cpu_us(bridge, run.seconds, number) for number, bridge in bridges.items()])
            say(f"  {FEW} rooms {pairs[-1][0]:,.0f} µs   {many:,} rooms {pairs[-1][1]:,.0f} µs")
    return median(p[0] for p in pairs), median(p[1] for p in pairs), median(p[1] / p[0] for p in pairs)


def _cpu_us(bridge: Server, seconds: float, number: int) -> float:
    before = bridge.cpu_seconds()
    sent = load.run(bridge.url + load.SEND_PATH, seconds, rooms=number)
    if sent.failures or not sent.requests:
        raise PeerError(f"{sent.failures} of {sent.requests} sends failed")
    return (bridge.cpu_seconds() - before) * 1e6 / sent.requests


def _drained(bridge: Server) -> None:
    while load.metric(bridge.url, "flowbridge_queued_events"):
        time.sleep(0.1)


def history(run: Run) -> Section:
    """Filters, sends beside a reader, and sends beside a purge."""
    file = run.directory / "history.db"
    settings = {
        "ACCESS_TOKEN": "syt_bot",
        "FLOWBRIDGE_MAX_DATABASE_BYTES": str(20 << 30),
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{file}",
    }
    events = QUICK_EVENTS if run.quick else EVENTS
    with running(_command(run, settings), run.directory):
        pass  # it makes the tables
    _fill(file, events)
    command = _command(run, settings)
    key = _admin_key(command)
    with running(command, run.directory) as bridge:
        _wait_for_blocks(file, events)
        times = {name: median(_page_ms(bridge, key, query) for _ in range(5)) for name, query in FILTERS.items()}
        for name, taken in times.items():
            say(f"  {name}: {taken:.0f} ms")
        beside = median(_beside(run, bridge, key) for _ in range(2 if run.quick else ROUNDS))
        quiet = [load.run(bridge.url + load.SEND_PATH, run.seconds) for _ in range(3)]
    with running(_command(run, {**settings, "FLOWBRIDGE_KEEP_SENT_DAYS": "0.5"}), run.directory) as bridge:
        purging = [load.run(bridge.url + load.SEND_PATH, run.seconds) for _ in range(3)]
        left = _left(file)
    p99 = _median(purging, lambda one: one.p99_ms) / _median(quiet, lambda one: one.p99_ms)
    say(f"  purge: {events - left:,} of {events:,} in {3 * run.seconds:.0f} s, p99 {p99:.2f} times that without it")
    return Section(
        title="History",
        about=HISTORY_ABOUT,
        header=["what", "measured"],
        rows=[
            *([f"{name}, ms", f"{taken:.0f}"] for name, taken in times.items()),
            ["rate of sends beside a reader", f"{beside:.2f}"],
            ["p99 of sends beside a purge, of that without it", f"{p99:.2f}"],
            ["events deleted in a second of it", f"{(events - left) / (3 * run.seconds):,.0f}"],
        ],
        targets=[
            Target("a page of the delivery log, by any filter", max(times.values()), 100, " ms"),
            Target("sends beside a reader of the delivery log", beside, 0.9, at_least=True),
            Target("p99 of sends beside a purge, of that without it", p99, 2, " times"),
        ],
    )


def _command(run: Run, settings: dict[str, str]) -> Command:
    command = flowbridge_command(run.upstream.url)
    return replace(command, environment={**command.environment, **settings})


def _fill(file: Path, events: int) -> None:
    first = int(time.time() * 1000) - 20 * DAY_MS
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(FILL, {"events": events, "first": first, "step": 19 * DAY_MS // events})


def _left(file: Path) -> int:
    with closing(sqlite3.connect(file)) as connection:
        return int(connection.execute("SELECT count(*) FROM outbox WHERE delivery LIKE 'history-%'").fetchone()[0])


def _wait_for_blocks(file: Path, events: int) -> None:
    deadline = time.monotonic() + BLOCKS_SECONDS
    with closing(sqlite3.connect(file)) as connection:
        while connection.execute("SELECT count(*) FROM log_blocks").fetchone()[0] < events // 4_096 - 2:
            if time.monotonic() > deadline:
                raise PeerError("the bridge does not learn what is in its history")
            time.sleep(0.5)


def _admin_key(command: Command) -> str:
    made = subprocess.run(
        [command.argv[0], "keys", "create", "--name", "bench", "--admin"],
        env=command.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    words = [word for word in made.stdout.split() if len(word) > 25]
    if not words:
        raise PeerError(f"no key: {made.stderr.strip()[:160]}")
    return words[0]


def _page_ms(bridge: Server, key: str, query: str) -> float:
    began = time.perf_counter()
    request = Request(f"{bridge.url}/deliveries?{query}", headers={"Authorization": f"Bearer {key}"})  # noqa: S310 (our own)
    with urlopen(request, timeout=60) as answer:  # noqa: S310 (likewise)
        json.load(answer)
    return (time.perf_counter() - began) * 1000


def _beside(run: Run, bridge: Server, key: str) -> float:
    """The rate of sends while a client reads page after page, of that without it."""
    alone = load.run(bridge.url + load.SEND_PATH, run.seconds)
    ends = Event()

    def read() -> None:
        while not ends.is_set():
            _page_ms(bridge, key, FILTERS["a room that has none"])

    reader = Thread(target=read)
    reader.start()
    try:
        return load.run(bridge.url + load.SEND_PATH, run.seconds).rate / alone.rate
    finally:
        ends.set()
        reader.join()


def _median(loads: list[Load], figure: Callable[[Load], float]) -> float:
    return median(map(figure, loads))
