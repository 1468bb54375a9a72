"""PostgreSQL's notifications: a few words to another process, with the commit of what they tell of.

Where a pooler gives each transaction another session (PgBouncer, for one) they reach nobody, so nothing may depend on
them.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine

from flowbridge.store import driver
from flowbridge.store.engine import is_pooled

MAX_BYTES = 7_900  # of a message: PostgreSQL takes fewer than 8,000


def notify(connection: Connection, channel: str, message: str) -> None:
    """Part of the transaction: heard when it is committed, or not at all."""
    driver.execute(connection, "SELECT pg_notify(%s, %s)", (channel, message))


async def listen(
    engine: Engine, channel: str, hear: Callable[[str], None], ready: Callable[[], None], retry: float
) -> None:
    """For ever, but behind a pooler, on a connection of its own: what others send to this channel, as it comes.

    `ready`: it listens from now on; what was said before may have been missed. `retry`: seconds after a failure.
    """
    while True:
        opening = _Opening(engine, channel)
        try:
            raw = await asyncio.to_thread(opening.run)
        except asyncio.CancelledError:
            opening.give_up()
            raise
        except Exception:  # noqa: S110 (the store is away, as whoever needs it says)
            pass
        else:
            if raw is None:
                return
            ready()
            await _read(raw, hear)
        await asyncio.sleep(retry)


async def _read(raw: Any, hear: Callable[[str], None]) -> None:
    """Until the connection is lost."""
    loop = asyncio.get_running_loop()
    lost = loop.create_future()

    def read() -> None:
        try:
            raw.pgconn.consume_input()
            while (found := raw.pgconn.notifies()) is not None:
                hear(found.extra.decode())
        except raw.Error:
            loop.remove_reader(socket)
            lost.set_result(None)

    socket = raw.fileno()
    loop.add_reader(socket, read)
    try:
        await lost
    finally:
        loop.remove_reader(socket)
        raw.close()


class _Opening:
    """A connection that is made in a thread, which goes on when its task is cancelled."""

    def __init__(self, engine: Engine, channel: str) -> None:
        self._engine = engine
        self._channel = channel
        self._raw: Any = None
        self._given_up = False

    def run(self) -> Any:
        """None: there is a pooler in between."""
        connection = self._engine.raw_connection()
        raw: Any = connection.driver_connection
        if is_pooled(raw):
            connection.close()
            return None
        connection.detach()  # the pool forgets it
        try:
            raw.autocommit = True
            raw.execute(f"LISTEN {self._channel}")
        except BaseException:
            raw.close()
            raise
        self._raw = raw  # before the look at the other: whichever of the two threads is second closes it
        if self._given_up:
            raw.close()
        return raw

    def give_up(self) -> None:
        self._given_up = True
        if self._raw is not None:
            self._raw.close()
