"""The tickets of this process: those that lie in a lane, and those that somebody waits with."""

import asyncio
import json

from flowbridge.delivery.write_queue import Ticket
from flowbridge.store import Row


class Tickets:
    """One ticket for each delivery, so that whoever waits hears of what a lane does. For one event loop."""

    def __init__(self) -> None:
        self._by_delivery: dict[str, Ticket] = {}
        self._by_lane: dict[str, dict[str, Ticket]] = {}  # the same; of a lane's, those who wait are told at once

    def get(self, delivery: str) -> Ticket | None:
        return self._by_delivery.get(delivery)

    def know(self, ticket: Ticket) -> Ticket:
        row = ticket.row
        self._by_delivery[row.delivery] = ticket
        lane = self._by_lane.get(row.lane)
        if lane is None:
            self._by_lane[row.lane] = {row.delivery: ticket}
        else:
            lane[row.delivery] = ticket
        ticket.settled.add_done_callback(lambda _: self._forget(ticket))
        return ticket

    def of(self, row: Row) -> Ticket:
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
            Ticket(
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

    def leave(self, ticket: Ticket) -> None:
        """Forget a ticket that neither a lane holds nor a caller waits with: the store has it."""
        if not ticket.held and not ticket.waiters:
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        row = ticket.row
        if self._by_delivery.get(row.delivery) is ticket:
            del self._by_delivery[row.delivery]
            lane = self._by_lane[row.lane]
            del lane[row.delivery]
            if not lane:
                del self._by_lane[row.lane]

    def waited_for(self) -> list[str]:
        """The deliveries that somebody waits for and that no lane of ours holds."""
        return [delivery for delivery, ticket in self._by_delivery.items() if ticket.waiters and not ticket.held]

    def waiting(self) -> list[Ticket]:
        """The deliveries that somebody waits for, in the order in which they came."""
        return [ticket for ticket in self._by_delivery.values() if ticket.waiters and not ticket.settled.done()]

    def waiting_in(self, lane: str) -> list[Ticket]:
        """Those of a lane."""
        known = self._by_lane.get(lane)
        return [ticket for ticket in known.values() if ticket.waiters and not ticket.settled.done()] if known else []

    def hush(self) -> None:
        """Send all who wait away, without an outcome."""
        for ticket in list(self._by_delivery.values()):
            if ticket.waiters and not ticket.settled.done():
                ticket.settled.set_result(None)


def _renew(ticket: Ticket, row: Row) -> None:
    """Another replica has carried it meanwhile, perhaps to its end, and it was replayed since.

    Under the transaction id of then nothing would be sent. Who waits with the ticket waits on: it is the same delivery.
    """
    if row.txn_id != ticket.row.txn_id:
        ticket.outcome, ticket.withdrawn = None, False
    ticket.row = row
    ticket.attempts, ticket.tried, ticket.history = row.attempts, row.attempts > 0, json.loads(row.history)
