"""`flowbridge keys`, run as a user runs it: alone, beside a running bridge, and against it."""

import os
import re
import stat
from pathlib import Path

import httpx
import pytest

from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.patience import until
from tests.processes import run, serving
from tests.upstream import PATIENCE, Request, Upstream

PLAIN = {"ACCESS_TOKEN": "bot", "FLOWBRIDGE_ENCRYPTED_ROOMS": "allow"}  # no room is asked whether it is encrypted
SECRET = re.compile(r"fb_[\w-]{43}")
ROOM = "!room:upstream"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that no .env of a developer is read, and the database is made here


@pytest.fixture
def database() -> Path:
    """As an installation makes it, before the first `serve`."""
    done = run("init")
    file = Path("flowbridge.db").resolve()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"The database is {file}.\n")
    return file


def create(*arguments: str, **settings: str) -> str:
    done = run("keys", "create", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    assert SECRET.fullmatch(done.stdout.removesuffix("\n")), "the key is alone on standard output"
    return done.stdout.strip()


def listed() -> dict[str, list[str]]:
    """name → the other columns: id, created, last used, revoked, scopes."""
    done = run("keys", "list")
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines()]
    assert rows[0] == ["ID", "NAME", "CREATED", "LAST USED", "REVOKED", "SCOPES"]
    return {row[1]: [row[0], *row[2:]] for row in rows[1:]}


# without a bridge


def test_commands_say_which_database_they_use_and_init_leaves_one_as_it_is(database: Path) -> None:
    secret = create()
    for arguments in (["create"], ["list"]):
        done = run("keys", *arguments)
        assert (done.returncode, done.stderr.splitlines()[0]) == (0, f"The database is {database}.")
    for id_, code in ((listed()["-"][0], 0), ("nobody", 1)):
        done = run("keys", "revoke", id_)
        assert (done.returncode, f" in {database}" in done.stderr) == (code, True)
    before = run("keys", "list").stdout
    assert run("init").returncode == 0
    assert run("keys", "list").stdout == before
    assert secret not in before


@pytest.mark.usefixtures("database")
def test_key_is_made_before_the_first_serve_listed_and_revoked() -> None:
    secret = create(
        "--name", "backup job", "--room", "!a:hs", "--room", "#ops:hs", "--event-type", "m.room.*",
        "--event-type", "org.example.x", "--admin",
    )  # fmt: skip
    other = create()
    found = listed()
    assert set(found) == {"backup job", "-"}
    id_, created, used, revoked, scopes = found["backup job"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created)
    assert (used, revoked) == ("-", "-")
    assert scopes == "!a:hs, #ops:hs; m.room.*, org.example.x; admin"
    assert found["-"][4] == "all rooms; all event types"

    done = run("keys", "revoke", id_)
    assert (done.returncode, done.stdout) == (0, "")
    again = run("keys", "revoke", id_)
    assert (again.returncode, again.stderr) == (0, done.stderr)
    assert listed()["backup job"][3] in done.stderr
    assert listed()["-"][3] == "-"

    everything = b"".join(path.read_bytes() for path in Path().iterdir())
    for made in (secret, other):
        assert made.encode() not in everything, "only its hash is stored"
        assert made not in run("keys", "list").stdout


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "some"), ("create",)])
def test_key_is_looked_for_in_no_new_database(arguments: tuple[str, ...]) -> None:
    """The old one may be elsewhere, or have been removed under a bridge that runs."""
    done = run("keys", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: there is no file flowbridge.db")
    assert done.stderr.endswith(
        f" in {Path.cwd()}: set FLOWBRIDGE_DATABASE_URL as the bridge has it, or run this in the bridge's folder; "
        "`flowbridge serve` and `flowbridge init` make a new database\n"
    )
    assert list(Path().iterdir()) == []


def test_scope_that_can_be_none_is_one_line_and_makes_no_key() -> None:
    done = run("keys", "create", "--room", "!a:hs", "--room", "")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "flowbridge: --room: the room is empty\n")
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("id_", ["nobody", "\udcff"])
def test_unknown_id_is_one_line_and_exit_code_1(id_: str) -> None:
    create("--name", "kept")
    done = run("keys", "revoke", id_)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flowbridge: there is no key ")
    assert done.stderr.count("\n") == 1
    assert listed()["kept"][3] == "-"


@pytest.mark.usefixtures("database")
def test_key_given_for_its_id_is_not_repeated() -> None:
    secret = create()
    done = run("keys", "revoke", secret)
    assert done.returncode == 1
    assert secret not in done.stderr


@pytest.mark.usefixtures("database")
def test_fixed_keys_are_warned_of() -> None:
    done = run("keys", "create", FLOWBRIDGE_API_KEYS="fb_key-of-32-characters-and-some-more")
    assert done.returncode == 0
    assert SECRET.fullmatch(done.stdout.strip())
    assert "FLOWBRIDGE_API_KEYS" in done.stderr
    assert "fb_fixed" not in done.stderr
    assert "FLOWBRIDGE_API_KEYS" not in run("keys", "create").stderr


def test_database_that_cannot_be_opened_is_one_line() -> None:
    done = run("keys", "list", FLOWBRIDGE_DATABASE_URL="sqlite:////nothing/there/flowbridge.db")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: ")
    assert done.stderr.count("\n") == 1


# with a bridge


def only_the_bot(request: Request) -> scripted.Behaviour | None:
    if request.header("authorization") not in ("Bearer bot", ""):
        return scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised access token")
    return None


def send(url: str, key: str, event_type: str = "m.room.message") -> httpx.Response:
    content = {"msgtype": "m.text", "body": "hello", "name": "a name"}
    target = f"{url}/rooms/{ROOM}/send/{event_type}"
    return httpx.post(target, json=content, headers={"X-API-Key": key}, trust_env=False, timeout=PATIENCE)


@pytest.mark.usefixtures("database")
def test_keys_work_beside_a_running_bridge(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Upstream(only_the_bot) as upstream:
        settings = {"BASE_URL": upstream.url, **PLAIN}
        before = create("--name", "before")
        with serving(log=log, cwd=tmp_path, **settings) as (url, _):
            assert send(url, before).status_code == 200
            during = create("--name", "during")
            assert send(url, during).status_code == 200, "a new key works at once"
            assert send(url, "fb_wrong").status_code == 401
            assert run("keys", "revoke", listed()["during"][0]).returncode == 0
            until(lambda: send(url, during).status_code == 401)
            assert Timing().key_refresh_seconds < 2, "promised are 2 s, which a busy machine need not keep"
            assert send(url, before).status_code == 200
            until(lambda: listed()["before"][2] != "-")
    said = log.read_text()
    assert "request" in said
    assert not SECRET.search(said)
    assert not (tmp_path / "flowbridge.db.first-key").exists()


@pytest.mark.usefixtures("database")
def test_scopes_are_held(tmp_path: Path) -> None:
    with Upstream(only_the_bot) as upstream:
        elsewhere = create("--room", "!other:upstream")
        topics = create("--event-type", "m.room.topic")
        with serving(log=None, cwd=tmp_path, BASE_URL=upstream.url, **PLAIN) as (url, _):
            for key in (elsewhere, topics):
                refused = send(url, key)
                assert (refused.status_code, refused.json()["errcode"]) == (403, "M_FORBIDDEN")
            assert "!other:upstream" in send(url, elsewhere).json()["error"]
            target = f"{url}/rooms/{ROOM}/state/m.room.name"
            for key in (elsewhere, topics):
                assert httpx.get(target, headers={"X-API-Key": key}, trust_env=False).status_code == 403
        assert upstream.events == []


def test_serve_makes_the_first_key_and_only_the_first(tmp_path: Path) -> None:
    file = tmp_path / "flowbridge.db.first-key"
    with Upstream(only_the_bot) as upstream:
        settings = {"BASE_URL": upstream.url, **PLAIN}
        for number in range(2):
            log = tmp_path / f"log{number}"
            with serving(log=log, cwd=tmp_path, **settings) as (url, _):
                key = file.read_text().strip()
                assert send(url, key).status_code == 200
            assert (str(file.name) in log.read_text()) == (number == 0)
            assert not SECRET.search(log.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [columns[0] for columns in listed().values()] == ["first"]


def test_first_key_is_shown_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    with Upstream(only_the_bot) as upstream:
        shown = on_a_terminal(tmp_path, BASE_URL=upstream.url, **PLAIN)
    assert len(SECRET.findall(shown)) == 1
    assert "serving" in shown
    assert not (tmp_path / "flowbridge.db.first-key").exists()


def test_serve_goes_on_when_the_file_is_there_already(tmp_path: Path) -> None:
    file, log = tmp_path / "flowbridge.db.first-key", tmp_path / "log"
    file.write_text("somebody's")
    with serving(log=log, cwd=tmp_path, BASE_URL="http://127.0.0.1:1", ACCESS_TOKEN="bot"):
        pass
    assert file.read_text() == "somebody's"
    assert "first_key_not_made" in log.read_text()


def test_serve_without_a_bot_account_makes_none(tmp_path: Path) -> None:
    with serving(cwd=tmp_path, BASE_URL="http://127.0.0.1:1"):
        pass
    assert not list(tmp_path.glob("*.first-key"))
    assert listed() == {}


@pytest.mark.usefixtures("database")
def test_key_without_a_bot_account_names_the_setting(tmp_path: Path) -> None:
    key = create()
    with serving(cwd=tmp_path, BASE_URL="http://127.0.0.1:1") as (url, _):
        refused = send(url, key)
    assert refused.status_code == 401
    assert "ACCESS_TOKEN" in refused.json()["error"]


def on_a_terminal(folder: Path, **settings: str) -> str:
    """What `serve` says when its standard error is a terminal, until it serves."""
    import pty
    import subprocess

    from tests.processes import FLOWBRIDGE, environment

    ours, theirs = pty.openpty()
    command = [FLOWBRIDGE, "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment(settings), cwd=folder, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while b"serving" not in said:
                said += os.read(ours, 4_096)
        finally:
            process.terminate()
            process.wait(PATIENCE)
            os.close(ours)
    return said.decode()
