"""`flowbridge demo`: what flowbridge does, on this machine, without any setup."""

import io
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from types import FrameType

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.text import Text

from flowbridge import events as catalogue
from flowbridge.cli import FAILED, INTERRUPTED
from flowbridge.cli.demo import tour
from flowbridge.cli.demo.examples import load_examples
from flowbridge.cli.demo.synapse import LocalSynapse, SynapseError
from flowbridge.settings import Settings
from flowbridge.web.server import background


def demo(*, once: bool, port: int) -> int:
    """Run the tour against a real Synapse, then serve until Ctrl-C or SIGTERM; with `once` stop after the tour.

    Returns the exit code: 0, 1 when a row failed or the homeserver refused a request, 130 when interrupted
    before the table was complete. Synapse, the bridge and their files are gone when it returns.
    """
    console = _console()
    try:
        with _signals_as_interrupt():
            return _demo(console, once=once, port=port)
    except (SynapseError, httpx.HTTPError) as error:
        _say(console, str(error))
        return FAILED
    except KeyboardInterrupt:
        _say(console, "Stopped before the end.")
        return INTERRUPTED


def _demo(console: Console, *, once: bool, port: int) -> int:
    _say(console, "Starting a real Synapse on this machine …")
    with LocalSynapse() as homeserver, TemporaryDirectory(prefix="flowbridge-demo-") as folder:
        # The names of the guide's examples: its memberships need no change.
        bot, friend = homeserver.register("example"), homeserver.register("myfriend")
        key = f"fb_{secrets.token_urlsafe(32)}"
        # Not from the environment, whose BASE_URL and account are those of a real homeserver.
        settings = Settings.model_construct(
            base_url=homeserver.url,
            access_token=SecretStr(bot.access_token),
            api_keys=(SecretStr(key),),
            database_url=SecretStr(f"sqlite:///{folder}/flowbridge.db"),
        )
        examples = load_examples(catalogue.built_in())
        with background(settings, port=_usable(port, console)) as url:
            _say(console, f"Synapse answers at {homeserver.url}, flowbridge at {url}")
            good = tour.run(url, homeserver, key, bot, friend, examples, console, hints=not once)
            if not once:
                with suppress(KeyboardInterrupt):
                    threading.Event().wait()
                _say(console, "Stopping …")
    return 0 if good else FAILED


def _console() -> Console:
    """Wide enough for whole event ids without a terminal; a ✓ that cannot be encoded is no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _usable(port: int, console: Console) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            _say(console, f"Port {port} is taken on this machine: flowbridge takes a free one.")
            return 0
    return port


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does, so that it is cleaned up."""
    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = [signal.signal(number, _interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
