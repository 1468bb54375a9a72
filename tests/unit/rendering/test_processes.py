"""The render process: what it costs a caller to send a bomb, and what it costs the others."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from flowbridge.errors import BadContent, TooMany, Unavailable
from flowbridge.limits import peer
from flowbridge.models import Rendered
from flowbridge.models.timing import Timing
from flowbridge.rendering import processes
from flowbridge.rendering.child import MAX_ANSWERS
from flowbridge.rendering.processes import Rendering
from tests.patience import PATIENCE

# Of what is taken from outside, 16 KiB, nothing takes the libraries long: a bomb is what is made large enough.
BOMB = "|\n" * 6_000_000


@pytest.fixture
async def rendering() -> AsyncIterator[Rendering]:
    found = Rendering(timing=Timing(render_seconds=PATIENCE))
    yield found
    await found.stop()


async def render(rendering: Rendering, caller: str, source: str, format_: str = "markdown") -> Rendered:
    """In a task of its own, as a request is."""

    async def run() -> Rendered:
        peer.enter({})
        peer.identified(caller)
        return await rendering.render(format_, source, [])

    return await asyncio.wait_for(asyncio.create_task(run()), PATIENCE)


async def wrong(rendering: Rendering, source: str, format_: str = "markdown", caller: str = "@mallory:hs") -> str:
    with pytest.raises(BadContent) as found:
        await render(rendering, caller, source, format_)
    (problem,) = found.value.problems
    assert (problem.pointer, problem.schema) == (f"/{format_}", "render")
    return problem.message


async def test_text_is_rendered_outside_of_this_process(rendering: Rendering) -> None:
    assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")
    assert await render(rendering, "@a:hs", "<b>x</b>", "html") == Rendered("x", "<b>x</b>")
    assert rendering.pids
    assert os.getpid() not in rendering.pids


async def test_what_is_wrong_is_said(rendering: Rendering) -> None:
    assert await wrong(rendering, "<b>" * 101, "html") == "has more than 100 tags open at a time"
    assert await wrong(rendering, "<br>", "html") == "holds nothing that a room could show"
    assert (
        await wrong(rendering, "\n".join(["|a|b|", "|-|-|", *["|"] * 20_000])) == "has tables of more than 2000 cells"
    )
    assert await wrong(rendering, "x" * 140_000) == "becomes too long"


async def test_bomb_is_ended_and_the_next_text_is_rendered(rendering: Rendering) -> None:
    assert await wrong(rendering, BOMB) == processes._TOO_SLOW
    assert await render(rendering, "@mallory:hs", "*x*") == Rendered("*x*", "<em>x</em>")


async def test_text_that_needs_too_much_memory_is_refused(rendering: Rendering) -> None:
    huge = "x" * (200 * 1024 * 1024)  # never taken from outside: 16 kB are
    assert "memory" in await wrong(rendering, huge) or "too long" in await wrong(rendering, huge)
    assert await render(rendering, "@mallory:hs", "x") == Rendered("x")


async def test_bombs_hold_up_no_short_text(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    bombs = [asyncio.create_task(wrong(rendering, BOMB, caller=f"@{name}:hs")) for name in "bcd"]
    await asyncio.sleep(0)
    sooner = 0
    for _ in range(20):
        assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")
        sooner += not any(bomb.done() for bomb in bombs)
    assert sooner > 0  # the first bomb still takes its second
    assert set(await asyncio.gather(*bombs)) == {processes._TOO_SLOW}


LONG = "*x* " * 1_000


async def test_plain_work_goes_on_beside_bombs(rendering: Rendering) -> None:
    """The event loop is never held up: it takes turns while the bombs burn."""
    bombs = [asyncio.create_task(wrong(rendering, BOMB))]
    spent, turns = time.process_time(), 0
    while not all(bomb.done() for bomb in bombs):
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 50
    assert time.process_time() - spent < 0.5  # of more than the second that the bomb took
    await asyncio.gather(*bombs)


async def test_process_that_was_killed_is_replaced(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    for _ in range(3):
        for pid in rendering.pids:
            os.kill(pid, signal.SIGKILL)
        assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")


async def test_text_is_rendered_again_when_its_process_is_killed(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    (pid,) = rendering.pids
    os.kill(pid, signal.SIGSTOP)
    task = asyncio.create_task(render(rendering, "@a:hs", "*x*"))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    assert await task == Rendered("*x*", "<em>x</em>")
    assert rendering.pids != [pid]


async def test_process_that_hangs_is_replaced() -> None:
    rendering = Rendering(timing=Timing(render_seconds=0.3))
    with pytest.raises(Unavailable, match="too busy"):
        await _stopped(rendering)
    assert await _until_rendered(rendering) == Rendered("x")
    await rendering.stop()


async def _stopped(rendering: Rendering) -> None:
    while True:  # the first answer may take longer than that
        try:
            await render(rendering, "@a:hs", "x")
            break
        except Unavailable:
            continue
    (pid,) = rendering.pids
    os.kill(pid, signal.SIGSTOP)
    await render(rendering, "@a:hs", "x")


async def _until_rendered(rendering: Rendering) -> Rendered:
    while True:
        try:
            return await render(rendering, "@a:hs", "x")
        except Unavailable:
            continue


async def test_too_many_texts_of_one_caller_are_refused(rendering: Rendering) -> None:
    tasks = [asyncio.create_task(render(rendering, "@a:hs", "x")) for _ in range(processes.WAITING + 10)]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(one, TooMany) for one in found) == 9
    assert found.count(Rendered("x")) == processes.WAITING + 1


async def test_texts_that_wait_go_to_the_process_together(
    rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    await render(rendering, "@a:hs", "x")
    together, original = list[int](), processes._Process.render

    def counted(process: processes._Process, texts: Sequence[processes._Text]) -> "asyncio.Future[int | None]":
        together.append(len(texts))
        return original(process, texts)

    monkeypatch.setattr(processes._Process, "render", counted)
    found = await asyncio.gather(*(render(rendering, "@a:hs", f"*{number}*") for number in range(20)))
    assert found == [Rendered(f"*{number}*", f"<em>{number}</em>") for number in range(20)]
    assert together == [20]
    together.clear()
    await asyncio.gather(*(render(rendering, "@a:hs", f"{number:02}" * 500) for number in range(20)))
    assert together == [4, 4, 4, 4, 4]  # of 4 KiB


async def test_text_that_ends_the_process_is_told_from_those_beside_it() -> None:
    rendering = Rendering(short_bytes=2**30, together_bytes=2**30)
    await render(rendering, "@a:hs", "x")
    pids = rendering.pids
    before = [asyncio.create_task(render(rendering, "@a:hs", f"*{number}*")) for number in range(5)]
    bomb = asyncio.create_task(wrong(rendering, BOMB))
    behind = [asyncio.create_task(render(rendering, f"@{number}:hs", f"*{number}*")) for number in range(5)]
    expected = [Rendered(f"*{number}*", f"<em>{number}</em>") for number in range(5)]
    assert await asyncio.gather(*behind) == expected
    assert await asyncio.gather(*before) == expected
    assert await bomb == processes._TOO_SLOW
    assert rendering.pids != pids
    assert await render(rendering, "@a:hs", "x") == Rendered("x")
    await rendering.stop()


async def test_text_is_rendered_before_those_that_another_caller_has_waiting() -> None:
    rendering = Rendering(together_bytes=100)  # four of these
    await render(rendering, "@a:hs", "x")
    many = [asyncio.create_task(render(rendering, "@mallory:hs", "x")) for _ in range(200)]
    await asyncio.sleep(0)
    assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")
    assert sum(one.done() for one in many) < 20
    await asyncio.gather(*many)
    await rendering.stop()


async def test_text_that_waits_for_too_long_is_refused(rendering: Rendering, monkeypatch: pytest.MonkeyPatch) -> None:
    await render(rendering, "@a:hs", "x")
    monkeypatch.setattr(processes, "TURN_SECONDS", -1.0)
    with pytest.raises(Unavailable, match="too busy"):
        await render(rendering, "@a:hs", "x")


async def test_text_of_a_caller_that_went_away_is_not_rendered(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    gone = asyncio.create_task(render(rendering, "@a:hs", "y"))
    await asyncio.sleep(0)
    kept = asyncio.create_task(render(rendering, "@a:hs", "*x*"))
    gone.cancel()
    assert await kept == Rendered("*x*", "<em>x</em>")


@pytest.mark.parametrize(
    "answer", [b"{}", b"[]", b"[", b'[["", 5, null]]', b"[[]]", b"[5]", b'[["", "x", null], ["x"]]']
)
async def test_process_that_answers_what_it_was_not_asked_is_replaced(rendering: Rendering, answer: bytes) -> None:
    await render(rendering, "@a:hs", "x")
    process = rendering._short._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    task = asyncio.create_task(render(rendering, "@a:hs", "x"))
    for _ in range(10):  # tasks that hand it to the process; none of them waits for anything
        await asyncio.sleep(0)
    assert process._texts
    process.data_received(len(answer).to_bytes(4, "big") + answer)
    assert await task == Rendered("x")
    assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")
    assert process.pid not in rendering.pids


async def test_answer_without_end_ends_the_process(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    process = rendering._short._process
    assert process is not None
    process.data_received(b"\xff" * (MAX_ANSWERS + 1))
    await asyncio.wait_for(asyncio.to_thread(process._popen.wait), PATIENCE)


async def test_caller_that_goes_away_ends_no_process(rendering: Rendering) -> None:
    await render(rendering, "@a:hs", "x")
    await render(rendering, "@a:hs", LONG)
    pids = rendering.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    task = asyncio.create_task(rendering.render("markdown", LONG, []))
    await asyncio.sleep(0.01)  # it is with the process by then, or about to be
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert await render(rendering, "@a:hs", "*x*") == Rendered("*x*", "<em>x</em>")
    assert rendering.pids == pids


async def test_child_ends_with_its_bridge() -> None:
    rendering = Rendering()
    await render(rendering, "@a:hs", "x")
    process = rendering._short._process
    assert process is not None
    process._transport.close()  # as when the bridge is killed
    await asyncio.wait_for(asyncio.to_thread(process._popen.wait), PATIENCE)
    await rendering.stop()


async def test_child_has_nothing_of_the_bridges_environment(
    rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCESS_TOKEN", "canary")
    await render(rendering, "@a:hs", "x")
    for pid in rendering.pids:
        assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()  # noqa: ASYNC240 (no disk)


async def test_nothing_is_rendered_after_the_end(rendering: Rendering) -> None:
    await rendering.stop()
    with pytest.raises(Unavailable, match="the bridge stops"):
        await render(rendering, "@a:hs", "x")
