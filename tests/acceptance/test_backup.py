"""`flowbridge backup`, and what a restored backup does in front of a real homeserver, on each engine."""

import re
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.store import Database
from tests.acceptance.test_missing_file import Bridge, started
from tests.acceptance.test_missing_file import folder as folder
from tests.integration.conftest import Room
from tests.integration.store.events import put
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres
from tests.processes import run

NAME = re.compile(r"flowbridge-\d{4}-\d\d-\d\dT\d{6}Z\.db")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the database is made, and no .env of a developer is read


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """In use, with an event that lies in its -wal file alone."""
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open()
    (tmp_path / "flowbridge.db.key").write_text("key")
    with database.engine.begin() as connection:
        put(connection, "one")
    yield database
    database.close()


@pytest.mark.usefixtures("database")
def test_backup_is_one_file_with_all_that_is_committed_and_its_key(tmp_path: Path) -> None:
    done = run("backup", "copy.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, "copy.db\ncopy.db.key\n", "")
    copy = tmp_path / "copy.db"
    assert {path.name for path in tmp_path.glob("*copy.db*")} == {"copy.db", "copy.db.key"}
    assert [oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("copy.db*")] == ["0o600"] * 2
    assert (tmp_path / "copy.db.key").read_text() == "key"
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT delivery FROM outbox").fetchall() == [("one",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    assert run("deliveries", "list", FLOWBRIDGE_DATABASE_URL=f"sqlite:///{copy}").returncode == 0


@pytest.mark.usefixtures("database")
def test_backup_into_a_folder_is_named_for_the_time(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    done = run("backup", "backups")
    (copy,) = (tmp_path / "backups").glob("*.db")
    assert done.stdout == f"backups/{copy.name}\nbackups/{copy.name}.key\n"
    assert NAME.fullmatch(copy.name)


@pytest.mark.usefixtures("database")
def test_key_from_the_settings_is_not_written_down(tmp_path: Path) -> None:
    key = Fernet.generate_key().decode()
    done = run("backup", "copy.db", FLOWBRIDGE_SECRET_KEY=key)
    assert done.stdout == "copy.db\n"
    assert "FLOWBRIDGE_SECRET_KEY" in done.stderr
    assert key not in done.stderr
    assert not (tmp_path / "copy.db.key").exists()


@pytest.mark.parametrize("there", ["copy.db", "copy.db.key"])
@pytest.mark.usefixtures("database")
def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    before = sorted(tmp_path.iterdir())
    done = run("backup", "copy.db")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"flowbridge: {there} is there already, and is not overwritten\n"
    assert (tmp_path / there).read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("database")
def test_folder_that_is_not_there_is_told() -> None:
    done = run("backup", "nowhere/copy.db")
    assert done.returncode == 1
    assert done.stderr == "flowbridge: cannot write nowhere/copy.db.key: No such file or directory\n"


def test_without_a_database_nothing_is_made(tmp_path: Path) -> None:
    done = run("backup", "copy.db")
    assert done.returncode == 2
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: there is no file flowbridge.db")
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_database_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "flowbridge.db").write_text("no database " * 100)
    done = run("backup", "copy.db")
    assert done.returncode == 1
    assert done.stderr == "flowbridge: cannot copy the database: file is not a database\n"
    assert [path.name for path in tmp_path.iterdir()] == ["flowbridge.db"]


def test_postgresql_is_left_to_its_own_tools() -> None:
    done = run("backup", "copy", FLOWBRIDGE_DATABASE_URL="postgresql://me:wordpass@host/name")
    assert done.returncode == 2
    assert "pg_dump" in done.stderr
    assert "wordpass" not in done.stderr


def test_backup_while_it_is_written_to_is_of_one_moment(database: Database, tmp_path: Path) -> None:
    ending, wrote = threading.Event(), threading.Event()

    def write() -> None:
        number = 0
        while not ending.is_set():
            number += 1
            with database.engine.begin() as connection:
                put(connection, f"{number}-a", f"{number}-b")
            wrote.set()

    writing = threading.Thread(target=write)
    writing.start()
    try:
        assert wrote.wait(PATIENCE)
        assert run("backup", "copy.db").returncode == 0
    finally:
        ending.set()
        writing.join()
    with closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        names = [name for (name,) in connection.execute("SELECT delivery FROM outbox ORDER BY id")]
    assert names[0] == "one"
    assert len(names) % 2 == 1
    assert names[1:] == [f"{number}-{half}" for number in range(1, len(names) // 2 + 1) for half in "ab"]


# restored


@pytest.fixture
def own_synapse() -> Iterator[LocalSynapse]:
    """One that is stopped, and whose memory is taken from it."""
    with LocalSynapse(rate_limits=False) as homeserver:
        yield homeserver


def forget_transactions(homeserver: LocalSynapse) -> None:
    homeserver.stop()
    (file,) = homeserver.directory.glob("*.db")
    with closing(sqlite3.connect(file)) as connection, connection:
        assert connection.execute("DELETE FROM event_txn_id_device_id").rowcount > 0
    homeserver.start()


@dataclass
class Store:
    """Where the bridge keeps its events, how that is copied while it is used, and put back when it is not."""

    settings: dict[str, str]
    back_up: Callable[[], object]
    restore: Callable[[], object]


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Store:
    """As docs/reliability.md says it is done."""
    if request.param == "sqlite":
        file, copy = folder / "flowbridge.db", tmp_path / "copy.db"
        url = f"sqlite:///{file}"

        def restore() -> None:
            file.unlink()
            for name in ("", ".key"):
                shutil.copy(f"{copy}{name}", f"{file}{name}")

        return Store({}, lambda: run("backup", str(copy), FLOWBRIDGE_DATABASE_URL=url).check_returncode(), restore)
    server: LocalPostgres = request.getfixturevalue("postgres")
    url, dump = server.fresh_database(), str(tmp_path / "dump")
    plain = url.replace("+psycopg", "")
    return Store(
        {"FLOWBRIDGE_DATABASE_URL": url, "FLOWBRIDGE_SECRET_KEY": Fernet.generate_key().decode()},
        lambda: subprocess.run(["pg_dump", "--format=custom", f"--file={dump}", plain], check=True),
        lambda: subprocess.run(["pg_restore", "--clean", "--if-exists", f"--dbname={plain}", dump], check=True),
    )


@pytest.mark.timeout(300)  # two starts of the bridge and three of Synapse, on a machine that may be busy
def test_restored_backup_doubles_and_loses_nothing_in_front_of_a_homeserver_that_forgot(
    own_synapse: LocalSynapse, store: Store, folder: Path
) -> None:
    bot = own_synapse.register("bot")
    headers = {"Authorization": f"Bearer {bot.access_token}"}
    with httpx.Client(base_url=own_synapse.url, headers=headers, trust_env=False, timeout=PATIENCE) as direct:
        rooms = [
            Room(direct.post("/_matrix/client/v3/createRoom", json={}).json()["room_id"], bot, direct) for _ in range(2)
        ]
        told = partial(started, folder, own_synapse.url, bot.access_token, **store.settings)
        with told() as bridge:
            for room in rooms:
                bridge.room = room.id
                assert bridge.send("before").status_code == 200
            own_synapse.stop()
            for number in range(5):
                for room in rooms:
                    bridge.room = room.id
                    bridge.accept(f"{number}")
            store.back_up()
            own_synapse.start()
            bridge.until(lambda: all(room.bodies()[-1] == "4" for room in rooms))
            own_synapse.stop()
            bridge.accept("after the backup")  # which a restore loses
            bridge.stop()
        forget_transactions(own_synapse)
        store.restore()
        with told() as bridge:
            bridge.until(lambda: queued(bridge) == 0)
            bridge.said("store_restored", level="warning")
            for room in rooms:
                bridge.room = room.id
                assert bridge.send("last").status_code == 200
        assert [room.bodies() for room in rooms] == [["before", *"01234", "last"]] * 2


def queued(bridge: Bridge) -> int:
    return int(bridge.http.get("/readyz").json()["queued"])
