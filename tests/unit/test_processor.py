"""flowbridge.processor: work in threads, in turns, and slowly for callers that have not been authenticated."""

import asyncio
import threading
import time

from flowbridge import peer, processor
from flowbridge.processor import Aside
from tests.patience import PATIENCE


def burn(seconds: float) -> None:
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


async def test_work_leaves_the_event_loops_thread_and_raises_what_it_raises() -> None:
    aside = Aside("test", "works")
    assert await aside.run(threading.get_ident) != threading.get_ident()
    try:
        await aside.run(int, "x")
    except ValueError:
        pass
    else:
        raise AssertionError
    assert await aside.run(int, "7") == 7


async def test_guests_together_have_a_part_of_one_processor() -> None:
    aside = Aside("test", "works")

    async def guest(host: str) -> None:
        peer.enter({"client": (host, 1)})
        await aside.run(burn, 0.1)

    began = time.monotonic()
    works = int(processor.GUESTS_SECONDS / 0.1) + 5
    await asyncio.gather(*(guest(f"192.0.2.{number}") for number in range(works)))
    assert time.monotonic() - began > processor.GUESTS_SECONDS + 4 * 0.1 / processor.GUESTS_SHARE * 0.8


async def test_known_callers_do_not_wait_for_guests() -> None:
    aside, go = Aside("test", "works"), threading.Event()

    async def guest() -> None:
        peer.enter({"client": ("192.0.2.1", 1)})
        await aside.run(go.wait, 2 * PATIENCE)

    async def known() -> None:
        peer.enter({"client": ("192.0.2.1", 1)})
        peer.identified("@me:hs")
        await aside.run(burn, 0)

    guests = [asyncio.create_task(guest()) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.wait_for(known(), PATIENCE)
    go.set()
    await asyncio.gather(*guests)
