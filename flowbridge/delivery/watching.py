"""Who waits for the outcome of a delivery, and until when."""

from collections.abc import Callable

from flowbridge.delivery.pending import PendingDeliveries, PendingDelivery
from flowbridge.limits.deadlines import Deadlines
from flowbridge.limits.shares import Share

MAX_KINDS = 400  # different times to wait: `Prefer: wait=N` takes whole seconds up to 300


class Watchers:
    """`waiters`: how many callers wait, and each one's share of them. For one event loop."""

    def __init__(self, deliveries: PendingDeliveries, waiters: Share) -> None:
        self._deliveries = deliveries
        self._waiters = waiters
        self._deadlines: dict[float, Deadlines[Watch]] = {}

    def watch(self, pending: PendingDelivery, seconds: float, hear: Callable[[object], None]) -> "Watch":
        """Call `hear`, with anything, when the delivery has ended and after so many seconds: perhaps twice.

        To be ended, and to be called once for each waiter.
        """
        deadlines = self._deadlines.get(seconds)
        if deadlines is None:
            if len(self._deadlines) >= MAX_KINDS:
                self._deadlines = {kind: kept for kind, kept in self._deadlines.items() if len(kept)}
            deadlines = self._deadlines[seconds] = Deadlines(seconds, Watch.ring)
        self._waiters.add(pending.caller)
        return Watch(self, pending, deadlines, hear)

    def end(self, pending: PendingDelivery) -> None:
        self._waiters.remove(pending.caller)
        self.leave(pending)

    def leave(self, pending: PendingDelivery) -> None:
        """One waiter less."""
        pending.remove_waiter()
        self._deliveries.leave(pending)


class Watch:
    """A caller that waits."""

    __slots__ = ("_deadlines", "_hear", "_pending", "_watchers")

    def __init__(
        self,
        watchers: Watchers,
        pending: PendingDelivery,
        deadlines: "Deadlines[Watch]",
        hear: Callable[[object], None],
    ) -> None:
        self._watchers = watchers
        self._pending = pending
        self._deadlines = deadlines
        self._hear = hear
        deadlines.set(self)
        pending.settled.add_done_callback(hear)

    def ring(self) -> None:
        """Its time is over."""
        self._hear(None)

    def end(self) -> None:
        """It waits no longer."""
        self._deadlines.drop(self)
        self._pending.settled.remove_done_callback(self._hear)
        self._watchers.end(self._pending)
