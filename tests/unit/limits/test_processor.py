"""flowbridge.limits.processor: work in threads, in turns, and slowly for callers that have not been authenticated."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from flowbridge.limits import peer, processor
from flowbridge.limits.processor import Account, Aside
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
    works = int(processor.SAVED_SECONDS / 0.1) + 3
    await asyncio.gather(*(guest(f"192.0.2.{number}") for number in range(works)))
    assert time.monotonic() - began > processor.SAVED_SECONDS + 2 * 0.1 / processor.BODIES_SHARE * 0.8


async def test_what_a_known_caller_has_spent_in_a_thread_is_told_to_its_request() -> None:
    """Of guests it is paid for here already."""
    aside = Aside("test", "works")
    for name, spent in [("key 1", 0.05), ("", 0.0)]:
        peer.enter({"client": ("192.0.2.1", 1)})
        if name:
            peer.identified(name)
        await asyncio.gather(aside.run(burn, 0.02), aside.run(burn, 0.03))
        assert peer.spent() == pytest.approx(spent, abs=0.02)


class BusyMachine:
    """Clocks that move when they are told to."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0

    def account(self, share: float) -> Account:
        return Account(share, clock=lambda: self.now, waited=lambda: self.waited)


def test_what_is_spent_is_earned_at_the_share_of_the_processor() -> None:
    clock = BusyMachine()
    account = clock.account(0.2)
    assert account.spend(processor.SAVED_SECONDS) == 0
    assert account.spend(0.1) == pytest.approx(0.5)
    clock.now += 0.3
    assert account.debt() == pytest.approx(0.2)
    clock.now += 100
    assert account.debt() == 0
    assert account.spend(processor.SAVED_SECONDS + 0.02) == pytest.approx(0.1), "no more is saved than that"


def test_time_that_other_processes_took_earns_nothing() -> None:
    clock = BusyMachine()
    account = clock.account(0.2)
    account.spend(processor.SAVED_SECONDS + 0.1)
    clock.now += 0.5
    clock.waited += 0.4
    assert account.debt() == pytest.approx(0.4)


def test_time_waited_for_the_processor_is_known_on_linux() -> None:
    found = processor.Schedstat()
    assert found.waited() >= 0
    assert found.is_known == Path("/proc/self/schedstat").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_accounts_share_one_open_file() -> None:
    """There is one for each caller that is known."""
    first = Account()
    first.spend(0.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    accounts = [Account() for _ in range(100)]
    for account in accounts:
        account.spend(0.0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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
