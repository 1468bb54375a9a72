"""flowbridge.delivery.watching: a caller hears of an outcome, or that its time is over."""

import asyncio

from flowbridge.delivery.pending import Outcome, PendingDeliveries, PendingDelivery
from flowbridge.delivery.watching import MAX_KINDS, Watchers
from flowbridge.limits.shares import Share
from flowbridge.store import Row

SENT = Outcome("sent", "$1")


def waited_for(deliveries: PendingDeliveries) -> PendingDelivery:
    row = Row("d", "a|!r", "a", "!r", "m.room.message", None, b"{}", "d", 0)
    pending = deliveries.add(PendingDelivery(row))
    pending.add_waiter()
    return pending


async def heard(event: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        await event.wait()


async def test_watch_hears_of_the_outcome_and_then_holds_nothing() -> None:
    deliveries, share, event = PendingDeliveries(), Share(10, 1.0), asyncio.Event()
    watchers, pending = Watchers(deliveries, share), waited_for(deliveries)
    watch = watchers.watch(pending, 60.0, lambda _: event.set())
    assert (share.total, pending.waiters) == (1, 1)
    pending.answer(SENT)
    await heard(event)
    watch.end()
    assert (share.total, pending.waiters, len(deliveries)) == (0, 0, 0)


async def test_watch_hears_that_its_time_is_over() -> None:
    deliveries, share, event = PendingDeliveries(), Share(10, 1.0), asyncio.Event()
    watchers, pending = Watchers(deliveries, share), waited_for(deliveries)
    watch = watchers.watch(pending, 0.01, lambda _: event.set())
    await heard(event)
    assert not pending.settled.done()
    watch.end()
    assert share.total == 0


async def test_watch_that_has_ended_hears_nothing() -> None:
    deliveries, share, event = PendingDeliveries(), Share(10, 1.0), asyncio.Event()
    watchers, pending = Watchers(deliveries, share), waited_for(deliveries)
    pending.add_waiter()  # else it would be forgotten
    watchers.watch(pending, 0.01, lambda _: event.set()).end()
    pending.answer(SENT)
    await asyncio.sleep(0.05)
    assert not event.is_set()


async def test_many_different_times_are_not_kept() -> None:
    deliveries, share = PendingDeliveries(), Share(10_000, 1.0)
    watchers, pending = Watchers(deliveries, share), waited_for(deliveries)
    kept = watchers.watch(pending, 60.0, lambda _: None)
    for number in range(3 * MAX_KINDS):
        pending.add_waiter()
        watchers.watch(pending, 100.0 + number, lambda _: None).end()
    assert len(watchers._deadlines) <= MAX_KINDS + 1
    assert 60.0 in watchers._deadlines
    kept.end()
