"""uvicorn around the application: bounds that uvicorn itself does not have, signals, a clean start and stop."""

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from flowbridge import __version__, first_key, log
from flowbridge.app import create_app
from flowbridge.core import Core
from flowbridge.errors import Errcode
from flowbridge.routes.endpoint import HANG_UP
from flowbridge.settings import Settings

HEAD_SECONDS = 10.0  # for a request line and its headers to arrive
BODY_SECONDS = 20.0  # for a body, or for each further part of it:
BODY_PART_BYTES = 64 * 1024  # so much must come in that time while somebody reads it, which lets an upload take hours
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 4_096
STOP_SECONDS = 10

# llhttp takes whatever follows `Upgrade` for another protocol, and the body is lost. Java's HTTP client offers h2c on
# every first request: under another name the offer is what it should be, an offer that nobody took.
_UPGRADE = re.compile(rb"\nupgrade:", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    """uvicorn's own, with deadlines for the head and the body of a request, a size, and a number of connections."""

    _timer: TimerHandle | None = None
    _head_bytes = 0
    _body_bytes = 0  # since the timer was set
    _in_head = True
    _began = False  # this head began in the segment that ended the request before it

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, Errcode.LIMIT_EXCEEDED, "too many connections")
            return
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if (self._in_head or not self.cycle.more_body) and _UPGRADE.search(data):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(rb"\nx-offered:", head) + end + rest
        super().data_received(data)
        if not self._in_head:
            self._time_the_body(len(data))
            return
        self._head_bytes += 0 if self._began else len(data)
        self._began = False
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, Errcode.TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _time_the_body(self, more: int) -> None:
        self._body_bytes += more
        if self.cycle.response_complete:  # bytes behind an answer: uvicorn has stopped its own clock for them
            if self._timer is None:
                self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not self.cycle.more_body:
            self._stop_timer()
        elif self._timer is None:
            self._expect_a_part()

    def _expect_a_part(self) -> None:
        self._body_bytes = 0
        self._timer = self.loop.call_later(BODY_SECONDS, self._too_slow)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._began = self._is_busy()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.url = self.url.replace(b"#", b"%23")  # no request has a fragment (RFC 9112): this is a room alias
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        self.scope[HANG_UP] = partial(self._hang_up, self.cycle)  # type: ignore[literal-required]

    def _hang_up(self, cycle: RequestResponseCycle) -> None:
        """End the connection in the middle of an answer: what is missing is seen to be missing."""
        cycle.disconnected = True  # uvicorn need not wonder why the answer has no end
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, Errcode.UNKNOWN, "this is not an HTTP/1.1 request")

    def _too_slow(self) -> None:
        self._timer = None
        if not self._in_head and self.cycle.response_complete:
            self.transport.close()  # answered before its body had come: nobody reads that any more
            return
        if not self._in_head and (self.flow.read_paused or self._body_bytes >= BODY_PART_BYTES):
            self._expect_a_part()  # it is we who do not read, or enough has come
            return
        what, seconds = ("headers", HEAD_SECONDS) if self._in_head else ("body", BODY_SECONDS)
        self._refuse(408, Errcode.UNKNOWN, f"the {what} did not arrive within {seconds:g} s")

    def _is_busy(self) -> bool:
        """Whether a request has come whose answer has not gone out yet."""
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's None before the first request
        return cycle is not None and not cycle.response_complete

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, errcode: Errcode, error: str) -> None:
        """Answer by hand, since no request came to be, and hang up. Any web page may read it, whatever was asked."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._is_busy() and not self.cycle.more_body:
            self.transport.pause_reading()
            self.pipeline.clear()
            self.cycle.keep_alive = False  # a whole request is at work: its answer first, then hang up
            return
        if self._is_busy() and self.cycle.response_started:
            self._hang_up(self.cycle)  # nothing else can be said in the middle of an answer
            return
        body = json.dumps({"errcode": errcode, "error": error}).encode()
        self.transport.write(
            b"%bcontent-type: application/json\r\naccess-control-allow-origin: *\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b" % (STATUS_LINE[status], len(body), body)
        )
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with our application. Raises AddressError or SchemaError when made."""

    def __init__(self, settings: Settings) -> None:
        self.core = Core(settings)
        app = create_app(settings, self.core)
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="on",
                access_log=False,  # uvicorn's prints query strings, tokens included; the edge has its own
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self.ready = threading.Event()

    def run_on(self, listener: socket.socket) -> None:
        """Serve on this socket until told to stop."""
        self.core.open()  # before the loop, which would keep Ctrl-C from a database that is waited for
        first_key.make(self.core.settings, self.core.database)
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self._main(listener))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that is obeyed is not raised once more at the end, as uvicorn does: the exit code is 0."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Requests at work may end; before their time is up, who waits for an outcome is told that it is accepted.

        Long polls and live streams end at once.
        """
        self.core.relay.stopping.set()
        self.core.history.hush()
        self.core.live.stop()
        asyncio.get_running_loop().call_later(STOP_SECONDS / 2, self.core.courier.hush)
        await super().shutdown(sockets)

    async def _main(self, listener: socket.socket) -> None:
        await self.core.locate()
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.core.reload()))
        gc.freeze()  # what is there at the start stays: looking it over again takes 80 ms, for which everybody waits
        log.info("serving", url=url_of(listener), homeserver=self.core.settings.base_url, version=__version__)
        await self.serve(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2_048)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP learns the homeserver's address again, and the bot's token.

    Raises OSError when the port is taken, and AddressError or SchemaError for settings that cannot work.
    """
    log.setup(settings.log_format, settings.log_level)
    server = Server(settings)
    with contextlib.closing(listen(host, port)) as listener:
        server.run_on(listener)


@contextlib.contextmanager
def background(settings: Settings, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread while the context lasts; gives the URL. Raises as `serve` does."""
    server = Server(settings)
    with contextlib.closing(listen(host, port)) as listener, ThreadPoolExecutor(1) as executor:
        running = executor.submit(server.run_on, listener)
        running.add_done_callback(lambda _: server.ready.set())
        server.ready.wait()
        try:
            if not running.done():
                yield url_of(listener)
        finally:
            server.should_exit = True
            running.result()
