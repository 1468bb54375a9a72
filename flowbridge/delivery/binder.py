"""The binder: events whose turn comes at about the same time, in whatever lanes, are bound by one piece of work."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from sqlalchemy import Connection

from flowbridge.delivery import binding
from flowbridge.delivery.binding import Amended, Resolved, Wanted
from flowbridge.delivery.write_queue import PATIENT_SECONDS
from flowbridge.store import Database, Fence, Row

MAX_EVENTS = 200  # at once: some 20 ms, for which accepting waits


@dataclass(frozen=True, slots=True)
class _Request:
    wanted: Wanted
    future: "asyncio.Future[list[Resolved] | None]"


class Binder:
    """`amended`: see `WriteQueue.amended`."""

    def __init__(self, database: Database, amended: Amended) -> None:
        self._database = database
        self._amended = amended
        self._waiting: deque[_Request] = deque()
        self._planned = False
        self._hurrying = False

    async def bind(self, rows: Sequence[Row], fence: Fence, *, urgent: bool = True) -> list[Resolved] | None:
        """What becomes of these events, of the first ones at least; None if the lane has another holder.

        `urgent`: a caller waits for that; otherwise a commit for more of them costs less.
        Raises what the store does: then it may be done all the same, and is to be asked for again.
        """
        request = _Request(Wanted(rows, fence), asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._plan(lingers=not urgent)
        if not urgent and not self._hurrying:
            self._hurrying = True
            asyncio.get_running_loop().call_later(PATIENT_SECONDS, self._hurry)
        return await request.future

    def _plan(self, *, lingers: bool = False) -> None:
        if not self._planned:
            self._planned = True
            self._run(_Batch(self._take, self._amended), lingers=lingers)
        elif not lingers:
            self._database.hurry()

    def _hurry(self) -> None:
        self._hurrying = False
        self._database.hurry()

    def _take(self) -> list[_Request]:
        """On the writer's thread: what came while it was busy is bound together."""
        self._planned = False  # first: what comes from here on is planned for again
        found: list[_Request] = []
        events = 0
        while self._waiting and events < MAX_EVENTS:
            found.append(self._waiting.popleft())
            events += len(found[-1].wanted.rows)
        return found

    def _run(self, batch: "_Batch", *, lingers: bool = False) -> None:
        work = self._database.run(batch.run, lingers=lingers, alone=True, always=True)
        work.add_done_callback(partial(self._done, batch))

    def _done(self, batch: "_Batch", done: "asyncio.Future[list[list[Resolved] | None]]") -> None:
        requests = batch.requests  # if the store was not reached, they were never taken
        error = None if done.cancelled() else done.exception()
        if error is not None and len(requests) > 1:  # one of them must not hold up the others
            for request in requests:
                self._run(_Batch(partial(list, (request,)), self._amended))
        elif not done.cancelled():
            found = [None for _ in requests] if error is not None else done.result()
            for request, resolved in zip(requests, found, strict=True):
                _tell(request.future, resolved, error)
        if self._waiting:
            self._plan()


class _Batch:
    """What one piece of work binds; the same when it is repeated."""

    def __init__(self, take: Callable[[], list[_Request]], amended: Amended) -> None:
        self._take = take
        self._amended = amended

    @cached_property
    def requests(self) -> list[_Request]:
        return self._take()

    def run(self, connection: Connection) -> list[list[Resolved] | None]:
        return binding.resolve(connection, [request.wanted for request in self.requests], self._amended)


def _tell(
    future: "asyncio.Future[list[Resolved] | None]", resolved: list[Resolved] | None, error: BaseException | None
) -> None:
    if future.done():  # its lane was ended meanwhile
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(resolved)
