"""Large answers of the homeserver: the event loop goes on while they are read, and while what is in them is told."""

import asyncio
import contextlib
import gc
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import pytest

from flowbridge.errors import BadGateway
from flowbridge.homeserver import Homeserver, Locator, large_json
from flowbridge.homeserver.client import json_of
from flowbridge.homeserver.pool import Answer
from flowbridge.homeserver.sync import SyncClient
from flowbridge.live.feed import Feed
from flowbridge.live.frames import EventFilter
from flowbridge.live.listener import Listener
from flowbridge.live.reader import Reader
from flowbridge.models import Caller
from flowbridge.web import server
from tests.patience import PATIENCE

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

    async def poll(self, target: str, **_: object) -> tuple[bytes, Any]:
        if not self.answers:
            self.is_told.set()
            await asyncio.Event().wait()
        found = self.answers.pop(0)
        return found.body, await json_of(found)


async def test_large_answer_does_not_stop_the_loop() -> None:
    async def read() -> None:
        assert len((await json_of(LARGE))["rooms"]["join"]) == ROOMS

    assert await _longest_stop(read) < STOP


async def test_large_batch_of_live_events_does_not_stop_the_loop() -> None:
    async def tell() -> None:
        homeserver = OneBatch()
        reader = Reader(cast("Homeserver", homeserver), "@me:hs", "token")
        feed = Feed("@me:hs", reader, lambda _, error: error, lambda: None)
        listener = Listener(Caller("@me:hs", None, "token"), EventFilter(types=("m.room.message",)), feed.leave)
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


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{" + BLANK, b'"x' + BLANK, b"[1]" + BLANK + b"]"])
async def test_large_answer_that_is_not_json_is_an_error(body: bytes) -> None:
    with pytest.raises(BadGateway, match="no Matrix error"):
        await json_of(Answer(200, (), body))


@pytest.mark.parametrize("body", [b'"x"' + BLANK, b"[1]" + BLANK])
async def test_large_answer_that_is_no_object_is_an_error_where_one_is_asked_for(body: bytes) -> None:
    async with serving(body) as homeserver:
        with pytest.raises(BadGateway, match="no Matrix error"):
            await homeserver.read_state("token", "!r:hs", "m.room.topic", "", "")
        with pytest.raises(BadGateway, match="not a JSON object"):
            await homeserver.recent("token", "!r:hs", "")


@contextlib.asynccontextmanager
async def serving(body: bytes) -> AsyncIterator[Homeserver]:
    """In front of a server that gives this answer to each request."""

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer_all, "127.0.0.1", 0) as server:
        tls = ssl.create_default_context()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        homeserver = Homeserver(Locator(url, tls), tls, deadline=PATIENCE)
        yield homeserver
        homeserver.close()


ASKS: dict[str, Callable[[Homeserver], Awaitable[object]]] = {
    "a sync": lambda homeserver: SyncClient(homeserver.read).sync("token", {"room": {}}, patience=PATIENCE),
    "a page of history": lambda homeserver: SyncClient(homeserver.read).messages("token", "!r:hs"),
    "a long poll": lambda homeserver: SyncClient(homeserver.poll).sync("token", {"room": {}}, patience=PATIENCE),
    "a page of live events": lambda homeserver: SyncClient(homeserver.poll).messages("token", "!r:hs"),
    "recent events": lambda homeserver: homeserver.recent("token", "!r:hs", ""),
    "a state event": lambda homeserver: homeserver.read_state("token", "!r:hs", "m.room.topic", "", ""),
    "all members": lambda homeserver: homeserver.read("/members", token="token"),
    "versions": lambda homeserver: homeserver.versions(),
}


@pytest.mark.parametrize("what", ASKS)
async def test_large_answer_is_read_in_another_thread(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    threads = []
    read = large_json.read

    def noted(body: bytes) -> Any:
        threads.append(threading.get_ident())
        return read(body)

    monkeypatch.setattr(large_json, "read", noted)
    async with serving(json.dumps({"next_batch": "s", "chunk": [{"body": "x" * 1_000}] * 500}).encode()) as homeserver:
        await ASKS[what](homeserver)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
