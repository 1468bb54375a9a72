"""The example application, run as a user would run it: two people talk through the bridge, with curl alone."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbridge.cli.demo.synapse import LocalSynapse
from tests.patience import PATIENCE
from tests.processes import serving

EXAMPLE = Path(__file__).parents[2] / "examples" / "messaging.sh"
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


@pytest.fixture(scope="module")
def bridge(synapse: LocalSynapse, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("example")
    with serving(BASE_URL=synapse.url, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{folder}/flowbridge.db") as (url, _):
        yield url


def run(url: str, *shell: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "BRIDGE": url, "no_proxy": "127.0.0.1"}
    return subprocess.run([*shell, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=4 * PATIENCE)


@pytest.mark.parametrize("shell", SHELLS)
def test_two_people_talk(bridge: str, shell: str) -> None:
    done = run(bridge, *([shell, "sh"] if shell == "busybox" else [shell]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any('"m.login.password"' in line for line in lines)
    said = ["Hello Alice!", "Hello Bob. This is my first room.", "Goodbye, Alice."]
    live = [line.partition("live | ")[2] for line in lines if line.startswith("live | ")]
    assert [text.partition(": ")[2] for text in live if ": " in text] == said, "the stream shows them in order"
    assert any(text.startswith("@bob-") and text.endswith("-> join") for text in live)
    members = lines[lines.index("== Who is in the room?") + 1 :][:2]
    assert sorted(member.partition("-")[0] for member in members) == ["@alice", "@bob"]
    assert all(member.endswith("-> join") for member in members)
    history = lines[lines.index("== What was said, the newest first?") + 1 :]
    assert [line.partition(": ")[2] for line in history if ": " in line] == said[::-1]
    assert lines[-1] == "== Done."


def test_step_that_fails_ends_it_and_is_named() -> None:
    done = run("http://127.0.0.1:1", "sh")
    assert done.returncode == 1
    assert "FAILED: GET /login: no answer" in done.stderr
    assert "Done" not in done.stdout


def test_refusal_of_the_bridge_is_shown(tmp_path: Path) -> None:
    """Here by a homeserver that allows no registration."""
    with (
        LocalSynapse(config={"enable_registration": False}) as closed,
        serving(BASE_URL=closed.url, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{tmp_path}/flowbridge.db") as (url, _),
    ):
        done = run(url, "sh")
    assert done.returncode == 1
    assert "FAILED: POST /register: HTTP 403" in done.stderr
    assert "M_FORBIDDEN" in done.stderr
