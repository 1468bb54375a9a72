"""Large answers of the homeserver: the event loop goes on while they are read, and while what is in them is told."""

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import pytest

from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.client import success
from flowbridge.homeserver.pool import Answer
from flowbridge.live.feed import Feed
from flowbridge.live.frames import Wish
from flowbridge.live.listener import Listener
from flowbridge.live.reader import Reader
from flowbridge.models import Caller
from flowbridge.web import server

STOP = 0.6  # of the processor time that it takes to read 10 MB in one piece: less than that without a turn of the loop
TRIES = 3  # the best counts: beside other processes a thread may wait for its turn


def answer(value: Any) -> Answer:
    return Answer(200, (), json.dumps(value).encode())


def ten_megabytes() -> Answer:
    event = {
        "type": "m.room.message",
        "sender": "@a:hs",
        "origin_server_ts": 1,
        "content": {"msgtype": "m.text", "body": "x"},
        "unsigned": {"age": 1},
    }
    joined = {
        f"!{room}:hs": {"timeline": {"events": [{**event, "event_id": f"${room}-{n}"} for n in range(100)]}}
        for room in range(ROOMS)
    }
    found = answer({"next_batch": "s2", "rooms": {"join": joined}})
    assert len(found.body) > 9_000_000
    return found


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """As `serve` sets it: its usual way of looking over all that is there stops everything for 50 ms."""
    before = gc.get_threshold()
    server.tune_collector()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


ROOMS = 600  # with 100 short events each: 10 MB
LARGE = ten_megabytes()


def in_one_piece() -> float:
    """The seconds of processor time, about 0.1, for which every other caller would wait."""
    began = time.process_time()
    json.loads(LARGE.body)
    return time.process_time() - began


class Stops:
    """The longest stop of the event loop, in processor time of this process."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        before = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            self.longest = max(self.longest, now - before)
            before = now


class OneBatch:
    """A homeserver: the beginning, then 10 MB, then silence."""

    def __init__(self) -> None:
        self.answers = [answer({"next_batch": "s1"}), LARGE]
        self.is_told = asyncio.Event()

    async def poll(self, target: str, **_: object) -> Answer:
        if not self.answers:
            self.is_told.set()
            await asyncio.Event().wait()
        return self.answers.pop(0)


async def test_large_answer_does_not_stop_the_loop() -> None:
    async def read() -> None:
        assert len((await success(LARGE))["rooms"]["join"]) == ROOMS

    assert await _longest_stop(read) < STOP


async def test_large_batch_of_live_events_does_not_stop_the_loop() -> None:
    async def tell() -> None:
        homeserver = OneBatch()
        reader = Reader(cast("Homeserver", homeserver), "@me:hs", "token")
        feed = Feed("@me:hs", reader, lambda _, error: error, lambda: None)
        listener = Listener(Caller("@me:hs", None, "token"), Wish(types=("m.room.message",)), feed.leave)
        await feed.join(listener, None)
        await listener.over.wait()  # it does not read, and is dropped behind the first 1,000
        await homeserver.is_told.wait()
        feed.stop()

    assert await _longest_stop(tell) < STOP


async def _longest_stop(work: Callable[[], Awaitable[None]]) -> float:
    """As a part of the time that the reading takes in one piece."""
    found = []
    for _ in range(TRIES):
        stops = Stops()
        watching = asyncio.create_task(stops.watch())
        await asyncio.sleep(0)
        await work()
        for _ in range(2):
            await asyncio.sleep(0)  # the stop that has just been is seen at the watcher's next turn
        watching.cancel()
        found.append(stops.longest / in_one_piece())
        if found[-1] < STOP:
            break
    return min(found)


BLANK = b" " * 200_000


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{" + BLANK, b'"x"' + BLANK, b"[1]" + BLANK])
async def test_large_answer_that_is_no_object_is_an_error(body: bytes) -> None:
    with pytest.raises(Exception, match="no Matrix error"):
        await success(Answer(200, (), body))
