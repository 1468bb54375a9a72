"""What a scenario is, and what several of them do."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.client import NoAnswer
from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.stage import Stage

FAULTS = {"p429": 0.02, "p500": 0.02, "plost": 0.02}
SLOW = {**FAULTS, "latency_ms": 5}  # so that two bridges in one room at once can be seen
WARM_SECONDS = 5.0


@dataclass(frozen=True)
class Scenario:
    """`seconds`: its length unless another is asked for; 0: it has its own. `postgres`: it needs one."""

    run: Callable[[Options], Coroutine[None, None, Report]]
    seconds: float = 60.0
    postgres: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]

    def __call__(self, options: Options) -> Coroutine[None, None, Report]:
        return self.run(options)


async def for_seconds(seconds: float, doing: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(doing, seconds)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float, *, every: float = 0.05) -> bool:
    """Whether it holds at some time within this many seconds. Without an answer it does not hold."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with suppress(NoAnswer):
            if await holds():
                return True
        await asyncio.sleep(every)
    return False


async def steer_when_back(it: Stage, command: str, **faults: float) -> None:
    async def steered() -> bool:
        return bool(await it.steer(command, **faults))

    if not await until(steered, 60):
        raise NoAnswer("the homeserver does not come back")
