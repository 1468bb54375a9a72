"""Asyncio tasks that several callers share, and those whose end no caller waits for."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from flowbridge import log
from flowbridge.errors import MatrixError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def ended(future: "asyncio.Future[Any]") -> None:
    """Wait until it is done, whatever came of it, and those heard it who had asked before.

    `asyncio.wait` does the same at several times the cost.
    """
    heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    hear = partial(_tell, heard)
    future.add_done_callback(hear)
    try:
        await heard
    finally:
        future.remove_done_callback(hear)


def _tell(heard: "asyncio.Future[None]", _: object) -> None:
    if not heard.done():
        heard.set_result(None)


class Once(Generic[K, T]):
    """Single flight: callers that ask the same question while it is being answered share one task."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}

    def task(self, key: K, ask: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The task that answers this question: the one in flight, or a new one. Not to be cancelled by a caller."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(ask())
            task.add_done_callback(lambda _: self._tasks.pop(key))
            task.add_done_callback(ignore_result)
        return task

    async def get(self, key: K, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The answer. Raises what `ask` raises, in every caller; a cancelled caller does not cancel the others."""
        return await asyncio.shield(self.task(key, ask))

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[T]]:
        return iter(self._tasks.values())


def ignore_result(done: "asyncio.Future[Any]") -> None:
    """A done callback for a future that perhaps no caller awaits: asyncio must not report its error as never retrieved.

    A MatrixError is an answer, and not logged.
    """
    if not done.cancelled() and (error := done.exception()) is not None and not isinstance(error, MatrixError):
        log.error("background_task_failed", exc_info=error)
