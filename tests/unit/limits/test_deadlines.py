"""flowbridge.limits.deadlines: many deadlines, one timer, none early."""

import asyncio
from typing import Any

from flowbridge.limits.deadlines import Deadlines

SECONDS = 0.05


class Rung:
    """What expired, in order, and when."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.at: list[float] = []
        self.rang = asyncio.Event()

    def __call__(self, key: str) -> None:
        self.keys.append(key)
        self.at.append(asyncio.get_running_loop().time())
        self.rang.set()


async def test_each_expires_in_order_and_none_early() -> None:
    rung, began = Rung(), asyncio.get_running_loop().time()
    deadlines = Deadlines(SECONDS, rung)
    deadlines.set("first")
    await asyncio.sleep(SECONDS / 2)
    between = asyncio.get_running_loop().time()
    deadlines.set("second")
    while len(rung.keys) < 2:
        rung.rang.clear()
        await rung.rang.wait()
    assert rung.keys == ["first", "second"]
    assert rung.at[0] >= began + SECONDS
    assert rung.at[1] >= between + SECONDS
    assert len(deadlines) == 0


async def test_what_is_dropped_or_set_again_does_not_expire_at_its_first_time() -> None:
    rung = Rung()
    deadlines = Deadlines(SECONDS, rung)
    for key in ("dropped", "again", "last"):
        deadlines.set(key)
    deadlines.drop("dropped")
    deadlines.drop("never set")
    deadlines.set("again")
    assert len(deadlines) == 2
    while len(rung.keys) < 2:
        rung.rang.clear()
        await rung.rang.wait()
    assert rung.keys == ["last", "again"]


async def test_one_timer_serves_all_and_another_one_comes_after_it() -> None:
    loop, made = asyncio.get_running_loop(), list[float]()
    call_at = loop.call_at

    def counted(when: float, *args: Any, **named: Any) -> asyncio.TimerHandle:
        made.append(when)
        return call_at(when, *args, **named)

    loop.call_at = counted  # type: ignore[method-assign, assignment]
    rung = Rung()
    deadlines = Deadlines(SECONDS, rung)
    for number in range(1_000):
        deadlines.set(str(number))
        deadlines.drop(str(number))
    assert len(made) == 1
    await asyncio.sleep(2 * SECONDS)
    deadlines.set("late")
    await rung.rang.wait()
    assert rung.keys == ["late"]


async def test_key_that_is_set_while_it_expires_expires_again() -> None:
    rung = Rung()

    def expire(key: str) -> None:
        rung(key)
        if len(rung.keys) < 3:
            deadlines.set(key)

    deadlines = Deadlines(SECONDS / 10, expire)
    deadlines.set("a")
    while len(rung.keys) < 3:
        rung.rang.clear()
        await rung.rang.wait()
    assert len(deadlines) == 0
