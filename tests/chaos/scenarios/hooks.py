"""Hooks are told stories, beside other callers."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tests.chaos import stories
from tests.chaos.judge import read_lines
from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.scenarios.scenario import FAULTS, SLOW, for_seconds
from tests.chaos.stage import Stage, stage

ROOMS = 32  # with a hook each
WORKS_SECONDS = 2.0  # from half of that to half as much again, between two kills
SHOWN = 5


async def hooks(options: Options) -> Report:
    """Alertmanagers tell stories to 32 hooks, beside 8 other rooms: kill -9 after 1 to 3 s of work, the same faults.

    Some of what they say comes from both members of an HA pair, in bodies that are not quite the same.
    """
    options = replace(options, rooms=8, fire=0, states=0, matrix=0, hooks=options.hooks or ROOMS)
    async with stage(options, FAULTS) as it:
        async with it.loading():
            await for_seconds(options.seconds, it.monkey.kill_every(WORKS_SECONDS, at_work=True))
        drained = await it.drain()
        _check_stories(it)
        return await it.report("hooks", drained)


async def hook_replicas(options: Options) -> Report:
    """Two bridges on one PostgreSQL are told such stories, one of them killed every few seconds, the same faults.

    An event of a story may come to one of them, the next to the other. With a number of kills it lasts as long as
    these take, each of a working bridge.
    """
    options = replace(options, rooms=8, fire=0, states=0, matrix=0, hooks=options.hooks or ROOMS)
    async with stage(options, SLOW, databases=[options.shared_url] * 2) as it:
        async with it.loading() as load:
            if options.kills:
                await it.monkey.kill_every(options.every, at_work=True, kills=options.kills)
            else:
                await for_seconds(options.seconds, it.monkey.kill_every(options.every, at_work=True))
            load.stop()
        drained = await it.drain()
        _check_stories(it)
        return await it.report("hook_replicas", drained)


def _check_stories(it: Stage) -> None:
    """That no story has two first messages, or one that is hidden in an edit, and that nothing else pings."""
    rooms = set(it.plan.hook_rooms())
    told = [line for line in read_lines(it.homeserver.log) if line["room"] in rooms]
    _check(it, told, stories.offenders(told))


def _check(it: Stage, told: list[dict[str, Any]], found: Iterable[str]) -> None:
    offenders = list(found)
    first = sum(line["relation"] is None for line in told)
    named = "".join(f"\n      {text}" for text in offenders[:SHOWN])
    what = f"{len(told):,} events of stories, {first:,} of them first messages; not as they must be: {len(offenders):,}"
    it.check("stories", what + named, bool(told) and not offenders, f"{len(told):,} told")
