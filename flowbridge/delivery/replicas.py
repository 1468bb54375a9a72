"""What replicas tell each other: that a lane has new events, and how those ended that a caller waits for elsewhere.

By PostgreSQL's notifications, within the transaction that they tell of. Where none arrive, behind a pooler, the same is
found by looking into the store twice a second.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.store import Database, notifications
from flowbridge.store.json_columns import from_json
from flowbridge.store.leases import Mark

MAX_AWAITED = 10_000  # deliveries that callers of other replicas wait for


class Replicas:
    """`owner`: under which name this one holds lanes. `new`: a lane has events; `ended`: so a delivery has ended."""

    def __init__(self, owner: str, *, new: Callable[[str], None], ended: Callable[[str, Outcome], None]) -> None:
        self.owner = owner
        self._new = new
        self._ended = ended
        self._awaited: dict[str, str] = {}  # delivery → the owner that is to hear of it

    async def listen(self, database: Database, ready: Callable[[], None], retry: float) -> None:
        """Hear what the others tell, for ever."""
        await notifications.listen(database.engine, _channel(self.owner), self._hear, ready, retry)

    def _hear(self, message: str) -> None:
        told = json.loads(message)
        for lane, deliveries in told.get("new", ()):
            for delivery in deliveries:
                self._await(delivery, told["from"])
            self._new(lane)
        for delivery, state, event_id, error in told.get("ended", ()):
            self._ended(delivery, Outcome(state, event_id, from_json(error) if error else None))

    def _await(self, delivery: str, owner: str) -> None:
        if len(self._awaited) >= MAX_AWAITED:
            del self._awaited[next(iter(self._awaited))]
        self._awaited[delivery] = owner

    def is_awaited(self, delivery: str) -> bool:
        """Whether a caller of another replica waits for it."""
        return delivery in self._awaited

    def forget(self, outcomes: Iterable[Mapping[str, Any]]) -> None:
        """These are told, once and for all."""
        if self._awaited:
            for outcome in outcomes:
                self._awaited.pop(outcome["b_delivery"], None)

    # on the writer's thread

    def tell_new(self, connection: Connection, marks: Mapping[str, Mark], new: Sequence[PendingDelivery]) -> None:
        """Tell the owners of these lanes, and for which events callers wait here."""
        found: dict[str, dict[str, list[str]]] = {}
        for pending in new:
            lane = pending.row.lane
            owner = marks[lane].owner if lane in marks else None
            if owner is not None and owner != self.owner and pending.existing is None:
                deliveries = found.setdefault(owner, {}).setdefault(lane, [])
                if pending.waiters:
                    deliveries.append(pending.row.delivery)
        for owner, lanes in found.items():
            self._tell(connection, owner, "new", lanes.items())

    def tell_ended(self, connection: Connection, settled: Iterable[str], outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Tell those who asked how these ended, of which only some are `settled` by it."""
        if not self._awaited:
            return
        settled, found = set(settled), dict[str, list[Sequence[Any]]]()
        for outcome in outcomes:
            owner = self._awaited.get(outcome["b_delivery"])
            if owner is not None and outcome["b_delivery"] in settled:
                words = [outcome[f"b_{name}"] for name in ("delivery", "state", "event_id", "error")]
                found.setdefault(owner, []).append(words)
        for owner, ended in found.items():
            self._tell(connection, owner, "ended", ended)

    def _tell(self, connection: Connection, owner: str, what: str, entries: Iterable[Sequence[Any]]) -> None:
        for part in _parts(entries):
            message = f'{{"from": "{self.owner}", "{what}": [{", ".join(part)}]}}'
            notifications.notify(connection, _channel(owner), message)


def _channel(owner: str) -> str:
    return f"flowbridge_{owner}"


def _parts(entries: Iterable[Sequence[Any]]) -> Iterator[list[str]]:
    """As many entries as one message holds. One that is too long for any is left to be looked for."""
    part: list[str] = []
    left = most = notifications.MAX_BYTES - 100
    for entry in entries:
        text = json.dumps(entry)
        if len(text) + 2 > most:
            continue
        if len(text) + 2 > left:
            yield part
            part, left = [], most
        part.append(text)
        left -= len(text) + 2
    if part:
        yield part
