"""Requests per second at 32 concurrent senders, peers alternating in rounds."""

import resource
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from benchmarks import load, nginx
from benchmarks.load import Load
from benchmarks.peers import INSTALLED, PEERS, Peer
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import HOST, PeerError, Server, machine_cpu_seconds, running

ROUNDS = 3
WARM_UP_SECONDS = 2
SETTLE_SECONDS = 1  # what wrk left behind when it stopped must not count in the next run
QUIET_CORES = 0.2
ABOUT = f"""\
wrk posts one m.text message with a formatted body over 32 connections, into {load.ROOMS} rooms in turns; a static
nginx plays the homeserver.
After a warm-up each peer is measured in {ROUNDS} rounds, in turns; the figures are medians of the rounds,
and the ratios are medians of the ratios within a round. CPU is what the peer's own processes used. "calls"
is how many requests reached the homeserver for each one answered. nginx checks nothing; the hand-written
bridge (`benchmarks/handwritten.py`) and flowbridge check the message against a schema and require the
sender's token. The hand-written bridge is measured twice: with the packages that pip installs today, and
with sniffio beside them, which httpcore looks for on every call and is slow not to find. matrix-webhook
checks a key of its own, and joins the room before every message. "without store" is flowbridge as it was
before it had one: it sent as it was told and forgot."""
HEADER = [
    "peer",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "CPU µs/request",
    "RSS MB",
    "calls",
    "of nginx",
    "to hand-written",
]


@dataclass(frozen=True)
class Round:
    """One peer's measured run: its CPU in µs and homeserver calls per request; cores that others kept busy."""

    load: Load
    cpu_us: float
    calls: float
    foreign_cores: float

    @property
    def valid(self) -> bool:
        """Nothing failed, and no answer came without a call to the homeserver."""
        return self.load.failures == 0 and self.load.requests > 0 and self.calls >= 1


@dataclass
class Contender:
    """A peer, what it did so far, and what is wrong with it if anything is."""

    name: str
    peer: Peer | None = None
    server: Server | None = None
    rounds: list[Round] = field(default_factory=list)
    trouble: str = ""

    def median(self, figure: Callable[[Round], float]) -> float:
        return median(figure(measured) for measured in self.rounds)

    def ratio_to(self, other: "Contender") -> float | None:
        """Median of this one's rate over the other's, round by round."""
        if self.trouble or other.trouble:
            return None
        pairs = zip(self.rounds, other.rounds, strict=True)
        return median(mine.load.rate / theirs.load.rate for mine, theirs in pairs)


def throughput(run: Run) -> Section:
    """Start every peer, let them take turns, stop them."""
    with ExitStack() as stack:
        contenders = {name: _start(name, run, stack) for name in PEERS}
        for number in range(1, ROUNDS + 1):
            for contender in contenders.values():
                _take_turn(contender, number, run)
        rows = [_row(contender, contenders) for contender in contenders.values()]
    return Section(
        title="Throughput",
        about=ABOUT,
        header=HEADER,
        rows=rows,
        targets=_targets(contenders),
        commands=_commands(contenders, run.seconds),
        notes=_notes(contenders),
        valid=not any(c.trouble for c in contenders.values() if c.rounds or c.name not in INSTALLED),
    )


def _start(name: str, run: Run, stack: ExitStack) -> Contender:
    """A peer that does not start or answer rightly stays in the table with its trouble."""
    contender = Contender(name)
    try:
        contender.peer = PEERS[name](run.upstream, run.directory)
        contender.server = stack.enter_context(running(contender.peer.command, run.directory))
        url = contender.server.url + contender.peer.path
        load.probe(url)
        if contender.peer.guarded:
            load.probe_guards(url)
    except (PeerError, OSError) as error:
        contender.trouble = str(error)
        say(f"  {name}: {error}")
    return contender


def _take_turn(contender: Contender, number: int, run: Run) -> None:
    if contender.trouble or not (contender.peer and contender.server):
        return
    url = contender.server.url + contender.peer.path
    try:
        load.run(url, WARM_UP_SECONDS)
        time.sleep(SETTLE_SECONDS)
        measured = _measure(contender.server, url, run)
    except PeerError as error:
        contender.trouble = f"{error}; {contender.server.condition}"
        say(f"  round {number}/{ROUNDS}  {contender.name:<20}{contender.trouble}")
        return
    contender.rounds.append(measured)
    if not measured.valid:
        contender.trouble = f"invalid: {measured.load.failures} failures, {measured.calls:.2f} calls per answer"
    figures = f"{measured.load.rate:>8,.0f}/s   p50 {measured.load.p50_ms:.1f} ms   {measured.cpu_us:,.0f} µs CPU"
    others = f"others {measured.foreign_cores:.1f} cores"
    say(f"  round {number}/{ROUNDS}  {contender.name:<20}{figures}   {others}  {contender.trouble}".rstrip())


def _measure(server: Server, url: str, run: Run) -> Round:
    cpu, calls, foreign = server.cpu_seconds(), nginx.requests_served(run.upstream), _foreign_cpu(server, run)
    outcome = load.run(url, run.seconds)
    cpu = server.cpu_seconds() - cpu
    calls = nginx.requests_served(run.upstream) - calls
    foreign = _foreign_cpu(server, run) - foreign
    answered = max(1, outcome.requests)
    return Round(outcome, cpu * 1e6 / answered, calls / answered, foreign / outcome.seconds)


def _foreign_cpu(server: Server, run: Run) -> float:
    """CPU seconds of everything but the peer, the homeserver and wrk (our only child that ends meanwhile)."""
    wrk = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = server.cpu_seconds() + run.upstream.cpu_seconds() + wrk.ru_utime + wrk.ru_stime
    return machine_cpu_seconds() - ours


def _notes(contenders: dict[str, Contender]) -> list[str]:
    """Troubles, and a warning when others used the machine: nginx needs every core, so it loses most by that."""
    notes = [f"{c.name}: {c.trouble}" for c in contenders.values() if c.trouble]
    worst = max((r.foreign_cores for c in contenders.values() for r in c.rounds), default=0.0)
    if worst > QUIET_CORES:
        notes.append(
            f"**Not a quiet machine**: other processes took up to {worst:.1f} cores during a run. nginx needs every "
            'core and loses most by that: do not trust the shares "of nginx".'
        )
    return notes


def _row(contender: Contender, contenders: dict[str, Contender]) -> list[str]:
    if contender.trouble or not contender.server:
        return [contender.name, *["-"] * (len(HEADER) - 1)]
    return [
        contender.name,
        f"{contender.median(lambda r: r.load.rate):,.0f}",
        f"{contender.median(lambda r: r.load.p50_ms):.1f}",
        f"{contender.median(lambda r: r.load.p99_ms):.1f}",
        f"{contender.median(lambda r: r.cpu_us):,.0f}",
        f"{contender.server.rss_mb():.0f}",
        f"{contender.median(lambda r: r.calls):.1f}",
        _ratio(contender.ratio_to(contenders["nginx"])),
        _ratio(contender.ratio_to(contenders["handwritten"])),
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _targets(contenders: dict[str, Contender]) -> list[Target]:
    bridge = contenders["flowbridge"]
    return [
        # What 0.06 was without the store, which may take 0.4 of the rate: the next target.
        Target("share of nginx's rate (0.6 of 0.06)", bridge.ratio_to(contenders["nginx"]), 0.036, at_least=True),
        Target(
            "synchronous sends, against those without the store",
            bridge.ratio_to(contenders["without store"]),
            0.6,
            at_least=True,
        ),
        Target(
            "rate against the hand-written bridge",
            bridge.ratio_to(contenders["handwritten"]),
            7,
            " times",
            at_least=True,
        ),
    ]


def _commands(contenders: dict[str, Contender], seconds: float) -> list[str]:
    started = [c.peer for c in contenders.values() if c.peer]
    wrk = [*load.arguments(seconds), "-s", "benchmarks/post.lua"]
    message = ["--", load.MESSAGE, "TOKEN", str(load.ROOMS), "1"]
    calls = [[*wrk, f"http://{HOST}:PORT{peer.path}", *message] for peer in started]
    return [peer.command.shown for peer in started] + [shlex.join(call) for call in calls]
