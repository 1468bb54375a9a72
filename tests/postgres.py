"""A real PostgreSQL on a loopback port, in a temporary directory, which tests and the judge kill and start again."""

import inspect
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import URL, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from tests.processes import free_port

START_SECONDS = 180  # it takes two, and many more on a busy machine
STOP_SECONDS = 60
TRIES_FOR_A_PORT = 5
DRIVER = "postgresql+psycopg"

# Durable as in production, but small. Shared memory in files goes with the directory; in /dev/shm it would
# stay behind a server that was killed.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",
    "logging_collector": "off",
}


class PostgresError(RuntimeError):
    """The PostgreSQL of the tests could not do what was asked; the message says why, for people to read."""


class _PortTakenError(PostgresError):
    """Another process took the port between its choice and the server's start."""


class LocalPostgres:
    """A PostgreSQL of its own: `with LocalPostgres() as server: server.url`.

    With `TEST_DATABASE_URL` set, that server is used instead, in databases made there and dropped at the end;
    kill, stop and start then raise PostgresError. `private=True` is for tests that need those: it does not look
    at the variable. Entering raises PostgresError, with the end of the log, when there is no server to be had.
    Leaving ends it and removes its directory; so does the death of this process, by kill -9 too.
    """

    def __init__(self, *, private: bool = False) -> None:
        self._given = None if private else _given_url()
        self._private = private
        self._made: list[str] = []
        self._guard: subprocess.Popen[str] | None = None
        self._pid: int | None = None
        self._port: int | None = None
        self._directory: Path | None = None
        self._url: URL | None = None

    def __enter__(self) -> Self:
        if why := why_unavailable(private=self._private):
            raise PostgresError(why)
        try:
            if self._given is None:
                self._make_cluster()
                self._start_on_a_free_port()
            self._url = self._new_database("flowbridge" if self._given is None else _random_name())
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    @property
    def url(self) -> str:
        """`postgresql+psycopg://postgres@127.0.0.1:PORT/flowbridge`; the same for the object's whole life."""
        if self._url is None:
            raise PostgresError("This PostgreSQL has no address before it is entered.")
        return self._url.render_as_string(hide_password=False)

    @property
    def directory(self) -> Path:
        """Where the data, the socket and the log are."""
        self._must_be_ours("look into")
        assert self._directory is not None
        return self._directory

    @property
    def pid(self) -> int | None:
        """The postmaster's process, to signal or measure it; None while it is stopped."""
        return self._pid

    def fresh_database(self) -> str:
        """The address of a new, empty database on this server."""
        return self._new_database(_random_name()).render_as_string(hide_password=False)

    def start(self) -> None:
        """Run the server on its port and data, and return when it answers; does nothing if it runs already.

        After a kill this takes crash recovery in.
        """
        self._must_be_ours("start")
        if self._pid is not None:
            if self._exit_code_unless_it_answers() is None:
                return
            self.kill()  # it was ended from outside: its children must be gone before
        settings = SETTINGS | {"port": str(self._port), "unix_socket_directories": str(self.directory)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._pid = int(self._ask("run", str(_binaries() / "postgres"), "-D", str(self.directory / "data"), *options))
        try:
            if (code := self._exit_code_unless_it_answers()) is not None:
                raise self._failure(f"ended with exit code {code}")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server in order, cutting its connections, and keep its data; killed when that takes over 60 s."""
        self._must_be_ours("stop")
        if not self._end("stop"):
            self.kill()

    def abort(self) -> None:
        """End the server at once, as its "immediate" does: nothing is written out, connections are dropped."""
        self._must_be_ours("abort")
        if not self._end("abort"):
            self.kill()

    def kill(self) -> None:
        """kill -9 the server, all of its processes, and return when the last of them is gone.

        For the postmaster's death alone, send a signal to `pid`; start then waits for the others.
        """
        self._must_be_ours("kill")
        if not self._end("kill"):
            raise PostgresError(f"Processes of the killed PostgreSQL still run after {STOP_SECONDS} s.")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of what the server printed since its last start."""
        with suppress(FileNotFoundError):
            return "\n".join((self.directory / "log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _make_cluster(self) -> None:
        owner = _owner()
        self._directory = Path(tempfile.mkdtemp(prefix="flowbridge-pg-", dir=_base_directory()))
        if owner is not None:
            os.chown(self._directory, *owner)
        self._guard = _launch_guard(self._directory, owner)
        initdb = [str(_binaries() / "initdb"), "-D", str(self._directory / "data"), "-U", "postgres"]
        # trust: for the socket, in a directory closed to others, and for loopback. No sync: only what
        # tests commit has to last, and those commits are synced by the server.
        initdb += ["--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        self._ask("run", *initdb)
        if (code := self._ask("wait", START_SECONDS)) != 0:
            raise self._failure("could not be made: initdb " + ("hangs" if code is None else f"ended with {code}"))

    def _start_on_a_free_port(self) -> None:
        for remaining in reversed(range(TRIES_FOR_A_PORT)):
            self._port = free_port()
            try:
                self.start()
            except _PortTakenError:
                if not remaining:
                    raise
            else:
                return

    def _exit_code_unless_it_answers(self) -> int | None:
        """Waits for either. Asks over the socket in our own directory: on the port, another server might answer."""
        place = {"host": str(self.directory), "port": str(self._port), "connect_timeout": "5"}
        url = URL.create(DRIVER, username="postgres", database="postgres", query=place)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if (code := self._ask("poll")) is not None:
                return int(code)
            with suppress(OperationalError):
                execute(url, "SELECT 1")
                return None
            time.sleep(0.02)
        raise self._failure(f"did not answer within {START_SECONDS} s")

    def _end(self, how: str) -> bool:
        """Whether all of the server's processes are gone within 60 s of this."""
        if self._pid is None:
            return True
        self._ask(how)
        if self._ask("wait", STOP_SECONDS) is None:
            return False
        self._pid = None
        return True

    def _new_database(self, name: str) -> URL:
        admin = self._given or URL.create(DRIVER, "postgres", host="127.0.0.1", port=self._port, database="postgres")
        try:
            execute(admin, f'CREATE DATABASE "{name}"')
        except DBAPIError as error:
            raise PostgresError(
                f"PostgreSQL at {admin.host or 'its socket'} makes no database: {error.orig}"
            ) from error
        self._made.append(name)
        return admin.set(database=name)

    def _must_be_ours(self, what: str) -> None:
        if self._given is not None:
            raise PostgresError(f"TEST_DATABASE_URL's server is not ours to {what}: LocalPostgres(private=True) is.")
        if self._directory is None:
            raise PostgresError(f"There is no PostgreSQL to {what} before this one is entered.")

    def _failure(self, what: str) -> PostgresError:
        tail = self.log_tail()
        kind = _PortTakenError if "Address already in use" in tail else PostgresError
        return kind(f"The local PostgreSQL {what}. The end of its log:\n{tail or '(empty)'}")

    def _ask(self, *request: str | int) -> Any:
        if self._guard is None or self._guard.stdin is None or self._guard.stdout is None:
            raise PostgresError("This PostgreSQL has been left; nothing more can be done with it.")
        with suppress(BrokenPipeError):
            self._guard.stdin.write(json.dumps(request) + "\n")
            self._guard.stdin.flush()
        if not (answer := self._guard.stdout.readline()):
            raise PostgresError(f"The process that guards the local PostgreSQL has ended: {self.log_tail()}")
        return json.loads(answer)

    def _clean_up(self) -> None:
        if self._given is not None:
            while self._made:
                execute(self._given, f'DROP DATABASE IF EXISTS "{self._made.pop()}" WITH (FORCE)')
        guard, self._guard, self._pid = self._guard, None, None
        if guard is not None:
            with guard:  # leaving closes its stdin, and waits for it
                pass
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def why_unavailable(*, private: bool = False) -> str | None:
    """One sentence, for people, when no PostgreSQL can be had here; `private`: none that may be killed."""
    if not private and os.environ.get("TEST_DATABASE_URL"):
        return None
    try:
        _binaries()
        _owner()
    except PostgresError as error:
        return str(error)
    return None


def _given_url() -> URL | None:
    if not (given := os.environ.get("TEST_DATABASE_URL")):
        return None
    try:
        return make_url(given).set(drivername=DRIVER)
    except (ArgumentError, ValueError):
        # Without the cause: it quotes the address, which may hold a password.
        raise PostgresError(
            "TEST_DATABASE_URL is no database address; it looks like postgresql://user:password@host:5432/name."
        ) from None


def _binaries() -> Path:
    """The directory of initdb and postgres; Debian's is not on the PATH."""
    for directory in _places():
        if all(os.access(directory / name, os.X_OK) for name in ("initdb", "postgres")):
            return directory
    raise PostgresError(
        "No PostgreSQL server is installed (on Debian: apt-get install postgresql), and TEST_DATABASE_URL is not set."
    )


def _places() -> Iterator[Path]:
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent
    newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    yield from newest_first
    if config := shutil.which("pg_config"):
        asked = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            yield Path(asked.stdout.strip())


def _version(directory: Path) -> list[int]:
    return [int(part) for part in directory.parent.name.split(".") if part.isdigit()]


def _owner() -> tuple[int, int] | None:
    """The user and group to run the server as when we are root, which PostgreSQL refuses; otherwise None."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise PostgresError("PostgreSQL refuses to run as root, and here is no user postgres or nobody to run it as.")


def _base_directory() -> Path:
    """Where temporary files go, or /tmp when the server's user could not get there."""
    base = Path(tempfile.gettempdir()).resolve()
    closed = os.geteuid() == 0 and not all(place.stat().st_mode & 0o001 for place in (base, *base.parents))
    return Path("/tmp") if closed else base


def _random_name() -> str:
    return f"flowbridge_test_{secrets.token_hex(6)}"


def execute(url: URL | str, statement: str) -> None:
    """One statement on a connection of its own. Raises DBAPIError."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(statement))


def _launch_guard(directory: Path, owner: tuple[int, int] | None) -> subprocess.Popen[str]:
    """A session of its own, so that Ctrl-C in a terminal reaches only us and we end it in order."""
    environment = os.environ | {"LC_ALL": "C"}  # the server's messages are read here, in English
    program = f"{inspect.getsource(_guard)}\n_guard()"
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program, str(directory), *map(str, owner or ())],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _guard() -> None:
    """The whole program, by its source, of the process that is parent to initdb and the server.

    It does what lines of JSON on stdin ask and answers each with one. When stdin ends it ends the server and
    removes the directory: a pipe closes with its writer, even after kill -9. "wait" goes by another pipe, that
    every process of the server inherits and none writes to: it ends with the last of them, while process groups
    would not do, since PostgreSQL gives each of its children a session.
    """
    import json
    import os
    import select
    import shutil
    import signal
    import subprocess
    import sys
    from collections.abc import Iterator
    from contextlib import suppress
    from pathlib import Path

    directory, *owner = sys.argv[1:]
    user, group = map(int, owner) if owner else (None, None)
    process: subprocess.Popen[bytes] | None = None
    alive = -1

    def run(*command: str) -> int:
        nonlocal process, alive
        if alive >= 0:
            os.close(alive)
        alive, inherited = os.pipe()
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[inherited],
                user=user,
                group=group,
                extra_groups=[] if owner else None,
            )
        os.close(inherited)
        return process.pid

    def children(parent: int) -> Iterator[int]:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                    yield int(stat.parent.name)

    def kill() -> None:
        """By itself, the postmaster's death would not end a backend that computes.

        Stopped first, it neither starts nor buries children, so that each number is still theirs.
        """
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found = list(children(process.pid))
        process.kill()
        for child in found:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def wait(seconds: int) -> int | None:
        assert process is not None
        return process.wait() if select.select([alive], [], [], seconds)[0] else None

    for line in sys.stdin:
        answer: int | None = None
        match json.loads(line):
            case ["run", *command]:
                answer = run(*command)
            case ["poll"] if process is not None:
                answer = process.poll()
            case ["stop"] if process is not None:
                process.send_signal(signal.SIGINT)  # the postmaster's "fast": rolls back and disconnects
            case ["abort"] if process is not None:
                process.send_signal(signal.SIGQUIT)  # the postmaster's "immediate": it sees to its children within 5 s
            case ["kill"]:
                kill()
            case ["wait", seconds]:
                answer = wait(seconds)
        with suppress(BrokenPipeError):
            print(json.dumps(answer), flush=True)

    if process is not None:
        process.send_signal(signal.SIGQUIT)
        if wait(10) is None:
            kill()
            wait(10)
    with suppress(OSError, IndexError):  # a killed server leaves its System V segment, named in line 7
        segment = (Path(directory) / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        subprocess.run(["ipcrm", "-m", segment], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(directory, ignore_errors=True)
