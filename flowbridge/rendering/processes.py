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

from flowbridge import log
from flowbridge.errors import BadContent, Problem, Unavailable
from flowbridge.limits import peer
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter
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
_ENDED = "Markdown and HTML cannot be rendered at the moment: the process that does it has ended"
_STUCK = "Markdown and HTML cannot be rendered at the moment: the machine is too busy"


class _EndedError(Exception):
    """The process has ended before its answer; `status`: as subprocess has it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Process:
    """One render process, and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(  # noqa: S603 (our own code)
                [sys.executable, "-E", "-s", "-c", _CODE, *sys.path],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # the terminal's Ctrl-C is for the bridge
            )
        ours.setblocking(False)
        self._socket = ours
        self.pid = self._popen.pid

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    async def ask(self, request: bytes) -> bytes:
        """Raises _EndedError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, len(request).to_bytes(4, "big") + request)
            answer = bytearray()
            while len(answer) < 4 or len(answer) < 4 + int.from_bytes(answer[:4], "big"):
                piece = await loop.sock_recv(self._socket, 65_536)
                if not piece:
                    raise ConnectionError
                answer += piece
            return bytes(answer[4:])
        except ConnectionError:
            self._socket.close()
            raise _EndedError(await asyncio.to_thread(self._popen.wait)) from None

    def kill(self) -> None:
        """End it now; an answer that is waited for will not come."""
        self._popen.kill()

    def end(self) -> None:
        """End it, and forget the socket to it, which no answer is awaited on."""
        self._popen.kill()
        self._popen.wait()
        self._socket.close()


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
        # A caller that goes away does not end it: the process would have to be killed for that.
        return await asyncio.shield(self._in_turn(format_, source, users, peer.who() or "here"))

    async def _in_turn(self, format_: str, source: str, users: Sequence[str], caller: str) -> Rendered:
        if not self._suspects.get(caller):
            return await self._rendered(format_, source, users, caller)
        async with self._suspect_turns.turn(caller, TURN_SECONDS):
            return await self._rendered(format_, source, users, caller)

    async def _rendered(self, format_: str, source: str, users: Sequence[str], caller: str) -> Rendered:
        request = json.dumps([format_, source, users]).encode()
        with await self._turns.wait(caller, TURN_SECONDS):
            try:
                answer = await self._ask(request)
            except _EndedError as error:
                self._suspects.put(caller, True)
                log.warning("render_killed", caller=caller, bytes=len(source), status=error.status)
                message = _TOO_SLOW if error.status == -signal.SIGPROF else _TOO_BIG
                raise _problem(format_, message) from None
        wrong, *rendered = json.loads(answer)
        if wrong:
            raise _problem(format_, wrong)
        return Rendered(*rendered)

    async def _ask(self, request: bytes) -> bytes:
        """Raises _EndedError when it was this text that ended the process."""
        loop = asyncio.get_running_loop()
        for is_last in (False, True):
            process = await self._take()
            ends_at = loop.time() + self._stuck_seconds
            timer = loop.call_at(ends_at, process.kill)  # asyncio.timeout costs three times as much
            try:
                answer = await process.ask(request)
            except _EndedError as error:
                self._alive.discard(process)
                if self._has_stopped:
                    raise Unavailable("the bridge stops") from None
                self._refill()
                if error.status in _OF_THE_TEXT:
                    raise
                if loop.time() >= ends_at:
                    raise Unavailable(_STUCK) from None
                if is_last:
                    raise Unavailable(_ENDED) from None
            else:
                self._idle.append(process)
                return answer
            finally:
                timer.cancel()
        raise AssertionError

    async def _take(self) -> _Process:
        while True:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:
                    return process
                process.end()  # it was killed meanwhile
                self._alive.discard(process)
            await self._starting.get(None, self._start)

    async def _start(self) -> None:
        """One more process, if there are not enough; the others in the background."""
        if self._has_stopped:
            raise Unavailable("the bridge stops")
        if len(self._alive) < self._most:
            try:
                process = await asyncio.to_thread(_Process)
            except OSError as error:
                raise Unavailable(f"Markdown and HTML cannot be rendered at the moment: {error.strerror}") from None
            if self._has_stopped:
                process.end()
                raise Unavailable("the bridge stops")
            self._alive.add(process)
            self._idle.append(process)
            log.info("render_process", pid=process.pid)
        self._refill()

    def _refill(self) -> None:
        if len(self._alive) < self._most and not self._has_stopped:
            asyncio.get_running_loop().call_soon(self._starting.task, None, self._start)

    def stop(self) -> None:
        """End all processes; texts that are being rendered are not."""
        self._has_stopped = True
        for process in self._idle:
            process.end()
        for process in self._alive.difference(self._idle):
            process.kill()  # and whoever awaits its answer reaps it
        self._alive.clear()
        self._idle.clear()


def _problem(format_: str, message: str) -> BadContent:
    return BadContent([Problem(f"/{format_}", message, RULE)])
