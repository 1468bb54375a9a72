"""Markdown and HTML are rendered in processes of their own, which may be killed at any time.

No library carries it: pebble's pool, which kills what takes too long, costs the event loop's process 277 µs a text and
the text 3 ms; a socket costs a third of that (docs/architecture.md). Three processes, each started when it is needed:
short texts wait for no long one, and webhooks have one of their own.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from flowbridge import log
from flowbridge.errors import BadContent, Problem, Unavailable
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter, Place
from flowbridge.limits.tasks import Once
from flowbridge.models import Rendered
from flowbridge.models.hooks import Made, Said
from flowbridge.models.timing import Timing
from flowbridge.rendering.child import NO_MEMORY

SHORT_BYTES = 2_560  # of a request: 2 KiB of the worst text take 4 ms of the processor, 32 KiB of it 40 ms
HOOK_BYTES = 64 * 1024  # of a request to a hook: GitHub's largest usual ones are 30 kB, and take 1 ms
WAITING = 256  # texts of one caller: each is held in memory
TURN_SECONDS = 20.0
RULE = "render"  # what Problem.schema says for these rules
KILLED = "/body"  # the pointer of a request to a hook that took too long, or too much memory

_OF_THE_TEXT = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, NO_MEMORY)  # too much processor time, or memory
_WHAT = "texts that are being rendered"
# The environment and the search path come from us: there may be tokens in the one, and the other may not be the usual.
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from flowbridge.rendering.child import serve; serve()"
_TOO_SLOW = "takes more than a second to render: make it simpler, or send it as `text`"
_TOO_BIG = "needs too much memory to render: make it simpler, or send it as `text`"
_STOPS = "the bridge stops"
_ENDED = "Markdown and HTML cannot be rendered at the moment: the process that does it has ended"
_STUCK = "Markdown and HTML cannot be rendered at the moment: the machine is too busy"


class _EndedError(Exception):
    """The process has ended before its answer; `status`: as subprocess has it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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
        self._answering: asyncio.Future[bytes] | None = None
        self._reaping: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls) -> "_Process":
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.to_thread(cls, theirs)
        await asyncio.get_running_loop().create_connection(lambda: process, sock=ours)
        return process

    def ask(self, request: bytes) -> "asyncio.Future[bytes]":
        """The answer, or _EndedError. One at a time."""
        self._answering = answering = asyncio.get_running_loop().create_future()
        self._transport.write(len(request).to_bytes(4, "big") + request)
        return answering

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
        self._received += data
        received, answering = self._received, self._answering
        if len(received) >= 4 and len(received) == 4 + int.from_bytes(received[:4], "big"):
            self._received, self._answering = bytearray(), None
            if answering is not None and not answering.done():
                answering.set_result(bytes(received[4:]))

    def connection_lost(self, _: Exception | None) -> None:
        self.is_alive = False
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        status = await asyncio.to_thread(self._popen.wait)
        if self._answering is not None and not self._answering.done():
            self._answering.set_exception(_EndedError(status))


class _Line:
    """Texts that share one process: one at a time, and callers take turns. `stuck_seconds`: for one text, at most."""

    def __init__(self, stuck_seconds: float) -> None:
        self._stuck_seconds = stuck_seconds
        self._turns = Limiter(_WHAT, 1, 1, waiting=WAITING)
        self._process: _Process | None = None
        self._starting = Once[None, None]()
        self._has_stopped = False

    @property
    def pid(self) -> int | None:
        """Of its process, if there is one at the moment."""
        return self._process.pid if self._process is not None and self._process.is_alive else None

    async def ask(self, request: bytes, caller: str) -> bytes | None:
        """Raises _EndedError when it was this text that ended the process; None: it ended by itself."""
        place = await self._turns.wait(caller, TURN_SECONDS)
        try:
            process = await self._take()
        except BaseException:
            place.free()
            raise
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._stuck_seconds
        timer = loop.call_at(ends_at, process.kill)
        answering = process.ask(request)
        answering.add_done_callback(partial(self._answered, place, timer))
        try:
            # A caller that goes away ends nothing: the process would have to be killed for that.
            return await asyncio.shield(answering)
        except _EndedError as error:
            if self._has_stopped:
                raise Unavailable(_STOPS) from None
            if error.status in _OF_THE_TEXT:
                raise
            if loop.time() >= ends_at:
                raise Unavailable(_STUCK) from None
            return None

    def _answered(self, place: Place, timer: asyncio.TimerHandle, done: "asyncio.Future[bytes]") -> None:
        timer.cancel()
        place.free()
        if done.exception() is not None and not self._has_stopped:
            self._starting.task(None, self._start)  # so that the next text need not wait for it

    async def _take(self) -> _Process:
        if self._process is None or not self._process.is_alive:
            await self._starting.get(None, self._start)
        assert self._process is not None
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


class Rendering:
    """For one event loop."""

    def __init__(self, *, timing: Timing = Timing()) -> None:
        self._short, self._long, self._hooks = self._lines = [_Line(timing.render_seconds) for _ in range(3)]

    async def render(self, format_: str, source: str, users: Sequence[str]) -> Rendered:
        """Raises BadContent for a text that cannot be rendered, TooMany and Unavailable."""
        request = json.dumps([format_, source, users]).encode()
        line = self._short if len(request) <= SHORT_BYTES else self._long
        return Rendered(*await self._ask(line, format_, request))

    async def webhook(self, body: str, given: Mapping[str, Any]) -> Made:
        """What a request to a hook becomes; `given`: see `webhooks.webhook`.

        Raises BadContent for one that cannot be read, or whose template takes too long (then `plain` helps), TooMany
        and Unavailable. Built-in templates take 0.2 ms; a template of the hook's own may take a second.
        """
        encode = partial(_encoded, body, given)
        request = await asyncio.to_thread(encode) if len(body) > HOOK_BYTES else encode()
        line = self._hooks if len(request) <= HOOK_BYTES and not given["template"] else self._long
        found = json.loads((await self._ask(line, KILLED[1:], request))[0])
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
        request = json.dumps(["template", source, {"template": dict(template), "per": per}]).encode()
        try:
            found = json.loads((await self._ask(self._long, "template", request))[0])
        except BadContent as error:
            return list(error.problems), []
        return [Problem(f"/template/{member}", text, RULE) for member, text in found["wrong"]], found["warnings"]

    async def _ask(self, line: _Line, what: str, request: bytes) -> Sequence[Any]:
        caller = peer.who() or "here"
        try:
            # Once more where its process was ended from outside.
            answer = await line.ask(request, caller) or await line.ask(request, caller)
        except _EndedError as error:
            log.warning("render_killed", caller=caller, bytes=len(request), status=error.status)
            raise _problem(what, _TOO_SLOW if error.status == -signal.SIGPROF else _TOO_BIG) from None
        if answer is None:
            raise Unavailable(_ENDED)
        wrong, *rendered = json.loads(answer)
        if wrong:
            raise _problem(what, wrong)
        return cast("list[Any]", rendered)

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return [line.pid for line in self._lines if line.pid is not None]

    async def stop(self) -> None:
        """End all processes; texts that are being rendered are not."""
        await asyncio.gather(*(line.stop() for line in self._lines))


def _encoded(body: str, given: Mapping[str, Any]) -> bytes:
    return json.dumps(["webhook", body, given]).encode()


def _problem(format_: str, message: str) -> BadContent:
    return BadContent([Problem(f"/{format_}" if format_ else "", message, RULE)])
