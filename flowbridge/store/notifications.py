"""PostgreSQL's notifications: a few words to another process, with the commit of what they tell of.

Where a pooler gives each transaction another session (PgBouncer, for one) they reach nobody, so nothing may depend on
them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
    thread = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-listen")
    try:
        while True:
            opening = thread.submit(_open, engine, channel)
            try:
                raw = await asyncio.wrap_future(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(_close)
                raise
            except Exception:  # noqa: S110 (the store is away, as whoever needs it says)
                pass
            else:
                if raw is None:
                    return
                ready()
                await _read(raw, hear)
            await asyncio.sleep(retry)
    finally:
        thread.shutdown(wait=False)


def _close(opening: "Future[Any]") -> None:
    """The connection that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None and (raw := opening.result()) is not None:
        raw.close()


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


def _open(engine: Engine, channel: str) -> Any:
    """None: there is a pooler in between."""
    connection = engine.raw_connection()
    raw: Any = connection.driver_connection
    if is_pooled(raw):
        connection.close()
        return None
    connection.detach()  # the pool forgets it
    try:
        raw.autocommit = True
        raw.execute(f"LISTEN {channel}")
    except BaseException:
        raw.close()
        raise
    return raw
