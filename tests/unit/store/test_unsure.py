"""An acceptance whose commit got no answer until the retries ended: it is sent when it was committed."""

import sqlite3
from typing import Any

import pytest

from flowbridge.models.timing import Timing
from flowbridge.store import StoreUnsure
from tests.integration.store.test_database import failing
from tests.worker import MakeWorker, Rooms, refuse_connection, soon, until

LOST = sqlite3.OperationalError("disk I/O error")


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("how", [{"waits": False}, {"waits": True}, {"key": "k"}], ids=["async", "waits", "keyed"])
async def test_acceptance_in_doubt_is_sent_where_it_was_done(
    make: MakeWorker, rooms: Rooms, how: dict[str, Any], is_done: bool
) -> None:
    """In a lane that is held, and busy with an older event, so that this one is not on its way."""
    async with make(timing=Timing(store_retry_seconds=0.1)) as worker:
        rooms.always(refuse_connection)
        await worker.accept("first")
        await until(lambda: rooms.sends)
        with failing(worker.database, "do_commit", *[LOST] * 1_000, after=is_done):
            ticket = worker.offer("in doubt", **how)
            with pytest.raises(StoreUnsure):
                await soon(ticket.committed)
            if ticket.waiters:
                with pytest.raises(StoreUnsure):
                    await soon(ticket.settled)
        rooms.always(None)
        await rooms.reads(1 + is_done)
        await worker.settled(1 + is_done)
        await worker.send("last")
        assert rooms.bodies() == ["first", *["in doubt"] * is_done, "last"]
        await until(lambda: worker.states() == ["sent"] * (2 + is_done))  # its row is not waited for
        assert worker.backpressure.queued == 0
