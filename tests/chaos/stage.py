"""What every scenario stands on: a homeserver, bridges in front of it, a load, and the judgement at the end."""

import asyncio
import json
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.chaos import stories
from tests.chaos.client import NoAnswer
from tests.chaos.homeserver import API_KEY, Homeserver, scripted
from tests.chaos.judge import judge, read_accepted, read_seen
from tests.chaos.load import Load, Plan
from tests.chaos.monkey import Bridge, Monkey
from tests.chaos.options import Options
from tests.chaos.progress import Progress
from tests.chaos.report import Check, Report
from tests.processes import Process, free_port

HOOKS = "hooks.yaml"
LAST_ANSWERS_SECONDS = 90.0  # for what is under way when the load stops
SECRET_KEY = "Y2hhb3MtY2hhb3MtY2hhb3MtY2hhb3MtY2hhb3MtY2g="  # of this many bytes, since replicas must share one
HONEST = frozenset({"200", "202", "503 + Retry-After"})  # what a bridge may answer when its store is in trouble
UNKNOWN = "504"  # "it may be in the room": for what was on its way when the store failed


class Stage:
    """The parts of a run, made and ended by `stage()`."""

    def __init__(self, options: Options, directory: Path, homeserver: Homeserver, monkey: Monkey) -> None:
        self.options = options
        self.directory = directory
        self.homeserver = homeserver
        self.monkey = monkey
        self.load: Load | None = None
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.plan = Plan(
            urls=tuple(bridge.url for bridge in monkey.bridges),
            headers=homeserver.callers,
            rooms=options.rooms,
            fire=options.fire,
            states=options.states,
            matrix=options.matrix,
            hooks=options.hooks,
            mode=options.mode,
            rate=options.rate or 0.0,
            name=uuid4().hex[:8],
            seed=options.seed,
            real=homeserver.rooms,
        )
        self.keep = True  # until all turned out well
        self.store_fails = False  # what was sent may then be unknown to the next bridge, which sends it again
        self._began = time.monotonic()

    @property
    def bridge(self) -> Bridge:
        """The one there is, or the first."""
        return self.monkey.bridges[0]

    @property
    def accepted_log(self) -> Path:
        return self.directory / "accepted.events"

    def check(self, name: str, what: str, good: bool, short: str = "") -> None:
        self.checks.append(Check(name, what, good, short))

    async def steer(self, command: str, **faults: Any) -> dict[str, Any]:
        """A command to the scripted homeserver."""
        return await self.homeserver.steer(command, **faults)

    @asynccontextmanager
    async def loading(self, plan: Plan | None = None) -> AsyncIterator[Load]:
        """Send while the context lasts, and wait for the answers of what is under way then."""
        with self.accepted_log.open("ab", buffering=0) as log:
            load = self.load = Load(plan or self.plan, log)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(load.run())
                watch = group.create_task(self.monkey.watch())
                yield load
                load.stop()
                _, late = await asyncio.wait([task], timeout=LAST_ANSWERS_SECONDS)
                task.cancel()
                watch.cancel()
        self._check_load(load, bool(late))

    def _check_load(self, load: Load, late: bool) -> None:
        refused = "".join(f"\n      {text} ({times} times)" for text, times in load.refused.most_common(5))
        self.check("refused", f"refused by the bridge: {load.refused.total():,}{refused}", not load.refused)
        if late:
            stuck = "".join(f"\n      {event}: {why}" for event, why in list(load.under_way.items())[:5])
            what = f"{len(load.under_way)} events had no answer {LAST_ANSWERS_SECONDS:g} s after the load ended"
            self.check("late", what + stuck, good=False)
        self.notes.append(
            f"    {load.tries:,} requests; accepted within {load.percentile(0.5):.1f} ms (median), "
            f"{load.percentile(0.99):.1f} ms (p99)"
        )
        answers = ", ".join(f"{status}: {times:,}" for status, times in load.answers.most_common())
        self.notes.append(f"    answers: {answers}")

    def check_honest(self, load: Load, *, failures: int = 0) -> None:
        """That the flow surface said that it took an event, or that it could not, and when to come again.

        In each failure of the store, one event of each room may have been in flight: its fate is unknown.
        """
        flow = {status: times for status, times in load.answers.items() if not status.startswith("Matrix")}
        others = {status: times for status, times in flow.items() if status not in HONEST}
        unknown, most = others.pop(UNKNOWN, 0), failures * self.plan.size
        self.check("answers", f"answers but 200, 202, 503 with Retry-After: {others or 'none'}", not others)
        self.check("unknown", f"answers that it may be in the room: {unknown}, most allowed {most}", unknown <= most)

    async def drain(self) -> float:
        """Wait until everything accepted is seen, or nothing comes any more; the seconds until the last event."""
        began = last = time.monotonic()
        promised = {(one.room, one.n) for one in read_accepted(self.accepted_log) if one.is_promised}
        tail = _Tail(self.homeserver.log)
        watch = asyncio.ensure_future(self.monkey.watch())
        try:
            while True:
                if new := tail.read():
                    last = time.monotonic()
                    promised -= new
                now = time.monotonic()
                if now - last > (self.options.patience if promised else self.options.quiet):
                    return last - began
                if now - began > self.options.drain:
                    what = f"{len(promised):,} events were still missing after {now - began:.0f} s"
                    self.check("drain", what, good=False)
                    return last - began
                if watch.done():
                    watch.result()
                await asyncio.sleep(0.05)
        finally:
            watch.cancel()

    async def report(self, scenario: str, drained: float) -> Report:
        """Judge, once the bridges have drained, which took this many seconds."""
        verdict = judge(read_accepted(self.accepted_log), read_seen(self.homeserver.log, self.plan.room_ids()))
        self.check("accepted", "something was accepted at all", verdict.accepted > 0)
        self._check_ends()
        self.notes.append(f"    the last event came {drained:.1f} s after the load ended")
        stats = await self._stats() if self.homeserver.scripted else {}
        report = Report(
            scenario,
            verdict,
            tuple(self.checks),
            tuple(self.notes),
            seconds=time.monotonic() - self._began,
            did=Counter(self.monkey.counts),
            given=stats.get("given", {}),
        )
        self.keep = self.options.keep or self.options.directory is not None or not report.good
        return replace(report, notes=(*report.notes, f"    kept: {self.directory}")) if self.keep else report

    def _check_ends(self) -> None:
        counts = self.monkey.counts
        crashes = counts["crash"] + counts["stuck"]
        self.check("crashes", f"bridges that ended by themselves, or not when told to: {crashes}", not crashes)
        if counts["term"]:
            unclean = counts["unclean"]
            self.check("unclean", f"SIGTERMs that ended in another exit code than 0: {unclean}", not unclean)
        did = ", ".join(f"{what} {times}" for what, times in counts.items()) or "nothing"
        self.notes.append(f"    done: {did}; most memory of a bridge: {self.monkey.rss_mb:.0f} MB")

    async def _stats(self) -> dict[str, Any]:
        try:
            stats = await self.steer("stats")
        except NoAnswer:
            self.check("homeserver", "the homeserver itself is well", good=False)
            return {}
        self.notes.append(f"    homeserver: {json.dumps(stats)}")
        self._check_leases(stats)
        return stats

    def _check_leases(self, stats: dict[str, Any]) -> None:
        """What the homeserver's memory hides from its rooms.

        A stopped process may have one send per room in flight, which goes out late. One that is killed may have
        answered 200 for some before the commit (design, rule 3): they are sent again, too.
        """
        rooms, counts = self.plan.size, self.monkey.counts
        overlaps, stale = stats["overlaps"], stats["stale"]
        met = rooms * counts["stop"] // 8  # of the few in flight, few meet a send of the other bridge
        what = f"two bridges in one room at once: {overlaps} times, most allowed {met}"
        self.check("overlaps", what, overlaps <= met)
        if self.store_fails:
            return
        most = rooms * (counts["stop"] + counts["kill"])
        what = f"sends repeated after their room had gone on: {stale}, most allowed {most}"
        self.check("stale", what, stale <= most)


class _Tail:
    """Reads on in the homeserver's log from where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> set[tuple[str, int]]:
        """The (room, n) that came since."""
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return {(line["room"], line["n"]) for line in map(json.loads, whole.splitlines())}


def temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="flowbridge-chaos-"))


@asynccontextmanager
async def stage(
    options: Options,
    faults: Mapping[str, float] | None = None,
    *,
    homeserver: Homeserver | None = None,
    databases: Sequence[str] = (),
) -> AsyncIterator[Stage]:
    """Start a homeserver (`faults`: its options) and bridges; end them, and clear up, whatever happens.

    `homeserver`: this homeserver instead. `databases`: one for each bridge; none: one bridge on an SQLite file.
    Raises BridgeBroken when one of them does not start, FileExistsError when the run's directory is there already.
    """
    options = options.leased(options.lease) if options.lease else options
    directory = temporary_directory() if options.directory is None else options.directory
    directory.mkdir(parents=True, exist_ok=options.directory is None)
    databases = databases or [f"sqlite:///{directory / 'flowbridge.db'}"]
    made: Stage | None = None
    async with AsyncExitStack() as stack:
        if homeserver is None:
            given = {**(faults or {}), **({"latency_ms": options.latency} if options.latency else {})}
            opened = scripted(directory, given, ports=len(databases), seed=options.seed)
            homeserver = await stack.enter_async_context(opened)
        bridges = [_bridge(options, directory, homeserver, index, url) for index, url in enumerate(databases)]
        monkey = Monkey(bridges, options.seed)
        stack.callback(monkey.end)
        made = Stage(options, directory, homeserver, monkey)
        if options.hooks:
            (directory / HOOKS).write_text(stories.hooks(made.plan.hook_rooms()))
        await monkey.start()
        showing = asyncio.ensure_future(_show(made, options.progress))
        stack.callback(showing.cancel)
        yield made
    if not made.keep:
        shutil.rmtree(directory, ignore_errors=True)


async def _show(it: Stage, every: float) -> None:
    if every:
        await Progress(lambda: it.load.accepted if it.load else 0, it.homeserver.log, it.monkey).show(every)


def _bridge(options: Options, directory: Path, homeserver: Homeserver, index: int, database: str) -> Bridge:
    port = free_port()
    environment = {
        "BASE_URL": homeserver.urls[index % len(homeserver.urls)],
        "ACCESS_TOKEN": homeserver.bot,
        "FLOWBRIDGE_API_KEYS": API_KEY,
        "FLOWBRIDGE_DATABASE_URL": database,
        "FLOWBRIDGE_SECRET_KEY": SECRET_KEY,
        "FLOWBRIDGE_LOG_LEVEL": "warning",
        **({"FLOWBRIDGE_HOOKS_FILE": str(directory / HOOKS)} if options.hooks else {}),
        **options.environment,
    }
    argv = [word.replace("{port}", str(port)) for word in shlex.split(options.bridge)]
    process = Process(f"bridge-{index}", argv, environment, directory, options.prefix)
    return Bridge(process, f"http://127.0.0.1:{port}")
