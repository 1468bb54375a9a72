"""Answers that stay true, kept since many may ask for the same: all listeners at once, after a broken connection."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

MAX_BYTES = 2 * 1024 * 1024
MAX_ASKING = 4  # questions at once: who catches up must not be a burden on the homeserver


class Memo:
    """Asks each question once, however many want to know, and remembers the last answers."""

    def __init__(self) -> None:
        self._asking: dict[str, asyncio.Task[Any]] = {}
        self._kept: dict[str, tuple[Any, int]] = {}
        self._bytes = 0
        self._turns = asyncio.Semaphore(MAX_ASKING)

    async def get(self, name: str, ask: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        """The answer; `ask` gives it and its size in bytes. Raises what `ask` raises, to all who wait for it."""
        if name in self._kept:
            kept: T = self._kept[name][0]
            return kept
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.ensure_future(self._ask(name, ask))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        answer: T = await asyncio.shield(task)
        return answer

    async def _ask(self, name: str, ask: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        try:
            async with self._turns:
                answer, size = await ask()
        finally:
            del self._asking[name]
        self._kept[name] = (answer, size)
        self._bytes += size
        while self._bytes > MAX_BYTES:
            self._bytes -= self._kept.pop(next(iter(self._kept)))[1]
        return answer
