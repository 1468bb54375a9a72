"""The processes of a run: on loopback, logged, and never outliving whoever started them."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Children get these only: no setting of this shell may leak into a bridge.
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
TIED = str(Path(__file__).with_name("tied.py"))


@dataclass
class Process:
    """A command that can be started over and over; its output is appended to one log.

    `prefix`: words before it that take it elsewhere, without a process in between.
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
        kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        kept["PYTHONPATH"] = str(REPOSITORY)
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*self.prefix, sys.executable, "-I", "-S", TIED, str(os.getpid()), *self.argv],
                env=kept | self.environment,
                cwd=self.directory,  # where there is no .env
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it below
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
        """Whether it ends by itself within that time."""
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


def temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="flowbridge-chaos-"))
