"""Single flights and ignored results."""

import asyncio
import gc
import logging

import pytest

from flowbridge.errors import NotFound
from flowbridge.limits.tasks import Once, ignore_result


async def test_question_in_flight_is_asked_once() -> None:
    asked: list[str] = []
    go = asyncio.Event()

    async def ask() -> str:
        asked.append("q")
        await go.wait()
        return "answer"

    once: Once[str, str] = Once()
    callers = [asyncio.ensure_future(once.get("q", ask)) for _ in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.sleep(0)
    assert "q" in once
    assert len(once) == 1
    go.set()
    assert await asyncio.gather(*callers[1:]) == ["answer", "answer"]
    assert asked == ["q"]
    assert "q" not in once
    assert await once.get("q", ask) == "answer"
    assert asked == ["q", "q"]


async def test_error_reaches_every_caller() -> None:
    async def ask() -> str:
        raise NotFound("nowhere")

    once: Once[str, str] = Once()
    found = await asyncio.gather(once.get("q", ask), once.get("q", ask), return_exceptions=True)
    assert [str(each) for each in found] == ["nowhere", "nowhere"]
    assert len(once) == 0


async def test_ignored_answer_is_not_logged_and_a_fault_is(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(error: Exception) -> None:
        raise error

    with caplog.at_level(logging.ERROR):
        for error in (NotFound("nowhere"), ValueError("a fault")):
            task = asyncio.ensure_future(fail(error))
            task.add_done_callback(ignore_result)
            await asyncio.wait([task])
            del task
            gc.collect()
            await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["background_task_failed"]
