"""The server process: uvicorn around the application, its ports and signals, a clean start and stop."""

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
from flowbridge.web.connections import MAX_CONNECTIONS, Connections
from flowbridge.web.protocol import Ports, Protocol
from flowbridge.web.service_manager import ServiceManager
from flowbridge.web.usual_hook import UsualHooks
from flowbridge.web.usual_send import UsualSends

MAX_OPERATIONS_CONNECTIONS = 64


class Server(uvicorn.Server):
    """uvicorn's server with our application. Raises AddressError or SchemaError when made."""

    def __init__(
        self, settings: Settings, *, timing: Timing | None = None, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self.core = Core(settings, timing=timing)
        timing = self.core.timing
        self._middleware = create_app(settings, self.core)
        trusts = Proxies(settings.trusted_proxies).trusts
        self._ports = Ports(
            Connections(trusts, most=max_connections, files=file_limit.limit()),
            Connections(lambda _: True, most=MAX_OPERATIONS_CONNECTIONS),
            timing,
            () if settings.cors_origins else (UsualSends(self.core), UsualHooks(self.core)),
        )
        self._files = file_limit.Watch()
        self._manager = ServiceManager()
        super().__init__(
            uvicorn.Config(
                self._middleware,
                http=cast("type[asyncio.Protocol]", partial(Protocol, self._ports)),
                ws="none",
                lifespan="on",
                access_log=False,  # uvicorn's contains query strings, and so tokens; the middleware logs
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=timing.keep_alive_seconds,
                timeout_graceful_shutdown=timing.stop_seconds,
            )
        )
        self.ready = threading.Event()

    def run_on(self, listener: socket.socket, operations: socket.socket | None = None) -> None:
        """Serve on this socket until told to stop, and the operator's endpoints on `operations`."""
        self.core.open()  # before the loop, which would keep Ctrl-C from ending the wait for a database
        first_key.make(self.core.settings, self.core.database)
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self._main(listener, operations))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()
        if sockets:
            self._manager.ready(url_of(sockets[0]))

    async def on_tick(self, counter: int) -> bool:
        self._manager.alive()
        if counter % 10 == 0:
            self._files.check()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. uvicorn would raise the signal again at the end; the exit code is to be 0."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests in flight end. Half-way, callers that wait for an outcome hear that their event is accepted.

        Long polls and live streams end at once.
        """
        self._manager.stopping()
        self.core.relay.stopping.set()
        self.core.history.stop()
        self.core.live.stop()
        asyncio.get_running_loop().call_later(self.core.timing.stop_seconds / 2, self.core.worker.release_waiters)
        await super().shutdown(sockets)

    async def _main(self, listener: socket.socket, operations: socket.socket | None) -> None:
        apart = {}
        if operations is not None:
            self._middleware.operations_port = self._ports.operations_port = operations.getsockname()[1]
            apart = {"operations": url_of(operations)}
        await self.core.locate()
        await self.core.administration.check_file(self.core.registry.fixed)
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.core.reload()))
            tune_collector()  # for the whole process, which belongs to the bridge then
        homeserver = self.core.settings.base_url
        through = {"proxy": self.core.locator.proxy} if self.core.locator.proxy else {}
        log.info("serving", url=url_of(listener), **apart, homeserver=homeserver, **through, version=__version__)
        await self.serve(sockets=[listener] if operations is None else [listener, operations])


def tune_collector() -> None:
    """Collect less often, and never what was there at the start: a pass over that stops every request for 80 ms.

    With the usual thresholds an answer of 10 MB is traversed many times while it is parsed.
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
    """Serve until SIGINT or SIGTERM. SIGHUP reloads the homeserver's address, the bot's token, and hooks.yaml.

    Raises OSError when the port is taken, SettingsError when the operations port is, and AddressError or SchemaError
    for settings that cannot work.
    """
    log.setup(settings.log_format, settings.log_level)
    for name, meant in Settings.misnamed().items():
        log.warning("unknown_setting", name=name, hint=f"set {meant}" if meant else "no setting has this name")
    if "base_url" not in settings.model_fields_set:
        log.warning("default_homeserver", base_url=settings.base_url, hint="set BASE_URL to your homeserver")
    if name := settings.unused_proxy:
        log.warning("proxy_not_used", name=name, hint="if the homeserver is behind it, set FLOWBRIDGE_PROXY")
    file_limit.raise_limit()
    server = Server(settings)
    with contextlib.closing(listen(host, port)) as listener, _operations(settings, host) as operations:
        server.run_on(listener, operations)


@contextlib.contextmanager
def background(
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    timing: Timing | None = None,
    max_connections: int = MAX_CONNECTIONS,
) -> Iterator[str]:
    """Serve in a thread while the context lasts, and yield the URL. Raises what `serve` raises."""
    server = Server(settings, timing=timing, max_connections=max_connections)
    with (
        contextlib.closing(listen(host, port)) as listener,
        _operations(settings, host) as operations,
        ThreadPoolExecutor(1, thread_name_prefix="flowbridge-serve") as executor,
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
    """The socket for the operator's endpoints, if they have a port of their own."""
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
