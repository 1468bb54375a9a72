"""Markdown and HTML are rendered in processes of their own, which may be killed at any time.

No library carries it: pebble's pool, which kills what takes too long, costs the event loop's process 277 µs a text and
the text 3 ms (docs/architecture.md). Three processes, each started when it is needed: short texts wait for no long one,
and webhooks have one of their own. Texts that wait go to their process together: a system call, and a change of
process, cost more than a short text.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from flowbridge import log
from flowbridge.errors import BadContent, Problem, TooMany, Unavailable
from flowbridge.limits import peer
from flowbridge.limits.tasks import Once
from flowbridge.limits.turns import Turns
from flowbridge.models import Rendered
from flowbridge.models.hooks import Made, Said
from flowbridge.models.timing import Timing
from flowbridge.rendering.child import MAX_ANSWERS, NO_MEMORY, framed

SHORT_BYTES = 2_560  # of a request: 2 KiB of the worst text take 4 ms of the processor, 32 KiB of it 40 ms
HOOK_BYTES = 64 * 1024  # of a request to a hook: GitHub's largest usual ones are 30 kB, and take 1 ms
TOGETHER_BYTES = 4 * 1024  # of short texts that go together: of the worst ones, 8 ms for which the next ones wait
WAITING = 256  # texts of one caller: each is held in memory
TURN_SECONDS = 20.0
RETRY_MS = 1_000
RULE = "render"  # what Problem.schema says for these rules
KILLED = "/body"  # the pointer of a request to a hook that took too long, or too much memory

_OF_THE_TEXT = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, NO_MEMORY)  # too much processor time, or memory
# The environment and the search path come from us: there may be tokens in the one, and the other may not be the usual.
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from flowbridge.rendering.child import serve; serve()"
_WEBHOOK = b'["webhook",'
_TOO_SLOW = "takes more than a second to render: make it simpler, or send it as `text`"
_TOO_BIG = "needs too much memory to render: make it simpler, or send it as `text`"
_TOO_MANY = f"{WAITING} texts of yours wait to be rendered already, which is the share of one caller"
_STOPS = "the bridge stops"
_ENDED = "Markdown and HTML cannot be rendered at the moment: the process that does it has ended"
_STUCK = "Markdown and HTML cannot be rendered at the moment: the machine is too busy"


class _EndedError(Exception):
    """The text has ended the process; `status`: as subprocess has it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


Answer = Rendered | dict[str, Any] | str  # of a text; of a request to a hook; what is wrong with it


@dataclass(slots=True, eq=False)
class _Text:
    """`is_alone`: it is tried again, with no other text beside it. `is_text`: it is no request to a hook."""

    request: bytes
    answer: "asyncio.Future[Answer]"
    expires_at: float
    is_alone: bool = False

    @property
    def is_text(self) -> bool:
        return not self.request.startswith(_WEBHOOK, 4)


class _Process(asyncio.Protocol):
    """One render process, and the socket to it."""

    def __init__(self, theirs: socket.socket) -> None:
        self._popen = subprocess.Popen(  # noqa: S603 (our own code)
            [sys.executable, "-E", "-s", "-c", _CODE, *sys.path],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # the terminal's Ctrl-C is for the bridge
        )
        self.pid = self._popen.pid
        self.is_alive = True
        self._received = bytearray()
        self._texts: deque[_Text] = deque()  # without an answer
        self._rendering: asyncio.Future[int | None] | None = None
        self._reaping: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls) -> "_Process":
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.to_thread(cls, theirs)
        await asyncio.get_running_loop().create_connection(lambda: process, sock=ours)
        return process

    def render(self, texts: Sequence[_Text]) -> "asyncio.Future[int | None]":
        """Gives each text its answer; done when all have one, or else with the status with which the process ended.

        These first, then the next ones.
        """
        self._texts = deque(texts)
        self._rendering = rendering = asyncio.get_running_loop().create_future()
        request = b"".join([text.request for text in texts])
        self._transport.write(len(request).to_bytes(4, "big") + request)
        return rendering

    def kill(self) -> None:
        """End it now; an answer that is waited for will not come."""
        self._popen.kill()

    async def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.kill()
        self._transport.abort()
        await asyncio.to_thread(self._popen.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        try:
            while len(received) >= 4 and len(received) >= (end := 4 + int.from_bytes(received[:4], "big")):
                self._answer(json.loads(received[4:end]))
                del received[:end]
            if len(received) > MAX_ANSWERS:
                self.kill()
        except (ValueError, TypeError, IndexError, RecursionError):  # it is not ours any more
            self.kill()

    def _answer(self, answers: object) -> None:
        if not isinstance(answers, list) or not answers:
            raise ValueError("no answers")
        for answer in answers:
            found = _read(answer)
            text = self._texts.popleft()
            if isinstance(found, dict if text.is_text else Rendered):
                raise ValueError("no answer to that")
            if not text.answer.done():  # its caller may have gone away
                text.answer.set_result(found)
        if not self._texts and self._rendering is not None and not self._rendering.done():
            self._rendering.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        self.is_alive = False
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        status = await asyncio.to_thread(self._popen.wait)
        if self._rendering is not None and not self._rendering.done():
            self._rendering.set_result(status)


class _Line:
    """Texts that share one process; callers take turns.

    `stuck_seconds`: for those that go to it together; `together_bytes`: of their requests, unless it is one. When the
    process ends, it is not known which of several texts has ended it: each is tried again by itself.
    """

    def __init__(self, stuck_seconds: float, together_bytes: int) -> None:
        self._stuck_seconds = stuck_seconds
        self._together_bytes = together_bytes
        self._waiting = Turns[_Text]()
        self._again: deque[_Text] = deque()
        self._working: asyncio.Task[None] | None = None
        self._process: _Process | None = None
        self._starting = Once[None, None]()
        self._has_stopped = False

    @property
    def pid(self) -> int | None:
        """Of its process, if there is one at the moment."""
        return self._process.pid if self._process is not None and self._process.is_alive else None

    async def ask(self, request: bytes, caller: str) -> Answer:
        """The text as it is rendered, or what is wrong with it. Raises _EndedError, TooMany or Unavailable."""
        if self._waiting.of(caller) > WAITING:
            raise TooMany(_TOO_MANY, retry_after_ms=RETRY_MS)
        loop = asyncio.get_running_loop()
        text = _Text(request, loop.create_future(), loop.time() + TURN_SECONDS)
        self._waiting.add(caller, text)
        if self._working is None:  # it begins after all that has come in this turn of the loop, and serves every caller
            self._working = loop.create_task(self._work(), context=Context())
        # A caller that goes away ends nothing: the process would have to be killed for that.
        return await text.answer

    async def _work(self) -> None:
        """Render what waits, until nothing does."""
        while texts := self._together():
            try:
                await self._render(texts)
            except Exception as error:
                for text in texts:
                    if not text.answer.done():
                        text.answer.set_exception(error)
        self._working = None

    def _together(self) -> list[_Text]:
        """The texts that go to the process next; none when none waits."""
        while self._again:
            text = self._again.popleft()
            if not text.answer.done():
                return [text]
        now, size, found = asyncio.get_running_loop().time(), 0, list[_Text]()
        while self._waiting and (not found or size + len(self._waiting.next.request) <= self._together_bytes):
            text = self._waiting.take()
            if text.answer.done():
                continue
            if now >= text.expires_at:
                text.answer.set_exception(Unavailable(_STUCK))
                continue
            found.append(text)
            size += len(text.request)
        return found

    async def _render(self, texts: Sequence[_Text]) -> None:
        """Raises what holds for those that have no answer then."""
        process = await self._take()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._stuck_seconds
        timer = loop.call_at(ends_at, process.kill)
        status = await process.render(texts)
        timer.cancel()
        if status is None:
            return
        if self._has_stopped:
            raise Unavailable(_STOPS)
        self._starting.task(None, self._start)  # so that the next text need not wait for it
        if status in _OF_THE_TEXT and len(texts) == 1:
            raise _EndedError(status)
        if loop.time() >= ends_at:
            raise Unavailable(_STUCK)
        if texts[0].is_alone:
            raise Unavailable(_ENDED)
        for text in texts:
            text.is_alone = True
            self._again.append(text)

    async def _take(self) -> _Process:
        while self._process is None or not self._process.is_alive:
            await self._starting.get(None, self._start)
        return self._process

    async def _start(self) -> None:
        if self._has_stopped:
            raise Unavailable(_STOPS)
        try:
            process = await _Process.start()
        except OSError as error:
            raise Unavailable(f"Markdown and HTML cannot be rendered at the moment: {error.strerror}") from None
        if self._has_stopped:
            await process.end()
            raise Unavailable(_STOPS)
        self._process = process
        log.info("render_process", pid=process.pid)

    async def stop(self) -> None:
        self._has_stopped = True
        await asyncio.gather(*self._starting, return_exceptions=True)
        if self._process is not None:
            await self._process.end()
        if self._working is not None:
            await self._working


class Rendering:
    """For one event loop."""

    def __init__(
        self, *, timing: Timing = Timing(), short_bytes: int = SHORT_BYTES, together_bytes: int = TOGETHER_BYTES
    ) -> None:
        self._short_bytes = short_bytes
        self._short = _Line(timing.render_seconds, together_bytes)
        self._long = _Line(timing.render_seconds, 0)  # one at a time: they take long enough
        self._hooks = _Line(timing.render_seconds, HOOK_BYTES)  # together no more than one of them may be
        self._lines = (self._short, self._long, self._hooks)

    async def render(self, format_: str, source: str, users: Sequence[str]) -> Rendered:
        """Raises BadContent for a text that cannot be rendered, TooMany and Unavailable."""
        request = framed(format_, source, users)
        line = self._short if len(request) <= self._short_bytes else self._long
        found = await self._ask(line, format_, request)
        assert isinstance(found, Rendered)
        return found

    async def webhook(self, body: str, given: Mapping[str, Any]) -> Made:
        """What a request to a hook becomes; `given`: see `webhooks.webhook`.

        Raises BadContent for one that cannot be read, or whose template takes too long (then `plain` helps), TooMany
        and Unavailable. Built-in templates take 0.2 ms; a template of the hook's own may take a second.
        """
        encode = partial(framed, "webhook", body, given)
        request = await asyncio.to_thread(encode) if len(body) > HOOK_BYTES else encode()
        line = self._hooks if len(request) <= HOOK_BYTES and not given["template"] else self._long
        found = await self._ask(line, KILLED[1:], request)
        assert isinstance(found, dict)
        if "wrong" in found:
            raise _problem("", found["wrong"])
        messages = [
            Said(
                each["members"],
                Rendered(each["body"], each["html"]),
                event=each["event"],
                key=each["key"],
                state=each["state"],
                firing=tuple(each["firing"]),
                ended=None if each["ended"] is None else tuple(each["ended"]),
                time=each["time"],
                digest=each["digest"],
            )
            for each in found["messages"]
        ]
        return Made(
            found["source"],
            tuple(messages),
            found["event"],
            found["delivery_id"],
            found.get("nothing", ""),
            tuple(found["warnings"]),
        )

    async def check_template(
        self, source: str, template: Mapping[str, str], per: str
    ) -> tuple[list[Problem], list[str]]:
        """What is wrong with a hook's own template, and what its owner should know of it.

        Raises TooMany and Unavailable.
        """
        request = framed("template", source, {"template": dict(template), "per": per})
        try:
            answer = await self._ask(self._long, "template", request)
        except BadContent as error:
            return list(error.problems), []
        assert isinstance(answer, Rendered)
        found = json.loads(answer.body)
        return [Problem(f"/template/{member}", text, RULE) for member, text in found["wrong"]], found["warnings"]

    async def _ask(self, line: _Line, what: str, request: bytes) -> Rendered | dict[str, Any]:
        caller = peer.who() or "here"
        try:
            found = await line.ask(request, caller)
        except _EndedError as error:
            log.warning("render_killed", caller=caller, bytes=len(request), status=error.status)
            raise _problem(what, _TOO_SLOW if error.status == -signal.SIGPROF else _TOO_BIG) from None
        if isinstance(found, str):
            raise _problem(what, found)
        return found

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return [line.pid for line in self._lines if line.pid is not None]

    async def stop(self) -> None:
        """End all processes; texts that are being rendered are not."""
        await asyncio.gather(*(line.stop() for line in self._lines))


def _problem(format_: str, message: str) -> BadContent:
    return BadContent([Problem(f"/{format_}" if format_ else "", message, RULE)])


def _read(answer: object) -> Answer:
    """Raises ValueError for what the process does not say."""
    match answer:
        case ["", dict(made)]:
            return made
        case ["", str(body), None | str() as html]:
            return Rendered(body, html)
        case [str(wrong)]:
            return wrong
    raise ValueError("no answer")
