"""Refills: lanes that ask at about the same time read the store at once."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from flowbridge.delivery.refills import Refills
from flowbridge.store import outbox

Work = Callable[[Any], Any]


class _Writer:
    """Stands in for the database: it shows what it is asked for, and does it when it is told."""

    def __init__(self) -> None:
        self.asked: list[tuple[Work, asyncio.Future[Any]]] = []
        self.read: list[dict[str, int]] = []

    def run(self, work: Work, **_: Any) -> "asyncio.Future[Any]":
        self.asked.append((work, asyncio.get_running_loop().create_future()))
        return self.asked[-1][1]

    def fetch_each(self, _: Any, limits: Mapping[str, int]) -> dict[str, list[str]]:
        self.read.append(dict(limits))
        return {lane: [f"row of {lane}"] for lane in limits if lane != "empty"}

    def work(self) -> None:
        while self.asked:
            work, future = self.asked.pop(0)
            future.set_result(work(None))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> _Writer:
    writer = _Writer()
    monkeypatch.setattr(outbox, "fetch_each", writer.fetch_each)
    return writer


def ask(refills: Refills, *lanes: str) -> "list[asyncio.Task[Any]]":
    return [asyncio.ensure_future(refills.fetch(lane, 5)) for lane in lanes]


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_lanes_that_ask_in_one_turn_share_a_reading(writer: _Writer) -> None:
    asking = ask(Refills(writer), "a", "empty", "b")  # type: ignore[arg-type]
    await turns()
    assert len(writer.asked) == 1
    writer.work()
    assert await asyncio.gather(*asking) == [["row of a"], [], ["row of b"]]
    assert writer.read == [{"a": 5, "empty": 5, "b": 5}]


async def test_lane_reads_behind_all_that_the_writer_was_asked_for_before(writer: _Writer) -> None:
    """An event that was settled in between would be read as queued, and sent once more."""
    refills = Refills(writer)  # type: ignore[arg-type]
    first = ask(refills, "a")
    await turns()
    settling = writer.run(lambda _: "settled")
    second = ask(refills, "b")
    await turns()
    assert writer.asked[1][1] is settling
    assert len(writer.asked) == 3
    writer.work()
    assert await asyncio.gather(*first, *second) == [["row of a"], ["row of b"]]
    assert writer.read == [{"a": 5}, {"b": 5}]


async def test_each_hears_that_the_store_failed_though_it_was_never_reached(writer: _Writer) -> None:
    refills = Refills(writer)  # type: ignore[arg-type]
    asking = ask(refills, "a", "b")
    await turns()
    writer.asked.pop()[1].set_exception(OSError("away"))
    assert [str(error) for error in await asyncio.gather(*asking, return_exceptions=True)] == ["away", "away"]
    again = ask(refills, "a")
    await turns()
    writer.work()
    assert await asyncio.gather(*again) == [["row of a"]]


async def test_lane_that_was_ended_meanwhile_does_not_disturb_the_others(writer: _Writer) -> None:
    asking = ask(Refills(writer), "a", "b")  # type: ignore[arg-type]
    await turns()
    asking[0].cancel()
    await turns()
    writer.work()
    assert await asking[1] == ["row of b"]
