"""The PostgreSQL that tests run on."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from tests import postgres as postgres_module
from tests.conftest import require_postgres
from tests.patience import PATIENCE, until
from tests.postgres import LocalPostgres, PostgresError, why_unavailable
from tests.processes import free_port

BUSY = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalPostgres]:
    """Ours even with TEST_DATABASE_URL set; every test leaves it running."""
    require_postgres(private=True)
    with LocalPostgres(private=True) as one:
        yield one


@pytest.fixture
def place() -> Iterator[Path]:
    """Like tmp_path, but the server's user can get there: pytest closes its own to others."""
    with tempfile.TemporaryDirectory(prefix="flowbridge-test-", dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEST_DATABASE_URL", raising=False)
    monkeypatch.setattr(postgres_module, "_places", lambda: iter([tmp_path]))


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        yield connection


def ask(url: str, query: str) -> object:
    with connected(url) as connection:
        return connection.execute(text(query)).scalar()


def tell(url: str, *statements: str) -> None:
    with connected(url) as connection:
        for statement in statements:
            connection.execute(text(statement))
        connection.commit()


def test_address_is_the_one_promised(server: LocalPostgres) -> None:
    port = make_url(server.url).port
    assert server.url == f"postgresql+psycopg://postgres@127.0.0.1:{port}/flowbridge"
    assert ask(server.url, "SELECT current_database()") == "flowbridge"


def test_commits_are_durable_and_only_loopback_is_listened_on(server: LocalPostgres) -> None:
    for name, value in {"fsync": "on", "synchronous_commit": "on", "listen_addresses": "127.0.0.1"}.items():
        assert ask(server.url, f"SHOW {name}") == value


def test_start_and_end_take_less_than_5_s_of_work() -> None:
    require_postgres(private=True)
    before = os.times()
    with LocalPostgres(private=True):
        pass
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_every_fresh_database_is_new_and_empty(postgres: LocalPostgres) -> None:
    one, other = postgres.fresh_database(), postgres.fresh_database()
    tell(one, "CREATE TABLE event (id int)")
    assert ask(one, "SELECT to_regclass('event')::text") == "event"
    assert ask(other, "SELECT to_regclass('event')::text") is None


@pytest.mark.parametrize("end", [LocalPostgres.kill, LocalPostgres.stop], ids=["kill", "stop"])
def test_committed_rows_are_there_after_an_end_and_a_start(
    server: LocalPostgres, end: Callable[[LocalPostgres], None]
) -> None:
    url = server.fresh_database()
    tell(url, "CREATE TABLE event (id int)", "INSERT INTO event VALUES (1)")
    with connected(url) as unfinished:
        unfinished.execute(text("INSERT INTO event VALUES (2)"))
        end(server)
        assert server.pid is None
        with pytest.raises(OperationalError, match="refused"):
            ask(url, "SELECT 1")
        server.start()
        unfinished.invalidate()
    assert ask(url, "SELECT array_agg(id) FROM event") == [1]


@pytest.mark.parametrize("end", [LocalPostgres.abort, LocalPostgres.kill], ids=["abort", "kill"])
def test_abort_and_kill_are_crashes_to_recover_from(
    server: LocalPostgres, end: Callable[[LocalPostgres], None]
) -> None:
    end(server)
    server.start()
    assert "automatic recovery in progress" in server.log_tail()


def test_nothing_of_a_killed_server_runs_on_not_even_a_busy_backend(server: LocalPostgres) -> None:
    with connected(server.url) as connection, ThreadPoolExecutor() as threads:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        query = "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000) b"
        busy = threads.submit(connection.execute, text(query))
        until(lambda: ask(server.url, BUSY) == 1)
        server.kill()
        until(lambda: not running(backend))  # its files are closed, but it may be a moment from being a zombie
        assert isinstance(busy.exception(), OperationalError)
    server.start()


def test_ends_and_starts_may_be_repeated(server: LocalPostgres) -> None:
    server.start()
    server.kill()
    server.kill()
    server.stop()
    server.start()
    assert ask(server.url, "SELECT 1") == 1


def test_start_waits_for_the_rest_when_somebody_else_killed_the_postmaster(own_postgres: LocalPostgres) -> None:
    with connected(own_postgres.url) as connection, ThreadPoolExecutor() as threads:
        busy = threads.submit(connection.execute, text("SELECT count(*) FROM generate_series(1, 10000000)"))
        until(lambda: ask(own_postgres.url, BUSY) == 1)
        assert own_postgres.pid is not None
        os.kill(own_postgres.pid, signal.SIGKILL)
        own_postgres.start()
        busy.exception()
        connection.invalidate()
    assert ask(own_postgres.url, "SELECT 1") == 1


@pytest.mark.parametrize("killed", [False, True], ids=["running", "killed"])
def test_leaving_removes_everything(killed: bool) -> None:
    require_postgres(private=True)
    with LocalPostgres(private=True) as server:
        directory, pid = server.directory, server.pid
        assert pid is not None
        segment = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_memory() or not shutil.which("ipcs")
        if killed:
            server.kill()
    assert not accepts(server.url)
    assert not running(pid)
    assert not directory.exists()
    assert segment not in shared_memory()


@pytest.mark.parametrize("state", ["running", "killed"])
def test_server_and_its_files_go_when_the_parent_is_killed(place: Path, state: str) -> None:
    require_postgres(private=True)
    environment = {**os.environ, "TMPDIR": str(place)}
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        assert accepts(url) is (state == "running")
        assert list(place.iterdir()) != []
        parent.kill()
    until(lambda: not accepts(url) and list(place.iterdir()) == [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives up privileges")
def test_root_runs_it_as_somebody_else(server: LocalPostgres) -> None:
    assert (server.directory / "data").stat().st_uid != 0
    assert server.directory.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; all other tests show it then")
def test_ordinary_user_runs_it(place: Path) -> None:
    require_postgres(private=True)
    nobody = pwd.getpwnam("nobody")
    top = Path(__file__).parents[2]
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(place), "PYTHONPATH": f"{top}{os.pathsep}{packages()}"}
    python = interpreter_for(nobody.pw_uid)
    done = subprocess.run(
        [python, "-c", "from tests.postgres import LocalPostgres as L\nwith L() as s: print(s.fresh_database())"],
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("postgresql+psycopg://postgres@127.0.0.1:")
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's temporary directory may be closed to the server")
def test_temporary_directory_closed_to_the_server_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_postgres(private=True)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LocalPostgres(private=True) as server:
        assert server.directory.parent == Path("/tmp")


def test_another_port_is_tried_when_somebody_takes_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    require_postgres(private=True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        choices = [free_port(), other.getsockname()[1]]
        monkeypatch.setattr(postgres_module, "free_port", choices.pop)
        with LocalPostgres(private=True) as server:
            assert choices == []
            assert ask(server.url, "SELECT 1") == 1


def test_start_failure_says_why_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_postgres(private=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setitem(postgres_module.SETTINGS, "shared_buffers", "plenty")
    with pytest.raises(PostgresError, match=r'ended with exit code 1(.|\n)*"plenty"'):
        LocalPostgres(private=True).__enter__()
    assert list(place.iterdir()) == []


def test_given_server_is_used_and_left_as_it_was(server: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = server.url.replace("+psycopg", "")
    monkeypatch.setenv("TEST_DATABASE_URL", plain)
    names = "SELECT array_agg(datname ORDER BY datname) FROM pg_database"
    before = ask(server.url, names)
    with LocalPostgres() as ours:
        made = [ours.url, ours.fresh_database()]
        assert len({server.url, *made}) == 3
        assert {make_url(url).port for url in made} == {make_url(server.url).port}
        with connected(made[1]) as left_open:
            left_open.execute(text("SELECT 1"))
            ours.__exit__(None, None, None)
            left_open.invalidate()
    assert ask(server.url, names) == before


@pytest.mark.parametrize("action", [LocalPostgres.kill, LocalPostgres.stop, LocalPostgres.start])
def test_given_server_is_not_ours_to_stop(
    server: LocalPostgres, monkeypatch: pytest.MonkeyPatch, action: Callable[[LocalPostgres], None]
) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", server.url)
    with LocalPostgres() as ours, pytest.raises(PostgresError, match="not ours to"):
        action(ours)
    assert ask(server.url, "SELECT 1") == 1


def test_given_server_that_does_not_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", f"postgresql://me:wordpass@127.0.0.1:{free_port()}/mine")
    with pytest.raises(PostgresError, match="refused") as caught:
        LocalPostgres().__enter__()
    assert "wordpass" not in str(caught.value)


def test_given_address_that_is_none_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", "me:wordpass@somewhere")
    with pytest.raises(PostgresError, match="TEST_DATABASE_URL is no database address") as caught:
        LocalPostgres()
    assert "wordpass" not in str(caught.value)


@pytest.mark.usefixtures("nothing_installed")
def test_missing_server_is_said_in_one_sentence() -> None:
    why = why_unavailable()
    assert why is not None
    assert "apt-get install postgresql" in why
    with pytest.raises(PostgresError, match="No PostgreSQL server is installed"):
        LocalPostgres().__enter__()


@pytest.mark.usefixtures("nothing_installed")
def test_given_server_makes_up_for_a_missing_one_unless_it_is_to_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", "postgresql://somewhere/mine")
    assert why_unavailable() is None
    assert why_unavailable(private=True) is not None


@pytest.mark.usefixtures("nothing_installed")
def test_missing_server_skips_at_home_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOT TESTED ON POSTGRESQL"):
        require_postgres()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test on PostgreSQL"):
        require_postgres()


@pytest.mark.usefixtures("nothing_installed")
def test_given_server_is_enough_for_ci_though_it_cannot_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test on PostgreSQL"):
        require_postgres(private=True)
    monkeypatch.setenv("TEST_DATABASE_URL", "postgresql://somewhere/mine")
    with pytest.raises(pytest.skip.Exception, match="NOT TESTED ON POSTGRESQL"):
        require_postgres(private=True)


PARENT = """
import sys, time
from tests.postgres import LocalPostgres
with LocalPostgres(private=True) as server:
    if sys.argv[1] == "killed":
        server.kill()
    print(server.url, flush=True)
    time.sleep(600)
"""


def interpreter_for(user: int) -> str:
    """A Python of our version that this user may run; skips when there is none."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = [python, "-c", "import sys, sqlalchemy, psycopg; print(sys.version_info.minor)"]
        try:
            done = subprocess.run(
                command, user=user, env={"PYTHONPATH": packages()}, capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        if done.stdout.strip() == str(sys.version_info.minor):
            return python
    pytest.skip("No Python of this version, with the packages of this environment, is open to the user nobody.")


def packages() -> str:
    """The directories of installed packages, as PYTHONPATH takes them."""
    return os.pathsep.join(entry for entry in sys.path if "site-packages" in entry)


def shared_memory() -> set[str]:
    """The System V segments there are; none where no tool tells."""
    if not shutil.which("ipcs"):
        return set()
    listing = subprocess.run(["ipcs", "-m"], capture_output=True, text=True, check=True).stdout
    return {line.split()[1] for line in listing.splitlines() if line.startswith("0x")}


def accepts(url: str) -> bool:
    address = make_url(url)
    try:
        socket.create_connection((address.host or "", address.port or 0), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def running(pid: int) -> bool:
    """Whether this process is there and no zombie, which some containers never bury."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return "State:\tZ" not in status.read_text() if status.exists() else True
