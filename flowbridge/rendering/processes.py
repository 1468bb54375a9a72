"""Markdown and HTML are rendered in processes of their own, which may be killed at any time.

No library carries it: pebble's pool, which kills what takes too long, costs the event loop's process 277 µs a message
and the message 3 ms; a socket costs a third of that (docs/architecture.md). A caller has one process at a time, and
callers whose texts killed one share one, so that another stays free.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import cast

from flowbridge import log
from flowbridge.errors import BadContent, Problem, Unavailable
from flowbridge.limits import peer
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter, Place
from flowbridge.limits.tasks import Once
from flowbridge.models import Rendered
from flowbridge.models.timing import Timing
from flowbridge.rendering.child import NO_MEMORY

PROCESSES = 2
WAITING = 256  # texts of one caller: each is held in memory
TURN_SECONDS = 20.0
MAX_SUSPECTS = 10_000
SUSPECT_SECONDS = 60.0
RULE = "render"  # what Problem.schema says for these rules

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


class Rendering:
    """For one event loop. `processes`: how many at a time; the first text starts them."""

    def __init__(self, *, processes: int = PROCESSES, timing: Timing = Timing()) -> None:
        self._most = processes
        self._stuck_seconds = timing.render_seconds
        self._turns = Limiter(_WHAT, processes, 1, waiting=WAITING)
        self._suspects = Cache[str, bool](MAX_SUSPECTS, SUSPECT_SECONDS)
        self._suspect_turns = Limiter(_WHAT, max(1, processes - 1), 1, waiting=WAITING)
        self._idle: list[_Process] = []
        self._alive: set[_Process] = set()
        self._starting = Once[None, None]()
        self._has_stopped = False

    async def render(self, format_: str, source: str, users: Sequence[str]) -> Rendered:
        """Raises BadContent for a text that cannot be rendered, TooMany and Unavailable."""
        request = json.dumps([format_, source, users]).encode()
        caller = peer.who() or "here"
        try:
            # Once more where its process was ended from outside.
            answer = await self._ask(request, caller) or await self._ask(request, caller)
        except _EndedError as error:
            self._suspects.put(caller, True)
            log.warning("render_killed", caller=caller, bytes=len(source), status=error.status)
            raise _problem(format_, _TOO_SLOW if error.status == -signal.SIGPROF else _TOO_BIG) from None
        if answer is None:
            raise Unavailable(_ENDED)
        wrong, *rendered = json.loads(answer)
        if wrong:
            raise _problem(format_, wrong)
        return Rendered(*rendered)

    async def _ask(self, request: bytes, caller: str) -> bytes | None:
        """Raises _EndedError when it was this text that ended the process; None: it ended by itself."""
        places = await self._places(caller)
        try:
            process = await self._take()
        except BaseException:
            _free(places)
            raise
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._stuck_seconds
        timer = loop.call_at(ends_at, process.kill)
        answering = process.ask(request)
        answering.add_done_callback(partial(self._answered, process, places, timer))
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

    def _answered(
        self, process: _Process, places: Sequence[Place], timer: asyncio.TimerHandle, done: "asyncio.Future[bytes]"
    ) -> None:
        timer.cancel()
        if done.exception() is None:
            self._idle.append(process)
        else:
            self._alive.discard(process)
            self._refill()
        _free(places)

    async def _places(self, caller: str) -> list[Place]:
        if not self._suspects.get(caller):
            return [await self._turns.wait(caller, TURN_SECONDS)]
        among_suspects = await self._suspect_turns.wait(caller, TURN_SECONDS)
        try:
            return [among_suspects, await self._turns.wait(caller, TURN_SECONDS)]
        except BaseException:
            among_suspects.free()
            raise

    async def _take(self) -> _Process:
        while True:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:
                    return process
                self._alive.discard(process)  # it was killed meanwhile
            await self._starting.get(None, self._start)

    async def _start(self) -> None:
        """One more process, if there are not enough; the others in the background."""
        if self._has_stopped:
            raise Unavailable(_STOPS)
        if len(self._alive) < self._most:
            try:
                process = await _Process.start()
            except OSError as error:
                raise Unavailable(f"Markdown and HTML cannot be rendered at the moment: {error.strerror}") from None
            if self._has_stopped:
                await process.end()
                raise Unavailable(_STOPS)
            self._alive.add(process)
            self._idle.append(process)
            log.info("render_process", pid=process.pid)
        self._refill()

    def _refill(self) -> None:
        if len(self._alive) < self._most and not self._has_stopped:
            asyncio.get_running_loop().call_soon(self._starting.task, None, self._start)

    async def stop(self) -> None:
        """End all processes; texts that are being rendered are not."""
        self._has_stopped = True
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in self._alive))
        self._idle.clear()


def _free(places: Sequence[Place]) -> None:
    for place in places:
        place.free()


def _problem(format_: str, message: str) -> BadContent:
    return BadContent([Problem(f"/{format_}", message, RULE)])
