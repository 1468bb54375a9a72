"""The processes of a benchmark: started on loopback, waited for, measured through /proc, always stopped."""

import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
REPOSITORY = Path(__file__).parent.parent
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Children get these only: no proxy may stand in between, no setting of this shell may leak in, and Python
# caches its byte code (which PYTHONDONTWRITEBYTECODE would forbid) as it does for a user.
KEPT_ENVIRONMENT = {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"}


class PeerError(Exception):
    """A peer could not be installed or started, or does not answer as it should."""


@dataclass(frozen=True)
class Command:
    """How to start a server on `port`; `ready` is the path that answers 200 once it serves."""

    name: str
    argv: list[str]
    port: int
    ready: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The command for a reader on another machine: free ports and directories are placeholders."""
        settings = [f"{name}={_shown(value)}" for name, value in self.environment.items()]
        words = " ".join([*settings, *map(_shown, self.argv)]).replace(str(self.port), "PORT")
        return re.sub(rf"{HOST}:\d+", f"{HOST}:PORT", words)


@dataclass(frozen=True)
class Server:
    """A running server with all its descendants, which share the session it was started in."""

    pid: int
    port: int
    log: Path

    @property
    def condition(self) -> str:
        """Whether it still runs, and the last line it logged: for the report of a failure."""
        zombie_or_gone = all(stat[0] == "Z" for stat in self._stats())
        return f"its process {'has ended' if zombie_or_gone else 'runs'}; last logged: {_last_line(self.log)}"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def stop(self) -> None:
        """End it before its time: connections to it are refused from then on."""
        os.killpg(self.pid, signal.SIGKILL)

    def cpu_seconds(self) -> float:
        """User and system time so far, threads and descendants (dead ones too) included."""
        return sum(sum(map(int, stat[11:15])) for stat in self._stats()) / TICKS_PER_SECOND

    def rss_mb(self) -> float:
        """Resident memory in MB of 10^6 bytes; pages that processes share count once for each."""
        return sum(int(stat[21]) for stat in self._stats()) * PAGE_BYTES / 1e6

    def _stats(self) -> Iterator[list[str]]:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                stat = path.read_text().rpartition(")")[2].split()  # a command's name may hold spaces
                if str(self.pid) in (stat[1], stat[3]):  # its children in sessions of their own render texts
                    yield stat


def machine_cpu_seconds() -> float:
    """What all processes, and the hypervisor for other guests, have used of this machine's CPUs so far."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle, waiting = ticks[3], ticks[4]
    # interrupts count: the kernel charges them to the running process, so the processes' own times include them
    return (sum(ticks[:8]) - idle - waiting) / TICKS_PER_SECOND


def free_port() -> int:
    """A port that is free now; another process may still take it before the caller does."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: Command, directory: Path) -> Iterator[Server]:
    """Start the command in a directory of its own, yield when it is ready, and stop it whatever happens."""
    home = directory / f"{command.name}-{command.port}"
    home.mkdir()
    with (home / "log").open("wb") as log, _process(command, home, log.fileno()) as process:
        _wait_until_ready(command, process, home / "log")
        yield Server(process.pid, command.port, home / "log")


@contextmanager
def _process(command: Command, home: Path, log: int) -> Iterator[subprocess.Popen[bytes]]:
    kept = {name: value for name, value in os.environ.items() if name in KEPT_ENVIRONMENT}
    process = subprocess.Popen(
        command.argv,
        cwd=home,  # no .env and no database of the caller's directory
        env=kept | command.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole session below
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(command: Command, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while not answers(command.port, command.ready):
        if process.poll() is not None or time.monotonic() > deadline:
            raise PeerError(f"did not start: {_last_line(log)}")
        time.sleep(0.005)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return lines[-1][:160]


def answers(port: int, path: str) -> bool:
    """Whether GET path is answered 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _shown(word: str) -> str:
    if word == str(REPOSITORY):
        return "."
    return Path(word).name if word.startswith("/") else word
