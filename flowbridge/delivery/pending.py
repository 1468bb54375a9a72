"""The tickets of this process: those that lie in a lane, and those that somebody waits with."""

import asyncio
import json

from flowbridge.delivery.write_queue import PendingDelivery
from flowbridge.store import Row


class PendingDeliveries:
    """One ticket for each delivery, so that whoever waits hears of what a lane does. For one event loop."""

    def __init__(self) -> None:
        self._by_delivery: dict[str, PendingDelivery] = {}
        self._by_lane: dict[
            str, dict[str, PendingDelivery]
        ] = {}  # the same; of a lane's, those who wait are told at once

    def get(self, delivery: str) -> PendingDelivery | None:
        return self._by_delivery.get(delivery)

    def know(self, pending: PendingDelivery) -> PendingDelivery:
        row = pending.row
        self._by_delivery[row.delivery] = pending
        lane = self._by_lane.get(row.lane)
        if lane is None:
            self._by_lane[row.lane] = {row.delivery: pending}
        else:
            lane[row.delivery] = pending
        pending.settled.add_done_callback(lambda _: self._forget(pending))
        return pending

    def of(self, row: Row) -> PendingDelivery:
        """The ticket of an event that is in the store."""
        known = self._by_delivery.get(row.delivery)
        if known is not None:
            if known.held or (row.txn_id == known.row.txn_id and row.attempts <= known.attempts):
                return known
            self._forget(known)
            if not known.settled.done():
                _renew(known, row)
                return self.know(known)
        loop = asyncio.get_running_loop()
        return self.know(
            PendingDelivery(
                row,
                loop.create_future(),
                loop.create_future(),
                attempts=row.attempts,
                tried=row.attempts > 0,
                history=json.loads(row.history),
                counted=True,
                written=True,
            )
        )

    def leave(self, pending: PendingDelivery) -> None:
        """Forget a ticket that neither a lane holds nor a caller waits with: the store has it."""
        if not pending.held and not pending.waiters:
            self._forget(pending)

    def _forget(self, pending: PendingDelivery) -> None:
        row = pending.row
        if self._by_delivery.get(row.delivery) is pending:
            del self._by_delivery[row.delivery]
            lane = self._by_lane[row.lane]
            del lane[row.delivery]
            if not lane:
                del self._by_lane[row.lane]

    def waited_for(self) -> list[str]:
        """The deliveries that somebody waits for and that no lane of ours holds."""
        return [delivery for delivery, pending in self._by_delivery.items() if pending.waiters and not pending.held]

    def waiting(self) -> list[PendingDelivery]:
        """The deliveries that somebody waits for, in the order in which they came."""
        return [pending for pending in self._by_delivery.values() if pending.waiters and not pending.settled.done()]

    def waiting_in(self, lane: str) -> list[PendingDelivery]:
        """Those of a lane."""
        known = self._by_lane.get(lane)
        return (
            [pending for pending in known.values() if pending.waiters and not pending.settled.done()] if known else []
        )

    def hush(self) -> None:
        """Send all who wait away, without an outcome."""
        for pending in list(self._by_delivery.values()):
            if pending.waiters and not pending.settled.done():
                pending.settled.set_result(None)


def _renew(pending: PendingDelivery, row: Row) -> None:
    """Another replica has carried it meanwhile, perhaps to its end, and it was replayed since.

    Under the transaction id of then nothing would be sent. Who waits with the ticket waits on: it is the same delivery.
    """
    if row.txn_id != pending.row.txn_id:
        pending.outcome, pending.withdrawn = None, False
    pending.row = row
    pending.attempts, pending.tried, pending.history = row.attempts, row.attempts > 0, json.loads(row.history)
