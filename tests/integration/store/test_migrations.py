"""The schema: made at once or by migrations, by one process or several, and never over what is not ours."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from cryptography.fernet import Fernet
from sqlalchemy import Connection, MetaData, NullPool, Table, create_engine, text
from sqlalchemy.exc import IntegrityError

from flowbridge.store import Database, StoreError, clock, delivery_log, leases, migrations
from flowbridge.store.accounts import account_of, token_hash, tokens_of
from flowbridge.store.delivery_log import Whose
from flowbridge.store.engine import reported
from tests.conftest import NewDatabase
from tests.integration.store import events as rows
from tests.patience import PATIENCE
from tests.rig import ALICE as ALICE_PHONE
from tests.rig import DESK as ALICE_DESK
from tests.rig import KEY, ROOM, Rig, Rooms, error

Upgrade = Callable[..., None]

NEXT = f"""
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{migrations.HEAD}"


def upgrade() -> None:
    op.add_column("lanes", sa.Column("colour", sa.Text))
"""


def opened(url: str, *, shared: bool = False, make: bool = False) -> None:
    database = Database(url)
    database.open(shared=shared, make=make)
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
        found = ask(url, "SELECT name, sql FROM sqlite_master ORDER BY name")
        return [(name, sql and " ".join(str(sql).split())) for name, sql in found]  # ADD COLUMN breaks no line
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


# from 0001: an account was a user on a device


def made_by(revision: str, url: str) -> str:
    """A database as an older flowbridge made it."""
    config = Config()
    config.set_main_option("script_location", str(migrations.SCRIPTS))
    with create_engine(url, poolclass=NullPool).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    return url


def old_account(user_id: str, device_id: str) -> str:
    return hashlib.sha256(f"{user_id}\0{device_id}".encode()).hexdigest()[:24]


PHONE, DESK = old_account("@alice:hs", "PHONE"), old_account("@alice:hs", "DESK")
ALICE = account_of("@alice:hs")


def add(url: str, table: str, **values: object) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        found = Table(table, MetaData(), autoload_with=connection)
        known = {name: value for name, value in values.items() if name in found.c}  # an older table has fewer columns
        connection.execute(found.insert().values(**known))


def know_alice(url: str) -> None:
    for account, device_id, seen_at in [(PHONE, "PHONE", 1_000), (DESK, "DESK", 2_000)]:
        whose = {"account": account, "user_id": "@alice:hs", "device_id": device_id}
        add(url, "accounts", **whose, token=f"encrypted {device_id}", token_hash=device_id, seen_at=seen_at)


def put_old(url: str, *events: tuple[str, str, str]) -> None:
    """Events: account, room and state; the n-th is called by its number."""
    for number, (account, room, state) in enumerate(events, 1):
        settled_at = None if state == "queued" else 1
        row = rows.event(str(number), f"{account}|{room}", state=state, settled_at=settled_at)
        add(url, "outbox", **row)


def put_lane(url: str, account: str, room: str, **values: object) -> None:
    add(url, "lanes", **{"lane": f"{account}|{room}", "account": account, "dirty": 1, "fence": 3, **values})


def test_events_of_two_devices_become_their_users_in_the_order_of_acceptance(new_database: NewDatabase) -> None:
    url = made_by("0001", new_database())
    know_alice(url)
    put_old(url, (PHONE, "!a|b:hs", "queued"), (DESK, "!a|b:hs", "queued"), (PHONE, "!a|b:hs", "sent"))
    put_lane(url, PHONE, "!a|b:hs", uncertain_since=5_000)
    put_lane(url, DESK, "!a|b:hs", uncertain_since=4_000, fence=7)
    opened(url)
    lane = f"{ALICE}|!a|b:hs"
    assert ask(url, "SELECT DISTINCT account, lane FROM outbox") == [(ALICE, lane)]
    assert ask(url, "SELECT * FROM lanes") == [(lane, ALICE, None, 8, 0, 1, 4_000, "merged")]
    assert ask(url, "SELECT * FROM accounts") == [(ALICE, "@alice:hs")]
    with create_engine(url, poolclass=NullPool).begin() as connection:
        found = tokens_of(connection, ALICE)
        (claim,) = leases.claim(connection, "me", 10, 1_000)
        assert delivery_log.get(connection, "3", Whose(user_id="@alice:hs")) is not None
    assert found == [("@alice:hs", "DESK", "encrypted DESK"), ("@alice:hs", "PHONE", "encrypted PHONE")]
    assert [row.delivery for row in claim.rows] == ["1", "2"]
    assert claim.uncertain_since == 4_000


async def test_events_of_an_older_database_are_sent_once_and_in_order_by_any_token_of_their_user(
    new_database: NewDatabase,
) -> None:
    """Two devices of one user, each in doubt of its first event: one of these is in the room, the other is not."""
    url, rooms = made_by("0001", new_database()), Rooms()
    for account, caller, seen_at in [(PHONE, ALICE_PHONE, 1_000), (DESK, ALICE_DESK, 2_000)]:
        whose = {"account": account, "user_id": caller.user_id, "device_id": caller.device_id, "seen_at": seen_at}
        token = Fernet(KEY).encrypt(caller.token.encode()).decode()
        add(url, "accounts", **whose, token=token, token_hash=token_hash(caller.token))
    for number, account in enumerate((PHONE, DESK, PHONE, DESK)):
        content = json.dumps({"msgtype": "m.text", "body": str(number)})
        add(url, "outbox", **rows.event(str(number), f"{account}|{ROOM}", content=content))
    put_lane(url, PHONE, ROOM, uncertain_since=clock.now_ms() - 1_000)
    put_lane(url, DESK, ROOM, uncertain_since=clock.now_ms() - 2_000)
    rooms.put("1", sender=ALICE_DESK.user_id, _txn=((ALICE_DESK.user_id, ALICE_DESK.device_id), "txn"))
    rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.token == ALICE_DESK.token else None)
    async with Rig(url, rooms) as rig:
        await rig.settled()
        assert rig.states() == ["sent"] * 4
    assert sorted(rooms.bodies()) == ["0", "1", "2", "3"]
    assert [body for body in rooms.bodies() if body != "1"] == ["0", "2", "3"]


def test_lane_whose_owner_died_is_in_doubt_after_the_migration(new_database: NewDatabase) -> None:
    """A replica that still runs, of the older version, ends its request before its lease does."""
    url = made_by("0001", new_database())
    know_alice(url)
    put_old(url, (PHONE, "!a:hs", "queued"))
    put_lane(url, PHONE, "!a:hs", owner="dead", lease_until=2_000_000, dirty=0)
    opened(url)
    of_nobody = url.startswith("sqlite")  # no other process has the file
    lease = 0 if of_nobody else 2_000_000
    assert ask(url, "SELECT owner IS NULL, lease_until, dirty, uncertain_since, sent_with FROM lanes") == [
        (of_nobody, lease, 1, 1_400_000, "")
    ]


def test_lane_that_an_older_replica_holds_is_left_to_it_until_its_lease_ends(new_database: NewDatabase) -> None:
    """Also for a caller who waits, and where the same user had a lane on another device, which only rested."""
    url, until = made_by("0001", new_database()), clock.now_ms() + 300_000
    know_alice(url)
    put_old(url, (PHONE, "!a:hs", "queued"), (DESK, "!a:hs", "queued"), (PHONE, "!resting:hs", "queued"))
    put_lane(url, PHONE, "!a:hs", owner="old", lease_until=until, dirty=0)
    put_lane(url, DESK, "!a:hs", lease_until=until + 1_000)
    put_lane(url, PHONE, "!resting:hs", lease_until=until)
    opened(url)
    held, resting = f"{ALICE}|!a:hs", f"{ALICE}|!resting:hs"
    with create_engine(url, poolclass=NullPool).begin() as connection:
        found = {one.fence.lane: one for one in leases.claim(connection, "me", 10, 30_000, only=[held, resting])}
        if url.startswith("sqlite"):
            assert found.keys() == {held, resting}
            return
        assert found.keys() == {resting}
        connection.execute(text("UPDATE lanes SET lease_until = 1000 WHERE lease_until > 0"))
        (late,) = leases.claim(connection, "me", 10, 30_000, only=[held])
        assert late.uncertain_since == until - 600_000


def test_lanes_without_events_go_and_unknown_accounts_stay_as_they_are(new_database: NewDatabase) -> None:
    url = made_by("0001", new_database())
    know_alice(url)
    put_old(url, (PHONE, "!a:hs", "sent"), ("stray", "!a:hs", "queued"))
    put_lane(url, PHONE, "!a:hs")
    put_lane(url, "stray", "!a:hs")
    opened(url)
    assert ask(url, "SELECT lane, account FROM lanes") == [("stray|!a:hs", "stray")]
    assert ask(url, "SELECT lane, account FROM outbox WHERE state = 'queued'") == [("stray|!a:hs", "stray")]


def test_keys_are_kept_and_name_no_users_yet(new_database: NewDatabase) -> None:
    url = made_by("0001", new_database())
    add(url, "api_keys", id="i", name="n", hash="h", rooms="[]", event_types="[]", admin=1, created_at=5, used_at=6)
    opened(url)
    assert ask(url, "SELECT * FROM api_keys") == [("i", "n", "h", "[]", "[]", 1, 5, None, 6, "[]")]


def test_replica_of_the_version_before_accepts_nothing_in_the_new_schema(new_database: NewDatabase) -> None:
    """It would put events into lanes that have no account any more."""
    url = new_database()
    opened(url)
    with pytest.raises(IntegrityError):
        put_lane(url, PHONE, "!a:hs")


@pytest.fixture
def upgrade(tmp_path: Path) -> Upgrade:
    """`upgrade(url, script)`: what a flowbridge of the next version does; in a directory of an unlucky name."""

    def run(url: str, script: str, *, shared: bool = False) -> None:
        scripts = tmp_path / "100% new"
        shutil.copytree(migrations.SCRIPTS, scripts)
        (scripts / "versions" / "next_colour.py").write_text(script)
        database = Database(url)
        database.open(shared=shared)
        with contextlib.closing(database), reported(database.url):
            migrations.upgrade(database.engine, "it", shared=shared, scripts=scripts, head="next")

    return run


def test_older_database_is_migrated_and_keeps_its_rows(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    tell(database_url, "INSERT INTO lanes (lane, account, sent_with) VALUES ('l', 'a', '')")
    upgrade(database_url, NEXT)
    assert ask(database_url, "SELECT lane, colour FROM lanes") == [("l", None)]
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("next",)]


def test_migration_that_fails_leaves_the_database_as_it_was(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    before = schema(database_url)
    with pytest.raises(StoreError, match="nowhere"):
        upgrade(database_url, NEXT + "    op.drop_table('nowhere')\n")
    assert schema(database_url) == before
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]


def test_command_beside_a_server_migrates_nothing(database_url: str, upgrade: Upgrade) -> None:
    opened(database_url)
    with pytest.raises(StoreError, match=f"version {migrations.HEAD}, not next: `flowbridge serve` brings"):
        upgrade(database_url, NEXT, shared=True)
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]


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
        list(threads.map(lambda _: opened(database_url, shared=True, make=True), range(4)))
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]


@pytest.mark.parametrize("before", ["fresh", "current"])
def test_start_imports_neither_alembic_nor_another_engine_s_dialect(database_url: str, before: str) -> None:
    """They would cost 20 MB and 0.3 s, and 2 MB."""
    if before == "current":
        opened(database_url)
    script = """
import sys, flowbridge.web.server
from flowbridge.store import Database
database = Database(sys.argv[1])
database.open()
database.close()
print(*sorted(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, database_url], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    loaded = set(done.stdout.split())
    assert "sqlalchemy" in loaded
    assert not loaded & {"alembic", "mako"}
    assert ("sqlalchemy.dialects.postgresql" in loaded) == database_url.startswith("postgresql")
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]
