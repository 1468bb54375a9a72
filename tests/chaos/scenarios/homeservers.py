"""The homeserver is away, forgets, refuses, or is hidden by a misset proxy."""

import asyncio
import shlex
import sys
import time
from dataclasses import replace

from tests.chaos.judge import read_seen
from tests.chaos.options import Options
from tests.chaos.report import Report, at_least, at_most
from tests.chaos.scenarios.scenario import WARM_SECONDS, steer_when_back, until
from tests.chaos.stage import Stage, stage

MEMORY_SECONDS = 1_800.0  # of a real one
SURE = 2 / 3  # share of that which a bridge trusts it with
RUSH = 300  # events
RUSH_SECONDS = 30.0  # within which a bridge sees that the homeserver is back
UNTOLD = Options().bridge


async def outage(options: Options) -> Report:
    """The homeserver is away for two minutes while 200 events/s are accepted; then everything is caught up."""
    away, rate = options.seconds, options.rate or 200.0
    async with stage(options) as it:
        async with it.loading(replace(it.plan, mode="async", matrix=0, rate=rate)) as load:
            await asyncio.sleep(WARM_SECONDS)
            await it.steer(f"down?seconds={away:g}")
            began = time.time()
            await asyncio.sleep(away)
        back = began + away
        seconds = await it.drain()
        first, drained = _drained(it, back)
        it.checks += [
            at_least("rate", "accepted/s", load.accepted / (away + WARM_SECONDS), 0.95 * rate),
            at_most("p99", "accept p99, ms", load.percentile(0.99), 100),
            at_most("memory", "memory of the bridge, MB", it.monkey.rss_mb, 150),
            at_most("first", "first event after it was back, s", first, 15),
            at_least("drained", "drained/s", drained, 1_000),
        ]
        return await it.report("outage", seconds)


async def storm(options: Options) -> Report:
    """A homeserver that allows few sends: nearly all that it allows are made, and its pauses are kept."""
    rate = options.rate or 20.0
    burst = max(10, round(2 * rate))  # Synapse's Retry-After is in whole seconds: a second's rest must fit into it
    async with stage(options, {"rate": rate, "burst": burst}) as it:
        one_user = replace(it.plan, mode="async", matrix=0, headers=it.plan.headers[:1], rate=1.5 * rate)
        async with it.loading(one_user):
            await asyncio.sleep(WARM_SECONDS)
            before = await _limits(it)
            await asyncio.sleep(options.seconds)
            after = await _limits(it)
        share = (after["allowed"] - before["allowed"]) / (rate * options.seconds)
        pauses, early = after["pauses"] - before["pauses"], after["early"] - before["early"]
        what = f"share of the allowed rate: {share:.2f}, wanted ≥ 0.95"
        it.check("allowed", what, share >= 0.95, f"{share:.2f} of the allowed rate")
        what = f"requests in a pause: {early} in {pauses} pauses, {after['worst']} at worst"
        it.check("pauses", what, early <= pauses, f"{early} requests in {pauses} pauses")
        return await it.report("storm", await it.drain())


async def memory(options: Options) -> Report:
    """It stays unknown what was sent, for longer than the homeserver remembers its transactions.

    Twice answers get lost before the homeserver goes away; then the bridge is killed while it works and comes
    back late. The bridge knows by how much the memory is shorter than a real one's.
    """
    remember = options.remember
    if options.bridge == UNTOLD and remember < MEMORY_SECONDS:
        start = [sys.executable, "-m", "tests.chaos.seeds", short_memory(remember), "serve", "--port", "{port}"]
        options = replace(options, bridge=shlex.join(start))
    async with stage(options, {"remember_seconds": remember}) as it:
        async with it.loading(replace(it.plan, mode="async", matrix=0, rate=options.rate or 400.0)):
            await asyncio.sleep(WARM_SECONDS)
            for _ in range(2):
                await it.steer("faults", plost=1.0)
                await asyncio.sleep(1.5)
                await it.steer(f"down?seconds={remember + 5:g}")
                await asyncio.sleep(remember + 5.5)
                await steer_when_back(it, "faults", plost=0.0)
                await _rush(it)
                await asyncio.sleep(WARM_SECONDS)
            await it.steer("down?seconds=5")
            await asyncio.sleep(5.5)
            await _rush(it)
            await it.monkey.kill(it.bridge, down=remember + 1)
            await asyncio.sleep(WARM_SECONDS)
        return await it.report("memory", await it.drain())


async def proxy(options: Options) -> Report:
    """For a third of the time a mis-set proxy answers 404 in HTML to everything: no event may die of it."""
    async with stage(options) as it:
        async with it.loading(replace(it.plan, mode="async", matrix=0, rate=options.rate or 200.0)):
            for html in (False, True, False):
                await it.steer("faults", html=html)
                await asyncio.sleep(options.seconds / 3)
        return await it.report("proxy", await it.drain())


def short_memory(remember: float) -> str:
    """The argument of seeds.py that tells a bridge for how many seconds the homeserver remembers."""
    return f"flowbridge.delivery.attempt.REMEMBERED_SECONDS={remember * SURE:g}"


async def _rush(it: Stage) -> None:
    """Wait until it catches up with a backlog: then more events are sent than are noted as sent."""
    before: list[int] = []

    async def in_a_rush() -> bool:
        before.append((await it.steer("stats"))["events"])
        return before[-1] >= before[0] + RUSH

    await until(in_a_rush, RUSH_SECONDS, every=0.02)


async def _limits(it: Stage) -> dict[str, int]:
    found = (await it.steer("stats"))["limits"].values()
    return next(iter(found), {"allowed": 0, "pauses": 0, "early": 0, "worst": 0})


def _drained(it: Stage, back: float) -> tuple[float, float]:
    """Seconds from when it was back to the first event, and events a second from then on."""
    times = [one.at for one in read_seen(it.homeserver.log, it.plan.room_ids()) if one.at >= back]
    if len(times) < 2:
        return float("inf"), 0.0
    return times[0] - back, len(times) / max(times[-1] - times[0], 0.001)
