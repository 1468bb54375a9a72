"""What flowbridge takes: memory after 100,000 sends, and time until it answers."""

import time
from statistics import median

from benchmarks import load
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import PeerError, running

SENDS = 100_000
GIVE_UP_SECONDS = 600
STARTS = 5


def memory(run: Run) -> Section:
    """Resident memory of a fresh bridge after 100,000 sends."""
    with running(flowbridge_command(run.upstream.url), run.directory) as server:
        url = server.url + load.SEND_PATH
        load.probe(url)
        before = server.rss_mb()
        sent, failures = _send_many(url, run.seconds)
        after = server.rss_mb()
    return Section(
        title="Memory",
        about="Resident memory of one flowbridge process, static nginx as the homeserver.",
        header=["sends", "failures", "RSS MB after the first", "RSS MB at the end"],
        rows=[[f"{sent:,}", str(failures), f"{before:.1f}", f"{after:.1f}"]],
        targets=[Target(f"memory after {SENDS:,} sends", after, 150, " MB")],
        valid=failures == 0,
    )


def start(run: Run) -> Section:
    """From the start of the process until /healthz answers 200."""
    _time_to_answer(run)  # byte code is cached now, as it is for a user from the second start on
    seconds = [_time_to_answer(run) for _ in range(STARTS)]
    say("  " + ", ".join(f"{value:.2f} s" for value in seconds))
    return Section(
        title="Start",
        about=f"`flowbridge serve` from process start until `GET /healthz` answers 200, {STARTS} starts.",
        header=["median s", "fastest s", "slowest s"],
        rows=[[f"{median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"]],
        targets=[Target("start until it answers", median(seconds), 2, " s")],
    )


def _send_many(url: str, seconds: float) -> tuple[int, int]:
    """wrk stops by time, not by count: run it again until enough was sent."""
    sent = failures = 0
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while sent < SENDS:
        if time.monotonic() > deadline:
            raise PeerError(f"only {sent:,} sends in {GIVE_UP_SECONDS} s")
        outcome = load.run(url, seconds)
        sent, failures = sent + outcome.requests, failures + outcome.failures
        say(f"  {sent:>9,} of {SENDS:,} sends")
    return sent, failures


def _time_to_answer(run: Run) -> float:
    began = time.perf_counter()
    with running(flowbridge_command(run.upstream.url), run.directory):
        return time.perf_counter() - began
