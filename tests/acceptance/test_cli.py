"""The commands, run as a user runs them."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flowbridge import __version__
from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.conftest import MakeRoom
from tests.patience import PATIENCE
from tests.processes import run_installed as run
from tests.processes import serving_installed as serving


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that no .env of a developer is read


@pytest.fixture
def database() -> None:
    assert run("init").returncode == 0


@pytest.mark.usefixtures("database")
def test_send_prints_the_event_id(synapse: LocalSynapse, bot: Account, make_room: MakeRoom) -> None:
    done = run(
        "send", make_room(bot), "m.room.message", "the backup is done",
        BASE_URL=synapse.url, ACCESS_TOKEN=bot.access_token,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\$\S+\n", done.stdout)


@pytest.mark.usefixtures("database")
def test_send_reads_standard_input(synapse: LocalSynapse, bot: Account, make_room: MakeRoom) -> None:
    done = run(
        "send", make_room(bot), "m.room.topic", "-", stdin='{"topic": "from a pipe"}',
        BASE_URL=synapse.url, ACCESS_TOKEN=bot.access_token,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["keys", "--help"], ["serve", "--port", "x"]])
def test_what_is_answered_at_once_does_not_wait_for_the_store(arguments: list[str]) -> None:
    """0.3 s of processor time each."""
    asking = f"import sys; sys.argv[1:] = {arguments}\nfrom flowbridge.cli.main import main\ntry: main()\n"
    asking += "finally: print([name for name in ('sqlalchemy', 'fastapi') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True)
    assert done.returncode in (0, 2)
    assert done.stdout.splitlines()[-1] == "[]"


def test_send_makes_no_database() -> None:
    """What is queued in one that no bridge reads is never sent."""
    done = run("send", "!a:b", "m.room.message", "x", BASE_URL="http://127.0.0.1:1", ACCESS_TOKEN="t")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no file flowbridge.db in {Path.cwd()}: " in done.stderr
    assert list(Path().iterdir()) == []


def test_send_without_a_bot_account_says_what_to_set() -> None:
    done = run("send", "!a:b", "m.room.message", "x", BASE_URL="http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flowbridge: ACCESS_TOKEN: ")


@pytest.mark.usefixtures("database")
def test_send_to_a_dead_homeserver_fails_with_its_reason() -> None:
    done = run("send", "!a:b", "m.room.message", "x", BASE_URL="http://127.0.0.1:1", ACCESS_TOKEN="t")
    assert done.returncode == 1
    assert "cannot connect to http://127.0.0.1:1" in done.stderr


def test_validate_prints_what_would_be_sent(tmp_path: Path) -> None:
    file = tmp_path / "message.json"
    file.write_text('{"payload": "hello"}')
    done = run("validate", "m.room.message", str(file))
    assert json.loads(done.stdout) == {"msgtype": "m.text", "body": "hello"}


def test_validate_lists_every_problem() -> None:
    done = run("validate", "m.room.message", stdin='{"msgtype": "m.image", "body": 1}')
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "/body: must be a string, not an integer  (m.room.message$m.image)",
        "/url: is required (one of url or file)  (m.room.message$m.image)",
    ]


def test_validate_without_its_file_is_one_line() -> None:
    done = run("validate", "m.room.message", "nothing.json")
    assert (done.returncode, done.stderr) == (2, "flowbridge: cannot read nothing.json: No such file or directory\n")


def test_doctor_finds_all_well(synapse: LocalSynapse, bot: Account) -> None:
    assert run("init").returncode == 0
    assert run("keys", "create").returncode == 0
    done = run(
        "doctor",
        BASE_URL=synapse.url,
        ACCESS_TOKEN=bot.access_token,
        FLOWBRIDGE_API_KEYS="fb_key-of-32-characters-and-some-more",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line[5:17].strip(): line[:4].strip() for line in done.stdout.splitlines()}
    assert found == {
        "schemas": "ok", "store": "ok", "address": "ok", "versions": "ok", "clock": "ok", "token": "ok",
        "api keys": "ok", "rate limit": "--",
    }  # fmt: skip
    assert bot.user_id in done.stdout
    assert bot.access_token not in done.stdout


def test_doctor_says_that_there_is_no_store_yet_and_makes_none(tmp_path: Path) -> None:
    settings = {"BASE_URL": "http://127.0.0.1:1", "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{tmp_path}/flowbridge.db"}
    assert f"--   store        FLOWBRIDGE_DATABASE_URL: there is no file {tmp_path}" in run("doctor", **settings).stdout
    assert list(tmp_path.iterdir()) == []
    settings["FLOWBRIDGE_DATABASE_URL"] = f"sqlite:///{tmp_path}/nothing/flowbridge.db"
    assert "BAD  store" in run("doctor", **settings).stdout


def test_doctor_tells_an_admin_the_rate_limit(synapse: LocalSynapse) -> None:
    admin = synapse.register("doctors-admin", admin=True)
    done = run("doctor", BASE_URL=synapse.url, ACCESS_TOKEN=admin.access_token)
    assert "ok   rate limit   the homeserver's own limits hold for this account" in done.stdout


def test_doctor_names_a_wrong_token(synapse: LocalSynapse) -> None:
    done = run("doctor", BASE_URL=synapse.url, ACCESS_TOKEN="wrong")
    assert done.returncode == 1
    assert "BAD  token" in done.stdout


def test_doctor_names_a_dead_homeserver() -> None:
    done = run("doctor", BASE_URL="http://127.0.0.1:1")
    assert done.returncode == 1
    assert "BAD  versions" in done.stdout


def test_doctor_and_serve_name_what_is_no_setting_and_the_default_homeserver() -> None:
    done = run("doctor", FLOWBRIDGE_ACCESS_TOKEN="t", FLOWBRIDGE_MAX_QUEUD="1", FLOWBRIDGE_KEY="of the nodes")
    lines = done.stdout.splitlines()
    assert "--   settings     FLOWBRIDGE_ACCESS_TOKEN is not a setting: set ACCESS_TOKEN" in lines
    assert "--   settings     FLOWBRIDGE_MAX_QUEUD is not a setting: set FLOWBRIDGE_MAX_QUEUED" in lines
    assert "--   settings     BASE_URL is not set: the default m.tekos.co is used" in lines
    assert "FLOWBRIDGE_KEY" not in done.stdout
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", FLOWBRIDGE_PORT=str(taken.getsockname()[1]), MATRIX_HOMESERVER="hs")
    assert re.search(r"unknown_setting name=MATRIX_HOMESERVER hint=.set BASE_URL", done.stderr)
    assert "default_homeserver" in done.stderr
    assert "cannot listen on 127.0.0.1" in done.stderr


def test_env_file_is_searched_for_near_misses_too() -> None:
    Path(".env").write_text("MATRIX_ACCESS_TOKEN=t\n")
    done = run("doctor", BASE_URL="http://127.0.0.1:1")
    assert "MATRIX_ACCESS_TOKEN is not a setting: set ACCESS_TOKEN" in done.stdout


def test_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"flowbridge {__version__}\n")


@pytest.mark.parametrize("body", ['{"msgtype":', '"hi', "[1"])
def test_json_that_breaks_off_is_no_text(tmp_path: Path, body: str) -> None:
    file = tmp_path / "message.json"
    file.write_text(body)
    done = run("validate", "m.room.message", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert "line 1 column" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"BASE_URL": "ftp://example.org"}, "BASE_URL: "),
        ({"BASE_URL": "https://example.org/_matrix/client"}, "BASE_URL: "),
        ({"BASE_URL": "http://matrix.example.org"}, "BASE_URL: "),
        ({"BASE_URL": "two words"}, "BASE_URL: "),
        ({"BASE_URL": "file:///nothing/there"}, "BASE_URL: "),
        ({"FLOWBRIDGE_LOG_LEVEL": "loud"}, "FLOWBRIDGE_LOG_LEVEL: "),
        ({"FLOWBRIDGE_API_KEYS": "secret-without-prefix"}, "FLOWBRIDGE_API_KEYS: "),
        ({"FLOWBRIDGE_API_KEYS": "fb_secret"}, "FLOWBRIDGE_API_KEYS: "),
        ({"FLOWBRIDGE_SCHEMAS_DIR": "/nothing/there"}, "FLOWBRIDGE_SCHEMAS_DIR: "),
        ({"FLOWBRIDGE_CA_FILE": "/nothing/there"}, "FLOWBRIDGE_CA_FILE: "),
        ({"ACCESS_TOKEN_FILE": "/nothing/there"}, "ACCESS_TOKEN_FILE: "),
        ({"FLOWBRIDGE_LEASE_SECONDS": "14"}, "FLOWBRIDGE_LEASE_SECONDS: 14 s is too short"),
        ({"FLOWBRIDGE_REUSED_TXN_ID": "forget"}, "FLOWBRIDGE_REUSED_TXN_ID: "),
        (
            {"FLOWBRIDGE_CORS_ORIGINS": "https://app.example.org/"},
            "FLOWBRIDGE_CORS_ORIGINS: 'https://app.example.org/' is ",
        ),
        ({"FLOWBRIDGE_PROXY": "bot:secret-without-prefix@proxy:1"}, "FLOWBRIDGE_PROXY: a proxy is http://host:port, "),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_wrong_setting_is_one_line_and_exit_code_2(settings: dict[str, str], says: str) -> None:
    done = run("serve", "--port", "0", **settings)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("flowbridge: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"flowbridge: {says}")
    assert "Traceback" not in done.stderr
    assert "secret-without-prefix" not in done.stderr


def test_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--port", str(taken.getsockname()[1]), BASE_URL="http://127.0.0.1:1")
    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1 port" in done.stderr


def test_sighup_follows_the_homeserver_to_its_new_address(tmp_path: Path, synapse: LocalSynapse) -> None:
    file, log = tmp_path / "address", tmp_path / "log"
    file.write_text("http://127.0.0.1:1")
    with serving(log=log, BASE_URL=file.as_uri()) as (url, process):
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
        file.write_text(synapse.url)
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while httpx.get(f"{url}/readyz", trust_env=False).status_code != 200:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    assert "homeserver_address" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_when_it_is_told_to(number: signal.Signals) -> None:
    with serving(BASE_URL="http://127.0.0.1:1") as (_, process):
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0


def test_demo_once_sends_every_example_and_leaves_nothing(tmp_path: Path) -> None:
    done = run("demo", "--once", "--port", "0", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "25 of 25 events are in the room" in done.stdout
    assert "✗" not in done.stdout
    assert list(tmp_path.iterdir()) == [], "nor a store, in the folder that it was started in"
