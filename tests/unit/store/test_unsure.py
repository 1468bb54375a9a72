"""An acceptance whose commit got no answer until the retries ended: it is sent when it was committed."""

import sqlite3
from typing import Any

import pytest

from flowbridge.store import StoreUnsure
from tests.integration.store.test_database import failing
from tests.rig import MakeRig, Rooms, refuse_connection, soon, until

LOST = sqlite3.OperationalError("disk I/O error")


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("how", [{"waits": False}, {"waits": True}, {"key": "k"}], ids=["async", "waits", "keyed"])
async def test_acceptance_in_doubt_is_sent_where_it_was_done(
    make: MakeRig, rooms: Rooms, how: dict[str, Any], is_done: bool
) -> None:
    """In a lane that is held, and busy with an older event, so that this one is not on its way."""
    make.tune(store_retry_seconds=0.1)
    async with make() as rig:
        rooms.always(refuse_connection)
        await rig.accept("first")
        await until(lambda: rooms.sends)
        with failing(rig.database, "do_commit", *[LOST] * 1_000, after=is_done):
            pending = rig.offer("in doubt", **how)
            with pytest.raises(StoreUnsure):
                await soon(pending.committed)
            if pending.waiters:
                with pytest.raises(StoreUnsure):
                    await soon(pending.settled)
        rooms.always(None)
        await rooms.reads(1 + is_done)
        await rig.settled(1 + is_done)
        await rig.send("last")
        assert rooms.bodies() == ["first", *["in doubt"] * is_done, "last"]
        await until(lambda: rig.states() == ["sent"] * (2 + is_done))  # its row is not waited for
        assert rig.backpressure.queued == 0
