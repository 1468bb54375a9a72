"""`flowbridge serve` and its database: what cannot be used is one line and exit code 2."""

import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.patience import PATIENCE
from tests.postgres import LocalPostgres
from tests.processes import FLOWBRIDGE, run, serving

NOWHERE = "http://127.0.0.1:1"
KEY = "m4Lg0MxA0yUg7iFvSbXcIVbz2y4nVNp1Ssy4UM6tJdM="


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the database is made, and no .env of a developer is read


def refusal(**settings: str) -> str:
    """The line with which `serve` ends."""
    done = run("serve", "--port", "0", **{"BASE_URL": NOWHERE, **settings})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flowbridge: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    assert "wordpass" not in done.stderr
    return lines[0].removeprefix("flowbridge: ")


def test_second_process_on_the_same_file_is_refused_and_the_first_goes_on() -> None:
    with serving(BASE_URL=NOWHERE) as (url, process):
        said = refusal()
        assert said.startswith("FLOWBRIDGE_DATABASE_URL: flowbridge.db is in use by another flowbridge")
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        process.kill()  # a process that is left must not keep the next one out
        process.wait(PATIENCE)
        with serving(BASE_URL=NOWHERE):
            pass


def test_database_of_a_newer_version_is_refused() -> None:
    with serving(BASE_URL=NOWHERE):
        pass
    with sqlite3.connect("flowbridge.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    assert refusal().startswith("FLOWBRIDGE_DATABASE_URL: flowbridge.db is of version 9999, made by a newer flowbridge")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("flowbridge.db", "it is not a database URL"),
        ("sqlite://flowbridge.db", "it names no file"),
        ("sqlite:///nowhere/flowbridge.db", "cannot open nowhere/flowbridge.db: No such file or directory"),
        ("mysql://me:wordpass@host/name", "mysql is not supported"),
        ("postgresql://me:wordpass@127.0.0.1:port/name", "it is not a database URL"),
        ("postgresql://me@127.0.0.1/name?passwd=wordpass", "cannot open postgresql://me@127.0.0.1/name: invalid"),
    ],
)
def test_database_that_cannot_be_used_is_told(url: str, says: str) -> None:
    assert refusal(FLOWBRIDGE_DATABASE_URL=url).startswith(f"FLOWBRIDGE_DATABASE_URL: {says}")


def test_unknown_postgresql_database_is_told(postgres: LocalPostgres) -> None:
    url = f"{postgres.fresh_database()}_not"
    assert "does not exist" in refusal(FLOWBRIDGE_DATABASE_URL=url, FLOWBRIDGE_SECRET_KEY=KEY)


@pytest.mark.parametrize("key", ["short", "x" * 44, KEY[:-2], "schlüssel"])
def test_malformed_secret_key_is_told_but_not_said(key: str) -> None:
    said = refusal(FLOWBRIDGE_SECRET_KEY=key)
    assert said.startswith("FLOWBRIDGE_SECRET_KEY: ")
    assert key not in said


def test_postgresql_without_a_secret_key_is_told(postgres: LocalPostgres) -> None:
    assert refusal(FLOWBRIDGE_DATABASE_URL=postgres.fresh_database()).startswith("FLOWBRIDGE_SECRET_KEY: ")


def test_files_are_closed_to_others(tmp_path: Path) -> None:
    with serving(BASE_URL=NOWHERE):
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("flowbridge.db*")}
    assert set(modes) >= {"flowbridge.db", "flowbridge.db-wal", "flowbridge.db.key"}
    assert set(modes.values()) == {"0o600"}


@pytest.fixture
def late_postgres(own_postgres: LocalPostgres) -> LocalPostgres:
    """One that is not there yet when the bridge starts."""
    own_postgres.stop()
    return own_postgres


@contextmanager
def starting(log: Path, database_url: str) -> Iterator["subprocess.Popen[bytes]"]:
    settings = {"BASE_URL": NOWHERE, "FLOWBRIDGE_DATABASE_URL": database_url, "FLOWBRIDGE_SECRET_KEY": KEY}
    with log.open("w") as errors:
        process = subprocess.Popen([FLOWBRIDGE, "serve", "--port", "0"], env=settings, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_serve_waits_for_a_postgresql_that_starts_later(late_postgres: LocalPostgres, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with starting(log, late_postgres.url):
        until_said("store_away", log)
        late_postgres.start()
        until_said("serving", log)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_serve_that_waits_for_postgresql_ends_when_it_is_told_to(
    late_postgres: LocalPostgres, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    with starting(log, late_postgres.url) as process:
        until_said("store_away", log)
        process.send_signal(number)
        assert process.wait(PATIENCE) in (0, -number)
    assert "Traceback" not in log.read_text()


def until_said(action: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while f" {action} " not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
