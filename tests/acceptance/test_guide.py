"""docs/guide.md: each of its commands, in its order, in one shell."""

import re
import subprocess
from pathlib import Path

from flowbridge.cli.demo.synapse import LocalSynapse
from tests.patience import PATIENCE
from tests.processes import serving

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def commands() -> list[str]:
    """What follows a `$`, with its continuation lines."""
    blocks = re.findall(r"^```console\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\$ (.*(?:(?<=\\)\n.*)*)", "".join(blocks), re.MULTILINE)


def test_every_command_of_the_guide_works(synapse: LocalSynapse, tmp_path: Path) -> None:
    lines = [line.replace("/tmp/flowbridge-", f"{tmp_path}/") for line in commands()]
    assert len(lines) > 20
    with serving(BASE_URL=synapse.url, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{tmp_path}/flowbridge.db") as (url, _):
        script = "\n".join(["set -euxo pipefail", *lines]).replace("http://localhost:8090", url)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
