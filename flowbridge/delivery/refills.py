"""Refills: lanes that run empty at the same moment, in whatever rooms, read the store by one statement.

Between two replicas each event takes a refill, and a message from the other one names many lanes.
"""

import asyncio
from functools import partial

from flowbridge.store import Database, Row, outbox

_Waiting = dict[str, tuple[int, "asyncio.Future[list[Row]]"]]


class Refills:
    """A lane must see all that was done before it asks: its events that were settled, or withdrawn, are not queued.

    So those of one turn of the event loop are read together, behind all that the writer was asked for by then.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: _Waiting = {}

    async def fetch(self, lane: str, limit: int) -> list[Row]:
        """The first queued events of a lane, which asks for one reading at a time. Raises what the store does."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._read)
        future: asyncio.Future[list[Row]] = loop.create_future()
        self._waiting[lane] = limit, future
        return await future

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, {}
        limits = {lane: limit for lane, (limit, _) in waiting.items()}
        reading = self._database.run(partial(outbox.fetch_each, limits=limits), always=True)
        reading.add_done_callback(partial(_done, waiting))


def _done(waiting: _Waiting, reading: "asyncio.Future[dict[str, list[Row]]]") -> None:
    error = None if reading.cancelled() else reading.exception()
    for lane, (_, future) in waiting.items():
        if future.done():  # the lane was ended meanwhile
            continue
        if reading.cancelled():
            future.cancel()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(reading.result().get(lane, []))
