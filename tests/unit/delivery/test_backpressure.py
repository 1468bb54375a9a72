"""flowbridge.delivery.backpressure: how much is queued, by whoever, and when nothing more is taken."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, update

from flowbridge.delivery.backpressure import Backpressure, Limits
from flowbridge.delivery.pending import Outcome, PendingDelivery
from flowbridge.models.timing import Timing
from flowbridge.store import StoreFull, holdings, outbox, tables
from flowbridge.store.clock import now_ms
from flowbridge.store.errors import RoomShareTaken, ShareTaken
from tests.patience import PATIENCE
from tests.rig import BOB, ROOM, Rig, Rooms, soon

OTHER = "!other:hs"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Its database is what is used here; nothing is offered to its worker."""
    async with Rig(f"sqlite:///{tmp_path}/flowbridge.db", Rooms()) as rig:
        yield rig


@pytest.fixture
def make(rig: Rig) -> Callable[..., Backpressure]:
    def make(
        queued: int = 100,
        per_lane: int = 100,
        database_bytes: int = 1 << 30,
        free_disk: int = 0,
        share: float = 1.0,
        **how: Any,
    ) -> Backpressure:
        return Backpressure(rig.database, Limits(queued, per_lane, database_bytes, free_disk, share), **how)

    return make


async def put(rig: Rig, number: int, room: str = ROOM, **values: Any) -> None:
    """Events that another process has accepted."""
    rows = [{**rig.pending("a", room).values(), **values} for _ in range(number)]
    await rig.database.run(lambda connection: connection.execute(insert(tables.outbox), rows))


async def test_what_is_added_and_removed_is_counted_at_once(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    deliveries = [rig.pending("a", room) for room in (ROOM, ROOM, OTHER)]
    for pending in deliveries:
        backpressure.add(pending)
    assert backpressure.queued == 3
    for pending in (deliveries[0], deliveries[0], rig.pending("never added")):
        backpressure.remove(pending)
    assert backpressure.queued == 2
    for pending in deliveries:
        backpressure.remove(pending)
    assert backpressure.queued == 0
    assert backpressure.queued_by_lane == {}


async def test_what_others_accepted_counts_from_the_next_refresh_on(
    rig: Rig, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(queued=3)
    await put(rig, 2)
    await put(rig, 1, OTHER, accepted_at=now_ms() - 60_000)
    await put(rig, 1, state="sent", settled_at=1)
    await put(rig, 2, state="dead", settled_at=1)
    assert backpressure.queued == 0
    await backpressure.refresh()
    assert (backpressure.queued, backpressure.dead) == (3, 2)
    assert backpressure.used_bytes > 0
    with pytest.raises(StoreFull, match="3 events are queued already"):
        backpressure.admit("!third:hs")
    await rig.database.run(lambda connection: connection.execute(update(tables.outbox).values(state="sent")))
    await backpressure.refresh()
    backpressure.admit("!third:hs")
    assert backpressure.oldest_at is None


async def test_age_of_the_oldest_is_that_of_the_first_in_any_lane(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    await put(rig, 1, OTHER, accepted_at=5_000)
    await put(rig, 3, accepted_at=6_000)
    await backpressure.refresh()
    assert backpressure.oldest_at == 5.0


async def test_one_room_cannot_take_all_the_room(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(per_lane=2)
    for _ in range(2):
        backpressure.add(rig.pending("a"))
    lane = rig.pending("a").row.lane
    with pytest.raises(StoreFull, match="2 events are queued for this room already") as caught:
        backpressure.admit(lane)
    assert caught.value.status == 503
    assert caught.value.headers() == {"Retry-After": "10"}
    backpressure.admit(rig.pending("a", OTHER).row.lane)
    backpressure.admit(rig.pending("a", caller=BOB).row.lane)


async def test_one_key_leaves_a_part_of_a_room_to_others(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=10_000, per_lane=48, share=0.5)
    lane = rig.pending("a").row.lane
    hog = take(backpressure, rig, 100, api_key="hog")
    assert len(hog) == 24
    with pytest.raises(RoomShareTaken, match="24 events of this API key are queued for this room already") as caught:
        backpressure.admit(lane, "hog")
    assert (caught.value.status, caught.value.errcode) == (503, "M_LIMIT_EXCEEDED")
    assert caught.value.headers() == {"Retry-After": "10"}
    assert not isinstance(caught.value, ShareTaken)  # for which it would be held back in other rooms, too
    backpressure.admit(rig.pending("a", OTHER).row.lane, "hog")
    assert len(take(backpressure, rig, 100, api_key="second")) == 8
    backpressure.admit(lane, "quiet")
    for pending in hog[:10]:
        backpressure.remove(pending)
    assert len(take(backpressure, rig, 100, api_key="second")) == 6
    assert len(take(backpressure, rig, 100, api_key="hog")) == 0
    assert backpressure.queued_in(lane) == 28


async def test_user_has_its_own_lane_to_itself(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=10_000, per_lane=48, share=0.5)
    assert len(take(backpressure, rig, 100)) == 48


async def test_share_of_a_room_counts_what_other_processes_accepted(
    rig: Rig, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(queued=10_000, per_lane=48, share=0.5, piece_rows=3)
    taken = take(backpressure, rig, 100, api_key="hog")
    await put(rig, 20, api_key="hog")
    await put(rig, 4, OTHER, api_key="hog")
    await put(rig, 20, api_key="second")
    for pending in taken:
        backpressure.remove(pending)
    await backpressure.refresh()
    counting = asyncio.ensure_future(backpressure.census())
    await asyncio.sleep(0)
    backpressure.add(rig.pending("meanwhile", api_key="third"))
    await soon(counting)
    held = {
        name: backpressure.rows_in_lanes.of(f"{name} {rig.pending('a').row.lane}")
        for name in ("hog", "second", "third")
    }
    assert held == {"hog": 20, "second": 20, "third": 1}
    for name in ("hog", "second"):
        with pytest.raises(RoomShareTaken):
            backpressure.admit(rig.pending("a").row.lane, name)
    backpressure.admit(rig.pending("a").row.lane, "quiet")
    await rig.database.run(lambda connection: connection.execute(update(tables.outbox).values(state="sent")))
    await soon(backpressure.refresh())
    await soon(backpressure.census())
    backpressure.admit(rig.pending("a").row.lane, "hog")


class Counting:
    """A count, and what happens meanwhile: before the moment that it sees of the store, and after."""

    def __init__(self, rig: Rig, backpressure: Backpressure, monkeypatch: pytest.MonkeyPatch) -> None:
        self._worker, self._backpressure = rig, backpressure
        self._steps: list[Callable[[], Awaitable[None]]] = []
        self._loop = asyncio.get_running_loop()
        look = outbox.queued

        def watched(connection: Connection) -> dict[str, tuple[int, int]]:
            before, after = self._steps
            self._do(before)
            try:
                return look(connection)
            finally:
                self._do(after)

        monkeypatch.setattr("flowbridge.store.outbox.queued", watched)

    def _do(self, step: Callable[[], Awaitable[None]]) -> None:
        """In the thread that reads."""
        asyncio.run_coroutine_threadsafe(self._run(step), self._loop).result(PATIENCE)

    async def _run(self, step: Callable[[], Awaitable[None]]) -> None:
        await step()

    async def refresh(self, before: Callable[[], Awaitable[None]], after: Callable[[], Awaitable[None]]) -> None:
        self._steps = [before, after]
        await self._backpressure.refresh()

    async def accept(self, pending: PendingDelivery) -> None:
        self._backpressure.add(pending)
        self._worker.write_queue.append(pending)
        await soon(pending.committed)

    async def settle(self, pending: PendingDelivery) -> None:
        pending.settle(Outcome("sent", "$1"), now_ms())
        self._backpressure.remove(pending)
        chosen = update(tables.outbox).where(tables.outbox.c.delivery == pending.row.delivery)
        await self._worker.database.run(lambda connection: connection.execute(chosen.values(state="sent")))


async def nothing() -> None:
    pass


@pytest.mark.parametrize("settled", ["not", "before", "after"])
@pytest.mark.parametrize("accepted", ["long ago", "before", "after"])
async def test_what_changes_while_it_is_counted_counts_once(
    accepted: str, settled: str, rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the moment that the count sees of the store."""
    if (accepted, settled) == ("after", "before"):
        return
    backpressure = make()
    counting = Counting(rig, backpressure, monkeypatch)
    other, pending = rig.pending("a", OTHER), rig.pending("b")
    await counting.accept(other)

    async def step(when: str) -> None:
        if accepted == when:
            await counting.accept(pending)
        if settled == when:
            await counting.settle(pending)

    await step("long ago")
    await counting.refresh(partial(step, "before"), partial(step, "after"))
    assert backpressure.queued_by_lane == {other.row.lane: 1} | ({pending.row.lane: 1} if settled == "not" else {})
    assert backpressure.queued == len(backpressure.queued_by_lane)
    await counting.refresh(nothing, nothing)
    assert backpressure.queued == len(backpressure.queued_by_lane) == (2 if settled == "not" else 1)


async def test_what_is_refused_or_withdrawn_while_it_is_counted_counts_no_more(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    backpressure = make()
    counting = Counting(rig, backpressure, monkeypatch)
    await put(rig, 2)
    never = rig.pending("never written")

    async def before() -> None:
        backpressure.add(never)

    async def after() -> None:
        backpressure.remove(never)

    await counting.refresh(before, after)
    assert backpressure.queued == 2


async def test_two_counts_at_once_do_not_disturb_each_other(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    backpressure = make()
    counting = Counting(rig, backpressure, monkeypatch)
    deliveries = [rig.pending("a"), rig.pending("b"), rig.pending("c", OTHER)]
    left = list(deliveries)

    async def one() -> None:
        if left:
            await counting.accept(left.pop())

    await soon(asyncio.gather(*(counting.refresh(one, one) for _ in range(3))))
    assert backpressure.queued == 3


async def test_worker_counts_an_event_before_the_store_has_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a count might see it as one of another process."""
    seen: list[int] = []
    append = rig.write_queue.append

    def watched(pending: PendingDelivery, **how: Any) -> None:
        seen.append(rig.backpressure.queued)
        if len(seen) > 1:
            raise StoreFull("too many callers wait for the store")
        append(pending, **how)

    monkeypatch.setattr(rig.write_queue, "append", watched)
    pending = rig.offer("a")
    with pytest.raises(StoreFull):
        rig.offer("b", OTHER)
    assert seen == [1, 2]
    await soon(pending.settled)
    assert rig.backpressure.queued == 0


async def test_counts_never_fall_below_nothing(rig: Rig, make: Callable[..., Backpressure]) -> None:
    """An outcome may be counted that a refresh has seen in the store already."""
    backpressure = make()
    pending = rig.pending("a")
    backpressure.add(pending)
    await backpressure.refresh()
    backpressure.remove(pending)
    assert backpressure.queued == 0
    backpressure.add(rig.pending("b"))
    assert backpressure.queued == 1


async def test_database_that_is_too_large_takes_nothing(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=1_000)
    backpressure.admit(ROOM)  # that is not known yet
    await backpressure.refresh()
    with pytest.raises(StoreFull, match=r"the database holds \d+ bytes, and 1000 are allowed"):
        backpressure.admit(ROOM)


async def test_space_that_deleted_events_left_is_free(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    await put(rig, 200, content='{"a": "' + "x" * 2_000 + '"}')
    await backpressure.refresh()
    full = backpressure.used_bytes
    await rig.database.run(lambda connection: connection.execute(tables.outbox.delete()))
    await backpressure.refresh()
    assert backpressure.used_bytes < full / 2


async def test_disk_that_is_nearly_full_takes_nothing_until_there_is_space(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(100, 100 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    backpressure = make(free_disk=11)
    await backpressure.refresh()
    with pytest.raises(StoreFull, match="10 bytes are free on the store's disk: flowbridge stops at 11"):
        backpressure.admit(ROOM)
    free = 11
    await backpressure.refresh()
    backpressure.admit(ROOM)
    assert asked == [Path(str(rig.database.url.database)).parent] * 2


async def test_refresh_that_fails_leaves_the_counts(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    for _ in range(3):
        backpressure.add(rig.pending("a"))
    await rig.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE outbox RENAME TO elsewhere"))
    with pytest.raises(Exception, match="no such table"):
        await backpressure.refresh()
    assert backpressure.queued == 3
    await rig.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO outbox"))


async def test_refresh_says_how_long_it_took(rig: Rig, make: Callable[..., Backpressure]) -> None:
    began = time.monotonic()
    seconds = await make().refresh()
    assert 0 < seconds <= time.monotonic() - began


# shares


def take(backpressure: Backpressure, rig: Rig, number: int, **how: Any) -> list[PendingDelivery]:
    """Accept so many events, one after the other, as far as they are admitted."""
    taken = []
    for _ in range(number):
        pending = rig.pending("a", **how)
        try:
            admit(backpressure, pending)
        except StoreFull:
            break
        backpressure.add(pending)
        taken.append(pending)
    return taken


def admit(backpressure: Backpressure, pending: PendingDelivery) -> None:
    backpressure.admit(pending.row.lane, pending.caller, pending.size)


async def test_user_and_keys_have_a_share_each(rig: Rig, make: Callable[..., Backpressure]) -> None:
    """Many keys share the bot's account: one of them must not take what the others need."""
    backpressure = make(queued=100, per_lane=1_000, share=0.5)
    assert len(take(backpressure, rig, 100, api_key="hog")) == 50
    with pytest.raises(ShareTaken, match=r"50 events \(\d+ bytes\) of this API key or account") as caught:
        admit(backpressure, rig.pending("a", api_key="hog"))
    assert (caught.value.status, caught.value.errcode) == (503, "M_LIMIT_EXCEEDED")
    assert caught.value.headers() == {"Retry-After": "10"}
    assert len(take(backpressure, rig, 100, api_key="quiet")) == 16
    assert len(take(backpressure, rig, 5)) == 5  # the account itself, with its token
    assert len(take(backpressure, rig, 5, caller=BOB)) == 5


async def test_bytes_are_shared_too_and_settled_events_give_theirs_back(
    rig: Rig, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    large = {"body": "x" * 60_000}
    taken = take(backpressure, rig, 100, content=large)
    assert len(taken) == 7  # of 900,000 bytes
    admit(backpressure, rig.pending("a", caller=BOB, content=large))
    taken[0].settle(Outcome("sent", "$1"), now_ms())
    backpressure.remove(taken[0])
    assert len(take(backpressure, rig, 100, content=large)) == 1


async def test_characters_of_four_bytes_count_as_four(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    text = "\U0001f600" * 15_000
    await put(rig, 3, content=f'{{"body":"{text}"}}')
    await backpressure.census()
    account = rig.pending("a").caller
    assert backpressure.bytes.of(account) > 3 * 60_000
    pending = PendingDelivery(rig.pending("a").row, request=text)
    assert pending.size > 60_000


async def test_census_adds_up_what_each_caller_holds_in_pieces(rig: Rig, make: Callable[..., Backpressure]) -> None:
    # So full that what was sent counts as well.
    backpressure = make(database_bytes=1, piece_rows=3, timing=Timing(piece_seconds=0.0))
    for room in (ROOM, OTHER):
        await put(rig, 5, room, api_key="one")
        await put(rig, 4, room)
    await put(rig, 7, state="dead", settled_at=1, api_key="one")
    await put(rig, 8, state="sent", settled_at=1, api_key="two")
    await backpressure.refresh()
    backpressure.add(rig.pending("a", api_key="one"))
    await backpressure.census()
    account = rig.pending("a").caller
    assert {caller: backpressure.rows.of(caller) for caller in backpressure.rows.callers()} == {"one": 10, account: 8}
    sizes = {tuple(share.callers()): share.total for share in (backpressure.dead_bytes, backpressure.sent_bytes)}
    assert list(sizes) == [("one",), ("two",)]
    assert all(size > 7 * 600 for size in sizes.values())
    assert backpressure.bytes.reserved == backpressure.dead_bytes.total


async def test_census_keeps_what_changes_meanwhile(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=20, share=0.5)
    await put(rig, 4, api_key="one")
    counting = asyncio.ensure_future(backpressure.census())
    await asyncio.sleep(0)
    take(backpressure, rig, 3, api_key="one")
    await soon(counting)
    assert backpressure.rows.of("one") == 7


async def test_what_is_written_with_the_last_that_a_census_sees_counts_once(
    rig: Rig, make: Callable[..., Backpressure]
) -> None:
    """A commit that waits for its turn takes along what was accepted after the census began."""
    backpressure = make(queued=20)
    one, two, three = (rig.pending(name, api_key="one") for name in "abc")
    await rig.database.flush()  # whose account it is has been written
    with rig.busy_writer():
        for pending in (one, two):
            backpressure.add(pending)
            rig.write_queue.append(pending)
            if pending is one:
                counting = asyncio.ensure_future(backpressure.census())
                await asyncio.sleep(0)
    await soon(two.committed)
    backpressure.add(three)
    rig.write_queue.append(three)
    await soon(counting)
    assert backpressure.rows.of("one") == 3
    assert backpressure.bytes.of("one") - len("[][]") == sum(pending.size for pending in (one, two, three))
    await soon(three.committed)
    await soon(backpressure.census())
    assert backpressure.rows.of("one") == 3


async def test_letter_that_dies_while_others_are_added_up_counts_once(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and many that die at once would crowd out older ones."""
    backpressure = make(queued=20)
    pending = rig.pending("a", api_key="one")
    backpressure.add(pending)
    rig.write_queue.append(pending)
    await soon(pending.committed)
    loop, add_up = asyncio.get_running_loop(), holdings.queued

    async def die() -> None:
        pending.settle(Outcome("dead", error={"status": 400}), now_ms())
        backpressure.remove(pending)
        chosen = update(tables.outbox).where(tables.outbox.c.delivery == pending.row.delivery)
        await rig.database.run(lambda connection: connection.execute(chosen.values(state="dead")))

    def watched(*parts: Any, **how: Any) -> holdings.Piece:
        if pending.outcome is None:
            asyncio.run_coroutine_threadsafe(die(), loop).result(PATIENCE)
        return add_up(*parts, **how)

    monkeypatch.setattr("flowbridge.store.holdings.queued", watched)
    await soon(backpressure.census())
    assert backpressure.dead_bytes.of("one") == pending.size + len("[]")  # its history


async def test_share_is_one_of_what_the_disk_really_has(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of a gigabyte on a disk of a megabyte: half of the gigabyte would fill the disk for everybody."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1_500_000))
    backpressure = make(free_disk=500_000, share=0.5)
    await backpressure.refresh()
    taken = take(backpressure, rig, 100, content={"body": "x" * 60_000})
    assert 5 < len(taken) < 15
    admit(backpressure, rig.pending("a", caller=BOB))


async def test_dead_letters_leave_less_for_all_but_refuse_no_caller(
    rig: Rig, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    for pending in take(backpressure, rig, 7, content={"body": "x" * 60_000}):
        pending.settle(Outcome("dead", error={}), now_ms())
        backpressure.remove(pending)
    assert backpressure.bytes.reserved > 420_000
    assert len(take(backpressure, rig, 100, content={"body": "x" * 60_000})) == 2
    admit(backpressure, rig.pending("a", caller=BOB))


async def test_what_is_accepted_between_two_looks_counts_at_once(rig: Rig, make: Callable[..., Backpressure]) -> None:
    """Ten seconds of 60 kB events are enough to fill what is free."""
    backpressure = make(database_bytes=1_000_000)
    await backpressure.refresh()
    assert not backpressure.pressed.is_set()
    for _ in range(100):
        pending = rig.pending("a", content={"body": "x" * 60_000})
        try:
            admit(backpressure, pending)
        except StoreFull:
            break
        backpressure.add(pending)
        pending.settle(Outcome("sent", "$1"), now_ms())
        backpressure.remove(pending)  # and it stays in the store for a day
    else:
        pytest.fail("it takes more than it may hold")
    assert backpressure.pressed.is_set()
    await backpressure.refresh()
    assert not backpressure.pressed.is_set()


async def test_last_bytes_are_for_those_who_have_little(rig: Rig, make: Callable[..., Backpressure]) -> None:
    """Until settled events are gone: a caller who settles 60 kB events quickly would fill the store for everybody."""
    backpressure = make(database_bytes=1_000_000)
    for _ in range(14):
        pending = rig.pending("a", content={"body": "x" * 61_000})
        admit(backpressure, pending)
        backpressure.add(pending)
        pending.settle(Outcome("dead", error={}), now_ms())
        backpressure.remove(pending)
    backpressure.pressed.clear()
    with pytest.raises(ShareTaken, match="while space is short") as caught:
        admit(backpressure, rig.pending("small"))
    assert caught.value.headers() == {"Retry-After": "1"}
    assert backpressure.pressed.is_set()
    admit(backpressure, rig.pending("a", caller=BOB))


async def test_settled_events_of_the_largest_go_first(rig: Rig, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=400_000, share=0.5)
    small, large = '{"body":"x"}', f'{{"body":"{"x" * 20_000}"}}'
    await put(rig, 3, state="sent", settled_at=1, api_key="quiet", content=small)
    await put(rig, 4, state="sent", settled_at=2, api_key="busy", content=large)
    await put(rig, 2, state="dead", settled_at=1, api_key="quiet", content=small)
    await put(rig, 12, state="dead", settled_at=3, api_key="hog", content=large)
    await backpressure.refresh()
    await backpressure.census()

    def left() -> dict[tuple[str, str], int]:
        rows = [tuple(row) for row in rig.rows("api_key", "state")]
        return {row: rows.count(row) for row in sorted(set(rows))}

    steps = [left()]
    while await backpressure.drop_some():
        steps.append(left())
    kept = {("hog", "dead"): 8, ("quiet", "dead"): 2}
    assert steps[0] == {("busy", "sent"): 4, **kept, ("hog", "dead"): 12, ("quiet", "sent"): 3}
    # dead letters beyond a share come before what others have sent
    assert {("busy", "sent"): 4, **kept, ("quiet", "sent"): 3} in steps
    assert {**kept, ("quiet", "sent"): 3} in steps
    assert steps[-1] == kept


async def test_dead_letters_beyond_a_share_go_the_oldest_first_and_no_more_than_need_be(
    rig: Rig, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowbridge.store.holdings.DROP_ROWS", 2)
    backpressure = make(database_bytes=400_000, share=0.5)
    large = f'{{"body":"{"x" * 20_000}"}}'
    for number in range(12):
        await put(rig, 1, state="dead", settled_at=1, delivery=f"dead-{number}", api_key="hog", content=large)
    await backpressure.census()
    while await backpressure.drop_some():
        pass
    assert rig.rows("delivery") == [f"dead-{number}" for number in range(4, 12)]
