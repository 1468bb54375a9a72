"""flowbridge as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.chaos.processes import free_port as free_port
from tests.patience import PATIENCE

FLOWBRIDGE = str(Path(sys.executable).with_name("flowbridge"))
SETTINGS = ("BASE_URL", "ACCESS_TOKEN", "FLOWBRIDGE_")


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {**kept, **settings}


def run(*arguments: str, stdin: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [FLOWBRIDGE, *arguments],
        env=_environment(settings),
        input=stdin,
        text=True,
        capture_output=True,
        timeout=4 * PATIENCE,  # the demo starts a homeserver
    )


@contextmanager
def serving(
    *, log: Path | None = None, cwd: Path | None = None, **settings: str
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A running `flowbridge serve`: its URL and process."""
    with serving_at(free_port(), settings, log=log, cwd=cwd) as found:
        yield found


@contextmanager
def serving_at(
    port: int, settings: Mapping[str, str], *, log: Path | None = None, cwd: Path | None = None
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The same on a port that the test chooses."""
    command = [FLOWBRIDGE, "serve", "--port", str(port)]
    with (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(command, env=_environment(settings), cwd=cwd, stderr=errors, text=True)
    try:
        yield _answering(f"http://127.0.0.1:{port}", process), process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _answering(url: str, process: "subprocess.Popen[str]") -> str:
    deadline = time.monotonic() + 2 * PATIENCE  # a start takes one second of work: 35 s were seen on a busy machine
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/healthz", trust_env=False).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return url
    raise AssertionError("flowbridge serve does not answer")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used: unlike the clock, no other process takes part in it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
