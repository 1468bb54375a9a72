"""The promise itself, by the judge: what was answered 200 or 202 is in its room once and in order, whatever happened.

The long runs are `make chaos`. Nothing here asks how fast anything is: a slow machine only sends less meanwhile.
"""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.runner import run
from tests.chaos.scenarios import SCENARIOS
from tests.postgres import LocalPostgres
from tests.processes import REPOSITORY

KILLS = 15
REPLICAS_KILLS = 6
HOOKS_KILLS = 4
SOWN = ("new-txn-id", "key-as-txn-id", "proxy-404", "one-token")
TROUBLES = ("full", "locked", "hog", "renewal")
POISON = "poison"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the judge ends its processes by means of Linux"),
    pytest.mark.timeout(900),
]


def kept(scenario: str, options: Options) -> Report:
    report = run(SCENARIOS[scenario], options)
    assert isinstance(report, Report), report
    assert report.good, str(report)
    return report


def test_promise_is_kept_when_the_bridge_on_its_file_is_killed_over_and_over() -> None:
    report = kept("sqlite", Options(seconds=30, kills=KILLS, quiet=2))
    assert report.did["kill"] >= KILLS


def test_promise_is_kept_when_replicas_on_one_postgresql_are_killed_in_turn(postgres: LocalPostgres) -> None:
    options = Options(kills=REPLICAS_KILLS, lease=7, every=3, quiet=2, database_url=postgres.fresh_database())
    report = kept("replicas", options)
    assert report.did["kill"] >= REPLICAS_KILLS


def test_stories_of_hooks_are_told_once_by_replicas_that_are_killed_in_turn(postgres: LocalPostgres) -> None:
    options = Options(kills=HOOKS_KILLS, lease=7, every=3, quiet=2, database_url=postgres.fresh_database())
    report = kept("hook_replicas", options)
    assert report.did["kill"] >= HOOKS_KILLS


def test_promise_is_kept_in_encrypted_rooms() -> None:
    report = kept("encrypted", Options(seconds=12, every=2, kills=2, rooms=3, quiet=2))
    assert report.did["kill"] == 2
    assert report.did["dropped"], "no key got lost on its way"


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


def _judge(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.chaos", *arguments, "--progress", "0"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800, check=False)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """All others, several at a time: they wait more than they work."""
    with ThreadPoolExecutor(4) as threads:
        found = {name: threads.submit(_judge, "--seeds", name) for name in SOWN}
        found |= {name: threads.submit(_judge, name, "--seconds", "15", "--every", "1") for name in TROUBLES}
        found[POISON] = threads.submit(_judge, POISON, "--seconds", "8", "--every", "2")
        yield found


@pytest.mark.parametrize("trouble", TROUBLES)
def test_promise_is_kept_when_the_store_a_token_or_another_caller_makes_trouble(runs: Runs, trouble: str) -> None:
    done = runs[trouble].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{trouble}: kept its promise" in done.stdout


def test_promise_is_kept_when_an_event_is_poisoned_and_when_the_homeserver_fails_at_everything(runs: Runs) -> None:
    done = runs[POISON].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "poison: kept its promise" in done.stdout


@pytest.mark.parametrize("seed", SOWN)
def test_judge_finds_a_seeded_bug_out(runs: Runs, seed: str) -> None:
    done = runs[seed].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKE ITS PROMISE" in done.stdout
