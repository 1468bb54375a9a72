"""`flowbridge device`, run as a user runs it: alone, and beside a running bridge that has the device."""

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.conftest import MakeAccount, MakeRoom
from tests.patience import PATIENCE, until
from tests.peer import Peer
from tests.processes import FLOWBRIDGE, environment, run, serving
from tests.unit.encryption.test_key_file import CLIENT_S

KEY = "fb_device-key-of-32-characters-and-some-more"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that no .env of a developer is read


@pytest.fixture
def settings(synapse: LocalSynapse, bot: Account, tmp_path: Path) -> dict[str, Any]:
    return {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{tmp_path}/flowbridge.db",
        "FLOWBRIDGE_API_KEYS": KEY,
        "FLOWBRIDGE_ENCRYPTED_ROOMS": "encrypt",
    }


def test_device_is_set_up_and_signs_another_client_by_its_recovery_key(
    synapse: LocalSynapse, bot: Account, settings: dict[str, Any]
) -> None:
    missing = run("device", "status", **settings)
    assert (missing.returncode, missing.stdout) == (2, "")
    done = run("device", "setup", **settings)
    assert done.returncode == 0, done.stderr
    recovery_key = done.stdout.strip()
    assert len(recovery_key.split()) == 12
    assert "is signed" in done.stderr
    again = run("device", "setup", **settings)
    assert (again.returncode, again.stdout) == (0, "")
    found = json.loads(run("device", "status", "--json", **settings).stdout)
    assert (found["standing"], found["device_id"], found["held_by"]) == ("signed", bot.device_id, None)
    told = run("doctor", "--json", **settings)
    (finding,) = [each for each in json.loads(told.stdout) if each["check"] == "encryption"]
    assert finding["state"] == "ok", finding
    with Peer(synapse.url, bot, signed=False) as client:
        client.ask("recover", recovery_key=recovery_key)
        own = {"user_id": client.me["user_id"], "device_id": client.me["device_id"]}
        until(lambda: client.ask("trust", **own)["signed"])


def test_running_bridge_lends_its_device_to_recover_and_goes_on(
    synapse: LocalSynapse, bot: Account, make_account: MakeAccount, make_room: MakeRoom, settings: dict[str, Any]
) -> None:
    """The account is another client's: strict clients read the bridge once its recovery key was given."""
    with Peer(synapse.url, bot) as owner, Peer(synapse.url, make_account()) as reader:
        recovery_key = owner.ask("storage", passphrase="")["recovery_key"]
        with serving(**settings) as (url, _):
            encryption = {
                "type": "m.room.encryption",
                "state_key": "",
                "content": {"algorithm": "m.megolm.v1.aes-sha2"},
            }
            room = make_room(bot, preset="public_chat", initial_state=[encryption])
            reader.ask("join", room=room)

            def say(text: str) -> str:
                path, headers = f"{url}/rooms/{quote(room)}/send/m.room.message", {"X-API-Key": KEY}
                answer = httpx.post(path, json={"msgtype": "m.text", "body": text}, headers=headers, trust_env=False)
                return str(answer.raise_for_status().json()["event_id"])

            unsigned = reader.read(say("not yet"), patience=3.0)
            assert unsigned["failure"] == "UNSIGNED_SENDER_DEVICE"
            wrong = run("device", "recover", stdin="no such key\n", **settings)
            assert (wrong.returncode, wrong.stdout) == (1, "")
            done = run("device", "recover", stdin=f"{recovery_key}\n", **settings)
            assert done.returncode == 0, done.stderr
            assert "is signed" in done.stderr
            found = reader.read(say("now"))
            assert (found["content"]["body"], found["failure"], found["shield"]) == ("now", None, 0)
            shown = run("device", "status", **settings)
            assert shown.returncode == 0
            assert "signed" in shown.stdout


def test_what_cannot_be_done_is_one_line(settings: dict[str, Any]) -> None:
    without_bot = run("device", "setup", **{**settings, "ACCESS_TOKEN": ""})
    assert (without_bot.returncode, without_bot.stderr.count("\n")) == (2, 1)
    refused = run("device", "setup", **{**settings, "ACCESS_TOKEN": "not-a-token"})
    assert (refused.returncode, refused.stdout) == (1, "")


@pytest.mark.parametrize(("said", "verified"), [("yes", True), ("no", False)])
def test_command_verifies_a_client_while_the_bridge_runs(
    synapse: LocalSynapse,
    bot: Account,
    make_account: MakeAccount,
    make_room: MakeRoom,
    settings: dict[str, Any],
    tmp_path: Path,
    said: str,
    verified: bool,
) -> None:
    """It shows the emoji that the client shows, and the bridge has its device back in the end."""
    with Peer(synapse.url, make_account()) as client, serving(**settings) as (_, _):
        algorithm = {"algorithm": "m.megolm.v1.aes-sha2"}
        encryption = {"type": "m.room.encryption", "state_key": "", "content": algorithm}
        client.ask("join", room=make_room(bot, preset="public_chat", initial_state=[encryption]))
        whose = {"user_id": bot.user_id, "device_id": bot.device_id}
        until(lambda: run("device", "status", **settings).returncode == 0)
        log = tmp_path / "said"
        with log.open("w") as errors:
            command = [FLOWBRIDGE, "device", "verify", client.me["user_id"]]
            process = subprocess.Popen(
                command, env=environment(settings), stdin=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            until(lambda: "Start the verification" in log.read_text())
            client.ask("begin", **whose)
            shown = client.ask("compare")["emoji"]
            until(lambda: "[yes/no]" in log.read_text())
            for symbol, name in shown:
                assert f"{symbol}  {name}" in log.read_text()
            assert process.stdin is not None
            process.stdin.write(f"{said}\n")
            process.stdin.flush()
            if verified:
                assert client.ask("decide", how="confirm") == {"verified": True}
            else:
                assert client.ask("outcome") == {"cancelled": "m.mismatched_sas"}
            assert process.wait(PATIENCE) == (0 if verified else 1), log.read_text()
        finally:
            process.kill()
            process.communicate()
        until(lambda: json.loads(run("device", "status", "--json", **settings).stdout)["held_by"] is not None)
    said_last = log.read_text().splitlines()[-1]
    assert said_last.startswith(f"Verified: {client.me['user_id']}" if verified else "flowbridge: ")


def test_room_keys_go_out_and_in_by_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    file, words = tmp_path / "keys.txt", tmp_path / "passphrase"
    words.write_text("two words\n")
    assert run("device", "setup", **settings).returncode == 0
    done = run("device", "export-keys", str(file), "--passphrase-file", str(words), **settings)
    assert (done.returncode, done.stderr) == (0, f"0 room keys are in {file}.\n")
    assert file.stat().st_mode & 0o777 == 0o600
    again = run("device", "export-keys", str(file), stdin="two words\n", **settings)
    assert (again.returncode, again.stderr) == (2, f"flowbridge: {file} exists already\n")
    read = run("device", "import-keys", str(file), stdin="two words\n", **settings)
    assert (read.returncode, read.stderr) == (0, "0 room keys were read.\n")


@pytest.mark.parametrize(
    ("text", "stdin", "why"),
    [
        (None, "two words\n", "keys.txt cannot be read: No such file or directory"),
        ("not one", "two words\n", "it is not a file of room keys"),
        ("not one", "", "a file of room keys has a passphrase: it is asked for, or read on standard input"),
        (CLIENT_S, "two words\n", "the passphrase is wrong, or the file of room keys is damaged"),
        ("x" * ((64 << 20) + 1), "two words\n", "has more than 64 MiB"),
    ],
    ids=["missing", "malformed", "no passphrase", "wrong passphrase", "huge"],
)
def test_file_of_room_keys_that_is_none_is_one_line(
    settings: dict[str, Any], tmp_path: Path, text: str | None, stdin: str, why: str
) -> None:
    file = tmp_path / "keys.txt"
    if text is not None:
        file.write_text(text)
    done = run("device", "import-keys", str(file), stdin=stdin, **settings)
    assert done.returncode in (1, 2)
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
