"""`flowbridge deliveries`, run as a user runs it: on a terminal, and beside a running bridge."""

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.store import Database, outbox
from tests.conftest import MakeRoom
from tests.integration.store.events import event
from tests.patience import PATIENCE
from tests.processes import FLOWBRIDGE, run, serving

ROOM = "!room:example.org"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that no .env of a developer is read


@pytest.fixture
def one_dead_letter(tmp_path: Path) -> str:
    """The URL of a database with a dead letter named `a`."""
    url = f"sqlite:///{tmp_path}/flowbridge.db"
    database = Database(url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        outbox.insert_rows(connection, [event("a", f"account|{ROOM}", state="dead", settled_at=1)])
    database.engine.dispose()
    return url


class Terminal:
    """A command on a terminal of 80 columns."""

    def __init__(self, *arguments: str, **settings: str) -> None:
        self._terminal, inside = pty.openpty()
        environment = {**os.environ, **settings, "COLUMNS": "80", "TERM": "xterm"}
        self._process = subprocess.Popen(
            [FLOWBRIDGE, *arguments], env=environment, stdin=inside, stdout=inside, stderr=inside
        )
        os.close(inside)

    def until(self, words: str) -> str:
        """What it shows, up to these words."""
        shown = b""
        while words.encode() not in shown:
            assert select.select([self._terminal], [], [], PATIENCE)[0], shown
            shown += os.read(self._terminal, 4_096)
        return shown.decode()

    def say(self, words: str) -> None:
        os.write(self._terminal, words.encode())

    def end(self) -> int:
        """Wait for its end; the exit code."""
        code = self._process.wait(PATIENCE)
        os.close(self._terminal)
        return code


@pytest.mark.parametrize(("says", "code", "left"), [("n", 1, ["a"]), ("", 1, ["a"]), ("y", 0, [])])
def test_purge_on_a_terminal_asks(one_dead_letter: str, says: str, code: int, left: list[str]) -> None:
    settings = {"FLOWBRIDGE_DATABASE_URL": one_dead_letter}
    terminal = Terminal("deliveries", "purge", "--state", "dead", **settings)
    assert "Delete 1 dead deliveries?" in terminal.until("[y/N]")
    terminal.say(f"{says}\n")
    assert terminal.end() == code
    listed = json.loads(run("deliveries", "list", "--json", **settings).stdout)["deliveries"]
    assert [found["delivery_id"] for found in listed] == left


def test_list_fits_a_narrow_terminal(one_dead_letter: str) -> None:
    terminal = Terminal("deliveries", "list", FLOWBRIDGE_DATABASE_URL=one_dead_letter)
    shown = terminal.until("m.room.message")
    assert terminal.end() == 0
    assert "\x1b[31mdead" in shown
    assert ROOM in shown


def test_wrong_folder_is_said_and_leaves_no_database(tmp_path: Path) -> None:
    done = run("deliveries", "list")
    assert done.returncode == 2
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: there is no file flowbridge.db")
    assert list(tmp_path.iterdir()) == []


def test_database_that_is_away_is_one_line() -> None:
    url = "postgresql+psycopg://nobody:pa55word@127.0.0.1:1/none"
    done = run("deliveries", "list", FLOWBRIDGE_DATABASE_URL=url)
    assert done.returncode == 2
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: ")
    assert "pa55word" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def settings(database_url: str, synapse: LocalSynapse, bot: Account) -> dict[str, str]:
    return {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_DATABASE_URL": database_url,
        "FLOWBRIDGE_SECRET_KEY": Fernet.generate_key().decode(),
        "FLOWBRIDGE_API_KEYS": "fb_key-of-32-characters-and-some-more",
    }


@pytest.fixture
def client(settings: dict[str, str], tmp_path: Path) -> Iterator[httpx.Client]:
    """A caller of a bridge that runs."""
    with (
        serving(cwd=tmp_path, log=tmp_path / "log", **settings) as (url, _),
        httpx.Client(
            base_url=url,
            headers={"X-API-Key": "fb_key-of-32-characters-and-some-more"},
            trust_env=False,
            timeout=PATIENCE,
        ) as client,
    ):
        yield client


def test_replay_beside_a_running_bridge_is_sent_by_it(
    client: httpx.Client,
    settings: dict[str, str],
    bot: Account,
    friend: Account,
    make_room: MakeRoom,
    synapse: LocalSynapse,
) -> None:
    room_id = quote(make_room(friend, preset="public_chat"), safe="")
    path = f"/rooms/{room_id}/send/m.room.message"
    for text in ("one", "two"):
        assert client.post(path, json=text).status_code == 403
    until(client, ["dead", "dead"])
    listed = json.loads(run("deliveries", "list", "--json", **settings).stdout)
    assert listed == client.get("/deliveries").json()

    headers = {"Authorization": f"Bearer {bot.access_token}"}
    with httpx.Client(base_url=f"{synapse.url}/_matrix/client/v3", headers=headers, trust_env=False) as direct:
        direct.post(f"/join/{room_id}").raise_for_status()
        assert run("deliveries", "replay", "--dead", **settings).stdout == "2 of 2 dead letters are queued\n"
        until(client, ["sent", "sent"])
        seen = direct.get(f"/rooms/{room_id}/messages", params={"dir": "b", "limit": 2}).json()["chunk"]
    assert [one["content"]["body"] for one in seen] == ["two", "one"]


def test_replay_of_state_that_was_set_since_needs_a_word(
    client: httpx.Client, settings: dict[str, str], bot: Account, make_room: MakeRoom
) -> None:
    path = f"/rooms/{quote(make_room(bot), safe='')}/state/m.room.topic"
    old = client.put(path, json={"topic": "old"}).headers["Flowbridge-Delivery"]
    client.put(path, json={"topic": "new"}).raise_for_status()
    refused = run("deliveries", "replay", old, **settings)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--overwrite" in refused.stderr
    assert '"topic": "new"' in refused.stderr
    terminal = Terminal("deliveries", "replay", old, **settings)
    terminal.until("Overwrite it? [y/N]")
    terminal.say("n\n")
    assert terminal.end() == 1
    assert client.get(path).json() == {"topic": "new"}
    assert run("deliveries", "replay", old, "--overwrite", **settings).stdout == f"{old} is queued\n"
    until(client, ["sent", "sent"])
    assert client.get(path).json() == {"topic": "old"}


def until(client: httpx.Client, expected: list[str]) -> None:
    """Wait until these are the states of all that there is."""
    deadline = time.monotonic() + PATIENCE
    found: Any = None
    while found != expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
        found = [one["status"] for one in client.get("/deliveries").json()["deliveries"]]
