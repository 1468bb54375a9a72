"""Requests by name that pass through what is tested, each of which stays inside until it is let go."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any


class Crowd:
    """`came`: all that got in, in order; `inside`: those that have not left."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.ends: dict[str, asyncio.Event] = {}
        self.came: list[str] = []
        self.inside: list[str] = []

    async def enter(self, door: Callable[[], AbstractAsyncContextManager[Any]], *names: str) -> None:
        for name in names:
            self.ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._pass(door, name))
        await settle()

    async def go(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
        await settle()

    async def give_up(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await settle()

    async def scatter(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _pass(self, door: Callable[[], AbstractAsyncContextManager[Any]], name: str) -> None:
        async with door():
            self.came.append(name)
            self.inside.append(name)
            try:
                await self.ends[name].wait()
            finally:
                self.inside.remove(name)


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(10):
        await asyncio.sleep(0)
