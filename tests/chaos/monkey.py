"""The monkey: owns the bridges' processes, ends them in every way there is, and starts them again at once."""

import asyncio
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.chaos.client import Client, NoAnswer
from tests.processes import Process

START_SECONDS = 60.0  # a start takes one second of work, and many on a busy machine
TERM_SECONDS = 40.0  # a bridge finishes its requests for at most 10 s
MAX_CRASHES = 20  # a bridge that ends by itself more often than this will not do better
IN_START = 0.1  # share of the kills that hit a bridge while it starts


class BridgeBroken(Exception):
    """A bridge does not start, or keeps ending by itself."""


@dataclass
class Bridge:
    """One bridge process on its port."""

    process: Process
    url: str
    probe: str = "/healthz"
    victim: bool = False  # it is being ended on purpose

    async def ready(self, seconds: float = START_SECONDS, *, once: bool = False) -> bool:
        """Whether it answers anything at all within that time. `once`: it is not restarted when it has ended."""
        client, ends = Client(self.url), time.monotonic() + seconds
        try:
            while time.monotonic() < ends and (self.process.running() or not once):
                with suppress(NoAnswer):
                    await client.ask("GET", self.probe, seconds=1)
                    return True
                await asyncio.sleep(0.01)
            return False
        finally:
            client.close()


@dataclass
class Monkey:
    """`counts`: what it did: kill, stop, term; and what no bridge should do.

    `crash`: it ended by itself; `stuck`: it did not end on SIGTERM; `unclean`: then its exit code was not 0.
    `slowest_term`: seconds.
    """

    bridges: list[Bridge]
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    rss_mb: float = 0.0
    slowest_term: float = 0.0
    _chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    async def start(self) -> None:
        for bridge in self.bridges:
            bridge.process.start()
        for bridge in self.bridges:
            if not await bridge.ready(once=True):
                raise BridgeBroken(f"{bridge.process.name} does not start: {bridge.process.last_words()}")

    def end(self) -> None:
        for bridge in self.bridges:
            bridge.process.kill()

    def measure(self) -> None:
        """Note the memory."""
        self.rss_mb = max([self.rss_mb, *(bridge.process.rss_mb() for bridge in self.bridges)])

    async def watch(self) -> None:
        """Restart what ended by itself, and note the memory. Raises BridgeBroken."""
        while True:
            self.measure()
            for bridge in self.bridges:
                if not bridge.victim and not bridge.process.running():
                    self.counts["crash"] += 1
                    if self.counts["crash"] > MAX_CRASHES:
                        raise BridgeBroken(f"{bridge.process.name} keeps ending: {bridge.process.last_words()}")
                    bridge.process.start()
            await asyncio.sleep(0.1)

    async def kill_often(self, kills: int, seconds: float, *, term: float = 0.05) -> None:
        """This many kill -9 in about that time, the bridge working in between; `term`: the share of SIGTERMs.

        How long a start takes is not known in advance: when starts are slow, the spells of work get shorter.
        """
        ends = time.monotonic() + seconds
        while self.counts["kill"] < kills:
            bridge = self._chance.choice(self.bridges)
            began = time.monotonic()
            in_start = self._chance.random() < IN_START
            if in_start:
                await asyncio.sleep(self._chance.uniform(0, 0.5))
            elif not await bridge.ready():
                raise BridgeBroken(f"{bridge.process.name} does not answer: {bridge.process.last_words()}")
            else:
                taken = time.monotonic() - began
                each = max(0.0, ends - time.monotonic()) / (kills - self.counts["kill"])
                await asyncio.sleep(self._chance.uniform(0.5, 1.3) * max(0.2, each - taken))
            politely = not in_start and self._chance.random() < term
            await (self.term(bridge) if politely else self.kill(bridge))

    async def kill_every(self, pause: float, *, at_work: bool = False, kills: float = math.inf) -> None:
        """One bridge after the other, this many or until cancelled; `at_work`: each that long after it has started."""
        for bridge in self._turns():
            if self.counts["kill"] >= kills:
                return
            if at_work:
                await bridge.ready()
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * pause)
            await self.kill(bridge)

    async def term_every(self, pause: float) -> None:
        """SIGTERM to one bridge after the other, each while it works, until cancelled."""
        for bridge in self._turns():
            if not await bridge.ready():
                raise BridgeBroken(f"{bridge.process.name} does not answer: {bridge.process.last_words()}")
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * pause)
            await self.term(bridge)

    async def stop_every(self, stopped: float, pause: float) -> None:
        """Stop one bridge for that long, let it continue, and turn to the next, until cancelled."""
        for bridge in self._turns():
            await asyncio.sleep(pause)
            with self._a_victim(bridge):
                self.counts["stop"] += 1
                bridge.process.send(signal.SIGSTOP)
                try:
                    await asyncio.sleep(stopped)
                finally:
                    bridge.process.send(signal.SIGCONT)

    async def kill_all(self) -> None:
        for bridge in self.bridges:
            await self.kill(bridge)

    async def kill(self, bridge: Bridge, *, down: float = 0.0) -> None:
        """kill -9, and a start after `down` seconds."""
        with self._a_victim(bridge):
            bridge.process.kill()
            self.counts["kill"] += 1
            if down:
                await asyncio.sleep(down)
            bridge.process.start()

    async def term(self, bridge: Bridge) -> None:
        """SIGTERM to a bridge that has started; one that does not end in time is killed and counted as `stuck`."""
        with self._a_victim(bridge):
            began = time.monotonic()
            bridge.process.send(signal.SIGTERM)
            self.counts["term"] += 1
            try:
                if not await bridge.process.gone(TERM_SECONDS):
                    self.counts["stuck"] += 1
                elif bridge.process.exit_code != 0:
                    self.counts["unclean"] += 1
                self.slowest_term = max(self.slowest_term, time.monotonic() - began)
            finally:
                bridge.process.kill()
                bridge.process.start()

    def _turns(self) -> Iterator[Bridge]:
        while True:
            yield from self.bridges

    @contextmanager
    def _a_victim(self, bridge: Bridge) -> Iterator[None]:
        bridge.victim = True
        try:
            yield
        finally:
            bridge.victim = False
