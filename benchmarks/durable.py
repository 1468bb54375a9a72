"""What the outbox takes and gives: durable accepts, a blocked room, and a long queue."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

from benchmarks import load, nginx
from benchmarks.peers import flowbridge_command, nginx_proxy
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import PeerError, Server, running

CONNECTIONS = 100
ROUNDS = 3
ASYNC = "respond-async"
STUCK = 10_000
STUCK_PATH = load.SEND_PATH.replace("%21room", "%21stuck")  # nginx answers 502 to what is sent there
QUEUED = 120_000
DRAIN_SECONDS = 120
ABOUT = f"""\
`Prefer: respond-async` over {CONNECTIONS} connections into {load.ROOMS} rooms: 202 once the event is on the disk
(SQLite, one process), {ROUNDS} rounds in turns with nginx as a proxy over as many connections. "delivering": a static
nginx plays the homeserver, and what was accepted is sent meanwhile, which is counted; "homeserver away": it was
stopped. Blocked room: synchronous sends over 32 connections into other rooms, before and while {STUCK:,} events wait in
a room to which the homeserver answers 502. Queue: resident memory with {QUEUED:,} events waiting."""


def durable(run: Run) -> Section:
    """Durable accepts beside nginx; a blocked room; memory with a long queue."""
    delivering, away, memory = _accepts(run)
    blocked = _blocked(run)
    return Section(
        title="Outbox",
        about=ABOUT,
        header=["what", "measured"],
        rows=[
            ["accepts/s of nginx's rate, delivering", f"{delivering:.4f}"],
            ["accepts/s of nginx's rate, homeserver away", f"{away:.4f}"],
            ["rate of other rooms beside a blocked one", f"{blocked:.3f}"],
            [f"RSS MB with {QUEUED:,} events waiting", f"{memory:.0f}"],
        ],
        targets=[
            Target("durable accepts of nginx's rate, delivering", delivering, 0.04, at_least=True),
            Target("durable accepts of nginx's rate, homeserver away", away, 0.06, at_least=True),
            Target("rate of other rooms beside a blocked one", blocked, 0.8, at_least=True),
            Target(f"memory with {QUEUED:,} events waiting", memory, 150, " MB"),
        ],
    )


def _accepts(run: Run) -> tuple[float, float, float]:
    """Shares of nginx's rate: while delivering, and with the homeserver away; then the memory with a long queue."""
    proxy = nginx_proxy(run.upstream, run.directory)
    with running(proxy.command, run.directory) as limit:
        delivering = [_share(run, limit) for _ in range(ROUNDS)]
        with (
            running(nginx.homeserver(run.directory), run.directory) as upstream,
            _bridge(upstream, FLOWBRIDGE_MAX_QUEUED_PER_ROOM="1000000") as bridge,
        ):
            load.probe(bridge.url + load.SEND_PATH)
            upstream.stop()
            away = [_pair(run, limit, bridge) for _ in range(ROUNDS)]
            memory = _queue_up(run, bridge)
    return median(delivering), median(away), memory


def _share(run: Run, limit: Server) -> float:
    """One round while delivering, on a fresh bridge, which has to send in the end what it accepted."""
    with _bridge(run.upstream) as bridge:
        load.probe(bridge.url + load.SEND_PATH)
        load.run(bridge.url + load.SEND_PATH, 1, connections=CONNECTIONS, prefer=ASYNC)
        _drain(bridge)
        return _pair(run, limit, bridge, drain=True)


def _pair(run: Run, limit: Server, bridge: Server, *, drain: bool = False) -> float:
    nginx_rate = load.run(limit.url + load.SEND_PATH, run.seconds, connections=CONNECTIONS).rate
    before = nginx.requests_served(run.upstream)
    accepted = load.run(bridge.url + load.SEND_PATH, run.seconds, connections=CONNECTIONS, prefer=ASYNC)
    if accepted.failures or not accepted.requests:
        raise PeerError(f"{accepted.failures} of {accepted.requests} accepts failed")
    if drain:
        seconds = _drain(bridge)
        sent = nginx.requests_served(run.upstream) - before
        if sent < accepted.requests:
            raise PeerError(f"{accepted.requests} were accepted and {sent} sent")
        say(f"  {accepted.requests:,} accepted, all sent {seconds:.1f} s later")
    say(f"  nginx {nginx_rate:,.0f}/s   accepts {accepted.rate:,.0f}/s   p99 {accepted.p99_ms:.0f} ms")
    return accepted.rate / nginx_rate


def _queue_up(run: Run, bridge: Server) -> float:
    while (queued := _queued(bridge)) < QUEUED:
        load.run(bridge.url + load.SEND_PATH, run.seconds, connections=CONNECTIONS, prefer=ASYNC)
    say(f"  {queued:,} events wait: {bridge.rss_mb():.0f} MB")
    return bridge.rss_mb()


def _blocked(run: Run) -> float:
    with _bridge(run.upstream) as bridge:
        url = bridge.url + load.SEND_PATH
        load.probe(url)
        load.run(url, 2)
        before = [load.run(url, run.seconds).rate for _ in range(ROUNDS)]
        while _queued(bridge) < STUCK:
            load.run(bridge.url + STUCK_PATH, 1, connections=CONNECTIONS, rooms=1, prefer=ASYNC)
        after = [load.run(url, run.seconds).rate for _ in range(ROUNDS)]
        say(f"  others: {median(before):,.0f}/s before, {median(after):,.0f}/s beside {_queued(bridge):,} stuck events")
    return median(after) / median(before)


def _drain(bridge: Server) -> float:
    """Seconds until nothing is queued any more."""
    began = time.monotonic()
    while _queued(bridge):
        if time.monotonic() - began > DRAIN_SECONDS:
            raise PeerError(f"{_queued(bridge):,} events are still queued after {DRAIN_SECONDS} s")
        time.sleep(0.1)
    return time.monotonic() - began


def _queued(bridge: Server) -> int:
    return int(load.metric(bridge.url, "flowbridge_queued_events"))


@contextmanager
def _bridge(upstream: Server, **settings: str) -> Iterator[Server]:
    command = flowbridge_command(upstream.url)
    command = replace(command, environment={**command.environment, **settings})
    with running(command, upstream.log.parent.parent) as server:
        yield server
