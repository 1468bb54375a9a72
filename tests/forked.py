"""`flowbridge`, forked from a process that has imported it, and the packages that it uses.

A command takes 0.6 s of processor time to start, and `serve` a whole second, nearly all of it for modules, which are
the same each time; forked, 0.1 s. The tests start some five hundred. All else is as in a process that the installed
command starts: arguments, environment, folder, streams, signals and exit code are the command's own, and our modules
learn nothing of the process that imports them (tests/acceptance/test_forked.py). Tests of the installed command itself
start that: `run_installed`, `serving_installed`.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGKILL, SIGTERM

PACKAGES = [
    "alembic.command",
    "asyncio",
    "cryptography.fernet",
    "dotenv",
    "fastapi.openapi.docs",
    "httptools",
    "jsonschema_rs",
    "prometheus_client",
    "psycopg",
    "pydantic_settings",
    "rich.console",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.sql",
    "typer.rich_utils",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
]
OURS = ["flowbridge.cli.main", "flowbridge.web.server"]  # and all that they import at once
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PACKAGES, *OURS])
_lock = threading.Lock()  # multiprocessing reads the exit code of any process whenever it starts another


class Forked:
    """Like subprocess.Popen, of `flowbridge` with these arguments. Its streams are files, written anew."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        cwd: Path | None = None,
        stdin: Path = Path(os.devnull),
        stdout: Path = Path(os.devnull),
        stderr: Path = Path(os.devnull),
    ) -> None:
        streams = [str(path.absolute()) for path in (stdin, stdout, stderr)]
        what = (tuple(arguments), dict(environment), str((cwd or Path()).absolute()), streams)
        self._process = _context.Process(target=_become, args=what, daemon=True)
        with _lock:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("flowbridge", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        self.send_signal(SIGKILL)


def _become(arguments: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[str]) -> None:
    """In the child: what exec would have done, and the script that pip installs."""
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY if number else os.O_RDONLY, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(Path(sys.executable).with_name("flowbridge")), *arguments]
    gc.freeze()
    from flowbridge.cli.main import main

    main()
