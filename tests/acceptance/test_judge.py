"""The judge itself: that it sees each kind of broken promise, and that its homeserver is as faulty as it says."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.chaos import stories
from tests.chaos.client import Client
from tests.chaos.faults import Limiter
from tests.chaos.judge import Accepted, Seen, Verdict, judge, read_accepted, read_seen
from tests.chaos.load import Load, Plan
from tests.chaos.monkey import Bridge, BridgeBroken, Monkey
from tests.chaos.options import CannotRun, Options
from tests.chaos.progress import Progress
from tests.chaos.report import Check, Report, table
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.seeds import HARMLESS, SEEDS, SOWN
from tests.chaos.trial import found_out
from tests.patience import PATIENCE
from tests.processes import REPOSITORY, Process, free_port

BOT = "syt_bot"
ROOM, OTHER = "!room:chaos.test", "!other:chaos.test"


def accepted(*numbers: int, room: str = ROOM) -> list[Accepted]:
    return [Accepted(room, n, 202) for n in numbers]


def seen(*numbers: int, room: str = ROOM) -> list[Seen]:
    return [Seen(room, n, f"${room}-{index}", f"txn-{index}", at=float(index)) for index, n in enumerate(numbers)]


# The judgement


def test_promise_is_kept_when_each_event_is_there_once_and_in_order() -> None:
    verdict = judge(accepted(0, 1, 2), seen(0, 1, 2))
    assert verdict.good
    assert (verdict.accepted, verdict.seen, verdict.distinct, verdict.rate) == (3, 3, 3, 1.5)


def test_event_that_is_not_there_is_lost() -> None:
    verdict = judge(accepted(0, 1, 2), seen(0, 2))
    assert not verdict.good
    assert verdict.lost == (f"{ROOM}#1 (answered 202)",)
    assert not verdict.doubled


def test_event_that_is_there_three_times_is_doubled_twice() -> None:
    verdict = judge(accepted(0, 1), seen(0, 0, 0, 1))
    assert not verdict.good
    assert len(verdict.doubled) == verdict.seen - verdict.distinct == 2
    assert "txn-0" in verdict.doubled[0]
    assert not verdict.out_of_order


def test_lost_and_doubled_do_not_make_up_for_each_other() -> None:
    verdict = judge(accepted(0, 1), seen(0, 0))
    assert (len(verdict.lost), len(verdict.doubled)) == (1, 1)


def test_event_after_a_later_one_is_out_of_order() -> None:
    verdict = judge(accepted(0, 1, 2, 3), seen(0, 2, 3, 1))
    assert not verdict.good
    assert verdict.out_of_order == {ROOM: ("#1 after #3",)}


def test_order_is_asked_within_a_room_only() -> None:
    verdict = judge(accepted(0, 1) + accepted(0, 1, room=OTHER), seen(0, 1) + seen(0, 1, room=OTHER))
    assert verdict.good


def test_200_with_another_events_id_is_untrue() -> None:
    verdict = judge([Accepted(ROOM, 0, 200, "$elsewhere")], seen(0))
    assert not verdict.good
    assert verdict.untrue == (f"{ROOM}#0 is not $elsewhere",)


def test_event_that_is_there_after_a_503_makes_that_untrue() -> None:
    """One that is sent once only: any other may be there by a later try."""
    refused = [Accepted(ROOM, 1, 503), Accepted(ROOM, 2, 503)]
    verdict = judge(accepted(0) + refused, seen(0, 2))
    assert verdict.red == ("untrue",)
    assert verdict.untrue == (f"{ROOM}#2 was answered 503",)
    assert (verdict.accepted, verdict.seen) == (1, 2)
    assert judge(accepted(0) + refused, seen(0)).good


def test_event_without_an_answer_may_be_there_or_not_but_not_twice() -> None:
    assert judge(accepted(0), seen(0, 1)).good
    assert judge(accepted(0, 2), seen(0, 2, 1)).good
    assert len(judge(accepted(0), seen(0, 1, 1)).doubled) == 1


def test_summary_names_the_first_offenders() -> None:
    text = str(judge(accepted(*range(9)), seen(0, 2, 1)))
    assert "out of order 1" in text
    assert f"{ROOM}#3 (answered 202)" in text
    assert "… and 1 more" in text


def test_report_is_bad_when_only_a_figure_is_missed() -> None:
    good: Verdict = judge(accepted(0), seen(0))
    assert Report("x", good, (Check("a", "a", good=True),), ()).good
    assert not Report("x", good, (Check("a", "a", good=True), Check("b", "b", good=False)), ()).good


def test_logs_are_read_without_a_half_written_line_and_without_strangers(tmp_path: Path) -> None:
    ours = {"room": ROOM, "sender": "@bot:chaos.test", "txn_id": "t", "n": 0, "event_id": "$0", "at": 1.0}
    lines = [ours, ours | {"room": OTHER}, ours | {"n": None}]
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"room": "!ro')
    assert read_seen(log, [ROOM]) == [Seen(ROOM, 0, "$0", "t", 1.0)]


def told(n: int, edits: str | None = None, *, pings: bool = False) -> dict[str, Any]:
    return {"room": ROOM, "n": n, "event_id": f"${n}", "relation": edits, "pings": pings}


def test_story_is_told_in_one_message_for_each_beginning() -> None:
    turn = [told(0, pings=True), told(1, pings=True), told(2, "$1"), told(3, "$1")]
    assert stories.offenders([*turn, told(4, pings=True), told(5, pings=True), told(6, "$5")]) == []
    assert stories.offenders([told(0, pings=True), told(1, "$0")]) == [
        f"{ROOM}#1 begins, and is an edit of $0",
        f"{ROOM}#1 does not ping",
    ]
    assert stories.offenders([*turn[:2], told(2)]) == [f"{ROOM}#2 is a first message, and nothing begins"]
    assert stories.offenders([*turn[:2], told(2, "$0", pings=True)]) == [
        f"{ROOM}#2 edits $0, and the newest is $1",
        f"{ROOM}#2 pings",
    ]


def test_event_of_a_story_is_known_by_its_text() -> None:
    bodies = [json.loads(stories.body(ROOM, n)) for n in range(4)]
    assert [body["status"] for body in bodies] == ["firing", "firing", "firing", "resolved"]
    assert [len(body["alerts"]) for body in bodies] == [1, 2, 2, 1]
    assert stories.body(ROOM, 1) != stories.body(ROOM, 1, 1)
    text = bodies[2]["commonAnnotations"]["summary"]
    assert stories.number_of({"body": "* event 9", "m.new_content": {"body": f"Chaos\n{text}, since noon"}}) == 2
    assert stories.number_of({"body": "another event"}) is None


async def test_replicas_without_a_database_are_refused() -> None:
    with pytest.raises(CannotRun):
        await SCENARIOS["replicas"](Options())


# What surrounds the judgement


def test_report_names_what_is_red_and_its_row_says_so() -> None:
    broken = Report("x", judge(accepted(0), seen()), (Check("p99", "p99: 300", good=False, short="p99 300"),))
    assert broken.red == ("lost", "p99")
    row = table([broken]).splitlines()[-1]
    assert "**broken**: lost, p99" in row
    assert "| p99 300 |" in row


def test_progress_counts_what_is_queued(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("{}\n{}\n")
    progress = Progress(lambda: 5, log, Monkey([]))
    assert "accepted 5  in their rooms 2  queued 3" in progress.line()
    log.write_text("{}\n" * 5)
    assert "queued 0" in progress.line()


def test_lease_is_told_together_with_a_request_that_fits_into_it() -> None:
    settings = Options().leased(8.0).environment
    assert settings == {"FLOWBRIDGE_LEASE_SECONDS": "8", "FLOWBRIDGE_REQUEST_SECONDS": "3"}
    asked = Options(lease=30, environment={"FLOWBRIDGE_REQUEST_SECONDS": "2"}).leased(8.0).environment
    assert asked == {"FLOWBRIDGE_LEASE_SECONDS": "30", "FLOWBRIDGE_REQUEST_SECONDS": "2"}


def test_every_scenario_says_what_it_does_and_needs_what_it_says() -> None:
    assert all(one.about and one.name == name for name, one in SCENARIOS.items())
    assert {name for name, one in SCENARIOS.items() if one.postgres} == {
        "replicas",
        "stop",
        "roll",
        "restart",
        "network",
        "encrypted_replicas",
        "hook_replicas",
    }
    assert {seed.scenario for seed in SOWN.values()} <= SCENARIOS.keys()


def test_seeds_find_what_they_break() -> None:
    """Once the bridge is rewritten, a seed must fail loudly instead of breaking nothing."""
    command = [sys.executable, "-m", "tests.chaos.seeds", *SOWN, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_constant_that_is_not_there_is_not_set() -> None:
    command = [sys.executable, "-m", "tests.chaos.seeds", "flowbridge.delivery.attempt.NO_SUCH=1", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "NO_SUCH" in done.stderr.splitlines()[-1]


def test_seed_is_found_out_by_what_it_must_break_only() -> None:
    lost, good = Report("x", judge(accepted(0), []), ()), Report("x", judge(accepted(0), seen(0)), ())
    assert found_out(SEEDS["early-202"], lost)
    assert not found_out(SEEDS["new-txn-id"], lost)
    assert not found_out(SEEDS["early-202"], good)
    assert found_out(HARMLESS["skewed-clock"], good)
    assert not found_out(HARMLESS["skewed-clock"], lost)


# The homeserver


class FaultyHomeserver:
    """The scripted homeserver over real sockets, as a bridge calls it."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE)

    def call(self, method: str, path: str, content: Any = None, token: str = BOT) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.request(method, f"/_matrix/client/v3/{path}", json=content, headers=headers)

    def send(self, room: str, txn_id: str, n: int = 0, token: str = BOT) -> httpx.Response:
        return self.call("PUT", f"rooms/{room}/send/m.room.message/{txn_id}", {"body": "x", "n": n}, token)

    def event_id(self, *arguments: Any, **named: Any) -> str:
        return str(self.send(*arguments, **named).raise_for_status().json()["event_id"])

    def steer(self, command: str, **faults: Any) -> None:
        self.http.post(f"/_judge/{command}", json=faults).raise_for_status()

    def stats(self) -> dict[str, Any]:
        return dict(self.http.get("/_judge/stats").json())

    def events(self, room: str) -> list[Seen]:
        return read_seen(self.process.directory / "events", [room])


@contextmanager
def faulty(directory: Path, *more_ports: str, **options: float) -> Iterator[FaultyHomeserver]:
    port = free_port()
    argv = [sys.executable, "-m", "tests.chaos.faulty_homeserver", "--log", str(directory / "events")]
    argv += ["--port", str(port), *more_ports]
    argv += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = Process("homeserver", argv, {}, directory)
    process.start()
    made = FaultyHomeserver(process, port)
    try:
        _wait_for(lambda: _answers(made))
        yield made
    finally:
        made.http.close()
        process.kill()


def _answers(homeserver: FaultyHomeserver) -> bool:
    try:
        return homeserver.http.get("/_judge/stats").is_success
    except httpx.TransportError:
        return False


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHomeserver]:
    with faulty(tmp_path_factory.mktemp("homeserver")) as made:
        yield made


@pytest.fixture
def homeserver(running: FaultyHomeserver) -> Iterator[FaultyHomeserver]:
    yield running
    running.steer("faults", p429=0, p500=0, plost=0, pdrop=0, pdrip=0, latency_ms=0, html=False)


@pytest.fixture
def room(request: pytest.FixtureRequest) -> str:
    return f"!{request.node.name}:chaos.test"


def test_repeated_txn_id_gives_the_old_event(homeserver: FaultyHomeserver, room: str) -> None:
    first = homeserver.event_id(room, "t1", n=7)
    assert homeserver.event_id(room, "t1", n=8) == first
    assert [(one.n, one.event_id, one.txn_id) for one in homeserver.events(room)] == [(7, first, "t1")]


def test_txn_id_counts_for_user_device_and_room(homeserver: FaultyHomeserver, room: str) -> None:
    ids = {
        homeserver.event_id(room, "t1"),
        homeserver.event_id(room, "t1", token="syt_alice"),
        homeserver.event_id(room, "t1", token="syt_bot_PHONE"),
        homeserver.event_id(f"{room}2", "t1"),
    }
    assert len(ids) == 4


def test_txn_id_is_forgotten_after_sigusr1(homeserver: FaultyHomeserver, room: str) -> None:
    first = homeserver.event_id(room, "t1")
    homeserver.process.send(signal.SIGUSR1)
    _wait_for(lambda: homeserver.event_id(room, "t1") != first)


def test_txn_id_is_forgotten_after_its_time(tmp_path: Path, room: str) -> None:
    with faulty(tmp_path, remember_seconds=0.05) as homeserver:
        first = homeserver.event_id(room, "t1")
        _wait_for(lambda: homeserver.event_id(room, "t1") != first)


def test_repeat_behind_a_later_event_is_stale(homeserver: FaultyHomeserver, room: str) -> None:
    before = homeserver.stats()["stale"]
    homeserver.event_id(room, "t1")
    homeserver.event_id(room, "t1")
    assert homeserver.stats()["stale"] == before
    homeserver.event_id(room, "t2")
    homeserver.event_id(room, "t1")
    assert homeserver.stats()["stale"] == before + 1


async def test_two_bridges_in_one_room_at_once_are_seen(tmp_path: Path) -> None:
    other = free_port()
    with faulty(tmp_path, str(other), latency_ms=100) as homeserver:
        one, two = homeserver.url, f"http://127.0.0.1:{other}"
        await asyncio.gather(_put(one, "!a", "t1"), _put(one, "!a", "t2"))
        await asyncio.gather(_put(one, "!b", "t1"), _put(two, "!c", "t2"))
        assert homeserver.stats()["overlaps"] == 0
        await asyncio.gather(_put(one, "!d", "t1"), _put(two, "!d", "t2"))
        assert homeserver.stats()["overlaps"] == 1


async def test_two_bridges_that_set_a_state_of_one_room_at_once_are_seen(tmp_path: Path) -> None:
    other = free_port()
    with faulty(tmp_path, str(other), latency_ms=100) as homeserver:
        path = "/_matrix/client/v3/rooms/!a/state/chaos.test.state"
        async with asyncio.TaskGroup() as group:
            for url in (homeserver.url, f"http://127.0.0.1:{other}"):
                group.create_task(Client(url).ask("PUT", path, b"{}", {"Authorization": f"Bearer {BOT}"}))
        assert homeserver.stats()["overlaps"] == 1


async def _put(url: str, room: str, txn_id: str) -> None:
    client = Client(url)
    path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{txn_id}"
    assert (await client.ask("PUT", path, b"{}", {"Authorization": f"Bearer {BOT}"})).status == 200
    client.close()


def test_lost_answer_leaves_the_event_in_the_room(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", plost=1)
    with pytest.raises(httpx.RemoteProtocolError):
        homeserver.send(room, "t1")
    stored = homeserver.events(room)
    homeserver.steer("faults", plost=0)
    assert homeserver.event_id(room, "t1") == stored[0].event_id


def test_dropped_request_leaves_nothing(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", pdrop=1)
    with pytest.raises(httpx.RemoteProtocolError):
        homeserver.send(room, "t1")
    assert not homeserver.events(room)


def test_429_names_its_pause(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", p429=1, retry_after_ms=50)
    answer = homeserver.send(room, "t1")
    assert (answer.status_code, answer.json()["errcode"]) == (429, "M_LIMIT_EXCEEDED")
    assert 0 < answer.json()["retry_after_ms"] <= 50
    assert not homeserver.events(room)


def test_500_may_leave_the_event_or_not(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", p500=1)
    assert {homeserver.send(room, f"t{n}").status_code for n in range(40)} == {500}
    assert 0 < len(homeserver.events(room)) < 40


def test_drip_answers_a_byte_a_second(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", pdrip=1)
    with httpx.Client(base_url=homeserver.url, trust_env=False, timeout=0.3) as http:
        path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/t1"
        with pytest.raises(httpx.ReadTimeout):
            http.put(path, json={"n": 0}, headers={"Authorization": "Bearer syt_bot"})
    assert len(homeserver.events(room)) == 1


def test_sigusr2_puts_a_misset_proxy_in_front(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.process.send(signal.SIGUSR2)
    _wait_for(lambda: homeserver.send(room, "t1").status_code == 404)
    answer = homeserver.call("GET", "account/whoami")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html")
    homeserver.process.send(signal.SIGUSR2)
    _wait_for(lambda: homeserver.send(room, "t1").status_code == 200)


def test_poisoned_event_is_a_500_each_time_and_others_pass(homeserver: FaultyHomeserver, room: str) -> None:
    path = f"rooms/{room}/send/m.room.message"
    for _ in range(3):
        answer = homeserver.call("PUT", f"{path}/t1", {"poison": True})
        assert (answer.status_code, answer.json()["errcode"]) == (500, "M_UNKNOWN")
    assert homeserver.send(room, "t2").status_code == 200
    assert len(homeserver.events(room)) == 1


def test_broken_homeserver_answers_500_to_everything(homeserver: FaultyHomeserver, room: str) -> None:
    homeserver.steer("faults", broken=True)
    assert homeserver.send(room, "t1").status_code == 500
    answer = homeserver.call("GET", "account/whoami")
    assert (answer.status_code, answer.json()["errcode"]) == (500, "M_UNKNOWN")
    homeserver.steer("faults", broken=False)
    assert homeserver.send(room, "t1").status_code == 200


def test_homeserver_goes_away_and_comes_back(homeserver: FaultyHomeserver, room: str) -> None:
    first = homeserver.event_id(room, "t1")
    homeserver.steer("down?seconds=0.3")
    _wait_for(lambda: not _answers(homeserver))
    _wait_for(lambda: _answers(homeserver))
    assert homeserver.event_id(room, "t1") == first


def test_room_tells_the_sending_device_its_txn_ids(homeserver: FaultyHomeserver, room: str) -> None:
    ids = [homeserver.event_id(room, f"t{n}", n=n) for n in range(5)]
    page = homeserver.call("GET", f"rooms/{room}/messages?dir=b&limit=3").json()
    assert [event["event_id"] for event in page["chunk"]] == ids[:1:-1]
    assert [event["unsigned"]["transaction_id"] for event in page["chunk"]] == ["t4", "t3", "t2"]
    rest = homeserver.call("GET", f"rooms/{room}/messages?dir=b&limit=3&from={page['end']}", token="syt_alice").json()
    assert [event["event_id"] for event in rest["chunk"]] == ids[1::-1]
    assert all("transaction_id" not in event["unsigned"] for event in rest["chunk"])
    assert "end" not in rest


def test_state_that_is_so_already_makes_no_event(homeserver: FaultyHomeserver, room: str) -> None:
    path = f"rooms/{room}/state/m.room.topic"
    first = homeserver.call("PUT", path, {"topic": "a"}).json()
    assert homeserver.call("PUT", f"{path}/", {"topic": "a"}).json() == first
    assert homeserver.call("PUT", path, {"topic": "b"}).json() != first
    assert homeserver.call("GET", path).json() == {"topic": "b"}


def test_rest_of_what_a_bridge_asks(homeserver: FaultyHomeserver) -> None:
    assert homeserver.http.get("/_matrix/client/versions").json()["versions"]
    who = homeserver.call("GET", "account/whoami", token="syt_alice_PHONE").json()
    assert (who["user_id"], who["device_id"]) == ("@alice:chaos.test", "PHONE")
    assert "device_id" not in homeserver.call("GET", "account/whoami", token="syt_as_nodevice").json()
    assert homeserver.call("GET", "account/whoami", token="other").json()["errcode"] == "M_UNKNOWN_TOKEN"
    plain = homeserver.call("GET", f"rooms/{ROOM}/state/m.room.encryption")
    assert (plain.status_code, plain.json()["errcode"]) == (404, "M_NOT_FOUND")
    assert homeserver.call("POST", f"join/{ROOM}", {}).json() == {"room_id": ROOM}
    assert homeserver.call("GET", "nonsense").json()["errcode"] == "M_UNRECOGNIZED"


def test_token_that_was_logged_out_is_refused_and_another_one_of_its_device_is_not(
    homeserver: FaultyHomeserver, room: str
) -> None:
    first = homeserver.event_id(room, "t", token="syt_bot_D~1")
    homeserver.http.post("/_judge/logout?token=syt_bot_D~1").raise_for_status()
    refused = homeserver.send(room, "t", token="syt_bot_D~1")
    assert (refused.status_code, refused.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
    assert homeserver.event_id(room, "t", token="syt_bot_D~2") == first
    assert homeserver.event_id(room, "t", token="syt_bot_E~3") != first
    assert homeserver.stats()["given"]["401"] >= 1


def test_rate_limit_says_when_and_counts_who_does_not_wait(tmp_path: Path) -> None:
    with faulty(tmp_path, rate=2, burst=3) as homeserver:
        statuses = [homeserver.send(ROOM, f"t{n}").status_code for n in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        answer = homeserver.send(ROOM, "t9")
        assert 0 < answer.json()["retry_after_ms"] <= 500
        assert answer.headers["retry-after"] == "1"
        assert homeserver.send(ROOM, "t1", token="syt_alice").status_code == 200
        assert homeserver.stats()["limits"]["@bot:chaos.test"] == {"allowed": 3, "pauses": 1, "early": 2, "worst": 2}


def test_limiter_allows_its_rate_to_whoever_waits() -> None:
    limiter, now = Limiter(rate=10, burst=5), 0.0
    while now < 100:
        now += limiter.wait(now)
    assert limiter.allowed == pytest.approx(1_000, abs=6)
    assert limiter.early == 0


# Load, monkey and processes


async def test_load_repeats_the_same_key_until_it_has_an_answer(tmp_path: Path) -> None:
    asked: list[tuple[str, str, int]] = []

    async def answer(key: str, path: str, n: int) -> bytes:
        asked.append((path, key, n))
        return b"503 -" if len([one for one in asked if one[2] == n]) < 3 else b"202 -"

    async with _bridge(answer) as url:
        plan = Plan((url,), ({"X-API-Key": "fb_x"},), rooms=1)
        with (tmp_path / "accepted").open("ab", buffering=0) as log:
            load = Load(plan, log)
            task = asyncio.create_task(load.run())
            await asyncio.to_thread(_wait_for, lambda: load.accepted >= 3)
            load.stop()
            await task
    numbers = [n for _, _, n in asked]
    assert numbers == sorted(numbers)
    assert all(numbers.count(n) == 3 for n in range(3))
    # one key for both types, which are two events to a bridge, and one if the key is taken for a txnId
    assert len({(path, key) for path, key, n in asked if n in (0, 1)}) == 2
    assert len({key for _, key, n in asked if n in (0, 1)}) == 1
    assert [one.n for one in read_accepted(tmp_path / "accepted")][:3] == [0, 1, 2]


async def test_load_sets_states_with_a_key_for_each(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    async def answer(key: str, path: str, _: int) -> bytes:
        asked.append((path, key))
        return b"202 -"

    async with _bridge(answer) as url:
        with (tmp_path / "accepted").open("ab", buffering=0) as log:
            load = Load(Plan((url,), ({},), rooms=0, states=1), log)
            task = asyncio.create_task(load.run())
            await asyncio.to_thread(_wait_for, lambda: load.accepted >= 2)
            load.stop()
            await task
    assert {path for path, _ in asked} == {f"/rooms/{quote(load.plan.room_ids()[0], safe='')}/state/chaos.test.state"}
    assert len({key for _, key in asked}) == len(asked)
    assert load.answers["202"] == len(asked)


async def test_load_sends_as_a_matrix_client_does(tmp_path: Path) -> None:
    asked: list[str] = []

    async def answer(_key: str, path: str, _: int) -> bytes:
        asked.append(path)
        return b"504 -" if len(asked) == 1 else b"200 -"

    async with _bridge(answer) as url:
        with (tmp_path / "accepted").open("ab", buffering=0) as log:
            load = Load(Plan((url,), ({},), rooms=0, matrix=1, name="run"), log)
            task = asyncio.create_task(load.run())
            await asyncio.to_thread(_wait_for, lambda: load.accepted >= 3)
            load.stop()
            await task
    room = f"/_matrix/client/v3/rooms/{quote(load.plan.room_ids()[0], safe='')}/send"
    first = f"{room}/m.room.message/run-0"
    # the same path until it is answered; then the same transaction id for another type, and a new one
    assert asked[:4] == [first, first, f"{room}/chaos.test.note/run-0", f"{room}/m.room.message/run-1"]
    assert load.answers["Matrix 504"] == 1


async def test_load_notes_what_is_refused_and_goes_on(tmp_path: Path) -> None:
    async def answer(_key: str, _path: str, n: int) -> bytes:
        return [b"422 -", b"503 -", b"504 -"][n] if n < 3 else b"202 -"

    async with _bridge(answer) as url:
        with (tmp_path / "accepted").open("ab", buffering=0) as log:
            load = Load(Plan((url,), ({},), rooms=0, fire=1), log)
            task = asyncio.create_task(load.run())
            await asyncio.to_thread(_wait_for, lambda: load.accepted >= 1)
            load.stop()
            await task
    assert load.refused.total() == 1
    found = read_accepted(tmp_path / "accepted")
    assert [(one.n, one.status, one.is_promised) for one in found[:2]] == [(1, 503, False), (3, 202, True)]


@asynccontextmanager
async def _bridge(answer: Any) -> AsyncIterator[str]:
    """A bridge of one sentence: `answer(key, path, n)` gives the status line's end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head.strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                status = await answer(headers.get("idempotency-key", ""), first.split()[1], body["n"])
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_monkey_kills_starts_again_and_notes_a_crash(tmp_path: Path) -> None:
    port = free_port()
    argv = [sys.executable, "-m", "tests.chaos.faulty_homeserver", "--port", str(port), "--log", str(tmp_path / "log")]
    bridge = Bridge(Process("bridge", argv, {}, tmp_path), f"http://127.0.0.1:{port}")
    monkey = Monkey([bridge])
    try:
        await monkey.start()
        await monkey.kill(bridge)
        assert await bridge.ready()
        await monkey.term(bridge)
        assert await bridge.ready()
        assert bridge.process.rss_mb() > 1
        watch = asyncio.create_task(monkey.watch())
        bridge.process.send(signal.SIGKILL)  # unannounced
        await asyncio.to_thread(_wait_for, lambda: monkey.counts["crash"] > 0)
        assert await bridge.ready()
        watch.cancel()
    finally:
        monkey.end()
    assert dict(monkey.counts) == {"kill": 1, "term": 1, "crash": 1}


async def test_monkey_notes_an_end_that_is_not_clean(tmp_path: Path) -> None:
    port = free_port()
    serve = (
        "import http.server, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3));"
        f"http.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    bridge = Bridge(Process("bridge", [sys.executable, "-c", serve], {}, tmp_path), f"http://127.0.0.1:{port}")
    monkey = Monkey([bridge])
    try:
        await monkey.start()
        await monkey.term(bridge)
    finally:
        monkey.end()
    assert dict(monkey.counts) == {"term": 1, "unclean": 1}
    assert 0 < monkey.slowest_term < 20


async def test_bridge_that_does_not_start_says_why(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit('no such setting')"]
    monkey = Monkey([Bridge(Process("bridge", argv, {}, tmp_path), f"http://127.0.0.1:{free_port()}")])
    with pytest.raises(BridgeBroken, match="no such setting"):
        await monkey.start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent ended")
def test_process_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from tests.processes import Process;"
        "child = Process('child', ['sleep', '60'], {}, pathlib.Path(sys.argv[1]));"
        "child.start(); print(child.pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        _wait_for(lambda: _name_of(child) == "sleep")
        parent.kill()
    _wait_for(lambda: _name_of(child) != "sleep")


def _name_of(pid: int) -> str:
    """The command of a process that is alive; empty for a zombie that has not been reaped yet."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return ""
    return "" if rest.split()[0] == "Z" else name
