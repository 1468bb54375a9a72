"""The binder: how many commits it asks the writer for, and how soon."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from flowbridge.delivery import binder as binders
from flowbridge.delivery import binding
from flowbridge.delivery.binder import Binder
from flowbridge.store import Fence

Work = Callable[[Any], Any]


class _Writer:
    """Stands in for the database: it shows what it is asked for, and does it when it is told."""

    def __init__(self) -> None:
        self.asked: list[tuple[Work, asyncio.Future[Any], bool]] = []
        self.hurried = asyncio.Event()

    def run(self, work: Work, *, lingers: bool, **_: Any) -> "asyncio.Future[Any]":
        self.asked.append((work, asyncio.get_running_loop().create_future(), lingers))
        return self.asked[-1][1]

    def hurry(self) -> None:
        self.hurried.set()

    def work(self) -> None:
        for work, future, _ in self.asked:
            future.set_result(work(None))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> _Writer:
    monkeypatch.setattr(binding, "resolve", lambda _, wanted, __: [[each.fence.lane] for each in wanted])
    return _Writer()


def bind(writer: _Writer, *urgent: bool) -> "asyncio.Future[Any]":
    binder = Binder(writer, lambda row: row)  # type: ignore[arg-type]
    fences = [Fence(str(number), "me", 1) for number in range(len(urgent))]
    return asyncio.gather(*(binder.bind([], fence, urgent=each) for fence, each in zip(fences, urgent, strict=True)))


async def test_what_nobody_waits_for_lingers_for_more_of_its_kind(writer: _Writer) -> None:
    bound = bind(writer, False, False)
    await asyncio.wait_for(writer.hurried.wait(), 10)  # by itself, after some milliseconds
    assert [lingers for _, _, lingers in writer.asked] == [True]
    writer.work()
    assert await bound == [["0"], ["1"]]


async def test_caller_that_waits_hurries_those_that_linger(writer: _Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binders, "PATIENT_SECONDS", 3_600)
    bound = bind(writer, False, True)
    await asyncio.wait_for(writer.hurried.wait(), 10)
    writer.work()
    assert await bound == [["0"], ["1"]]


async def test_event_of_a_caller_that_waits_does_not_linger(writer: _Writer) -> None:
    bound = bind(writer, True)
    await asyncio.sleep(0)
    assert [lingers for _, _, lingers in writer.asked] == [False]
    writer.work()
    assert await bound == [["0"]]
