"""Processes that tests start: the bridge, its commands, and the judge's programs, all on loopback."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import httpx

from tests.forked import Forked
from tests.patience import PATIENCE

REPOSITORY = Path(__file__).parents[1]
FLOWBRIDGE = str(Path(sys.executable).with_name("flowbridge"))
TIED = str(Path(__file__).with_name("tied.py"))
COMMAND_SECONDS = 4 * PATIENCE  # the demo starts a homeserver
Running: TypeAlias = "subprocess.Popen[str] | Forked"
# Children get only these of our variables: no setting of this shell may leak into a bridge.
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: these settings, and what every program needs.

    Encryption is tested where a test asks for it: by default the bridge would, since its library is installed here.
    """
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "FLOWBRIDGE_ENCRYPTED_ROOMS": "refuse", **settings}


def run(*arguments: str, stdin: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    """`flowbridge` with these arguments, to its end; forked: tests/forked.py."""
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
        streams["stdin"].write_text(stdin)
        process = Forked(arguments, environment(settings), **streams)
        try:
            code = process.wait(COMMAND_SECONDS)
        finally:
            process.kill()
        said = [streams[name].read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(["flowbridge", *arguments], code, *said)


def run_installed(*arguments: str, stdin: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    """The same, by the command as it is installed."""
    return subprocess.run(
        [FLOWBRIDGE, *arguments],
        env=environment(settings),
        input=stdin,
        text=True,
        capture_output=True,
        timeout=COMMAND_SECONDS,
    )


@contextmanager
def serving(*, log: Path | None = None, cwd: Path | None = None, **settings: str) -> Iterator[tuple[str, Running]]:
    """A running `flowbridge serve`: its URL and process; forked, as `run`."""
    with serving_at(free_port(), settings, log=log, cwd=cwd) as found:
        yield found


@contextmanager
def serving_installed(
    *, log: Path | None = None, cwd: Path | None = None, **settings: str
) -> Iterator[tuple[str, Running]]:
    """The same, by the command as it is installed."""
    with serving_at(free_port(), settings, log=log, cwd=cwd, installed=True) as found:
        yield found


@contextmanager
def serving_at(
    port: int,
    settings: Mapping[str, str],
    *,
    log: Path | None = None,
    cwd: Path | None = None,
    installed: bool = False,
) -> Iterator[tuple[str, Running]]:
    """The same, on a port that the test chooses."""
    command = ["serve", "--port", str(port)]
    process: Running
    if installed:
        with (log or Path(os.devnull)).open("w") as errors:
            process = subprocess.Popen(
                [FLOWBRIDGE, *command], env=environment(settings), cwd=cwd, stderr=errors, text=True
            )
    else:
        process = Forked(command, environment(settings), cwd=cwd, stderr=log or Path(os.devnull))
    try:
        yield _answering(f"http://127.0.0.1:{port}", process), process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _answering(url: str, process: Running) -> str:
    deadline = (
        time.monotonic() + 2 * PATIENCE
    )  # a start takes one second of processor time, and took 35 s on a busy machine
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/healthz", trust_env=False).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return url
    raise AssertionError("flowbridge serve does not answer")


@dataclass
class Process:
    """A command that can be started repeatedly; its output is appended to one log.

    `prefix`: words before the command, for instance another mount namespace's; no process in between.
    """

    name: str
    argv: list[str]
    environment: dict[str, str]
    directory: Path
    prefix: tuple[str, ...] = ()
    starts: int = 0
    child: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*self.prefix, sys.executable, "-I", "-S", TIED, str(os.getpid()), *self.argv],
                env=environment(self.environment),
                cwd=self.directory,  # where there is no .env
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only us, and we end it below
            )
        self.starts += 1

    @property
    def exit_code(self) -> int | None:
        """That of the last run; None while it runs."""
        return self.child.poll() if self.child is not None else None

    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    async def gone(self, seconds: float) -> bool:
        """Whether it ends by itself in time."""
        assert self.child is not None
        try:
            await asyncio.to_thread(self.child.wait, seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def rss_mb(self) -> float:
        """Resident memory in MB of 10^6 bytes; 0.0 where there is no /proc."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, AssertionError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][:200] if lines else "it said nothing"


def free_port() -> int:
    """A port that stays free while its server is away: none that outgoing connections are given (32768 and up)."""
    for port in random.sample(range(18_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port on loopback")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used. Unlike the clock, other load does not change it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def family_cpu_seconds(pid: int) -> float:
    """The same of a process with its children, also of those that have ended."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile: its parent has its time
            stat = path.read_text().rpartition(")")[2].split()
            if path.parent.name == str(pid):
                found += sum(map(int, stat[11:15]))
            elif stat[1] == str(pid):
                found += int(stat[11]) + int(stat[12])
    return found / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
