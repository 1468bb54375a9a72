"""The processor time of one event: of a synchronous send, and of a durable accept with its delivery."""

import time
from statistics import median

from benchmarks import load
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, say
from benchmarks.servers import PeerError, Server, running

ROUNDS = 5
KINDS = {"a synchronous send": (32, ""), "a durable accept, and its delivery": (100, "respond-async")}
ABOUT = f"""\
User and system time of the bridge's process for each event (SQLite, {load.ROOMS} rooms, a static nginx as the
homeserver), {ROUNDS} short rounds in turns. Rates depend on what else the machine does; this depends on it less.
Compare versions of the bridge on one machine, in turns."""


def cost(run: Run) -> Section:
    """Processor microseconds of an event, beside the rate."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with running(flowbridge_command(run.upstream.url), run.directory) as bridge:
        load.run(bridge.url + load.SEND_PATH, 2)
        for _ in range(3 if run.quick else ROUNDS):
            for kind, (connections, prefer) in KINDS.items():
                found[kind].append(_one(run, bridge, connections, prefer))
                say(f"  {kind}: {found[kind][-1][0]:,.0f} µs, {found[kind][-1][1]:,.0f}/s")
    rows = [[kind, *(f"{median(one):,.0f}" for one in zip(*several, strict=True))] for kind, several in found.items()]
    return Section("Cost", ABOUT, ["", "processor µs", "events/s"], rows)


def _one(run: Run, bridge: Server, connections: int, prefer: str) -> tuple[float, float]:
    cpu, began = bridge.cpu_seconds(), time.monotonic()
    done = load.run(bridge.url + load.SEND_PATH, run.seconds, connections=connections, prefer=prefer)
    if done.failures or not done.requests:
        raise PeerError(f"{done.failures} of {done.requests} sends failed")
    while load.metric(bridge.url, "flowbridge_queued_events"):
        time.sleep(0.05)
    return (bridge.cpu_seconds() - cpu) * 1e6 / done.requests, done.requests / (time.monotonic() - began)
