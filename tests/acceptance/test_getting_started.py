"""docs/getting-started.md and the README's quick way: every command from the wheel on, and what they say it prints."""

import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests import transcripts
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.processes import REPOSITORY, free_port
from tests.transcripts import Step

PAGE = REPOSITORY / "docs" / "getting-started.md"
BOT = "@flowbot:localhost"
NOT_OURS = re.compile(r"FLOWBRIDGE_|BASE_URL|ACCESS_TOKEN|PYTHONPATH|VIRTUAL_ENV")


@pytest.fixture
def tools(wheel: Path, tmp_path: Path) -> Path:
    """The folder of programs where the page's first command has installed flowbridge."""
    install, version = transcripts.steps(transcripts.section(PAGE.read_text(), "1. Install"))
    assert wheel.name in install.command, "the page names another version"
    shutil.copy(wheel, tmp_path)
    folder = tmp_path / "tools"
    ((_, code, printed),) = transcripts.play([install], tmp_path, environment(folder))
    if code:
        stand_in(folder / "flowbridge", wheel, tmp_path, printed)
    transcripts.check([version], tmp_path, environment(folder))
    return folder


def stand_in(program: Path, wheel: Path, folder: Path, why: str) -> None:
    """A program that runs the wheel beside this environment's packages, where uv can fetch none for it."""
    print(f"uv cannot fetch what the wheel needs, so that it is tested without uv:\n{why}", file=sys.stderr)
    site = folder / "wheel"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packages = next(path for path in map(Path, sys.path) if (path / "jsonschema_rs").is_dir())
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({str(packages)!r}); "
        "from flowbridge.cli.main import main; main()"
    )
    skipped = "shift 3; " if program.name == "uvx" else ""  # --from WHEEL flowbridge
    program.write_text(f'#!/bin/sh\n{skipped}exec {sys.executable} -I -S -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)


def environment(tools: Path, **settings: str) -> dict[str, str]:
    """Of a reader: no setting of this shell, and nothing of this checkout but the pinned versions."""
    ours = {name: value for name, value in os.environ.items() if not NOT_OURS.match(name)}
    (tools / "curl").mkdir(parents=True, exist_ok=True)
    (tools / "curl" / ".curlrc").write_text('silent\nnoproxy = "*"\n')
    return {
        **ours,
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"], str(Path(sys.executable).parent)]),
        "CURL_HOME": str(tools / "curl"),
        "UV_NATIVE_TLS": "1",  # the machine's authorities, as pip takes them
        "UV_CONSTRAINT": str(REPOSITORY / "requirements.lock"),
        "UV_PYTHON": sys.executable,
        "UV_TOOL_DIR": str(tools / "uv"),
        "UV_TOOL_BIN_DIR": str(tools),
        **settings,
    }


def background(serve: str, url: str) -> str:
    """A command that never ends, as one that has done its work once the bridge is ready."""
    return (
        f"{serve.partition('#')[0]} 2>serve.log & SERVE=$!; trap 'kill $SERVE; wait' EXIT; "
        f"until curl -f {url}/readyz || ! kill -0 $SERVE; do sleep 0.1; done; test -s flowbridge.db.first-key"
    )


def staged(script: list[Step], room: str) -> list[Step]:
    """What a reader does beside the commands: leaves the bridge running, copies a key, joins one more room."""
    found = []
    for step in script:
        command = step.command
        if command == "flowbridge serve" and not step.output:
            command = background(command, "$BRIDGE")
        elif command == "KEY=fb_…":
            command = "KEY=$(cat flowbridge.db.first-key)"
        elif "/!encrypted:" in command:
            command = (
                f"curl -f -X POST -H \"X-API-Key: $KEY\" '$BRIDGE/join/!encrypted:example.org' >/dev/null; {command}"
            )
        elif "$KEY_OF_BACKUP" in command:
            command = f"KEY_OF_BACKUP=$(flowbridge keys create --room '{room}' 2>/dev/null); {command}"
        found.append(Step(command, step.output))
    return found


def test_page_does_what_it_says(
    tools: Path, synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path: Path
) -> None:
    page, alice, port = PAGE.read_text(), make_account(), str(free_port())
    encryption = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
    ops = make_room(alice, invite=[BOT])
    names = {
        "!ops:example.org": ops,
        "!encrypted:example.org": make_room(alice, invite=[BOT], initial_state=[encryption]),
        "!private:example.org": make_room(alice),
        "https://matrix.example.org": synapse.url,
        "http://localhost:8008": synapse.url,
        "http://localhost:8090": f"http://127.0.0.1:{port}",
        "$BRIDGE": f"http://127.0.0.1:{port}",
        "port 8090": f"port {port}",
        "example.org": synapse.server_name,
        "homeserver.yaml": str(synapse.directory / "homeserver.yaml"),
        "/tmp &&": f"{tools} &&",
    }
    (settings,) = transcripts.blocks(page, "sh")
    (tmp_path / ".env").write_text(transcripts.replaced(settings, names))
    _, _, *script = [
        Step(transcripts.replaced(step.command, names), transcripts.replaced(step.output, names))
        for step in staged(transcripts.steps(page), "!ops:example.org")
    ]
    assert len(script) > 20
    reader = environment(tools, FLOWBRIDGE_PORT=port, PYTHONUNBUFFERED="1")
    transcripts.check(script, tmp_path, reader)
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        said = Room(ops, alice, direct).messages()
    assert [event["sender"] for event in said] == [BOT, BOT, BOT]
    ping = "@alice:localhost"
    assert [event["content"]["body"] for event in said] == ["the backup is done", f"**done**, {ping}", "done"]
    assert said[1]["content"]["m.mentions"] == {"user_ids": [ping]}
    assert said[2]["content"]["formatted_body"] == "<b>done</b>"


def test_readme_leads_to_a_running_bridge(
    wheel: Path, synapse: LocalSynapse, bot: Account, make_room: MakeRoom, tmp_path: Path
) -> None:
    readme, port = (REPOSITORY / "README.md").read_text(), str(free_port())
    names = {
        "https://matrix.example.org": synapse.url,
        "@flowbot:example.org": bot.user_id,
        "PASSWORD='…'": f"PASSWORD='{bot.password}'",
        "http://localhost:8090": f"http://127.0.0.1:{port}",
        "--port 8090": f"--port {port}",
        "!ops:example.org": make_room(bot),
        "$YUwRidLecu": "$…",
    }
    run = transcripts.steps(transcripts.section(readme, "Run it"))
    first, hook, refused, *_ = transcripts.steps(readme)
    script = []
    for step in [*run, first]:
        command, output = transcripts.replaced(step.command, names), transcripts.replaced(step.output, names)
        if command.startswith("flowbridge serve"):
            command = background(command, f"http://127.0.0.1:{port}") + "; KEY=$(cat flowbridge.db.first-key)"
        script.append(Step(command, output))
    to_room = f"http://127.0.0.1:{port}/rooms/{make_room(bot)}"
    script.append(Step("export FLOWBRIDGE_PUBLIC_URL=https://bridge.example.org", ""))
    hook = Step(*(transcripts.replaced(each, names) for each in (hook.command, hook.output)))
    script.append(Step(f"{hook.command} 2>/dev/null", hook.output))  # what is for people is beside it
    script.append(Step(f"{refused.command.replace('…', to_room)} > refused.json", ""))
    assert wheel.name in "".join(step.command for step in run)
    shutil.copy(wheel, tmp_path)
    reader = environment(tmp_path / "tools")
    uvx = Step(f"uvx --from ./{wheel.name} flowbridge --version", "")
    ((_, code, printed),) = transcripts.play([uvx], tmp_path, reader)
    if code:
        stand_in(tmp_path / "tools" / "uvx", wheel, tmp_path, printed)
    transcripts.check([Step("shopt -s expand_aliases", ""), *script], tmp_path, reader)
    assert json.loads((tmp_path / "refused.json").read_text()) == json.loads(refused.output)
