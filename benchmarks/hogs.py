"""What one hog takes from the senders beside it: each hog of `benchmarks/hog.py`, in turns with and without.

The hog's own process needs a processor, too, and that is not the bridge's doing. So "without" is not silence: the same
hog asks a static nginx for an empty answer, at the rate at which the bridge had answered it. What differs between the
two runs is what the bridge does for the hog, and that is the ratio of the rates of the senders. Processor time per send
is the bridge's, the hog's share included: on a busy machine its ratio says more than that of the rates.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from statistics import median

from benchmarks import load, nginx
from benchmarks.hog import CALLERS, HOGS, HOOKS
from benchmarks.load import SEND_PATH, TOKEN
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import HOST, REPOSITORY, Command, PeerError, Server, running

ROUNDS = 7
SECONDS = 1.0  # of a round: what a machine does beside changes from one ten seconds to the next
STARTS = 5
SENDERS = 16
WARM_UP_SECONDS = 2.0  # in which a hog also spends what the bridge lets it save up
AT_LEAST = 0.8
ABOUT = f"""\
{CALLERS} callers ask for one thing over and over, as fast as they are answered, and take no notice of a 429;
{SENDERS} senders post messages beside them, with a token of their own, from the same address. "Alone" is beside the
same hog asking a static nginx at the rate that it had at the bridge, so that the processor time of the hog itself is
in both; {ROUNDS} rounds of {SECONDS:g} s in turns, and the ratio is the median of the ratios within a round. CPU is
the bridge's, per send, with what it does for the hog."""


@dataclass(frozen=True)
class Beside:
    """The senders' run beside a hog, and the hog's answers per second by status."""

    rate: float
    cpu_us: float
    failures: int
    answers: dict[str, float]

    @property
    def hog_rate(self) -> float:
        return sum(self.answers.values())


def hogs(run: Run) -> Section:
    """Every hog beside the same senders."""
    with black_hole() as hole, running(nginx.wary_homeserver(run.directory, hole), run.directory) as homeserver:
        found = {name: _one(name, run, homeserver) for name in HOGS}
    rows = [_row(name, pairs) for name, pairs in found.items()]
    ratios = {name: median(with_.rate / without.rate for with_, without in pairs) for name, pairs in found.items()}
    return Section(
        title="Hogs",
        about=ABOUT,
        header=[
            "hog",
            "asks for",
            "answered/s",
            "sends/s alone",
            "sends/s beside it",
            "ratio",
            "CPU µs alone",
            "beside it",
        ],
        rows=rows,
        targets=[
            Target(f"sends beside a hog: {name}", ratio, AT_LEAST, at_least=True) for name, ratio in ratios.items()
        ],
        valid=not any(each.failures for pairs in found.values() for pair in pairs for each in pair),
    )


def _one(name: str, run: Run, homeserver: Server) -> list[tuple[Beside, Beside]]:
    """A bridge of its own for each hog, so that none finds what another left behind."""
    pairs = []
    with ExitStack() as stack:
        bridge = _start(homeserver, run, stack)
        url = bridge.url + SEND_PATH
        load.probe(url)
        load.run(url, WARM_UP_SECONDS, connections=SENDERS)
        for number in range(1, ROUNDS + 1):
            with_ = _beside(name, bridge.url, 0, bridge)
            without = _beside(name, homeserver.url, with_.hog_rate, bridge)
            pairs.append((with_, without))
            figures = f"{without.rate:,.0f} → {with_.rate:,.0f} sends/s ({with_.rate / without.rate:.2f})"
            say(f"  round {number}/{ROUNDS}  {name:<16}{figures}   hog {_shown(with_.answers)}")
    return pairs


def _start(homeserver: Server, run: Run, stack: ExitStack) -> Server:
    """A bridge; with thousands of connections on this machine its port may be taken before it listens."""
    for _ in range(STARTS - 1):
        with suppress(PeerError):
            return stack.enter_context(running(_command(homeserver, run), run.directory))
    return stack.enter_context(running(_command(homeserver, run), run.directory))


def _command(homeserver: Server, run: Run) -> Command:
    """A bridge with the hooks of hogs."""
    file = run.directory / "hogs.yaml"
    file.write_text(HOOKS)
    command = flowbridge_command(homeserver.url)
    command.environment.update(FLOWBRIDGE_HOOKS_FILE=str(file), ACCESS_TOKEN=TOKEN)
    return command


def _beside(name: str, target: str, rate: float, bridge: Server) -> Beside:
    command = [sys.executable, "-m", "benchmarks.hog", name, target, str(rate)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout is not None
            if hog.stdout.readline() != "ready\n":
                raise PeerError(f"the hog {name!r} does not start")
            time.sleep(WARM_UP_SECONDS)
            cpu = bridge.cpu_seconds()
            outcome = load.run(bridge.url + SEND_PATH, SECONDS, connections=SENDERS)
            cpu = bridge.cpu_seconds() - cpu
            hog.terminate()
            found = json.loads(hog.stdout.read())
        finally:
            hog.kill()
    answers = {status: number / found["seconds"] for status, number in found["answers"].items()}
    return Beside(outcome.rate, cpu * 1e6 / max(1, outcome.requests), outcome.failures, answers)


def _row(name: str, pairs: list[tuple[Beside, Beside]]) -> list[str]:
    with_, without = zip(*pairs, strict=True)
    statuses = {status for each in with_ for status in each.answers}
    answers = {status: median(each.answers.get(status, 0.0) for each in with_) for status in sorted(statuses)}
    return [
        name,
        HOGS[name].about,
        _shown(answers),
        f"{median(each.rate for each in without):,.0f}",
        f"{median(each.rate for each in with_):,.0f}",
        f"{median(a.rate / b.rate for a, b in pairs):.2f}",
        f"{median(each.cpu_us for each in without):,.0f}",
        f"{median(each.cpu_us for each in with_):,.0f}",
    ]


def _shown(answers: dict[str, float]) -> str:
    return ", ".join(f"{rate:,.0f} x {status}" for status, rate in answers.items()) or "none"


@contextmanager
def black_hole() -> Iterator[int]:
    """A port on which connections are accepted, and nothing is ever answered: the far end of a long poll."""
    with closing(socket.create_server((HOST, 0), backlog=1_024)) as listener:
        port: int = listener.getsockname()[1]
        yield port
