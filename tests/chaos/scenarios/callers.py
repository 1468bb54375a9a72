"""One caller takes all that it can get, beside others."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from tests.chaos.client import Client, NoAnswer
from tests.chaos.homeserver import bearer
from tests.chaos.load import Load
from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.scenarios.scenario import FAULTS, WARM_SECONDS, for_seconds, until
from tests.chaos.stage import stage

HOG = "syt_hog"
CONNECTIONS = 8
ROOMS = 10_000  # that the hog sends to, and is not in
LARGE_BYTES = 60_000
DATABASE_BYTES = 64 * 1024 * 1024  # full within seconds, if it may be
QUIET_RATE = 100.0  # events/s of all quiet callers
REFUSED = 50  # answers, and the hog has all that it can get
FILL_SECONDS = 90.0  # within which a bridge without shares is full
CATCH_UP_SECONDS = 30.0
KEPT = 0.8  # of that, beside the hog


@dataclass
class _Hog:
    """`answers`: how often each status came."""

    url: str
    answers: Counter[int] = field(default_factory=Counter)
    sent: int = 0

    @asynccontextmanager
    async def at_it(self) -> AsyncIterator[None]:
        """Send on all connections while the context lasts, and ignore the answers."""
        tasks = [asyncio.create_task(self._send()) for _ in range(CONNECTIONS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def has_its_share(self, seconds: float) -> None:
        """Until it is refused repeatedly, or this many seconds have passed."""

        async def refused() -> bool:
            return self.answers[503] >= REFUSED

        await until(refused, seconds)

    async def _send(self) -> None:
        body = json.dumps({"msgtype": "m.text", "body": "x" * LARGE_BYTES}).encode()
        headers = {"Content-Type": "application/json", "Prefer": "respond-async", **bearer(HOG)}
        client = Client(self.url)
        try:
            while True:
                self.sent += 1
                target = f"/rooms/!closed-{self.sent % ROOMS}:chaos.test/send/m.room.message"
                try:
                    answer = await client.ask("POST", target, body, headers)
                except NoAnswer:
                    await asyncio.sleep(0.05)
                else:
                    self.answers[answer.status] += 1
        finally:
            client.close()


async def hog(options: Options) -> Report:
    """One caller floods the store with events of 60 kB for rooms that it is not in, beside quiet ones; kill -9, too."""
    options = options.with_settings(FLOWBRIDGE_MAX_DATABASE_BYTES=str(DATABASE_BYTES))
    rate = options.rate or QUIET_RATE
    async with stage(options, FAULTS) as it:
        flood = _Hog(it.bridge.url)
        async with it.loading(replace(it.plan, rate=rate)) as load:
            quiet = _Quiet(load, rate)
            await asyncio.sleep(WARM_SECONDS)
            alone = await quiet.measured(options.seconds / 4)
            async with flood.at_it():
                await flood.has_its_share(FILL_SECONDS)
                await it.monkey.kill(it.bridge)  # what each caller holds has to be learnt from the store
                await it.bridge.ready()
                await quiet.caught_up(CATCH_UP_SECONDS)
                beside = await quiet.measured(options.seconds / 4)
                await for_seconds(options.seconds / 2, it.monkey.kill_every(options.every, at_work=True))
            await it.bridge.ready()
        share = beside.rate / alone.rate if alone.rate else 0.0
        what = f"the quiet callers' rate beside the hog: {share:.2f} of {alone.rate:.0f}/s, wanted ≥ {KEPT:g}"
        it.check("beside", what, share >= KEPT, f"{share:.2f} of the rate")
        taken, refused = flood.answers[202], flood.answers[503]
        it.check("share", f"the hog was answered 202 {taken:,} times, 503 {refused:,} times", taken > 0 and refused > 0)
        it.notes.append(f"    quiet callers' p99: {alone.p99:.0f} ms alone, {beside.p99:.0f} ms beside the hog")
        return await it.report("hog", await it.drain())


@dataclass(frozen=True)
class _Measured:
    """Events a second, and the milliseconds within which 99 % of them had their answer."""

    rate: float
    p99: float


class _Quiet:
    """The load, as callers who are to notice nothing."""

    def __init__(self, load: Load, rate: float) -> None:
        self._load = load
        self._rate = rate
        self._began = time.monotonic()

    async def measured(self, seconds: float) -> _Measured:
        began, before = time.monotonic(), len(self._load.milliseconds)
        await asyncio.sleep(seconds)
        times = sorted(self._load.milliseconds[before:])
        p99 = times[min(len(times) - 1, int(0.99 * len(times)))] if times else math.inf
        return _Measured(len(times) / (time.monotonic() - began), p99)

    async def caught_up(self, seconds: float) -> None:
        """Until they have sent what they could not while the bridge was away, or this many seconds have passed."""

        async def on_time() -> bool:
            due = self._rate * (time.monotonic() - self._began)
            return self._load.accepted >= due - self._load.plan.size

        await until(on_time, seconds)
