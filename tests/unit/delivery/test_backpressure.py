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
from flowbridge.delivery.write_queue import Outcome, Ticket
from flowbridge.store import StoreFull, holdings, outbox, tables
from flowbridge.store.clock import now_ms
from flowbridge.store.errors import RoomShareTaken, ShareTaken
from tests.patience import PATIENCE
from tests.worker import BOB, ROOM, Rooms, Worker, soon

OTHER = "!other:hs"


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    """Its database is what is used here; nothing is offered to its courier."""
    async with Worker(f"sqlite:///{tmp_path}/flowbridge.db", Rooms()) as worker:
        yield worker


@pytest.fixture
def make(worker: Worker) -> Callable[..., Backpressure]:
    def make(
        queued: int = 100,
        per_lane: int = 100,
        database_bytes: int = 1 << 30,
        free_disk: int = 0,
        share: float = 1.0,
    ) -> Backpressure:
        return Backpressure(worker.database, Limits(queued, per_lane, database_bytes, free_disk, share))

    return make


async def put(worker: Worker, number: int, room: str = ROOM, **values: Any) -> None:
    """Events that another process has accepted."""
    rows = [{**worker.ticket("a", room).values(), **values} for _ in range(number)]
    await worker.database.run(lambda connection: connection.execute(insert(tables.outbox), rows))


async def test_what_is_added_and_removed_is_counted_at_once(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    tickets = [worker.ticket("a", room) for room in (ROOM, ROOM, OTHER)]
    for ticket in tickets:
        backpressure.add(ticket)
    assert backpressure.queued == 3
    for ticket in (tickets[0], tickets[0], worker.ticket("never added")):
        backpressure.remove(ticket)
    assert backpressure.queued == 2
    for ticket in tickets:
        backpressure.remove(ticket)
    assert backpressure.queued == 0
    assert backpressure._lanes == {}


async def test_what_others_accepted_counts_from_the_next_refresh_on(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(queued=3)
    await put(worker, 2)
    await put(worker, 1, OTHER, accepted_at=now_ms() - 60_000)
    await put(worker, 1, state="sent", settled_at=1)
    await put(worker, 2, state="dead", settled_at=1)
    assert backpressure.queued == 0
    await backpressure.refresh()
    assert (backpressure.queued, backpressure.dead) == (3, 2)
    assert backpressure.used_bytes > 0
    with pytest.raises(StoreFull, match="3 events are queued already"):
        backpressure.admit("!third:hs")
    await worker.database.run(lambda connection: connection.execute(update(tables.outbox).values(state="sent")))
    await backpressure.refresh()
    backpressure.admit("!third:hs")
    assert backpressure.oldest_at is None


async def test_age_of_the_oldest_is_that_of_the_first_in_any_lane(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    backpressure = make()
    await put(worker, 1, OTHER, accepted_at=5_000)
    await put(worker, 3, accepted_at=6_000)
    await backpressure.refresh()
    assert backpressure.oldest_at == 5.0


async def test_one_room_cannot_take_all_the_room(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(per_lane=2)
    for _ in range(2):
        backpressure.add(worker.ticket("a"))
    lane = worker.ticket("a").row.lane
    with pytest.raises(StoreFull, match="2 events are queued for this room already") as caught:
        backpressure.admit(lane)
    assert caught.value.status == 503
    assert caught.value.headers() == {"Retry-After": "10"}
    backpressure.admit(worker.ticket("a", OTHER).row.lane)
    backpressure.admit(worker.ticket("a", caller=BOB).row.lane)


async def test_one_key_leaves_a_part_of_a_room_to_others(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=10_000, per_lane=48, share=0.5)
    lane = worker.ticket("a").row.lane
    hog = take(backpressure, worker, 100, api_key="hog")
    assert len(hog) == 24
    with pytest.raises(RoomShareTaken, match="24 events of this API key are queued for this room already") as caught:
        backpressure.admit(lane, "hog")
    assert (caught.value.status, caught.value.errcode) == (503, "M_LIMIT_EXCEEDED")
    assert caught.value.headers() == {"Retry-After": "10"}
    assert not isinstance(caught.value, ShareTaken)  # for which it would be held back in other rooms, too
    backpressure.admit(worker.ticket("a", OTHER).row.lane, "hog")
    assert len(take(backpressure, worker, 100, api_key="second")) == 8
    backpressure.admit(lane, "quiet")
    for ticket in hog[:10]:
        backpressure.remove(ticket)
    assert len(take(backpressure, worker, 100, api_key="second")) == 6
    assert len(take(backpressure, worker, 100, api_key="hog")) == 0
    assert backpressure.queued_in(lane) == 28


async def test_user_has_its_own_lane_to_itself(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=10_000, per_lane=48, share=0.5)
    assert len(take(backpressure, worker, 100)) == 48


async def test_share_of_a_room_counts_what_other_processes_accepted(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowbridge.delivery.backpressure.PIECE_ROWS", 3)
    backpressure = make(queued=10_000, per_lane=48, share=0.5)
    taken = take(backpressure, worker, 100, api_key="hog")
    await put(worker, 20, api_key="hog")
    await put(worker, 4, OTHER, api_key="hog")
    await put(worker, 20, api_key="second")
    for ticket in taken:
        backpressure.remove(ticket)
    await backpressure.refresh()
    counting = asyncio.ensure_future(backpressure.census())
    await asyncio.sleep(0)
    backpressure.add(worker.ticket("meanwhile", api_key="third"))
    await soon(counting)
    held = {
        name: backpressure._in_lanes.of(f"{name} {worker.ticket('a').row.lane}") for name in ("hog", "second", "third")
    }
    assert held == {"hog": 20, "second": 20, "third": 1}
    for name in ("hog", "second"):
        with pytest.raises(RoomShareTaken):
            backpressure.admit(worker.ticket("a").row.lane, name)
    backpressure.admit(worker.ticket("a").row.lane, "quiet")
    await worker.database.run(lambda connection: connection.execute(update(tables.outbox).values(state="sent")))
    await soon(backpressure.refresh())
    await soon(backpressure.census())
    backpressure.admit(worker.ticket("a").row.lane, "hog")


class Counting:
    """A count, and what happens meanwhile: before the moment that it sees of the store, and after."""

    def __init__(self, worker: Worker, backpressure: Backpressure, monkeypatch: pytest.MonkeyPatch) -> None:
        self._worker, self._backpressure = worker, backpressure
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

    async def accept(self, ticket: Ticket) -> None:
        self._backpressure.add(ticket)
        self._worker.write_queue.append(ticket)
        await soon(ticket.committed)

    async def settle(self, ticket: Ticket) -> None:
        ticket.outcome, ticket.settled_at = Outcome("sent", "$1"), now_ms()
        self._backpressure.remove(ticket)
        chosen = update(tables.outbox).where(tables.outbox.c.delivery == ticket.row.delivery)
        await self._worker.database.run(lambda connection: connection.execute(chosen.values(state="sent")))


async def nothing() -> None:
    pass


@pytest.mark.parametrize("settled", ["not", "before", "after"])
@pytest.mark.parametrize("accepted", ["long ago", "before", "after"])
async def test_what_changes_while_it_is_counted_counts_once(
    accepted: str, settled: str, worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the moment that the count sees of the store."""
    if (accepted, settled) == ("after", "before"):
        return
    backpressure = make()
    counting = Counting(worker, backpressure, monkeypatch)
    other, ticket = worker.ticket("a", OTHER), worker.ticket("b")
    await counting.accept(other)

    async def step(when: str) -> None:
        if accepted == when:
            await counting.accept(ticket)
        if settled == when:
            await counting.settle(ticket)

    await step("long ago")
    await counting.refresh(partial(step, "before"), partial(step, "after"))
    assert backpressure._lanes == {other.row.lane: 1} | ({ticket.row.lane: 1} if settled == "not" else {})
    assert backpressure.queued == len(backpressure._lanes)
    await counting.refresh(nothing, nothing)
    assert backpressure.queued == len(backpressure._lanes) == (2 if settled == "not" else 1)


async def test_what_is_refused_or_withdrawn_while_it_is_counted_counts_no_more(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    backpressure = make()
    counting = Counting(worker, backpressure, monkeypatch)
    await put(worker, 2)
    never = worker.ticket("never written")

    async def before() -> None:
        backpressure.add(never)

    async def after() -> None:
        backpressure.remove(never)

    await counting.refresh(before, after)
    assert backpressure.queued == 2


async def test_two_counts_at_once_do_not_disturb_each_other(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    backpressure = make()
    counting = Counting(worker, backpressure, monkeypatch)
    tickets = [worker.ticket("a"), worker.ticket("b"), worker.ticket("c", OTHER)]
    left = list(tickets)

    async def one() -> None:
        if left:
            await counting.accept(left.pop())

    await soon(asyncio.gather(*(counting.refresh(one, one) for _ in range(3))))
    assert backpressure.queued == 3


async def test_courier_counts_an_event_before_the_store_has_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a count might see it as one of another process."""
    seen: list[int] = []
    append = worker.write_queue.append

    def watched(ticket: Ticket) -> None:
        seen.append(worker.backpressure.queued)
        if len(seen) > 1:
            raise StoreFull("too many callers wait for the store")
        append(ticket)

    monkeypatch.setattr(worker.write_queue, "append", watched)
    ticket = worker.offer("a")
    with pytest.raises(StoreFull):
        worker.offer("b", OTHER)
    assert seen == [1, 2]
    await soon(ticket.settled)
    assert worker.backpressure.queued == 0


async def test_counts_never_fall_below_nothing(worker: Worker, make: Callable[..., Backpressure]) -> None:
    """An outcome may be counted that a refresh has seen in the store already."""
    backpressure = make()
    ticket = worker.ticket("a")
    backpressure.add(ticket)
    await backpressure.refresh()
    backpressure.remove(ticket)
    assert backpressure.queued == 0
    backpressure.add(worker.ticket("b"))
    assert backpressure.queued == 1


async def test_database_that_is_too_large_takes_nothing(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=1_000)
    backpressure.admit(ROOM)  # that is not known yet
    await backpressure.refresh()
    with pytest.raises(StoreFull, match=r"the database holds \d+ bytes, and 1000 are allowed"):
        backpressure.admit(ROOM)


async def test_space_that_deleted_events_left_is_free(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    await put(worker, 200, content='{"a": "' + "x" * 2_000 + '"}')
    await backpressure.refresh()
    full = backpressure.used_bytes
    await worker.database.run(lambda connection: connection.execute(tables.outbox.delete()))
    await backpressure.refresh()
    assert backpressure.used_bytes < full / 2


async def test_disk_that_is_nearly_full_takes_nothing_until_there_is_space(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
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
    assert asked == [Path(str(worker.database.url.database)).parent] * 2


async def test_refresh_that_fails_leaves_the_counts(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make()
    for _ in range(3):
        backpressure.add(worker.ticket("a"))
    await worker.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE outbox RENAME TO elsewhere"))
    with pytest.raises(Exception, match="no such table"):
        await backpressure.refresh()
    assert backpressure.queued == 3
    await worker.database.run(lambda connection: connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO outbox"))


async def test_refresh_says_how_long_it_took(worker: Worker, make: Callable[..., Backpressure]) -> None:
    began = time.monotonic()
    seconds = await make().refresh()
    assert 0 < seconds <= time.monotonic() - began


# shares


def take(backpressure: Backpressure, worker: Worker, number: int, **how: Any) -> list[Ticket]:
    """Accept so many events, one after the other, as far as they are admitted."""
    taken = []
    for _ in range(number):
        ticket = worker.ticket("a", **how)
        try:
            admit(backpressure, ticket)
        except StoreFull:
            break
        backpressure.add(ticket)
        taken.append(ticket)
    return taken


def admit(backpressure: Backpressure, ticket: Ticket) -> None:
    backpressure.admit(ticket.row.lane, ticket.caller, ticket.measure())


async def test_user_and_keys_have_a_share_each(worker: Worker, make: Callable[..., Backpressure]) -> None:
    """Many keys share the bot's account: one of them must not take what the others need."""
    backpressure = make(queued=100, per_lane=1_000, share=0.5)
    assert len(take(backpressure, worker, 100, api_key="hog")) == 50
    with pytest.raises(ShareTaken, match=r"50 events \(\d+ bytes\) of this API key or account") as caught:
        admit(backpressure, worker.ticket("a", api_key="hog"))
    assert (caught.value.status, caught.value.errcode) == (503, "M_LIMIT_EXCEEDED")
    assert caught.value.headers() == {"Retry-After": "10"}
    assert len(take(backpressure, worker, 100, api_key="quiet")) == 16
    assert len(take(backpressure, worker, 5)) == 5  # the account itself, with its token
    assert len(take(backpressure, worker, 5, caller=BOB)) == 5


async def test_bytes_are_shared_too_and_settled_events_give_theirs_back(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    large = {"body": "x" * 60_000}
    taken = take(backpressure, worker, 100, content=large)
    assert len(taken) == 7  # of 900,000 bytes
    admit(backpressure, worker.ticket("a", caller=BOB, content=large))
    taken[0].outcome = Outcome("sent", "$1")
    backpressure.remove(taken[0])
    assert len(take(backpressure, worker, 100, content=large)) == 1


async def test_characters_of_four_bytes_count_as_four(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    text = "\U0001f600" * 15_000
    await put(worker, 3, content=f'{{"body":"{text}"}}')
    await backpressure.census()
    account = worker.ticket("a").caller
    assert backpressure._bytes.of(account) > 3 * 60_000
    ticket = worker.ticket("a")
    ticket.request = text
    assert ticket.measure() > 60_000


async def test_census_adds_up_what_each_caller_holds_in_pieces(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowbridge.delivery.backpressure.PIECE_ROWS", 3)
    monkeypatch.setattr("flowbridge.delivery.backpressure.PIECE_SECONDS", 0.0)
    backpressure = make(database_bytes=1)  # so full that what was sent counts as well
    for room in (ROOM, OTHER):
        await put(worker, 5, room, api_key="one")
        await put(worker, 4, room)
    await put(worker, 7, state="dead", settled_at=1, api_key="one")
    await put(worker, 8, state="sent", settled_at=1, api_key="two")
    await backpressure.refresh()
    backpressure.add(worker.ticket("a", api_key="one"))
    await backpressure.census()
    account = worker.ticket("a").caller
    assert {caller: backpressure._rows.of(caller) for caller in backpressure._rows.callers()} == {"one": 10, account: 8}
    sizes = {tuple(share.callers()): share.total for share in (backpressure._dead, backpressure._sent)}
    assert list(sizes) == [("one",), ("two",)]
    assert all(size > 7 * 600 for size in sizes.values())
    assert backpressure._bytes.reserved == backpressure._dead.total


async def test_census_keeps_what_changes_meanwhile(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(queued=20, share=0.5)
    await put(worker, 4, api_key="one")
    counting = asyncio.ensure_future(backpressure.census())
    await asyncio.sleep(0)
    take(backpressure, worker, 3, api_key="one")
    await soon(counting)
    assert backpressure._rows.of("one") == 7


async def test_what_is_written_with_the_last_that_a_census_sees_counts_once(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    """A commit that waits for its turn takes along what was accepted after the census began."""
    backpressure = make(queued=20)
    one, two, three = (worker.ticket(name, api_key="one") for name in "abc")
    await worker.database.flush()  # whose account it is has been written
    with worker.busy_writer():
        for ticket in (one, two):
            backpressure.add(ticket)
            worker.write_queue.append(ticket)
            if ticket is one:
                counting = asyncio.ensure_future(backpressure.census())
                await asyncio.sleep(0)
    await soon(two.committed)
    backpressure.add(three)
    worker.write_queue.append(three)
    await soon(counting)
    assert backpressure._rows.of("one") == 3
    assert backpressure._bytes.of("one") - len("[][]") == sum(ticket.measure() for ticket in (one, two, three))
    await soon(three.committed)
    await soon(backpressure.census())
    assert backpressure._rows.of("one") == 3


async def test_letter_that_dies_while_others_are_added_up_counts_once(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and many that die at once would crowd out older ones."""
    backpressure = make(queued=20)
    ticket = worker.ticket("a", api_key="one")
    backpressure.add(ticket)
    worker.write_queue.append(ticket)
    await soon(ticket.committed)
    loop, add_up = asyncio.get_running_loop(), holdings.queued

    async def die() -> None:
        ticket.outcome, ticket.settled_at = Outcome("dead", error={"status": 400}), now_ms()
        backpressure.remove(ticket)
        chosen = update(tables.outbox).where(tables.outbox.c.delivery == ticket.row.delivery)
        await worker.database.run(lambda connection: connection.execute(chosen.values(state="dead")))

    def watched(*parts: Any, **how: Any) -> holdings.Piece:
        if ticket.counted:
            asyncio.run_coroutine_threadsafe(die(), loop).result(PATIENCE)
        return add_up(*parts, **how)

    monkeypatch.setattr("flowbridge.store.holdings.queued", watched)
    await soon(backpressure.census())
    assert backpressure._dead.of("one") == ticket.measure() + len("[]")  # its history


async def test_share_is_one_of_what_the_disk_really_has(
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of a gigabyte on a disk of a megabyte: half of the gigabyte would fill the disk for everybody."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1_500_000))
    backpressure = make(free_disk=500_000, share=0.5)
    await backpressure.refresh()
    taken = take(backpressure, worker, 100, content={"body": "x" * 60_000})
    assert 5 < len(taken) < 15
    admit(backpressure, worker.ticket("a", caller=BOB))


async def test_dead_letters_leave_less_for_all_but_refuse_no_caller(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    backpressure = make(database_bytes=1_000_000, share=0.5)
    for ticket in take(backpressure, worker, 7, content={"body": "x" * 60_000}):
        ticket.outcome = Outcome("dead", error={})
        backpressure.remove(ticket)
    assert backpressure._bytes.reserved > 420_000
    assert len(take(backpressure, worker, 100, content={"body": "x" * 60_000})) == 2
    admit(backpressure, worker.ticket("a", caller=BOB))


async def test_what_is_accepted_between_two_looks_counts_at_once(
    worker: Worker, make: Callable[..., Backpressure]
) -> None:
    """Ten seconds of 60 kB events are enough to fill what is free."""
    backpressure = make(database_bytes=1_000_000)
    await backpressure.refresh()
    assert not backpressure.pressed.is_set()
    for _ in range(100):
        ticket = worker.ticket("a", content={"body": "x" * 60_000})
        try:
            admit(backpressure, ticket)
        except StoreFull:
            break
        backpressure.add(ticket)
        ticket.outcome = Outcome("sent", "$1")
        backpressure.remove(ticket)  # and it stays in the store for a day
    else:
        pytest.fail("it takes more than it may hold")
    assert backpressure.pressed.is_set()
    await backpressure.refresh()
    assert not backpressure.pressed.is_set()


async def test_last_bytes_are_for_those_who_have_little(worker: Worker, make: Callable[..., Backpressure]) -> None:
    """Until settled events are gone: a caller who settles 60 kB events quickly would fill the store for everybody."""
    backpressure = make(database_bytes=1_000_000)
    for _ in range(14):
        ticket = worker.ticket("a", content={"body": "x" * 61_000})
        admit(backpressure, ticket)
        backpressure.add(ticket)
        ticket.outcome = Outcome("dead", error={})
        backpressure.remove(ticket)
    backpressure.pressed.clear()
    with pytest.raises(ShareTaken, match="while space is short") as caught:
        admit(backpressure, worker.ticket("small"))
    assert caught.value.headers() == {"Retry-After": "1"}
    assert backpressure.pressed.is_set()
    admit(backpressure, worker.ticket("a", caller=BOB))


async def test_settled_events_of_the_largest_go_first(worker: Worker, make: Callable[..., Backpressure]) -> None:
    backpressure = make(database_bytes=400_000, share=0.5)
    small, large = '{"body":"x"}', f'{{"body":"{"x" * 20_000}"}}'
    await put(worker, 3, state="sent", settled_at=1, api_key="quiet", content=small)
    await put(worker, 4, state="sent", settled_at=2, api_key="busy", content=large)
    await put(worker, 2, state="dead", settled_at=1, api_key="quiet", content=small)
    await put(worker, 12, state="dead", settled_at=3, api_key="hog", content=large)
    await backpressure.refresh()
    await backpressure.census()

    def left() -> dict[tuple[str, str], int]:
        rows = [tuple(row) for row in worker.rows("api_key", "state")]
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
    worker: Worker, make: Callable[..., Backpressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowbridge.store.holdings.DROP_ROWS", 2)
    backpressure = make(database_bytes=400_000, share=0.5)
    large = f'{{"body":"{"x" * 20_000}"}}'
    for number in range(12):
        await put(worker, 1, state="dead", settled_at=1, delivery=f"dead-{number}", api_key="hog", content=large)
    await backpressure.census()
    while await backpressure.drop_some():
        pass
    assert worker.rows("delivery") == [f"dead-{number}" for number in range(4, 12)]
