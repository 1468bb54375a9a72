"""docs/guide.md: each of its commands, in its order, in one shell."""

import subprocess
from pathlib import Path

from flowbridge.cli.demo.synapse import LocalSynapse
from tests import transcripts
from tests.patience import PATIENCE
from tests.processes import serving

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def test_every_command_of_the_guide_works(synapse: LocalSynapse, tmp_path: Path) -> None:
    commands = [step.command for step in transcripts.steps(GUIDE.read_text())]
    lines = [line.replace("/tmp/flowbridge-", f"{tmp_path}/") for line in commands]
    assert len(lines) > 20
    with serving(BASE_URL=synapse.url, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{tmp_path}/flowbridge.db") as (url, _):
        script = "\n".join(["set -euxo pipefail", *lines]).replace("http://localhost:8090", url)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
