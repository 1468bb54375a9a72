"""The schema: made at once or by migrations, by one process or several, and never over what is not ours."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, text

from flowbridge.store import Database, StoreError, migrations
from tests.conftest import NewDatabase
from tests.patience import PATIENCE

Upgrade = Callable[[str], None]

NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("lanes", sa.Column("colour", sa.Text))
"""


def opened(url: str, *, shared: bool = False) -> None:
    database = Database(url)
    database.open(shared=shared)
    database.close()


def tell(url: str, *statements: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def ask(url: str, query: str) -> list[tuple[object, ...]]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def schema(url: str) -> list[tuple[object, ...]]:
    """All of it, in the words of the engine's own catalogue."""
    if url.startswith("sqlite"):
        return ask(url, "SELECT name, sql FROM sqlite_master ORDER BY name")
    columns = """
        SELECT table_name, ordinal_position, column_name, data_type, character_maximum_length, is_nullable,
               column_default, is_identity
        FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"""
    constraints = """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2"""
    indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
    return [row for query in (columns, constraints, indexes) for row in ask(url, query)]


def test_tables_and_migrations_make_the_same_schema(new_database: NewDatabase) -> None:
    made, migrated = new_database(), new_database()
    opened(made)
    with create_engine(migrated, poolclass=NullPool).begin() as connection:
        migrations.migrate(connection, "")
    assert schema(migrated) == schema(made)
    assert len(schema(made)) > 10
    version = "SELECT version_num FROM alembic_version"
    assert ask(migrated, version) == ask(made, version) == [(migrations.HEAD,)]


@pytest.fixture
def upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """`upgrade(script)`: from here on it is a flowbridge of the next version; in a directory of an unlucky name."""

    def run(script: str) -> None:
        scripts = tmp_path / "100% new"
        shutil.copytree(migrations.SCRIPTS, scripts)
        (scripts / "versions" / "0002_colour.py").write_text(script)
        monkeypatch.setattr(migrations, "SCRIPTS", scripts)
        monkeypatch.setattr(migrations, "HEAD", "0002")

    return run


def test_older_database_is_migrated_and_keeps_its_rows(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    tell(database_url, "INSERT INTO lanes (lane, account) VALUES ('l', 'a')")
    upgrade(NEXT)
    opened(database_url)
    assert ask(database_url, "SELECT lane, colour FROM lanes") == [("l", None)]
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("0002",)]


def test_migration_that_fails_leaves_the_database_as_it_was(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    before = schema(database_url)
    upgrade(NEXT + "    op.drop_table('nowhere')\n")
    with pytest.raises(StoreError, match="nowhere"):
        opened(database_url)
    assert schema(database_url) == before
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("0001",)]


def test_command_beside_a_server_migrates_nothing(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    upgrade(NEXT)
    with pytest.raises(StoreError, match="version 0001, not 0002: `flowbridge serve` brings"):
        opened(database_url, shared=True)
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("0001",)]


def test_database_of_a_newer_version_is_refused_in_one_line(database_url: str) -> None:
    opened(database_url)
    tell(database_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="is of version 9999, made by a newer flowbridge") as caught:
        opened(database_url)
    assert "\n" not in str(caught.value)
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("9999",)]


def test_table_of_another_program_is_not_touched(database_url: str) -> None:
    tell(database_url, "CREATE TABLE accounts (balance int)")
    before = schema(database_url)
    with pytest.raises(StoreError, match="has a table accounts that flowbridge did not make"):
        opened(database_url)
    assert schema(database_url) == before


def test_several_that_start_at_once_on_an_empty_database_do_not_collide(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, looked = threading.Barrier(4, timeout=PATIENCE), threading.local()
    look = migrations.version

    def look_together(connection: Connection) -> str | None:
        found = look(connection)
        if not hasattr(looked, "once"):
            looked.once = True
            together.wait()
        return found

    monkeypatch.setattr(migrations, "version", look_together)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: opened(database_url, shared=True), range(4)))
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]


@pytest.mark.parametrize("before", ["fresh", "current"])
def test_start_imports_no_alembic(database_url: str, before: str) -> None:
    """It would cost 20 MB and 0.3 s."""
    if before == "current":
        opened(database_url)
    script = """
import sys, flowbridge.serve
from flowbridge.store import Database
database = Database(sys.argv[1])
database.open()
database.close()
print(*sorted({name.partition('.')[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, database_url], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    loaded = set(done.stdout.split())
    assert "sqlalchemy" in loaded
    assert not loaded & {"alembic", "mako"}
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]
