"""The server's process: uvicorn around the application, its ports, signals, a clean start and stop."""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from flowbridge import __version__, log
from flowbridge.auth import first_key
from flowbridge.bridge import Core
from flowbridge.limits.proxies import Proxies
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError
from flowbridge.web import file_limit
from flowbridge.web.app import create_app
from flowbridge.web.connections import Connections
from flowbridge.web.protocol import Doors, Protocol

KEEP_ALIVE_SECONDS = 75  # nginx's; with uvicorn's 5 one of 12 requests of Node's agent each 5.0 s met a closed one
MAX_OPERATIONS_CONNECTIONS = 64
STOP_SECONDS = 10


class Server(uvicorn.Server):
    """uvicorn's server with our application. Raises AddressError or SchemaError when made."""

    def __init__(self, settings: Settings, *, timing: Timing | None = None) -> None:
        self.core = Core(settings, timing=timing)
        self._middleware = create_app(settings, self.core)
        files = file_limit.limit()
        self._doors = Doors(
            Connections(Proxies(settings.trusted_proxies).trusts, files=files),
            Connections(lambda _: True, most=MAX_OPERATIONS_CONNECTIONS),
            (b"keep-alive", b"timeout=%d" % KEEP_ALIVE_SECONDS),
        )
        self._files = file_limit.Watch()
        super().__init__(
            uvicorn.Config(
                self._middleware,
                http=cast("type[asyncio.Protocol]", partial(Protocol, self._doors)),
                ws="none",
                lifespan="on",
                access_log=False,  # uvicorn's prints query strings, tokens included; the edge has its own
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self.ready = threading.Event()

    def run_on(self, listener: socket.socket, operations: socket.socket | None = None) -> None:
        """Serve on this socket until told to stop; on `operations` what only the operator asks."""
        self.core.open()  # before the loop, which would keep Ctrl-C from a database that is waited for
        first_key.make(self.core.settings, self.core.database)
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self._main(listener, operations))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._files.look()
        return await super().on_tick(counter)

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

    async def _main(self, listener: socket.socket, operations: socket.socket | None) -> None:
        apart = {}
        if operations is not None:
            self._middleware.operations_port = self._doors.operations_port = operations.getsockname()[1]
            apart = {"operations": url_of(operations)}
        await self.core.locate()
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.core.reload()))
            tune_collector()  # of the whole process, which is the bridge's own then
        homeserver = self.core.settings.base_url
        log.info("serving", url=url_of(listener), **apart, homeserver=homeserver, version=__version__)
        await self.serve(sockets=[listener] if operations is None else [listener, operations])


def tune_collector() -> None:
    """What is there at the start stays: looking it over again takes 80 ms, for which everybody waits.

    Of a large answer, likewise: with the usual thresholds all of 10 MB is looked over many times while it is read.
    """
    gc.set_threshold(10_000, 20, 20)
    gc.freeze()


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

    Raises OSError when the port is taken, SettingsError when that for operations is, and AddressError or SchemaError
    for settings that cannot work.
    """
    log.setup(settings.log_format, settings.log_level)
    file_limit.lift()
    server = Server(settings)
    with contextlib.closing(listen(host, port)) as listener, _operations(settings, host) as operations:
        server.run_on(listener, operations)


@contextlib.contextmanager
def background(
    settings: Settings, host: str = "127.0.0.1", port: int = 0, *, timing: Timing | None = None
) -> Iterator[str]:
    """Serve in a thread while the context lasts; gives the URL. Raises as `serve` does."""
    server = Server(settings, timing=timing)
    with (
        contextlib.closing(listen(host, port)) as listener,
        _operations(settings, host) as operations,
        ThreadPoolExecutor(1) as executor,
    ):
        running = executor.submit(server.run_on, listener, operations)
        running.add_done_callback(lambda _: server.ready.set())
        server.ready.wait()
        try:
            if not running.done():
                yield url_of(listener)
        finally:
            server.should_exit = True
            running.result()


@contextlib.contextmanager
def _operations(settings: Settings, host: str) -> Iterator[socket.socket | None]:
    """The socket for what only the operator asks, if it is apart."""
    port = settings.operations_port
    if port is None:
        yield None
        return
    try:
        listener = listen(host, port)
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(f"FLOWBRIDGE_OPERATIONS_PORT: cannot listen on {host} port {port}: {reason}") from None
    with contextlib.closing(listener):
        yield listener
