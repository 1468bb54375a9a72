"""The bridges themselves are ended, in every way there is."""

import asyncio

from tests.chaos.monkey import START_SECONDS
from tests.chaos.options import Options
from tests.chaos.report import Report, at_most
from tests.chaos.scenarios.scenario import FAULTS, SLOW, for_seconds
from tests.chaos.stage import Stage, stage

# After the last event, when a bridge has stopped acting on its arrival. A bridge killed then leaves rooms whose other
# owner is woken by no new event.
FORGOTTEN_SECONDS = 1.0


async def sqlite(options: Options) -> Report:
    """One bridge on one SQLite file, killed every two seconds, 2 % each of 429, 500 and lost answers."""
    kills = options.kills or max(1, round(options.seconds / 1.9))
    async with stage(options, FAULTS) as it:
        async with it.loading():
            async with asyncio.timeout(options.seconds + kills * START_SECONDS):
                await it.monkey.kill_often(kills, options.seconds)
        done = it.monkey.counts["kill"]
        it.check("kills", f"kill -9: {done}, wanted {kills}", done >= kills)
        return await it.report("sqlite", await it.drain())


async def replicas(options: Options) -> Report:
    """Two bridges on one PostgreSQL, one of them killed every few seconds, the same faults.

    With a number of kills it lasts as long as these take, each of a working bridge.
    """
    async with stage(options, SLOW, databases=[options.shared_url] * 2) as it:
        async with it.loading() as load:
            if options.kills:
                await it.monkey.kill_every(options.every, at_work=True, kills=options.kills)
            else:
                await for_seconds(options.seconds, it.monkey.kill_every(options.every))
            load.stop()
            await asyncio.sleep(FORGOTTEN_SECONDS)
            await it.monkey.kill_all()
        return await it.report("replicas", await it.drain())


async def stop(options: Options) -> Report:
    """Two bridges on one PostgreSQL; one stands still for longer than its lease and then continues."""
    options = options.leased(8.0)
    assert options.lease is not None
    stopped = options.lease + 5
    async with stage(options, SLOW, databases=[options.shared_url] * 2) as it:
        async with it.loading():
            least = 2 * (stopped + options.every)
            await for_seconds(max(options.seconds, least), it.monkey.stop_every(stopped, options.every))
        return await it.report("stop", await it.drain())


async def term(options: Options) -> Report:
    """One bridge on one SQLite file gets SIGTERM under load every few seconds, and is started again."""
    async with stage(options, FAULTS) as it:
        async with it.loading():
            await for_seconds(options.seconds, it.monkey.term_every(options.every))
        _check_ends(it)
        return await it.report("term", await it.drain())


async def roll(options: Options) -> Report:
    """Two bridges on one PostgreSQL get SIGTERM in turn, as in a rolling update: the other one takes over."""
    async with stage(options, SLOW, databases=[options.shared_url] * 2) as it:
        async with it.loading():
            await for_seconds(options.seconds, it.monkey.term_every(options.every))
        _check_ends(it)
        return await it.report("roll", await it.drain())


def _check_ends(it: Stage) -> None:
    it.checks.append(at_most("slow end", "slowest end, s", it.monkey.slowest_term, 15))
