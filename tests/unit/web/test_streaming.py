"""Answers given piece by piece: what ends them, and what the caller and the log are told then."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from flowbridge.errors import MatrixError, Unavailable
from flowbridge.web.endpoint import HANG_UP, LOG
from flowbridge.web.streaming import StreamedAnswer

HEADERS = [(b"content-type", b"text/plain")]
OVER = Unavailable("the bridge stops")


@dataclass
class Caller:
    """What it has been sent. It leaves once told to, and takes nothing while `stalls`."""

    sent: list[Message] = field(default_factory=list)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    is_hung_up_on: bool = False
    stalls: bool = False

    def __post_init__(self) -> None:
        self.scope: dict[str, Any] = {"type": "http", "raw_path": b"/path", HANG_UP: self._hang_up}

    def _hang_up(self) -> None:
        self.is_hung_up_on = True

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if self.stalls and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Answer(StreamedAnswer):
    """`said`: set once the first piece has been given, or before `behind` when there is none."""

    def __init__(
        self, *pieces: bytes, behind: Callable[[], Awaitable[Any]] | None = None, ends: asyncio.Event | None = None
    ) -> None:
        super().__init__(499, 0.05)
        self.pieces = pieces
        self.behind = behind
        self.ends = ends
        self.said = asyncio.Event()
        self.released = 0

    async def write(self) -> None:
        if self.pieces:
            await self.start(200, HEADERS)
        for piece in self.pieces:
            await self.give(piece)
        self.said.set()
        if self.behind is not None:
            await self.behind()

    def interruptions(self) -> list[Coroutine[Any, Any, MatrixError | None]]:
        return [] if self.ends is None else [self._interruption(self.ends)]

    async def _interruption(self, ends: asyncio.Event) -> MatrixError:
        await ends.wait()
        return OVER

    async def release(self) -> None:
        self.released += 1


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def behind() -> None:
        raise error

    return behind


async def forever() -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def giving(answer: Answer, caller: Caller) -> AsyncIterator[asyncio.Task[None]]:
    """The answer on its way, once its first pieces have been given."""
    task = asyncio.create_task(answer(caller.scope, caller.receive, caller.send))
    await answer.said.wait()
    yield task
    await task
    assert answer.released == 1


async def test_whole_answer_is_given() -> None:
    caller, answer = Caller(), Answer(b"a", b"b")
    await answer(caller.scope, caller.receive, caller.send)
    start, *body = caller.sent
    assert start == {"type": "http.response.start", "status": 200, "headers": HEADERS}
    assert [(message["body"], message["more_body"]) for message in body] == [(b"a", True), (b"b", True), (b"", False)]
    assert (answer.status_code, answer.released, caller.is_hung_up_on) == (200, 1, False)
    assert LOG not in caller.scope


@pytest.mark.parametrize(("pieces", "status"), [((b"a",), 200), ((), 499)])
async def test_caller_that_leaves_ends_it(pieces: tuple[bytes, ...], status: int) -> None:
    caller, answer = Caller(), Answer(*pieces, behind=forever)
    async with giving(answer, caller):
        caller.leaves.set()
    assert (answer.status_code, caller.body, caller.is_hung_up_on) == (status, b"".join(pieces), False)


async def test_caller_that_leaves_in_its_upload_is_not_answered() -> None:
    caller, answer = Caller(), Answer(behind=raising(ClientDisconnect()))
    await answer(caller.scope, caller.receive, caller.send)
    assert (answer.status_code, caller.sent) == (499, [])


async def test_error_before_the_start_is_the_answer() -> None:
    caller, answer = Caller(), Answer(behind=raising(OVER))
    await answer(caller.scope, caller.receive, caller.send)
    assert [message.get("status") for message in caller.sent] == [503, None]
    assert b"the bridge stops" in caller.body
    assert (answer.status_code, caller.is_hung_up_on) == (503, False)
    assert caller.scope[LOG] == {"errcode": str(OVER.errcode), "error": "the bridge stops"}


async def test_error_in_the_middle_cuts_it(caplog: pytest.LogCaptureFixture) -> None:
    caller, answer = Caller(), Answer(b"a", behind=raising(OVER))
    await answer(caller.scope, caller.receive, caller.send)
    assert (answer.status_code, caller.body, caller.is_hung_up_on) == (200, b"a", True)
    (record,) = caplog.records
    assert (record.msg, vars(record)["fields"]) == ("answer_cut", {"path": "/path", "reason": "the bridge stops"})
    assert caller.scope[LOG] == {"error": "the bridge stops"}


@pytest.mark.parametrize("pieces", [(b"a",), ()])
async def test_mistake_of_ours_is_logged_and_hides_what_it_is(
    caplog: pytest.LogCaptureFixture, pieces: tuple[bytes, ...]
) -> None:
    caller, answer = Caller(), Answer(*pieces, behind=raising(ZeroDivisionError("secret")))
    await answer(caller.scope, caller.receive, caller.send)
    assert (answer.status_code, caller.is_hung_up_on) == ((200, True) if pieces else (500, False))
    assert b"secret" not in caller.body
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.msg == "internal_error"
    assert record.exc_info


async def test_caller_that_takes_nothing_is_cut() -> None:
    caller, answer = Caller(stalls=True), Answer(b"a")
    await answer(caller.scope, caller.receive, caller.send)
    assert caller.is_hung_up_on
    assert caller.scope[LOG] == {"error": "the caller has taken nothing of the answer for 0.05 s"}


@pytest.mark.parametrize("pieces", [(b"a",), ()])
async def test_interruption_is_an_error_like_another(pieces: tuple[bytes, ...]) -> None:
    caller, ends = Caller(), asyncio.Event()
    answer = Answer(*pieces, behind=forever, ends=ends)
    async with giving(answer, caller):
        ends.set()
    assert (answer.status_code, caller.is_hung_up_on) == ((200, True) if pieces else (503, False))


async def test_caller_that_has_left_is_not_told_of_an_interruption() -> None:
    caller, ends = Caller(), asyncio.Event()
    answer = Answer(behind=forever, ends=ends)
    async with giving(answer, caller):
        caller.leaves.set()
        ends.set()
    assert (answer.status_code, caller.sent) == (499, [])


@pytest.mark.parametrize("pieces", [(b"a",), ()])
async def test_cancellation_cuts_it_and_is_not_passed_on(pieces: tuple[bytes, ...]) -> None:
    """The server cancels what has not ended in the time for that, and the request's log line is still written."""
    caller, answer = Caller(), Answer(*pieces, behind=forever)
    async with giving(answer, caller) as task:
        task.cancel()
    assert (caller.body, caller.is_hung_up_on) == (b"".join(pieces), True)
    assert caller.scope[LOG] == {"error": "the bridge stops"}
