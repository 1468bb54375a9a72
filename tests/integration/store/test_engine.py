"""Opening the database: errors are one line without secrets, and the files are closed to others."""

import os
import pwd
import re
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from flowbridge import log
from flowbridge.models.timing import Timing
from flowbridge.store import Database, StoreAbsent, StoreError, lock_file
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres

SECRET = "wordpass"


def opened(url: str, *, shared: bool = False, make: bool = False, timing: Timing = Timing()) -> None:
    database = Database(url, timing=timing)
    database.open(shared=shared, make=make)
    database.close()


def complaint(url: str, *, shared: bool = False, timing: Timing = Timing()) -> str:
    """What is said when this cannot be opened."""
    with pytest.raises(StoreError) as caught:
        opened(url, shared=shared, timing=timing)
    said = str(caught.value)
    assert "\n" not in said
    assert SECRET not in said
    return said


def tell(url: str, *statements: str) -> None:
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> "Lines":
    lines = Lines()
    monkeypatch.setattr(log, "warning", lines.add)
    return lines


class Lines:
    """What was logged as a warning, by action."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, object]]] = []
        self.came = threading.Event()

    def add(self, action: str, **fields: object) -> None:
        self.seen.append((action, fields))
        self.came.set()


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[Path]:
    """Run the test as the user `nobody`, since root may do everything. Yields a directory of that user."""
    opened(f"sqlite:///{tmp_path}/first.db")  # imports everything: `nobody` may not be able to
    root = os.geteuid() == 0
    if root:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            yield Path(name)
            Path(name).chmod(0o700)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "it is not a database URL"),
        ("flowbridge.db", "it is not a database URL"),
        (f"postgresql://me:{SECRET}@host:port/name", "it is not a database URL"),
        (f"mysql://me:{SECRET}@host/name", "mysql is not supported"),
        (f"postgresql+asyncpg://me:{SECRET}@host/name", "postgresql+asyncpg is not supported"),
        ("sqlite://flowbridge.db", "it names no file"),
        ("sqlite:///", "it names no file"),
        ("sqlite:///:memory:", "it names no file"),
        ("sqlite:///file:flowbridge.db?uri=true", "it names no file"),
        ("sqlite:///flowbridge.db?mode=ro", "takes no parameters"),
    ],
)
def test_url_that_is_none_is_told(url: str, says: str) -> None:
    assert says in complaint(url)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_usual_names_of_postgresql_are_taken(postgres: LocalPostgres, scheme: str) -> None:
    opened(postgres.fresh_database().replace("postgresql+psycopg", scheme))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"postgresql://me:{SECRET}@127.0.0.1:1/name?connect_timeout=2", "refused"),
        (f"postgresql://me@127.0.0.1:1/name?passwd={SECRET}", 'invalid connection option "passwd"'),
        (f"postgresql://me@127.0.0.1:1/name?password={SECRET}", "refused"),
    ],
)
def test_no_password_is_said(url: str, says: str) -> None:
    said = complaint(url, shared=True)
    assert says in said
    assert "postgresql://me@127.0.0.1:1/name" in said


def test_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    assert "pip install 'flowbridge[postgresql]'" in complaint("postgresql://127.0.0.1:1/name")


def test_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "No such file or directory" in complaint(f"sqlite:///{tmp_path}/nothing/flowbridge.db")


def test_directory_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    assert "unable to open database file" in complaint(f"sqlite:///{tmp_path}")


def test_file_that_is_no_database_is_told_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear database, " * 100)
    assert "file is not a database" in complaint(f"sqlite:///{file}")
    assert file.read_text() == "Dear database, " * 100


def test_file_that_may_only_be_read_is_told_though_it_is_up_to_date(ordinary_user: Path) -> None:
    file = ordinary_user / "flowbridge.db"
    opened(f"sqlite:///{file}")
    file.chmod(0o400)
    assert "readonly" in complaint(f"sqlite:///{file}")


def test_file_of_somebody_else_is_told(ordinary_user: Path) -> None:
    file = ordinary_user / "flowbridge.db"
    file.touch()
    file.chmod(0)
    assert "Permission denied" in complaint(f"sqlite:///{file}")


def test_directory_that_may_not_be_written_is_told(ordinary_user: Path) -> None:
    ordinary_user.chmod(0o500)
    assert "Permission denied" in complaint(f"sqlite:///{ordinary_user}/flowbridge.db")


def test_files_are_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
        database.open()
        modes = {path.name: oct(mode(path)) for path in tmp_path.iterdir()}
        database.close()
    finally:
        os.umask(before)
    names = ("flowbridge.db", "flowbridge.db-wal", "flowbridge.db-shm", "flowbridge.db.lock")
    assert modes == dict.fromkeys(names, "0o600")


def test_mode_of_a_file_that_is_there_is_left_to_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "flowbridge.db"
    file.touch()
    file.chmod(0o640)
    opened(f"sqlite:///{file}")
    assert mode(file) == 0o640


def test_second_process_on_a_file_is_refused_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "flowbridge.db")
    first = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    first.open()
    for name in ("flowbridge.db", "link.db"):
        assert f"{name} is in use by another flowbridge" in complaint(f"sqlite:///{tmp_path}/{name}")
    opened(f"sqlite:///{tmp_path}/flowbridge.db", shared=True)
    first.close()
    opened(f"sqlite:///{tmp_path}/link.db")


def test_file_that_could_not_be_opened_is_not_kept_locked(tmp_path: Path) -> None:
    file = tmp_path / "flowbridge.db"
    file.write_text("no database " * 100)
    complaint(f"sqlite:///{file}")
    file.unlink()
    opened(f"sqlite:///{file}")


def test_commands_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    for number in range(5):
        together = threading.Barrier(8, timeout=PATIENCE)

        def run(_: int, url: str = f"sqlite:///{tmp_path}/{number}.db", together: threading.Barrier = together) -> None:
            together.wait()
            opened(url, shared=True, make=True)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(run, range(8)))


def test_file_is_made_for_a_command_only_where_it_is_asked_for_and_nobody_has_one(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "flowbridge.db")
    url = f"sqlite:///{tmp_path}/link.db"
    assert "there is no file" in complaint(url, shared=True)
    assert [path.name for path in tmp_path.iterdir()] == ["link.db"]
    opened(url, shared=True, make=True)
    assert mode(tmp_path / "flowbridge.db") == 0o600
    server = Database(url)
    server.open()
    opened(url, shared=True)
    (tmp_path / "flowbridge.db").rename(tmp_path / "elsewhere.db")
    for make in (False, True):
        with pytest.raises(StoreError, match="was removed or moved") as caught:
            opened(url, shared=True, make=make)
        assert not isinstance(caught.value, StoreAbsent)
    assert not (tmp_path / "flowbridge.db").exists()
    (tmp_path / "elsewhere.db").rename(tmp_path / "flowbridge.db")
    opened(url, shared=True)
    server.close()


@pytest.mark.parametrize("shared", [False, True])
def test_empty_file_or_a_folder_is_no_database_to_a_command(tmp_path: Path, *, shared: bool) -> None:
    (tmp_path / "flowbridge.db").touch()
    says = {"flowbridge.db": "is empty: set FLOWBRIDGE_DATABASE_URL", "": f"sqlite:///{tmp_path}/flowbridge.db"}
    for name, said in says.items():
        with pytest.raises(StoreError, match=re.escape(said)):
            Database(f"sqlite:///{tmp_path}/{name}").open(shared=shared, required=True)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("flowbridge.db", 0)]


@pytest.mark.parametrize("shared", [False, True])
def test_postgresql_without_our_tables_is_no_database_to_a_command(postgres: LocalPostgres, *, shared: bool) -> None:
    url = postgres.fresh_database()
    for _ in range(2):  # it was not made the first time
        with pytest.raises(StoreAbsent, match=r"has no tables of flowbridge: set FLOWBRIDGE_DATABASE_URL"):
            Database(url).open(shared=shared, required=True)


def test_command_that_goes_on_for_long_uses_no_other_file(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open(shared=True, make=True)
    server = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    server.open()
    with database.engine.connect():
        (tmp_path / "flowbridge.db").unlink()
        (tmp_path / "flowbridge.db").touch()
        with pytest.raises(StoreError, match="is another file"), database.engine.connect():
            pass
    database.engine.dispose()
    server.close()


@pytest.mark.parametrize("shared", [False, True])
def test_file_made_by_a_command_at_the_same_time_is_no_fault(tmp_path: Path, shared: bool) -> None:
    """A command has the lock for a moment: a start, or another command, waits for that."""
    lock = lock_file.take(tmp_path / "flowbridge.db.lock")
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(opened, f"sqlite:///{tmp_path}/flowbridge.db", shared=shared, make=shared)
        time.sleep(0.1)
        lock.close()
        opening.result(timeout=PATIENCE)


def test_postgresql_without_tables_gets_none_from_a_command_that_only_looks(postgres: LocalPostgres) -> None:
    url = postgres.fresh_database()
    with pytest.raises(StoreAbsent, match="has no tables of flowbridge"):
        opened(url, shared=True)
    opened(url, shared=True, make=True)
    opened(url, shared=True)


def test_file_that_is_locked_is_waited_for(tmp_path: Path, log_lines: Lines) -> None:
    """Beyond what SQLite does itself: it gives up at once where two would wait for each other."""
    hasty = Timing(sqlite_busy_seconds=0.02)
    other = sqlite3.connect(tmp_path / "flowbridge.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(opened, f"sqlite:///{tmp_path}/flowbridge.db", timing=hasty)
        assert log_lines.came.wait(PATIENCE)
        other.execute("COMMIT")
        opening.result(timeout=PATIENCE)
    other.close()
    assert "locked" in str(log_lines.seen[0][1]["error"])


def test_file_that_stays_locked_is_told(tmp_path: Path) -> None:
    hasty = Timing(sqlite_busy_seconds=0.02, sqlite_locked_seconds=0.1)
    other = sqlite3.connect(tmp_path / "flowbridge.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert "database is locked" in complaint(f"sqlite:///{tmp_path}/flowbridge.db", timing=hasty)
    other.close()


def test_closed_file_is_complete_without_a_journal_beside_it(tmp_path: Path) -> None:
    opened(f"sqlite:///{tmp_path}/flowbridge.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowbridge.db", "flowbridge.db.lock"]


# PostgreSQL


def test_postgresql_that_starts_later_is_waited_for(own_postgres: LocalPostgres, log_lines: Lines) -> None:
    own_postgres.stop()
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(opened, own_postgres.url)
        assert log_lines.came.wait(PATIENCE)
        own_postgres.start()
        opening.result(timeout=PATIENCE)
    assert [action for action, _ in log_lines.seen][:1] == ["store_away"]
    assert "refused" in str(log_lines.seen[0][1]["error"])


def test_postgresql_that_does_not_come_is_told(log_lines: Lines) -> None:
    hasty = Timing(postgres_start_seconds=0.3, postgres_poll_seconds=0.05)
    assert "refused" in complaint(f"postgresql://me:{SECRET}@127.0.0.1:1/name", timing=hasty)
    assert len(log_lines.seen) == 1, "said once, not at each try"
    assert SECRET not in str(log_lines.seen)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"username": "who"}, 'role "who" does not exist'),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(
    postgres: LocalPostgres, log_lines: Lines, part: dict[str, str], says: str
) -> None:
    url = make_url(postgres.fresh_database()).set(**part)  # type: ignore[arg-type]
    assert says in complaint(url.render_as_string(hide_password=False))
    assert log_lines.seen == []


def test_wrong_password_is_told_at_once_and_not_said(own_postgres: LocalPostgres, log_lines: Lines) -> None:
    tell(own_postgres.url, "ALTER ROLE postgres PASSWORD 'right'")
    rules = own_postgres.directory / "data" / "pg_hba.conf"
    rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    tell(own_postgres.url, "SELECT pg_reload_conf()")
    url = make_url(own_postgres.url)
    right = url.set(password="right").render_as_string(hide_password=False)
    deadline = time.monotonic() + PATIENCE
    while True:  # until the server has read its rules
        wrong = url.set(password=SECRET).render_as_string(hide_password=False)
        try:
            said = complaint(wrong)
        except pytest.fail.Exception:
            assert time.monotonic() < deadline
        else:
            break
    assert 'password authentication failed for user "postgres"' in said
    assert "no password supplied" in complaint(own_postgres.url)
    opened(right)
    assert log_lines.seen == []


def test_user_that_may_make_no_tables_is_told(postgres: LocalPostgres) -> None:
    url = make_url(postgres.fresh_database())
    user = f"reader_{url.database}"
    as_owner = url.render_as_string(hide_password=False)
    tell(as_owner, f"CREATE ROLE \"{user}\" LOGIN PASSWORD 'right'", "REVOKE CREATE ON SCHEMA public FROM public")
    try:
        said = complaint(url.set(username=user, password="right").render_as_string(hide_password=False))
        assert "permission denied for schema public" in said
    finally:
        tell(as_owner, f'DROP ROLE "{user}"')


def test_encoding_that_does_not_take_every_text_is_refused(postgres: LocalPostgres) -> None:
    url = make_url(postgres.fresh_database())
    name = f"{url.database}_ascii"
    tell(
        url.render_as_string(hide_password=False),
        f"CREATE DATABASE \"{name}\" ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
    )
    try:
        said = complaint(url.set(database=name).render_as_string(hide_password=False))
        assert "the database's encoding is SQL_ASCII" in said
    finally:
        tell(url.render_as_string(hide_password=False), f'DROP DATABASE "{name}"')


def test_session_does_not_depend_on_what_the_server_does_for_others(postgres: LocalPostgres) -> None:
    url = postgres.fresh_database()
    for change in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'"):
        tell(url, f'ALTER DATABASE "{make_url(url).database}" SET {change}')
    database = Database(url)
    database.open()
    with database.engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("synchronous_commit", "transaction_isolation", "idle_in_transaction_session_timeout")
        }
    database.close()
    assert found == {
        "synchronous_commit": "on",
        "transaction_isolation": "read committed",
        "idle_in_transaction_session_timeout": "5s",
    }


def test_parameters_of_the_url_win_over_ours(postgres: LocalPostgres) -> None:
    database = Database(f"{postgres.fresh_database()}?application_name=mine")
    database.open()
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW application_name").scalar() == "mine"
    database.close()
